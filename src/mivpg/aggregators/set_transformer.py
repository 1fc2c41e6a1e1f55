"""The Set Transformer (Lee et al. 2019): attention between the instances through a few learned points.

    MAB(Q, K) = O + ReLU(FC(O)),   O = Q' + softmax(Q' K'^T / sqrt(d)) V',   by head; Q', K', V' are projected to d
    ISAB(X)   = MAB(X, MAB(I, X))      I learned points
    PMA(X)    = MAB(S, X)              S learned seeds, one a prompt
    SAB(X)    = MAB(X, X)

B bags, M = N P instances, D their width, d the width inside, T prompts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mivpg.aggregators.base import Aggregator, VisualPrompts, check_counts, flat_instances
from mivpg.errors import MivpgError


class AttentionBlock(nn.Module):
    """MAB. The scale is that of the full width d, as in the authors' code, and not of a head."""

    def __init__(self, query_size: int, key_size: int, size: int, num_heads: int, *, layer_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(query_size, size)
        self.key = nn.Linear(key_size, size)
        self.value = nn.Linear(key_size, size)
        self.feed_forward = nn.Linear(size, size)
        self.norms = nn.ModuleList(nn.LayerNorm(size) if layer_norm else nn.Identity() for _ in range(2))

    def by_head(self, states: Tensor) -> Tensor:
        """(B, L, d) -> (B, heads, L, d / heads)."""
        return states.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries (B, L, ·) and keys (B, M, ·) with mask (B, M) to (B, L, d)."""
        query, key, value = self.query(queries), self.key(keys), self.value(keys)
        states = F.scaled_dot_product_attention(
            self.by_head(query),
            self.by_head(key),
            self.by_head(value),
            attn_mask=None if mask is None else mask[:, None, None],
            scale=query.shape[-1] ** -0.5,
        )
        states = self.norms[0](query + states.transpose(1, 2).flatten(2))
        return self.norms[1](states + self.feed_forward(states).relu())


class InducedBlock(nn.Module):
    """ISAB: (B, M, ·) to (B, M, d) at the cost of the number of points times M."""

    def __init__(self, input_size: int, size: int, num_heads: int, num_points: int, *, layer_norm: bool):
        super().__init__()
        self.points = nn.Parameter(torch.empty(1, num_points, size))
        self.gather = AttentionBlock(size, input_size, size, num_heads, layer_norm=layer_norm)
        self.spread = AttentionBlock(input_size, size, size, num_heads, layer_norm=layer_norm)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the points, as the authors do."""
        nn.init.xavier_uniform_(self.points)

    def forward(self, instances: Tensor, mask: Tensor) -> Tensor:
        """Instances (B, M, ·) and mask (B, M)."""
        return self.spread(instances, self.gather(self.points.expand(len(instances), -1, -1), instances, mask))


class SetTransformer(Aggregator):
    """Two ISAB, then PMA: a learned seed makes a prompt; several prompts see each other in two SAB.

    As in the authors' code there is no feed-forward before PMA, and no SAB after it where there is one seed.

    Args:
        image_embeds_size: D.
        num_prompts: T, the seeds.
        hidden_size: H; None = d, for a classifier.
        size: d.
        num_heads: Of each attention.
        num_points: Learned points of each ISAB.
        layer_norm: After each half of a MAB; off by default, as there.

    Raises:
        MivpgError: A number is below 1, or `size` no multiple of `num_heads`.
    """

    def __init__(
        self,
        image_embeds_size: int,
        *,
        num_prompts: int = 1,
        hidden_size: int | None = None,
        size: int = 128,
        num_heads: int = 4,
        num_points: int = 32,
        layer_norm: bool = False,
    ):
        check_counts(size=size, num_heads=num_heads, num_points=num_points)
        if size % num_heads:
            raise MivpgError(f"size is {size}, expected a multiple of num_heads, {num_heads}.")
        super().__init__(image_embeds_size, num_prompts, size if hidden_size is None else hidden_size)
        self.encoder = nn.ModuleList(
            InducedBlock(input_size, size, num_heads, num_points, layer_norm=layer_norm)
            for input_size in (image_embeds_size, size)
        )
        self.seeds = nn.Parameter(torch.empty(1, num_prompts, size))
        self.pool = AttentionBlock(size, size, size, num_heads, layer_norm=layer_norm)
        num_blocks = 2 if num_prompts > 1 else 0
        self.decoder = nn.ModuleList(
            AttentionBlock(size, size, size, num_heads, layer_norm=layer_norm) for _ in range(num_blocks)
        )
        self.projection = None if hidden_size is None else nn.Linear(size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the seeds, as the authors do."""
        nn.init.xavier_uniform_(self.seeds)

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D) to prompts (B, T, H); coordinates are not read."""
        states, mask = flat_instances(image_embeds, image_mask)
        for block in self.encoder:
            states = block(states, mask)
        embeds = self.pool(self.seeds.expand(len(states), -1, -1), states, mask)
        for block in self.decoder:
            embeds = block(embeds, embeds)
        if self.projection is not None:
            embeds = self.projection(embeds)
        return VisualPrompts(embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device))
