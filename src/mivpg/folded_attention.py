"""Attention between a few queries and many instances, without a projection of any instance.

Attention needs of an instance x only `(x W_q) (q W_k)^T` and, of what it gives, `(a V) W_o`: with the projections
folded into the R queries of each of A heads, `x (W_q W_k^T q^T)` and `a (V W_o)`, an instance costs A R products with
its width D instead of H. Exact but for rounding, and half of the work where A R is half of H, as in BLIP-2's Q-Former;
what is kept for the backward pass is A R numbers an instance. For small bags it does not pay: weights are folded anew
for each bag, while a projection is shared by a batch.
"""

# A heads of width d, H = A d; R queries, M instances of width D

import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention

FOLD_FROM = 2048
"""Instances from which on a bag is large."""


CHUNK = 2048
"""Instances that are computed at a time."""


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
    """Attention whose queries are instances (CSA, Eq. 9), with its output projection, added to the instances.

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
    recomputing = None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and _recomputing.of_thread:
        recomputing = _recomputing.of_thread[-1]
    updates: list[_Update] | None = None if recomputing is None else []
    updated = _InstancesAsk.apply(
        instances,
        folded_key * scaling,
        key_bias * scaling,
        folded_value,
        output_projection.bias,
        num_heads,
        dropout,
        torch.is_grad_enabled(),
        updates,
    )
    if recomputing is not None and updates:
        recomputing.note(updated, updates[0])
    return updated


class _InstancesAsk(torch.autograd.Function):
    """`x + dropout(softmax_by_head(x key^T + key_bias)) value + bias`; of what it computes it keeps the weights alone.

    Instances are taken `CHUNK` of a bag at a time, into tensors that are there before, so that nothing else has a bag's
    size. Bag by bag, since only then is a chunk contiguous: `torch.compile` takes no other `out`.
    """

    @staticmethod
    def forward(
        ctx, instances, key, key_bias, value, bias, num_heads: int, dropout: float, keep: bool, updates
    ) -> Tensor:
        """Instances (B, M, D), key and value (B, A R, D), key_bias (B, A R), bias (D,) -> (B, M, D).

        `updates`, a list where there is one, gets how they were made.
        """
        dtype = _compute_dtype(instances)
        key, key_bias, value, bias = key.to(dtype), key_bias.to(dtype), value.to(dtype), bias.to(dtype)
        updated = torch.empty_like(instances)
        size = (*instances.shape[:2], key.shape[1]) if keep else (0,)
        weights = instances.new_empty(size, dtype=dtype)
        is_kept = instances.new_empty(size if dropout else (0,), dtype=torch.bool)
        for row, part in _parts(instances):
            chunk = instances[row, part]  # (m, D)
            scores = torch.addmm(key_bias[row], chunk.to(dtype), key[row].mT).unflatten(1, (num_heads, -1))
            attention = scores.softmax(dim=-1, dtype=torch.promote_types(dtype, torch.float32)).flatten(1).to(dtype)
            if keep:
                weights[row, part] = attention
            chunk_is_kept = None
            if dropout:
                chunk_is_kept = torch.rand_like(attention, dtype=torch.float32) >= dropout
                if keep:
                    is_kept[row, part] = chunk_is_kept
            _update(updated[row, part], chunk, attention, chunk_is_kept, value[row], bias, dropout)
        if updates is not None:
            updates.append(_Update(instances.detach(), weights, is_kept, value, bias, dropout))
        ctx.save_for_backward(instances, key, value, weights, is_kept)
        ctx.num_heads, ctx.dropout = num_heads, dropout
        return updated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Of the five tensors; sums over chunks are float32 at least."""
        instances, key, value, weights, is_kept = ctx.saved_tensors
        dtype = weights.dtype
        grad_instances = torch.empty_like(instances) if ctx.needs_input_grad[0] else None
        sum_dtype = torch.promote_types(dtype, torch.float32)
        grad_key, grad_value = (torch.zeros_like(states, dtype=sum_dtype) for states in (key, value))
        grad_key_bias = key.new_zeros(key.shape[:2], dtype=sum_dtype)
        for row, part in _parts(instances):
            grad_chunk, attention = grad[row, part].to(dtype), weights[row, part]
            grad_attention = grad_chunk @ value[row].mT  # (m, A R)
            dropped = attention
            if ctx.dropout:
                scale = is_kept[row, part].to(dtype) / (1 - ctx.dropout)
                dropped, grad_attention = attention * scale, grad_attention * scale
            grad_value[row] += dropped.mT @ grad_chunk
            grad_scores = torch._softmax_backward_data(
                grad_attention.unflatten(1, (ctx.num_heads, -1)),
                attention.unflatten(1, (ctx.num_heads, -1)),
                -1,
                dtype,
            ).flatten(1)
            grad_key[row] += grad_scores.mT @ instances[row, part].to(dtype)
            grad_key_bias[row] += grad_scores.sum(dim=0)
            if grad_instances is not None:
                torch.add(grad[row, part], grad_scores @ key[row], out=grad_instances[row, part])
        return grad_instances, grad_key, grad_key_bias, grad_value, grad.sum(dim=(0, 1)), None, None, None, None


