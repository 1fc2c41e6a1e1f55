"""What the paper proves, counts and explains by, as measurements.

    facts = measure_facts(BASE_MODEL)                   # Propositions 1 and 2, padding, the Q-Former inside MIVPG, …
    costs = measure_costs()                             # multiply-adds over the number of images, at the real size
    attention = measure_attention(folders, root, store, …)   # what trained models look at in generated products
    tables(facts, costs, attention)

Facts hold by construction, on random weights and random bags. What attention does on trained models is found out: of
the generated catalogue it is known which photo, and which pixels of it, show what a caption speaks of.
"""

# B bags, N images a bag, P patch tokens an image, D vision width, M instances a bag, R queries, H Q-Former width,
# L hidden size of AB-MIL

import functools
import io
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

from mivpg.bags import Bag, BagCollator, BagDataset, select
from mivpg.captioning import GenerationOptions, caption_bags
from mivpg.configuration_mivpg import MivpgConfig
from mivpg.datasets import DatasetConfig
from mivpg.datasets.abo import AboConfig
from mivpg.errors import MivpgError
from mivpg.evaluation import bootstrap_interval_over_seeds
from mivpg.folded_attention import FOLD_FROM
from mivpg.miniature.catalogue import CatalogueProduct, photograph_product, product_generator, read_truth
from mivpg.miniature.products import Photo
from mivpg.miniature.traits import EVERY_VALUE, can_be_said, says_nothing_wrong
from mivpg.miniature.wording import PARTS, said
from mivpg.modeling_mivpg import MivpgForConditionalGeneration, MivpgVisualPromptModel
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.report import Table
from mivpg.visualization import attention_maps, image_weights

# ── Facts: what holds by construction ───────────────────────────────────────────────────────────────────────────────

STANDARD_DEVIATION = 0.2
"""Of the weights in what MIVPG adds to BLIP-2, which starts as the identity."""

SAME = 1e-10
"""What rounding may move in float64."""
LARGE = 0.01
"""What an effect moves at the least."""

OF_PROMPTS = "standard deviations of the prompts, float64"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A fact, and the number that shows it."""

    says: str
    measured: float
    unit: str
    """Of `measured`."""
    expected: str
    holds: bool


def measure_facts(base: str) -> list[Fact]:
    """Measures the facts on a base with random bags; the parts that MIVPG adds have random weights.

    Args:
        base: Folder or Hub id of a BLIP-2.

    Returns:
        Facts of order, of the Q-Former inside MIVPG, of batches, of attention, and of images as bags of their own.
    """
    off = MivpgForConditionalGeneration.from_pretrained(base, patch_pooling="none", instance_correlation="none").eval()
    load = functools.cache(functools.partial(_random_mivpg, off))
    with torch.no_grad():
        return [*_order(load), _blip2(base, off), *_batches(load), *_attention_rows(load), *_images_of_their_own(load)]


def _random_mivpg(off: MivpgForConditionalGeneration, **options: str) -> MivpgVisualPromptModel:
    """MIVPG in float64, with the weights of one with everything off and random ones in all that it adds."""
    config = MivpgConfig.from_blip2(Blip2Config.from_pretrained(off.name_or_path), **options)
    config.vision_config = None
    model = MivpgVisualPromptModel(config)
    added = set(model.load_state_dict(off.state_dict(), strict=False).missing_keys)
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name in added:
            parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
    return model


def _random_bags(model: MivpgVisualPromptModel, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Image embeddings (B, N, 17, D) of as many images a bag, and their mask (B, N)."""
    image_mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    shape = (*image_mask.shape, 17, model.config.image_embeds_size)
    image_embeds = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return image_embeds, image_mask.long()


def _prompts(model: MivpgVisualPromptModel, *bags: Tensor) -> Tensor:
    """Visual prompts (B, R, H) of image embeddings and, where given, their mask."""
    return model.get_visual_prompts(*bags).embeds


def _moved(prompts: Tensor, others: Tensor) -> float:
    """The largest difference, in standard deviations."""
    return float((prompts - others).abs().max() / prompts.std())


