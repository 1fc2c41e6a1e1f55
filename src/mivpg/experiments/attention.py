"""What trained models look at in generated products.

    attention = measure_attention(folders, root, store, …)
    attention_tables(attention)

Of the generated catalogue it is known which photo, and which pixels of it, show what a caption speaks of.
"""

# N images a bag, P patch tokens an image

import functools
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mivpg.bags import Bag, BagCollator, BagDataset, select
from mivpg.captioning import GenerationOptions, caption_bags
from mivpg.datasets import DatasetConfig
from mivpg.datasets.abo import AboConfig
from mivpg.errors import MivpgError
from mivpg.evaluation import bootstrap_interval_over_seeds
from mivpg.miniature.catalogue import CatalogueProduct, photograph_product, product_generator, read_truth
from mivpg.miniature.products import Photo
from mivpg.miniature.traits import EVERY_VALUE, can_be_said, says_nothing_wrong
from mivpg.miniature.wording import PARTS, said
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.report import Table
from mivpg.visualization import image_weights

NUM_FOREIGN = 2
"""Photos of another product that join a bag."""

NAMED = ("named", "not_named")
"""Whether a caption names a part right."""

Values = dict[str, dict[str, list[float]]]
"""Measure to quantity to a value a bag."""


def measure_attention(
    folders: Mapping[str, Mapping[int, Path]],
    root: Path,
    store: Path,
    *,
    prompt: str,
    generation: GenerationOptions,
    num_redrawn: int = 60,
    batch_size: int = 50,
) -> dict[str, Any]:
    """Measures what models trained on a generated catalogue look at, on the test bags of each one's split.

    Args:
        folders: Trained models by arm and seed; the seed drew the split of the catalogue.
        root: The catalogue.
        store: Features of all its photos.
        prompt: As in training.
        generation: How captions are written.
        num_redrawn: Test bags a seed whose photos are drawn again, to know which pixels show which part.
        batch_size: Bags at once.

    Raises:
        MivpgError: The catalogue is no generated one, or this version draws it differently.

    Returns:
        By arm and measure (`foreign`, `named`, `not_named`, `pixels`: what `foreign_values`, `named_values` and
        `pixel_values` return) each quantity's `mean`, `low` and `high` over seeds and bags; beside them `seeds`. A
        measure that no bag allows is left out, as `pixels` is of models without AB-MIL.
    """
    truth = {product.item_id: product for product in read_truth(root)}
    found: defaultdict[str, dict[int, Values]] = defaultdict(dict)
    for seed in sorted({seed for by_seed in folders.values() for seed in by_seed}):
        dataset = DatasetConfig(abo=AboConfig(root=root, split_seed=seed), features=store)
        opened = BagDataset(select(dataset.load(), "test"), prompt=prompt)
        bags = [opened[index] for index in range(len(opened))]
        products = [truth[bag.id] for bag in bags]
        mixed = add_foreign_photos(bags, products, seed=seed)
        photos = [redraw(product) for product in products[:num_redrawn]]
        for arm, by_seed in folders.items():
            if seed not in by_seed:
                continue
            model = MivpgForConditionalGeneration.from_pretrained(by_seed[seed])
            model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
            look = functools.partial(
                _look, model, MivpgProcessor.from_pretrained(by_seed[seed]), generation, batch_size
            )
            weights, captions = look(bags)
            weights_mixed, captions_mixed = look(mixed)
            values = named_values(weights, captions, products)
            values |= foreign_values(weights_mixed, captions_mixed, captions, products)
            if model.patch_pooling is not None:
                patches = [_patch_weights(model, bag) for bag in bags[:num_redrawn]]
                values |= pixel_values(patches, products[:num_redrawn], photos)
            found[arm][seed] = values
    return {arm: _summary(found[arm]) for arm in folders if arm in found}


