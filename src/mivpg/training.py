"""Fine-tuning: `train(config)` leads from a data set to the folder of the best model.

The loop, mixed precision, several processes, accumulation and trackers are transformers' `Trainer`. What is here is
what it cannot know of us: only a small part of a model trains and is saved, a model is judged by its captions,
and a run that was killed goes on as if it had not been.

A run folder holds `config.yaml`, `data.yaml`, `log.jsonl`, the newest and the best `checkpoint-<step>/`, and at the end
`best/`, which `MivpgForConditionalGeneration.from_pretrained` and `MivpgProcessor.from_pretrained` read.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from mivpg.bags import (
    Bag,
    BagCollator,
    BagDataset,
    BagSampler,
    Sample,
    bag_size,
    check_bags,
    has_positions,
    one_pair_a_reference,
    select,
    size_to_sort_by,
)
from mivpg.captioning import GenerationOptions, caption_each
from mivpg.configuration_mivpg import (
    Q_FORMERS,
    AggregatorName,
    InstanceCorrelation,
    MivpgConfig,
    PatchPooling,
    PositionEncoding,
    plain_options,
)
from mivpg.datasets import DatasetConfig
from mivpg.errors import BagError, MivpgError
from mivpg.evaluation import TRAINING_METRICS, CaptionScorer, caption_floors
from mivpg.feature_files import features_shape
from mivpg.files import DAMAGE, LOCK, is_first_process, only_writer, read_yaml, write_whole
from mivpg.loading import load_config
from mivpg.miniature.folders import MADE_BY
from mivpg.model_card import DATA_LICENCES, MODEL, NOT_KNOWN, Training, write_model_card
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor, model_options

CONFIG_FILE = "config.yaml"
DATA_FILE = "data.yaml"
LOG_FILE = "log.jsonl"
BEST = "best"
UNFINISHED = ".unfinished"
"""Folders are written in here and renamed into the run folder, and renamed to it before they are deleted, so what a
killed run leaves is never taken for whole."""

MAY_DIFFER = ("output_dir", "batch_size", "gradient_accumulation_steps", "num_workers")
"""In a run that is resumed: where it lies, how the bags of a step are divided (as many as before), who reads them."""

RESUME_FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", TRAINER_STATE_NAME)
"""What a checkpoint holds beside the model: going on needs it and captioning does not."""


class QFormerSizes(TypedDict, total=False):
    """Fields of `MivpgQFormerConfig` for a new Q-Former.

    Those left out are as in BLIP-2, under a classifier of bags as in its `DEFAULT_QFORMER`.
    """

    hidden_size: int
    """Width of the queries."""
    num_hidden_layers: int
    """Blocks."""
    num_attention_heads: int
    """Heads of each attention."""
    intermediate_size: int
    """Width inside a feed-forward."""
    cross_attention_frequency: int
    """Every so many blocks, beginning with the first, one looks at the instances."""
    hidden_dropout_prob: float
    """Dropout after each linear layer."""
    attention_probs_dropout_prob: float
    """Dropout of attention weights."""
    initializer_range: float
    """Standard deviation of new weights."""
    num_inducing_points: int
    """Of `instance_correlation: induced`."""
    num_landmarks: int
    """Of `instance_correlation: nystrom`."""


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """Where a model comes from and what MIVPG it gets. What is None is as the base, or else the model class, has it."""

    base: str | None = None
    """Folder or Hub id of a BLIP-2, or of a MIVPG, to go on from. It, or a `language` model with a new MIVPG."""
    language: str | None = None
    """Folder or Hub id of any causal or encoder-decoder language model of transformers."""
    vision: str | None = None
    """Folder or Hub id of a vision model for `language`; without one the data set has to hold features."""
    image_embeds_size: int | None = None
    """Width of the features, where there is no vision model."""
    qformer: QFormerSizes | None = None
    """Sizes of a new Q-Former; by default BLIP-2's."""
    image_size: int | None = None
    """Pixels a side, where images are not of the vision model's own size; its positions are then interpolated."""
    num_query_tokens: int | None = None
    """Visual prompts a bag, of a new Q-Former or an aggregator in its place; an image, where each has its own."""
    patch_pooling: PatchPooling | None = None
    """How the patches of an image become one instance, such as `abmil`."""
    instance_correlation: InstanceCorrelation | None = None
    """How the images of a bag see each other; the paper's is `csa`."""
    position_encoding: PositionEncoding | None = None
    """`ppeg` adds where instances stand: on the patch grid, or at their coordinates. Pooled images without coordinates
    are placed in their order, which then matters."""
    instances_carry_over: bool | None = None
    """Whether a block goes on from the images as the block before has correlated them, or begins again."""
    zero_init_residual: bool | None = None
    """Whether what correlates and places images starts without effect, or at random."""
    pool_include_prefix: bool | None = None
    """Whether `abmil` pools an image's CLS token, too, or its patches alone."""
    aggregator: AggregatorName | None = None
    """What turns a bag into visual prompts, where it is not MIVPG; the last three only classify."""
    aggregator_options: dict[str, Any] | None = None
    """Arguments of its class in `mivpg.aggregators`."""
    trainable: list[str] | None = None
    """Names of what trains: qformer, query_tokens, language_projection, patch_pooling, instance_projection, aggregator,
    classifier, which train by default; also vision_model, language_model."""
    caption_end_token_id: int | None = None
    """What ends a caption, where the language model does not write its own end-of-sequence token."""
    max_caption_tokens: int | None = None
    """Longer captions are cut in training."""
    chat: bool | None = None
    """Put prompts into the tokenizer's chat template."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen parts; `auto` is as they are stored. What MIVPG consists of is float32."""

    def __post_init__(self) -> None:
        for name in ("image_size", "max_caption_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise MivpgError(f"model.{name} is {value}, expected at least 1.")
        self.aggregator_options = plain_options(self.aggregator_options)

    def load(self) -> tuple[MivpgForConditionalGeneration, MivpgProcessor]:
        """The model and its processor.

        Raises:
            MivpgError: The fields do not say which model, or it cannot be loaded.
        """
        options = self._given("patch_pooling", "instance_correlation", "position_encoding", "trainable")
        options |= self._given("instances_carry_over", "zero_init_residual", "pool_include_prefix")
        options |= self._given("aggregator", "aggregator_options", "image_size")
        caption_end = self._given("caption_end_token_id")
        texts = self._given("max_caption_tokens", "chat")
        new_mivpg = self._given("language", "vision", "image_embeds_size", "num_query_tokens", "qformer")
        if self.base is not None:
            if self.aggregator is not None and self.aggregator not in Q_FORMERS:  # has no pretrained queries
                options |= self._given("num_query_tokens")
                new_mivpg.pop("num_query_tokens", None)
            if new_mivpg:
                raise MivpgError(f"model: base brings its own {', '.join(new_mivpg)}; leave one of the two out.")
            of_base = load_config(self.base, {})[0].aggregator
            if self.aggregator not in (None, of_base) and of_base != "mivpg":
                raise MivpgError(f"model: base is a model with aggregator {of_base!r}, not {self.aggregator!r}.")
            model = MivpgForConditionalGeneration.from_pretrained(self.base, dtype=self.dtype, **options, **caption_end)
            processor = MivpgProcessor.from_pretrained(self.base, **texts, **model_options(model.config))
            return model, self._resized(processor)
        if self.language is None:
            raise MivpgError("model: expected a base, or a language model (and a vision model) for a new MIVPG.")
        if self.vision is None and self.image_embeds_size is None:
            raise MivpgError("model: expected a vision model, or image_embeds_size, the width of stored features.")
        model = MivpgForConditionalGeneration.from_vision_language_pretrained(
            self.vision,
            self.language,
            image_embeds_size=self.image_embeds_size,
            qformer_config=self.qformer,
            dtype=self.dtype,
            **options,
            **caption_end,
            **self._given("num_query_tokens"),
        )
        processor = MivpgProcessor.from_vision_language_pretrained(self.vision, self.language, model.config, **texts)
        return model, self._resized(processor)

    def _resized(self, processor: MivpgProcessor) -> MivpgProcessor:
        """With images of `image_size`; the processor is saved so."""
        if self.image_size is None:
            return processor
        if processor.image_processor is None:
            raise MivpgError("model: image_size is given, but there is no vision model.")
        for name in ("size", "crop_size"):
            if sides := getattr(processor.image_processor, name, None):
                setattr(processor.image_processor, name, dict.fromkeys(dict(sides), self.image_size))
        return processor

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """What a training run is; the defaults are BLIP-2's fine-tuning on captions."""

    model: ModelConfig
    dataset: DatasetConfig
    output_dir: Path
    """The run folder. It must be new or empty, unless a run is resumed."""
    prompt: str = "a photo of"
    """Precedes the caption of every bag that has no prompt of its own."""
    num_train_epochs: int = 5
    """How often every pair of bag and caption is trained on."""
    batch_size: int = 16
    """Bags that one process puts through the model at once."""
    gradient_accumulation_steps: int = 1
    """Batches to an optimizer step: the same step as one batch as large as all of them, in less memory."""
    learning_rate: float = 1e-5
    """Peak rate, reached after `warmup_steps` and followed by a cosine to zero."""
    warmup_steps: float = 0.05
    """Steps of linear warm-up; below 1, a share of all steps (BLIP-2: 1000 of 22,000)."""
    weight_decay: float = 0.05
    """Not applied to biases and other one-dimensional parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    bf16: bool = False
    """Compute in bfloat16 where that is safe; what trains is kept in its own precision."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, longer steps."""
    fsdp: bool = False
    """Divide the models among the GPUs of `torchrun` (FSDP2), where no GPU holds them whole."""
    seed: int = 42
    """Of new weights, dropout, the order of the bags and the choice among references."""
    validation: GenerationOptions = dataclasses.field(default_factory=lambda: GenerationOptions(num_beams=1))
    """How captions of the validation split are written at the end of each epoch."""
    best_metric: Literal["CIDEr", "BLEU@4"] = "CIDEr"
    """Decides which checkpoint becomes `best/`."""
    references: Literal["each", "random"] = "each"
    """For bags with several captions: `each` trains on all of them every epoch; `random` draws one per epoch."""
    max_images: int | None = None
    """Train on at most this many images of a bag, redrawn each epoch; captioning uses all."""
    augmentation: bool = False
    """Turn, mirror and recolour training images at random, as for patches of tissue; takes images, not features."""
    early_stopping_patience: int | None = None
    """Stop after this many epochs without a better `best_metric`."""
    save_steps: int | None = None
    """Also save a checkpoint every so many steps; without it only the ends of epochs are saved."""
    save_total_limit: int = 2
    """Checkpoints to keep; the newest and the best are always kept."""
    logging_steps: int = 10
    """Steps between two lines of the log; each epoch's end has one, too."""
    report_to: list[str] = dataclasses.field(default_factory=list)
    """Trackers that transformers knows, such as `tensorboard` or `wandb`."""
    num_workers: int = 2
    """Processes that open bags ahead of training; 0 = none."""

    def __post_init__(self) -> None:
        counts = ("num_train_epochs", "batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps")
        for name in (*counts, "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MivpgError(f"{name} is {value}, expected at least 1.")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "num_workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise MivpgError(f"{name} is {getattr(self, name)}, expected a number of at least 0.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise MivpgError(f"betas are {self.betas}, expected two numbers from 0 to below 1.")
        if not 0 <= self.seed < 2**32:
            raise MivpgError(f"seed is {self.seed}, expected an integer from 0 to 2^32 - 1.")


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Trains to the end and says on the terminal what it does.

    Under `torchrun` every process calls this with the same config.

    Args:
        config: The run.
        resume: Go on from the newest checkpoint in the run folder. Where there is none, start.

    Returns:
        The folder of the best model by `best_metric`, or of the last one if there is no validation split.

    Raises:
        MivpgError: The run folder is in use, holds another run or cannot be written; the data set lacks bags, files or
            captions; the model cannot be loaded; the loss is no longer a number; a process that reads bags is killed.
    """
    if config.fsdp:
        _check_can_divide()
    with _alone_in(config.output_dir):
        return _train(config, resume)


def _train(config: TrainConfig, resume: bool) -> Path:
    checkpoint = _find_checkpoint(config, resume)
    samples = config.dataset.load()
    train_samples, val_samples = select(samples, "train"), select(samples, "val")
    if not train_samples:
        raise MivpgError(f"dataset: none of its {len(samples)} bags is in the train split, expected at least one.")
    if config.early_stopping_patience is not None and not val_samples:
        raise MivpgError("early_stopping_patience is set, but the data set has no validation split to judge by.")
    check_bags(train_samples + val_samples)

    pairs = one_pair_a_reference(train_samples) if config.references == "each" else train_samples
    args = _training_arguments(config, num_pairs=len(pairs), validate=bool(val_samples))
    if resume and checkpoint is None:
        _say(f"{config.output_dir}: there is nothing to resume, so this starts.")
    _say(f"Training on {len(pairs)} captions of {len(train_samples)} bags, validating on {len(val_samples)} bags.")
    if not val_samples:
        _say("There is no validation split, so the last checkpoint is kept as the best.")
    set_seed(config.seed)  # a new Q-Former is drawn here
    model, processor = config.model.load()
    processor.prompt = config.prompt
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise MivpgError(
            f"model.trainable names {', '.join(model.config.trainable)}, of which this model has no weight."
        )
    _check_fit(train_samples[0], model)
    if val_samples:  # where even the run's own prompt has no room, every caption of a validation would be empty
        prompt = processor.text_ids(processor.prompt_text(config.prompt), processor.num_prompts(1))
        model.check_length(len(prompt), config.validation.max_new_tokens)
    trainer = MivpgTrainer(
        model,
        args,
        processor,
        BagDataset(
            pairs,
            prompt=config.prompt,
            seed=config.seed,
            training=True,
            max_images=config.max_images,
            augmented=config.augmentation,
            processor=processor,
        ),
        BagDataset(val_samples, prompt=config.prompt, processor=processor) if val_samples else None,
        validation=config.validation,
        early_stopping_patience=config.early_stopping_patience,
        save_every=config.save_steps,
    )
    data = _describe_data(train_samples, val_samples, trainer.sampler.block)
    if checkpoint is None:
        trainer.accelerator.wait_for_everyone()  # each process has found the folder empty
        if args.should_save:
            _write(config.output_dir / CONFIG_FILE, _as_plain(config))
            _write(config.output_dir / DATA_FILE, data)
    else:
        _check_same(config.output_dir / DATA_FILE, data)
        with _damaged(Path(checkpoint) / TRAINER_STATE_NAME):
            trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        _say(f"Resuming from step {trainer.state.global_step} (epoch {trainer.state.epoch:.2f}).")
    if checkpoint is not None and trainer.is_finished:
        _say("This run is finished.")
    else:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except BagError as error:
            # From a worker it comes with its whole traceback.
            raise BagError(str(error).splitlines()[-1].removeprefix("mivpg.errors.BagError: ")) from None
        except (RuntimeError, ConnectionError) as error:  # the latter where it was about to hand over a bag
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise MivpgError(
                f"A process that reads bags has ended ({str(error).split('. ')[0]}); often there is no memory left: "
                f"lower num_workers ({config.num_workers}) or batch_size ({config.batch_size}). The last good "
                f"checkpoint is {get_last_checkpoint(config.output_dir) or 'none'}; go on from it with --resume."
            ) from error
    return trainer.publish_best(*_data_for_card(config.dataset, train_samples))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a run folder, and leaves none that is empty. Of a run's processes the first does it.

    Raises:
        MivpgError: Another run is in it, or it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise MivpgError(f"output_dir: {folder} is a file, expected a folder.")
    if not is_first_process():
        yield
        return
    taken = f"output_dir: another process trains in {folder}; wait for it, or name a new folder."
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with ExitStack() as stack:
            with _writing(folder / CONFIG_FILE, folder):
                stack.enter_context(only_writer(folder / CONFIG_FILE, taken))
            yield
    finally:
        for path in missing:
            with suppress(OSError):  # most are no longer empty
                path.rmdir()


def _check_can_divide() -> None:
    """Raises where FSDP has nothing to divide a model among; accelerate would train copies of it and say nothing."""
    if not torch.cuda.is_available():
        raise MivpgError("fsdp divides a model among GPUs, and there is none here; leave it out.")
    if "LOCAL_RANK" not in os.environ:
        raise MivpgError("fsdp divides a model among processes; start them with torchrun, or leave it out.")


def _find_checkpoint(config: TrainConfig, resume: bool) -> str | None:
    """The newest checkpoint to go on from, None to start.

    Raises:
        MivpgError: The folder holds files and is not to be resumed, or holds what another config has begun.
    """
    folder = config.output_dir
    if not folder.exists() or all(file.suffix == LOCK for file in folder.iterdir()):
        return None
    if not resume:
        raise MivpgError(f"output_dir: {folder} is not empty; resume the run in it (--resume) or name a new folder.")
    if not (folder / CONFIG_FILE).is_file():
        raise MivpgError(f"output_dir: {folder} holds no {CONFIG_FILE}, expected the folder of a run to resume.")
    checkpoint = get_last_checkpoint(folder)
    if checkpoint is not None:
        _check_same(folder / CONFIG_FILE, _as_plain(config))
    return checkpoint


def _check_fit(sample: Sample, model: MivpgForConditionalGeneration) -> None:
    """Raises where the data set holds what the model cannot read; `check_bags` has seen that all bags are alike.

    Says so where a position encoding finds no positions.
    """
    num_tokens = None
    if sample.features is not None:
        _, num_tokens, width = features_shape(sample.features)
        if width != model.config.image_embeds_size:
            raise MivpgError(
                f"{sample.features}: features are {width} wide, the model expects {model.config.image_embeds_size}."
            )
    elif model.config.vision_config is None:
        raise MivpgError(f"bag {sample.id!r} has images, but the model has no vision model; it expects features.")
    instances_are_images = model.config.patch_pooling != "none" or num_tokens == 1
    if model.config.qformer_config.position_encoding == "ppeg" and instances_are_images and not has_positions(sample):
        _say(
            f"bag {sample.id!r} has no coordinates, so ppeg lays the instances out on a square in their order, which "
            "then matters."
        )


def _check_same(file: Path, asked: dict[str, Any]) -> None:
    """Raises where a run is resumed with other values than `file` says it was begun with, but for `MAY_DIFFER`."""
    with _damaged(file):
        begun = _flat(read_yaml(file))
    asked = _flat(asked)
    for name in begun | asked:
        if name not in MAY_DIFFER and begun.get(name) != asked.get(name):
            raise MivpgError(
                f"{file}: the run was begun with {name} = {begun.get(name)} and is resumed with {asked.get(name)}; "
                "resume it as it was or name a new output_dir."
            )


@contextmanager
def _damaged(file: Path) -> Iterator[None]:
    """Names a file or a checkpoint of a run that is resumed, and what to do, where reading it fails.

    Raises:
        MivpgError: What was to be read is damaged. Want of memory or of a permission is raised as it is.
    """
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except (*DAMAGE, pickle.UnpicklingError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):  # as torch says it of a CPU and of a GPU
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MivpgError(
            f"{file} is damaged ({textwrap.shorten(reason, 200)}); if it is a checkpoint or lies in one, delete that "
            "folder and resume from the one before, else name a new output_dir."
        ) from None


def _check_resumable(checkpoint: Path) -> None:
    """Raises where a file beside the model is missing, of which Trainer would make a new one, or is not whole."""
    for pattern in ("optimizer.*", "scheduler.pt", "rng_state*.pth"):
        files = list(checkpoint.glob(pattern))
        if not files:
            raise FileNotFoundError(f"there is no {pattern} in it")
        for file in files:
            with zipfile.ZipFile(file) as archive:
                if (name := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"{file.name}: {name} is not as it was written")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested values under names such as `model.base`."""
    flat = {}
    for name, value in values.items():
        inner = {f"{name}.{key}": v for key, v in _flat(value).items()} if isinstance(value, dict) else {name: value}
        flat.update(inner)
    return flat


def _write(file: Path, values: dict[str, Any]) -> None:
    with _writing(file, file.parent):
        write_whole(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _as_plain(config: TrainConfig) -> dict[str, Any]:
    """The config as YAML gives it back: without what is None, paths as text, tuples as lists."""
    given = dataclasses.asdict(config, dict_factory=lambda items: {k: v for k, v in items if v is not None})
    return json.loads(json.dumps(given, default=str))


def _describe_data(train_samples: list[Sample], val_samples: list[Sample], bags_a_step: int) -> dict[str, Any]:
    """What decides, beside the config, which bags a step sees."""
    records = [(sample.id, bag_size(sample), sample.prompt, sample.captions) for sample in train_samples + val_samples]
    return {
        "batch_size x gradient_accumulation_steps x processes": bags_a_step,
        "num_train_bags": len(train_samples),
        "num_val_bags": len(val_samples),
        "sha256": hashlib.sha256(json.dumps(records).encode()).hexdigest(),
    }


def _data_for_card(dataset: DatasetConfig, train_samples: list[Sample]) -> tuple[str, str]:
    """What the model card says of the data, and their licence."""
    kinds = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
    kind, files = next((kind, files) for kind, files in kinds.items() if kind != "features" and files is not None)
    place = next(value for value in vars(files).values() if isinstance(value, Path))
    num_captions = sum(len(sample.captions) for sample in train_samples)
    name = place.resolve().name
    data = f"{len(train_samples)} bags with {num_captions} captions, of `{name}`, read as `{kind}`."
    if (place / MADE_BY).is_file():
        return f"{data} They are generated.", "generated by mivpg, Apache-2.0"
    return data, DATA_LICENCES.get(kind, NOT_KNOWN)


def _training_arguments(config: TrainConfig, *, num_pairs: int, validate: bool) -> TrainingArguments:
    installed = get_available_reporting_integrations()
    for tracker in config.report_to:
        if tracker not in installed:
            raise MivpgError(f"report_to: {tracker!r} is not installed; found {', '.join(installed) or 'no tracker'}.")
    num_warmup_steps = config.warmup_steps
    if num_warmup_steps < 1:  # rounded down: a warm-up of one step would be a step at rate 0
        bags_a_step = config.batch_size * config.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
        num_warmup_steps = int(num_warmup_steps * config.num_train_epochs * math.ceil(num_pairs / bags_a_step))
    args = TrainingArguments(
        output_dir=str(config.output_dir),
        num_train_epochs=config.num_train_epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=num_warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        seed=config.seed,
        eval_strategy="epoch" if validate else "no",
        metric_for_best_model=config.best_metric,
        greater_is_better=True,
        load_best_model_at_end=validate,
        save_strategy="epoch",
        save_total_limit=max(config.save_total_limit, 2),  # of 1, Trainer keeps the best and throws the newest away
        restore_callback_states_from_checkpoint=True,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        report_to=config.report_to or "none",
        dataloader_num_workers=config.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Every trained parameter takes part in every step; a vision model may have some that its tokens do not need.
        ddp_find_unused_parameters=any(part.startswith("vision_model") for part in config.model.trainable or ()),
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
        fsdp=config.fsdp or None,
        # Under this name transformers knows it from 5.20 on; 5.23 calls it deprecated, so only where it is wanted.
        **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}),
    )
    args.device  # noqa: B018 (joins the other processes, and counts the GPUs)
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are used through torchrun, never through DataParallel
    return args


def _say(line: str) -> None:
    if PartialState().is_main_process:
        print(line, flush=True)


class MivpgTrainer(Trainer):
    """A `Trainer` that saves what trains, judges by captions, and whose checkpoints are whole.

    Args:
        model: What trains is `model.config.trainable`.
        args: Of transformers.
        processor: Saved beside the model. `Trainer` is not told of it: it would set the model's special tokens to the
            tokenizer's, but what ends a caption is not always the end-of-sequence token that a tokenizer declares.
        train_dataset: Bags with captions.
        eval_dataset: Bags to caption at the end of each epoch, whose samples hold the references.
        validation: How to caption them.
        early_stopping_patience: Epochs without improvement before training stops.
        save_every: Steps between checkpoints inside an epoch.
    """

    control: TrainerControl

    def __init__(
        self,
        model: MivpgForConditionalGeneration,
        args: TrainingArguments,
        processor: MivpgProcessor,
        train_dataset: BagDataset,
        eval_dataset: BagDataset | None = None,
        *,
        validation: GenerationOptions,
        early_stopping_patience: int | None = None,
        save_every: int | None = None,
    ) -> None:
        self.sampler = BagSampler(
            train_dataset.sizes(),
            seed=args.seed,
            block=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )
        self.run_dir = Path(args.output_dir)
        self.save_dir = self.run_dir
        callbacks: list[TrainerCallback] = [RunCallback(self.sampler, save_every, self.run_dir / LOG_FILE)]
        if early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience))
        if args.fsdp:
            args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = sorted(_names_of_blocks(model))
        super().__init__(
            model=model,
            args=args,
            data_collator=BagCollator(processor, training=True),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        # accelerate takes DDP where it cannot divide.
        assert self.is_fsdp_enabled == bool(args.fsdp), "asked to divide the model, and accelerate does not"
        self.processor = processor
        self.validation = validation
        self.scorer: CaptionScorer | None = None
        if eval_dataset is not None and self.is_world_process_zero():
            references = {sample.id: sample.captions for sample in eval_dataset.samples}
            self.scorer = CaptionScorer(references, TRAINING_METRICS)

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process. Not prepared by accelerate, which divides and fills up batches its own way."""
        return LastingLoader(
            self.train_dataset,
            batch_sampler=ShareSampler(
                self.sampler,
                batch_size=self.args.per_device_train_batch_size,
                num_processes=self.args.world_size,
                process_index=self.args.process_index,
            ),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    # Optimization

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As BLIP-2: no weight decay for biases and other one-dimensional parameters."""
        return [name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("bias")]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called before each optimizer step: the last moment to stop before the weights are lost."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not (math.isfinite(self._tr_loss) and math.isfinite(grad_norm)):
            checkpoint = get_last_checkpoint(self.run_dir) or "none"
            raise MivpgError(
                f"{self.run_dir}: step {self.state.global_step + 1} has loss {self._tr_loss.item()} and gradient norm "
                f"{float(grad_norm)}, expected numbers; its bags are {self._bags_of_step()}, and the last good "
                f"checkpoint is {checkpoint}. Lower learning_rate, or compute in float32."
            )
        return grad_norm

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; what is wrong with a batch is told with the bags of its step."""
        try:
            return super().compute_loss(*args, **kwargs)
        except BagError as error:
            raise BagError(f"one of the bags {self._bags_of_step()}: {error}") from None

    def _bags_of_step(self) -> str:
        """Ids of the bags of the step that is being made, eight at most."""
        step = self.state.global_step % math.ceil(len(self.sampler) / self.sampler.block)
        block = itertools.islice(self.sampler, step * self.sampler.block, (step + 1) * self.sampler.block)
        ids = list(dict.fromkeys(self.train_dataset.samples[index].id for _, index in block))
        return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")

    # Validation

    def evaluate(
        self,
        eval_dataset: BagDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """CIDEr and BLEU@4 of the captions written for `eval_dataset`, each bag captioned by one process.

        Where the model is divided among processes (FSDP), they take every step together and caption every bag.
        """
        assert eval_dataset is None and self.eval_dataset is not None, "the references belong to the eval_dataset"
        start = time.monotonic()
        captions = {sample.id: "" for sample in self.eval_dataset.samples}
        captions |= dict(gather_object(list(self._caption(self.eval_dataset))))
        scores = [self.scorer.score(captions) if self.scorer is not None else {}]
        broadcast_object_list(scores)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores[0].items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.monotonic() - start, 4)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _caption(self, dataset: BagDataset) -> Iterator[tuple[str, str]]:
        """(id, caption) of this process's share of the bags."""
        by_size = sorted(range(len(dataset)), key=lambda index: size_to_sort_by(dataset.samples[index]))
        loader: DataLoader[list[Bag | BagError]] = DataLoader(
            OpenedOrError(dataset),
            batch_size=self.args.per_device_eval_batch_size,
            sampler=by_size if self.args.fsdp else by_size[self.args.process_index :: self.args.world_size],
            collate_fn=list,
            num_workers=self.args.dataloader_num_workers,
        )
        self.callback_handler.eval_dataloader = loader
        for opened in loader:
            bags = [bag for bag in opened if isinstance(bag, Bag)]
            with self.accelerator.autocast():
                captions = caption_each(self.model, self.processor, bags, self.validation)
            for error in [bag for bag in (*opened, *captions) if isinstance(bag, BagError)]:
                print(f"{error} It counts as an empty caption.", flush=True)
            written = zip(bags, captions, strict=True)
            yield from ((bag.id, caption) for bag, caption in written if isinstance(caption, str))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    # The run folder

    @property
    def is_finished(self) -> bool:
        """Whether training had reached its end when `state` was saved."""
        return self.state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]

    def publish_best(self, data: str, data_licence: str) -> Path:
        """Copies the model of the best checkpoint, or of the last one where nothing judges them, to `best/`.

        Args:
            data: What it was trained on, in words, for its card.
            data_licence: Likewise.
        """
        best = self.run_dir / BEST
        if self.args.should_save and not best.exists():
            step = self.state.best_global_step or self.state.global_step
            if (earlier := self.model._training) is not None:  # of the checkpoint that this run started from
                data = f"{data} Before, in another run: {earlier.data}"
                if earlier.data_licence != data_licence:
                    data_licence = f"{data_licence}; of the other run's data: {earlier.data_licence}"
            training = Training(data=data, data_licence=data_licence, **self._scores_at(step))
            unfinished = self.run_dir / UNFINISHED / BEST
            shutil.rmtree(unfinished.parent, ignore_errors=True)
            with _writing(best, self.run_dir):
                shutil.copytree(self._checkpoint(step), unfinished, ignore=shutil.ignore_patterns(*RESUME_FILES))
                shutil.copy(self.run_dir / CONFIG_FILE, unfinished / CONFIG_FILE)
                config = MivpgConfig.from_pretrained(unfinished)
                write_model_card(unfinished, config, config.base, is_whole=False, training=training)
                _move_whole(unfinished, best)
        self.accelerator.wait_for_everyone()
        return best

    def _scores_at(self, step: int) -> dict[str, Any]:
        """For the card: how a checkpoint's captions of the validation split were scored, and floors beside them."""
        if self.scorer is None:
            return {"scores": {}}
        logged = next(entry for entry in self.state.log_history if entry["step"] == step and "eval_CIDEr" in entry)
        bags = self.eval_dataset.samples
        floors = caption_floors(self.train_dataset.samples, bags, seed=self.args.seed)
        scores = {MODEL: {name: logged[f"eval_{name}"] for name in TRAINING_METRICS}}
        scores |= {f"floor {name}": self.scorer.score(captions) for name, captions in floors.items()}
        num_references = sum(len(sample.captions) for sample in bags)
        scored_on = (
            f"On {len(bags)} validation bags with {num_references} references, after step {step} of "
            f"{self.state.max_steps}. They chose this step among others, so they flatter; `mivpg evaluate` scores bags "
            "that chose nothing, with more metrics."
        )
        return {"scored_on": scored_on, "scores": scores}

    def _checkpoint(self, step: int) -> Path:
        return self.run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.save_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Whole or not at all: written elsewhere by all processes, brought to the disk, then renamed."""
        checkpoint = self._checkpoint(self.state.global_step)
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and not weight.isfinite().all():  # the last step was one too large
                raise MivpgError(
                    f"{self.run_dir}: after step {self.state.global_step} the weight {name} is no number any more; the "
                    f"last good checkpoint is {get_last_checkpoint(self.run_dir) or 'none'}. Lower learning_rate."
                )
        self.save_dir = self.run_dir / UNFINISHED
        with _writing(checkpoint, self.run_dir):
            if self.args.should_save:
                shutil.rmtree(self.save_dir, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            unfinished, self.save_dir = self.save_dir / checkpoint.name, self.run_dir
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(self._checkpoint(self.state.best_global_step))
            if self.args.should_save:
                # Once more, with the name of the best checkpoint.
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                _move_whole(unfinished, checkpoint)
                self._delete_old()
            self.accelerator.wait_for_everyone()

    def _delete_old(self) -> None:
        """Leaves `save_total_limit` checkpoints, the newest and the best among them."""
        checkpoints = sort_checkpoints(str(self.run_dir))
        kept = (checkpoints[-1], self.state.best_model_checkpoint)
        num_too_many = max(len(checkpoints) - self.args.save_total_limit, 0)
        for old in [path for path in checkpoints if path not in kept][:num_too_many]:
            shutil.rmtree(Path(old).rename(self.run_dir / UNFINISHED))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.model.save_trained(output_dir, state_dict)
            self.processor.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.fsdp and self.args.should_save:
            (Path(output_dir) / f"{FSDP_MODEL_NAME}.bin").unlink()  # base and all, and nothing reads it

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_trained(resume_from_checkpoint)  # raises where a weight is missing; Trainer would warn

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with _damaged(Path(checkpoint)):
            _check_resumable(Path(checkpoint))
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Those of this process; with another number of processes than were saved, dropout goes on with new numbers."""
        if checkpoint is None:
            return
        if len(list(Path(checkpoint).glob("rng_state*.pth"))) == self.args.world_size:
            with _damaged(Path(checkpoint)):
                super()._load_rng_state(checkpoint)
        else:
            set_seed(self.args.seed + self.state.global_step)

    def _load_best_model(self) -> None:
        self.model.load_trained(self.state.best_model_checkpoint)


