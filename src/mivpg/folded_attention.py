"""Attention between a few queries and many instances, without a projection of any instance.

Attention needs of an instance x only `(x W_q) (q W_k)^T` and, of what it gives, `(a V) W_o`: with the projections
folded into the R queries of each of A heads, `x (W_q W_k^T q^T)` and `a (V W_o)`, an instance costs A R products with
its width D instead of H. Exact but for rounding, and half of the work where A R is half of H, as in BLIP-2's Q-Former;
what is kept for the backward pass is A R numbers an instance. For small bags it does not pay: weights are folded anew
for each bag, while a projection is shared by a batch.
"""

# A heads of width d, H = A d; R queries, M instances of width D

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention

FOLD_FROM = 2048
"""Instances from which on a bag is large."""


def pays(instances: Tensor, num_queries: int, query_projection: nn.Linear, num_heads: int) -> bool:
    """Whether bags (B, M, D) are large, and R queries of each head fewer than its width."""
    return instances.shape[1] >= FOLD_FROM and num_heads * num_queries < query_projection.out_features


def instances_ask(
    instances: Tensor,
    key: Tensor,
    value: Tensor,
    query_projection: nn.Linear,
    output_projection: nn.Linear,
    *,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Attention whose queries are instances (CSA, Eq. 9), with its output projection.

    Args:
        instances: (B, M, D).
        key: Of the queries, by head, (B, A, R, d).
        value: Likewise.
        query_projection: D -> H.
        output_projection: H -> D.
        scaling: Of the products.
        dropout: Share of the weights that are dropped.

    Returns:
        (B, M, D).
    """
    num_heads = key.shape[1]
    with _in_float32(instances):
        weight, bias = _by_head(query_projection, num_heads)
        folded_key = (key.to(weight.dtype) @ weight).flatten(1, 2)  # (B, A R, D)
        key_bias = (key.to(weight.dtype) @ bias[:, :, None]).flatten(1)  # (B, A R)
        output_weight = output_projection.weight.unflatten(1, (num_heads, -1)).permute(1, 2, 0)  # (A, d, D)
        folded_value = (value.to(weight.dtype) @ output_weight).flatten(1, 2)  # (B, A R, D)
    scores = (instances @ folded_key.mT + key_bias[:, None]) * scaling  # (B, M, A R)
    weights = F.dropout(scores.unflatten(2, (num_heads, -1)).softmax(dim=-1), dropout)  # (B, M, A, R)
    return weights.flatten(2) @ folded_value + output_projection.bias


class FoldingCrossAttention(Blip2QFormerMultiHeadAttention):
    """BLIP-2's cross-attention; of large bags the folded form."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries (B, R, H) and instances (B, M, D) -> (B, R, H), and weights (B, A, R, M) where they are known."""
        instances = encoder_hidden_states
        assert instances is not None
        if not pays(instances, hidden_states.shape[1], self.key, self.num_attention_heads):
            return super().forward(hidden_states, attention_mask, instances, encoder_attention_mask, **kwargs)
        heads = (self.num_attention_heads, -1)
        query = self.query(hidden_states).unflatten(2, heads).transpose(1, 2)  # (B, A, R, d)
        with _in_float32(instances):
            weight, bias = _by_head(self.key, self.num_attention_heads)
            folded_query = (query.to(weight.dtype) @ weight).flatten(1, 2)  # (B, A R, D)
            # The same for all instances, so it changes nothing; but what is not in the graph gets no gradient.
            query_bias = (query.to(weight.dtype) @ bias[:, :, None]).flatten(1)  # (B, A R)
        scores = (folded_query @ instances.mT + query_bias[:, :, None]) * self.scaling  # (B, A R, M)
        scores = scores.unflatten(1, (self.num_attention_heads, -1))
        if encoder_attention_mask is not None:
            mask = encoder_attention_mask
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(dim=-1)
        kept = F.dropout(weights, self.attention_dropout if self.training else 0.0)
        read = (kept.flatten(1, 2) @ instances).unflatten(1, (self.num_attention_heads, -1))  # (B, A, R, D)
        with _in_float32(instances):
            weight, bias = _by_head(self.value, self.num_attention_heads)
            # Weights that were dropped sum to another number than one, by which the bias counts.
            states = read.to(weight.dtype) @ weight.mT + kept.to(weight.dtype).sum(dim=-1, keepdim=True) * bias[:, None]
        return states.transpose(1, 2).flatten(2), weights


def _by_head(projection: nn.Linear, num_heads: int) -> tuple[Tensor, Tensor]:
    """Weight (A, d, D) and bias (A, d) of a projection D -> H."""
    return projection.weight.unflatten(0, (num_heads, -1)), projection.bias.unflatten(0, (num_heads, -1))


def _in_float32(states: Tensor) -> torch.autocast:
    """Folding multiplies weights, whose rounding every instance would inherit."""
    return torch.autocast(states.device.type, enabled=False)
