"""What every way to turn a bag into visual prompts shares: the contract between it and the model that holds it.

An aggregator is made from the width of the image embeddings, and reads bags as they are everywhere: `image_embeds`
(B, N, P, D) with `image_mask` (B, N), 1 = real and padding at the end, and `image_coords` (B, N, 2) where known. Where
the model pools an image's patches first, P is 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mivpg.errors import MivpgError


@dataclass
class VisualPrompts:
    """What every aggregator returns: a bag as a few vectors that a language model, or a classifier, reads."""

    embeds: Tensor
    """(B, T, H); T is R for MIVPG. Zero for padding."""
    mask: Tensor
    """(B, T), 1 = real; padding stands at the end."""
    weights: Tensor | None = None
    """(B, T, M), how much each prompt looked at each instance, from aggregators that average instances (`mean`,
    `abmil`); else None."""


class Aggregator(nn.Module):
    """The contract.

    A module with parameters of its own, outside of PyTorch's layers, sets them in `reset_parameters()`, which its
    constructor calls: a model that is loaded from a checkpoint without them calls it again.

    Args:
        image_embeds_size: D.
        num_prompts: T, or the prompts of one image where `per_image`.
        hidden_size: H, the width of the prompts.

    Raises:
        MivpgError: One of them is below 1; names it.
    """

    per_image: ClassVar[bool] = False
    """Whether the number of prompts grows with the number of images."""

    def __init__(self, image_embeds_size: int, num_prompts: int, hidden_size: int):
        check_counts(image_embeds_size=image_embeds_size, num_prompts=num_prompts, hidden_size=hidden_size)
        super().__init__()
        self.image_embeds_size = image_embeds_size
        self.prompts_each = num_prompts
        self.hidden_size = hidden_size

    def num_prompts(self, num_images: int) -> int:
        """T for a bag of so many images: the number of image marks in its text."""
        return self.prompts_each * (num_images if self.per_image else 1)

    def forward(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> VisualPrompts:
        """Bags (B, N, P, D) to prompts (B, T, H)."""
        raise NotImplementedError


class BagVectorAggregator(Aggregator):
    """One that makes a single vector z (B, d) of a bag, as multiple instance learning does.

    A language model gets `num_prompts` prompts of it by one linear layer, FROMAGe's way (Koh et al. 2023); a classifier
    reads z itself, which is what `hidden_size=None` stands for.

    Args:
        image_embeds_size: D.
        bag_size: d.
        num_prompts: T; read where `hidden_size` is given.
        hidden_size: H; by default d, and then there is one prompt, z.
    """

    def __init__(self, image_embeds_size: int, bag_size: int, *, num_prompts: int = 1, hidden_size: int | None = None):
        super().__init__(
            image_embeds_size,
            1 if hidden_size is None else num_prompts,
            bag_size if hidden_size is None else hidden_size,
        )
        self.expand = None if hidden_size is None else nn.Linear(bag_size, num_prompts * hidden_size)

    def as_prompts(self, bag: Tensor, weights: Tensor | None = None) -> VisualPrompts:
        """z (B, d), and the weight (B, M) of each instance in it where there is one, as visual prompts."""
        states = bag if self.expand is None else self.expand(bag)
        embeds = states.unflatten(1, (self.prompts_each, self.hidden_size))
        if weights is not None:
            weights = weights[:, None].expand(-1, self.prompts_each, -1)
        return VisualPrompts(embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=bag.device), weights)


@dataclass
class BagScores:
    """What a `ScoringAggregator` returns."""

    logits: Tensor
    """(B, C), of the bag; for two classes C is 1 or 2."""
    instance_scores: Tensor | None = None
    """(B, M, C), logits of each instance; zero for padding."""
    loss: Tensor | None = None
    """Where labels were given and the method has a loss of its own, with the bag's in it."""


class ScoringAggregator(nn.Module):
    """One that is defined by class scores of instances, so that it classifies bags and makes no visual prompts.

    Args:
        image_embeds_size: D.
        num_labels: C; 1 stands for a binary problem with one logit.
    """

    def __init__(self, image_embeds_size: int, num_labels: int):
        check_counts(image_embeds_size=image_embeds_size, num_labels=num_labels)
        super().__init__()
        self.image_embeds_size = image_embeds_size
        self.num_labels = num_labels

    def forward(
        self,
        image_embeds: Tensor,
        image_mask: Tensor | None = None,
        image_coords: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> BagScores:
        """Bags (B, N, P, D) and labels (B,), integers, to scores."""
        raise NotImplementedError


def check_counts(**options: int) -> None:
    """Raises a `MivpgError` that names the option where one is below 1."""
    for name, value in options.items():
        if not isinstance(value, int) or value < 1:
            raise MivpgError(f"{name} is {value!r}, expected an integer of at least 1.")


def check_dropout(dropout: float) -> None:
    """Raises a `MivpgError` where it is no probability below 1."""
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise MivpgError(f"dropout is {dropout!r}, expected a number from 0 to below 1.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises a `MivpgError` that names the option where its value is none of the choices."""
    if value not in choices:
        raise MivpgError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def flat_instances(image_embeds: Tensor, image_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every token of every image as an instance: (B, N, P, D) to (B, M, D) and a bool mask (B, M), M = N P."""
    batch_size, num_images, num_tokens = image_embeds.shape[:3]
    if image_mask is None:
        image_mask = torch.ones(batch_size, num_images, dtype=torch.long, device=image_embeds.device)
    mask = image_mask.bool().repeat_interleave(num_tokens, dim=1)
    # What stands in padding, be it NaN, is in no sum and in no gradient.
    return image_embeds.flatten(1, 2).masked_fill(~mask[..., None], 0.0), mask


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis among what is real; padding gets zero. `mask` broadcasts to `scores`."""
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