@torch.no_grad()
def _look(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    generation: GenerationOptions,
    batch_size: int,
    bags: Sequence[Bag],
) -> tuple[list[np.ndarray], list[str]]:
    """Of each bag, the cross-attention to its images (N,), and the caption."""
    weights, captions = [], []
    for start in range(0, len(bags), batch_size):
        batch = [*bags[start : start + batch_size]]
        rows = image_weights(model, BagCollator(processor, training=False)(batch)).cpu().numpy()
        weights += [row[: _num_images(bag)] for row, bag in zip(rows, batch, strict=True)]
        captions += caption_bags(model, processor, batch, **generation.as_kwargs())
    return weights, captions


@torch.no_grad()
def _patch_weights(model: MivpgForConditionalGeneration, bag: Bag) -> np.ndarray:
    """AB-MIL's weights of a bag's patches (N, patches), without tokens before them; each row sums to one."""
    assert model.patch_pooling is not None and bag.image_embeds is not None
    weights = model.patch_pooling.attention_weights(bag.image_embeds.to(model.device))  # (N, P)
    patches = weights[:, model.config.num_prefix_tokens :]
    return (patches / patches.sum(dim=1, keepdim=True)).cpu().numpy()


def _num_images(bag: Bag) -> int:
    assert bag.image_embeds is not None
    return len(bag.image_embeds)


def _summary(by_seed: Mapping[int, Values]) -> dict[str, Any]:
    """Each quantity's mean and 95 % interval over the seeds and their bags."""
    summary: dict[str, Any] = {"seeds": sorted(by_seed)}
    for measure, quantities in next(iter(by_seed.values())).items():
        of_seeds = [by_seed[seed][measure] for seed in summary["seeds"]]
        intervals = {}
        for quantity in quantities:
            values = [values[quantity] for values in of_seeds if values[quantity]]
            if values:
                intervals[quantity] = bootstrap_interval_over_seeds(values) | {"num_bags": sum(map(len, values))}
        if intervals:
            summary[measure] = intervals
    return summary


# Photos of another product.


def add_foreign_photos(bags: Sequence[Bag], products: Sequence[CatalogueProduct], *, seed: int) -> list[Bag]:
    """Each bag with `NUM_FOREIGN` photos of a product of another family at its end.

    Args:
        bags: With features.
        products: What each bag shows; at least two families.
        seed: Which product, and which of its photos.
    """
    generator = random.Random(f"foreign photos {seed}")
    mixed = []
    for bag, product in zip(bags, products, strict=True):
        others = [other for other, shown in zip(bags, products, strict=True) if shown.family != product.family]
        other = generator.choice(others)
        rows = generator.sample(range(_num_images(other)), NUM_FOREIGN)
        assert bag.image_embeds is not None and other.image_embeds is not None
        mixed.append(replace(bag, image_embeds=torch.cat([bag.image_embeds, other.image_embeds[rows]])))
    return mixed


def foreign_values(
    weights: Sequence[np.ndarray],
    captions: Sequence[str],
    captions_before: Sequence[str],
    products: Sequence[CatalogueProduct],
) -> Values:
    """How much is looked at photos that do not belong to a product, and what they do to its caption.

    Args:
        weights: Cross-attention to the photos of each bag, the last `NUM_FOREIGN` of which are another product's.
        captions: Of these bags.
        captions_before: Of the bags without these photos.
        products: What is true of each bag.

    Returns:
        `foreign`, of each bag: the attention to the foreign photos beside as many own ones, `share`, the mean over all
        choices of these: 0.5 on average where photos are not told apart, since either product might have been the
        foreign one. Attention to a photo in shares of even attention, `foreign` and `own`: where products are looked
        at unequally, their mean need not be 1. Whether the caption says nothing wrong (0 or 1), `before` and `after`,
        and the difference `after - before`.
    """
    before = [float(says_nothing_wrong(*pair)) for pair in zip(captions_before, products, strict=True)]
    after = [float(says_nothing_wrong(*pair)) for pair in zip(captions, products, strict=True)]
    return {
        "foreign": {
            "share": [_foreign_share(row) for row in weights],
            "foreign": [float(row[-NUM_FOREIGN:].mean() * len(row)) for row in weights],
            "own": [float(row[:-NUM_FOREIGN].mean() * len(row)) for row in weights],
            "before": before,
            "after": after,
            "after - before": [later - earlier for earlier, later in zip(before, after, strict=True)],
        }
    }


