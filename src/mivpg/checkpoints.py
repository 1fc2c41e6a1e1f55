"""Where a model's weights come from: BLIP-2 folders, pairs of models, whole models of ours, and checkpoints.

A checkpoint holds what trained (`model.safetensors`) and, in `config.json`, where the rest comes from: under `base`
each part, `model` or `vision_model` and `language_model`, is `{"path": folder or Hub id, "revision": commit or None,
"sha256": {file name: digest}, "stat": {file name: [bytes, time]}}`. A commit pins a model on the Hub; a folder's files
are read again only where their size or time has changed.
"""

import copy
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from mivpg.configuration_mivpg import MivpgConfig, MivpgQFormerConfig, add_image_token
from mivpg.errors import MivpgError
from mivpg.loading import (
    hub_arguments,
    load_config,
    load_language_model,
    load_tokenizer,
    load_vision_model,
    loading,
    split_fields,
    vision_output_shape,
)
from mivpg.model_card import CARD, Training, is_made, read_training, write_model_card

FROZEN_PARTS = ("vision_model", "language_model")


class CardMixin(PreTrainedModel):
    """A model that is saved whole with its card, on disk and on the Hub."""

    config: MivpgConfig
    _training: Training | None = None
    """What the card beside the weights that this was loaded from knows of its training."""
    _base_of_card: Mapping[str, Mapping[str, Any]] | None = None
    """The base, while `save_pretrained` keeps it out of `config.json`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As transformers', and remembers what the card of the folder, or of the model on the Hub, knows."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # the other is what `output_loading_info` asks for
        if pretrained_model_name_or_path is not None:  # else the weights are given
            model._training = find_training(pretrained_model_name_or_path, **hub_arguments(kwargs))
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        """Writes the whole model, base and all, for sharing; a captioner's `save_trained` writes only what trained."""
        self._base_of_card, self.config.base = self.config.base, None
        try:
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            if is_main_process:
                self._write_card(Path(save_directory), self._training)
        finally:
            self._base_of_card, self.config.base = None, self._base_of_card

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """What transformers calls to send a folder to the Hub, by `push_to_hub` and by `save_pretrained`.

        Into the folder it has put the card that it found there, maybe that of another training, or one that it made up
        itself. Ours takes that one's place, and its tags, which are those that the caller named. A model that knows
        nothing of its training takes over what the card there knows, and leaves one alone that somebody wrote by hand.
        """
        card = Path(working_dir) / CARD
        training = self._training or read_training(card.parent)
        if training is not None or is_made(card.parent):
            self._write_card(card.parent, training, tags=(metadata_load(card) or {}).get("tags") or [])
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _write_card(self, folder: Path, training: Training | None, tags: Sequence[str] = ()) -> None:
        base = self._base_of_card or self.config.base
        write_model_card(folder, self.config, base, is_whole=True, training=training, was_loaded=True, more_tags=tags)


def find_training(name_or_path: str | os.PathLike, **hub: Any) -> Training | None:
    """What the card of a folder or of a model on the Hub knows; None also where there is no card to be had.

    Args:
        name_or_path: As for `from_pretrained`.
        **hub: transformers' arguments for the Hub.
    """
    try:
        card = cached_file(os.fspath(name_or_path), CARD, **hub)
    except OSError:  # no card, or no network: neither keeps a model from being loaded
        return None
    return None if card is None else read_training(Path(card).parent)


