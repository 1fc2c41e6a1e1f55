"""Multiple instance learning on embeddings: a bag becomes one vector by pooling over its instances.

B bags, M = N P instances, D their width, d the width of the bag's vector.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mivpg.aggregators.base import (
    BagVectorAggregator,
    VisualPrompts,
    check_choice,
    check_counts,
    check_dropout,
    flat_instances,
    masked_softmax,
)
from mivpg.errors import MivpgError

ATTENTION_SIZE = 128
"""L of AB-MIL, as its authors have it."""

POOLINGS = ("max", "mean", "lse")


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over what is real: (B, M, d) and mask (B, M) to (B, d)."""
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def masked_max(states: Tensor, mask: Tensor) -> Tensor:
    """Largest of what is real, feature by feature: (B, M, d) and mask (B, M) to (B, d)."""
    return states.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)


class MeanPooling(BagVectorAggregator):
    """`z = mean_n x_n`.

    Args:
        image_embeds_size: D, and the width of z.
        num_prompts: T, where `hidden_size` is given.
        hidden_size: H; None = z itself, for a classifier.
    """

    def __init__(self, image_embeds_size: int, *, num_prompts: int = 1, hidden_size: int | None = None):
        super().__init__(image_embeds_size, image_embeds_size, num_prompts=num_prompts, hidden_size=hidden_size)

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D) to prompts; coordinates are not read."""
        instances, mask = flat_instances(image_embeds, image_mask)
        weights = mask.to(instances.dtype) / mask.sum(dim=1, keepdim=True)
        return self.as_prompts(masked_mean(instances, mask), weights)


class MaxPooling(BagVectorAggregator):
    """`z = max_n x_n`, feature by feature.

    Args:
        image_embeds_size: D, and the width of z.
        num_prompts: T, where `hidden_size` is given.
        hidden_size: H; None = z itself, for a classifier.
    """

    def __init__(self, image_embeds_size: int, *, num_prompts: int = 1, hidden_size: int | None = None):
        super().__init__(image_embeds_size, image_embeds_size, num_prompts=num_prompts, hidden_size=hidden_size)

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D) to prompts; coordinates are not read."""
        return self.as_prompts(masked_max(*flat_instances(image_embeds, image_mask)))


