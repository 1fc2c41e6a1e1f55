"""Precision, extreme bags, repetition, batches and compilation: how far apart the same numbers may be, on every option.

Distances are relative: the norm of a difference over the norm of what is expected. `pytest tests/test_numerics.py`
prints the largest of each in its last lines, which docs/reliability.md quotes; with `-m slow` for every combination.
"""

import gc
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from mivpg import MivpgForBagClassification, MivpgForConditionalGeneration
from mivpg.aggregators.named import AGGREGATORS, SCORING_AGGREGATORS
from mivpg.configuration_mivpg import AggregatorName, MivpgConfig
from mivpg.errors import MivpgError
from mivpg.modeling_mivpg import MivpgVisualPromptModel
from tiny import (
    IMAGE_TOKEN_ID,
    INSTANCE_CORRELATIONS,
    NUM_QUERIES,
    PATCH_POOLINGS,
    POSITION_ENCODINGS,
    random_bags,
    random_coords,
    randomize_added_weights,
    tiny_config,
)

LENGTHS = (5, 1, 3)
NUM_TOKENS = 10
"""P: CLS and 3 x 3 patches."""

SAME = 1e-5
"""float32 against float64, one batch against another, compiled against eager."""
BF16 = 0.06
"""bfloat16, of weights or by autocast, against float32: its numbers have eight bits, 0.4 % each."""
LARGE, LARGE_GRADIENTS = 1e-3, 0.02
"""Of instances ten thousand times as large: every softmax picks one of them, and its slope is where it hesitates."""

QUICK = {"perceiver": {"depth": 1, "num_heads": 2, "head_size": 8}, "transmil": {"size": 16, "num_heads": 2}}
UNORDERED = [name for name in INSTANCE_CORRELATIONS if name != "nystrom"]

Case = tuple[str, str, str, str]
"""patch_pooling, instance_correlation, position_encoding, aggregator."""

EVERY_COMBINATION = [
    (*case, "mivpg") for case in itertools.product(PATCH_POOLINGS, INSTANCE_CORRELATIONS, POSITION_ENCODINGS)
]
EVERY_OPTION: list[Case] = [
    *(("abmil", correlation, "ppeg", "mivpg") for correlation in INSTANCE_CORRELATIONS),
    *((pooling, "csa", "none", "mivpg") for pooling in PATCH_POOLINGS),
    *(("cls", "csa", "none", aggregator) for aggregator in get_args(AggregatorName) if aggregator != "mivpg"),
]
"""Each option at least once; the other combinations are slow."""

every_option = pytest.mark.parametrize("case", EVERY_OPTION, ids=" ".join)
every_combination = pytest.mark.parametrize(
    "case", [case for case in EVERY_COMBINATION if case not in EVERY_OPTION], ids=" ".join
)


@cache
def model_of(case: Case, dropout: float = 0.0) -> MivpgVisualPromptModel:
    """A tiny model, a captioner where the aggregator makes prompts; shared by the tests, which leave it as it is."""
    pooling, correlation, encoding, aggregator = case
    config = tiny_config(pooling, correlation, encoding, num_hidden_layers=3, hidden_dropout_prob=dropout).to_dict()
    config |= {"aggregator": aggregator, "aggregator_options": QUICK.get(aggregator)}
    if aggregator == "linear_projection":
        config["num_query_tokens"] = 1  # a prompt for each token, and `cls` leaves one
    scoring = aggregator in SCORING_AGGREGATORS
    torch.manual_seed(0)
    if scoring:
        model = MivpgForBagClassification(MivpgConfig(**config | {"text_config": None}))
    else:
        model = MivpgForConditionalGeneration(MivpgConfig(**config))
    randomize_added_weights(model, generator=torch.Generator().manual_seed(0))
    return model.eval()


def outputs_of(model: MivpgVisualPromptModel, *inputs: Tensor | None) -> Tensor:
    """Visual prompts (B, T, H), or the loss of a classifier that makes none."""
    if not isinstance(model, MivpgForBagClassification):
        return model.get_visual_prompts(*inputs).embeds
    torch.manual_seed(0)  # DTFD-MIL draws its pseudo-bags
    image_embeds, image_mask, image_coords = inputs
    labels = torch.arange(len(image_embeds)) % 2
    return model(image_embeds, image_mask=image_mask, image_coords=image_coords, labels=labels).loss


