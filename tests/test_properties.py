"""What MIVPG promises about bags: order, padding, company and queries; and what it must not promise (PPEG, Nyström).

Every model has its added weights drawn at random, because an untrained part changes nothing and proves nothing. Every
test has a control: a change of the same kind that has to move the prompts by more than `EFFECT`.
"""

from copy import deepcopy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mivpg.modeling_mivpg import MivpgForConditionalGeneration, MivpgLayer
from tiny import (
    HIDDEN_SIZE,
    IMAGE_TOKEN_ID,
    INSTANCE_CORRELATIONS,
    NUM_QUERIES,
    PATCH_POOLINGS,
    POSITION_ENCODINGS,
    random_bags,
    random_coords,
    tiny_config,
    tiny_model,
    tiny_opt_config,
    tiny_t5_config,
    tiny_vit_config,
)

EFFECT = 1e-2
SAME = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative to the standard deviation of the prompts

LENGTHS = (5, 1, 3)
TRAINED = ("qformer", "query_tokens", "patch_pooling", "language_projection")
UNORDERED = [name for name in INSTANCE_CORRELATIONS if name != "nystrom"]

every_pooling = pytest.mark.parametrize("pooling", PATCH_POOLINGS)
every_correlation = pytest.mark.parametrize("correlation", INSTANCE_CORRELATIONS)
every_encoding = pytest.mark.parametrize(  # with PPEG more is on, and can go wrong
    "encoding", [pytest.param(name, marks=pytest.mark.slow if name == "none" else ()) for name in POSITION_ENCODINGS]
)


@cache
def model_of(
    pooling: str, correlation: str, encoding: str, dtype: torch.dtype = torch.float32
) -> MivpgForConditionalGeneration:
    """A tiny model, shared by the tests: none may change it."""
    return tiny_model(tiny_config(pooling, correlation, encoding)).to(dtype)


@torch.no_grad()
def prompts_of(model: MivpgForConditionalGeneration, *inputs: Tensor | None) -> Tensor:
    """Visual prompts (B, R, H) of image embeddings, mask and coordinates."""
    embeds = model.get_visual_prompts(*inputs).embeds
    assert embeds.isfinite().all()
    return embeds


def distance(prompts: Tensor, others: Tensor) -> float:
    """The largest difference, in standard deviations of the prompts."""
    return float((prompts - others).abs().max() / prompts.std())


def shuffled_patches(image_embeds: Tensor) -> Tensor:
    """Every patch of a bag (B, N, P, D) to any place of any image."""
    order = torch.randperm(image_embeds[0, :, :, 0].numel(), generator=torch.Generator().manual_seed(0))
    return image_embeds.flatten(1, 2)[:, order].view_as(image_embeds)


# --- Order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64], ids=str)
@pytest.mark.parametrize("correlation", UNORDERED)
@every_pooling
def test_order_of_instances_does_not_matter(
    pooling: str, correlation: str, dtype: torch.dtype, record_property
) -> None:
    """Propositions 1 and 2: a bag is a set. With PPEG it is not."""
    image_embeds, _ = random_bags((7, 7))
    image_embeds = image_embeds.to(dtype)
    shuffled = shuffled_patches(image_embeds) if pooling == "none" else image_embeds[:, [4, 2, 6, 0, 5, 1, 3]]
    assert not torch.equal(shuffled, image_embeds)

    model = model_of(pooling, correlation, "none", dtype)
    moved = distance(prompts_of(model, image_embeds), prompts_of(model, shuffled))
    assert moved < SAME[dtype]
    record_property(f"prompts moved by shuffling the instances, in standard deviations, {dtype}", moved)

    model = model_of(pooling, correlation, "ppeg", dtype)
    assert distance(prompts_of(model, image_embeds), prompts_of(model, shuffled)) > EFFECT


@every_pooling
def test_order_matters_to_nystrom(pooling: str) -> None:
    """Landmarks are means of neighbours, and V is convolved along the bag."""
    image_embeds, _ = random_bags((7, 7))
    model = model_of(pooling, "nystrom", "none", torch.float64)
    prompts = prompts_of(model, image_embeds.double())
    assert distance(prompts, prompts_of(model, image_embeds[:, [4, 2, 6, 0, 5, 1, 3]].double())) > EFFECT