def _stays(says: str, measured: float, unit: str = OF_PROMPTS) -> Fact:
    return Fact(says=says, measured=measured, unit=unit, expected=f"below {SAME:.0e}", holds=measured < SAME)


def _moves(says: str, measured: float) -> Fact:
    return Fact(says=says, measured=measured, unit=OF_PROMPTS, expected=f"large: over {LARGE}", holds=measured > LARGE)


def _is_zero(says: str, measured: float, unit: str) -> Fact:
    return Fact(says=says, measured=measured, unit=unit, expected="exactly 0", holds=measured == 0)


Load = Callable[..., MivpgVisualPromptModel]


def _order(load: Load) -> list[Fact]:
    """Bags are sets, except to PPEG and Nyström; and so are queries."""
    q_former = load(patch_pooling="none", instance_correlation="none")
    bags, _ = _random_bags(q_former, [7])
    images = torch.tensor([4, 2, 6, 0, 5, 1, 3])
    tokens = torch.randperm(bags[0, :, :, 0].numel(), generator=torch.Generator().manual_seed(1))
    shuffled = bags.flatten(1, 2)[:, tokens].view_as(bags)
    facts = [
        _stays(
            "Shuffling all patches of all images of a bag leaves the Q-Former's prompts alone (Proposition 1).",
            _moved(_prompts(q_former, bags), _prompts(q_former, shuffled)),
        )
    ]
    for correlation, words in {
        "none": "without CSA (Proposition 1)",
        "csa": "with CSA (Proposition 2)",
        "csa_constant": "with CSA's control",
        "self_attention": "with full self-attention",
        "induced": "with induced attention",
    }.items():
        model = load(patch_pooling="abmil", instance_correlation=correlation)
        moved = _moved(_prompts(model, bags), _prompts(model, bags[:, images]))
        facts.append(_stays(f"Shuffling the images of a bag leaves MIVPG's prompts alone, {words}.", moved))
    for name, options in {
        "PPEG": {"instance_correlation": "csa", "position_encoding": "ppeg"},
        "Nyström attention": {"instance_correlation": "nystrom"},
    }.items():
        model = load(patch_pooling="abmil", **options)
        moved = _moved(_prompts(model, bags), _prompts(model, bags[:, images]))
        facts.append(_moves(f"Shuffling the images moves the prompts under {name}, which places them.", moved))

    prompts = _prompts(q_former, bags)
    apart = float((prompts - prompts.mean(dim=1, keepdim=True)).std() / prompts.std())
    facts.append(
        _moves("The base's prompts differ from each other: equal ones leave CSA nothing to choose from.", apart)
    )

    model = load(patch_pooling="abmil", instance_correlation="csa")
    assert model.query_tokens is not None and model.qformer is not None
    queries = torch.randperm(model.config.num_query_tokens, generator=torch.Generator().manual_seed(2))
    prompts, before = _prompts(model, bags), model.query_tokens.clone()
    model.query_tokens.copy_(before[:, queries])
    permuted = _prompts(model, bags)
    model.query_tokens.copy_(before)
    facts.append(_stays("Permuting the queries permutes the prompts.", _moved(prompts[:, queries], permuted)))

    layer = [layer for layer in model.qformer.encoder.layer if layer.has_cross_attention][1]  # where bags are read
    instances = bags[:, :, 0]
    correlated = layer.instance_correlation(instances, None, prompts, prompts)
    of_shuffled = layer.instance_correlation(instances[:, images], None, prompts, prompts)
    difference = (of_shuffled - correlated[:, images]).abs().max() / (correlated - instances).std()
    unit = "standard deviations of what CSA adds, float64"
    facts.append(_stays("CSA of shuffled instances is CSA's result, shuffled (Eq. 10).", float(difference), unit))
    return facts


