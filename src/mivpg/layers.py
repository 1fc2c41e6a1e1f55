"""The parts that turn tokens into instances and let instances see where they stand and each other.

AB-MIL over an image's patches (Eq. 3 and 4), PPEG (TransMIL) and what correlates instances: CSA (Eq. 9), its control,
and what the paper compares it with. `modeling_mivpg.py` puts them together, `aggregators` take some of them, too.

B bags, N images a bag, P tokens an image, D vision width, M instances a bag, R queries, H Q-Former width, A attention
heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import eager_attention_forward

from mivpg import folded_attention
from mivpg.configuration_mivpg import MivpgQFormerConfig
from mivpg.errors import BagError, MivpgError

ABMIL_HIDDEN_SIZE = 128
"""L of Eq. 4."""


def starting_at_zero(module: nn.Module, zero: bool = True) -> nn.Module:
    """Marks a layer that `_init_weights` sets to zero, so that what it belongs to starts as the identity.

    Args:
        module: The layer.
        zero: False: it starts as other layers do, from N(0, `initializer_range`).
    """
    module.starts_at_zero = zero
    return module


# ── One instance an image: multiple instance learning over its patches (section 3.3) ────────────────────────────────


class AttentionPooling(nn.Module):
    """AB-MIL (Eq. 3 and 4): an image is the weighted mean of its tokens, the weights come from a small network.

    `alpha = softmax(w^T tanh(u x))`, gated: `alpha = softmax(w^T (tanh(u x) * sigmoid(v x)))` (Ilse et al. 2018).
    Eq. 4 has no biases. `w` starts at zero, so that the pooling starts as the mean. The paper does not say whether
    CLS takes part; by default all P tokens do.

    Args:
        size: D.
        gated: Whether there is a gate `v`.
        num_left_out: Tokens before the patches (CLS) that get no weight.
    """

    def __init__(self, size: int, *, gated: bool, num_left_out: int = 0):
        super().__init__()
        self.num_left_out = num_left_out
        self.projection = nn.Linear(size, ABMIL_HIDDEN_SIZE, bias=False)  # u
        self.gate = nn.Linear(size, ABMIL_HIDDEN_SIZE, bias=False) if gated else None  # v
        self.score = starting_at_zero(nn.Linear(ABMIL_HIDDEN_SIZE, 1, bias=False))  # w

    def attention_weights(self, tokens: Tensor) -> Tensor:
        """The weight of each token of each image: (n, P, D) -> (n, P), each row sums to one; zero where left out.

        Raises:
            MivpgError: An image has no token beside those that are left out.
        """
        if tokens.shape[1] <= self.num_left_out:
            raise MivpgError(
                f"Images have {tokens.shape[1]} tokens, and AB-MIL leaves out the first {self.num_left_out} "
                "(pool_include_prefix is False, num_prefix_tokens says how many): no patch is left to pool. Pass all "
                "tokens of the vision model, or take pool_include_prefix=True."
            )
        patches = tokens[:, self.num_left_out :]
        hidden = torch.tanh(self.projection(patches))  # (n, P, L)
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(patches))
        weights = self.score(hidden).squeeze(-1).softmax(dim=-1)
        return F.pad(weights, (self.num_left_out, 0))

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, P, D) -> (n, D)."""
        return torch.einsum("np,npd->nd", self.attention_weights(tokens), tokens)


# ── Where instances stand: the pyramid position encoding of TransMIL ────────────────────────────────────────────────


@dataclass
class PatchGrid:
    """Every image of a bag is a square grid of its own."""

    num_images: int
    """N."""
    num_prefix_tokens: int
    """Tokens of an image that stand nowhere (CLS)."""
    side: int


@dataclass
class BagGrid:
    """A bag is one grid, whose cells are its images."""

    lengths: list[int]
    """Real images of each bag."""
    cells: list[Tensor] | None
    """Row and column (n, 2) of each image of each bag; None = not known, the images fill a square row by row."""


