"""LLaVA's and FROMAGe's projections: each image's prompts are its own, in the order of the bag."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlavaConfig, OPTConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mivpg.aggregators.base import Aggregator
from mivpg.aggregators.projections import LinearProjection, PooledProjection
from mivpg.errors import MivpgError
from tiny import random_bags, randomize_weights

WIDTH, HIDDEN_SIZE, NUM_TOKENS, NUM_POOLED_PROMPTS = 12, 7, 3, 4
LENGTHS = (4, 1, 2)
TOLERANCE = 1e-5

KINDS = ("linear", "mlp", "pooled")


def projection_of(kind: str, **options) -> Aggregator:
    """An aggregator in eval mode whose biases are not small."""
    torch.manual_seed(0)
    sizes = {"image_embeds_size": WIDTH, "hidden_size": HIDDEN_SIZE}
    if kind == "pooled":
        model: Aggregator = PooledProjection(**sizes, num_prompts=NUM_POOLED_PROMPTS, **options)
    else:
        layers = {"linear": 1, "mlp": 2}[kind]
        model = LinearProjection(**sizes, num_prompts=NUM_TOKENS, num_layers=layers, **options)
    randomize_weights(model)
    return model.eval()


def bags(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    return random_bags(lengths, NUM_TOKENS, WIDTH)


def expected_prompts(kind: str, model: Aggregator, image: Tensor) -> list[list[float]]:
    """The prompts of one image (P, D), number by number in Python's floats."""

    def linear(rows: Tensor, bias: Tensor, x: list[float]) -> list[float]:
        return [
            b + sum(w * v for w, v in zip(row, x, strict=True))
            for row, b in zip(rows.tolist(), bias.tolist(), strict=True)
        ]

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if kind == "pooled":
        (layer,) = layers
        numbers = linear(layer.weight, layer.bias, image[0].tolist())
        return [numbers[k * HIDDEN_SIZE : (k + 1) * HIDDEN_SIZE] for k in range(NUM_POOLED_PROMPTS)]
    prompts = []
    for token in image.tolist():
        hidden = linear(layers[0].weight, layers[0].bias, token)
        if kind == "mlp":
            hidden = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden]
            hidden = linear(layers[1].weight, layers[1].bias, hidden)
        prompts.append(hidden)
    return prompts


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_the_formula(kind: str, record_property) -> None:
    """Image order, then token order; zero for padding, which the mask names."""
    model = projection_of(kind).double()
    image_embeds, image_mask = bags()
    prompts = model(image_embeds.double(), image_mask)
    for i, length in enumerate(LENGTHS):
        rows = [row for image in image_embeds[i, :length].double() for row in expected_prompts(kind, model, image)]
        expected = torch.tensor(rows, dtype=torch.float64)
        error = (prompts.embeds[i, : len(rows)] - expected).abs().max().item()
        record_property("projections against Python's floats", float(error))
        assert error < 1e-12
        assert expected.abs().max() > 0.1
        assert not prompts.embeds[i, len(rows) :].any()
        assert prompts.mask[i].tolist() == [1] * len(rows) + [0] * (prompts.mask.shape[1] - len(rows))
    assert prompts.weights is None


