"""Multiple instance learning as aggregators: each is its formula, and torchmil's numbers, on bags of any size."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmil.models import ABMIL, TransMIL
from torchmil.nn import MaxPool, MeanPool, MultiheadCrossAttention

from mivpg.aggregators.base import Aggregator
from mivpg.aggregators.pooling import AttentionMil, DeepSets, EmbeddingPooling, MaxPooling, MeanPooling
from mivpg.aggregators.set_transformer import AttentionBlock, SetTransformer
from mivpg.aggregators.transmil import TransMil
from mivpg.errors import MivpgError
from tiny import random_bags, random_coords, randomize_weights

WIDTH, NUM_TOKENS, NUM_PROMPTS, HIDDEN_SIZE = 6, 2, 3, 7
LENGTHS = (11, 1, 3, 5)
SIZE, NUM_HEADS, NUM_POINTS, NUM_LANDMARKS, PINV_ITERATIONS = 16, 2, 5, 4, 6
EXACT, TOLERANCE = 1e-9, 1e-5

mi_net = partial(EmbeddingPooling, layer_sizes=(9, 8, 5))
set_transformer = partial(SetTransformer, size=SIZE, num_heads=NUM_HEADS, num_points=NUM_POINTS)
trans_mil = partial(TransMil, size=SIZE, num_heads=NUM_HEADS, num_landmarks=NUM_LANDMARKS)

KINDS: dict[str, Callable[..., Aggregator]] = {
    "mean": MeanPooling,
    "max": MaxPooling,
    "MI-Net max": partial(mi_net, pooling="max"),
    "MI-Net mean": partial(mi_net, pooling="mean"),
    "MI-Net lse": partial(mi_net, pooling="lse"),
    "AB-MIL": partial(AttentionMil, embed_size=10),
    "gated AB-MIL": partial(AttentionMil, embed_size=10, gated=True),
    "DeepSets": partial(DeepSets, layer_size=8),
    "Set Transformer": set_transformer,
    "Set Transformer, normed": partial(set_transformer, layer_norm=True),
    "TransMIL": trans_mil,
    "TransMIL on a dense lattice": trans_mil,
    "TransMIL on a sparse lattice": trans_mil,
}
SIDES = {"TransMIL on a dense lattice": 4, "TransMIL on a sparse lattice": 9}
"""Of the lattice of 11 images: one that they fill to a quarter or more, and one that they do not."""

OWN_WIDTHS = {"mean": WIDTH, "max": WIDTH, "AB-MIL": 10, "gated AB-MIL": 10, "DeepSets": 8}
OWN_WIDTHS |= {f"MI-Net {pooling}": 5 for pooling in ("max", "mean", "lse")}
EXPANDED = {"num_prompts": NUM_PROMPTS, "hidden_size": HIDDEN_SIZE}

every_kind = pytest.mark.parametrize("kind", KINDS)
as_vector_and_as_prompts = pytest.mark.parametrize("options", [{}, EXPANDED], ids=["z", "prompts"])


def make(kind: str, seed: int = 0, std: float = 0.2, **options) -> Aggregator:
    """In eval mode; no bias is zero, no LayerNorm plain."""
    torch.manual_seed(seed)
    model = KINDS[kind](WIDTH, **options).eval()
    randomize_weights(model, std, generator=torch.Generator().manual_seed(seed))
    return model


def make_batch(kind: str, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, Tensor]:
    """What a model of this kind is called with; one token an image where there are coordinates."""
    embeds, mask = random_bags(lengths, 1 if kind in SIDES else NUM_TOKENS, WIDTH, seed)
    batch = {"image_embeds": embeds, "image_mask": mask}
    if kind in SIDES:
        batch["image_coords"] = random_coords(lengths, SIDES[kind], seed)
    return batch


def bag_alone(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One of its bags, cut to what is real, without a mask."""
    length = int(batch["image_mask"][index].sum())
    return {name: value[index : index + 1, :length] for name, value in batch.items() if name != "image_mask"}


def reordered(batch: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    return {name: value[:, order] for name, value in batch.items()}


def as_double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"image_embeds": batch["image_embeds"].double()}


# ── The formulas, written out ───────────────────────────────────────────────────────────────────────────────────────

Weights = dict[str, np.ndarray]


def linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.0)


def softmax(scores: list[float]) -> list[float]:
    exponents = [math.exp(score) for score in scores]
    return [exponent / sum(exponents) for exponent in exponents]


