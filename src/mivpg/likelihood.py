"""How likely a model finds a caption after a bag, and whether the images it looked at are those the caption rests on.

    (log_likelihood,) = caption_log_likelihoods(model, processor, [bag], ["a red chair"])
    removal = remove_images(model, processor, bag, "a red chair", weights)   # without the most, the least, random ones

Attention that means something is attention whose images are missed: without the most attended images the caption that
was written for the whole bag should become less likely than without as many of the least attended, or of any.
"""

# B bags, N images a bag, P patch tokens an image, D vision width, T text tokens

import random
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import combinations, groupby
from math import ceil, comb
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mivpg.bags import Bag, BagCollator, BagDataset, Sample
from mivpg.captioning import GenerationOptions, caption_bags, check_batch_size, in_eval_mode
from mivpg.errors import MivpgError
from mivpg.evaluation import bootstrap_interval
from mivpg.layers import BagGrid
from mivpg.modeling_mivpg import MivpgForConditionalGeneration, MivpgOutput
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.visualization import check_has_weights, image_weights

SHARE_REMOVED = 0.25
"""Of a bag's images, rounded up: one of two to four, two of five to eight."""

IMAGES_AT_ONCE = 512
"""Of a large bag, images that are read at once when some are taken away; a bag that has more is read by itself."""

NUM_DRAWS = 16
"""Random choices of images to remove; all choices where there are no more."""


def read_captions_back(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    bags: Sequence[Bag],
    captions: Sequence[str],
    **kwargs: Any,
) -> tuple[MivpgOutput, dict[str, Tensor]]:
    """What a model says of captions, each token after the true ones before it.

    Args:
        model: Reads in eval mode.
        processor: The model's.
        bags: As for `caption_bags`.
        captions: One a bag.
        **kwargs: For the language model.

    Returns:
        The output, and the batch with its `labels` (B, T), -100 where no caption stands. A decoder-only model's logits
        at one token are about the next; an encoder-decoder's are about the label in their place.
    """
    with_captions = [replace(bag, caption=caption) for bag, caption in zip(bags, captions, strict=True)]
    whole = copy(processor)
    whole.max_caption_tokens = None  # a limit of training: what was written is read whole
    batch = BagCollator(whole, training=True)(with_captions)
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    with in_eval_mode(model):
        return model(**inputs, **kwargs), inputs


def caption_log_likelihoods(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    bags: Sequence[Bag],
    captions: Sequence[str],
    *,
    batch_size: int = 8,
) -> Tensor:
    """The log-likelihood of each caption after its bag: the sum over its tokens, and the one that ends it, in nats.

    Args:
        model: As in `caption_bags`.
        processor: The model's.
        bags: All of images, or all of features of one shape (P, D).
        captions: One a bag.
        batch_size: Bags read at once.

    Raises:
        BagError: The bags do not fit together.

    Returns:
        (B,), on the CPU.
    """
    found = []
    for start in range(0, len(bags), batch_size):
        part = slice(start, start + batch_size)
        output, batch = read_captions_back(model, processor, bags[part], captions[part])
        assert output.logits is not None
        logits, labels = output.logits, batch["labels"].to(output.logits.device)
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # (B, T), 0 at -100
        found.append(-losses.sum(dim=1).cpu())
    return torch.cat(found)


# ── Without some of the images ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What becomes of a caption's log-likelihood when images are taken out of its bag."""

    num_images: int
    num_removed: int
    log_likelihood: float
    """Of the caption after the whole bag, in nats."""
    most: float
    """Change of the log-likelihood without the most attended images; below zero where they are missed."""
    least: float
    """Without the least attended."""
    random: float
    """Without as many of all its images: the mean over all choices, or over `NUM_DRAWS` of them. The most and the least
    attended may be among them: so this is what a choice that does not look at the weights costs, and of bags of two
    images, too, which have no others."""


