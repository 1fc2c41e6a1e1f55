"""What a MIVPG is made of: BLIP-2's configuration, and the options that the paper adds to its Q-Former."""

from collections.abc import Mapping
from typing import Any, Literal

import yaml
from huggingface_hub.dataclasses import strict
from transformers import AddedToken, AutoConfig, Blip2Config, Blip2QFormerConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from mivpg.errors import MivpgError

PatchPooling = Literal["none", "cls", "abmil", "gated_abmil", "mean", "max"]
InstanceCorrelation = Literal["none", "csa", "csa_constant", "self_attention", "induced", "nystrom"]
PositionEncoding = Literal["none", "ppeg"]

AggregatorName = Literal[
    "mivpg",
    "qformer_per_image",
    "linear_projection",
    "pooled_projection",
    "perceiver",
    "mean",
    "max",
    "mi_net",
    "abmil",
    "deep_sets",
    "set_transformer",
    "transmil",
    "mi_net_instances",
    "ds_mil",
    "dtfd_mil",
]
"""What turns a bag into visual prompts: MIVPG, or one of `mivpg.aggregators`, which it is compared with. The last three
are defined by class scores, so they classify bags and make no prompts."""

Q_FORMERS = ("mivpg", "qformer_per_image")
PROMPTS_PER_IMAGE = ("qformer_per_image", "linear_projection", "pooled_projection")

IMAGE_TOKEN = "<image>"
"""The mark that stands in a text for one visual prompt, as in BLIP-2."""

DEFAULT_TRAINABLE = (
    "qformer",
    "query_tokens",
    "language_projection",
    "patch_pooling",
    "instance_projection",
    "aggregator",
    "classifier",
)
"""What the paper trains ("we only update the MIVPG", section 4.1), with the two parts that BLIP-2 trains beside it, or
what stands in MIVPG's place."""


@strict
class MivpgQFormerConfig(Blip2QFormerConfig):
    r"""
    BLIP-2's Q-Former and what happens to the instances before each of its cross-attentions.

    encoder_hidden_size (`int`, *optional*):
        Width of the instances. Left out, it is the width of the image embeddings that `MivpgConfig` knows.
    instance_correlation (`str`, *optional*, defaults to `"csa"`):
        How the instances of a bag see each other. `csa` is the paper's Eq. 9; `self_attention` and `nystrom` are what
        it compares with; `induced` is Eq. 7 and 8 with learned points; `csa_constant` is the control for `csa`: its
        parameters, but keys and values are the learned queries, so that nothing flows between instances.
    position_encoding (`str`, *optional*, defaults to `"none"`):
        `ppeg`, the pyramid position encoding of TransMIL, adds where instances stand: on the patch grid, or at their
        coordinates. Pooled images without coordinates are placed in their order, which then matters.
    instances_carry_over (`bool`, *optional*, defaults to `True`):
        Whether a block goes on from the instances as the block before it has placed and correlated them. With `False`
        each begins again with those that left the patch pooling. The paper leaves it open.
    zero_init_residual (`bool`, *optional*, defaults to `True`):
        Whether what `instance_correlation` and `position_encoding` add starts at zero, so that an untrained MIVPG is
        the Q-Former on the same instances. With `False` the layers that write to the instances start as the Q-Former's
        others do, from N(0, `initializer_range`).
    num_inducing_points (`int`, *optional*, defaults to 32):
        M' of Eq. 7, read by `induced` alone.
    num_landmarks (`int`, *optional*, defaults to 256):
        Read by `nystrom` alone, as is `pinv_iterations` (defaults to 6); both are TransMIL's.
    """

    model_type = "mivpg_qformer"

    encoder_hidden_size: Any = None  # int, known at the latest when `MivpgConfig` holds this config
    instance_correlation: InstanceCorrelation = "csa"
    position_encoding: PositionEncoding = "none"
    instances_carry_over: bool = True
    zero_init_residual: bool = True
    num_inducing_points: int = 32
    num_landmarks: int = 256
    pinv_iterations: int = 6

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads != 0:
            raise MivpgError(
                f"qformer: hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads, "
                f"{self.num_attention_heads}."
            )

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The fields that this class adds to BLIP-2's."""
        return (
            "instance_correlation",
            "position_encoding",
            "instances_carry_over",
            "zero_init_residual",
            "num_inducing_points",
            "num_landmarks",
            "pinv_iterations",
        )


