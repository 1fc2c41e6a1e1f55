"""The Perceiver Resampler: Flamingo's arithmetic on bags of any size and order."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from mivpg.aggregators.perceiver import PerceiverResampler
from mivpg.errors import MivpgError
from tiny import random_bags, randomize_weights

WIDTH, HIDDEN_SIZE, NUM_TOKENS, NUM_LATENTS = 12, 7, 3, 4
SMALL = {"depth": 3, "num_heads": 2, "head_size": 5}
LENGTHS = (5, 1, 2)
TOLERANCE = 1e-5


def perceiver_of(hidden_size: int = HIDDEN_SIZE, seed: int = 0, **options) -> PerceiverResampler:
    """A small one, in which no LayerNorm is plain."""
    torch.manual_seed(seed)
    model = PerceiverResampler(WIDTH, num_prompts=NUM_LATENTS, hidden_size=hidden_size, **SMALL | options)
    randomize_weights(model)
    return model


def bags(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    return random_bags(lengths, NUM_TOKENS, WIDTH)


# ── Against others ──────────────────────────────────────────────────────────────────────────────────────────────────


def expected_prompts(model: PerceiverResampler, instances: np.ndarray) -> np.ndarray:
    """One bag (M, D) to prompts (R, H), head by head and latent by latent."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}

    def norm(states: np.ndarray, name: str) -> np.ndarray:
        centred = states - states.mean(axis=1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    size = SMALL["head_size"]
    latents = weights["latents"]
    for i in range(SMALL["depth"]):
        block = f"blocks.{i}"
        normed = norm(latents, f"{block}.latent_norm")
        sources = np.concatenate([norm(instances, f"{block}.instance_norm"), normed])
        read = np.zeros((NUM_LATENTS, SMALL["num_heads"] * size))
        for head in range(SMALL["num_heads"]):
            rows = slice(head * size, (head + 1) * size)
            for r in range(NUM_LATENTS):
                query = weights[f"{block}.query.weight"][rows] @ normed[r]
                scores = np.array([query @ (weights[f"{block}.key.weight"][rows] @ x) for x in sources])
                shares = np.exp(scores / math.sqrt(size))
                shares /= shares.sum()
                for share, source in zip(shares, sources, strict=True):
                    read[r, rows] += share * (weights[f"{block}.value.weight"][rows] @ source)
        latents = latents + read @ weights[f"{block}.output.weight"].T
        hidden = norm(latents, f"{block}.feed_forward.0") @ weights[f"{block}.feed_forward.1.weight"].T
        hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        latents = latents + hidden @ weights[f"{block}.feed_forward.3.weight"].T
    latents = norm(latents, "norm")
    if model.projection is None:
        return latents
    return latents @ weights["projection.weight"].T + weights["projection.bias"]


@pytest.mark.parametrize("hidden_size", [HIDDEN_SIZE, WIDTH], ids=["projected", "as it is"])
def test_prompts_are_the_formula(hidden_size: int, record_property) -> None:
    model = perceiver_of(hidden_size).double()
    assert (model.projection is None) == (hidden_size == WIDTH)
    image_embeds, image_mask = bags()
    prompts = model(image_embeds.double(), image_mask)
    assert prompts.embeds.shape == (len(LENGTHS), NUM_LATENTS, hidden_size)
    for i, length in enumerate(LENGTHS):
        expected = expected_prompts(model, image_embeds[i, :length].double().flatten(0, 1).numpy())
        error = np.abs(prompts.embeds[i].detach().numpy() - expected).max()
        record_property("Perceiver Resampler against numpy", float(error))
        assert error < 1e-10
    assert prompts.weights is None


IDEFICS_NAMES = {
    "0.context_layer_norm": "instance_norm",
    "0.latents_layer_norm": "latent_norm",
    "0.q_proj": "query",
    "0.k_proj": "key",
    "0.v_proj": "value",
    "0.output_proj": "output",
    "1.ln": "feed_forward.0",
    "1.fc": "feed_forward.1",
    "1.c_proj": "feed_forward.3",
}


def test_is_transformers_idefics_with_gelu(record_property) -> None:
    """IDEFICS has ReLU where OpenFlamingo has GELU, no mask and no projection; all else is the same arithmetic."""
    model = perceiver_of(WIDTH, num_heads=8, head_size=64, depth=6).double()
    config = SimpleNamespace(
        perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=False), vision_config=SimpleNamespace(embed_dim=WIDTH)
    )
    idefics = IdeficsPerceiverResampler(config, WIDTH, depth=6, n_heads=8, head_dim=64, n_latents=NUM_LATENTS)
    weights = model.state_dict()
    copied = {"latents": weights["latents"]}
    copied |= {f"layer_norm.{part}": weights[f"norm.{part}"] for part in ("weight", "bias")}
    for name in idefics.state_dict():
        if name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            theirs, part = rest.rsplit(".", 1)
            copied[name] = weights[f"blocks.{i}.{IDEFICS_NAMES[theirs]}.{part}"]
    assert len(copied) == len(weights)
    idefics.double().load_state_dict(copied)
    image_embeds = bags((5, 5))[0].double()
    assert (model(image_embeds).embeds - idefics(image_embeds.flatten(1, 2))).abs().max() > 1e-2  # the control: ReLU
    for _, feed_forward in idefics.blocks:
        feed_forward.act = nn.GELU()
    error = (model(image_embeds).embeds - idefics(image_embeds.flatten(1, 2))).abs().max().item()
    record_property("Perceiver Resampler against IDEFICS with GELU", float(error))
    assert error < 1e-10