class EmbeddingPooling(BagVectorAggregator):
    """MI-Net (Wang et al. 2018): instances through fully connected layers, then pooled to the bag's vector.

        h_n = dropout(FC_64(FC_128(FC_256(x_n))))     ReLU after each layer
        z   = max_n h_n  |  mean_n h_n  |  log mean_n exp h_n

    Args:
        image_embeds_size: D.
        num_prompts: T, where `hidden_size` is given.
        hidden_size: H; None = z itself, for a classifier.
        pooling: "max", "mean" or "lse" (log-sum-exp).
        layer_sizes: Widths of the layers; the last is that of z.
        dropout: Probability of it.

    Raises:
        MivpgError: An option has another value.
    """

    def __init__(
        self,
        image_embeds_size: int,
        *,
        num_prompts: int = 1,
        hidden_size: int | None = None,
        pooling: str = "max",
        layer_sizes: Sequence[int] = (256, 128, 64),
        dropout: float = 0.5,
    ):
        check_choice("pooling", pooling, POOLINGS)
        check_dropout(dropout)
        if (
            not isinstance(layer_sizes, list | tuple)
            or not layer_sizes
            or not all(isinstance(size, int) and size >= 1 for size in layer_sizes)
        ):
            raise MivpgError(
                f"layer_sizes is {layer_sizes!r}, expected a list of integers of at least 1, such as [256, 128]."
            )
        super().__init__(image_embeds_size, layer_sizes[-1], num_prompts=num_prompts, hidden_size=hidden_size)
        self.pooling = pooling
        self.embed = relu_layers(image_embeds_size, layer_sizes)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D) to prompts; coordinates are not read."""
        instances, mask = flat_instances(image_embeds, image_mask)
        embedded = self.dropout(self.embed(instances))  # (B, M, d)
        if self.pooling == "mean":
            return self.as_prompts(masked_mean(embedded, mask))
        if self.pooling == "max":
            return self.as_prompts(masked_max(embedded, mask))
        real = embedded.masked_fill(~mask[..., None], -torch.inf)
        return self.as_prompts(real.logsumexp(dim=1) - mask.sum(dim=1, keepdim=True).to(embedded.dtype).log())


class AttentionMil(BagVectorAggregator):
    """AB-MIL (Ilse et al. 2018): the bag is a weighted mean of its embedded instances.

        h_n = ReLU(FC(x_n));   a = softmax_n(w^T tanh(V h_n))   gated: w^T (tanh(V h_n) * sigmoid(U h_n))
        z   = sum_n a_n h_n

    Linear layers have biases, as in the authors' code.

    Args:
        image_embeds_size: D.
        num_prompts: T, where `hidden_size` is given.
        hidden_size: H; None = z itself, for a classifier.
        embed_size: Width of h and z.
        gated: With the gate.

    Raises:
        MivpgError: `embed_size` is no integer of at least 1.
    """

    def __init__(
        self,
        image_embeds_size: int,
        *,
        num_prompts: int = 1,
        hidden_size: int | None = None,
        embed_size: int = 500,
        gated: bool = False,
    ):
        check_counts(embed_size=embed_size)
        super().__init__(image_embeds_size, embed_size, num_prompts=num_prompts, hidden_size=hidden_size)
        self.embed = nn.Sequential(nn.Linear(image_embeds_size, embed_size), nn.ReLU())
        self.projection = nn.Linear(embed_size, ATTENTION_SIZE)  # V
        self.gate = nn.Linear(embed_size, ATTENTION_SIZE) if gated else None  # U
        self.score = nn.Linear(ATTENTION_SIZE, 1)  # w

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D) to prompts and weights; coordinates are not read."""
        instances, mask = flat_instances(image_embeds, image_mask)
        embedded = self.embed(instances)  # (B, M, d)
        hidden = self.projection(embedded).tanh()
        if self.gate is not None:
            hidden = hidden * self.gate(embedded).sigmoid()
        weights = masked_softmax(self.score(hidden)[..., 0], mask)  # (B, M)
        return self.as_prompts((weights[:, None] @ embedded)[:, 0], weights)


class DeepSets(BagVectorAggregator):
    """DeepSets (Zaheer et al. 2017): `z = rho(mean_n phi(x_n))`, phi and rho of four linear layers with ReLU between.

    The mean, rather than the paper's sum, is the Set Transformer's baseline and does not grow with the bag.

    Args:
        image_embeds_size: D.
        num_prompts: T, where `hidden_size` is given.
        hidden_size: H; None = z itself, for a classifier.
        layer_size: Width of all layers, and of z.

    Raises:
        MivpgError: `layer_size` is no integer of at least 1.
    """

    def __init__(
        self,
        image_embeds_size: int,
        *,
        num_prompts: int = 1,
        hidden_size: int | None = None,
        layer_size: int = 128,
    ):
        check_counts(layer_size=layer_size)
        super().__init__(image_embeds_size, layer_size, num_prompts=num_prompts, hidden_size=hidden_size)
        self.phi = relu_layers(image_embeds_size, [layer_size] * 4)[:-1]  # the last layer has no ReLU
        self.rho = relu_layers(layer_size, [layer_size] * 4)[:-1]

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D) to prompts; coordinates are not read."""
        instances, mask = flat_instances(image_embeds, image_mask)
        return self.as_prompts(self.rho(masked_mean(self.phi(instances), mask)))


def relu_layers(size: int, sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths, a ReLU after each."""
    layers: list[nn.Module] = []
    for before, after in zip([size, *sizes], sizes, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)