def _foreign_share(weights: np.ndarray) -> float:
    own, foreign = weights[:-NUM_FOREIGN], weights[-NUM_FOREIGN:].sum()
    return float(np.mean([foreign / (foreign + sum(chosen)) for chosen in combinations(own, NUM_FOREIGN)]))


# Photos that show what the caption names.


def named_values(
    weights: Sequence[np.ndarray], captions: Sequence[str], products: Sequence[CatalogueProduct]
) -> Values:
    """Whether the photos that show a part are looked at more, where the caption names it right and where not.

    Args:
        weights: Cross-attention to the photos of each bag.
        captions: Of these bags.
        products: What is true of each bag.

    Returns:
        `named` and `not_named`, of each bag with such a part, the mean over parts that some of its photos show and
        others do not: the share of attention on the photos that show it (`attention`), the share of photos that they
        are (`even`), and `attention - even`.
    """
    values: Values = {measure: {"attention": [], "even": [], "attention - even": []} for measure in NAMED}
    for row, caption, product in zip(weights, captions, products, strict=True):
        shares: dict[str, list[tuple[float, float]]] = {measure: [] for measure in NAMED}
        for trait in PARTS:
            shows = np.array([trait in seen for seen in product.seen])
            if not can_be_said(product, trait) or shows.all() or not shows.any():
                continue
            is_named = said(caption, trait, EVERY_VALUE[trait]) == product.traits[trait]
            shares[NAMED[0] if is_named else NAMED[1]].append((float(row[shows].sum()), float(shows.mean())))
        for measure, pairs in shares.items():
            if pairs:
                attention, even = np.mean(pairs, axis=0).tolist()
                for name, value in {"attention": attention, "even": even, "attention - even": attention - even}.items():
                    values[measure][name].append(value)
    return values


# Pixels that show a part.


def redraw(product: CatalogueProduct) -> list[Photo]:
    """The photos of a product of a generated catalogue once more, as they were before they became JPEG files.

    Raises:
        MivpgError: Other photos come out: the catalogue was drawn by another version.
    """
    seed, index = int(product.item_id[1:-6]), int(product.item_id[-6:])
    drawn, photos = photograph_product(product_generator(seed, index))
    seen = tuple(tuple(sorted(photo.seen)) for photo in photos)
    if (drawn.family, drawn.traits, tuple(photo.view for photo in photos), seen) != (
        product.family,
        product.traits,
        product.views,
        product.seen,
    ):
        raise MivpgError(
            f"item_id {product.item_id!r} comes out as another product: the catalogue was drawn by another version of "
            "mivpg; draw it again."
        )
    return photos


def pixel_values(
    weights: Sequence[np.ndarray], products: Sequence[CatalogueProduct], photos: Sequence[Sequence[Photo]]
) -> Values:
    """How much of AB-MIL's weight lies on the pixels that show a part; a patch's is spread evenly over its pixels.

    Args:
        weights: Of the patches of each bag (N, patches); each row sums to one.
        products: What is true of each bag.
        photos: Of each bag, with where their parts are; the vision model sees them whole.

    Returns:
        `pixels`, of each bag, the mean over the parts that its photos show and that can be spoken of: the weight on the
        part (`part`), the share of the photo that it covers (`part area`), and the difference (`part - area`); likewise
        of all that is no background: `product`, `product area` and `product - area`.
    """
    values: dict[str, list[float]] = {
        f"{what}{name}": [] for what in ("part", "product") for name in ("", " area", " - area")
    }
    for of_bag, product, drawn in zip(weights, products, photos, strict=True):
        shares: dict[str, list[tuple[float, float]]] = {"part": [], "product": []}
        for row, photo in zip(of_bag, drawn, strict=True):
            places = [photo.parts[trait] for trait in PARTS if trait in photo.seen and can_be_said(product, trait)]
            shares["part"] += [_weight_and_area(row, place) for place in places]
            shares["product"].append(_weight_and_area(row, np.any([*photo.parts.values()], axis=0)))
        for what, pairs in shares.items():
            if pairs:
                weight, area = np.mean(pairs, axis=0).tolist()
                values[what].append(weight)
                values[f"{what} area"].append(area)
                values[f"{what} - area"].append(weight - area)
    return {"pixels": values}