class CheckpointMixin(CardMixin):
    """Loading and saving of a model whose frozen parts lie elsewhere; what is frozen, `MivpgVisualPromptModel` says."""

    _names_outside_base: frozenset[str] = frozenset()
    """Weights that the base lacks: they were made new, so a checkpoint holds them even where they do not train."""
    _names_drawn: frozenset[str] = frozenset()
    """Weights among them that no file held: they were drawn at random, and start without effect."""

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
        wants_info = kwargs.pop("output_loading_info", False)
        if config.base is not None:
            own_hub_arguments = hub_arguments(kwargs)
            model = cls._from_checkpoint(path, copy.deepcopy(config), base or {}, kwargs)
            model._training = find_training(path, **own_hub_arguments)
            return (model, {"missing_keys": set(), "unexpected_keys": set()}) if wants_info else model
        with loading("weights", path):
            model, info = super().from_pretrained(path, *model_args, config=config, output_loading_info=True, **kwargs)
        missing = frozenset(info["missing_keys"])
        if frozen := sorted(name for name in missing if name.split(".")[0] in FROZEN_PARTS):
            raise MivpgError(f"{path}: {len(frozen)} weights of the frozen models are missing, first {frozen[0]}.")
        if PreTrainedConfig.get_config_dict(path, **hub_arguments(kwargs))[0]["model_type"] == MivpgConfig.model_type:
            model.language_model.generation_config = model.generation_config
        else:  # BLIP-2 writes captions as its language model's own settings say
            model.generation_config = model.language_model.generation_config
        model.freeze()
        model._names_outside_base = model._names_drawn = missing
        model.config.base = {"model": locate_base(path, **hub_arguments(kwargs))}
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
        vision_revision: str | None = None,
        language_revision: str | None = None,
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
            vision_revision: On the Hub; by default `main`.
            language_revision: Likewise.
            **kwargs: Fields of `MivpgConfig` and `MivpgQFormerConfig`; the rest (`dtype`, `device_map`,
                `quantization_config`, …) goes to transformers for both models.

        Raises:
            MivpgError: There is no such model, weights are missing, a field has a value that it cannot have, or neither
                a vision model nor `image_embeds_size` is given.
        """
        fields, kwargs = split_fields(kwargs)
        vision_model = None
        if vision is not None:
            vision_model = load_vision_model(vision, **with_revision(kwargs, vision_revision))
            num_prefix_tokens, image_embeds_size = vision_output_shape(vision_model.config, num_prefix_tokens)
        elif image_embeds_size is None:
            raise MivpgError("Without a vision model, image_embeds_size has to say how wide the image embeddings are.")
        language_kwargs = with_revision(kwargs, language_revision)
        language_model = load_language_model(language, **language_kwargs)
        tokenizer = load_tokenizer(language, **hub_arguments(language_kwargs))
        text_config = language_model.config
        known = {"image_token_index": add_image_token(tokenizer)}
        if text_config.eos_token_id is None:
            known["caption_end_token_id"] = tokenizer.eos_token_id
        if isinstance(qformer_config, MivpgQFormerConfig):
            qformer_config = qformer_config.to_dict()
        with loading("the configuration", language):
            config = MivpgConfig(
                vision_config=None if vision_model is None else vision_model.config.to_dict(),
                qformer_config=dict(qformer_config or {}) | fields["qformer"],
                text_config=text_config.to_dict(),
                image_embeds_size=image_embeds_size,
                num_prefix_tokens=1 if num_prefix_tokens is None else num_prefix_tokens,
                dtype=language_model.dtype,
                **known | fields["model"],
            )
        model = cls._around(config, vision_model, language_model, kwargs)
        model.config.base = {"language_model": locate_base(language, **hub_arguments(language_kwargs))}
        if vision is not None:
            vision_hub = hub_arguments(with_revision(kwargs, vision_revision))
            model.config.base["vision_model"] = locate_base(vision, **vision_hub)
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
        if model.query_tokens is not None:
            model.query_tokens.data = model.query_tokens.data.to(device)
        model.generation_config = language_model.generation_config
        names = (name for name in model.stored_tensors() if name.split(".")[0] not in FROZEN_PARTS)
        model._names_outside_base = model._names_drawn = frozenset(names)
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
        own_hub_arguments = hub_arguments(kwargs)
        kwargs.pop("revision", None)
        config.base = None

        def options(part: str) -> dict[str, Any]:
            return with_revision(kwargs, base[part]["revision"])

        if "model" in base:
            model = cls.from_pretrained(base["model"]["path"], config=config, **options("model"))
        else:
            vision_model = None
            if "vision_model" in base:
                vision_model = load_vision_model(base["vision_model"]["path"], **options("vision_model"))
            language_model = load_language_model(base["language_model"]["path"], **options("language_model"))
            model = cls._around(config, vision_model, language_model, kwargs)
        model.config.base = base
        model.load_trained(path, **own_hub_arguments)
        return model

    # Saving.

    def stored_tensors(self) -> dict[str, Tensor]:
        """Parameters and the buffers that belong to a model's state (a BatchNorm's statistics), each once."""
        state = self.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.named_buffers() if name in state}
        return dict(self.named_parameters()) | buffers

    def saved_names(self) -> set[str]:
        """Names of what a checkpoint holds: what trains, and what the base does not have."""
        return {name for name in self.stored_tensors() if self.trains(name)} | self._names_outside_base

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The weights that a checkpoint holds."""
        names = self.saved_names()
        return {name: tensor.detach() for name, tensor in self.stored_tensors().items() if name in names}

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
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # says how the base was loaded, not what it is
        config.save_pretrained(directory)
        self.generation_config.save_pretrained(directory)
        weights = self.trained_state_dict() if state_dict is None else state_dict
        names = self.saved_names()
        weights = {name: weight.contiguous() for name, weight in weights.items() if name in names}
        file = directory / "model.safetensors"
        save_file(weights, file, metadata={"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        file.chmod(0o666 & ~mask)  # safetensors writes 0600
        write_model_card(directory, config, config.base, is_whole=False, training=None)  # a run says more at its end

    def load_trained(self, directory: str | os.PathLike, **hub: Any) -> None:
        """Loads the weights of a checkpoint into this model.

        Args:
            directory: A folder, or a Hub id with transformers' arguments for it in `hub`.

        Raises:
            MivpgError: There are none, one is missing, or one is there that the model has no place for.
        """
        with loading("trained weights", directory):
            file = cached_file(os.fspath(directory), "model.safetensors", **hub)
            weights = load_file(file)
            trained = MivpgConfig.from_pretrained(directory, **hub).trainable  # then; now it may be another list
        tensors = self.stored_tensors()
        expected = {name for name in tensors if is_named(name, trained)} | self._names_outside_base
        if missing := sorted(expected - weights.keys()):
            raise MivpgError(f"{file}: {len(missing)} trained weights are missing, first {missing[0]}.")
        for name, weight in weights.items():
            if name not in tensors:
                raise MivpgError(f"{file}: the model has no place for {name}; it was trained with other options.")
            if weight.shape != tensors[name].shape:
                raise MivpgError(
                    f"{file}: {name} is {tuple(weight.shape)}, the model's {tuple(tensors[name].shape)}; "
                    "it was trained with other options."
                )
        if isinstance(self, FSDPModule):  # each process holds a part of every weight
            # A copy, to which the model's other weights are added.
            set_model_state_dict(self, dict(weights), options=StateDictOptions(full_state_dict=True, strict=False))
        else:
            self.load_state_dict(weights, strict=False)
        # Once trained they differ from the base, also where they no longer train.
        self._names_outside_base |= weights.keys()
        self._names_drawn -= weights.keys()

    def fingerprint(self) -> str:
        """A digest of the weights that a checkpoint holds, as far as they came from files; the base tells the rest."""
        sha256 = hashlib.sha256()
        for name, weight in sorted(self.trained_state_dict().items()):
            if name not in self._names_drawn:
                sha256.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return sha256.hexdigest()


def is_named(name: str, parts: Iterable[str]) -> bool:
    """Whether a weight is in a list of names, by itself or by a module that holds it."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


# ── The base of a checkpoint ────────────────────────────────────────────────────────────────────────────────────────


def with_revision(kwargs: Mapping[str, Any], revision: str | None) -> dict[str, Any]:
    """The arguments for one of several models, which share all but their revision."""
    return dict(kwargs) if revision is None else {**kwargs, "revision": revision}


def locate_base(name_or_path: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """The entry for a model just loaded: its folder made absolute, or its Hub id with the commit that was loaded."""
    if Path(name_or_path).is_dir():
        return {"path": str(Path(name_or_path).resolve()), "revision": None}
    file = cached_file(os.fspath(name_or_path), "config.json", **hub)
    return {"path": os.fspath(name_or_path), "revision": Path(file).parent.name}


def describe_base(base: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries with the digests of their weight files, for writing into a checkpoint."""
    described = {}
    for part, entry in base.items():
        folder = Path(entry["path"])
        files = weight_files(folder) if entry["revision"] is None and "sha256" not in entry else []
        described[part] = dict(entry) | {
            "sha256": {file.name: digest(file.resolve(), *stat(file)) for file in files} or entry.get("sha256", {}),
            "stat": {file.name: stat(file) for file in files} or entry.get("stat", {}),
        }
    return described


def verify_base(checkpoint: str, part: str, entry: Mapping[str, Any]) -> None:
    """Checks that a part of a checkpoint's base is there and is what the checkpoint was trained on.

    A model on the Hub is pinned by its commit, and looked for when it is loaded.

    Raises:
        MivpgError: It is absent or differs; names the path looked for.
    """
    if entry["revision"] is not None:
        return
    folder = Path(entry["path"])
    remedy = f"Put it back, or pass base={{{part!r}: path}} to from_pretrained."
    if not folder.is_dir():
        raise MivpgError(f"{checkpoint}: its base {folder} ({part}) is not there. {remedy}")
    for name, expected in entry["sha256"].items():
        file = folder / name
        if not file.is_file():
            raise MivpgError(f"{checkpoint}: its base {folder} ({part}) lacks {name}. {remedy}")
        if stat(file) == entry["stat"].get(name):
            continue
        if (found := digest(file.resolve(), *stat(file))) != expected:
            raise MivpgError(
                f"{checkpoint}: its base {folder} ({part}) is another one: sha256 of {name} is {found[:12]}…, the "
                f"checkpoint was trained on {expected[:12]}…. {remedy}"
            )


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads a model's weights from.

    Raises:
        MivpgError: There are none.
    """
    for pattern in ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise MivpgError(f"{folder}: no model.safetensors here that a checkpoint could name as its base.")


def stat(file: Path) -> list[int]:
    """Size in bytes and time of the last change in ns."""
    return [file.stat().st_size, file.stat().st_mtime_ns]


@functools.cache
def digest(file: Path, size: int, modified: int) -> str:
    """sha256 of a file; read once while its size and time stay."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