@settings(deadline=None, max_examples=30, derandomize=True)
@given(order=st.integers(1, 12).flatmap(lambda length: st.permutations(range(length))))
def test_any_order_of_any_bag(order: list[int]) -> None:
    image_embeds, _ = random_bags((len(order),), num_patches=4)
    model = model_of("gated_abmil", "csa", "none", torch.float64)
    image_embeds = image_embeds.double()
    prompts = prompts_of(model, image_embeds)
    assert distance(prompts, prompts_of(model, image_embeds[:, order])) < SAME[torch.float64]
    assert distance(prompts, prompts_of(model, image_embeds * 1.5)) > EFFECT


@pytest.mark.parametrize("correlation", UNORDERED)
@pytest.mark.parametrize("side", [3, 9], ids=["dense", "sparse"])
def test_order_does_not_matter_where_coordinates_are_known(side: int, correlation: str) -> None:
    """PPEG sees places, not an order, once the images bring their places along."""
    image_embeds, image_mask = random_bags((7,))
    image_embeds, image_coords = image_embeds.double(), random_coords((7,), side).double()
    order = [4, 2, 6, 0, 5, 1, 3]
    model = model_of("abmil", correlation, "ppeg", torch.float64)
    prompts = prompts_of(model, image_embeds, image_mask, image_coords)

    moved_together = prompts_of(model, image_embeds[:, order], image_mask, image_coords[:, order])
    assert distance(prompts, moved_together) < SAME[torch.float64]
    assert distance(prompts, prompts_of(model, image_embeds[:, order], image_mask, image_coords)) > EFFECT


@pytest.mark.parametrize("correlation", UNORDERED)
def test_order_of_images_does_not_matter_where_each_is_a_grid(correlation: str) -> None:
    """Without pooling PPEG places the patches within their image, and says nothing of the order of images."""
    image_embeds = random_bags((4,))[0].double()
    model = model_of("none", correlation, "ppeg", torch.float64)
    prompts = prompts_of(model, image_embeds)
    assert distance(prompts, prompts_of(model, image_embeds[:, [2, 0, 3, 1]])) < SAME[torch.float64]
    assert distance(prompts, prompts_of(model, image_embeds[:, :, [0, 9, 8, 7, 6, 5, 4, 3, 2, 1]])) > EFFECT


@every_encoding
@every_correlation
def test_permuted_queries_permute_the_prompts(correlation: str, encoding: str) -> None:
    """No query has a place of its own: each prompt follows its query."""
    image_embeds, image_mask = random_bags(LENGTHS)
    model = deepcopy(model_of("gated_abmil", correlation, encoding, torch.float64))
    prompts = prompts_of(model, image_embeds.double(), image_mask)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        model.query_tokens.copy_(model.query_tokens[:, order])
    permuted = prompts_of(model, image_embeds.double(), image_mask)
    assert distance(prompts[:, order], permuted) < SAME[torch.float64]
    assert distance(prompts, permuted) > EFFECT


@pytest.mark.parametrize("correlation", ["csa", "csa_constant", "self_attention", "induced"])
@torch.no_grad()
def test_correlation_is_equivariant(correlation: str) -> None:
    """Eq. 10: shuffled instances come out as before, in their new order; and the module does change them."""
    part = model_of("none", correlation, "none", torch.float64).qformer.encoder.layer[2].instance_correlation
    instances = torch.randn(2, 9, 12, dtype=torch.float64)
    queries, learned = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    order = torch.tensor([4, 2, 8, 6, 0, 5, 7, 1, 3])
    correlated = part(instances, None, queries, learned)
    shuffled = part(instances[:, order], None, queries, learned)
    torch.testing.assert_close(shuffled, correlated[:, order], rtol=0, atol=1e-12)
    assert (correlated - instances).abs().max() > EFFECT
    assert (correlated - shuffled).abs().max() > EFFECT