def test_defaults_are_openflamingo() -> None:
    """Six blocks of 8 heads of 64, four times as wide between, counted: no bias but the LayerNorms'."""
    model = PerceiverResampler(WIDTH, num_prompts=64, hidden_size=WIDTH)
    block = 3 * 2 * WIDTH + 4 * WIDTH * 8 * 64 + 2 * WIDTH * 4 * WIDTH
    assert sum(parameter.numel() for parameter in model.parameters()) == 6 * block + 2 * WIDTH + 64 * WIDTH
    assert model.blocks[0].num_heads == 8


# ── A bag has no order, padding is nothing ──────────────────────────────────────────────────────────────────────────


def test_padding_is_inert() -> None:
    """NaN in padding changes no prompt and reaches no gradient, of the weights or of the bag."""
    model = perceiver_of()
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
    bag_gradient = results[1][1]
    assert not bag_gradient[~image_mask.bool()].any()


def test_ragged_batch_equals_bags_alone() -> None:
    model = perceiver_of()
    image_embeds, image_mask = bags()
    together = model(image_embeds, image_mask).embeds
    for i, length in enumerate(LENGTHS):
        alone = model(image_embeds[i : i + 1, :length]).embeds[0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=TOLERANCE)
    unmasked = model(image_embeds).embeds
    assert (unmasked[1] - together[1]).abs().max() > 1e-2  # zeros that are not masked would be seen


def test_order_does_not_matter() -> None:
    """Neither that of the images nor that of all their tokens; but what they are does."""
    model = perceiver_of()
    image_embeds, _ = bags((5,))
    prompts = model(image_embeds).embeds
    shuffled = model(image_embeds[:, [3, 0, 4, 2, 1]]).embeds
    torch.testing.assert_close(shuffled, prompts, rtol=0, atol=TOLERANCE)
    tokens = image_embeds.flatten(1, 2)[:, torch.randperm(5 * NUM_TOKENS, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(model(tokens[:, :, None]).embeds, prompts, rtol=0, atol=TOLERANCE)
    assert (model(image_embeds[:, :4]).embeds - prompts).abs().max() > 1e-2


def test_num_prompts_is_what_the_mask_counts() -> None:
    model = perceiver_of()
    prompts = model(*bags())
    assert not model.per_image
    assert [model.num_prompts(length) for length in LENGTHS] == prompts.mask.sum(dim=1).tolist()
    assert prompts.mask.dtype == torch.long
    assert prompts.mask.shape == prompts.embeds.shape[:2]


# ── It learns ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_parameter_gets_a_gradient() -> None:
    model = perceiver_of()
    model(*bags()).embeds.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_latents_are_drawn_again() -> None:
    """N(0, 1), by the constructor and by `reset_parameters`, which leaves the layers alone."""
    torch.manual_seed(0)
    model = PerceiverResampler(WIDTH, num_prompts=1000, hidden_size=HIDDEN_SIZE, **SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.reset_parameters()
    for latents in (before["latents"], model.latents):
        assert abs(latents.mean().item()) < 0.05
        assert abs(latents.std().item() - 1) < 0.05
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["latents"]


def test_learns_whether_any_instance_has_a_feature() -> None:
    """Ragged bags of which half hold one image with a large first number; held-out bags are told apart, too."""

    def labelled_bags(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        lengths = tuple(torch.randint(2, 9, (128,), generator=generator).tolist())
        image_embeds, image_mask = random_bags(lengths, 1, WIDTH, seed)
        labels = torch.arange(128) % 2
        image_embeds[..., 0].clamp_(max=1.0)
        image_embeds[labels.bool(), 0, 0, 0] = 3.0
        return image_embeds, image_mask, labels

    torch.manual_seed(0)
    model = PerceiverResampler(WIDTH, num_prompts=2, hidden_size=8, depth=2, num_heads=2, head_size=8)
    head = nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=5e-3)
    image_embeds, image_mask, labels = labelled_bags(seed=0)
    losses = []
    for _ in range(100):
        loss = F.cross_entropy(head(model(image_embeds, image_mask).embeds.mean(dim=1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert losses[-1] < 0.1
    image_embeds, image_mask, labels = labelled_bags(seed=1)
    with torch.no_grad():
        predicted = head(model(image_embeds, image_mask).embeds.mean(dim=1)).argmax(dim=1)
    assert (predicted == labels).float().mean() > 0.85


@pytest.mark.parametrize("field", ["depth", "num_heads", "head_size", "ff_mult"])
def test_options_are_checked(field: str) -> None:
    with pytest.raises(MivpgError, match=f"{field} is 0, expected an integer of at least 1"):
        PerceiverResampler(WIDTH, num_prompts=1, hidden_size=HIDDEN_SIZE, **{field: 0})
