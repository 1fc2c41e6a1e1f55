"""Trains the recurrent decoder on stored features of slides, and captions with it.

    train, val, test = (select(samples, split) for split in ("train", "val", "test"))
    features = slide_features(backbone, train, folder / "aug", augment=True, num_copies=4)
    features |= slide_features(backbone, [*val, *test], folder / "plain")
    config = BaselineConfig(features_from=backbone.description)
    out = train_baseline(features, train, val, Path("runs/densenet121"), config)
    captions = caption_with_baseline(out, features, test)

Any features do: `stored_features` hands over those of a store of `extract_features`, such as the miniature ViT's, so
that the decoder can be compared without the difference of the backbones.

A run folder holds `baseline.json` (config, vocabulary, what it was trained on), `best.safetensors`, and after each
epoch `checkpoint.safetensors` and `training.json` (a line an epoch). The same call goes on where a run was ended, and
what comes out is what an unbroken run gives, bit for bit on a CPU with as many threads.
"""

# M rows of a slide, C their width

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from mivpg.bags import Sample
from mivpg.baselines.recurrent import PAD, RecurrentCaptioner, WordVocabulary, choose_rows, pad_rows
from mivpg.errors import MivpgError
from mivpg.evaluation import CaptionScorer
from mivpg.feature_files import features_shape, read_features
from mivpg.files import read_json, refuse_used, write_whole

SlideFeatures = Mapping[str, Sequence[Path | Tensor]]
"""By slide id, one or more copies of a slide: each a features file, of which every vector is a row, or rows (M, C)."""

RECORD_FILE = "baseline.json"
BEST_FILE = "best.safetensors"
CHECKPOINT_FILE = "checkpoint.safetensors"
LOG_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """A run; the defaults are the release's."""

    features_from: str
    """What made the features, as `Backbone.description` says it: it stands in the run's record."""
    embedding_dim: int = 256
    """Width of encoded rows and of words."""
    hidden_dim: int = 512
    """Width of attention, GRU and the layer after it."""
    max_rows: int = 2000
    """Of a slide with more vectors so many are drawn, anew every epoch."""
    noise: float = 0.001
    """Standard deviation of the Gaussian noise on rows in training."""
    learning_rate: float = 1e-3
    """Of Adam, in the first epoch."""
    decay: float = 0.98
    """The learning rate is multiplied by it after each epoch."""
    batch_size: int = 1
    """Slides a step."""
    num_epochs: int = 40
    """Passes over all copies of all training slides."""
    patience: int = 10
    """Training ends after so many epochs without a better validation."""
    metric: Literal["BLEU@4", "CIDEr"] = "BLEU@4"
    """By which epochs are compared on validation."""
    seed: int = 0
    """Of weights, order, rows and noise."""

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "hidden_dim", "max_rows", "batch_size", "num_epochs", "patience"):
            if getattr(self, name) < 1:
                raise MivpgError(f"{name} is {getattr(self, name)}, expected at least 1.")


@dataclass(frozen=True)
class _Lesson:
    """A copy of a slide, and one of its captions."""

    features: Path | Tensor
    words: list[int]


def stored_features(samples: Iterable[Sample]) -> dict[str, list[Path]]:
    """The features files that samples name, as `extract_features` or a bag file gives them.

    Raises:
        MivpgError: A sample has none.
    """
    files = {}
    for sample in samples:
        if sample.features is None:
            raise MivpgError(f"bag {sample.id!r} has no features file, expected one; run extract_features first.")
        files[sample.id] = [sample.features]
    return files