@strict
class MivpgConfig(PreTrainedConfig):
    r"""
    A vision model, the MIVPG and a language model.

    vision_config (`dict` or `PreTrainedConfig`, *optional*):
        `None` where image embeddings come from elsewhere; it stays `None` through saving and loading.
    qformer_config (`dict` or `MivpgQFormerConfig`, *optional*):
        The MIVPG itself.
    text_config (`dict` or `PreTrainedConfig`, *optional*):
        Any causal or encoder-decoder language model of transformers; `None` where bags are classified.
    num_query_tokens (`int`, *optional*, defaults to 32):
        R, the number of visual prompts a bag; an image, for aggregators that give prompts to each image.
    image_token_index (`int`, *optional*):
        Id of the image mark. It may lie outside the language model's vocabulary, which is never resized.
    image_embeds_size (`int`, *optional*):
        D, the width of the image embeddings; by default that of the vision model, else of the Q-Former.
        Where it is not what the Q-Former expects, the instances pass an `instance_projection`.
    num_prefix_tokens (`int`, *optional*, defaults to 1):
        Tokens before an image's patches: 1 for CLIP and BLIP-2, 0 for SigLIP, 5 for DINOv2 with registers.
    image_size (`int`, *optional*):
        Pixels a side where images are not of the vision model's own size; its positions are then interpolated, as in
        BLIP-2's fine-tuning at 364 pixels.
    patch_pooling (`str`, *optional*, defaults to `"none"`):
        How the P tokens of an image become one instance: `abmil` (Eq. 4), `gated_abmil`, `cls`, `mean` or `max`;
        with `none` every token is an instance.
    pool_include_prefix (`bool`, *optional*, defaults to `True`):
        Whether `abmil` and `gated_abmil` pool an image's prefix tokens (CLS) too, or its patches alone. The paper says
        no more than "patches".
    aggregator (`str`, *optional*, defaults to `"mivpg"`):
        What turns a bag into visual prompts. `mivpg` is the Q-Former with all options above, so also the Q-Former on
        concatenated patches; `qformer_per_image` runs it on each image alone and concatenates what it says;
        the others are `mivpg.aggregators`, whose prompts have the language model's width.
    aggregator_options (`dict`, *optional*):
        Arguments of the aggregator's class, for those in `mivpg.aggregators`.
    trainable (`list[str]`, *optional*, defaults to `DEFAULT_TRAINABLE`):
        Names of the modules and parameters that train, by default all but the vision model and the language model.
        Everything else is frozen and stays in eval mode; a checkpoint holds what this list names.
    caption_end_token_id (`int`, *optional*):
        The token that ends a caption, where the language model's own end-of-sequence token is not one that it writes.
    base (`dict`, *optional*):
        Where the weights that did not train come from, in a checkpoint: `{"model": {...}}`, or `{"vision_model": {...},
        "language_model": {...}}`, each with `path`, `revision` and `sha256` by file name.
    initializer_range (`float`, *optional*, defaults to 0.02):
        Standard deviation of new query tokens, and of a new patch pooling, projection or classifier; `qformer_config`
        has its own for the Q-Former.
    """

    model_type = "mivpg"
    attribute_map = {"image_token_id": "image_token_index"}  # noqa: RUF012, transformers' own attribute
    sub_configs_defaults = {  # noqa: RUF012
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="blip_2_vision_model", optional=True),
        "qformer_config": SubConfigSpec(config_class=MivpgQFormerConfig),
    }

    vision_config: Any = None  # PreTrainedConfig after initialisation, as the two below
    qformer_config: Any = None
    text_config: Any = None
    num_query_tokens: int = 32
    image_token_index: int | None = None
    image_embeds_size: Any = None  # int after initialisation
    num_prefix_tokens: int = 1
    image_size: int | None = None
    patch_pooling: PatchPooling = "none"
    pool_include_prefix: bool = True
    aggregator: AggregatorName = "mivpg"
    aggregator_options: dict[str, Any] | None = None
    trainable: list[str] | tuple[str, ...] = DEFAULT_TRAINABLE
    caption_end_token_id: int | None = None
    base: dict[str, Any] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.is_encoder_decoder = self.text_config is not None and self.text_config.is_encoder_decoder
        self.trainable = list(self.trainable)
        if self.num_query_tokens < 1:
            raise MivpgError(f"num_query_tokens is {self.num_query_tokens}, expected at least 1.")
        if self.image_embeds_size is None:
            if self.vision_config is not None:
                self.image_embeds_size = self.vision_config.hidden_size
            else:
                self.image_embeds_size = (
                    self.qformer_config.encoder_hidden_size or Blip2QFormerConfig.encoder_hidden_size
                )
        if self.qformer_config.encoder_hidden_size is None:
            self.qformer_config.encoder_hidden_size = self.image_embeds_size
        if self.aggregator not in Q_FORMERS and self.qformer_config.position_encoding != "none":
            raise MivpgError(f"position_encoding is MIVPG's; aggregator {self.aggregator!r} does not read it.")
        if self.aggregator_options and self.aggregator in Q_FORMERS:
            raise MivpgError(f"aggregator_options are for mivpg.aggregators; {self.aggregator} has qformer_config.")
        if self.patch_pooling == "cls" and self.num_prefix_tokens == 0:
            raise MivpgError(
                "patch_pooling='cls' takes an image's first token, but num_prefix_tokens is 0: "
                "this vision model has no CLS token. Use abmil, mean or max."
            )
        if not self.pool_include_prefix and self.patch_pooling not in ("abmil", "gated_abmil"):
            raise MivpgError(
                f"pool_include_prefix is False, but patch_pooling={self.patch_pooling!r} does not read it: "
                "abmil and gated_abmil do."
            )

    @property
    def num_logits(self) -> int:
        """C of a classifier of bags: one for two classes."""
        return 1 if self.num_labels <= 2 else self.num_labels

    @property
    def prompts_per_image(self) -> bool:
        """Whether the number of visual prompts grows with the number of images."""
        return self.aggregator in PROMPTS_PER_IMAGE

    @property
    def end_token_id(self) -> int | None:
        """The token that ends a caption."""
        if self.caption_end_token_id is not None:
            return self.caption_end_token_id
        if self.text_config is None:
            return None
        end = self.text_config.eos_token_id
        return end[0] if isinstance(end, list) else end

    @classmethod
    def from_blip2(cls, config: Blip2Config, **options) -> "MivpgConfig":
        """The same model with MIVPG's options, which go to the config that reads each."""
        qformer_options = {name: options.pop(name) for name in MivpgQFormerConfig.options() if name in options}
        qformer_config = {k: v for k, v in config.qformer_config.to_dict().items() if k != "model_type"}
        return cls(
            vision_config=config.vision_config.to_dict(),
            qformer_config=qformer_config | qformer_options,
            text_config=config.text_config.to_dict(),
            **{
                "num_query_tokens": config.num_query_tokens,
                "image_token_index": config.image_token_index,
                "dtype": config.dtype,
            }
            | options,
        )


def plain_options(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Options as they are meant: those of a YAML file or a command line arrive as texts ("false", "8")."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return yaml.safe_load(value) if isinstance(value, str) else value

    return None if options is None else {name.replace("-", "_"): plain(value) for name, value in options.items()}


def add_image_token(tokenizer) -> int:
    """Id of the image mark, which a tokenizer without one gets; the language model is not resized for it."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


__all__ = ["MivpgConfig", "MivpgQFormerConfig"]
