"""What gives each image prompts of its own and leaves the rest to the language model: LLaVA's and FROMAGe's layers.

B bags, N images a bag, P tokens an image, D their width, K prompts an image, H their width, n real images of a batch.
"""

import torch
from torch import Tensor, nn

from mivpg.aggregators.base import Aggregator, VisualPrompts, check_dropout
from mivpg.errors import MivpgError
from mivpg.layers import scatter_real


class LinearProjection(Aggregator):
    """LLaVA: every token of every image is a prompt. No token of an image sees another, no image sees another.

        v1 (Liu et al. 2023):    prompt = W x                        W (H, D)
        v1.5 (Liu et al. 2024):  prompt = W_2 GELU(W_1 x)            W_1 (H, D), W_2 (H, H)

    all with biases. LLaVA leaves its vision model's CLS token out; here all tokens that are given take part.

    Args:
        image_embeds_size: D.
        num_prompts: K, which is P.
        hidden_size: H.
        num_layers: 1 as in v1, 2 as in v1.5.

    Raises:
        MivpgError: `num_layers` is another number; in `forward`, images have another number of tokens.
    """

    per_image = True

    def __init__(self, image_embeds_size: int, *, num_prompts: int, hidden_size: int, num_layers: int = 1):
        super().__init__(image_embeds_size, num_prompts, hidden_size)
        if num_layers not in (1, 2):
            raise MivpgError(f"num_layers is {num_layers!r}, expected 1 (LLaVA's Linear) or 2 (Linear, GELU, Linear).")
        self.projection = nn.Sequential(nn.Linear(image_embeds_size, hidden_size))
        if num_layers == 2:
            self.projection.extend([nn.GELU(), nn.Linear(hidden_size, hidden_size)])

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D) to prompts (B, N P, H), image by image and token by token; coordinates are not read.

        Raises:
            MivpgError: P is not the number of prompts an image.
        """
        num_tokens = image_embeds.shape[2]
        if num_tokens != self.prompts_each:
            raise MivpgError(
                f"image_embeds have {num_tokens} tokens an image, a linear projection for {self.prompts_each} makes a "
                f"prompt of each: set num_query_tokens={num_tokens}."
            )
        return prompts_of_images(self.projection, image_embeds, image_mask)


class PooledProjection(Aggregator):
    """FROMAGe (Koh et al. 2023): K prompts of an image's pooled vector x (D,), its first token, by one Linear.

        prompts = Dropout(W x + b)      (K, H), W (K H, D)

    No image sees another.

    Args:
        image_embeds_size: D.
        num_prompts: K.
        hidden_size: H.
        dropout: Probability of it.

    Raises:
        MivpgError: `dropout` is no probability below 1.
    """

    per_image = True

    def __init__(self, image_embeds_size: int, *, num_prompts: int, hidden_size: int, dropout: float = 0.0):
        super().__init__(image_embeds_size, num_prompts, hidden_size)
        check_dropout(dropout)
        self.projection = nn.Sequential(
            nn.Linear(image_embeds_size, num_prompts * hidden_size),
            nn.Unflatten(-1, (num_prompts, hidden_size)),
            nn.Dropout(dropout),
        )

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D) to prompts (B, N K, H), image by image; other tokens and coordinates are not read."""
        return prompts_of_images(self.projection, image_embeds[:, :, 0], image_mask)


def prompts_of_images(projection: nn.Module, images: Tensor, image_mask: Tensor | None) -> VisualPrompts:
    """Runs `projection`, images (n, …) to prompts (n, K, H), on the real images of bags (B, N, …).

    What stands in padding, be it NaN, is not read at all.

    Returns:
        `embeds` (B, N K, H) and `mask` (B, N K), image by image; zero for padding.
    """
    if image_mask is None:
        image_mask = torch.ones(images.shape[:2], dtype=torch.long, device=images.device)
    real = image_mask.bool()
    prompts = projection(images[real])  # (n, K, H)
    embeds = scatter_real(prompts, real).flatten(1, 2)
    return VisualPrompts(embeds, real.long().repeat_interleave(prompts.shape[1], dim=1))