def _blip2(base: str, off: MivpgForConditionalGeneration) -> Fact:
    blip2 = Blip2ForConditionalGeneration.from_pretrained(base).eval()
    side = blip2.config.vision_config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    processor = Blip2Processor.from_pretrained(base)
    inputs = processor(images=Image.fromarray(pixels), text="a photo of", return_tensors="pt")
    as_bag = {**inputs, "pixel_values": inputs["pixel_values"][:, None]}
    difference = (off(**as_bag).logits - blip2(**inputs).logits).abs().max()
    return _is_zero(
        "With everything off MIVPG gives the logits of transformers' Blip2ForConditionalGeneration on one image.",
        float(difference),
        "largest difference of logits, float32",
    )


def _batches(load: Load) -> list[Fact]:
    model = load(patch_pooling="abmil", instance_correlation="csa")
    lengths = (5, 1, 3)
    image_embeds, image_mask = _random_bags(model, lengths)
    prompts = _prompts(model, image_embeds, image_mask)
    garbage = image_embeds.masked_fill(image_mask[:, :, None, None] == 0, torch.nan)
    alone = torch.cat([_prompts(model, bag[None, :length]) for bag, length in zip(image_embeds, lengths, strict=True)])
    return [
        _is_zero(
            "Padding is inert: NaN in it moves no prompt.",
            _moved(prompts, _prompts(model, garbage, image_mask)),
            OF_PROMPTS,
        ),
        _stays("Bags of 5, 1 and 3 images in one batch have the prompts of each alone.", _moved(prompts, alone)),
    ]


def _attention_rows(load: Load) -> list[Fact]:
    model = load(patch_pooling="abmil", instance_correlation="csa")
    image_embeds, image_mask = _random_bags(model, (5, 1, 3))
    maps = attention_maps(model, {"image_embeds": image_embeds, "image_mask": image_mask})
    assert maps.patches is not None
    rows = {
        "of cross-attention over the images": maps.images.sum(dim=-1),  # (blocks, B, A, R)
        "of AB-MIL over an image's patches": maps.patches.sum(dim=-1)[image_mask.bool()],  # (n,)
    }
    return [
        _stays(f"The weights {words} sum to one.", float((sums - 1).abs().max()), "largest difference from 1, float64")
        for words, sums in rows.items()
    ]


def _images_of_their_own(load: Load) -> list[Fact]:
    concatenation = load(patch_pooling="none", instance_correlation="none")
    mivpg = load(patch_pooling="abmil", instance_correlation="csa")
    bags, _ = _random_bags(mivpg, [3])
    half = bags.shape[2] // 2
    swapped = bags.clone()
    swapped[:, 0, :half], swapped[:, 1, :half] = bags[:, 1, :half], bags[:, 0, :half]
    says = "Two images of a bag that swap half of their patches"
    return [
        _stays(
            f"{says} leave the Q-Former's prompts on concatenated patches alone.",
            _moved(_prompts(concatenation, bags), _prompts(concatenation, swapped)),
        ),
        _moves(
            f"{says} move MIVPG's prompts: it keeps each image a bag of its own.",
            _moved(_prompts(mivpg, bags), _prompts(mivpg, swapped)),
        ),
    ]


# ── Costs: O(NP + RN) against O(RNP) ────────────────────────────────────────────────────────────────────────────────

NUM_IMAGES = (1, 2, 5, 10, 21)
"""N; a product of Amazon Berkeley Objects has up to 21."""
NUM_TOKENS = 257
"""P of BLIP-2's vision model."""

COST_ARMS: dict[str, tuple[str, dict[str, str]]] = {
    "csa": ("MIVPG: AB-MIL and CSA", {"patch_pooling": "abmil", "instance_correlation": "csa"}),
    "without_csa": ("MIVPG without CSA", {"patch_pooling": "abmil", "instance_correlation": "none"}),
    "concatenation": ("Q-Former, concatenated patches", {"patch_pooling": "none", "instance_correlation": "none"}),
}
COST_PARTS = {
    "AttentionPooling": "AB-MIL",
    "instance_correlation": "CSA",
    "crossattention": "cross-attention",
}
"""What an image passes, by its name in the model, of the outermost its class."""


