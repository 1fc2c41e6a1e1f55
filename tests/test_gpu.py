"""On a CUDA device: BLIP-2's arithmetic bit for bit, and what the CPU says.

pytest -m gpu tests/test_gpu.py
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from families import save_blip2
from mivpg import MivpgForConditionalGeneration, folded_attention
from mivpg.bags import select
from mivpg.captioning import GenerationOptions, caption_samples
from mivpg.datasets.abo import AboConfig
from mivpg.features import extract_features
from mivpg.miniature import BASE_MODEL
from mivpg.miniature.catalogue import make_catalogue
from mivpg.training import ModelConfig
from test_aggregators import IN_PLACE, LENGTHS, make_bags, options_of
from test_modeling import assert_says_what_blip2_says, drawn, pictures
from test_training import logged
from tiny import (
    INSTANCE_CORRELATIONS,
    PATCH_POOLINGS,
    POSITION_ENCODINGS,
    random_bags,
    random_coords,
    randomize_added_weights,
    tiny_config,
    tiny_model,
)
from training_script import make_world

DEVICE = "cuda"
SCRIPT = Path(__file__).with_name("training_script.py")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def to_device(batch) -> dict:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def prompts_and_gradients(model, *bags) -> dict[str, torch.Tensor]:
    """On the CPU: what bags give, as `prompts`, and the gradient of its square by parameter."""
    prompts = model.get_visual_prompts(*bags).embeds
    prompts.square().sum().backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"prompts": prompts.detach().cpu(), **gradients}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("language", ["opt", "t5"])
def test_everything_off_is_blip2(language, attention, tmp_path):
    folder = save_blip2(tmp_path / language, language)
    blip2 = Blip2ForConditionalGeneration.from_pretrained(folder, attn_implementation=attention).eval().to(DEVICE)
    mivpg = MivpgForConditionalGeneration.from_pretrained(
        folder, instance_correlation="none", attn_implementation=attention
    ).to(DEVICE)
    text = ["a photo of", "a photo of", "it shows it"]
    inputs = to_device(
        Blip2Processor.from_pretrained(folder)(images=pictures(3), text=text, return_tensors="pt", padding=True)
    )
    as_bags = inputs | {"pixel_values": inputs["pixel_values"][:, None]}
    assert_says_what_blip2_says(mivpg, blip2, as_bags, inputs, labels=inputs["input_ids"] % 200 + 3)


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
@pytest.mark.parametrize("correlation", INSTANCE_CORRELATIONS)
@pytest.mark.parametrize("pooling", PATCH_POOLINGS)
def test_prompts_and_gradients_are_the_cpus(pooling, correlation, encoding, record_property):
    lengths = (4, 1, 3)
    image_embeds, image_mask = random_bags(lengths)
    coords = random_coords(lengths, side=5)
    found = []
    for device in ("cpu", DEVICE):
        model = tiny_model(tiny_config(pooling, correlation, encoding)).double().to(device)
        found.append(
            prompts_and_gradients(model, image_embeds.double().to(device), image_mask.to(device), coords.to(device))
        )
    expected, result = found
    assert expected.keys() == result.keys() and len(expected) > 10
    apart = max(((result[name] - expected[name]).abs().max() / (1 + expected[name].abs().max())) for name in expected)
    record_property("prompts and gradients, GPU against CPU, float64", apart.item())
    assert apart < 1e-9


@pytest.mark.parametrize("num_instances", [1000, 20_000])
@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_prompts_and_gradients_of_a_large_bag_are_the_cpus(num_instances, encoding, monkeypatch):
    """In float64; from 2,048 instances on attention is folded and goes in chunks."""
    folded = []
    folding = folded_attention.instances_ask
    monkeypatch.setattr(folded_attention, "instances_ask", lambda *a, **k: folded.append(1) or folding(*a, **k))
    generator = torch.Generator().manual_seed(0)
    image_embeds = torch.randn(1, num_instances, 1, 12, generator=generator).double()
    side = int(num_instances**0.5) + 1
    cells = torch.arange(num_instances)
    coords = torch.stack([cells % side, cells // side], dim=-1)[None].float() * 256
    found = []
    for device in ("cpu", DEVICE):
        model = tiny_model(tiny_config("cls", "csa", encoding, hidden_size=64)).double().to(device)
        found.append(prompts_and_gradients(model, image_embeds.to(device), None, coords.to(device)))
    assert bool(folded) == (num_instances > 2048)
    expected, result = found
    assert expected.keys() == result.keys() and len(expected) > 10
    for name in expected:
        assert (result[name] - expected[name]).abs().max() < 1e-9 * (1 + expected[name].abs().max()), name


@pytest.mark.parametrize("aggregator", ["mivpg", *IN_PLACE])
def test_every_aggregator_says_what_it_says_on_the_cpu(aggregator):
    torch.manual_seed(0)
    model, processor = ModelConfig(
        base=str(BASE_MODEL), **options_of(aggregator) if aggregator != "mivpg" else {}
    ).load()
    drawn(model).eval()
    captions = ["a chair", "a table", "a lamp"]
    batch = processor(image_embeds=make_bags(), text="a photo of", captions=captions)
    with torch.no_grad():
        expected = model(**batch)
        model.to(DEVICE)
        result = model(**to_device(batch))
        alone = [
            model(**to_device(processor(image_embeds=[bag], text="a photo of", captions=[caption]))).visual_prompts
            for bag, caption in zip(make_bags(), captions, strict=True)
        ]
    torch.testing.assert_close(result.loss.cpu(), expected.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.visual_prompts.cpu(), expected.visual_prompts, rtol=1e-3, atol=1e-3)
    assert len(LENGTHS) == len(alone)
    for row, prompts in zip(result.visual_prompts, alone, strict=True):
        torch.testing.assert_close(row[: prompts.shape[1]], prompts[0], rtol=1e-3, atol=1e-3)


def test_captions_and_features_are_the_cpus(tmp_path):
    make_catalogue(tmp_path / "abo", num_products=60, seed=0)
    samples = select(AboConfig(root=tmp_path / "abo").load(), "test")
    captions, features = [], []
    for device in ("cpu", DEVICE):
        model = drawn(MivpgForConditionalGeneration.from_pretrained(BASE_MODEL, patch_pooling="abmil")).eval()
        model.to(device)
        _, processor = ModelConfig(base=str(BASE_MODEL)).load()
        stored = extract_features(model, processor, samples, tmp_path / device)
        features.append([load_file(path) for path in sorted((tmp_path / device).rglob("*.safetensors"))])
        greedy = GenerationOptions(num_beams=1, max_new_tokens=64)
        captions.append([list(caption_samples(model, processor, s, generation=greedy)) for s in (samples, stored)])
    assert captions[0] == captions[1]
    assert len(features[0]) == len(features[1]) > 0
    for cpu, gpu in zip(*features, strict=True):
        torch.testing.assert_close(gpu["image_embeds"], cpu["image_embeds"], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def run(world: Path, out: Path, *arguments: str, visible: bool = True, **options) -> subprocess.CompletedProcess:
    environment = os.environ | ({} if visible else {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, SCRIPT, world, json.dumps([{"output_dir": str(out), **options}]), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("options", "tolerance"), [({}, 1e-3), ({"bf16": True}, 0.05)], ids=["float32", "bf16"])
def test_it_trains_as_on_the_cpu(world, tmp_path, options, tolerance):
    """Losses move by more than twice what bfloat16 may change."""
    assert run(world, tmp_path / "cpu", visible=False).returncode == 0
    assert run(world, tmp_path / "gpu", **options).returncode == 0
    expected, losses = (torch.tensor(logged(tmp_path / name, "loss")) for name in ("cpu", "gpu"))
    assert len(losses) == 6 and expected.max() - expected.min() > 0.1
    torch.testing.assert_close(losses, expected, rtol=0, atol=tolerance)


def test_a_killed_run_ends_as_an_unbroken_one(world, tmp_path):
    assert run(world, tmp_path / "unbroken", dropout=0.1).returncode == 0
    assert run(world, tmp_path / "killed", "--kill-at", "4", dropout=0.1).returncode == -signal.SIGKILL
    resumed = run(world, tmp_path / "killed", "--resume", dropout=0.1)
    assert resumed.returncode == 0 and "Resuming from step 3" in resumed.stdout
    expected, losses = (torch.tensor(logged(tmp_path / name, "loss")) for name in ("unbroken", "killed"))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    weights = [load_file(next((tmp_path / name / "best").glob("*.safetensors"))) for name in ("unbroken", "killed")]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=1e-5)


def test_half_precision_and_a_device_map(tmp_path):
    """The frozen models in bfloat16, what trains in float32, placed by `device_map`; a step moves what trains alone."""
    folder = save_blip2(tmp_path / "opt", "opt")
    model = MivpgForConditionalGeneration.from_pretrained(
        folder, dtype="bfloat16", device_map="auto", patch_pooling="abmil"
    )
    randomize_added_weights(model)
    model.freeze()
    assert {p.device.type for p in model.parameters()} == {torch.device(DEVICE).type}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    _, processor = ModelConfig(base=str(folder)).load()
    batch = to_device(processor(images=[pictures(3), pictures(1)], text="a photo of", captions=["a chair", "a bed"]))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert not moved & frozen
    parts = {name.split(".")[0] for name in moved}
    assert parts == {"query_tokens", "qformer", "patch_pooling", "language_projection"}