class PyramidPositionEncoding(nn.Module):
    """PPEG (TransMIL, Shao et al. 2021): depthwise convolutions over the grid of the instances, `x <- x + PPEG(x)`.

    TransMIL writes `x + conv7(x) + conv5(x) + conv3(x)`; here the identity stands outside and, by default, the kernels
    and biases start at zero, so that an untrained PPEG does nothing. The three kernels are summed to one 7x7 when they
    are run.
    An image's prefix tokens (CLS) pass around. A bag without coordinates is laid out as TransMIL does: row by row in a
    square whose last cells repeat the first instances. That depends on the order and the length of the bag, so bags
    are encoded one by one, and a shuffled bag gives other prompts.

    Args:
        size: D.
        zero_init: Whether the kernels start at zero.
    """

    def __init__(self, size: int, *, zero_init: bool = True):
        super().__init__()
        self.convolutions = nn.ModuleList(
            starting_at_zero(nn.Conv2d(size, size, kernel_size, padding=kernel_size // 2, groups=size), zero_init)
            for kernel_size in (7, 5, 3)
        )

    def merged_kernel(self) -> tuple[Tensor, Tensor]:
        """Weight (D, 1, 7, 7) and bias (D,) of the one convolution that equals the sum of the three."""
        weight = sum(F.pad(conv.weight, [(7 - conv.kernel_size[0]) // 2] * 4) for conv in self.convolutions)
        return weight, sum(conv.bias for conv in self.convolutions)

    def forward(self, instances: Tensor, grid: PatchGrid | BagGrid) -> Tensor:
        """(B, M, D) -> (B, M, D); padding stays as it is."""
        if isinstance(grid, PatchGrid):
            return self.encode_images(instances, grid)
        kernel = self.merged_kernel()
        encoded = []
        for i, (bag, length) in enumerate(zip(instances, grid.lengths, strict=True)):
            real, padding = bag[:length], bag[length:]
            if grid.cells is None:
                added = self.convolve_square(real, *kernel)
            elif int(grid.cells[i].max(dim=0).values.add(1).prod()) <= 4 * length:
                added = self.convolve_dense(real, grid.cells[i], *kernel)
            else:
                added = self.convolve_occupied(real, grid.cells[i], *kernel)
            encoded.append(torch.cat([real + added, padding]))
        return torch.stack(encoded)

    def encode_images(self, instances: Tensor, grid: PatchGrid) -> Tensor:
        """Each image's patches on the image's own grid; all images at once, padded ones too (nobody reads those)."""
        batch_size, _, size = instances.shape
        tokens = instances.reshape(batch_size * grid.num_images, -1, size)
        prefix, patches = tokens[:, : grid.num_prefix_tokens], tokens[:, grid.num_prefix_tokens :]
        canvas = patches.transpose(1, 2).unflatten(2, (grid.side, grid.side))  # (B*N, D, side, side)
        added = self.convolve(canvas, *self.merged_kernel()).flatten(2).transpose(1, 2)
        return torch.cat([prefix, patches + added], dim=1).reshape(instances.shape)

    @staticmethod
    def convolve(canvas: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The depthwise 7x7 convolution of (n, D, rows, columns)."""
        return F.conv2d(canvas, weight, bias, padding=3, groups=canvas.shape[1])

    def convolve_square(self, bag: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """TransMIL's square of a bag (n, D): side ceil(sqrt(n)), filled up with the first instances again."""
        length, size = bag.shape
        side = math.isqrt(length - 1) + 1
        canvas = torch.cat([bag, bag[: side * side - length]]).T.reshape(1, size, side, side)
        return self.convolve(canvas, weight, bias)[0].flatten(1).T[:length]

    def convolve_dense(self, bag: Tensor, cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A bag (n, D) at true cells (n, 2) of a grid of which it fills at least a quarter; empty cells are zero."""
        rows, columns = (cells.max(dim=0).values + 1).tolist()
        flat = cells[:, 0] * columns + cells[:, 1]
        canvas = bag.new_zeros(rows * columns, bag.shape[1]).index_copy(0, flat, bag)
        canvas = canvas.T.reshape(1, bag.shape[1], rows, columns)
        return self.convolve(canvas, weight, bias)[0].flatten(1).T[flat]

    def convolve_occupied(self, bag: Tensor, cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The same for a sparse grid, at the cost of the occupied cells alone: 49 shifts, each a lookup and a sum."""
        width = int(cells[:, 1].max()) + 7  # room for 3 columns on either side, so that no shift wraps around
        keys, order = torch.sort(cells[:, 0] * width + cells[:, 1])
        out = bias.expand_as(bag)
        for row in range(7):
            for column in range(7):
                wanted = cells[:, 0] * width + cells[:, 1] + (row - 3) * width + (column - 3)
                place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
                found = keys[place] == wanted
                out = out.index_add(0, found.nonzero()[:, 0], bag[order[place[found]]] * weight[:, 0, row, column])
        return out


# ── How instances see each other (section 3.4) ──────────────────────────────────────────────────────────────────────


class InstanceCorrelation(nn.Module):
    """What the ways to correlate instances share: `x <- x + W_o Attention(Q, K, V)`.

    The paper gives neither widths nor residual nor normalisation. Instances keep their width D, so that pretrained
    cross-attention weights stay valid; `W_o` starts at zero, so that an untrained module changes nothing, unless
    `zero_init_residual` is False; and queries are read from the instances as they are, which have left the vision model
    through its last LayerNorm.
    """

    def __init__(self, config: MivpgQFormerConfig, key_size: int):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.query = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        self.key = nn.Linear(key_size, config.hidden_size)
        self.value = nn.Linear(key_size, config.hidden_size)
        output = nn.Linear(config.hidden_size, config.encoder_hidden_size)
        self.output = starting_at_zero(output, config.zero_init_residual)  # W_o

    def heads(self, states: Tensor) -> Tensor:
        """(B, L, H) -> (B, A, L, H/A)."""
        return states.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of Eq. 1, head by head, over projected states (B, L, H); `mask` is what transformers' masks are."""
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        states, _ = attention(
            self,
            self.heads(query),
            self.heads(key),
            self.heads(value),
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return states.flatten(2)  # (B, L, H)

    def bag_mask(self, queries: Tensor, instances: Tensor, instance_mask: Tensor | None) -> Tensor | None:
        """Keeps `queries` (B, L, ·) from padded instances; None where none is padded."""
        if instance_mask is None:
            return None
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=queries,
            attention_mask=instance_mask,
            encoder_hidden_states=instances,
        )


class CorrelatedSelfAttention(InstanceCorrelation):
    """CSA (Eq. 9): instances ask the queries of the block's input, which have read the whole bag. O(R M).

    In the first block these are the learned queries alone, the same for every bag: correlation starts at the second
    block with cross-attention.
    """

    def __init__(self, config: MivpgQFormerConfig):
        super().__init__(config, key_size=config.hidden_size)

    def forward(
        self, instances: Tensor, instance_mask: Tensor | None, queries: Tensor, learned_queries: Tensor
    ) -> Tensor:
        """Instances (B, M, D), queries (B, R, H) -> instances (B, M, D)."""
        key, value = self.key(queries), self.value(queries)
        if not folded_attention.pays(instances, queries.shape[1], self.query, self.num_attention_heads):
            return instances + self.output(self.attend(self.query(instances), key, value))
        return folded_attention.instances_ask(
            instances,
            self.heads(key),
            self.heads(value),
            self.query,
            self.output,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
        )


class ConstantCorrelatedSelfAttention(CorrelatedSelfAttention):
    """The control for CSA: its parameters, but keys and values are the learned queries in every block."""

    def forward(
        self, instances: Tensor, instance_mask: Tensor | None, queries: Tensor, learned_queries: Tensor
    ) -> Tensor:
        """As CSA, from `learned_queries` (B, R, H): nothing flows between instances."""
        return super().forward(instances, instance_mask, learned_queries, learned_queries)


class FullSelfAttention(InstanceCorrelation):
    """The "SA" of Table 3: every instance asks every other. O(M^2)."""

    def __init__(self, config: MivpgQFormerConfig):
        super().__init__(config, key_size=config.encoder_hidden_size)

    def forward(
        self, instances: Tensor, instance_mask: Tensor | None, queries: Tensor, learned_queries: Tensor
    ) -> Tensor:
        """Instances (B, M, D) -> (B, M, D); the queries are not read."""
        mask = self.bag_mask(instances, instances, instance_mask)
        states = self.attend(self.query(instances), self.key(instances), self.value(instances), mask)
        return instances + self.output(states)


class InducedSelfAttention(InstanceCorrelation):
    """Low-rank self-attention through learned points (Eq. 7 and 8; Set Transformer's ISAB). O(M' M)."""

    def __init__(self, config: MivpgQFormerConfig):
        super().__init__(config, key_size=config.hidden_size)
        self.inducing_points = nn.Parameter(torch.empty(1, config.num_inducing_points, config.hidden_size))  # L
        self.induce = nn.ModuleDict(
            {
                "query": nn.Linear(config.hidden_size, config.hidden_size),
                "key": nn.Linear(config.encoder_hidden_size, config.hidden_size),
                "value": nn.Linear(config.encoder_hidden_size, config.hidden_size),
            }
        )

    def forward(
        self, instances: Tensor, instance_mask: Tensor | None, queries: Tensor, learned_queries: Tensor
    ) -> Tensor:
        """Instances (B, M, D) -> (B, M, D); the queries are not read."""
        points = self.inducing_points.expand(len(instances), -1, -1).to(instances.dtype)  # (B, M', H)
        induced = self.attend(  # Eq. 7
            self.induce["query"](points),
            self.induce["key"](instances),
            self.induce["value"](instances),
            self.bag_mask(points, instances, instance_mask),
        )
        states = self.attend(self.query(instances), self.key(induced), self.value(induced))  # Eq. 8
        return instances + self.output(states)


class NystromSelfAttention(InstanceCorrelation):
    """Self-attention by the Nyström approximation (Xiong et al. 2021), with TransMIL's convolution over V.

    Landmarks are the means of consecutive instances, so the result depends on the bag's order and length: bags are
    run one by one, never padded. Where the bag does not divide evenly, the first segment is the shorter one; TransMIL
    counts the zeros of its padding there, which we do not.
    """

    def __init__(self, config: MivpgQFormerConfig):
        super().__init__(config, key_size=config.encoder_hidden_size)
        heads = config.num_attention_heads
        self.residual_convolution = nn.Conv2d(heads, heads, (33, 1), padding=(16, 0), groups=heads, bias=False)

    def forward(
        self, instances: Tensor, instance_mask: Tensor | None, queries: Tensor, learned_queries: Tensor
    ) -> Tensor:
        """Instances (B, M, D) -> (B, M, D); the queries are not read."""
        lengths = [instances.shape[1]] * len(instances)
        if instance_mask is not None:
            lengths = instance_mask.sum(dim=1).tolist()
        correlated = []
        for bag, length in zip(instances, lengths, strict=True):
            real, padding = bag[None, :length], bag[length:]
            correlated.append(torch.cat([(real + self.output(self.correlate(real)))[0], padding]))
        return torch.stack(correlated)

    def landmarks(self, states: Tensor) -> Tensor:
        """Means of the segments of (1, A, M, H/A): (1, A, m, H/A)."""
        length = states.shape[2]
        segment = math.ceil(length / self.config.num_landmarks)
        num_segments = math.ceil(length / segment)
        shortfall = num_segments * segment - length
        counts = states.new_full((num_segments, 1), segment)
        counts[0] -= shortfall
        return F.pad(states, (0, 0, shortfall, 0)).unflatten(2, (num_segments, segment)).sum(dim=3) / counts

    def correlate(self, bag: Tensor) -> Tensor:
        """Bags of one length (B, M, D) -> (B, M, H).

        softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V + conv(V)
        """
        query = self.heads(self.query(bag)) * self.scaling  # (1, A, M, H/A)
        key, value = self.heads(self.key(bag)), self.heads(self.value(bag))
        query_landmarks, key_landmarks = self.landmarks(query), self.landmarks(key)  # (1, A, m, H/A)
        to_landmarks = (query @ key_landmarks.mT).softmax(dim=-1)  # (1, A, M, m)
        among_landmarks = (query_landmarks @ key_landmarks.mT).softmax(dim=-1)  # (1, A, m, m)
        from_landmarks = (query_landmarks @ key.mT).softmax(dim=-1)  # (1, A, m, M)
        states = to_landmarks @ self.pseudo_inverse(among_landmarks) @ (from_landmarks @ value)
        states = states + self.residual_convolution(value)
        return states.transpose(1, 2).flatten(2)

    def pseudo_inverse(self, kernel: Tensor) -> Tensor:
        """Moore-Penrose inverse of (1, A, m, m) by the iteration of Razavi et al. (2014), which Nyströmformer takes."""
        identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        largest_row = kernel.abs().sum(dim=-1).amax(dim=-1)[..., None, None]
        largest_column = kernel.abs().sum(dim=-2).amax(dim=-1)[..., None, None]
        inverse = kernel.mT / (largest_row * largest_column)
        for _ in range(self.config.pinv_iterations):
            product = kernel @ inverse
            inverse = 0.25 * inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
        return inverse


INSTANCE_CORRELATIONS: dict[str, type[nn.Module]] = {
    "csa": CorrelatedSelfAttention,
    "csa_constant": ConstantCorrelatedSelfAttention,
    "self_attention": FullSelfAttention,
    "induced": InducedSelfAttention,
    "nystrom": NystromSelfAttention,
}


# ── Small pieces ────────────────────────────────────────────────────────────────────────────────────────────────────


def gather_real(bags: Tensor, image_mask: Tensor | None) -> Tensor:
    """The real images (n, …) of bags (B, N, …), in order; without a copy where all are real."""
    if image_mask is None or image_mask.all():
        return bags.flatten(0, 1)
    return bags[image_mask.bool()]


def scatter_real(values: Tensor, image_mask: Tensor) -> Tensor:
    """Puts what was computed for real images (n, …) back into bags (B, N, …) whose padding is zero."""
    if len(values) == image_mask.numel():
        return values.unflatten(0, image_mask.shape)
    bags = values.new_zeros(*image_mask.shape, *values.shape[1:])
    return bags.masked_scatter(image_mask.bool().reshape(*image_mask.shape, *[1] * (values.ndim - 1)), values)


def lattice_cells(coords: Tensor) -> Tensor:
    """Row and column (n, 2) of places on a lattice.

    Args:
        coords: (n, 2), x and y; the lattice's step is the smallest gap on each axis. Or (n, 3), x, y and the step, of
            places of which some were taken away, so that their smallest gap may be several steps.

    Raises:
        BagError: The places are no lattice, two are the same, or one is no number.
    """
    if not coords.isfinite().all():
        raise BagError("image_coords hold NaN or infinity; PPEG needs a place for each image.")
    cells = []
    for axis in (1, 0):  # rows are y, columns are x
        values, which = coords[:, axis].double().unique(return_inverse=True)
        gaps = values.diff()
        pitch = coords[0, 2].double() if coords.shape[1] == 3 else gaps.min() if len(gaps) else values.new_ones(())
        steps = gaps / pitch
        # Gap by gap, since places are rounded, to pixels or as float32, and over many columns that would add up.
        if ((steps - steps.round()).abs() > 0.1).any():
            raise BagError(
                f"image_coords are no regular lattice on the {'xy'[axis]} axis: their smallest gap is {pitch:g}, "
                "and not all others are multiples of it. PPEG needs the rows and columns that tiles were cut in."
            )
        numbers = F.pad(steps.round().long().cumsum(dim=0), (1, 0))  # of each row or column that is in use
        cells.append(numbers[which])
    rows_and_columns = torch.stack(cells, dim=1)
    if len(rows_and_columns.unique(dim=0)) < len(coords):
        raise BagError("Two images of a bag stand at the same image_coords; PPEG needs a place for each.")
    return rows_and_columns