def measure_costs() -> dict[str, Any]:
    """Counts the multiply-adds of matrix products that turn a bag into visual prompts, at BLIP-2's real size.

    Nothing is computed: the model's tensors have shapes alone. The vision model and the language model do not count.

    Returns:
        `num_images`; `arms`, each with `title`, `multiply_adds` (one a number of images), `an_image` (what the second
        image adds), `fixed` (the rest of one image's), `parts` (what it adds by part) and `by_queries` (how much of it
        grows with R); and how many times as much concatenation takes: `factor` of the largest bag as it runs,
        `factor_unfolded` without the folded form of large bags, `factor_an_image` of an image more.
    """
    arms: dict[str, dict[str, Any]] = {}
    for name, (title, options) in COST_ARMS.items():
        counts = _multiply_adds(**options)
        first, second = counts[NUM_IMAGES.index(1)], counts[NUM_IMAGES.index(2)]
        added = {part: second[part] - first[part] for part in second}
        arms[name] = {
            "title": title,
            "multiply_adds": [count["all"] for count in counts],
            "an_image": added["all"],
            "fixed": first["all"] - added["all"],
            "parts": {part: added[part] for part in COST_PARTS.values()},
            "by_queries": added["by queries"],
        }
    ours, theirs = arms["csa"], arms["concatenation"]
    return {
        "num_images": list(NUM_IMAGES),
        "arms": arms,
        "factor": theirs["multiply_adds"][-1] / ours["multiply_adds"][-1],
        "factor_unfolded": on_the_line(theirs, NUM_IMAGES[-1]) / ours["multiply_adds"][-1],
        "factor_an_image": theirs["an_image"] / ours["an_image"],
    }


def on_the_line(arm: Mapping[str, Any], num_images: int) -> int:
    """Multiply-adds of a bag if each image costs what the second one does."""
    return arm["fixed"] + num_images * arm["an_image"]


def _multiply_adds(**options: str) -> list[dict[str, int]]:
    """For each of `NUM_IMAGES`, by part."""
    config = MivpgConfig(
        patch_pooling=options["patch_pooling"],
        qformer_config={"instance_correlation": options["instance_correlation"]},
    )
    with FakeTensorMode():
        model = MivpgVisualPromptModel(config).eval().requires_grad_(False)
        model.set_attn_implementation("eager")  # whose products the counter sees
        counts = []
        for num_images in NUM_IMAGES:
            image_embeds = torch.empty(1, num_images, NUM_TOKENS, config.image_embeds_size)
            with FlopCounterMode(display=False) as counter:
                model.get_visual_prompts(image_embeds)
            counts.append(_by_part(counter))
    return counts


def _by_part(counter: FlopCounterMode) -> dict[str, int]:
    """Multiply-adds of `all`, of each of the `COST_PARTS`, and `by queries`: the products of instances with queries."""
    counts = dict.fromkeys(("all", "by queries", *COST_PARTS.values()), 0)
    for module, operations in counter.get_flop_counts().items():
        name = module.rpartition(".")[2]
        multiply_adds = sum(operations.values()) // 2  # each is two operations
        if module == "Global":
            counts["all"] = multiply_adds
        elif name in COST_PARTS:
            counts[COST_PARTS[name]] += multiply_adds
            if name != "AttentionPooling":
                counts["by queries"] += operations.get(torch.ops.aten.bmm, 0) // 2
    return counts


