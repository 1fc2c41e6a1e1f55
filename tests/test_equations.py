"""The model computes the paper's equations: it agrees with `reference.py`, part by part and as a whole, to 1e-10."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mivpg.configuration_mivpg import MivpgQFormerConfig
from mivpg.layers import (
    AttentionPooling,
    ConstantCorrelatedSelfAttention,
    CorrelatedSelfAttention,
    FullSelfAttention,
    InducedSelfAttention,
    NystromSelfAttention,
    PyramidPositionEncoding,
)
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from reference import (
    Array,
    Setting,
    Weights,
    attention_pooling,
    correlate,
    encode_positions,
    reference_bag,
    reference_instances,
    reference_prompts,
)
from tiny import (
    INSTANCE_CORRELATIONS,
    PATCH_POOLINGS,
    POSITION_ENCODINGS,
    random_bags,
    random_coords,
    randomize_weights,
    tiny_config,
    tiny_model,
)

TOLERANCE = 1e-10
EFFECT = 1e-2

LENGTHS = (5, 1, 2)
EVERYTHING_OFF = Setting("none", "none", "none")
OTHER_POOLING = {"none": "mean", "cls": "mean", "mean": "cls", "max": "mean", "abmil": "mean", "gated_abmil": "abmil"}


def model_of(setting: Setting, seed: int = 0) -> MivpgForConditionalGeneration:
    """A tiny model in float64 with every weight of its own, biases and LayerNorms included."""
    config = tiny_config(
        setting.patch_pooling,
        setting.instance_correlation,
        setting.position_encoding,
        num_prefix_tokens=setting.num_prefix_tokens,
        num_hidden_layers=setting.num_layers,
        cross_attention_frequency=setting.cross_attention_frequency,
        num_landmarks=setting.num_landmarks,
        pinv_iterations=setting.pinv_iterations,
    )
    model = tiny_model(config, seed).double()
    randomize_weights(model, generator=torch.Generator().manual_seed(seed))
    return model


def weights_of(model: nn.Module) -> Weights:
    """What the visual prompts are made of; the language side is not the reference's business."""
    parts = ("qformer", "query_tokens", "patch_pooling")
    return Weights({name: value for name, value in model.state_dict().items() if name.split(".")[0] in parts})


def prompts_of(model: MivpgForConditionalGeneration, *inputs: Tensor | None) -> Array:
    with torch.no_grad():
        return model.get_visual_prompts(*inputs).embeds.numpy()


def compare(setting: Setting, image_embeds: Tensor, image_mask: Tensor, image_coords: Tensor | None = None) -> float:
    """Model and reference agree, the reference has read every weight, and each thing that is on moves the prompts.

    Returns:
        How far they are apart.
    """
    model = model_of(setting)
    weights = weights_of(model)
    arrays = [None if x is None else x.numpy() for x in (image_embeds, image_mask, image_coords)]
    prompts = prompts_of(model, image_embeds, image_mask, image_coords)

    expected = reference_prompts(weights, setting, *arrays)

    np.testing.assert_allclose(prompts, expected, rtol=0, atol=TOLERANCE)
    assert weights.read == set(weights.arrays)
    for control in controls(setting, image_embeds.shape[2]):
        assert np.abs(prompts - reference_prompts(weights, control, *arrays)).max() > EFFECT, control
    return float(np.abs(prompts - expected).max())


def controls(setting: Setting, num_patches: int) -> list[Setting]:
    """The same setting with one thing off, or with what is easily taken for it; one patch pools to itself."""
    others = []
    if setting.instance_correlation != "none":
        others.append(replace(setting, instance_correlation="none"))
    if setting.instance_correlation == "csa":
        others.append(replace(setting, instance_correlation="csa_constant"))
    if setting.position_encoding != "none":
        others.append(replace(setting, position_encoding="none"))
    if num_patches > 1:
        others.append(replace(setting, patch_pooling=OTHER_POOLING[setting.patch_pooling]))
    return others


