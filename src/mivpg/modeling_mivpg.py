"""MIVPG, the Multi-instance Visual Prompt Generator (arXiv 2406.02987), in the paper's order.

    images ─ vision model ─> image_embeds (B, N, P, D) ─ patch pooling ─> instances (B, M, D)
    in every block with cross-attention:  x <- x + PPEG(x);  x <- x + W_o Attention(Q=x, K=q, V=q)   (Eq. 9)
    then BLIP-2's block:  q <- self-attention(q);  q <- cross-attention(q; K=x, V=x);  q <- feed-forward(q)
    language projection ─> visual prompts (B, R, E), which the frozen language model reads before the prompt text

B bags, N images a bag, P tokens an image, D vision width, M instances a bag, R queries, H Q-Former width,
A attention heads, E language-model width, T text tokens.

What the paper leaves open is decided in the docstring of the class concerned; `docs/design.md` says why.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerAttention,
    Blip2QFormerIntermediate,
    Blip2QFormerMultiHeadAttention,
    Blip2QFormerOutput,
    eager_attention_forward,
)
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from mivpg import folded_attention
from mivpg.checkpoints import CheckpointMixin, is_named
from mivpg.configuration_mivpg import DEFAULT_TRAINABLE, MivpgConfig, MivpgQFormerConfig
from mivpg.errors import MivpgError
from mivpg.loading import language_model_class

ABMIL_HIDDEN_SIZE = 128
"""L of Eq. 4."""


def starting_at_zero(module: nn.Module) -> nn.Module:
    """Marks a layer that `_init_weights` sets to zero, so that what it belongs to starts as the identity."""
    module.starts_at_zero = True
    return module


# ── One instance an image: multiple instance learning over its patches (section 3.3) ────────────────────────────────


class AttentionPooling(nn.Module):
    """AB-MIL (Eq. 3 and 4): an image is the weighted mean of its tokens, the weights come from a small network.

    `alpha = softmax(w^T tanh(u x))`, gated: `alpha = softmax(w^T (tanh(u x) * sigmoid(v x)))` (Ilse et al. 2018).
    Eq. 4 has no biases. All P tokens take part, CLS too. `w` starts at zero, so that the pooling starts as the mean.
    """

    def __init__(self, size: int, *, gated: bool):
        super().__init__()
        self.projection = nn.Linear(size, ABMIL_HIDDEN_SIZE, bias=False)  # u
        self.gate = nn.Linear(size, ABMIL_HIDDEN_SIZE, bias=False) if gated else None  # v
        self.score = starting_at_zero(nn.Linear(ABMIL_HIDDEN_SIZE, 1, bias=False))  # w

    def attention_weights(self, patches: Tensor) -> Tensor:
        """The weight of each token of each image: (n, P, D) -> (n, P), each row sums to one."""
        hidden = torch.tanh(self.projection(patches))  # (n, P, L)
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(patches))
        return self.score(hidden).squeeze(-1).softmax(dim=-1)

    def forward(self, patches: Tensor) -> Tensor:
        """(n, P, D) -> (n, D)."""
        return torch.einsum("np,npd->nd", self.attention_weights(patches), patches)


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

    TransMIL writes `x + conv7(x) + conv5(x) + conv3(x)`; here the identity stands outside and the kernels and biases
    start at zero, so that an untrained PPEG does nothing. The three kernels are summed to one 7x7 when they are run.
    An image's prefix tokens (CLS) pass around. A bag without coordinates is laid out as TransMIL does: row by row in a
    square whose last cells repeat the first instances. That depends on the order and the length of the bag, so bags
    are encoded one by one, and a shuffled bag gives other prompts.
    """

    def __init__(self, size: int):
        super().__init__()
        self.convolutions = nn.ModuleList(
            starting_at_zero(nn.Conv2d(size, size, kernel_size, padding=kernel_size // 2, groups=size))
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
    cross-attention weights stay valid; `W_o` starts at zero, so that an untrained module changes nothing; and queries
    are read from the instances as they are, which have left the vision model through its last LayerNorm.
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
        self.output = starting_at_zero(nn.Linear(config.hidden_size, config.encoder_hidden_size))  # W_o

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
        """One bag (1, M, D) -> (1, M, H): softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V + conv(V)."""
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


# ── The Q-Former that correlates instances (Figure 2a, appendix A) ──────────────────────────────────────────────────


class MivpgLayer(GradientCheckpointingLayer):
    """A block of BLIP-2's Q-Former; one with cross-attention first places and correlates the instances.

    Instances carry over from block to block, and each block has its own PPEG and CSA.
    """

    def __init__(self, config: MivpgQFormerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.attention = Blip2QFormerAttention(config)
        self.has_cross_attention = layer_idx % config.cross_attention_frequency == 0
        self.position_encoding = None
        self.instance_correlation = None
        if self.has_cross_attention:
            self.crossattention = Blip2QFormerAttention(config, is_cross_attention=True)
            self.crossattention.attention = folded_attention.FoldingCrossAttention(config, is_cross_attention=True)
            if config.position_encoding == "ppeg":
                self.position_encoding = PyramidPositionEncoding(config.encoder_hidden_size)
            if config.instance_correlation != "none":
                self.instance_correlation = INSTANCE_CORRELATIONS[config.instance_correlation](config)
        self.intermediate_query = Blip2QFormerIntermediate(config)
        self.output_query = Blip2QFormerOutput(config)

    def forward(
        self,
        queries: Tensor,
        instances: Tensor,
        learned_queries: Tensor,
        instance_mask: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        grid: PatchGrid | BagGrid | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Queries (B, R, H) and instances (B, M, D), both for the next block."""
        if self.position_encoding is not None:
            instances = self.position_encoding(instances, grid)
        if self.instance_correlation is not None:
            instances = self.instance_correlation(instances, instance_mask, queries, learned_queries)
        queries = self.attention(queries, **kwargs)
        if self.has_cross_attention:
            queries = self.crossattention(
                queries,
                encoder_hidden_states=instances,
                encoder_attention_mask=cross_attention_mask,
                **kwargs,
            )
        return self.output_query(self.intermediate_query(queries), queries), instances


class MivpgQFormerEncoder(nn.Module):
    """The stack of blocks; a module of its own because BLIP-2's parameter names have it."""

    def __init__(self, config: MivpgQFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList(MivpgLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))


class MivpgPreTrainedModel(PreTrainedModel):
    """What transformers has to know of every model here."""

    config: MivpgConfig
    config_class = MivpgConfig
    base_model_prefix = "mivpg"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = False  # the Q-Former is float32, as in BLIP-2
    _supports_flex_attn = False
    _no_split_modules = ["MivpgLayer", "Blip2EncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # What trains is float32 whatever the frozen parts are stored in: in 16 bits a Q-Former diverges (LAVIS #267, #409).
    # The first list is what quantizers leave alone, the second what a 16-bit dtype leaves alone.
    _keep_in_fp32_modules = list(DEFAULT_TRAINABLE)  # noqa: RUF012
    _keep_in_fp32_modules_strict = list(DEFAULT_TRAINABLE)  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, InducedSelfAttention):
            init.normal_(module.inducing_points, std=self.config.initializer_range)
        elif isinstance(module, MivpgVisualPromptModel):
            init.normal_(module.query_tokens, std=self.config.initializer_range)


class MivpgQFormerModel(MivpgPreTrainedModel):
    """BLIP-2's Q-Former with instances that are placed and correlated; the trunk of the method."""

    config: MivpgQFormerConfig
    config_class = MivpgQFormerConfig
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MivpgLayer,
        "attentions": [OutputRecorder(Blip2QFormerMultiHeadAttention, index=1, layer_name=".attention")],
        "cross_attentions": [OutputRecorder(Blip2QFormerMultiHeadAttention, index=1, layer_name=".crossattention")],
    }

    def __init__(self, config: MivpgQFormerConfig):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = MivpgQFormerEncoder(config)
        self.post_init()

    def get_input_embeddings(self):
        """None: the Q-Former reads embeddings, not tokens."""

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        query_embeds: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        grid: PatchGrid | BagGrid | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Queries (B, R, H) and instances (B, M, D) with their mask (B, M) -> `last_hidden_state` (B, R, H)."""
        dtype = self.layernorm.weight.dtype
        learned_queries = self.dropout(self.layernorm(query_embeds.to(dtype)))
        instances = encoder_hidden_states.to(dtype)
        mask = encoder_attention_mask
        if mask is None:
            mask = torch.ones(instances.shape[:2], dtype=torch.long, device=instances.device)
        cross_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=learned_queries,
            attention_mask=mask,
            encoder_hidden_states=instances,
        )
        queries = learned_queries
        for layer in self.encoder.layer:
            queries, instances = layer(
                queries,
                instances,
                learned_queries,
                instance_mask=encoder_attention_mask,
                cross_attention_mask=cross_attention_mask,
                grid=grid,
                **kwargs,
            )
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=queries, pooler_output=queries[:, 0])


# ── From images to visual prompts (sections 3.3 and 3.4) ────────────────────────────────────────────────────────────


@dataclass
class VisualPrompts:
    """What every aggregator returns: a bag as a few vectors that a language model, or a classifier, reads."""

    embeds: Tensor
    """(B, T, H); T is R for MIVPG."""
    mask: Tensor
    """(B, T), 1 = real."""
    weights: Tensor | None = None
    """(B, T, M), how much each prompt looked at each instance, where the aggregator was asked and knows."""
    loss: Tensor | None = None
    """A loss of the aggregator's own, for those that have one."""


class MivpgVisualPromptModel(MivpgPreTrainedModel):
    """A vision model, if any, and the MIVPG; what reads the visual prompts is the subclass's.

    Only what `config.trainable` names trains. The rest is frozen and stays in eval mode, its dropout off, also while
    the model trains.

    Args:
        config: Sizes and options.
        vision_model: One that exists already; by default it is made from `config.vision_config`, if any.
    """

    def __init__(self, config: MivpgConfig, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        qformer_config = config.qformer_config
        if vision_model is None and config.vision_config is not None:
            vision_model = AutoModel.from_config(config.vision_config)
        self.vision_model = vision_model
        self.patch_pooling: AttentionPooling | None = None
        if config.patch_pooling in ("abmil", "gated_abmil"):
            self.patch_pooling = AttentionPooling(config.image_embeds_size, gated=config.patch_pooling == "gated_abmil")
        self.instance_projection = None
        if config.image_embeds_size != qformer_config.encoder_hidden_size:
            self.instance_projection = nn.Sequential(
                nn.LayerNorm(config.image_embeds_size),
                nn.Linear(config.image_embeds_size, qformer_config.encoder_hidden_size),
            )
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, qformer_config.hidden_size))
        self.qformer = MivpgQFormerModel._from_config(qformer_config)

    def get_image_embeds(
        self, pixel_values: Tensor, image_mask: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """What the vision model says of each image; it runs on real images only.

        Args:
            pixel_values: (B, N, 3, h, w).
            image_mask: (B, N), 1 = real. Left out, every image is.
            interpolate_pos_encoding: For images of another size than the vision model's own, where it knows how.

        Returns:
            (B, N, P, D), zero for padding. A feature map (a ResNet's) is flattened row by row.
        """
        if self.vision_model is None:
            raise MivpgError("This model has no vision model (config.vision_config is None): pass image_embeds.")
        if pixel_values.ndim != 5:
            raise MivpgError(f"pixel_values are bags of images (B, N, 3, h, w); these are {tuple(pixel_values.shape)}.")
        real = pixel_values.flatten(0, 1) if image_mask is None else pixel_values[image_mask.bool()]
        options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        trains = any(parameter.requires_grad for parameter in self.vision_model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            tokens = self.vision_model(real.to(self.vision_model.dtype), **options).last_hidden_state
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        if image_mask is None:
            return tokens.unflatten(0, pixel_values.shape[:2])
        return scatter_real(tokens, image_mask)

    def get_instances(self, image_embeds: Tensor, image_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The instances of each bag: one an image where patches are pooled, else every patch of every image.

        Args:
            image_embeds: (B, N, P, D).
            image_mask: (B, N), 1 = real.

        Returns:
            Instances (B, M, D), zero for padding, M = N or N·P, and their mask (B, M), None where there is none.
        """
        if image_embeds.ndim != 4 or image_embeds.shape[-1] != self.config.image_embeds_size:
            raise MivpgError(
                f"image_embeds are bags of images (B, N, P, D) with D = {self.config.image_embeds_size}; "
                f"these are {tuple(image_embeds.shape)}."
            )
        if 0 in image_embeds.shape:
            raise MivpgError(
                f"A bag needs at least one image of one token; image_embeds are {tuple(image_embeds.shape)}."
            )
        if image_mask is not None:
            if image_mask.shape != image_embeds.shape[:2]:
                raise MivpgError(f"image_mask is {tuple(image_mask.shape)}, image_embeds {tuple(image_embeds.shape)}.")
            if not image_mask.bool().any(dim=1).all():
                raise MivpgError("A bag without a real image: a row of image_mask is zero throughout.")
        instances = image_embeds.to(self.query_tokens.dtype)
        pooling = self.config.patch_pooling
        if pooling == "none":
            if image_mask is None:
                return self.project_instances(instances).flatten(1, 2), None  # (B, N*P, D)
            # Real images alone: what stands in padding, be it NaN, is in no sum and in no gradient.
            real = self.project_instances(instances[image_mask.bool()])  # (n, P, D)
            instance_mask = image_mask.repeat_interleave(image_embeds.shape[2], dim=1)
            return scatter_real(real, image_mask).flatten(1, 2), instance_mask
        images = instances.flatten(0, 1) if image_mask is None else instances[image_mask.bool()]  # (n, P, D)
        if pooling == "cls":
            pooled = images[:, 0]
        elif pooling == "mean":
            pooled = images.mean(dim=1)
        elif pooling == "max":
            pooled = images.amax(dim=1)
        else:
            assert self.patch_pooling is not None
            pooled = self.patch_pooling(images)
        pooled = self.project_instances(pooled)  # (n, D)
        if image_mask is None:
            return pooled.unflatten(0, image_embeds.shape[:2]), None
        return scatter_real(pooled, image_mask), image_mask

    def project_instances(self, instances: Tensor) -> Tensor:
        """To the width that the Q-Former's cross-attention was made for, where it is another."""
        return instances if self.instance_projection is None else self.instance_projection(instances)

    def get_instance_grid(
        self, image_embeds: Tensor, image_mask: Tensor | None, image_coords: Tensor | None
    ) -> PatchGrid | BagGrid:
        """Where the instances of `get_instances` stand, for the position encoding.

        Args:
            image_embeds: (B, N, P, D).
            image_mask: (B, N), 1 = real.
            image_coords: (B, N, 2), x and y of each image on a regular lattice in any unit; the smallest gap on an axis
                is one cell.
        """
        batch_size, num_images, num_tokens = image_embeds.shape[:3]
        if self.config.patch_pooling == "none" and num_tokens > 1:
            num_prefix_tokens = self.config.num_prefix_tokens
            num_patches = num_tokens - num_prefix_tokens
            side = math.isqrt(max(num_patches, 0))
            if side == 0 or side * side != num_patches:
                raise MivpgError(
                    f"PPEG needs a square grid of patches: {num_tokens} tokens an image less "
                    f"{num_prefix_tokens} before the patches (config.num_prefix_tokens) is no square."
                )
            return PatchGrid(num_images=num_images, num_prefix_tokens=num_prefix_tokens, side=side)
        expected = (batch_size, num_images, 2)
        if image_coords is not None and image_coords.shape != expected:
            raise MivpgError(f"image_coords are {tuple(image_coords.shape)}; for these bags (B, N, 2) is {expected}.")
        lengths = [num_images] * batch_size if image_mask is None else image_mask.sum(dim=1).tolist()
        if image_coords is None:
            return BagGrid(lengths=lengths, cells=None)
        cells = [lattice_cells(bag[:length]) for bag, length in zip(image_coords, lengths, strict=True)]
        return BagGrid(lengths=lengths, cells=cells)

    def get_visual_prompts(
        self,
        image_embeds: Tensor,
        image_mask: Tensor | None = None,
        image_coords: Tensor | None = None,
        **kwargs,
    ) -> VisualPrompts:
        """A bag as R vectors of the Q-Former's width.

        Args:
            image_embeds: (B, N, P, D).
            image_mask: (B, N), 1 = real; padding stands at the end of a bag.
            image_coords: (B, N, 2) where positions are known; read by PPEG alone.

        Returns:
            `embeds` (B, R, H).
        """
        if image_mask is not None:
            image_mask = image_mask.long()
            if bool((image_mask[:, 1:] > image_mask[:, :-1]).any()):
                raise MivpgError("Padding has to stand at the end of a bag: image_mask goes from 0 to 1 in a row.")
        instances, instance_mask = self.get_instances(image_embeds, image_mask)
        grid = None
        if self.config.qformer_config.position_encoding == "ppeg":
            grid = self.get_instance_grid(image_embeds, image_mask, image_coords)
        queries = self.query_tokens.expand(len(instances), -1, -1)
        embeds = self.qformer(
            query_embeds=queries,
            encoder_hidden_states=instances,
            encoder_attention_mask=instance_mask,
            grid=grid,
            return_dict=True,
            **kwargs,
        ).last_hidden_state  # (B, R, H)
        return VisualPrompts(embeds=embeds, mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device))

    # What trains, and what stays as it was.

    def trains(self, name: str) -> bool:
        """Whether a parameter of this name is in `config.trainable`, by itself or by a module that holds it."""
        return is_named(name, self.config.trainable)

    def freeze(self):
        """Lets train what `config.trainable` names, in float32, and nothing else."""
        known = {name for name, _ in self.named_modules()} | {name for name, _ in self.named_parameters()}
        for part in self.config.trainable:
            if part not in known and part not in DEFAULT_TRAINABLE:
                raise MivpgError(
                    f"config.trainable names {part!r}, but the model has no module or parameter of that name."
                )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.trains(name))
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    def train(self, mode: bool = True):
        """As in PyTorch, but frozen parts stay in eval mode."""
        super().train(mode)
        if mode:
            keep_frozen_in_eval(self)
        return self


# ── The captioner: visual prompts before a frozen language model ────────────────────────────────────────────────────


@dataclass
class MivpgOutput(ModelOutput):
    """What `MivpgForConditionalGeneration` returns.

    Attributes:
        loss: Mean loss over the tokens of the captions, where `labels` were given.
        logits: (B, T, vocabulary).
        visual_prompts: (B, R, E), as the language model read them.
        language_model_outputs: The language model's own output.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    visual_prompts: Tensor | None = None
    language_model_outputs: ModelOutput | None = None


class MivpgForConditionalGeneration(CheckpointMixin, MivpgVisualPromptModel, GenerationMixin):
    """MIVPG between a frozen vision model and a frozen language model: captions from bags of images.

    With everything off and one image a bag it is `Blip2ForConditionalGeneration`, bit for bit, and loads its folders.

    Args:
        config: Sizes and options.
        vision_model: A vision model that exists already; by default one is made from `config.vision_config`, if any.
        language_model: Likewise.
    """

    accepts_loss_kwargs = True  # `num_items_in_batch`, see `forward`

    def __init__(
        self,
        config: MivpgConfig,
        vision_model: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config, vision_model)
        if language_model is None:
            language_model = language_model_class(config.text_config).from_config(config.text_config)
        width = language_model.get_input_embeddings().embedding_dim  # E, which for OPT-350m is not its hidden_size
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, width)
        self.language_model = language_model
        self.post_init()
        self.freeze()

    # The language model's own, which generation and accelerate ask for.

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        """The language model's."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        """The language model's."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality=None) -> nn.Module:
        """The language model's encoder, where it has one."""
        return self.language_model.get_encoder() if modality is None else super().get_encoder(modality=modality)

    # From a bag and a text to what the language model reads; `forward` and `generate` both go through here.

    def language_model_ids(self, input_ids: Tensor) -> Tensor:
        """Ids that the language model knows: what lies outside its vocabulary, image marks, becomes its pad token."""
        vocabulary = self.get_input_embeddings().num_embeddings
        pad = self.config.text_config.pad_token_id
        known_pad = pad if pad is not None and 0 <= pad < vocabulary else 0
        return input_ids.masked_fill(input_ids >= vocabulary, known_pad)

    def prepare_inputs_embeds(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_coords: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Text embeddings (B, T, E) whose image marks hold the visual prompts, and these prompts (B, R, E)."""
        if (pixel_values is None) == (image_embeds is None):
            raise MivpgError("Pass either pixel_values or image_embeds.")
        if image_embeds is None:
            image_embeds = self.get_image_embeds(pixel_values, image_mask, interpolate_pos_encoding)
        prompts = self.language_projection(self.get_visual_prompts(image_embeds, image_mask, image_coords).embeds)
        if self.config.image_token_index is None:
            raise MivpgError("config.image_token_index is None: set it to the processor's image_token_id.")
        is_mark = input_ids == self.config.image_token_index  # (B, T)
        num_marks = is_mark.sum(dim=1)
        if (num_marks != prompts.shape[1]).any():
            raise MivpgError(
                f"Texts have {num_marks.tolist()} image marks, the model makes {prompts.shape[1]} visual prompts a bag."
            )
        inputs_embeds = self.get_input_embeddings()(self.language_model_ids(input_ids))
        prompts = prompts.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_mark[..., None].to(inputs_embeds.device), prompts), prompts

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_coords: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> MivpgOutput:
        """Logits of the text, and the loss of the caption.

        Args:
            input_ids: (B, T), with R image marks a row.
            pixel_values: (B, N, 3, h, w), or
            image_embeds: (B, N, P, D), what the vision model made of the images before.
            image_mask: (B, N), 1 = real image; padding stands at the end.
            image_coords: (B, N, 2), x and y of each image where they are known.
            attention_mask: (B, T), 1 = real token.
            labels: (B, T), or (B, length of the caption) for an encoder-decoder; -100 is ignored.
            decoder_input_ids: For an encoder-decoder; by default the labels, shifted.
            decoder_attention_mask: For an encoder-decoder.
            interpolate_pos_encoding: For images of another size than the vision model's.
            num_items_in_batch: Number of caption tokens in all the batches that make one step. The loss is then the
                summed token loss divided by it, so that the size of a batch does not change the loss of a step.
            **kwargs: For the language model.

        Raises:
            MivpgError: Shapes or numbers of image marks that do not fit together; the message has both.
        """
        inputs_embeds, prompts = self.prepare_inputs_embeds(
            input_ids, pixel_values, image_embeds, image_mask, image_coords, interpolate_pos_encoding
        )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if labels is not None:
            kwargs.setdefault("use_cache", False)  # nothing is generated, so keys and values need not be kept
        if self.config.is_encoder_decoder:
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                labels=labels,
                return_dict=True,
                **kwargs,
            )
            logits, loss = outputs.logits, outputs.loss
            if labels is not None and num_items_in_batch is not None:
                loss = F.cross_entropy(
                    logits.flatten(0, 1).float(), labels.flatten().to(logits.device), reduction="sum"
                )
                loss = loss / num_items_in_batch
        else:
            outputs = self.language_model(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True, **kwargs
            )
            logits, loss = outputs.logits, None
            if labels is not None:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels.to(logits.device),
                    vocab_size=self.config.text_config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                )
        return MivpgOutput(loss=loss, logits=logits, visual_prompts=prompts, language_model_outputs=outputs)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_coords: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs,
    ):
        """Writes captions; what `Blip2ForConditionalGeneration.generate` returns, from the same arguments as `forward`.

        Args:
            input_ids: (B, T), with R image marks a row; padded on the left for a decoder-only model.
            pixel_values: (B, N, 3, h, w), or `image_embeds` (B, N, P, D); they and their mask are as in `forward`.
            attention_mask: (B, T), 1 = real token.
            **generate_kwargs: All that transformers' `generate` takes. Give `max_new_tokens`, not `max_length`, which
                would count the prompts.

        Returns:
            Token ids; those of a decoder-only model begin with the prompt, whose image marks are the pad token where
            the model does not know them.
        """
        inputs_embeds, _ = self.prepare_inputs_embeds(
            input_ids, pixel_values, image_embeds, image_mask, image_coords, interpolate_pos_encoding
        )
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        }
        if not self.config.is_encoder_decoder:
            inputs["input_ids"] = self.language_model_ids(input_ids)
        if self.config.caption_end_token_id is not None:
            generate_kwargs.setdefault("eos_token_id", self.config.caption_end_token_id)
        return self.language_model.generate(**inputs, **generate_kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs):
        """Recomputes every block in the backward pass, the frozen ones too.

        transformers recomputes what is in training mode only, but the frozen language model, which holds most of the
        activations, stays in eval mode.
        """
        super()._set_gradient_checkpointing(enable=enable, **kwargs)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                if "hooked_forward" in vars(module):
                    vars(module).pop("forward")
                    if (hooked := vars(module).pop("hooked_forward")) is not None:
                        module.forward = hooked
                if enable and is_frozen(module):
                    module.hooked_forward = vars(module).get("forward")  # accelerate's, under a device map
                    module.forward = functools.partial(recompute, module.forward)


# ── Small pieces ────────────────────────────────────────────────────────────────────────────────────────────────────


def scatter_real(values: Tensor, image_mask: Tensor) -> Tensor:
    """Puts what was computed for real images (n, …) back into bags (B, N, …) whose padding is zero."""
    bags = values.new_zeros(*image_mask.shape, *values.shape[1:])
    return bags.masked_scatter(image_mask.bool().reshape(*image_mask.shape, *[1] * (values.ndim - 1)), values)


def lattice_cells(coords: Tensor) -> Tensor:
    """Row and column (n, 2) of places (n, 2) = x, y on a lattice whose step is the smallest gap on each axis.

    Raises:
        MivpgError: The places are no lattice, two are the same, or one is no number.
    """
    if not coords.isfinite().all():
        raise MivpgError("image_coords hold NaN or infinity; PPEG needs a place for each image.")
    cells = []
    for axis in (1, 0):  # rows are y, columns are x
        values = coords[:, axis].double()
        gaps = values.unique().diff()
        pitch = gaps.min() if len(gaps) else values.new_ones(())
        steps = (values - values.min()) / pitch
        if (steps - steps.round()).abs().max() > 0.1:
            raise MivpgError(
                f"image_coords are no regular lattice on the {'xy'[axis]} axis: their smallest gap is {pitch:g}, "
                "and not all others are multiples of it. PPEG needs the rows and columns that tiles were cut in."
            )
        cells.append(steps.round().long())
    rows_and_columns = torch.stack(cells, dim=1)
    if len(rows_and_columns.unique(dim=0)) < len(coords):
        raise MivpgError("Two images of a bag stand at the same image_coords; PPEG needs a place for each.")
    return rows_and_columns


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters and none of them trains."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def keep_frozen_in_eval(module: nn.Module):
    """Puts every part that is frozen as a whole into eval mode, with the dropouts it holds."""
    for child in module.children():
        if is_frozen(child):
            child.eval()
        else:
            keep_frozen_in_eval(child)


def recompute(forward: Callable, *args, **kwargs):
    """Runs a block that keeps its inputs only, and runs again in the backward pass."""
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


AutoConfig.register("mivpg", MivpgConfig)
AutoConfig.register("mivpg_qformer", MivpgQFormerConfig)
AutoModel.register(MivpgQFormerConfig, MivpgQFormerModel)
AutoModelForImageTextToText.register(MivpgConfig, MivpgForConditionalGeneration)

__all__ = [
    "MivpgForConditionalGeneration",
    "MivpgOutput",
    "MivpgPreTrainedModel",
    "MivpgQFormerModel",
    "VisualPrompts",
]