def draw_costs(costs: Mapping[str, Any]) -> bytes:
    """Multiply-adds over the number of images, and what one image more adds, by part.

    Args:
        costs: What `measure_costs` returns.

    Returns:
        A PNG.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    totals, added = figure.subplots(1, 2)
    arms = costs["arms"].values()
    for arm in arms:
        straight = [on_the_line(arm, number) / 1e9 for number in costs["num_images"]]
        (line,) = totals.plot(costs["num_images"], straight, label=arm["title"])
        counted = [count / 1e9 for count in arm["multiply_adds"]]
        totals.plot(costs["num_images"], counted, "o", color=line.get_color())
    totals.set(
        xlabel="images a bag",
        ylabel="multiply-adds, in billions",
        title="A bag: counted (dots); fixed + N times an image (lines)",
    )
    totals.set_xticks(costs["num_images"])
    totals.legend(fontsize="small")
    for number, part in enumerate(COST_PARTS.values()):
        places = [place + 0.25 * (number - 1) for place in range(len(arms))]
        widths = [arm["parts"][part] / 1e6 for arm in arms]
        bars = added.barh(places, widths, height=0.23, label=part)
        added.bar_label(bars, [f"{width:,.0f}" if width else "" for width in widths], padding=3, fontsize="small")
    added.set_yticks(range(len(arms)), [arm["title"] for arm in arms])
    added.set(xscale="log", xlabel="multiply-adds, in millions", title="An image more")
    added.set_xlim(left=1)
    added.margins(x=0.15)
    added.invert_yaxis()
    added.legend(fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, dpi=130, metadata={"Software": None})
    return png.getvalue()


# ── Attention of trained models ─────────────────────────────────────────────────────────────────────────────────────

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


# ── For people ──────────────────────────────────────────────────────────────────────────────────────────────────────

COST_NOTE = (
    "Matrix products from image embeddings to visual prompts, counted at BLIP-2's size (12 blocks of which 6 read the "
    "images, H = 768, R = 32, D = 1408, P = 257), forward, one bag; softmax and the like are not counted."
)


def tables(
    facts: Sequence[Fact] = (), costs: Mapping[str, Any] | None = None, attention: Mapping[str, Any] | None = None
) -> list[Table]:
    """What was measured as tables.

    Args:
        facts: What `measure_facts` returns.
        costs: What `measure_costs` returns.
        attention: What `measure_attention` returns.
    """
    parts = []
    if facts:
        parts.append(_fact_table(facts))
    if costs is not None:
        parts += _cost_tables(costs)
    if attention:
        parts += _attention_tables(attention)
    return parts


def _fact_table(facts: Sequence[Fact]) -> Table:
    return Table(
        title="What holds by construction",
        note="On random bags, with random weights in all that MIVPG adds to its base.",
        columns=["", "measured", "unit", "expected", "holds"],
        rows=[
            [fact.says, f"{fact.measured:.1e}" if fact.measured else "0", fact.unit, fact.expected, _yes(fact.holds)]
            for fact in facts
        ],
    )


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _cost_tables(costs: Mapping[str, Any]) -> list[Table]:
    largest = costs["num_images"][-1]
    arms = costs["arms"].values()
    return [
        Table(
            title="Billions of multiply-adds a bag, over the number of images",
            note=f"{COST_NOTE} Every row is linear in N: fixed + N times an image, to the last operation, but for "
            f"bags of {FOLD_FROM:,} instances and more, which take the folded form of attention. MIVPG's is "
            f"O(NP + RN) (the paper drops the N of NP), the concatenation's O(RNP): they differ in the slope. An image "
            f"more costs the concatenation {costs['factor_an_image']:.0f} times as much; a bag of {largest} images "
            f"{costs['factor']:.1f} times as much as it runs, {costs['factor_unfolded']:.1f} times without the folded "
            "form. The vision model, which has the same to do in all rows, is not counted.",
            columns=["", "fixed", "an image", *(f"N = {number}" for number in costs["num_images"])],
            rows=[
                [
                    arm["title"],
                    *(f"{count / 1e9:.3f}" for count in (arm["fixed"], arm["an_image"], *arm["multiply_adds"])),
                ]
                for arm in arms
            ],
        ),
        Table(
            title="Millions of multiply-adds of an image more",
            note="AB-MIL's are P D L and the weighted mean; of cross-attention and CSA most are projections of "
            "instances, which do not depend on R: what does are the products with R queries, the last column.",
            columns=["", *COST_PARTS.values(), "all", "of which by R queries"],
            rows=[
                [
                    arm["title"],
                    *(f"{count / 1e6:.1f}" for count in (*arm["parts"].values(), arm["an_image"], arm["by_queries"])),
                ]
                for arm in arms
            ],
        ),
    ]


def _attention_tables(attention: Mapping[str, Any]) -> list[Table]:
    """A table a measure; an arm without it has no row."""
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