def test_reference_is_blip2s_qformer_with_everything_off() -> None:
    """What the reference rests on is not our own: transformers' Q-Former gives the same."""
    config = Blip2QFormerConfig(
        hidden_size=16, num_hidden_layers=5, num_attention_heads=4, intermediate_size=20, encoder_hidden_size=12
    )
    blip2 = Blip2QFormerModel(config).double().eval()
    randomize_weights(blip2, generator=torch.Generator().manual_seed(0))
    query_tokens, instances = torch.randn(1, 5, 16).double(), torch.randn(1, 7, 12).double()
    with torch.no_grad():
        expected = blip2(query_embeds=query_tokens, encoder_hidden_states=instances).last_hidden_state[0]

    state_dict = {f"qformer.{name}": value for name, value in blip2.state_dict().items()}
    weights = Weights(state_dict | {"query_tokens": query_tokens})
    prompts = reference_bag(weights, EVERYTHING_OFF, instances[0, :, None].numpy(), None)

    np.testing.assert_allclose(prompts, expected, rtol=0, atol=TOLERANCE)
    assert weights.read == set(weights.arrays)


CORRELATIONS = {
    "csa": CorrelatedSelfAttention,
    "csa_constant": ConstantCorrelatedSelfAttention,
    "self_attention": FullSelfAttention,
    "induced": InducedSelfAttention,
    "nystrom": NystromSelfAttention,
}


def randomized(part: nn.Module) -> tuple[nn.Module, Weights]:
    """A part alone, in float64 and with every weight drawn; the reference calls it `part`."""
    part = part.double().eval()
    with torch.no_grad():
        for index, parameter in enumerate(part.parameters()):
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(index))
    return part, Weights({f"part.{name}": value for name, value in part.state_dict().items()})


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@torch.no_grad()
def test_attention_pooling(gated: bool) -> None:
    """Eq. 3 and 4; the mean is what it starts as, and what it would be if the weights did not matter."""
    part, weights = randomized(AttentionPooling(12, gated=gated))
    images = torch.randn(3, 10, 12).double()
    expected = np.stack([attention_pooling(weights, "part", patches, gated) for patches in images.numpy()])
    np.testing.assert_allclose(part(images), expected, rtol=0, atol=TOLERANCE)
    assert weights.read == set(weights.arrays)
    assert np.abs(expected - images.mean(1).numpy()).max() > EFFECT


@pytest.mark.parametrize("name", CORRELATIONS)
@torch.no_grad()
def test_instance_correlation(name: str) -> None:
    """Eq. 9, its control, Attention(B, B, B), Eq. 7 with Eq. 8, and the Nyström form, each for bags of any length."""
    setting = Setting("none", name, "none")
    config = MivpgQFormerConfig(
        hidden_size=16, num_attention_heads=4, encoder_hidden_size=12, num_landmarks=4, num_inducing_points=3
    )
    part, weights = randomized(CORRELATIONS[name](config))
    for length in (1, 2, 4, 5, 9, 12, 40):
        instances = torch.randn(1, length, 12).double()
        queries, learned = torch.randn(2, 1, 5, 16).double()
        expected = correlate(weights, "part", setting, instances[0].numpy(), queries[0].numpy(), learned[0].numpy())
        np.testing.assert_allclose(part(instances, None, queries, learned)[0], expected, rtol=0, atol=TOLERANCE)
        assert np.abs(expected - instances[0].numpy()).max() > EFFECT
    assert weights.read == set(weights.arrays)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in CORRELATIONS if name != "nystrom"])  # which drops none
@torch.no_grad()
def test_attention_weights_are_dropped_in_training_alone(name: str, implementation: str) -> None:
    config = MivpgQFormerConfig(hidden_size=16, num_attention_heads=4, encoder_hidden_size=12, num_inducing_points=3)
    config._attn_implementation = implementation
    part, _ = randomized(CORRELATIONS[name](config))
    inputs = torch.randn(1, 7, 12).double(), None, *torch.randn(2, 1, 5, 16).double()
    part.attention_dropout = 0.0
    expected = part(*inputs)
    part.attention_dropout = 0.5
    assert torch.equal(part.eval()(*inputs), expected)
    assert (part.train()(*inputs) - expected).abs().max() > EFFECT


