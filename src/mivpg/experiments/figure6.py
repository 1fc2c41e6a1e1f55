"""Figure 6: what the visual prompts looked at, patch by patch and image by image, in bags that the seed alone chooses.

out/figure6-1.png, figure6-2.png, …
out/figure6.json                        what they show, in numbers
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mivpg.bags import Bag, BagCollator, BagDataset, Sample
from mivpg.captioning import GenerationOptions, caption_bags
from mivpg.errors import MivpgError
from mivpg.files import read_json, write_whole
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.visualization import as_seen, attention_maps, draw_attention


def write_figure6(
    out: Path,
    folder: Path,
    samples: Sequence[Sample],
    *,
    num_bags: int,
    seed: int,
    prompt: str,
    generation: GenerationOptions,
) -> list[dict[str, Any]]:
    """Writes what `look_at_bags` finds, with its arguments; what is there already is not done again.

    Returns:
        What the JSON file holds of each bag: `picture`, the name of its file, and the numbers of `look_at_bags`.
    """
    asked = {
        "model": str(folder),
        "prompt": prompt,
        "generation": generation.as_kwargs(),
        "ids": [sample.id for sample in _choose(samples, num_bags, seed)],
    }
    file = out / "figure6.json"
    if file.exists():  # it is written last
        found = read_json(file)
        if found["asked"] == asked and all((out / bag["picture"]).exists() for bag in found["bags"]):
            return found["bags"]
    bags = []
    looks = look_at_bags(folder, samples, num_bags=num_bags, seed=seed, prompt=prompt, generation=generation)
    for number, (png, bag) in enumerate(looks, start=1):
        bags.append({"picture": f"figure6-{number}.png"} | bag)
        write_whole(out / bags[-1]["picture"], png)
    write_whole(file, json.dumps({"asked": asked, "bags": bags}) + "\n")
    return bags


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
    chosen = _choose(samples, num_bags, seed)
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


def _choose(samples: Sequence[Sample], num_bags: int, seed: int) -> list[Sample]:
    """By the seed alone."""
    return random.Random(f"figure6 {seed}").sample(samples, min(num_bags, len(samples)))


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