class _Update:
    """How CSA made the instances that it updated: `instances + dropout(weights) value + bias`."""

    def __init__(
        self, instances: Tensor, weights: Tensor, is_kept: Tensor, value: Tensor, bias: Tensor, dropout: float
    ) -> None:
        self.instances, self.weights, self.is_kept = instances, weights, is_kept
        self.value, self.bias, self.dropout = value, bias, dropout
        self.num_readers = 0
        """How often the backward pass will ask for them."""
        self.made: Tensor | None = None
        self.num_left = 0

    def read(self) -> Tensor:
        """Makes them, to the last bit as before, and holds them until the last reader has them."""
        if self.made is None:
            self.made, self.num_left = self.make(), self.num_readers
        made = self.made
        self.num_left -= 1
        if self.num_left == 0:
            self.made = None
        return made

    def make(self) -> Tensor:
        """(B, M, D)."""
        updated = torch.empty_like(self.instances)
        for row, part in _parts(self.instances):
            chunk, attention = self.instances[row, part], self.weights[row, part]
            is_kept = self.is_kept[row, part] if self.dropout else None
            _update(updated[row, part], chunk, attention, is_kept, self.value[row], self.bias, self.dropout)
        return updated


def _update(
    out: Tensor, chunk: Tensor, attention: Tensor, is_kept: Tensor | None, value: Tensor, bias: Tensor, dropout: float
) -> None:
    """Writes a chunk (m, D), updated; one piece for both times, so that they are the same to the last bit."""
    if is_kept is not None:
        attention = attention * is_kept / (1 - dropout)
    torch.add(chunk, torch.addmm(bias, attention, value), out=out)


class _Recomputing(threading.local):
    """Who is at it, the innermost last; by thread, as hooks are."""

    def __init__(self) -> None:
        self.of_thread: list[RecomputingInstances] = []


_recomputing = _Recomputing()