# --- Padding and company ---------------------------------------------------------------------------------------------


@every_encoding
@every_correlation
@every_pooling
def test_contents_of_padding_are_inert(pooling: str, correlation: str, encoding: str) -> None:
    """Bit for bit, also for NaN, which spreads; garbage in a real image is seen."""
    image_embeds, image_mask = random_bags(LENGTHS)
    padding = image_mask[:, :, None, None] == 0
    model = model_of(pooling, correlation, encoding)
    prompts = prompts_of(model, image_embeds, image_mask)
    for garbage in (99.0, float("nan")):
        assert torch.equal(prompts_of(model, image_embeds.masked_fill(padding, garbage), image_mask), prompts)

    image_embeds[2, 2] = 99.0
    assert distance(prompts, prompts_of(model, image_embeds, image_mask)) > EFFECT


@pytest.mark.parametrize("garbage", [99.0, float("nan")])
@pytest.mark.parametrize("side", [3, 9], ids=["dense", "sparse"])
def test_coordinates_of_padding_are_inert(side: int, garbage: float) -> None:
    image_embeds, image_mask = random_bags(LENGTHS)
    image_coords = random_coords(LENGTHS, side)
    padding = image_mask[:, :, None] == 0
    model = model_of("abmil", "csa", "ppeg")
    prompts = prompts_of(model, image_embeds, image_mask, image_coords)
    filled = prompts_of(model, image_embeds, image_mask, image_coords.masked_fill(padding, garbage))
    assert torch.equal(filled, prompts)
    assert distance(prompts, prompts_of(model, image_embeds, image_mask, random_coords(LENGTHS, side, seed=1))) > EFFECT


@every_encoding
@every_correlation
@every_pooling
def test_a_ragged_batch_gives_each_bags_own_prompts(
    pooling: str, correlation: str, encoding: str, record_property
) -> None:
    """Whatever else is in the batch; the control counts padding as real, which has to show."""
    image_embeds, image_mask = random_bags(LENGTHS)
    model = model_of(pooling, correlation, encoding)
    prompts = prompts_of(model, image_embeds, image_mask)
    for bag, length in enumerate(LENGTHS):
        alone = prompts_of(model, image_embeds[bag : bag + 1, :length])
        apart = distance(prompts[bag : bag + 1], alone)
        assert apart < 1e-5
        record_property("prompts in a ragged batch against alone, in standard deviations, float32", apart)
    assert distance(prompts, prompts_of(model, image_embeds)) > EFFECT


@every_correlation
@pytest.mark.parametrize("pooling", ["none", "gated_abmil"])
@pytest.mark.parametrize("width", [12, 20], ids=["own_width", "projected"])
def test_contents_of_padding_have_no_gradient(width: int, pooling: str, correlation: str) -> None:
    """What is masked on the way there may still be NaN on the way back (0 * NaN)."""
    image_embeds, image_mask = random_bags(LENGTHS, width=width)
    model = tiny_model(tiny_config(pooling, correlation, "ppeg", image_embeds_size=width))
    direction = torch.randn(len(LENGTHS), NUM_QUERIES, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))

    def gradients(inputs: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (model.get_visual_prompts(inputs, image_mask).embeds * direction).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(image_embeds)
    filled = gradients(image_embeds.masked_fill(image_mask[:, :, None, None] == 0, float("nan")))
    assert filled.keys() == expected.keys()
    for name in expected:
        assert torch.equal(filled[name], expected[name]), name
    seen = gradients(image_embeds.masked_fill(image_mask[:, :, None, None] == 1, 0.5))
    assert (seen["query_tokens"] - expected["query_tokens"]).abs().max() > EFFECT


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4).map(tuple),
    correlation=st.sampled_from(INSTANCE_CORRELATIONS),
    side=st.sampled_from([None, 5, 40]),
)
def test_any_ragged_batch(lengths: tuple[int, ...], correlation: str, side: int | None) -> None:
    """Features of one token an image, at places that are unknown, close together or far apart."""
    image_embeds, image_mask = random_bags(lengths, num_patches=1)
    image_coords = None if side is None else random_coords(lengths, side)
    model = model_of("none", correlation, "ppeg")
    prompts = prompts_of(model, image_embeds, image_mask, image_coords)
    for bag, length in enumerate(lengths):
        coords = None if image_coords is None else image_coords[bag : bag + 1, :length]
        alone = prompts_of(model, image_embeds[bag : bag + 1, :length], None, coords)
        assert distance(prompts[bag : bag + 1], alone) < 1e-5