def remove_images(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    bag: Bag,
    caption: str,
    weights: Sequence[float],
    *,
    seed: int = 0,
    batch_size: int = 8,
) -> Removal:
    """Takes a quarter of a bag's images away and asks how likely its caption still is.

    Args:
        model: As in `caption_bags`.
        processor: The model's.
        bag: With `image_embeds`, of at least two images.
        caption: What the model wrote of the whole bag.
        weights: How much each image was looked at, (N,).
        seed: Of the random choices.
        batch_size: Bags read at once.

    Raises:
        BagError: PPEG finds no lattice in the coordinates of the whole bag.
        MivpgError: The bag has a single image.
    """
    num_images = len(weights)
    if num_images < 2:
        raise MivpgError(f"bag {bag.id!r} has one image, and nothing is left without it; two are needed.")
    num_removed = ceil(SHARE_REMOVED * num_images)
    by_weight = np.argsort(-np.asarray(weights), kind="stable").tolist()
    chosen = _choices(num_images, num_removed, random.Random(_seed_of(seed, bag)))
    bag = on_its_lattice(model, bag)
    removed = [(), by_weight[:num_removed], by_weight[-num_removed:], *chosen]
    at_once = max(1, min(batch_size, IMAGES_AT_ONCE // num_images))
    found: list[float] = []
    for start in range(0, len(removed), at_once):  # a large bag is there a few times, and not once a choice
        bags = [without(bag, indices) for indices in removed[start : start + at_once]]
        found += caption_log_likelihoods(model, processor, bags, [caption] * len(bags), batch_size=at_once).tolist()
    whole, most, least, *others = found
    return Removal(
        num_images=num_images,
        num_removed=num_removed,
        log_likelihood=whole,
        most=most - whole,
        least=least - whole,
        random=float(np.mean(others)) - whole,
    )


def _seed_of(seed: int, bag: Bag) -> bytes:
    """Of a bag's random choices: the bytes that `random` makes of the text, also of half a surrogate pair in its id."""
    return f"removal {seed} {bag.id}".encode(errors="surrogatepass")


def _choices(num_images: int, num_removed: int, generator: random.Random) -> list[Sequence[int]]:
    if comb(num_images, num_removed) <= NUM_DRAWS:
        return [*combinations(range(num_images), num_removed)]
    return [generator.sample(range(num_images), num_removed) for _ in range(NUM_DRAWS)]


def on_its_lattice(model: MivpgForConditionalGeneration, bag: Bag) -> Bag:
    """The same bag of features, its coordinates as PPEG reads them: column, row, and a step of one, (N, 3).

    So each image stays in its cell when others are taken away. From what is left alone PPEG would infer another step,
    or none. Bags whose coordinates PPEG does not read stay as they are.

    Raises:
        BagError: The coordinates are no lattice.
    """
    if bag.image_coords is None or model.config.qformer_config.position_encoding != "ppeg":
        return bag
    assert bag.image_embeds is not None
    grid = model.get_instance_grid(bag.image_embeds[None], None, bag.image_coords[None])
    if not isinstance(grid, BagGrid):
        return bag
    assert grid.cells is not None
    (cells,) = grid.cells
    return replace(bag, image_coords=torch.cat([cells.flip(1), torch.ones_like(cells[:, :1])], dim=1).float())


def without(bag: Bag, indices: Sequence[int]) -> Bag:
    """A bag of features less some of its images; without a copy where none is taken."""
    assert bag.image_embeds is not None
    if not indices:
        return bag
    kept = [index for index in range(len(bag.image_embeds)) if index not in set(indices)]
    coords = None if bag.image_coords is None else bag.image_coords[kept]
    return replace(bag, image_embeds=bag.image_embeds[kept], image_coords=coords)


def embed_images(model: MivpgForConditionalGeneration, processor: MivpgProcessor, bag: Bag) -> Bag:
    """The same bag with what the vision model says of its images (N, P, D) in their place.

    Raises:
        MivpgError: The model has no vision model.
    """
    if bag.images is None:
        return bag
    pixels = processor.pixels(bag.images)
    with in_eval_mode(model):
        image_embeds = model.get_image_embeds(pixels[None].to(model.device))[0]  # (N, P, D)
    return replace(bag, images=None, image_embeds=image_embeds.float().cpu())


# ── Over a data set ─────────────────────────────────────────────────────────────────────────────────────────────────

DIFFERENCES = {"most - random": ("most", "random"), "most - least": ("most", "least")}


def check_weights(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    samples: Sequence[Sample],
    *,
    generation: GenerationOptions,
    prompt: str = "",
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Removes images from many bags; bags of one image are left out. Some may have coordinates and others none.

    Args:
        model: As in `caption_bags`.
        processor: The model's.
        samples: Of images or stored features.
        generation: How the captions are written whose likelihood is asked for.
        prompt: Precedes the caption of samples without a prompt of their own.
        batch_size: Bags at once.
        seed: Of the random choices.

    Raises:
        BagError: A bag cannot be read.
        MivpgError: No bag has two images, or another aggregator stands in MIVPG's place.

    Returns:
        `bags`, of each bag `id`, `caption` and what `Removal` has; of `most`, `least`, `random` and the differences
        `most - random` and `most - least` the `mean` and its 95 % interval, `low` and `high`; `most_matters_more`, the
        share of bags in which the most attended images are missed more than random ones, likewise; and the `finding`.
    """
    check_batch_size(batch_size)
    check_has_weights(model)
    opened = BagDataset(samples, prompt=prompt)
    found: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(opened), batch_size), unit="batch", disable=None):
        indices = range(start, min(start + batch_size, len(opened)))
        bags = [embed_images(model, processor, opened[index]) for index in indices]
        bags = [bag for bag in bags if bag.image_embeds is not None and len(bag.image_embeds) > 1]
        for _, alike in groupby(bags, key=lambda bag: bag.image_coords is None):
            found += _check_batch(model, processor, list(alike), generation, seed=seed, batch_size=batch_size)
    if not found:
        raise MivpgError(f"of none of {len(samples)} bags could images be taken away; a bag has to have two or more.")
    summary: dict[str, Any] = {
        name: bootstrap_interval([bag[name] for bag in found]) for name in ("most", "least", "random")
    }
    for name, (first, second) in DIFFERENCES.items():
        summary[name] = bootstrap_interval([bag[first] - bag[second] for bag in found])
    summary["most_matters_more"] = bootstrap_interval([float(bag["most"] < bag["random"]) for bag in found])
    return summary | {"finding": finding(summary), "bags": found}


def _check_batch(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    bags: list[Bag],
    generation: GenerationOptions,
    **options: Any,
) -> list[dict[str, Any]]:
    """What `check_weights` says of each of a few bags, which fit into one batch and have two images or more."""
    captions = caption_bags(model, processor, bags, **generation.as_kwargs())
    rows = image_weights(model, BagCollator(processor, training=False)(bags)).tolist()
    found = []
    for bag, caption, row in zip(bags, captions, rows, strict=True):
        assert bag.image_embeds is not None
        weights = row[: len(bag.image_embeds)]
        removal = remove_images(model, processor, bag, caption, weights, **options)
        found.append({"id": bag.id, "caption": caption} | asdict(removal))
    return found


def finding(summary: dict[str, Any]) -> str:
    """What the differences say, whichever way they came out."""
    ends = [summary[name][end] for name in DIFFERENCES for end in ("low", "high")]
    if max(*ends, summary["most"]["high"]) < 0:
        return "Without its most attended images a caption loses more than without random or the least attended ones."
    if min(ends) > 0:
        return "Without its most attended images a caption loses less than without others: the weights mislead here."
    return (
        "It is not the most attended images whose absence a caption feels most, or it cannot be told from these bags."
    )


def check_table(checked: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for people: what was removed, and the mean change in nats with its 95 % interval."""
    names = {
        "most": "the most attended",
        "random": "random ones",
        "least": "the least attended",
        "most - random": "most attended less random",
        "most - least": "most less least attended",
    }
    rows = [
        (words, f"{checked[name]['mean']:+.2f} [{checked[name]['low']:+.2f}, {checked[name]['high']:+.2f}]")
        for name, words in names.items()
    ]
    share = checked["most_matters_more"]
    return [
        *rows,
        ("bags that miss them more", f"{share['mean']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"),
    ]