def layer_norm(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - sum(x) / len(x)
    return centred / math.sqrt(sum(centred**2) / len(x) + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def network(weights: Weights, name: str, num_layers: int, x: np.ndarray, *, last_relu: bool) -> np.ndarray:
    for i in range(num_layers):
        x = linear(weights, f"{name}.{2 * i}", x)
        if last_relu or i < num_layers - 1:
            x = relu(x)
    return x


def expected_mi_net(weights: Weights, bag: np.ndarray, pooling: str) -> np.ndarray:
    embedded = [network(weights, "embed", 3, x, last_relu=True) for x in bag]
    z = []
    for values in zip(*embedded, strict=True):
        if pooling == "max":
            z.append(max(values))
        elif pooling == "mean":
            z.append(sum(values) / len(values))
        else:
            z.append(math.log(sum(math.exp(value) for value in values) / len(values)))
    return np.array(z)


def attention_weights(weights: Weights, bag: np.ndarray) -> list[float]:
    scores = []
    for x in bag:
        h = relu(linear(weights, "embed.0", x))
        hidden = np.tanh(linear(weights, "projection", h))
        if "gate.weight" in weights:
            hidden = hidden / (1 + np.exp(-linear(weights, "gate", h)))
        scores.append(linear(weights, "score", hidden)[0])
    return softmax(scores)


def expected_attention_mil(weights: Weights, bag: np.ndarray) -> np.ndarray:
    shares = attention_weights(weights, bag)
    return sum(share * relu(linear(weights, "embed.0", x)) for share, x in zip(shares, bag, strict=True))


def expected_deep_sets(weights: Weights, bag: np.ndarray) -> np.ndarray:
    mean = sum(network(weights, "phi", 4, x, last_relu=False) for x in bag) / len(bag)
    return network(weights, "rho", 4, mean, last_relu=False)


def attention_block(weights: Weights, name: str, queries: list, keys: list) -> list[np.ndarray]:
    """MAB(Q, K), query by query and head by head, with the scale of the full width."""
    head_size = SIZE // NUM_HEADS
    states = []
    for one in queries:
        query = linear(weights, f"{name}.query", one)
        read = np.zeros(SIZE)
        for head in range(NUM_HEADS):
            rows = slice(head * head_size, (head + 1) * head_size)
            scores = [query[rows] @ linear(weights, f"{name}.key", k)[rows] / math.sqrt(SIZE) for k in keys]
            for share, k in zip(softmax(scores), keys, strict=True):
                read[rows] += share * linear(weights, f"{name}.value", k)[rows]
        state = query + read
        if f"{name}.norms.0.weight" in weights:
            state = layer_norm(weights, f"{name}.norms.0", state)
        state = state + relu(linear(weights, f"{name}.feed_forward", state))
        if f"{name}.norms.1.weight" in weights:
            state = layer_norm(weights, f"{name}.norms.1", state)
        states.append(state)
    return states


def expected_set_transformer(weights: Weights, bag: np.ndarray) -> np.ndarray:
    """(T, d)."""
    states = list(bag)
    for block in ("encoder.0", "encoder.1"):
        gathered = attention_block(weights, f"{block}.gather", list(weights[f"{block}.points"][0]), states)
        states = attention_block(weights, f"{block}.spread", states, gathered)
    states = attention_block(weights, "pool", list(weights["seeds"][0]), states)
    if len(states) > 1:
        for block in ("decoder.0", "decoder.1"):
            states = attention_block(weights, block, states, states)
    return np.array(states)


def iterated_inverse(kernel: np.ndarray) -> np.ndarray:
    one = np.eye(len(kernel))
    z = kernel.T / (np.abs(kernel).sum(axis=0).max() * np.abs(kernel).sum(axis=1).max())
    for _ in range(PINV_ITERATIONS):
        z = 0.25 * z @ (13 * one - kernel @ z @ (15 * one - kernel @ z @ (7 * one - kernel @ z)))
    return z


def nystrom(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One head (L, ·): landmarks are means of segments that are counted from the end, so that the first is shorter."""
    length = len(query)
    segment = math.ceil(length / NUM_LANDMARKS)
    ends = sorted(range(length, 0, -segment))
    means = [[sum(rows[max(end - segment, 0) : end]) / min(segment, end) for end in ends] for rows in (query, key)]
    to_landmarks = np.array([softmax([q @ k for k in means[1]]) for q in query])
    among_landmarks = np.array([softmax([q @ k for k in means[1]]) for q in means[0]])
    from_landmarks = np.array([softmax([q @ k for k in key]) for q in means[0]])
    return to_landmarks @ iterated_inverse(among_landmarks) @ from_landmarks @ value


def exact_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.array([softmax([q @ k for k in key]) for q in query]) @ value


def nystrom_layer(weights: Weights, name: str, states: list, attend: Callable) -> list[np.ndarray]:
    """`s + W_o (attention + convolution of 33 over V)`, of `LN(s)`."""
    normed = [layer_norm(weights, f"{name}.norm", state) for state in states]
    query, key, value = (
        np.array([linear(weights, f"{name}.attention.{part}", x) for x in normed]) for part in ("query", "key", "value")
    )
    head_size = SIZE // NUM_HEADS
    read = np.zeros_like(query)
    for head in range(NUM_HEADS):
        rows = slice(head * head_size, (head + 1) * head_size)
        read[:, rows] = attend(query[:, rows] / math.sqrt(head_size), key[:, rows], value[:, rows])
        kernel = weights[f"{name}.attention.residual_convolution.weight"][head, 0, :, 0]
        for i in range(len(states)):
            for j in range(max(i - 16, 0), min(i + 17, len(states))):
                read[i, rows] += kernel[j - i + 16] * value[j, rows]
    return [state + linear(weights, f"{name}.attention.output", r) for state, r in zip(states, read, strict=True)]


def cells_of(num_instances: int, coords: np.ndarray | None) -> dict[tuple[int, int], int]:
    """Which instance stands at (row, column): at its coordinates, or in a square filled up with the first again."""
    if coords is not None:
        x, y = ((values - values.min()) / pitch for values, pitch in zip(coords.T, (256, 128), strict=True))
        return {(round(row), round(column)): n for n, (row, column) in enumerate(zip(y, x, strict=True))}
    side = math.ceil(math.sqrt(num_instances))
    order = [*range(num_instances), *range(side * side - num_instances)]
    return {divmod(place, side): n for place, n in enumerate(order)}


def pyramid(weights: Weights, states: list, coords: np.ndarray | None) -> list[np.ndarray]:
    """PPEG, kernel by kernel and cell by cell."""
    cells = cells_of(len(states), coords)
    encoded = [None] * len(states)
    for (row, column), n in sorted(cells.items(), reverse=True):  # the first cell of a repeated instance comes last
        encoded[n] = states[n].copy()
        for i, reach in enumerate((3, 2, 1)):
            kernel = weights[f"position_encoding.convolutions.{i}.weight"]
            encoded[n] += weights[f"position_encoding.convolutions.{i}.bias"]
            for down in range(-reach, reach + 1):
                for right in range(-reach, reach + 1):
                    neighbour = cells.get((row + down, column + right))
                    if neighbour is not None:
                        encoded[n] += kernel[:, 0, down + reach, right + reach] * states[neighbour]
    return encoded


def expected_trans_mil(
    weights: Weights, bag: np.ndarray, coords: np.ndarray | None = None, attend: Callable = nystrom
) -> np.ndarray:
    states = [weights["class_token"][0, 0], *(relu(linear(weights, "embed.0", x)) for x in bag)]
    states = nystrom_layer(weights, "layers.0", states, attend)
    states = [states[0], *pyramid(weights, states[1:], coords)]
    states = nystrom_layer(weights, "layers.1", states, attend)
    return layer_norm(weights, "norm", states[0])


def expected_vectors(kind: str, weights: Weights, bag: np.ndarray, coords: np.ndarray | None) -> np.ndarray:
    """One bag (M, D) to (1, d), or (T, d) for the Set Transformer."""
    if kind == "mean":
        vector = np.array([sum(values) / len(values) for values in bag.T])
    elif kind == "max":
        vector = np.array([max(values) for values in bag.T])
    elif kind.startswith("MI-Net"):
        vector = expected_mi_net(weights, bag, kind.split()[1])
    elif "AB-MIL" in kind:
        vector = expected_attention_mil(weights, bag)
    elif kind == "DeepSets":
        vector = expected_deep_sets(weights, bag)
    elif kind.startswith("Set"):
        return expected_set_transformer(weights, bag)
    else:
        vector = expected_trans_mil(weights, bag, coords)
    return vector[None]


def expected_prompts(kind: str, model: Aggregator, bag: np.ndarray, coords: np.ndarray | None) -> np.ndarray:
    """One bag (M, D) to prompts (T, H)."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    vectors = expected_vectors(kind, weights, bag, coords)
    if "projection.weight" in weights and kind.startswith("Set"):
        return np.array([linear(weights, "projection", vector) for vector in vectors])
    if "expand.weight" not in weights:
        return vectors
    prompts = np.zeros((NUM_PROMPTS, HIDDEN_SIZE))
    for t in range(NUM_PROMPTS):
        for h in range(HIDDEN_SIZE):
            row = t * HIDDEN_SIZE + h
            prompts[t, h] = weights["expand.weight"][row] @ vectors[0] + weights["expand.bias"][row]
    return prompts


@every_kind
@as_vector_and_as_prompts
def test_prompts_are_the_formula(kind: str, options: dict, record_property) -> None:
    model, batch = make(kind, **options).double(), as_double(make_batch(kind))
    prompts = model(**batch).embeds
    errors = []
    for i, length in enumerate(LENGTHS):
        bag = batch["image_embeds"][i, :length].flatten(0, 1).numpy()
        coords = batch["image_coords"][i, :length].numpy() if kind in SIDES else None
        expected = expected_prompts(kind, model, bag, coords)
        assert prompts[i].shape == expected.shape
        errors.append(float(np.abs(prompts[i].detach().numpy() - expected).max()))
    assert max(errors) < EXACT
    assert (prompts[0] - prompts[2]).abs().max() > 1e-3  # and they tell bags apart
    record_property(f"{kind} against numpy", max(errors))


def test_lattices_take_both_ways_through_ppeg(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for kind in SIDES:
        model, batch = make(kind), make_batch(kind, (11,))
        for name in ("convolve_square", "convolve_dense", "convolve_occupied"):
            original = getattr(model.position_encoding, name)

            def spy(*args, name: str = name, original: Callable = original) -> Tensor:
                taken.append(name)
                return original(*args)

            monkeypatch.setattr(model.position_encoding, name, spy)
        model(**batch)
    assert taken == ["convolve_dense", "convolve_occupied"]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_trans_mil_of_a_short_bag_is_exact_attention(length: int, record_property) -> None:
    """As many landmarks as tokens: all that is approximated is the inverse, which more iterations make exact."""
    model = make("TransMIL on a dense lattice", pinv_iterations=40, std=0.4).double()
    batch = as_double(make_batch("TransMIL on a dense lattice", (length,)))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    bag, coords = batch["image_embeds"][0, :, 0].numpy(), batch["image_coords"][0].numpy()
    expected = expected_trans_mil(weights, bag, coords, exact_attention)
    error = np.abs(model(**batch).embeds[0, 0].detach().numpy() - expected).max()
    assert error < 1e-8
    record_property("TransMIL of short bags against exact attention", float(error))


@pytest.mark.parametrize("kind", ["MI-Net lse"])
@pytest.mark.parametrize("scale", [-1e3, 1e3])
def test_log_sum_exp_does_not_overflow(kind: str, scale: float) -> None:
    """Of large numbers it is the largest less log M, to float32's precision."""
    model, batch = make(kind), make_batch(kind)
    batch["image_embeds"] = batch["image_embeds"].mul(scale).requires_grad_()
    z = model(**batch).embeds[:, 0]
    z.sum().backward()
    assert batch["image_embeds"].grad.isfinite().all()
    largest = make("MI-Net max")(**batch).embeds[:, 0]
    assert largest.max() > 100
    assert (z <= largest + 1e-3).all()
    shortfall = (batch["image_mask"].sum(dim=1) * NUM_TOKENS).log()[:, None]
    assert (z >= largest - shortfall - 1e-3).all()


# ── torchmil 1.0.2 ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "pool"), [("mean", MeanPool()), ("max", MaxPool())])
def test_pooling_is_torchmils(kind: str, pool: nn.Module) -> None:
    batch = make_batch(kind)
    instances, mask = batch["image_embeds"].flatten(1, 2), batch["image_mask"].bool().repeat_interleave(NUM_TOKENS, 1)
    assert torch.equal(make(kind)(**batch).embeds[:, 0], pool(instances, mask))


@pytest.mark.parametrize("kind", ["AB-MIL", "gated AB-MIL"])
def test_attention_mil_is_torchmils(kind: str, record_property) -> None:
    """Whose `w` has no bias; softmax does not see ours."""
    model, batch = make(kind), make_batch(kind)
    other = ABMIL((WIDTH,), att_dim=128, gated=model.gate is not None, feat_ext=model.embed)
    other.pool.fc1.module = model.projection
    other.pool.fc2.weight = model.score.weight
    if model.gate is not None:
        other.pool.fc_gated.module = model.gate
    instances, mask = batch["image_embeds"].flatten(1, 2), batch["image_mask"].bool().repeat_interleave(NUM_TOKENS, 1)
    z, scores = other.pool(model.embed(instances), mask, return_att=True)
    prompts = model(**batch)
    error = (prompts.embeds[:, 0] - z).abs().max().item()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=1)
    torch.testing.assert_close(prompts.weights[:, 0], weights, rtol=0, atol=TOLERANCE)
    assert error < TOLERANCE
    record_property(f"{kind} against torchmil", error)


@pytest.mark.parametrize(("num_heads", "iterations"), [(1, 6), (2, 30)])
def test_trans_mil_is_torchmils(num_heads: int, iterations: int, record_property) -> None:
    """On bags that fill a square and whose tokens divide into landmarks: 9 + 1 = 5 x 2.

    Its attention has no convolution over V and no biases but the output's, its embedding no ReLU; it scales the first
    guess of the inverse by the largest sum of all heads and bags, so that two heads agree once that has converged.
    """
    model = make("TransMIL", num_heads=num_heads, num_landmarks=5, pinv_iterations=iterations, std=0.4).double()
    other = TransMIL(
        (WIDTH,), SIZE, n_heads=num_heads, n_landmarks=5, pinv_iterations=iterations, feat_ext=model.embed.float()
    ).double()
    other.cls_token, other.norm, other.classifier = model.class_token, model.norm, nn.Identity()
    positions = other.pos_layer
    positions.proj, positions.proj1, positions.proj2 = model.position_encoding.convolutions
    with torch.no_grad():
        for theirs, ours in zip(other.layers, model.layers, strict=True):
            attention = ours.attention
            parts = (attention.query, attention.key, attention.value)
            for part in parts:
                part.bias.zero_()
            theirs.att_module.qkv_nn.weight.copy_(torch.cat([part.weight for part in parts]))
            theirs.att_module.out_proj, theirs.norm1 = attention.output, ours.norm
    embeds, _ = random_bags((9,), 1, WIDTH)
    embeds = embeds.double()
    control = (model(embeds).embeds[0, 0] - other(embeds[:, :, 0])[0]).abs().max()
    assert control > 1e-2  # the convolution over V
    for layer in model.layers:
        layer.attention.residual_convolution.weight.data.zero_()
    error = (model(embeds).embeds[0, 0] - other(embeds[:, :, 0])[0]).abs().max().item()
    assert error < (TOLERANCE if num_heads == 1 else 1e-4)
    record_property(f"TransMIL of {num_heads} heads against torchmil", error)
    longer, _ = random_bags((8,), 1, WIDTH)  # here its copies take part in attention
    assert (model(longer.double()).embeds[0, 0] - other(longer[:, :, 0].double())[0]).abs().max() > 1e-4


def test_attention_block_is_torchmils_cross_attention(record_property) -> None:
    """It has no Set Transformer; its cross-attention of one head, which has no biases, has a MAB's scale."""
    torch.manual_seed(0)
    block = AttentionBlock(WIDTH, WIDTH, SIZE, 1, layer_norm=False)
    other = MultiheadCrossAttention(WIDTH, SIZE, SIZE, n_heads=1)
    with torch.no_grad():
        for part in (block.query, block.key, block.value):
            part.bias.zero_()
        other.q_nn.weight.copy_(block.query.weight)
        other.kv_nn.weight.copy_(torch.cat([block.key.weight, block.value.weight]))
    queries, keys = torch.randn(2, 3, WIDTH), torch.randn(2, 5, WIDTH)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    states = block.query(queries) + other(queries, keys, mask)
    error = (block(queries, keys, mask) - states - block.feed_forward(states).relu()).abs().max().item()
    assert error < TOLERANCE
    record_property("MAB against torchmil's cross-attention", error)


# ── A bag has no padding and no order ───────────────────────────────────────────────────────────────────────────────


@every_kind
@as_vector_and_as_prompts
def test_padding_is_inert(kind: str, options: dict) -> None:
    """NaN there changes no prompt and reaches no gradient, of the weights or of the bag."""
    model, batch = make(kind, **options), make_batch(kind)
    real = batch["image_mask"].bool()
    results = []
    for value in (0.0, torch.nan):
        filled = {
            name: part.masked_fill(~real.reshape(*real.shape, *[1] * (part.ndim - 2)), value)
            for name, part in batch.items()
            if name != "image_mask"
        }
        filled["image_embeds"].requires_grad_()
        prompts = model(**filled, image_mask=batch["image_mask"])
        wanted = [filled["image_embeds"], *model.parameters()]
        gradients = torch.autograd.grad(prompts.embeds.pow(3).sum(), wanted)
        results.append([prompts.embeds, *gradients, *([] if prompts.weights is None else [prompts.weights])])
    for clean, dirty in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)
    bag_gradient = results[1][1]
    assert bag_gradient[real].abs().max() > 1e-3
    assert not bag_gradient[~real].any()


@every_kind
@as_vector_and_as_prompts
def test_ragged_batch_equals_bags_alone(kind: str, options: dict) -> None:
    model, batch = make(kind, **options), make_batch(kind)
    together = model(**batch)
    for i, length in enumerate(LENGTHS):
        alone = model(**bag_alone(batch, i))
        torch.testing.assert_close(together.embeds[i], alone.embeds[0], rtol=0, atol=TOLERANCE)
        if alone.weights is not None:
            num_instances = length * NUM_TOKENS
            torch.testing.assert_close(together.weights[i, :, :num_instances], alone.weights[0], rtol=0, atol=TOLERANCE)
    if kind not in SIDES:
        unmasked = model(batch["image_embeds"]).embeds
        assert (unmasked[1:] - together.embeds[1:]).abs().amax(dim=(1, 2)).max() > 1e-3  # zeros would be seen


@pytest.mark.parametrize("kind", ["mean", "AB-MIL", "gated AB-MIL"])
def test_weights_are_shares_of_what_is_real(kind: str) -> None:
    """Each prompt has those of z, and z is made with them."""
    model, batch = make(kind, **EXPANDED), make_batch(kind)
    weights = model(**batch).weights
    mask = batch["image_mask"].bool().repeat_interleave(NUM_TOKENS, dim=1)
    assert weights.shape == (len(LENGTHS), NUM_PROMPTS, mask.shape[1])
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(len(LENGTHS), NUM_PROMPTS))
    for bag_weights, real in zip(weights, mask, strict=True):
        assert (bag_weights[:, real] > 0).all()
        assert not bag_weights[:, ~real].any()
    assert torch.equal(weights, weights[:, :1].expand_as(weights))
    states = batch["image_embeds"].flatten(1, 2)
    states = states if kind == "mean" else model.embed(states)
    expected = model.as_prompts((weights[:, :1] @ states)[:, 0]).embeds
    torch.testing.assert_close(model(**batch).embeds, expected, rtol=0, atol=TOLERANCE)
    if kind != "mean":
        assert weights[0, 0, mask[0]].std() > 1e-3


@every_kind
def test_others_have_no_weights(kind: str) -> None:
    prompts = make(kind)(**make_batch(kind))
    assert (prompts.weights is None) == (kind not in ("mean", "AB-MIL", "gated AB-MIL"))


@every_kind
def test_order_does_not_matter_but_to_trans_mil(kind: str) -> None:
    """Whose landmarks and convolution follow the order even where PPEG follows coordinates."""
    model, batch = make(kind), make_batch(kind, (11,))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1)).tolist()
    prompts, shuffled = model(**batch).embeds, model(**reordered(batch, order)).embeds
    change = (shuffled - prompts).abs().max()
    if kind.startswith("TransMIL"):
        assert change > 1e-3
        return
    assert change < TOLERANCE
    tokens = batch["image_embeds"].flatten(1, 2)[:, torch.randperm(22, generator=torch.Generator().manual_seed(2))]
    torch.testing.assert_close(model(tokens[:, :, None]).embeds, prompts, rtol=0, atol=TOLERANCE)
    assert (model(batch["image_embeds"][:, :6]).embeds - prompts).abs().max() > 1e-3


