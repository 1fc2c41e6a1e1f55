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
import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerAttention,
    Blip2QFormerIntermediate,
    Blip2QFormerMultiHeadAttention,
    Blip2QFormerOutput,
)
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from mivpg import folded_attention
from mivpg.aggregators.base import Aggregator, BagScores, ScoringAggregator, VisualPrompts
from mivpg.aggregators.named import make_aggregator
from mivpg.aggregators.scoring import classification_loss
from mivpg.checkpoints import CardMixin, CheckpointMixin, is_named
from mivpg.configuration_mivpg import DEFAULT_TRAINABLE, Q_FORMERS, MivpgConfig, MivpgQFormerConfig
from mivpg.errors import BagError, MivpgError
from mivpg.layers import (
    INSTANCE_CORRELATIONS,
    AttentionPooling,
    BagGrid,
    InducedSelfAttention,
    PatchGrid,
    PyramidPositionEncoding,
    gather_real,
    lattice_cells,
    scatter_real,
)
from mivpg.loading import language_model_class

# ── The Q-Former that correlates instances (Figure 2a, appendix A) ──────────────────────────────────────────────────


class MivpgLayer(GradientCheckpointingLayer):
    """A block of BLIP-2's Q-Former; one with cross-attention first places and correlates the instances.

    Each block has its own PPEG and CSA.
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
                self.position_encoding = PyramidPositionEncoding(
                    config.encoder_hidden_size, zero_init=config.zero_init_residual
                )
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
        """Queries (B, R, H) for the next block, and the instances (B, M, D) that they have read."""
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
        if getattr(module, "is_of_aggregator", False):  # each starts as its authors have it, which is PyTorch's way
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            return
        super()._init_weights(module)
        if isinstance(module, InducedSelfAttention):
            init.normal_(module.inducing_points, std=self.config.initializer_range)
        elif isinstance(module, MivpgVisualPromptModel) and module.query_tokens is not None:
            init.normal_(module.query_tokens, std=self.config.initializer_range)


class MivpgQFormerModel(MivpgPreTrainedModel):
    """BLIP-2's Q-Former with instances that are placed and correlated; the trunk of the method.

    Instances carry over from block to block. The paper does not say so; with `config.instances_carry_over` False each
    block begins with the instances as they came.
    """

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
        """Queries (B, R, H) and instances (B, M, D) with their mask (B, M) -> `last_hidden_state` (B, R, H).

        `grid` says where the instances stand. With `position_encoding: ppeg` it has to be there; else it is not read.

        Raises:
            MivpgError: `position_encoding` is "ppeg", and there is no grid.
        """
        if grid is None and self.config.position_encoding == "ppeg":
            raise MivpgError("position_encoding is 'ppeg', so pass grid: where the instances stand.")
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
        with self._recomputing_instances(instances):
            for layer in self.encoder.layer:
                queries, updated = layer(
                    queries,
                    instances,
                    learned_queries,
                    instance_mask=encoder_attention_mask,
                    cross_attention_mask=cross_attention_mask,
                    grid=grid,
                    **kwargs,
                )
                if self.config.instances_carry_over:
                    instances = updated
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=queries, pooler_output=queries[:, 0])

    def _recomputing_instances(self, instances: Tensor) -> AbstractContextManager[None]:
        """Of large bags (B, M, D); gradient checkpointing makes all of a block again, and compiled code keeps all."""
        is_large = instances.shape[1] >= folded_attention.FOLD_FROM
        has_csa = self.config.instance_correlation in ("csa", "csa_constant")
        if not (is_large and has_csa and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return nullcontext()
        if any(layer.gradient_checkpointing for layer in self.encoder.layer):
            return nullcontext()
        return folded_attention.RecomputingInstances()


# ── From images to visual prompts (sections 3.3 and 3.4) ────────────────────────────────────────────────────────────


class MivpgVisualPromptModel(MivpgPreTrainedModel):
    """A vision model, if any, and the MIVPG or another aggregator; what reads the visual prompts is the subclass's.

    Only what `config.trainable` names trains. The rest is frozen and stays in eval mode, its dropout off, also while
    the model trains.

    Args:
        config: Sizes and options.
        vision_model: One that exists already; by default it is made from `config.vision_config`, if any.
        prompt_size: What the prompts of an aggregator in MIVPG's place are wide; by default it decides.
    """

    def __init__(
        self, config: MivpgConfig, vision_model: PreTrainedModel | None = None, prompt_size: int | None = None
    ):
        super().__init__(config)
        qformer_config = config.qformer_config
        if vision_model is None and config.vision_config is not None:
            vision_model = AutoModel.from_config(config.vision_config)
        self.vision_model = vision_model
        self.patch_pooling: AttentionPooling | None = None
        if config.patch_pooling in ("abmil", "gated_abmil"):
            self.patch_pooling = AttentionPooling(
                config.image_embeds_size,
                gated=config.patch_pooling == "gated_abmil",
                num_left_out=0 if config.pool_include_prefix else config.num_prefix_tokens,
            )
        self.aggregator: Aggregator | ScoringAggregator | None = None
        self.qformer: MivpgQFormerModel | None = None
        self.query_tokens: nn.Parameter | None = None
        self.instance_projection: nn.Module | None = None
        if config.aggregator not in Q_FORMERS:
            self.aggregator = make_aggregator(config, prompt_size)
            for module in self.aggregator.modules():
                module.is_of_aggregator = True
            return
        if config.image_embeds_size != qformer_config.encoder_hidden_size:
            self.instance_projection = nn.Sequential(
                nn.LayerNorm(config.image_embeds_size),
                nn.Linear(config.image_embeds_size, qformer_config.encoder_hidden_size),
            )
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, qformer_config.hidden_size))
        self.qformer = MivpgQFormerModel._from_config(qformer_config)

    @property
    def prompt_dtype(self) -> torch.dtype:
        """What visual prompts are computed in."""
        if self.query_tokens is not None:
            return self.query_tokens.dtype
        assert self.aggregator is not None
        return next((parameter.dtype for parameter in self.aggregator.parameters()), torch.float32)

    def get_image_embeds(
        self, pixel_values: Tensor, image_mask: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """What the vision model says of each image; it runs on real images only.

        Args:
            pixel_values: (B, N, 3, h, w).
            image_mask: (B, N), 1 = real. Left out, every image is.
            interpolate_pos_encoding: For images of another size than the vision model's own, where it knows how; set
                `config.image_size` for a model that is made for another.

        Returns:
            (B, N, P, D), zero for padding. A feature map (a ResNet's) is flattened row by row.
        """
        if self.vision_model is None:
            raise MivpgError("This model has no vision model (config.vision_config is None): pass image_embeds.")
        if pixel_values.ndim != 5:
            raise MivpgError(f"pixel_values are bags of images (B, N, 3, h, w); these are {tuple(pixel_values.shape)}.")
        real = gather_real(pixel_values, image_mask)  # (n, 3, h, w)
        interpolate_pos_encoding = interpolate_pos_encoding or self.config.image_size is not None
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

        Raises:
            MivpgError: Shapes that do not fit together, or all this is to be computed in float16.
        """
        self._check_bags(image_embeds, image_mask)
        pooling = self.config.patch_pooling
        if pooling == "cls":
            image_embeds = image_embeds[:, :, :1]
        # Real images alone: what stands in padding, be it NaN, is in no sum and in no gradient.
        real = gather_real(image_embeds, image_mask).to(self.prompt_dtype)  # (n, P, D)
        if pooling == "none":
            instances = self.project_instances(real)
            instance_mask = None if image_mask is None else image_mask.repeat_interleave(real.shape[1], dim=1)
        else:
            instances = self.project_instances(self.pool_patches(real))[:, None]  # (n, 1, D)
            instance_mask = image_mask
        if image_mask is None:
            return instances.unflatten(0, image_embeds.shape[:2]).flatten(1, 2), None
        return scatter_real(instances, image_mask).flatten(1, 2), instance_mask

    def _check_bags(self, image_embeds: Tensor, image_mask: Tensor | None) -> None:
        """Raises where shapes do not fit together, a bag has no image, or all this is to be computed in float16."""
        self._refuse_float16()
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

    def _refuse_float16(self) -> None:
        """A Q-Former diverges in float16, which ends at 65,504 (LAVIS #267, #409); bfloat16 has float32's range."""
        device = self.device.type
        if self.prompt_dtype == torch.float16:
            found, remedy = "is float16", "from_pretrained(…, dtype=torch.float16) leaves it float32, `half()` does not"
        elif torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            found, remedy = "is computed in float16 by autocast", "take torch.autocast(…, torch.bfloat16)"
        else:
            return
        raise MivpgError(
            f"What makes visual prompts ({self.config.aggregator}) {found}, expected float32 or bfloat16: a Q-Former "
            f"diverges in float16, which ends at 65504; {remedy}."
        )

    def pool_patches(self, images: Tensor) -> Tensor:
        """One instance an image: (n, P, D) -> (n, D)."""
        pooling = self.config.patch_pooling
        if pooling == "cls":
            return images[:, 0]
        if pooling == "mean":
            return images.mean(dim=1)
        if pooling == "max":
            return images.amax(dim=1)
        assert self.patch_pooling is not None
        return self.patch_pooling(images)

    def get_pooled_images(self, image_embeds: Tensor, image_mask: Tensor | None) -> Tensor:
        """The instances of each bag, image by image: (B, N, 1, D) where patches are pooled, else (B, N, P, D)."""
        return self.get_instances(image_embeds, image_mask)[0].unflatten(1, (image_embeds.shape[1], -1))

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
                is one cell. Or (B, N, 3), x, y and the side of a cell.
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
        if image_coords is not None and image_coords.shape not in (expected, (batch_size, num_images, 3)):
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
    ) -> VisualPrompts:
        """A bag as R vectors of the Q-Former's width, or what another aggregator makes of it.

        Args:
            image_embeds: (B, N, P, D).
            image_mask: (B, N), 1 = real; padding stands at the end of a bag.
            image_coords: (B, N, 2) where positions are known; read by PPEG alone.

        Returns:
            `embeds` (B, R, H); of an aggregator that gives prompts to each image (B, N R, H), with a mask.
        """
        if image_mask is not None:
            image_mask = image_mask.long()
            if bool((image_mask[:, 1:] > image_mask[:, :-1]).any()):
                raise MivpgError("Padding has to stand at the end of a bag: image_mask goes from 0 to 1 in a row.")
        if self.aggregator is not None:
            return self.aggregator(self.get_pooled_images(image_embeds, image_mask), image_mask, image_coords)
        if self.config.aggregator == "qformer_per_image":
            return self._prompts_per_image(image_embeds, image_mask)
        return self._prompts_per_bag(image_embeds, image_mask, image_coords)

    def _prompts_per_image(self, image_embeds: Tensor, image_mask: Tensor | None) -> VisualPrompts:
        """Each image as a bag of its own; what the Q-Former says of each, one after the other (LAVIS issue 318)."""
        self._check_bags(image_embeds, image_mask)
        if image_mask is None:
            image_mask = torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device)
        embeds = self._prompts_per_bag(gather_real(image_embeds, image_mask)[:, None], None, None).embeds
        mask = image_mask.repeat_interleave(embeds.shape[1], dim=1)
        return VisualPrompts(embeds=scatter_real(embeds, image_mask).flatten(1, 2), mask=mask)

    def _prompts_per_bag(
        self, image_embeds: Tensor, image_mask: Tensor | None, image_coords: Tensor | None
    ) -> VisualPrompts:
        """MIVPG: (B, R, H)."""
        assert self.qformer is not None and self.query_tokens is not None
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
        """As in PyTorch, but what is frozen as a whole stays in eval mode, with the dropouts it holds."""
        if not (mode and self.training):
            super().train(mode)
        if mode:
            set_training(self, find_trained(self, {}))
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
        if config.text_config is None:
            raise MivpgError("config.text_config is None: a captioner needs a language model.")
        if language_model is None:
            language_model = language_model_class(config.text_config).from_config(config.text_config)
        width = language_model.get_input_embeddings().embedding_dim  # E, which for OPT-350m is not its hidden_size
        super().__init__(config, vision_model, prompt_size=width)
        self.language_projection: nn.Module = nn.Identity()  # aggregators in MIVPG's place speak to the model directly
        if self.aggregator is None:
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

    @functools.cached_property
    def num_positions(self) -> int | None:
        """Places that the language model has learned, as have OPT, GPT-2 and BART; None where they never end."""
        limit = getattr(self.config.text_config, "max_position_embeddings", None) or 0
        tokens = self.get_input_embeddings().weight
        tables = (m for m in self.language_model.modules() if isinstance(m, nn.Embedding) and m.weight is not tokens)
        # Two more rows than places, where the first two are for padding.
        return limit if any(0 < limit <= table.num_embeddings <= limit + 2 for table in tables) else None

    def check_length(self, num_tokens: int, num_caption_tokens: int = 0) -> None:
        """Checks that the language model has places for a text and its caption.

        On a GPU, a token without a place ends the process.

        Args:
            num_tokens: Of the text, its visual prompts among them.
            num_caption_tokens: Of the caption, where it is to be generated or is a decoder's.

        Raises:
            BagError: It has fewer.
        """
        is_joint = not self.config.is_encoder_decoder  # the last token that is generated needs no place
        needed = num_tokens + max(num_caption_tokens - 1, 0) if is_joint else max(num_tokens, num_caption_tokens)
        if self.num_positions is not None and needed > self.num_positions:
            caption = f" and {num_caption_tokens} for a caption" if num_caption_tokens else ""
            raise BagError(
                f"{num_tokens} tokens, visual prompts among them{caption}, but the language model has places for "
                f"{self.num_positions}; shorten the prompt or the caption (max_new_tokens, max_caption_tokens)."
            )

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
        self.check_length(input_ids.shape[1])
        if image_embeds is None:
            image_embeds = self.get_image_embeds(pixel_values, image_mask, interpolate_pos_encoding)
        found = self.get_visual_prompts(image_embeds, image_mask, image_coords)
        prompts = self.language_projection(found.embeds)
        if self.config.image_token_index is None:
            raise MivpgError("config.image_token_index is None: set it to the processor's image_token_id.")
        is_mark = input_ids == self.config.image_token_index  # (B, T)
        num_marks = is_mark.sum(dim=1)
        num_prompts = found.mask.sum(dim=1)
        if (num_marks != num_prompts.to(num_marks.device)).any():
            raise MivpgError(
                f"Texts have {num_marks.tolist()} image marks, the model makes {num_prompts.tolist()} visual prompts."
            )
        inputs_embeds = self.get_input_embeddings()(self.language_model_ids(input_ids))
        prompts = prompts.to(inputs_embeds.device, inputs_embeds.dtype)
        real = prompts[found.mask.bool().to(prompts.device)]
        return inputs_embeds.masked_scatter(is_mark[..., None].to(inputs_embeds.device), real), prompts

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
            BagError: The language model has no places for so long a text.
            MivpgError: Shapes or numbers of image marks that do not fit together; the message has both.
        """
        if self.config.is_encoder_decoder and labels is not None:
            self.check_length(input_ids.shape[1], labels.shape[1])
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

        Raises:
            BagError: The language model has no places for a text and `max_new_tokens`.
            MivpgError: As `forward`.
        """
        self.check_length(input_ids.shape[1], generate_kwargs.get("max_new_tokens") or 0)
        inputs_embeds, _ = self.prepare_inputs_embeds(
            input_ids, pixel_values, image_embeds, image_mask, image_coords, interpolate_pos_encoding
        )
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        }
        if not self.config.is_encoder_decoder:
            inputs["input_ids"] = self.language_model_ids(input_ids)
            if (cache := self._read_prompts_once(inputs_embeds, inputs["attention_mask"], generate_kwargs)) is not None:
                inputs["past_key_values"] = cache
        if self.config.caption_end_token_id is not None:
            generate_kwargs.setdefault("eos_token_id", self.config.caption_end_token_id)
        return self.language_model.generate(**inputs, **generate_kwargs)

    def _read_prompts_once(
        self, inputs_embeds: Tensor, attention_mask: Tensor, generate_kwargs: dict[str, Any]
    ) -> DynamicCache | None:
        """Keys and values of all positions (B, T, E) but the last, repeated for each beam, computed once a bag.

        transformers' `generate` would compute them anew for each beam. None where there is one row a bag, where the
        caller has a cache or positions, or wants another cache or what is computed on the way, and where the number of
        positions decides how they are encoded.
        """
        configs = [generate_kwargs.get("generation_config"), self.language_model.generation_config]

        def option(name: str) -> Any:
            """As transformers looks for it: what is None leaves it to the next."""
            found = (generate_kwargs.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in found if value is not None), None)

        num_rows = max(option("num_beams") or 1, option("num_return_sequences") or 1)
        rope = getattr(self.config.text_config, "rope_parameters", None) or {}
        if (
            num_rows == 1
            or inputs_embeds.shape[1] == 1
            or not generate_kwargs.keys().isdisjoint(("past_key_values", "position_ids"))
            or option("cache_implementation") is not None
            or option("output_attentions")
            or option("output_hidden_states")
            or rope.get("rope_type") in ("dynamic", "longrope")
        ):
            return None
        decoder = self.language_model.get_decoder()
        mask = attention_mask[:, :-1]
        options = {}
        if "position_ids" in inspect.signature(decoder.forward).parameters:
            options["position_ids"] = (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 0)  # as in `generate`
        outputs = decoder(inputs_embeds=inputs_embeds[:, :-1], attention_mask=mask, use_cache=True, **options)
        cache = getattr(outputs, "past_key_values", None)
        if not isinstance(cache, DynamicCache):
            return None
        cache.reorder_cache(torch.arange(len(mask), device=mask.device).repeat_interleave(num_rows))
        return cache

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


