"""Loading configurations, vision models, language models and tokenizers of transformers, with errors of one line.

transformers fills what a file lacks with random numbers and a warning; here a model that lacks weights is an error.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Blip2Config,
    Blip2VisionConfig,
    Blip2VisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from mivpg.configuration_mivpg import MivpgConfig, MivpgQFormerConfig
from mivpg.errors import MivpgError
from mivpg.files import DAMAGE

CONFIG_FIELDS = (
    "num_query_tokens",
    "image_token_index",
    "image_size",
    "patch_pooling",
    "pool_include_prefix",
    "aggregator",
    "aggregator_options",
    "trainable",
    "caption_end_token_id",
    "initializer_range",
)
"""Fields of `MivpgConfig` that a loader takes beside transformers' own arguments."""

NO_CODE = {"trust_remote_code": False}
"""For each `from_pretrained` of an Auto class: a folder's own code is not run, and nobody is asked whether to."""

HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only")

AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)  # transformers leaves it out of its list


@contextmanager
def loading(what: str, path: str | os.PathLike) -> Iterator[None]:
    """Says in one line where transformers found something missing or damaged.

    Raises:
        MivpgError: Instead of transformers' error.
    """
    try:
        yield
    except MivpgError:  # already one of ours, which are ValueErrors, too
        raise
    except (*DAMAGE, SafetensorError, StrictDataclassError) as error:
        raise MivpgError(f"{path}: {what} cannot be loaded: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What an error says: the first line of transformers' long ones, all of a configuration's two."""
    text = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else str(error)
    return text.splitlines()[0] if text else type(error).__name__


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say where on the Hub, and in the cache, files are looked for."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


# ── Configurations ──────────────────────────────────────────────────────────────────────────────────────────────────


def split_fields(kwargs: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Overrides for `MivpgConfig` ("model") and `MivpgQFormerConfig` ("qformer"), and what is left of `kwargs`."""
    fields: dict[str, dict[str, Any]] = {
        "model": {name: kwargs[name] for name in CONFIG_FIELDS if name in kwargs},
        "qformer": {name: kwargs[name] for name in MivpgQFormerConfig.options() if name in kwargs},
    }
    taken = fields["model"] | fields["qformer"]
    return fields, {name: value for name, value in kwargs.items() if name not in taken}


def load_auto_config(path: str | os.PathLike, **kwargs) -> PreTrainedConfig:
    """The configuration of any model of transformers.

    Raises:
        MivpgError: There is none.
    """
    check_is_model(path)
    with loading("the model's configuration", path):
        return AutoConfig.from_pretrained(path, **NO_CODE | kwargs)


def check_is_model(path: str | os.PathLike) -> None:
    """Refuses what is plainly no model before the Hub is asked for it, which takes half a minute without a network.

    Raises:
        MivpgError: A folder without `config.json`, a file, or no folder where the name can only be one's.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = f"; did you mean {folder / 'best'}?" if (folder / "best" / "config.json").is_file() else "."
            raise MivpgError(f"{folder} has no config.json, expected the folder of a model{hint}")
    elif folder.exists():
        raise MivpgError(f"{path} is a file, expected the folder of a model.")
    elif not is_hub_id(os.fspath(path)) or (folder.name != os.fspath(path) and folder.parent.is_dir()):
        raise MivpgError(f"{path} does not exist, expected the folder of a model or a Hub id.")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_config(path: str, kwargs: Mapping[str, Any]) -> tuple[MivpgConfig, dict[str, Any]]:
    """The configuration in a folder of ours or of BLIP-2's with the overrides in `kwargs`, and the other kwargs."""
    fields, rest = split_fields(kwargs)
    config = load_auto_config(path, **hub_arguments(rest))
    with loading("the model's configuration", path):
        if isinstance(config, Blip2Config):
            return MivpgConfig.from_blip2(config, **fields["model"], **fields["qformer"]), rest
        if not isinstance(config, MivpgConfig):
            raise MivpgError(f"{path}: a model of type {config.model_type!r}; BLIP-2 or MIVPG was expected.")
        values = config.to_dict() | fields["model"]
        values["qformer_config"] |= fields["qformer"]
        return MivpgConfig.from_dict(values), rest


# ── Models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_whole(model_class: Any, path: str | os.PathLike, *, may_lack: tuple[str, ...] = (), **kwargs) -> Any:
    """A model whose every weight came from its files.

    Args:
        model_class: An Auto class or a model's own.
        path: Folder or Hub id.
        may_lack: Beginnings of the names of weights that nothing here reads.
        **kwargs: For transformers.

    Raises:
        MivpgError: A weight is missing.
    """
    with loading("weights", path):
        model, info = model_class.from_pretrained(path, output_loading_info=True, **NO_CODE | kwargs)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(may_lack or ("\0",)))
    if missing:
        raise MivpgError(
            f"{path}: {len(missing)} weights of the {type(model).__name__} are missing, first {missing[0]}."
        )
    return model


def language_model_class(config: PreTrainedConfig) -> Any:
    """Decoder-only unless the configuration says otherwise (BLIP-2's own rule takes BART for decoder-only)."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_language_model(language: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """A causal or an encoder-decoder language model.

    Raises:
        MivpgError: There is none, it is another kind of model, or weights are missing.
    """
    config = load_auto_config(language, **hub_arguments(kwargs))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise MivpgError(f"{language}: a model of type {config.model_type!r}; a language model was expected.")
    return load_whole(language_model_class(config), language, **kwargs)


def load_tokenizer(path: str | os.PathLike, **kwargs) -> Any:
    """The tokenizer of a model.

    Raises:
        MivpgError: There is none; of a folder without one transformers makes a tokenizer that knows no word.
    """
    with loading("the tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE | kwargs)
    files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if Path(path).is_dir() and not any(Path(path, file).is_file() for file in files):
        raise MivpgError(f"{path} has no tokenizer, expected {' or '.join(files)}.")
    return tokenizer


def load_vision_model(vision: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """A vision model, or the vision tower of a model that has several (CLIP, SigLIP, BLIP-2).

    Raises:
        MivpgError: There is none, it is another kind of model, or weights are missing.
    """
    config = load_auto_config(vision, **hub_arguments(kwargs))
    tower = getattr(config, "vision_config", config)
    if type(tower) not in MODEL_MAPPING or MODEL_MAPPING[type(tower)].main_input_name != "pixel_values":
        raise MivpgError(f"{vision}: a model of type {config.model_type!r}; a vision model was expected.")
    if isinstance(config, Blip2Config):
        kwargs["key_mapping"] = {r"^vision_model\.": ""}
    # A classifier's ViT has no pooler, and the tokens do not need one.
    return load_whole(MODEL_MAPPING[type(tower)], vision, config=tower, may_lack=("pooler.",), **kwargs)


def vision_output_shape(config: PreTrainedConfig, num_prefix_tokens: int | None) -> tuple[int, int]:
    """Tokens before an image's patches, and the width D, by running the model on no data (PyTorch's meta device).

    Args:
        config: Of the vision model.
        num_prefix_tokens: Where it is known; else the tokens are counted and the patches taken away.

    Raises:
        MivpgError: The tokens are no grid of patches with something before it, so it has to be said.
    """
    size = getattr(config, "image_size", None) or 224  # a convolutional model has none, and takes any
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        output = AutoModel.from_config(config).eval()(torch.empty(1, 3, height, width)).last_hidden_state
    if output.ndim == 4:  # a feature map (1, D, rows, columns)
        return num_prefix_tokens or 0, output.shape[1]
    if num_prefix_tokens is None:
        patch = getattr(config, "patch_size", None)
        rows, columns = (patch, patch) if isinstance(patch, int) else patch or (height, width)
        num_patches = (height // rows) * (width // columns)
        num_prefix_tokens = output.shape[1] - num_patches
        if patch is None or num_prefix_tokens < 0:
            raise MivpgError(
                f"{config.model_type}: {output.shape[1]} tokens an image of {height} x {width}, patches of {patch}; "
                "num_prefix_tokens has to say how many tokens stand before the patches."
            )
    return num_prefix_tokens, output.shape[2]