def test_two_layers_are_transformers_llava() -> None:
    """Bit for bit: the same arithmetic on the same rows."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=WIDTH),
        text_config=OPTConfig(hidden_size=HIDDEN_SIZE, num_attention_heads=1),
    )
    llava = LlavaMultiModalProjector(config)
    model = projection_of("mlp")
    first, second = (module for module in model.modules() if isinstance(module, nn.Linear))
    llava.linear_1.load_state_dict(first.state_dict())
    llava.linear_2.load_state_dict(second.state_dict())
    image_embeds, _ = bags((4,))
    assert torch.equal(model(image_embeds).embeds[0], llava(image_embeds[0]).flatten(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_means_all_are_real(kind: str) -> None:
    model = projection_of(kind)
    image_embeds, image_mask = bags((3, 3))
    without, with_mask = model(image_embeds), model(image_embeds, image_mask)
    assert torch.equal(without.embeds, with_mask.embeds)
    assert without.mask.all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_inert(kind: str) -> None:
    """NaN in padding changes no prompt and reaches no gradient, of the weights or of the bag."""
    model = projection_of(kind)
    image_embeds, image_mask = bags()
    results = []
    for value in (0.0, torch.nan):
        filled = image_embeds.masked_fill(~image_mask.bool()[..., None, None], value).requires_grad_()
        prompts = model(filled, image_mask).embeds
        gradients = torch.autograd.grad(prompts.square().sum(), [filled, *model.parameters()])
        results.append([prompts, *gradients])
    for clean, dirty in zip(*results, strict=True):
        assert clean.abs().max() > 0
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batch_equals_bags_alone(kind: str) -> None:
    model = projection_of(kind)
    image_embeds, image_mask = bags()
    together = model(image_embeds, image_mask)
    for i, length in enumerate(LENGTHS):
        alone = model(image_embeds[i : i + 1, :length])
        count = model.num_prompts(length)
        assert alone.embeds.shape == (1, count, HIDDEN_SIZE)
        torch.testing.assert_close(together.embeds[i, :count], alone.embeds[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_follow_their_images(kind: str) -> None:
    """Equivariant: a shuffled bag has the same blocks of prompts, shuffled."""
    model = projection_of(kind)
    image_embeds, _ = bags((5,))
    order = torch.tensor([3, 0, 4, 2, 1])
    blocks = model(image_embeds).embeds.unflatten(1, (5, -1))
    shuffled = model(image_embeds[:, order]).embeds.unflatten(1, (5, -1))
    torch.testing.assert_close(shuffled, blocks[:, order], rtol=0, atol=TOLERANCE)
    assert (shuffled - blocks).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_num_prompts_is_what_the_mask_counts(kind: str) -> None:
    model = projection_of(kind)
    prompts = model(*bags())
    assert model.per_image
    assert [model.num_prompts(length) for length in LENGTHS] == prompts.mask.sum(dim=1).tolist()
    assert prompts.mask.dtype == torch.long


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    model = projection_of(kind)
    model(*bags()).embeds.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_pooled_reads_the_first_token_alone() -> None:
    model = projection_of("pooled")
    image_embeds, image_mask = bags()
    assert torch.equal(model(image_embeds, image_mask).embeds, model(image_embeds[:, :, :1], image_mask).embeds)


def test_pooled_dropout() -> None:
    """On prompts, and in training alone: what is not dropped is 1 / (1 - p) as large, about p of it is zero."""
    model = projection_of("pooled", dropout=0.75)
    image_embeds, _ = bags((60,))
    kept = model(image_embeds).embeds
    torch.manual_seed(0)
    dropped = model.train()(image_embeds).embeds
    torch.testing.assert_close(dropped[dropped != 0], 4 * kept[dropped != 0])
    assert 0.7 < (dropped == 0).float().mean() < 0.8
    assert (kept != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_learns_which_image_has_a_feature(kind: str) -> None:
    """The first two numbers of a prompt say whether its image's first token is above 0.5 in the first feature."""
    torch.manual_seed(0)
    model = projection_of(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    image_embeds, image_mask = random_bags((6,) * 32, NUM_TOKENS, WIDTH)
    labels = (image_embeds[:, :, 0, 0] > 0.5).long()
    losses = []
    for _ in range(150):
        prompts = model(image_embeds, image_mask).embeds.unflatten(1, (6, -1))
        loss = F.cross_entropy(prompts[:, :, 0, :2].flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.6  # what knowing only how many there are gives
    assert losses[-1] < 0.2


def test_another_number_of_tokens_is_refused() -> None:
    model = projection_of("linear")
    image_embeds, image_mask = random_bags((2,), 5, WIDTH)
    with pytest.raises(MivpgError, match=r"5 tokens an image.* for 3 .*num_query_tokens=5"):
        model(image_embeds, image_mask)


def test_options_are_checked() -> None:
    with pytest.raises(MivpgError, match=r"num_layers is 3, expected 1 .* or 2"):
        LinearProjection(WIDTH, num_prompts=1, hidden_size=HIDDEN_SIZE, num_layers=3)
    with pytest.raises(MivpgError, match=r"dropout is 1\.5, expected"):
        PooledProjection(WIDTH, num_prompts=1, hidden_size=HIDDEN_SIZE, dropout=1.5)