# --- Attention -------------------------------------------------------------------------------------------------------


@every_correlation
@torch.no_grad()
def test_rows_of_cross_attention_sum_to_one(correlation: str) -> None:
    """Over the real instances alone: padding gets nothing."""
    model = deepcopy(model_of("abmil", correlation, "none", torch.float64))
    model.set_attn_implementation("eager")
    image_embeds, image_mask = random_bags(LENGTHS)
    instances, instance_mask = model.get_instances(image_embeds.double(), image_mask)
    maps = model.qformer(
        query_embeds=model.query_tokens.expand(len(LENGTHS), -1, -1),
        encoder_hidden_states=instances,
        encoder_attention_mask=instance_mask,
        output_attentions=True,
    ).cross_attentions  # three of (B, A, R, M)
    assert len(maps) == 3
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-12)
        assert not weights[instance_mask[:, None, None].expand_as(weights) == 0].any()
        assert weights[0].std() > EFFECT


@every_correlation
def test_attention_implementations_agree(correlation: str) -> None:
    """The weights that `eager` shows are those that `sdpa` uses."""
    image_embeds, image_mask = random_bags(LENGTHS)
    model = deepcopy(model_of("none", correlation, "ppeg", torch.float64))
    prompts = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        prompts.append(prompts_of(model, image_embeds.double(), image_mask))
    assert distance(*prompts) < SAME[torch.float64]


@pytest.mark.parametrize("pooling", ["abmil", "gated_abmil"])
@torch.no_grad()
def test_rows_of_patch_pooling_sum_to_one(pooling: str) -> None:
    weights = model_of(pooling, "none", "none", torch.float64).patch_pooling.attention_weights(
        torch.randn(3, 10, 12, dtype=torch.float64)
    )
    assert weights.shape == (3, 10)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3).double(), rtol=0, atol=1e-12)
    assert weights.std() > EFFECT


@pytest.mark.parametrize("correlation", ["csa", "csa_constant", "self_attention", "induced"])
@torch.no_grad()
def test_rows_of_correlation_sum_to_one(correlation: str) -> None:
    """A weighted mean of one and the same value is that value: every instance then moves by W_o v."""
    part = deepcopy(model_of("none", correlation, "none", torch.float64).qformer.encoder.layer[2].instance_correlation)
    part.value.weight.zero_()
    instances = torch.randn(2, 9, 12, dtype=torch.float64)
    queries, learned = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    shift = part(instances, None, queries, learned) - instances
    expected = part.output.weight @ part.value.bias + part.output.bias
    torch.testing.assert_close(shift, expected.expand_as(shift), rtol=0, atol=1e-12)
    assert expected.abs().max() > EFFECT


def last_instances(model: MivpgForConditionalGeneration, image_embeds: Tensor) -> Tensor:
    """The instances (B, M, D) that the last block hands on."""
    seen: list[Tensor] = []

    def keep(layer: MivpgLayer, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        seen.append(output[1])

    handle = model.qformer.encoder.layer[-1].register_forward_hook(keep)
    prompts_of(model, image_embeds)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("correlation", "flows"), [("none", False), ("csa_constant", False)]
    + [(name, True) for name in ("csa", "self_attention", "induced", "nystrom")],
)  # fmt: skip
def test_what_flows_between_instances(correlation: str, flows: bool) -> None:
    """CSA lets an image learn of another one; its control, with the same parameters, does not."""
    image_embeds = random_bags((5,))[0].double()
    other = image_embeds.clone()
    other[:, 4] = torch.randn(10, 12, generator=torch.Generator().manual_seed(9))
    model = model_of("abmil", correlation, "none", torch.float64)
    instances, others = last_instances(model, image_embeds), last_instances(model, other)
    assert (instances - others)[:, 4].abs().max() > EFFECT
    moved = (instances - others)[:, :4].abs().max()
    assert moved > EFFECT if flows else moved == 0