def _weight_and_area(weights: np.ndarray, place: np.ndarray) -> tuple[float, float]:
    """The weight of patches (patches,) on a place of a picture (side, side), and the share of it that the place is."""
    grid = math.isqrt(len(weights))
    covered = place.reshape(grid, len(place) // grid, grid, -1).mean(axis=(1, 3)).ravel()  # (patches,)
    return float(weights @ covered), float(covered.mean())


def attention_tables(attention: Mapping[str, Any]) -> list[Table]:
    """A table a measure; an arm without it has no row.

    Args:
        attention: What `measure_attention` returns.
    """
    foreign, named, pixels = [], [], []
    for arm, measures in attention.items():
        if "foreign" in measures:
            of = measures["foreign"]
            shares = [_percent(of[name]) for name in ("share", "before", "after", "after - before")]
            foreign.append([arm, shares[0], *(f"{of[name]['mean']:.2f}" for name in ("foreign", "own")), *shares[1:]])
        for measure, words in zip(NAMED, ("names it right", "does not"), strict=True):
            if measure in measures:
                of = measures[measure]
                shares = [_percent(of[name]) for name in ("attention", "even", "attention - even")]
                named.append([arm, words, *shares, str(of["attention"]["num_bags"])])
        for what in ("part", "product"):
            if "pixels" in measures and what in measures["pixels"]:
                of = measures["pixels"]
                shares = [_percent(of[f"{what}{name}"]) for name in ("", " area", " - area")]
                ratio = of[what]["mean"] / of[f"{what} area"]["mean"]
                pixels.append([arm, what, *shares, f"{ratio:.2f}", str(of[what]["num_bags"])])
    note = "Generated products; means over seeds and test bags, with 95 % intervals of the bootstrap over both."
    return [
        Table(
            title="Photos of another product in a bag",
            note=f"{note} To each bag {NUM_FOREIGN} photos of a product of another family are added. Their share of "
            "the cross-attention to them and as many own photos is 50 % where they are not told apart. A photo's is "
            "also given in shares of even attention. Right is a caption that says nothing wrong, in %.",
            columns=["", "share, %", "a foreign photo", "an own photo", "right before", "right after", "difference"],
            rows=foreign,
        ),
        Table(
            title="Attention to the photos that show a part, %",
            note=f"{note} Of parts that some photos of a product show and others do not, apart by whether the caption "
            "names the part right. Even is what these photos would get if all photos of a bag were looked at alike.",
            columns=["", "the caption", "attention", "even", "difference", "bags"],
            rows=named,
        ),
        Table(
            title="AB-MIL's weight on the patches that show a part, %",
            note=f"{note} Of photos that were drawn again: which pixels show a part is known. A patch counts by the "
            "share of it that the part covers; the CLS token is left out. The product is all that is no background: a "
            "part is told from the rest of its product where its weight over its area is larger than the product's.",
            columns=["", "of the", "weight", "area", "difference", "weight / area", "bags"],
            rows=pixels,
        ),
    ]


def _percent(quantity: Mapping[str, float]) -> str:
    mean, low, high = (100 * quantity[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"
