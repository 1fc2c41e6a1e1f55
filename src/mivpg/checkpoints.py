"""Where a model's weights come from: BLIP-2 folders, pairs of models, whole models of ours, and checkpoints.

A checkpoint holds what trained (`model.safetensors`) and, in `config.json`, where the rest comes from: under `base`
each part, `model` or `vision_model` and `language_model`, is `{"path": folder or Hub id, "revision": commit or None,
"sha256": {file name: digest}}`. Plain transformers would fill what is missing with random numbers and a warning.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
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
from transformers.utils import cached_file

from mivpg.configuration_mivpg import MivpgConfig, MivpgQFormerConfig, add_image_token
from mivpg.errors import MivpgError

FROZEN_PARTS = ("vision_model", "language_model")

CONFIG_FIELDS = (
    "num_query_tokens",
    "image_token_index",
    "patch_pooling",
    "trainable",
    "caption_end_token_id",
    "initializer_range",
)
"""Fields of `MivpgConfig` that a loader takes beside transformers' own arguments."""

HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "subfolder")


class CheckpointMixin(PreTrainedModel):
    """Loading and saving of a model whose frozen parts lie elsewhere."""

    config: MivpgConfig
    _names_outside_base: frozenset[str] = frozenset()
    """Parameters that the base lacks: they were made new, so a checkpoint holds them even where they do not train."""
    _names_drawn: frozenset[str] = frozenset()
    """Parameters among them that no file held: they were drawn at random, and start without effect."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, base=None, **kwargs):
        """Loads a BLIP-2 folder, a checkpoint of ours (with the base it names), or a whole model of ours.

        Args:
            pretrained_model_name_or_path: A folder or a Hub id.
            config: Instead of the folder's own.
            base: For a checkpoint whose base has moved: where it is now, by part, e.g. `{"model": "path"}`.
            **kwargs: All that transformers takes (`dtype`, `device_map`, `quantization_config`, …), and fields of
                `MivpgConfig` and `MivpgQFormerConfig` to override, e.g. `instance_correlation="csa"`.

        Raises:
            MivpgError: The folder holds no model that we know, weights of the frozen models are missing, or a
                checkpoint's base is absent or differs.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if config is None:
            config, kwargs = load_config(path, kwargs)
        if config.base is not None:
            return cls._from_checkpoint(path, config, base or {}, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        with loading("weights", path):
            model, info = super().from_pretrained(path, *model_args, config=config, output_loading_info=True, **kwargs)
        missing = frozenset(info["missing_keys"])
        if frozen := sorted(name for name in missing if name.split(".")[0] in FROZEN_PARTS):
            raise MivpgError(f"{path}: {len(frozen)} weights of the frozen models are missing, first {frozen[0]}.")
        model.freeze()
        model._names_outside_base = model._names_drawn = missing
        model.config.base = {"model": locate_base(path, kwargs.get("revision"))}
        return (model, info) if wants_info else model

    @classmethod
    def from_vision_language_pretrained(
        cls,
        vision: str | os.PathLike | None,
        language: str | os.PathLike,
        *,
        image_embeds_size: int | None = None,
        num_prefix_tokens: int | None = None,
        qformer_config: MivpgQFormerConfig | Mapping[str, Any] | None = None,
        **kwargs,
    ) -> Self:
        """A new MIVPG between any vision and any language model of transformers.

        Args:
            vision: Folder or Hub id of a model with a fixed number of tokens an image, or a feature map (a ResNet's);
                of one with several towers (CLIP) the vision tower is taken. None: image embeddings come from elsewhere.
            language: Folder or Hub id of a causal or an encoder-decoder language model with its tokenizer.
            image_embeds_size: D, needed where there is no vision model.
            num_prefix_tokens: By default counted: the vision model's tokens less its patches.
            qformer_config: Sizes of the new Q-Former; its instances get the width D.
            **kwargs: Fields of `MivpgConfig` and `MivpgQFormerConfig`; the rest (`dtype`, `device_map`,
                `quantization_config`, …) goes to transformers for both models.

        Raises:
            MivpgError: There is no such model, or neither a vision model nor `image_embeds_size`.
        """
        fields, kwargs = split_fields(kwargs)
        vision_model = None
        if vision is not None:
            vision_model = load_vision_model(vision, **kwargs)
            num_tokens, num_patches, image_embeds_size = vision_output_shape(vision_model.config)
            if num_prefix_tokens is None:
                num_prefix_tokens = num_tokens - num_patches
        elif image_embeds_size is None:
            raise MivpgError("Without a vision model, image_embeds_size has to say how wide the image embeddings are.")
        language_model = load_language_model(language, **kwargs)
        if isinstance(qformer_config, MivpgQFormerConfig):
            qformer_config = qformer_config.to_dict()
        config = MivpgConfig(
            vision_config=None if vision_model is None else vision_model.config.to_dict(),
            qformer_config=dict(qformer_config or {}) | fields["qformer"],
            text_config=language_model.config.to_dict(),
            image_embeds_size=image_embeds_size,
            num_prefix_tokens=1 if num_prefix_tokens is None else num_prefix_tokens,
            **{"image_token_index": add_image_token(load_tokenizer(language))} | fields["model"],
        )
        model = cls._around(config, vision_model, language_model, kwargs)
        model.config.base = {"language_model": locate_base(language, None)}
        if vision is not None:
            model.config.base["vision_model"] = locate_base(vision, None)
        return model

    @classmethod
    def _around(
        cls,
        config: MivpgConfig,
        vision_model: PreTrainedModel | None,
        language_model: PreTrainedModel,
        loading_kwargs: Mapping[str, Any],
    ) -> Self:
        """A new MIVPG around models that are loaded."""
        if "attn_implementation" in loading_kwargs:
            config._attn_implementation = loading_kwargs["attn_implementation"]
        model = cls(config, vision_model=vision_model, language_model=language_model).eval()
        device = language_model.device
        for name, child in model.named_children():
            if name not in FROZEN_PARTS:
                child.to(device)
        model.query_tokens.data = model.query_tokens.data.to(device)
        names = (name for name, _ in model.named_parameters())
        model._names_outside_base = frozenset(name for name in names if name.split(".")[0] not in FROZEN_PARTS)
        model._names_drawn = model._names_outside_base
        return model

    @classmethod
    def _from_checkpoint(cls, path: str, config: MivpgConfig, moved: Mapping[str, str], kwargs: dict[str, Any]) -> Self:
        """The base that a checkpoint names, checked, and over it the weights that trained."""
        assert config.base is not None
        base = {
            part: entry | {"path": os.fspath(moved.get(part, entry["path"]))} for part, entry in config.base.items()
        }
        for part, entry in base.items():
            verify_base(path, part, entry)
        hub_arguments = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        config.base = None
        if "model" in base:
            entry = base["model"]
            model = cls.from_pretrained(entry["path"], config=config, revision=entry["revision"] or "main", **kwargs)
        else:
            vision_model = None
            if "vision_model" in base:
                entry = base["vision_model"]
                vision_model = load_vision_model(entry["path"], revision=entry["revision"] or "main", **kwargs)
            entry = base["language_model"]
            language_model = load_language_model(entry["path"], revision=entry["revision"] or "main", **kwargs)
            model = cls._around(config, vision_model, language_model, kwargs)
        model.config.base = base
        model.load_trained(path, **hub_arguments)
        return model

    def saved_names(self) -> set[str]:
        """Names of the parameters that a checkpoint holds: what trains, and what the base does not have."""
        return {name for name, _ in self.named_parameters() if self.trains(name)} | self._names_outside_base

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The weights that a checkpoint holds."""
        names = self.saved_names()
        return {name: parameter.detach() for name, parameter in self.named_parameters() if name in names}

    def save_trained(self, directory: str | os.PathLike, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes a checkpoint: what trained, and in `config.json` which base the rest comes from.

        Args:
            directory: Made where it does not exist.
            state_dict: The weights where the model does not hold them whole (FSDP); by default `trained_state_dict()`.

        Raises:
            MivpgError: The model has no base that could be named; `save_pretrained` writes all of it.
        """
        if self.config.base is None:
            raise MivpgError(f"{directory}: this model was loaded from nowhere; save it whole with save_pretrained.")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.config.base = describe_base(self.config.base)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(directory)
        self.generation_config.save_pretrained(directory)
        weights = self.trained_state_dict() if state_dict is None else state_dict
        names = self.saved_names()
        weights = {name: weight.contiguous() for name, weight in weights.items() if name in names}
        file = directory / "model.safetensors"
        save_file(weights, file, metadata={"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        file.chmod(0o666 & ~mask)  # safetensors writes 0600

    def load_trained(self, directory: str | os.PathLike, **hub_arguments) -> None:
        """Loads the weights of a checkpoint into this model.

        Raises:
            MivpgError: There are none, one is missing, or one is there that the model has no place for.
        """
        with loading("trained weights", directory):
            file = cached_file(os.fspath(directory), "model.safetensors", **hub_arguments)
            weights = load_file(file)
        if missing := sorted(self.saved_names() - weights.keys()):
            raise MivpgError(f"{file}: {len(missing)} trained weights are missing, first {missing[0]}.")
        if unknown := sorted(weights.keys() - {name for name, _ in self.named_parameters()}):
            raise MivpgError(f"{file}: {len(unknown)} weights have no place in this model, first {unknown[0]}.")
        self.load_state_dict(weights, strict=False)
        self._names_outside_base |= (
            weights.keys()
        )  # once trained they differ from the base, also where they no longer train
        self._names_drawn -= weights.keys()

    def fingerprint(self) -> str:
        """A digest of the weights that a checkpoint holds, as far as they came from files; the base tells the rest."""
        sha256 = hashlib.sha256()
        for name, weight in sorted(self.trained_state_dict().items()):
            if name not in self._names_drawn:
                sha256.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return sha256.hexdigest()

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Writes the whole model, base and all, for sharing; `save_trained` writes only what trained."""
        base, self.config.base = self.config.base, None
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.base = base


# ── Configurations and models of transformers ───────────────────────────────────────────────────────────────────────


def split_fields(kwargs: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Overrides for `MivpgConfig` ("model") and `MivpgQFormerConfig` ("qformer"), and what is left of `kwargs`."""
    fields: dict[str, dict[str, Any]] = {
        "model": {name: kwargs[name] for name in CONFIG_FIELDS if name in kwargs},
        "qformer": {name: kwargs[name] for name in MivpgQFormerConfig.options() if name in kwargs},
    }
    taken = fields["model"] | fields["qformer"]
    return fields, {name: value for name, value in kwargs.items() if name not in taken}


def load_auto_config(path: str | os.PathLike, **hub_arguments) -> PreTrainedConfig:
    """The configuration of any model of transformers.

    Raises:
        MivpgError: There is none.
    """
    check_is_model(path, hub_arguments.get("subfolder", ""))
    with loading("the model's configuration", path):
        return AutoConfig.from_pretrained(path, **hub_arguments)


def check_is_model(path: str | os.PathLike, subfolder: str = "") -> None:
    """Refuses what is plainly no model before the Hub is asked for it, which takes half a minute without a network.

    Raises:
        MivpgError: A folder without `config.json`, a file, or no folder where the name can only be one's.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / subfolder / "config.json").is_file():
            raise MivpgError(f"{folder} has no {Path(subfolder, 'config.json')}, expected the folder of a model.")
    elif folder.exists():
        raise MivpgError(f"{path} is a file, expected the folder of a model.")
    elif not _is_hub_id(os.fspath(path)) or (folder.name != os.fspath(path) and folder.parent.is_dir()):
        raise MivpgError(f"{path} does not exist, expected the folder of a model or a Hub id.")


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_config(path: str, kwargs: Mapping[str, Any]) -> tuple[MivpgConfig, dict[str, Any]]:
    """The configuration in a folder of ours or of BLIP-2's with the overrides in `kwargs`, and the other kwargs."""
    fields, rest = split_fields(kwargs)
    config = load_auto_config(path, **{name: rest[name] for name in HUB_ARGUMENTS if name in rest})
    if isinstance(config, Blip2Config):
        return MivpgConfig.from_blip2(config, **fields["model"], **fields["qformer"]), rest
    if not isinstance(config, MivpgConfig):
        raise MivpgError(f"{path}: a model of type {config.model_type!r}; BLIP-2 or MIVPG was expected.")
    for name, value in fields["model"].items():
        setattr(config, name, value)
    for name, value in fields["qformer"].items():
        setattr(config.qformer_config, name, value)
    return config, rest


def language_model_class(config: PreTrainedConfig) -> Any:
    """Decoder-only unless the configuration says otherwise (BLIP-2's own rule takes BART for decoder-only)."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_language_model(language: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """A causal or an encoder-decoder language model.

    Raises:
        MivpgError: There is none, or it is another kind of model.
    """
    config = load_auto_config(language, **{name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise MivpgError(f"{language}: a model of type {config.model_type!r}; a language model was expected.")
    with loading("weights", language):
        return language_model_class(config).from_pretrained(language, **kwargs)


def load_tokenizer(path: str | os.PathLike, **kwargs) -> Any:
    """The tokenizer of a model.

    Raises:
        MivpgError: There is none; of a folder without one transformers makes a tokenizer that knows no word.
    """
    with loading("the tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if Path(path).is_dir() and not any(Path(path, file).is_file() for file in files):
        raise MivpgError(f"{path} has no tokenizer, expected {' or '.join(files)}.")
    return tokenizer


def load_vision_model(vision: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """A vision model, or the vision tower of a model that has several.

    Raises:
        MivpgError: There is none, or it is another kind of model.
    """
    config = load_auto_config(vision, **{name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
    tower = getattr(config, "vision_config", config)
    if type(tower) not in MODEL_MAPPING or MODEL_MAPPING[type(tower)].main_input_name != "pixel_values":
        raise MivpgError(f"{vision}: a model of type {config.model_type!r}; a vision model was expected.")
    with loading("weights", vision):
        return MODEL_MAPPING[type(tower)].from_pretrained(vision, config=tower, **kwargs)


def vision_output_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Tokens an image, patches among them, and width D, by running the model on no data (PyTorch's meta device)."""
    size = getattr(config, "image_size", None) or 224  # a convolutional model has none, and takes any
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        output = model(torch.empty(1, 3, height, width)).last_hidden_state
    if output.ndim == 4:  # a feature map (1, D, rows, columns)
        num_tokens = output.shape[2] * output.shape[3]
        return num_tokens, num_tokens, output.shape[1]
    patch = config.patch_size
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return output.shape[1], (height // rows) * (width // columns), output.shape[2]


AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)  # transformers leaves it out of its list


# ── The base of a checkpoint ────────────────────────────────────────────────────────────────────────────────────────


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
    except (OSError, ValueError, SafetensorError) as error:
        raise MivpgError(f"{path}: {what} cannot be loaded: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's text; transformers' go on for many."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def locate_base(name_or_path: str | os.PathLike, revision: str | None) -> dict[str, Any]:
    """The entry for a model just loaded: its folder made absolute, or its Hub id with the commit that is cached."""
    if Path(name_or_path).is_dir():
        return {"path": str(Path(name_or_path).resolve()), "revision": None}
    folder = snapshot_download(os.fspath(name_or_path), revision=revision, local_files_only=True)
    return {"path": os.fspath(name_or_path), "revision": Path(folder).name}


def describe_base(base: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries with the digests of their weight files, for writing into a checkpoint."""
    return {
        part: {"path": entry["path"], "revision": entry["revision"], "sha256": entry.get("sha256") or digests(entry)}
        for part, entry in base.items()
    }


def verify_base(checkpoint: str, part: str, entry: Mapping[str, Any]) -> None:
    """Checks that a part of a checkpoint's base is there and is what the checkpoint was trained on.

    Raises:
        MivpgError: It is absent or differs; names the path looked for.
    """
    remedy = f"Put it back, or pass base={{{part!r}: path}} to from_pretrained."
    try:
        found = digests(entry)
    except (FileNotFoundError, LocalEntryNotFoundError, HFValidationError) as error:
        raise MivpgError(f"{checkpoint}: its base {entry['path']} ({part}) is not there. {remedy}") from error
    expected = entry["sha256"]
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise MivpgError(f"{checkpoint}: its base {entry['path']} ({part}) lacks {name}. {remedy}")
        if found[name] != expected.get(name):
            raise MivpgError(
                f"{checkpoint}: its base {entry['path']} ({part}) is another one: sha256 of {name} is "
                f"{found[name][:12]}…, the checkpoint was trained on {expected.get(name, 'nothing')[:12]}…. {remedy}"
            )


def digests(entry: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of each weight file of a base, by file name."""
    folder = Path(entry["path"])
    if not folder.is_dir():
        folder = Path(snapshot_download(entry["path"], revision=entry["revision"], local_files_only=True))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(folder)
    return {file.name: digest(file.resolve(), file.stat().st_mtime_ns, file.stat().st_size) for file in files}


@functools.cache
def digest(file: Path, modified: int, size: int) -> str:
    """sha256 of a file; read once while its time and size stay."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