class RunCallback(TrainerCallback):
    """Keeps the sampler's epoch, asks for checkpoints inside an epoch and a log at its end, and writes `log.jsonl`.

    Args:
        sampler: Of the training bags.
        save_every: Steps between checkpoints, if any. None is made at an epoch's last step, where one is made anyway.
        log_file: A line for each entry of the trainer's log.
    """

    def __init__(self, sampler: BagSampler, save_every: int | None, log_file: Path) -> None:
        self.sampler = sampler
        self.save_every = save_every
        self.log_file = log_file
        self.steps_per_epoch = 1

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader,
        **kwargs: Any,
    ) -> None:
        self.steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        # Without what a killed run logged after its checkpoint.
        self._write_log(state, "w", state.log_history)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.epoch = state.global_step // self.steps_per_epoch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_epoch_end = state.global_step % self.steps_per_epoch == 0
        if self.save_every is not None and state.global_step % self.save_every == 0 and not is_epoch_end:
            control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log = True  # a small data set may never reach `logging_steps`

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write_log(state, "a", state.log_history[-1:])

    def _write_log(self, state: TrainerState, mode: str, entries: list[dict[str, Any]]) -> None:
        if state.is_world_process_zero:
            with _writing(self.log_file, self.log_file.parent), self.log_file.open(mode) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)