class RecomputingInstances(torch.autograd.graph.saved_tensors_hooks):
    """While blocks run, every second bag that CSA updates is kept as what it was made of, and made again when needed.

    What it was made of is kept anyway: the bag before, the weights, and a value for each query. So it costs one product
    more, where a block has twelve, and results are the same to the last bit. Every second one only: a bag whose
    predecessor is made again, too, would cost two.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, lambda packed: packed.read() if isinstance(packed, _Update) else packed)
        self.latest: tuple[Tensor, _Update] | None = None

    def __enter__(self) -> None:
        super().__enter__()
        _recomputing.of_thread.append(self)

    def __exit__(self, *args: object) -> None:
        _recomputing.of_thread.pop()
        self.latest = None
        super().__exit__(*args)

    def note(self, updated: Tensor, update: _Update) -> None:
        """Holds the bag until the next one is noted, so that no other has its place in memory."""
        is_second = self.latest is not None and _place(self.latest[0]) == _place(update.instances)
        self.latest = None if is_second else (updated.detach(), update)

    def _pack(self, tensor: Tensor) -> Tensor | _Update:
        if self.latest is None or _place(self.latest[0]) != _place(tensor):
            return tensor.detach()  # with its graph, a result would hold itself, and never go without a backward pass
        self.latest[1].num_readers += 1
        return self.latest[1]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What is the same for two tensors that are views of the same numbers in the same order, as long as they live."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _QueriesAsk(torch.autograd.Function):
    """`dropout(softmax(query x^T + query_bias)) x`; it keeps the weights.

    The backward pass takes instances `CHUNK` of a bag at a time, so that it makes nothing of a bag's size but the
    instances' gradient.
    """

    @staticmethod
    def forward(ctx, instances, query, query_bias, mask, num_heads: int, dropout: float):
        """Instances (B, M, D), query (B, A R, D), query_bias (B, A R), mask as transformers makes it.

        Returns:
            What is read (B, A, R, D), the sum of the weights that were not dropped (B, A, R), all weights (B, A, R, M).
        """
        dtype = _compute_dtype(instances)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        query, query_bias, states = query.to(dtype), query_bias.to(dtype), instances.to(dtype)
        scores = torch.baddbmm(query_bias[:, :, None], query, states.mT).unflatten(1, (num_heads, -1))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(dim=-1, dtype=sum_dtype).to(dtype)
        kept, is_kept = weights, None
        if dropout:
            is_kept = torch.rand_like(weights, dtype=torch.float32) >= dropout
            kept = weights * is_kept / (1 - dropout)
        read = (kept.flatten(1, 2) @ states).unflatten(1, (num_heads, -1))
        sums = kept.sum(dim=-1, dtype=sum_dtype)
        ctx.save_for_backward(instances, query, weights, is_kept, read, sums)
        ctx.dropout = dropout
        ctx.set_materialize_grads(False)  # nothing asks for a gradient of the weights, as a rule
        return read, sums, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_read, grad_sums, grad_weights):
        """Of instances, query and query_bias; sums over chunks are float32 at least."""
        instances, query, weights, is_kept, read, sums = ctx.saved_tensors
        dtype, sum_dtype = weights.dtype, sums.dtype
        if grad_read is None:  # the weights alone were asked for
            grad_read, grad_sums = torch.zeros_like(read), torch.zeros_like(sums)
        weights, grad_read = weights.flatten(1, 2), grad_read.flatten(1, 2)
        grad_sums = grad_sums.to(dtype).flatten(1)[..., None]  # (B, A R, 1)

        def of_weights(row: int, part: slice) -> tuple[Tensor, Tensor, Tensor]:
            """Of a chunk, by query (A R, m): the weights, those that were not dropped, the gradient of the former."""
            attention = kept = weights[row, :, part]
            grad = torch.addmm(grad_sums[row], grad_read[row], instances[row, part].to(dtype).mT)
            if is_kept is not None:
                scale = is_kept.flatten(1, 2)[row, :, part].to(dtype) / (1 - ctx.dropout)
                kept, grad = attention * scale, grad * scale
            if grad_weights is not None:
                grad = grad + grad_weights.flatten(1, 2)[row, :, part]
            return attention, kept, grad

        # What the softmax takes off every gradient, its mean under the weights: a sum over all instances, and so a sum
        # over what was read. In 16 bits that is rounded otherwise than they are, and they are summed up themselves.
        if dtype == sum_dtype and grad_weights is None:
            mean = (grad_read * read.flatten(1, 2)).sum(dim=-1, keepdim=True) + grad_sums * sums.flatten(1)[..., None]
        else:
            mean = query.new_zeros(*query.shape[:2], 1, dtype=sum_dtype)
            for row, part in _parts(instances):
                attention, _, grad = of_weights(row, part)
                mean[row] += (attention.to(sum_dtype) * grad).sum(dim=-1, keepdim=True)
        grad_instances = torch.empty_like(instances) if ctx.needs_input_grad[0] else None
        grad_query = torch.zeros_like(query, dtype=sum_dtype)
        grad_query_bias = query.new_zeros(query.shape[:2], dtype=sum_dtype)
        for row, part in _parts(instances):
            attention, kept, grad = of_weights(row, part)
            grad_scores = (attention * (grad - mean[row])).to(dtype)
            if grad_instances is not None:
                grad_instances[row, part] = (grad_scores.mT @ query[row]).addmm_(kept.mT, grad_read[row])
            grad_query[row] += grad_scores @ instances[row, part].to(dtype)
            grad_query_bias[row] += grad_scores.sum(dim=1)
        return grad_instances, grad_query, grad_query_bias, None, None, None


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
            query_bias, folded_query = query_bias * self.scaling, folded_query * self.scaling
        read, kept, weights = _QueriesAsk.apply(
            instances,
            folded_query,
            query_bias,
            encoder_attention_mask,
            self.num_attention_heads,
            self.attention_dropout if self.training else 0.0,
        )
        with _in_float32(instances):
            weight, bias = _by_head(self.value, self.num_attention_heads)
            # Weights that were dropped sum to another number than one, by which the bias counts.
            states = read.to(weight.dtype) @ weight.mT + kept.to(weight.dtype)[..., None] * bias[:, None]
        return states.transpose(1, 2).flatten(2), weights


def _parts(instances: Tensor) -> list[tuple[int, slice]]:
    """Where each chunk of (B, M, D) lies: its bag, and its instances."""
    batch_size, num_instances = instances.shape[:2]
    return [(row, slice(start, start + CHUNK)) for row in range(batch_size) for start in range(0, num_instances, CHUNK)]


def _compute_dtype(states: Tensor) -> torch.dtype:
    """What autocast would multiply these states in."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _by_head(projection: nn.Linear, num_heads: int) -> tuple[Tensor, Tensor]:
    """Weight (A, d, D) and bias (A, d) of a projection D -> H."""
    return projection.weight.unflatten(0, (num_heads, -1)), projection.bias.unflatten(0, (num_heads, -1))


def _in_float32(states: Tensor) -> torch.autocast:
    """Folding multiplies weights, whose rounding every instance would inherit."""
    return torch.autocast(states.device.type, enabled=False)