# ── The classifier of bags: what most users of multiple instance learning do ────────────────────────────────────────


@dataclass
class BagClassificationOutput(ModelOutput):
    """What `MivpgForBagClassification` returns.

    Attributes:
        loss: Mean over the bags, where `labels` were given.
        logits: (B, C); of a binary problem (B, 1), the logit of class 1.
        instance_scores: (B, M, C), logits of each instance, of an aggregator that is defined by them.
        attention: (B, M), how much of the bag's vector each instance is, where the aggregator knows.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    instance_scores: Tensor | None = None
    attention: Tensor | None = None


class MivpgForBagClassification(CardMixin, MivpgVisualPromptModel):
    """A linear classifier on the mean of a bag's visual prompts; or an aggregator that scores bags itself.

    Two classes make one logit and binary cross-entropy, more make a softmax.

    Args:
        config: Sizes and options; `num_labels` classes, and no `text_config`.
        vision_model: One that exists already; by default it is made from `config.vision_config`, if any.
    """

    def __init__(self, config: MivpgConfig, vision_model: PreTrainedModel | None = None):
        super().__init__(config, vision_model)
        self.classifier: nn.Linear | None = None
        if not isinstance(self.aggregator, ScoringAggregator):
            width = config.qformer_config.hidden_size if self.aggregator is None else self.aggregator.hidden_size
            self.classifier = nn.Linear(width, config.num_logits)
        self.post_init()
        self.freeze()

    @can_return_tuple
    def forward(
        self,
        image_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_coords: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> BagClassificationOutput:
        """Scores of bags.

        Args:
            image_embeds: (B, N, P, D), or
            pixel_values: (B, N, 3, h, w).
            image_mask: (B, N), 1 = real; padding stands at the end of a bag.
            image_coords: (B, N, 2), x and y of each image where they are known.
            labels: (B,), integers from 0 to C - 1.

        Raises:
            MivpgError: Shapes that do not fit together; the message has both.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise MivpgError("Pass either pixel_values or image_embeds.")
        if image_embeds is None:
            image_embeds = self.get_image_embeds(pixel_values, image_mask)
        if isinstance(self.aggregator, ScoringAggregator):
            images = self.get_pooled_images(image_embeds, image_mask)
            scores: BagScores = self.aggregator(images, image_mask, image_coords, labels)
            return BagClassificationOutput(scores.loss, scores.logits, scores.instance_scores)
        assert self.classifier is not None
        found = self.get_visual_prompts(image_embeds, image_mask, image_coords)
        mask = found.mask[..., None].to(found.embeds.dtype)  # (B, T, 1)
        logits = self.classifier((found.embeds * mask).sum(dim=1) / mask.sum(dim=1))
        loss = None if labels is None else classification_loss(logits, labels)
        attention = None if found.weights is None else found.weights.mean(dim=1)
        return BagClassificationOutput(loss, logits, None, attention)

    def score_instances(
        self, image_embeds: Tensor, image_mask: Tensor | None = None, image_coords: Tensor | None = None
    ) -> Tensor:
        """Logits of each instance (B, M, C), zero for padding.

        An aggregator defined by class scores has them; of every other it is what the model says of a bag that holds
        this instance alone.

        Args:
            image_embeds: (B, N, P, D).
            image_mask: (B, N), 1 = real.
            image_coords: (B, N, 2).
        """
        if isinstance(self.aggregator, ScoringAggregator):
            return self(image_embeds, image_mask=image_mask, image_coords=image_coords).instance_scores
        if self.config.aggregator == "linear_projection":  # its prompts are the instances, and none sees another
            assert self.classifier is not None
            prompts = self.get_visual_prompts(image_embeds, image_mask)
            return self.classifier(prompts.embeds).masked_fill(~prompts.mask.bool()[..., None], 0.0)
        if image_mask is None:
            image_mask = torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device)
        num_tokens = 1 if self.config.patch_pooling != "none" else image_embeds.shape[2]
        alone = gather_real(image_embeds, image_mask)  # (n, P, D)
        bags = alone[:, None] if num_tokens == 1 else alone.flatten(0, 1)[:, None, None]
        logits = torch.cat([self(part).logits for part in bags.split(4096)])  # a slide has more than memory holds
        logits = logits.unflatten(0, (len(alone), num_tokens))
        return scatter_real(logits, image_mask).flatten(1, 2)


