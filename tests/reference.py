"""The method a second time, from the paper and not from `mivpg`: one bag, one instance, one head at a time, in float64.

Only real instances ever enter, so there is no mask and no padding here: a bag is a list of images of its own length.
Numpy multiplies a matrix with one vector; everything above that is a loop. `test_equations.py` compares it with the
model.

    prompts = reference_prompts(weights, Setting("abmil", "csa", "ppeg"), image_embeds, image_mask)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, erf, exp, sqrt, tanh
from typing import Any

import numpy as np

# B bags, N images, P patches, M instances, D vision width, R queries, H Q-Former width, A heads, h = H/A head width
Array = np.ndarray[Any, np.dtype[np.float64]]
Cell = tuple[int, int]


@dataclass(frozen=True)
class Setting:
    """What of MIVPG is on, and the sizes that the weights do not tell."""

    patch_pooling: str
    instance_correlation: str
    position_encoding: str
    num_layers: int = 5
    cross_attention_frequency: int = 2
    num_heads: int = 4
    num_prefix_tokens: int = 1
    num_landmarks: int = 4
    pinv_iterations: int = 6
    layer_norm_eps: float = 1e-12


class Weights:
    """A state dict in float64 that remembers which of its entries have been read."""

    def __init__(self, state_dict: Mapping[str, Any]):
        self.arrays = {name: np.asarray(value, dtype=np.float64) for name, value in state_dict.items()}
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        self.read.add(name)
        return self.arrays[name]


def linear(weights: Weights, name: str, rows: Array, bias: bool = True) -> Array:
    """Applies the layer `name` to each of (n, in) `rows`: (n, out)."""
    result = np.stack([weights[f"{name}.weight"] @ row for row in rows])
    return result + weights[f"{name}.bias"] if bias else result


def layer_norm(weights: Weights, name: str, rows: Array, eps: float) -> Array:
    """Rows (n, width), each with its own mean and variance."""
    normed = []
    for row in rows:
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        normed.append((row - mean) / sqrt(variance + eps))
    return np.stack(normed) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def softmax(scores: Iterable[float]) -> Array:
    """Weights that sum to one; the largest score is taken off first, which changes nothing but the range."""
    scores = list(scores)
    largest = max(scores)
    powers = [exp(score - largest) for score in scores]
    total = sum(powers)
    return np.array([power / total for power in powers])


def attention(queries: Array, keys: Array, values: Array, num_heads: int) -> Array:
    """Eq. 1, its heads side by side: queries (n, H), keys and values (k, H) -> (n, H)."""
    width = queries.shape[1] // num_heads
    result = np.zeros_like(queries)
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        for i, query in enumerate(queries):
            alphas = softmax(query[part] @ key[part] / sqrt(width) for key in keys)
            for alpha, value in zip(alphas, values, strict=True):
                result[i, part] += alpha * value[part]
    return result


# --- Eq. 3 and 4: an image's patches become one instance -------------------------------------------------------------


def attention_pooling(weights: Weights, name: str, patches: Array, gated: bool) -> Array:
    """AB-MIL over the patches (P, D) of one image: (D,). The gate is a sigmoid beside the tanh."""
    scores = []
    for patch in patches:
        hidden = np.array([tanh(value) for value in weights[f"{name}.projection.weight"] @ patch])
        if gated:
            hidden *= [1 / (1 + exp(-value)) for value in weights[f"{name}.gate.weight"] @ patch]
        scores.append(float(weights[f"{name}.score.weight"][0] @ hidden))
    pooled = np.zeros(patches.shape[1])
    for alpha, patch in zip(softmax(scores), patches, strict=True):
        pooled += alpha * patch
    return pooled


def pool(weights: Weights, patches: Array, patch_pooling: str) -> Array:
    """Patches (P, D) of one image -> its instances: (P, D) for `none`, else (1, D)."""
    match patch_pooling:
        case "none":
            return patches
        case "cls":
            return patches[:1]
        case "mean":
            return sum(patches)[None] / len(patches)
        case "max":
            return np.array([[max(channel) for channel in patches.T]])
        case "abmil" | "gated_abmil":
            return attention_pooling(weights, "patch_pooling", patches, gated=patch_pooling == "gated_abmil")[None]
    raise ValueError(patch_pooling)


# --- PPEG: a grid is a dictionary from (row, column) to the vector that stands there ---------------------------------


def pyramid(weights: Weights, name: str, grid: Mapping[Cell, Array], cell: Cell) -> Array:
    """The sum of the three depthwise convolutions at one cell: (D,). A cell that is not in the grid counts as zero."""
    total = np.zeros_like(grid[cell])
    for index, size in enumerate((7, 5, 3)):
        kernel = weights[f"{name}.convolutions.{index}.weight"]  # (D, 1, size, size)
        total += weights[f"{name}.convolutions.{index}.bias"]
        for row in range(size):
            for column in range(size):
                neighbour = (cell[0] + row - size // 2, cell[1] + column - size // 2)
                if neighbour in grid:
                    total += kernel[:, 0, row, column] * grid[neighbour]
    return total


def ppeg_on_square(weights: Weights, name: str, instances: Array) -> Array:
    """TransMIL's square: instances (M, D) row by row, what is missing filled with the first ones again."""
    side = ceil(sqrt(len(instances)))
    grid = {(i // side, i % side): instances[i % len(instances)] for i in range(side * side)}
    return np.stack([x + pyramid(weights, name, grid, (i // side, i % side)) for i, x in enumerate(instances)])


def lattice(coordinates: Array) -> list[Cell]:
    """Coordinates (M, 2) as (x, y) -> cells (row, column), a step being the smallest gap along each axis."""
    axes = []
    for axis in coordinates.T:
        gaps = [abs(a - b) for a in axis for b in axis if a != b]
        pitch = min(gaps, default=1.0)
        axes.append([round((value - min(axis)) / pitch) for value in axis])
    return list(zip(axes[1], axes[0], strict=True))


def ppeg_on_coordinates(weights: Weights, name: str, instances: Array, coordinates: Array) -> Array:
    """Instances (M, D) where they truly stand, (M, 2); where no instance stands is zero."""
    cells = lattice(coordinates)
    grid = dict(zip(cells, instances, strict=True))
    return np.stack([x + pyramid(weights, name, grid, cell) for cell, x in zip(cells, instances, strict=True)])


def ppeg_on_patches(weights: Weights, name: str, instances: Array, num_patches: int, num_prefix: int) -> Array:
    """Instances (N*P, D), a square grid an image; its `num_prefix` first tokens (CLS) pass around."""
    side = round(sqrt(num_patches - num_prefix))
    result = instances.copy()
    for start in range(0, len(instances), num_patches):
        patches = range(start + num_prefix, start + num_patches)
        grid = {divmod(i, side): instances[patch] for i, patch in enumerate(patches)}
        for i, patch in enumerate(patches):
            result[patch] += pyramid(weights, name, grid, divmod(i, side))
    return result


# --- Instance correlation: every one is x + W_o Attention(...) -------------------------------------------------------


def correlated_self_attention(weights: Weights, name: str, instances: Array, queries: Array, num_heads: int) -> Array:
    """Eq. 9: instances (M, D) attend to the queries (R, H) -> (M, D)."""
    attended = attention(
        linear(weights, f"{name}.query", instances),
        linear(weights, f"{name}.key", queries),
        linear(weights, f"{name}.value", queries),
        num_heads,
    )
    return instances + linear(weights, f"{name}.output", attended)


def self_attention(weights: Weights, name: str, instances: Array, num_heads: int) -> Array:
    """Attention(Q=B, K=B, V=B) of section 3.4: (M, D) -> (M, D). Eq. 9 with the instances in the place of q."""
    return correlated_self_attention(weights, name, instances, instances, num_heads)


def induced_attention(weights: Weights, name: str, instances: Array, num_heads: int) -> Array:
    """Eq. 7 makes L' of the inducing points L, Eq. 8 lets the instances attend to it: (M, D) -> (M, D)."""
    low_rank = attention(
        linear(weights, f"{name}.induce.query", weights[f"{name}.inducing_points"][0]),
        linear(weights, f"{name}.induce.key", instances),
        linear(weights, f"{name}.induce.value", instances),
        num_heads,
    )
    return correlated_self_attention(weights, name, instances, low_rank, num_heads)


def landmarks(rows: Array, num_landmarks: int) -> Array:
    """Means of segments of ceil(M / m) consecutive rows; the first segment is the shorter one: (M, h) -> (<= m, h)."""
    length = ceil(len(rows) / num_landmarks)
    ends = range(len(rows), 0, -length)
    return np.stack([rows[max(end - length, 0) : end].mean(axis=0) for end in reversed(ends)])


def pseudo_inverse(matrix: Array, iterations: int) -> Array:
    """Z <- 0.25 Z (13 I - A Z (15 I - A Z (7 I - A Z))), from A^T / (largest column sum * largest row sum)."""
    identity = np.eye(len(matrix))
    inverse = matrix.T / (max(np.abs(matrix).sum(axis=0)) * max(np.abs(matrix).sum(axis=1)))
    for _ in range(iterations):
        product = matrix @ inverse
        inner = 7 * identity - product
        inner = 15 * identity - product @ inner
        inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return inverse


def nystrom_attention(
    weights: Weights, name: str, instances: Array, num_heads: int, num_landmarks: int, pinv_iterations: int
) -> Array:
    """TransMIL's softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V, and a convolution of V: (M, D) -> (M, D)."""
    all_queries, all_keys, all_values = (
        linear(weights, f"{name}.{part}", instances) for part in ("query", "key", "value")
    )
    width = all_queries.shape[1] // num_heads
    result = np.zeros_like(all_queries)
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        queries, keys, values = all_queries[:, part] / sqrt(width), all_keys[:, part], all_values[:, part]
        query_marks, key_marks = landmarks(queries, num_landmarks), landmarks(keys, num_landmarks)
        to_marks = np.stack([softmax(key_marks @ query) for query in queries])  # (M, m)
        among_marks = np.stack([softmax(key_marks @ mark) for mark in query_marks])  # (m, m)
        from_marks = np.stack([softmax(keys @ mark) for mark in query_marks])  # (m, M)
        result[:, part] = to_marks @ pseudo_inverse(among_marks, pinv_iterations) @ (from_marks @ values)

        kernel = weights[f"{name}.residual_convolution.weight"][head, 0, :, 0]  # (33,)
        for i in range(len(values)):
            for offset, weight in enumerate(kernel):
                j = i + offset - len(kernel) // 2
                if 0 <= j < len(values):
                    result[i, part] += weight * values[j]
    return instances + linear(weights, f"{name}.output", result)


# --- The whole path --------------------------------------------------------------------------------------------------


def qformer_attention(weights: Weights, name: str, queries: Array, context: Array, setting: Setting) -> Array:
    """BLIP-2's attention with residual and LayerNorm behind it: queries (R, H), context (n, H or D) -> (R, H)."""
    attended = attention(
        linear(weights, f"{name}.attention.query", queries),
        linear(weights, f"{name}.attention.key", context),
        linear(weights, f"{name}.attention.value", context),
        setting.num_heads,
    )
    attended = linear(weights, f"{name}.output.dense", attended)
    return layer_norm(weights, f"{name}.output.LayerNorm", queries + attended, setting.layer_norm_eps)


def feed_forward(weights: Weights, name: str, queries: Array, setting: Setting) -> Array:
    """BLIP-2's feed-forward of the queries, with the exact gelu: (R, H) -> (R, H)."""
    hidden = linear(weights, f"{name}.intermediate_query.dense", queries)
    hidden = np.array([[0.5 * value * (1 + erf(value / sqrt(2))) for value in row] for row in hidden])
    hidden = linear(weights, f"{name}.output_query.dense", hidden)
    return layer_norm(weights, f"{name}.output_query.LayerNorm", queries + hidden, setting.layer_norm_eps)


def reference_instances(weights: Weights, setting: Setting, images: Array) -> Array:
    """Images (N, P, D) of one bag -> instances (M, D)."""
    return np.concatenate([pool(weights, patches, setting.patch_pooling) for patches in images])


def reference_bag(weights: Weights, setting: Setting, images: Array, coordinates: Array | None) -> Array:
    """Images (N, P, D) of one bag, all real, and their coordinates (N, 2) as (x, y) -> visual prompts (R, H)."""
    instances = reference_instances(weights, setting, images)
    learned = layer_norm(weights, "qformer.layernorm", weights["query_tokens"][0], setting.layer_norm_eps)
    queries = learned
    for layer in range(setting.num_layers):
        block = f"qformer.encoder.layer.{layer}"
        has_cross_attention = layer % setting.cross_attention_frequency == 0
        if has_cross_attention:
            instances = encode_positions(weights, f"{block}.position_encoding", setting, images, instances, coordinates)
            instances = correlate(weights, f"{block}.instance_correlation", setting, instances, queries, learned)
        queries = qformer_attention(weights, f"{block}.attention", queries, queries, setting)
        if has_cross_attention:
            queries = qformer_attention(weights, f"{block}.crossattention", queries, instances, setting)
        queries = feed_forward(weights, block, queries, setting)
    return queries


def encode_positions(
    weights: Weights, name: str, setting: Setting, images: Array, instances: Array, coordinates: Array | None
) -> Array:
    """x + PPEG(x) on the grid that the bag has: patches of an image, coordinates of the images, or a square."""
    if setting.position_encoding == "none":
        return instances
    num_patches = images.shape[1]
    if setting.patch_pooling == "none" and num_patches > 1:
        return ppeg_on_patches(weights, name, instances, num_patches, setting.num_prefix_tokens)
    if coordinates is not None:
        return ppeg_on_coordinates(weights, name, instances, coordinates)
    return ppeg_on_square(weights, name, instances)


def correlate(weights: Weights, name: str, setting: Setting, instances: Array, queries: Array, learned: Array) -> Array:
    """x + W_o Attention(...) with the block's input queries (R, H), or the learned ones (R, H) for the control."""
    match setting.instance_correlation:
        case "none":
            return instances
        case "csa":
            return correlated_self_attention(weights, name, instances, queries, setting.num_heads)
        case "csa_constant":
            return correlated_self_attention(weights, name, instances, learned, setting.num_heads)
        case "self_attention":
            return self_attention(weights, name, instances, setting.num_heads)
        case "induced":
            return induced_attention(weights, name, instances, setting.num_heads)
        case "nystrom":
            return nystrom_attention(
                weights, name, instances, setting.num_heads, setting.num_landmarks, setting.pinv_iterations
            )
    raise ValueError(setting.instance_correlation)


def reference_prompts(
    weights: Weights, setting: Setting, image_embeds: Array, image_mask: Array, image_coords: Array | None = None
) -> Array:
    """Bags (B, N, P, D), mask (B, N) with 1 = real, coordinates (B, N, 2) as (x, y) -> visual prompts (B, R, H)."""
    prompts = []
    for bag, mask in enumerate(image_mask):
        real = np.flatnonzero(mask)
        coordinates = None if image_coords is None else image_coords[bag][real]
        prompts.append(reference_bag(weights, setting, image_embeds[bag][real], coordinates))
    return np.stack(prompts)