def outputs_and_gradients(
    model: MivpgVisualPromptModel,
    image_embeds: Tensor,
    image_mask: Tensor | None,
    image_coords: Tensor | None,
    context: AbstractContextManager | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and in one vector the gradients of their square at every parameter and at the images; all finite."""
    leaf = image_embeds.clone().requires_grad_()
    model.zero_grad()
    with context or nullcontext():
        outputs = outputs_of(model, leaf, image_mask, image_coords)
    (outputs if outputs.dtype == torch.float64 else outputs.float()).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradient = torch.cat([part.double().flatten() for part in [*gradients, leaf.grad]])
    assert outputs.isfinite().all() and gradient.isfinite().all()
    return outputs.detach(), gradient


def apart(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def ragged() -> tuple[Tensor, Tensor, Tensor]:
    """Bags of several sizes, with places."""
    image_embeds, image_mask = random_bags(LENGTHS, NUM_TOKENS)
    return image_embeds, image_mask, random_coords(LENGTHS, side=5)


# --- Precision -------------------------------------------------------------------------------------------------------


def check_precision(case: Case, record_property) -> None:
    image_embeds, image_mask, coords = ragged()
    model = model_of(case)
    single = outputs_and_gradients(model, image_embeds, image_mask, coords)
    in_bf16 = outputs_and_gradients(deepcopy(model).bfloat16(), image_embeds.bfloat16(), image_mask, coords)
    autocast = torch.autocast("cpu", torch.bfloat16)
    by_autocast = outputs_and_gradients(model, image_embeds, image_mask, coords, autocast)
    for name, found in (("bfloat16 weights", in_bf16), ("bfloat16 autocast", by_autocast)):
        for what, one, other in zip(("outputs", "gradients"), found, single, strict=True):
            if what == "gradients" and case[3] == "mi_net_instances":
                continue  # it is the gradient of the largest instance, and among like ones rounding decides
            record_property(f"{name} against float32, {what}", apart(one, other))
            assert apart(one, other) < BF16, (name, what)
        assert not torch.equal(found[1], single[1])  # it has been computed in another precision


@every_option
def test_precisions_agree(case, record_property):
    check_precision(case, record_property)


@pytest.mark.slow
@every_combination
def test_precisions_agree_on_every_combination(case, record_property):
    check_precision(case, record_property)


@pytest.mark.parametrize(
    "case", [("abmil", "csa", "ppeg", "mivpg"), *EVERY_OPTION[-len(AGGREGATORS) - 3 :]], ids=" ".join
)
def test_float16_is_refused_with_the_reason(case):
    model, inputs = model_of(case), ragged()
    reason = "expected float32 or bfloat16: a Q-Former diverges in float16, which ends at 65504"
    with torch.no_grad():
        if any(parameter.is_floating_point() for parameter in model.parameters()) and case[3] not in ("mean", "max"):
            with pytest.raises(MivpgError, match=rf"\({case[3]}\) is float16, {reason}; from_pretrained"):
                outputs_of(deepcopy(model).half(), *inputs)
        with torch.autocast("cpu", torch.float16), pytest.raises(MivpgError, match=f"float16 by autocast, {reason}"):
            outputs_of(model, *inputs)


def test_frozen_parts_may_be_float16(tmp_path):
    model = model_of(("abmil", "csa", "none", "mivpg"))
    model.save_pretrained(tmp_path)
    loaded = MivpgForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    assert loaded.language_model.dtype == torch.float16 and loaded.prompt_dtype == torch.float32
    inputs = ragged()
    with torch.no_grad():
        assert torch.equal(outputs_of(loaded, *inputs), outputs_of(model, *inputs))


# --- Extreme bags ----------------------------------------------------------------------------------------------------


def check_extremes(case: Case, record_property) -> None:
    """Large instances, a bag of one, and bags all of whose instances are the same."""
    image_embeds, image_mask, coords = ragged()
    num_tokens = NUM_TOKENS if case[0] == "none" and case[2] == "ppeg" else 1  # PPEG on an image's own grid needs one
    bags = {
        "large": (1e4 * image_embeds, image_mask, coords),
        "one instance": (random_bags((1,), num_tokens, seed=1)[0], None, random_coords((1,), side=5)),
        "identical": (image_embeds[:1, :1, :1].expand(2, 4, NUM_TOKENS, -1), None, random_coords((4, 4), side=5)),
    }
    for name, inputs in bags.items():
        exact = outputs_and_gradients(deepcopy(model_of(case)).double(), inputs[0].double(), *inputs[1:])
        single = outputs_and_gradients(model_of(case), *inputs)
        bounds = (LARGE, LARGE_GRADIENTS) if name == "large" else (SAME, SAME)
        if name == "large" and case[3] != "mivpg":
            # Without a LayerNorm scores are a hundred million, of which float32 holds no units, so slopes are noise.
            bounds = (LARGE, torch.inf)
        for what, one, other, bound in zip(("outputs", "gradients"), single, exact, bounds, strict=True):
            if bound < torch.inf:
                record_property(f"{name}, float32 against float64, {what}", apart(one, other))
            assert apart(one, other) < bound, (name, what)


@every_option
def test_extreme_bags_are_what_float64_makes_of_them(case, record_property):
    check_extremes(case, record_property)


@pytest.mark.slow
@every_combination
def test_extreme_bags_on_every_combination(case, record_property):
    check_extremes(case, record_property)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("pooling", ["abmil", "gated_abmil"])
def test_weights_sum_to_one(pooling, scale):
    model = deepcopy(model_of((pooling, "csa", "none", "mivpg")))
    model.set_attn_implementation("eager")
    image_embeds = scale * random_bags((5,), NUM_TOKENS)[0]
    with torch.no_grad():
        of_patches = model.patch_pooling.attention_weights(image_embeds[0])
        instances, _ = model.get_instances(image_embeds)
        read = model.qformer(
            query_embeds=model.query_tokens, encoder_hidden_states=instances, output_attentions=True
        ).cross_attentions
    for weights in (of_patches, *read):
        assert (weights.sum(dim=-1) - 1).abs().max() < 1e-6
    assert (max(weights.max() for weights in (of_patches, *read)) > 0.999) == (scale > 1)  # large ones do pick one


@pytest.mark.parametrize("correlation", UNORDERED)
def test_many_copies_of_an_image_say_what_it_says_alone(correlation):
    """A mean with weights that sum to one is the same of one as of many, wherever it is taken."""
    model = model_of(("abmil", correlation, "none", "mivpg"))
    image_embeds = random_bags((1,), NUM_TOKENS)[0]
    token = image_embeds[:, :, :1]
    with torch.no_grad():
        alone = outputs_of(model, image_embeds, None, None)
        assert apart(outputs_of(model, image_embeds.expand(-1, 7, -1, -1), None, None), alone) < SAME
        weights = model.patch_pooling.attention_weights(token[0].expand(-1, NUM_TOKENS, -1))
    assert torch.equal(weights, torch.full((1, NUM_TOKENS), 1 / NUM_TOKENS))


# --- Repetition and batches ------------------------------------------------------------------------------------------


def digests() -> dict[str, str]:
    """Of outputs and gradients, with dropout drawn from a seed."""
    found = {}
    for case in [
        case for case in EVERY_OPTION if case[2] == "ppeg" or case[3] in ("transmil", "perceiver", "dtfd_mil")
    ]:
        torch.manual_seed(1)
        model = model_of(case, dropout=0.1).train()
        parts = outputs_and_gradients(model, *ragged())
        found[" ".join(case)] = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    return found


@pytest.mark.slow
def test_another_process_computes_the_same_bits():
    code = "import torch, test_numerics; torch.set_num_threads(1); print(test_numerics.digests())"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(digests())
    torch.manual_seed(2)
    other = outputs_and_gradients(model_of(EVERY_OPTION[0], dropout=0.1).train(), *ragged())
    torch.manual_seed(1)
    assert not torch.equal(
        outputs_and_gradients(model_of(EVERY_OPTION[0], dropout=0.1).train(), *ragged())[0], other[0]
    )


@pytest.mark.parametrize("case", [case for case in EVERY_OPTION if case[3] in ("mivpg", "perceiver")], ids=" ".join)
def test_prompts_and_losses_do_not_depend_on_the_batch(case, record_property):
    """Of 7 bags in batches of 1, 2 and 7."""
    model = model_of(case)
    lengths = (5, 1, 3, 2, 4, 1, 2)
    image_embeds, image_mask = random_bags(lengths, NUM_TOKENS)
    coords = random_coords(lengths, side=5)
    words = torch.randint(4, IMAGE_TOKEN_ID, (7, 6), generator=torch.Generator().manual_seed(0))
    input_ids = torch.cat([torch.full((7, NUM_QUERIES), IMAGE_TOKEN_ID), words], dim=1)
    labels = input_ids.masked_fill(input_ids == IMAGE_TOKEN_ID, -100)
    found = {}
    for batch_size in (1, 2, 7):
        outputs = []
        for start in range(0, 7, batch_size):
            rows = slice(start, start + batch_size)
            longest = max(lengths[rows])
            with torch.no_grad():
                output = model(
                    input_ids=input_ids[rows],
                    image_embeds=image_embeds[rows, :longest],
                    image_mask=image_mask[rows, :longest],
                    image_coords=coords[rows, :longest],
                    labels=labels[rows],
                    num_items_in_batch=7 * 6,
                )
            outputs.append(output)
        found[batch_size] = (
            torch.cat([output.visual_prompts for output in outputs]),
            sum(output.loss for output in outputs),
        )
    for batch_size in (2, 7):
        for what, one, other in zip(("prompts", "losses"), found[batch_size], found[1], strict=True):
            record_property(f"batches of {batch_size} against single bags, {what}", apart(one, other))
            assert apart(one, other) < SAME


# --- Compilation -----------------------------------------------------------------------------------------------------


COMPILED = [*(("aot_eager", case) for case in EVERY_OPTION), ("inductor", ("abmil", "csa", "ppeg", "mivpg"))]
"""`inductor`, which torch takes by default, needs a compiler for C++ and minutes."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "case"), COMPILED, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_compiled_it_computes_the_same(backend, case, record_property):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no compiler for C++")
    model, inputs = model_of(case), ragged()
    eager = outputs_and_gradients(model, *inputs)
    compiled = deepcopy(model)
    with counting_graphs(compiled, backend) as num_graphs:
        found = outputs_and_gradients(compiled, *inputs)
    record_property(f"graphs of {case[1]} {case[2]} {case[3]}", num_graphs[0])
    assert num_graphs[0] > 0
    for what, one, other in zip(("outputs", "gradients"), found, eager, strict=True):
        record_property(f"compiled ({backend}) against eager, {what}", apart(one, other))
        assert apart(one, other) < SAME


@contextmanager
def counting_graphs(model: MivpgVisualPromptModel, backend: str) -> Iterator[list[int]]:
    """Compiles what makes prompts, or scores; counts the graphs that it became."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    num_graphs = [0]
    name = "forward" if isinstance(model, MivpgForBagClassification) else "get_visual_prompts"
    setattr(model, name, torch.compile(getattr(model, name), backend=backend))
    try:
        yield num_graphs
        num_graphs[0] = counters["stats"]["unique_graphs"]
    finally:
        torch.compiler.reset()


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_steps_leave_no_tensor_behind():
    """`benchmarks/leaks.py` measures a thousand steps, and captions."""
    model = deepcopy(model_of(("abmil", "csa", "ppeg", "mivpg"), dropout=0.1)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    counts = []
    for number in range(8):
        outputs_of(model, *ragged()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number in (1, 7):  # the optimizer's states are made in the first step
            gc.collect()
            counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1] > 0