def test_trans_mil_reads_cells_and_not_pixels() -> None:
    """Where the lattice starts and how wide it is changes nothing; where the images stand on it does."""
    kind = "TransMIL on a dense lattice"
    model, batch = make(kind), make_batch(kind, (11,))
    embeds, coords = model(**batch).embeds, batch["image_coords"]
    moved = batch | {"image_coords": coords * torch.tensor([2.0, 3.0]) + torch.tensor([-64.0, 4096.0])}
    assert torch.equal(model(**moved).embeds, embeds)
    for other in (coords[:, list(range(10, -1, -1))], coords.flip(2), None):
        assert (model(**batch | {"image_coords": other}).embeds - embeds).abs().max() > 1e-3


# ── The contract ────────────────────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_shapes_and_the_number_of_prompts(kind: str) -> None:
    batch = make_batch(kind)
    own_width = OWN_WIDTHS.get(kind, SIZE)
    num_vectors = NUM_PROMPTS if kind.startswith("Set") else 1
    for options, shape in [
        (EXPANDED, (NUM_PROMPTS, HIDDEN_SIZE)),
        ({}, (1, own_width)),
        ({"num_prompts": NUM_PROMPTS}, (num_vectors, own_width)),
        ({"hidden_size": HIDDEN_SIZE}, (1, HIDDEN_SIZE)),
    ]:
        model = make(kind, **options)
        prompts = model(**batch)
        assert prompts.embeds.shape == (len(LENGTHS), *shape)
        assert (model.prompts_each, model.hidden_size) == shape
        assert model.image_embeds_size == WIDTH
        assert not model.per_image
        assert prompts.mask.dtype == torch.long
        assert prompts.mask.shape == prompts.embeds.shape[:2]
        assert [model.num_prompts(length) for length in LENGTHS] == prompts.mask.sum(dim=1).tolist()