class LastingLoader(DataLoader):
    """A loader whose readers last from epoch to epoch.

    torch's own draws from the global generator when its readers start, so that dropout would be another where a run is
    resumed. This one draws once an epoch, however often they start.
    """

    def __init__(self, *args: Any, num_workers: int = 0, **options: Any) -> None:
        generator = torch.Generator()  # of its own, for what each start of the readers draws
        super().__init__(
            *args, num_workers=num_workers, persistent_workers=num_workers > 0, generator=generator, **options
        )

    def __iter__(self) -> Any:
        torch.empty((), dtype=torch.int64).random_()
        return super().__iter__()


class OpenedOrError(Dataset):
    """Bags, or what is wrong with them: an unreadable picture costs its bag, not the epoch that has been trained.

    Args:
        dataset: Opens the bags.
    """

    def __init__(self, dataset: BagDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Bag | BagError:
        """The bag, or the error that opening it raised."""
        try:
            return self.dataset[index]
        except BagError as error:
            return error


class ShareSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one process: its share of each block, which makes one optimizer step.

    An incomplete last block is shared evenly. accelerate would fill it up with bags of the first block, so that the
    number of processes would change what is learned. Here a bag is repeated only where there are fewer than batches.

    Args:
        sampler: All bags, block after block.
        batch_size: Bags in a batch, at most.
        num_processes: Processes that train together.
        process_index: Which of them this is.
    """

    def __init__(self, sampler: BagSampler, *, batch_size: int, num_processes: int, process_index: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index

    def __len__(self) -> int:
        blocks, rest = divmod(len(self.sampler), self.sampler.block)
        return blocks * self._num_batches(self.sampler.block) + self._num_batches(rest)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        bags = iter(self.sampler)
        while block := list(itertools.islice(bags, self.sampler.block)):
            num_parts = self._num_batches(len(block)) * self.num_processes
            for part in range(self.process_index, num_parts, self.num_processes):
                start, end = part * len(block) // num_parts, (part + 1) * len(block) // num_parts
                yield block[start:end] or block[-1:]

    def _num_batches(self, num_bags: int) -> int:
        """Batches that each process makes of a block."""
        return math.ceil(num_bags / (self.batch_size * self.num_processes))


def _names_of_blocks(model: nn.Module) -> set[str]:
    """Classes of the blocks of all models inside a model, each of which FSDP divides for itself."""
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return named & {type(module).__name__ for module in model.modules()}


@contextmanager
def _writing(what: Path, run_dir: Path) -> Iterator[None]:
    """Makes one line of a full or read-only disk, and leaves nothing half written.

    Raises:
        MivpgError: Names what could not be written, why, and what to go on from.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save's and safetensors' are no OSErrors
        shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
        disk = next(path for path in (run_dir, *run_dir.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(disk).free / 1e6
        last = get_last_checkpoint(run_dir) if run_dir.is_dir() else None
        raise MivpgError(
            f"{what} cannot be written: {' '.join(str(error).split())} ({free:.0f} MB are free); the last good "
            f"checkpoint is {last or 'none'}. Mend that and go on from it with --resume."
        ) from error


def _move_whole(unfinished: Path, folder: Path) -> None:
    """Renames a folder once all that is in it is on the disk."""
    for path in [*unfinished.rglob("*"), unfinished]:
        _sync(path)
    unfinished.rename(folder)
    unfinished.parent.rmdir()
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
