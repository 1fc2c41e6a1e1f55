"""What the paper proves of MIVPG, as measurements on random weights and random bags.

    facts = measure_facts(BASE_MODEL)      # Propositions 1 and 2, padding, the Q-Former inside MIVPG, …
    fact_table(facts)

They hold by construction, whatever a model has learned; the test suite has them over many more cases.
"""

# B bags, N images a bag, D vision width, R queries, H Q-Former width, A heads

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

from mivpg.configuration_mivpg import MivpgConfig
from mivpg.modeling_mivpg import MivpgForConditionalGeneration, MivpgVisualPromptModel
from mivpg.report import Table
from mivpg.visualization import attention_maps

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


def fact_table(facts: Sequence[Fact]) -> Table:
    """The facts as a table."""
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