@every_kind
@as_vector_and_as_prompts
def test_keeps_bfloat16(kind: str, options: dict) -> None:
    model, batch = make(kind, **options), make_batch(kind)
    expected = model(**batch).embeds
    prompts = model.bfloat16()(**batch | {"image_embeds": batch["image_embeds"].bfloat16()})
    assert prompts.embeds.dtype == torch.bfloat16
    assert prompts.weights is None or prompts.weights.dtype == torch.bfloat16
    assert (prompts.embeds.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_defaults_are_the_papers() -> None:
    """Widths, heads, points and landmarks, counted in parameters where those tell."""

    def num_parameters(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def layers(*sizes: int) -> int:
        return sum((before + 1) * after for before, after in pairwise(sizes))

    assert num_parameters(MeanPooling(WIDTH)) == num_parameters(MaxPooling(WIDTH)) == 0
    mi_net = EmbeddingPooling(WIDTH)
    assert num_parameters(mi_net) == layers(WIDTH, 256, 128, 64)
    assert (mi_net.pooling, mi_net.dropout.p) == ("max", 0.5)
    assert num_parameters(AttentionMil(WIDTH)) == layers(WIDTH, 500, 128, 1)
    assert num_parameters(AttentionMil(WIDTH, gated=True)) == layers(WIDTH, 500, 128, 1) + layers(500, 128)
    assert num_parameters(DeepSets(WIDTH)) == layers(WIDTH, *[128] * 8)
    points, block = 32 * 128, 4 * layers(128, 128)
    first = points + 2 * block - 3 * layers(128, 128) + 3 * layers(WIDTH, 128)  # a key, a value and a query of D
    assert num_parameters(SetTransformer(WIDTH)) == first + (points + 2 * block) + 128 + block
    assert SetTransformer(WIDTH).pool.num_heads == 4
    model = TransMil(WIDTH)
    attention = 4 * layers(512, 512) + 8 * 33
    positions = 512 * (49 + 25 + 9 + 3)
    assert num_parameters(model) == layers(WIDTH, 512) + 512 + 2 * (attention + 2 * 512) + positions + 2 * 512
    config = model.layers[0].attention.config
    assert (config.num_attention_heads, config.num_landmarks, config.pinv_iterations) == (8, 256, 6)
    assert [layer.dropout.p for layer in model.layers] == [0.1, 0.1]


@every_kind
def test_dropout_is_for_training(kind: str) -> None:
    model, batch = make(kind), make_batch(kind)
    assert torch.equal(model(**batch).embeds, model(**batch).embeds)
    torch.manual_seed(0)
    model.train()
    drops = kind.startswith(("MI-Net", "TransMIL"))
    assert torch.equal(model(**batch).embeds, model(**batch).embeds) != drops


UNSEEN = ("key.bias", "score.bias")
"""What adds the same to every score of a softmax."""


@every_kind
@as_vector_and_as_prompts
def test_every_parameter_gets_a_gradient(kind: str, options: dict) -> None:
    model, batch = make(kind, **options).double().train(), as_double(make_batch(kind))
    if kind in ("mean", "max") and not options:
        assert not list(model.parameters())
        return
    torch.manual_seed(0)
    model(**batch).embeds.pow(3).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith(UNSEEN):
            assert parameter.grad.abs().max() < 1e-10, name
        else:
            assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize(
    ("kind", "drawn"),
    [
        ("Set Transformer", {"": ["seeds"], "encoder.0": ["points"], "encoder.1": ["points"]}),
        ("TransMIL", {"": ["class_token"]}),
    ],
)
def test_own_parameters_are_drawn_again(kind: str, drawn: dict[str, list[str]]) -> None:
    """By the module that holds them, and nothing else with them; no other of our modules has any."""
    model = make(kind)
    own = {
        place: [name for name, _ in module.named_parameters(recurse=False)]
        for place, module in model.named_modules()
        if type(module).__module__.startswith("mivpg.")
    }
    assert {place: names for place, names in own.items() if names} == drawn
    for place, names in drawn.items():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(3)
        model.get_submodule(place).reset_parameters()
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert changed == [f"{place}.{name}".lstrip(".") for name in names]


@pytest.mark.parametrize("again", [False, True], ids=["constructed", "reset"])
def test_own_parameters_start_as_the_authors_have_them(again: bool) -> None:
    """Class token N(0, 1); seeds and points by Xavier over (1, n, d), whose fans are n d and d."""
    torch.manual_seed(0)
    model = TransMil(WIDTH, size=2000, num_landmarks=2)
    points = SetTransformer(WIDTH, num_prompts=60, size=32, num_points=90)
    if again:
        for module in (model, points, *points.encoder):
            for parameter in module.parameters(recurse=False):
                parameter.data.zero_()
            module.reset_parameters()
    assert abs(model.class_token.mean().item()) < 0.1
    assert abs(model.class_token.std().item() - 1) < 0.1
    for parameter in (points.seeds, *(block.points for block in points.encoder)):
        bound = math.sqrt(6 / (32 * (parameter.shape[1] + 1)))
        assert 0.98 * bound < parameter.abs().max() <= bound
        assert abs(parameter.std().item() / (bound / math.sqrt(3)) - 1) < 0.1


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: EmbeddingPooling(4, pooling="sum"), "pooling is 'sum', expected one of max, mean, lse"),
        (lambda: EmbeddingPooling(4, layer_sizes=(8, 0, 4)), r"layer.sizes? (are|is) [\[(]8, 0, 4[\])], expected"),
        (lambda: DeepSets(4, layer_size=0), r"layer.sizes? (are|is) .*0.*, expected"),
        (lambda: SetTransformer(4, size=10, num_heads=4), "size is 10, expected a multiple of num_heads, 4"),
        (lambda: TransMil(4, size=10, num_heads=4), "size is 10, expected a multiple of num_heads, 4"),
    ],
)
def test_wrong_options(make_wrong: Callable, message: str) -> None:
    with pytest.raises(MivpgError, match=message):
        make_wrong()