@torch.no_grad()
def test_nystrom_with_a_landmark_each_is_self_attention() -> None:
    """Not our transcription but mathematics: A pinv(A) A = A, so with every instance a landmark nothing is lost."""
    config = MivpgQFormerConfig(
        hidden_size=16, num_attention_heads=4, encoder_hidden_size=12, num_landmarks=7, pinv_iterations=60
    )
    nystrom, _ = randomized(NystromSelfAttention(config))
    nystrom.residual_convolution.weight.zero_()
    full, _ = randomized(FullSelfAttention(config))
    full.load_state_dict(nystrom.state_dict(), strict=False)
    instances, unread = torch.randn(1, 7, 12).double(), torch.zeros(1, 5, 16).double()

    torch.testing.assert_close(
        nystrom(instances, None, unread, unread), full(instances, None, unread, unread), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("grid", ["patches", "square", "dense", "sparse"])
@pytest.mark.parametrize("num_images", [1, 2, 5, 9, 11])
@torch.no_grad()
def test_position_encoding(grid: str, num_images: int) -> None:
    """PPEG on each of its grids; one token an image, or 3 x 3 patches behind CLS."""
    setting = Setting("none", "none", "ppeg")
    model = model_of(setting)
    part, weights = randomized(PyramidPositionEncoding(12))
    image_embeds, image_mask = random_bags((num_images,), num_patches=10 if grid == "patches" else 1)
    image_embeds = image_embeds.double()
    image_coords = {"dense": random_coords((num_images,), 4), "sparse": random_coords((num_images,), 12)}.get(grid)
    instances, _ = model.get_instances(image_embeds, image_mask)

    encoded = part(instances, model.get_instance_grid(image_embeds, image_mask, image_coords))[0]

    coordinates = None if image_coords is None else image_coords[0].double().numpy()
    expected = encode_positions(weights, "part", setting, image_embeds[0].numpy(), instances[0].numpy(), coordinates)
    np.testing.assert_allclose(encoded, expected, rtol=0, atol=TOLERANCE)
    assert weights.read == set(weights.arrays)
    assert np.abs(expected - instances[0].numpy()).max() > EFFECT


@torch.no_grad()
def test_position_encoding_ends_at_the_edge() -> None:
    """Two thin strips of a slide, far apart: what stands at the right end of a row is no neighbour of the next row."""
    setting = Setting("none", "none", "ppeg")
    part, weights = randomized(PyramidPositionEncoding(12))
    image_coords = torch.tensor([[[x, y] for y in range(5) for x in (0, 1, 30)]]).double()
    image_embeds, image_mask = random_bags((15,), num_patches=1)
    instances = image_embeds[:, :, 0].double()
    encoded = part(instances, model_of(setting).get_instance_grid(image_embeds, image_mask, image_coords))[0]
    expected = encode_positions(
        weights, "part", setting, image_embeds[0].numpy(), instances[0].numpy(), image_coords[0].numpy()
    )
    np.testing.assert_allclose(encoded, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pooling", PATCH_POOLINGS)
@torch.no_grad()
def test_instances(pooling: str) -> None:
    """What the blocks get of each image, before any of them."""
    setting = Setting(pooling, "none", "none")
    model = model_of(setting)
    image_embeds, image_mask = random_bags(LENGTHS)
    instances, instance_mask = model.get_instances(image_embeds.double(), image_mask)
    for bag, length in enumerate(LENGTHS):
        expected = reference_instances(weights_of(model), setting, image_embeds[bag, :length].double().numpy())
        np.testing.assert_allclose(instances[bag][instance_mask[bag].bool()], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "encoding",
    [pytest.param(encoding, marks=pytest.mark.slow if encoding == "none" else ()) for encoding in POSITION_ENCODINGS],
)
@pytest.mark.parametrize("correlation", INSTANCE_CORRELATIONS)
@pytest.mark.parametrize("pooling", PATCH_POOLINGS)
def test_whole_path(pooling: str, correlation: str, encoding: str, record_property) -> None:
    """Every combination, on a ragged batch: three blocks with cross-attention, so that CSA has queries to read."""
    image_embeds, image_mask = random_bags(LENGTHS)
    apart = compare(Setting(pooling, correlation, encoding), image_embeds.double(), image_mask)
    record_property("model against the loops of tests/reference.py, float64", apart)


@pytest.mark.parametrize("correlation", INSTANCE_CORRELATIONS)
def test_whole_path_with_cross_attention_in_every_block(correlation: str) -> None:
    image_embeds, image_mask = random_bags(LENGTHS)
    setting = Setting("gated_abmil", correlation, "ppeg", num_layers=3, cross_attention_frequency=1)
    compare(setting, image_embeds.double(), image_mask)


@pytest.mark.parametrize("pooling", ["none", "cls", "abmil"])
@pytest.mark.parametrize("correlation", ["csa", "nystrom"])
@pytest.mark.parametrize("side", [3, 9], ids=["dense", "sparse"])
def test_whole_path_on_true_coordinates(side: int, pooling: str, correlation: str) -> None:
    """Slide patches on a lattice with holes; `none` is the stored feature of one token an image."""
    image_embeds, image_mask = random_bags(LENGTHS, num_patches=1 if pooling == "none" else 10)
    image_coords = random_coords(LENGTHS, side).double()
    compare(Setting(pooling, correlation, "ppeg"), image_embeds.double(), image_mask, image_coords)


def test_coordinates_are_not_the_square() -> None:
    """The control of the test above: the same bag where nothing is known gets other prompts."""
    image_embeds, image_mask = random_bags(LENGTHS)
    model = model_of(Setting("abmil", "csa", "ppeg"))
    known = prompts_of(model, image_embeds.double(), image_mask, random_coords(LENGTHS, 3).double())
    unknown = prompts_of(model, image_embeds.double(), image_mask, None)
    assert np.abs(known - unknown).max() > EFFECT


@pytest.mark.parametrize("pooling", ["none", "abmil"])
@pytest.mark.parametrize("num_prefix_tokens", [0, 3])
def test_whole_path_with_other_prefixes(pooling: str, num_prefix_tokens: int) -> None:
    """No CLS token as in SigLIP, several as in DINOv2 with registers; none of them is on the grid."""
    image_embeds, image_mask = random_bags(LENGTHS, num_patches=num_prefix_tokens + 9)
    setting = Setting(pooling, "csa", "ppeg", num_prefix_tokens=num_prefix_tokens)
    compare(setting, image_embeds.double(), image_mask)


def test_mask_with_a_hole_is_refused() -> None:
    """The reference takes real images wherever they stand; the model, whose padding is at the end, says so."""
    image_embeds, _ = random_bags((3,))
    with pytest.raises(ValueError, match="end of a bag"):
        model_of(EVERYTHING_OFF).get_visual_prompts(image_embeds.double(), torch.tensor([[1, 0, 1]]))


@settings(deadline=None, max_examples=15, derandomize=True)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple), num_landmarks=st.integers(1, 9))
def test_whole_path_at_any_length(lengths: tuple[int, ...], num_landmarks: int) -> None:
    """Squares that are not full, segments that are shorter, fewer instances than landmarks."""
    image_embeds, image_mask = random_bags(lengths, num_patches=1)
    setting = Setting("none", "nystrom", "ppeg", num_layers=3, num_landmarks=num_landmarks)
    model = model_of(setting)
    expected = reference_prompts(weights_of(model), setting, image_embeds.double().numpy(), image_mask.numpy())
    np.testing.assert_allclose(prompts_of(model, image_embeds.double(), image_mask), expected, rtol=0, atol=TOLERANCE)