def test_swapped_patches_are_seen_by_mivpg_alone() -> None:
    """Section 3.3: concatenation mixes the images' patches into one bag; MIVPG keeps each image a bag of its own."""
    image_embeds = random_bags((3,))[0].double()
    swapped = image_embeds.clone()
    swapped[:, 0, :5], swapped[:, 1, :5] = image_embeds[:, 1, :5], image_embeds[:, 0, :5]

    for correlation in ("none", "csa"):
        concatenation = model_of("none", correlation, "none", torch.float64)
        prompts = prompts_of(concatenation, image_embeds)
        assert distance(prompts, prompts_of(concatenation, swapped)) < SAME[torch.float64]

        mivpg = model_of("abmil", correlation, "none", torch.float64)
        assert distance(prompts_of(mivpg, image_embeds), prompts_of(mivpg, swapped)) > EFFECT


# --- Gradients -------------------------------------------------------------------------------------------------------


def captions(language: str) -> dict[str, Tensor]:
    """Two captions of unequal length behind the image marks, as the language model wants them."""
    marks, ignored = [IMAGE_TOKEN_ID] * NUM_QUERIES, [-100] * NUM_QUERIES
    if language == "t5":
        return {
            "input_ids": torch.tensor([[*marks, 5, 6], [*marks, 5, 6]]),
            "labels": torch.tensor([[7, 8, 9, 1], [8, 1, -100, -100]]),
        }
    return {
        "input_ids": torch.tensor([[*marks, 2, 7, 8, 9, 3], [*marks, 2, 8, 3, 1, 1]]),
        "attention_mask": torch.tensor([[1] * (NUM_QUERIES + 5), [1] * (NUM_QUERIES + 3) + [0, 0]]),
        "labels": torch.tensor([[*ignored, -100, 7, 8, 9, 3], [*ignored, -100, 8, 3, -100, -100]]),
    }


def zero_by_construction(name: str) -> bool:
    """A key's bias adds the same to all scores of a softmax: it changes nothing and gets no gradient."""
    return name.endswith(".key.bias")


@pytest.mark.parametrize("language", ["opt", "t5"])
@every_encoding
@every_correlation
def test_one_step_reaches_all_that_trains_and_nothing_else(correlation: str, encoding: str, language: str) -> None:
    """Pixels to loss: every trained parameter has a gradient and moves, no frozen one has, and frozen ones stay."""
    text_config = {"opt": tiny_opt_config, "t5": tiny_t5_config}[language]()
    model = tiny_model(
        tiny_config("gated_abmil", correlation, encoding, vision_config=tiny_vit_config(), text_config=text_config)
    ).double()
    model.train()
    before = deepcopy(model.state_dict())
    pixel_values = torch.randn(2, 5, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double()
    image_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    model(pixel_values=pixel_values, image_mask=image_mask, **captions(language)).loss.backward()
    optimizer.step()

    for name, parameter in model.named_parameters():
        if name.split(".")[0] not in TRAINED:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name
        elif zero_by_construction(name):
            assert parameter.grad.abs().max() < 1e-14, name
        else:
            assert parameter.grad.abs().max() > 1e-9, name
            assert not torch.equal(parameter, before[name]), name


def test_frozen_parts_stay_in_eval_mode() -> None:
    """Dropout of what does not train stays off, whatever a trainer calls."""
    model = tiny_model(tiny_config(vision_config=tiny_vit_config()))
    model.train()
    modes = {
        name: {part.training for part in getattr(model, name).modules()}
        for name in ("vision_model", "qformer", "language_model", "language_projection")
    }
    assert modes == {
        "vision_model": {False},
        "qformer": {True},
        "language_model": {False},
        "language_projection": {True},
    }
