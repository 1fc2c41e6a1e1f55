"""Figure 6: what the visual prompts looked at, patch by patch and image by image, in bags that a seed chooses."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mivpg.bags import Bag, BagCollator, BagDataset, Sample
from mivpg.captioning import GenerationOptions, caption_bags
from mivpg.errors import MivpgError
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.visualization import as_seen, attention_maps, draw_attention


def look_at_bags(
    folder: Path,
    samples: Sequence[Sample],
    *,
    num_bags: int,
    seed: int,
    prompt: str,
    generation: GenerationOptions,
) -> list[tuple[bytes, dict[str, Any]]]:
    """Captions a few bags and draws what the visual prompts looked at.

    Args:
        folder: A trained model.
        samples: Bags of images, such as a test split that was loaded without `features`.
        num_bags: How many of them are looked at.
        seed: Another seed, other bags.
        prompt: Precedes the caption of samples without a prompt of their own.
        generation: How captions are written.

    Raises:
        MivpgError: A bag has no images to draw, or another aggregator stands in MIVPG's place.

    Returns:
        Of each bag a PNG by `draw_attention`, and its numbers: `id`, `images` (paths), `references`, `caption`,
        `image_weights` (N), and of `AttentionMaps` the `patches` (N, P), `combined` (N, P) and, of the last block, the
        `heads` (A, R, N), summed over an image's patches where these are instances.
    """
    chosen = random.Random(f"figure6 {seed}").sample(samples, min(num_bags, len(samples)))
    for sample in chosen:
        if not sample.images:
            raise MivpgError(f"bag {sample.id!r} has no images to draw; load the data set without `features`.")
    model = MivpgForConditionalGeneration.from_pretrained(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    processor = MivpgProcessor.from_pretrained(folder)
    dataset = BagDataset(chosen, prompt=prompt)
    return [
        _look(model, processor, sample, dataset[index], generation=generation) for index, sample in enumerate(chosen)
    ]


def _look(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    sample: Sample,
    bag: Bag,
    *,
    generation: GenerationOptions,
) -> tuple[bytes, dict[str, Any]]:
    """The picture of a bag, and its numbers."""
    assert bag.images is not None
    (caption,) = caption_bags(model, processor, [bag], **generation.as_kwargs())
    maps = attention_maps(model, BagCollator(processor, training=False)([bag]))
    png = draw_attention(
        maps,
        as_seen(processor, bag.images),
        num_prefix_tokens=model.config.num_prefix_tokens,
        title=sample.id if sample.label is None else f"{sample.id}, {sample.label}",
        caption=caption,
        references=sample.captions,
    )
    return png, {
        "id": sample.id,
        "images": [str(path) for path in sample.images],
        "references": list(sample.captions),
        "caption": caption,
        "image_weights": _numbers(maps.combined[0].sum(dim=1)),
        "patches": None if maps.patches is None else _numbers(maps.patches[0]),
        "combined": _numbers(maps.combined[0]),
        "heads": _numbers(maps.images[-1, 0].unflatten(2, (len(bag.images), -1)).sum(dim=3)),
    }


def _numbers(weights: Tensor) -> list[Any]:
    """To six decimals."""
    return weights.double().round(decimals=6).tolist()