def train_baseline(
    features: SlideFeatures, train: Sequence[Sample], val: Sequence[Sample], out: Path, config: BaselineConfig
) -> Path:
    """Trains a decoder, or goes on with one.

    Args:
        features: Of all slides of both splits. An epoch sees each copy of a training slide with each of its captions;
            of a validation slide the first copy counts.
        train: With captions, of which the vocabulary is made.
        val: With captions, by which the best epoch is chosen.
        out: A new or empty folder, or one in which a run of the same config and slides was begun.
        config: The run.

    Returns:
        `out`, which `caption_with_baseline` reads.

    Raises:
        MivpgError: A slide lacks features or captions, features differ in width, or the folder holds another run.
    """
    row_width = _check(features, train, val)
    vocabulary = WordVocabulary.of(caption for sample in train for caption in sample.captions)
    lessons = [
        _Lesson(copy, vocabulary.encode(caption))
        for sample in train
        for caption in sample.captions
        for copy in features[sample.id]
    ]
    record = {
        "config": dataclasses.asdict(config),
        "data": _digest(train, val, features),
        "row_width": row_width,
        "max_words": max(len(lesson.words) for lesson in lessons) - 1,  # with <end>
        "vocabulary": vocabulary.words,
    }
    _claim(out / RECORD_FILE, record)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _make_model(record)
    optimizer = torch.optim.Adam(model.parameters())
    log = _resume(out / CHECKPOINT_FILE, model, optimizer)
    with CaptionScorer({sample.id: sample.captions for sample in val}, [config.metric]) as scorer:
        while not _has_ended(log, config):
            epoch = len(log)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * config.decay**epoch
            loss = _train_epoch(model, optimizer, lessons, config, epoch)
            score = scorer.score(_caption(model, record, features, val))
            log.append({"epoch": epoch + 1, "loss": loss} | score)
            if _best(log, config) is log[-1]:
                write_whole(out / BEST_FILE, save(_model_tensors(model)))
            write_whole(out / LOG_FILE, json.dumps(log, indent=2) + "\n")
            _save(out / CHECKPOINT_FILE, model, optimizer, log)  # last: without it, all of the epoch is done again
    return out


def caption_with_baseline(folder: Path, features: SlideFeatures, samples: Sequence[Sample]) -> dict[str, str]:
    """Captions of the best epoch, greedily.

    Args:
        folder: What `train_baseline` returned.
        features: Of all samples, made as those of training; the first copy of each counts.
        samples: What to caption; their own captions are not looked at.

    Returns:
        Slide id to caption.

    Raises:
        MivpgError: The folder holds no trained decoder, or a slide lacks features or has them of another width.
    """
    if not (folder / BEST_FILE).exists():
        raise MivpgError(f"{folder} has no {BEST_FILE}, expected the folder of a run that train_baseline has begun.")
    record = read_json(folder / RECORD_FILE)
    _check_features(features, samples, record["row_width"])
    model = _make_model(record)
    model.load_state_dict(load_file(folder / BEST_FILE))
    return _caption(model, record, features, samples)


