"""TransMIL (Shao et al. 2021): a class token and the instances, two Nyström self-attentions, PPEG between them.

    h = ReLU(FC(x));   s = [c; h];   s = s + Nystrom(LN(s));   s = PPEG(s);   s = s + Nystrom(LN(s));   z = LN(s)[0]

B bags, N images a bag, M = N P instances, D their width, d the width inside.
"""

import torch
from torch import Tensor, nn

from mivpg.aggregators.base import BagVectorAggregator, VisualPrompts, check_counts, check_dropout, flat_instances
from mivpg.configuration_mivpg import MivpgQFormerConfig
from mivpg.errors import MivpgError
from mivpg.layers import BagGrid, NystromSelfAttention, PyramidPositionEncoding, lattice_cells


class NystromLayer(nn.Module):
    """`s <- s + dropout(W_o Nystrom(LN(s)))`; there is no feed-forward, as with its authors."""

    def __init__(self, config: MivpgQFormerConfig, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.attention = NystromSelfAttention(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """Bags of one length (B, L, d)."""
        return states + self.dropout(self.attention.output(self.attention.correlate(self.norm(states))))


class TransMil(BagVectorAggregator):
    """TransMIL.

    Landmarks and PPEG's square depend on the order and the length of a bag, so only bags of one length are run
    together, never padded, and a shuffled bag gives another vector. The authors fill the square with copies of the
    first instances, which then take part in attention; here filling happens inside PPEG alone. Where coordinates are
    known PPEG uses them. Tokens of an image that are not pooled go on the square in their order, the CLS token first:
    TransMIL does not know their grid. Queries, keys and values have biases, which the authors' have not.

    Args:
        image_embeds_size: D.
        num_prompts: T, where `hidden_size` is given.
        hidden_size: H; None = z itself, for a classifier.
        size: d.
        num_heads: Of each attention.
        num_landmarks: Of the approximation.
        pinv_iterations: Of the pseudo-inverse.
        dropout: After each attention.

    Raises:
        MivpgError: A size or number is no integer of at least 1, `dropout` is no probability below 1, or `size` is no
            multiple of `num_heads`; in `forward`, coordinates that are no lattice, or of images of several tokens.
    """

    def __init__(
        self,
        image_embeds_size: int,
        *,
        num_prompts: int = 1,
        hidden_size: int | None = None,
        size: int = 512,
        num_heads: int = 8,
        num_landmarks: int = 256,
        pinv_iterations: int = 6,
        dropout: float = 0.1,
    ):
        check_counts(size=size, num_heads=num_heads, num_landmarks=num_landmarks, pinv_iterations=pinv_iterations)
        check_dropout(dropout)
        if size % num_heads:
            raise MivpgError(f"size is {size}, expected a multiple of num_heads, {num_heads}.")
        super().__init__(image_embeds_size, size, num_prompts=num_prompts, hidden_size=hidden_size)
        config = MivpgQFormerConfig(
            hidden_size=size,
            encoder_hidden_size=size,
            num_attention_heads=num_heads,
            num_landmarks=num_landmarks,
            pinv_iterations=pinv_iterations,
            zero_init_residual=False,  # as everything here it starts the way PyTorch has it
        )
        self.embed = nn.Sequential(nn.Linear(image_embeds_size, size), nn.ReLU())
        self.class_token = nn.Parameter(torch.empty(1, 1, size))
        self.layers = nn.ModuleList(NystromLayer(config, dropout) for _ in range(2))
        self.position_encoding = PyramidPositionEncoding(size, zero_init=False)
        self.norm = nn.LayerNorm(size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the class token from N(0, 1)."""
        nn.init.normal_(self.class_token)

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D), coordinates (B, N, 2) where known, to prompts."""
        if image_coords is not None and image_embeds.shape[2] > 1:
            raise MivpgError(
                f"image_coords are of images, and these have {image_embeds.shape[2]} tokens each; pool their patches."
            )
        instances, mask = flat_instances(image_embeds, image_mask)
        lengths = mask.sum(dim=1).tolist()
        rows: list[int] = []
        vectors = []
        for length in sorted(set(lengths)):
            those = [row for row, other in enumerate(lengths) if other == length]
            cells = None if image_coords is None else [lattice_cells(image_coords[row, :length]) for row in those]
            vectors.append(self.bag_vectors(instances[those, :length], BagGrid([length] * len(those), cells)))
            rows += those
        return self.as_prompts(torch.cat(vectors)[torch.tensor(rows, device=instances.device).argsort()])

    def bag_vectors(self, bags: Tensor, grid: BagGrid) -> Tensor:
        """Bags of one length (B, M, D), all of it real, to (B, d)."""
        first, second = self.layers
        class_token = self.class_token.expand(len(bags), -1, -1)
        states = first(torch.cat([class_token, self.embed(bags)], dim=1))
        placed = self.position_encoding(states[:, 1:], grid)
        states = second(torch.cat([states[:, :1], placed], dim=1))
        return self.norm(states[:, 0])
