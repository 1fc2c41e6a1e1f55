"""What reads a bag by cross-attention from latents in every block: Flamingo's Perceiver Resampler.

B bags, N images a bag, P tokens an image, M = N P instances, D their width, R latents, A heads of width d, H width of
the prompts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mivpg.aggregators.base import Aggregator, VisualPrompts, check_counts, flat_instances


class PerceiverResampler(Aggregator):
    """Flamingo's Perceiver Resampler (Alayrac et al. 2022), as OpenFlamingo (Awadalla et al. 2023) has it.

        X_0 (R, D)  learned, drawn from N(0, 1)
        X_i = PerceiverBlock_i(X_{i-1}, instances)      i = 1 … depth
        prompts = W_p LN(X_depth)                       (R, H); no W_p where H = D

    The latents are as wide as the instances. Instances meet the latents alone, never each other: O(R M).
    Flamingo adds learned embeddings of the frame's or the picture's number to its instances. A bag is unordered, so
    nothing is added here: shuffling its images changes nothing.

    Args:
        image_embeds_size: D.
        num_prompts: R.
        hidden_size: H.
        depth: Blocks.
        num_heads: A.
        head_size: d.
        ff_mult: Width of the feed-forward network, as a multiple of D.

    Raises:
        MivpgError: An option is below 1.
    """

    def __init__(
        self,
        image_embeds_size: int,
        *,
        num_prompts: int,
        hidden_size: int,
        depth: int = 6,
        num_heads: int = 8,
        head_size: int = 64,
        ff_mult: int = 4,
    ):
        super().__init__(image_embeds_size, num_prompts, hidden_size)
        check_counts(depth=depth, num_heads=num_heads, head_size=head_size, ff_mult=ff_mult)
        self.latents = nn.Parameter(torch.empty(num_prompts, image_embeds_size))  # X_0
        self.blocks = nn.ModuleList(
            PerceiverBlock(image_embeds_size, num_heads, head_size, ff_mult) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(image_embeds_size)
        self.projection = nn.Linear(image_embeds_size, hidden_size) if hidden_size != image_embeds_size else None  # W_p
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the latents; PyTorch's layers have their own."""
        nn.init.normal_(self.latents)

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D) to prompts (B, R, H); coordinates are not read."""
        instances, mask = flat_instances(image_embeds, image_mask)  # (B, M, D), (B, M)
        num_latents = self.prompts_each
        visible = F.pad(mask, (0, num_latents), value=True)[:, None, None]  # (B, 1, 1, M + R), all latents are
        latents = self.latents.expand(len(instances), -1, -1)  # (B, R, D)
        for block in self.blocks:
            latents = block(latents, instances, visible)
        latents = self.norm(latents)
        embeds = latents if self.projection is None else self.projection(latents)
        return VisualPrompts(embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device))


class PerceiverBlock(nn.Module):
    """Latents X (R, D) read instances Z (M, D), then each passes a feed-forward network; no Linear has a bias.

    C = [LN_z(Z); LN_x(X)]                                          (M + R, D)
    X <- X + W_o softmax((W_q LN_x(X)) (W_k C)^T / sqrt(d)) W_v C   for each of A heads
    X <- X + W_2 GELU(W_1 LN_f(X))
    """

    def __init__(self, size: int, num_heads: int, head_size: int, ff_mult: int):
        super().__init__()
        self.num_heads = num_heads
        self.instance_norm = nn.LayerNorm(size)  # LN_z
        self.latent_norm = nn.LayerNorm(size)  # LN_x
        self.query = nn.Linear(size, num_heads * head_size, bias=False)
        self.key = nn.Linear(size, num_heads * head_size, bias=False)
        self.value = nn.Linear(size, num_heads * head_size, bias=False)
        self.output = nn.Linear(num_heads * head_size, size, bias=False)  # W_o
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(size),  # LN_f
            nn.Linear(size, size * ff_mult, bias=False),
            nn.GELU(),
            nn.Linear(size * ff_mult, size, bias=False),
        )

    def heads(self, states: Tensor) -> Tensor:
        """(B, L, A d) -> (B, A, L, d)."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, latents: Tensor, instances: Tensor, visible: Tensor) -> Tensor:
        """Latents (B, R, D), instances (B, M, D) and a bool mask (B, 1, 1, M + R) -> latents (B, R, D)."""
        normed = self.latent_norm(latents)
        context = torch.cat([self.instance_norm(instances), normed], dim=1)  # C, (B, M + R, D)
        states = F.scaled_dot_product_attention(
            self.heads(self.query(normed)),
            self.heads(self.key(context)),
            self.heads(self.value(context)),
            attn_mask=visible,
        )  # (B, A, R, d)
        latents = latents + self.output(states.transpose(1, 2).flatten(2))
        return latents + self.feed_forward(latents)