@pytest.mark.parametrize(
    ("coords", "num_tokens", "message"),
    [
        ([(0, 0), (1, 0), (0, 1)], 2, "image_coords are of images, and these have 2 tokens each"),
        ([(0, 0), (1, 0), (2.5, 1)], 1, "image_coords are no regular lattice on the x axis"),
        ([(0, 0), (1, 0), (1, 0)], 1, "Two images of a bag stand at the same image_coords"),
        ([(0, 0), (1, 0), (0, math.nan)], 1, "image_coords hold NaN or infinity"),
    ],
)
def test_wrong_coordinates(coords: list, num_tokens: int, message: str) -> None:
    embeds, mask = random_bags((3,), num_tokens, WIDTH)
    with pytest.raises(MivpgError, match=message):
        make("TransMIL")(embeds, mask, torch.tensor([coords]))


WRONG_OPTIONS = {
    "layer_sizes": [
        lambda: EmbeddingPooling(4, layer_sizes=()),
        lambda: EmbeddingPooling(4, layer_sizes=(8, 0)),
        lambda: EmbeddingPooling(4, layer_sizes=256),
        lambda: EmbeddingPooling(4, layer_sizes=[256, 2.5]),
        lambda: EmbeddingPooling(4, layer_sizes="256"),
    ],
    "layer_size": [lambda: DeepSets(4, layer_size=0)],
    "embed_size": [lambda: AttentionMil(4, embed_size=0)],
    "size": [lambda: SetTransformer(4, size=0), lambda: TransMil(4, size=0)],
    "num_heads": [lambda: SetTransformer(4, num_heads=0), lambda: TransMil(4, num_heads=0)],
    "num_points": [lambda: SetTransformer(4, num_points=0)],
    "num_landmarks": [lambda: TransMil(4, size=8, num_landmarks=0)],
    "pinv_iterations": [lambda: TransMil(4, size=8, pinv_iterations=0)],
    "dropout": [lambda: EmbeddingPooling(4, dropout=1.5), lambda: TransMil(4, size=8, dropout=1.5)],
    "num_prompts": [lambda: MeanPooling(4, num_prompts=0, hidden_size=3), lambda: SetTransformer(4, num_prompts=0)],
    "hidden_size": [lambda: MeanPooling(4, hidden_size=0), lambda: SetTransformer(4, hidden_size=0)],
}