def class_probabilities(logits: Tensor) -> Tensor:
    """(…, C) logits to (…, number of classes): of one logit, the probabilities of classes 0 and 1."""
    if logits.shape[-1] > 1:
        return logits.softmax(dim=-1)
    positive = logits.sigmoid()
    return torch.cat([1 - positive, positive], dim=-1)


# ── Small pieces ────────────────────────────────────────────────────────────────────────────────────────────────────


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters and none of them trains."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def find_trained(module: nn.Module, found: dict[nn.Module, bool | None]) -> dict[nn.Module, bool | None]:
    """Of a module and all that it holds, whether a parameter trains; None where it has no parameters."""
    trains = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
    for child in module.children():
        of_child = find_trained(child, found)[child]
        if of_child is not None:
            trains.append(of_child)
    found[module] = any(trains) if trains else None
    return found


def set_training(module: nn.Module, trained: dict[nn.Module, bool | None]) -> None:
    """Lets what a module holds be in training mode where it trains, or has no parameters and stands in what does.

    A trainer asks before every step, and setting an attribute of a module is slow, so what stands right is left alone.
    """
    for child in module.children():
        mode = trained[child] if trained[child] is not None else module.training
        if child.training != mode:
            child.train(mode)
        set_training(child, trained)


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
    "BagClassificationOutput",
    "MivpgForBagClassification",
    "MivpgForConditionalGeneration",
    "MivpgOutput",
    "MivpgPreTrainedModel",
    "MivpgQFormerModel",
    "VisualPrompts",
]