# ── Epochs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _make_model(record: Mapping[str, Any]) -> RecurrentCaptioner:
    config = record["config"]
    model = RecurrentCaptioner(
        record["row_width"],
        len(WordVocabulary(record["vocabulary"])),
        embedding_dim=config["embedding_dim"],
        hidden_dim=config["hidden_dim"],
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _train_epoch(
    model: RecurrentCaptioner,
    optimizer: torch.optim.Optimizer,
    lessons: Sequence[_Lesson],
    config: BaselineConfig,
    epoch: int,
) -> float:
    """The mean loss of a caption; what is drawn depends on (seed, epoch, number of the lesson) alone."""
    device = model.output.weight.device
    order = random.Random(f"{config.seed} {epoch}").sample(range(len(lessons)), len(lessons))
    total = 0.0
    starts = range(0, len(order), config.batch_size)
    for start in tqdm(starts, desc=f"epoch {epoch + 1}", unit="step", leave=False, disable=None):
        batch = order[start : start + config.batch_size]
        rows, mask = pad_rows(
            [
                choose_rows(
                    _read(lessons[index].features),
                    max_rows=config.max_rows,
                    noise=config.noise,
                    seed=f"{config.seed} {epoch} {index}",
                )
                for index in batch
            ]
        )
        words = nn.utils.rnn.pad_sequence(
            [torch.tensor(lessons[index].words) for index in batch], batch_first=True, padding_value=PAD
        )
        loss, _ = model(rows.to(device), mask.to(device), words.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(lessons)


def _caption(
    model: RecurrentCaptioner, record: Mapping[str, Any], features: SlideFeatures, samples: Sequence[Sample]
) -> dict[str, str]:
    """One slide at a time, so that no caption depends on others; of a large slide always the same rows."""
    vocabulary = WordVocabulary(record["vocabulary"])
    device = model.output.weight.device
    captions = {}
    for sample in tqdm(samples, desc="captioning", unit="slide", leave=False, disable=None):
        rows = choose_rows(
            _read(features[sample.id][0]), max_rows=record["config"]["max_rows"], noise=0.0, seed=sample.id
        )
        rows, mask = pad_rows([rows])
        (numbers,) = model.generate(rows.to(device), mask.to(device), record["max_words"])
        captions[sample.id] = vocabulary.decode(numbers.tolist())
    return captions


def _read(features: Path | Tensor) -> Tensor:
    """Rows (M, C)."""
    return read_features(features)[0].flatten(0, 1) if isinstance(features, Path) else features


def _best(log: Sequence[Mapping[str, Any]], config: BaselineConfig) -> Mapping[str, Any]:
    """The epoch of the best validation, the first among equals."""
    return max(log, key=lambda entry: entry[config.metric])


def _has_ended(log: Sequence[Mapping[str, Any]], config: BaselineConfig) -> bool:
    if not log:
        return False
    return len(log) >= config.num_epochs or len(log) - _best(log, config)["epoch"] >= config.patience


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _claim(file: Path, record: Mapping[str, Any]) -> None:
    """Makes the run's folder, or checks that it holds the same run."""
    asked = json.loads(json.dumps(record))
    if not file.exists():
        refuse_used(file.parent, " for the run")
        write_whole(file, json.dumps(asked, indent=2) + "\n")
        return
    found = read_json(file)
    for name, value in asked["config"].items():
        if (other := found["config"].get(name)) != value:
            raise MivpgError(f"{file}: {name} is {other!r}, and {value!r} is asked for; name another folder.")
    if found != asked:
        raise MivpgError(f"{file}: this run was begun with other slides or captions; name another folder.")


def _digest(train: Sequence[Sample], val: Sequence[Sample], features: SlideFeatures) -> str:
    """What tells whether slides, their order, captions and number of copies are still the same."""
    data = [[(sample.id, sample.captions, len(features[sample.id])) for sample in split] for split in (train, val)]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in model.state_dict().items()}


def _save(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, log: Sequence[Mapping[str, Any]]) -> None:
    """All that the next epoch needs, in one file, so that it is of one epoch."""
    tensors = {f"model.{name}": value for name, value in _model_tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.cpu().contiguous() for name, value in state.items()}
    write_whole(file, save(tensors, {"log": json.dumps(log)}))


def _resume(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The log of the epochs so far, none where there is no checkpoint."""
    if not file.exists():
        return []
    states: dict[int, dict[str, Tensor]] = {}
    weights = {}
    for key, value in load_file(file).items():
        kind, _, name = key.partition(".")
        if kind == "model":
            weights[name] = value
        else:
            index, _, name = name.partition(".")
            states.setdefault(int(index), {})[name] = value
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["log"])


# ── Checks ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(features: SlideFeatures, train: Sequence[Sample], val: Sequence[Sample]) -> int:
    """The width of rows, where all is as it has to be."""
    if not train:
        raise MivpgError("train has no slide, expected at least one with a caption.")
    for sample in train:
        if not sample.captions:
            raise MivpgError(f"bag {sample.id!r} has no caption, expected at least one to train on.")
    _check_features(features, [*train, *val])
    return _shape(features[train[0].id][0])[-1]


def _check_features(features: SlideFeatures, samples: Sequence[Sample], row_width: int | None = None) -> None:
    """Looks at all features' shapes, which is a look at the headers of files."""
    for sample in samples:
        if not features.get(sample.id):
            raise MivpgError(f"bag {sample.id!r} has no features, expected at least one copy of them.")
        for copy in features[sample.id]:
            shape = _shape(copy)
            row_width = row_width or shape[-1]
            if 0 in shape or shape[-1] != row_width:
                raise MivpgError(
                    f"bag {sample.id!r}: {copy if isinstance(copy, Path) else 'its features'} has shape {shape}, "
                    f"expected vectors of {row_width} as those of the other slides."
                )


def _shape(features: Path | Tensor) -> tuple[int, ...]:
    return features_shape(features) if isinstance(features, Path) else tuple(features.shape)