@pytest.mark.parametrize(
    ("field", "make_wrong"), [(field, wrong) for field, wrongs in WRONG_OPTIONS.items() for wrong in wrongs]
)
def test_wrong_options_are_named(field: str, make_wrong: Callable) -> None:
    with pytest.raises(MivpgError, match=rf"\b{field} (is|are|has|holds?) .*, expected"):
        make_wrong()


# ── It learns ───────────────────────────────────────────────────────────────────────────────────────────────────────


def labelled_batch(kind: str, num_bags: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Ragged bags; a bag is positive if one of its images carries the signal, in its first number."""
    generator = torch.Generator().manual_seed(seed)
    lengths = tuple(torch.randint(3, 8, (num_bags,), generator=generator).tolist())
    batch = make_batch(kind, lengths, seed)
    batch["image_embeds"] *= 0.5
    labels = torch.arange(num_bags) % 2
    place = torch.tensor([int(torch.randint(length, (1,), generator=generator)) for length in lengths])
    batch["image_embeds"][torch.arange(num_bags), place, :, 0] += 4.0 * labels[:, None]
    return batch, labels.float()


LIKE_OTHERS = {"MI-Net mean", "MI-Net lse", "gated AB-MIL", "Set Transformer, normed", "TransMIL on a dense lattice"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow if kind in LIKE_OTHERS else ())
        for kind in KINDS
        if kind != "TransMIL on a sparse lattice"
    ],
)
def test_a_toy_problem_is_learnt(kind: str, record_property) -> None:
    """By a linear head, on bags that were not seen; guessing is 0.69. A sparse lattice is slow, and learns alike."""
    torch.manual_seed(0)
    model = KINDS[kind](WIDTH).train()
    head = nn.Linear(model.hidden_size, 1)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=2e-2)
    if not list(model.parameters()):
        optimizer = torch.optim.Adam(head.parameters(), lr=2e-1)
    for step in range(30 if kind.startswith("TransMIL") else 80):
        batch, labels = labelled_batch(kind, 12, seed=step)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(head(model(**batch).embeds[:, 0])[:, 0], labels).backward()
        optimizer.step()
    batch, labels = labelled_batch(kind, 100, seed=1000)
    with torch.no_grad():
        logits = head(model.eval()(**batch).embeds[:, 0])[:, 0]
    loss = F.binary_cross_entropy_with_logits(logits, labels).item()
    record_property(f"{kind}: loss on the toy problem", loss)
    assert loss < 0.25
