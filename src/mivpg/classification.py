"""Bags with one label each, classified: what most users of multiple instance learning do.

    bags = read_bag_set("set.npz").bags
    model = make_classifier(ClassifierConfig(aggregator="abmil"), width=bags[0].instances.shape[-1], num_labels=2)
    train_classifier(model, bags, ClassifierConfig())
    scores = score_predictions(bags, predict(model, bags))

`cross_validate` does this fold by fold, for `mivpg classify`.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from mivpg.bags import check_record, naming
from mivpg.configuration_mivpg import (
    AggregatorName,
    InstanceCorrelation,
    MivpgConfig,
    PatchPooling,
    PositionEncoding,
    plain_options,
)
from mivpg.datasets.bag_file import load_bag_file
from mivpg.datasets.bag_set import BagSet, LabelledBag, read_bag_set
from mivpg.errors import BagError, MivpgError
from mivpg.feature_files import read_features
from mivpg.files import read_json, refuse_used, write_whole
from mivpg.loading import one_line
from mivpg.model_card import MODEL, NOT_KNOWN, Training, write_model_card
from mivpg.modeling_mivpg import MivpgForBagClassification, class_probabilities
from mivpg.processing_mivpg import pad_bags
from mivpg.training import QFormerSizes

logger = logging.getLogger(__name__)

DEFAULT_QFORMER = QFormerSizes(
    hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256, initializer_range=0.05
)
"""For a few thousand bags; three of its six blocks look at the instances."""


@dataclass(kw_only=True)
class ClassifierConfig:
    """What a classifier of bags is and how it is trained."""

    aggregator: AggregatorName = "mivpg"
    """MIVPG, or one of `mivpg.aggregators`."""
    aggregator_options: dict[str, Any] | None = None
    """Arguments of its class."""
    num_query_tokens: int = 8
    """R, of MIVPG, and the prompts of a Perceiver or a Set Transformer; those of each image for `qformer_per_image`,
    `pooled_projection` and `linear_projection`, of which the last must have as many as an image has tokens."""
    qformer: QFormerSizes | None = None
    """Sizes of MIVPG; those left out are as in `DEFAULT_QFORMER`, six blocks of width 128."""
    patch_pooling: PatchPooling = "none"
    """How the tokens of an image become one instance, where it has several."""
    instance_correlation: InstanceCorrelation = "csa"
    """How MIVPG's instances see each other."""
    position_encoding: PositionEncoding = "none"
    """`ppeg` adds where instances stand: at their coordinates, or else in their order, which then matters."""
    num_train_epochs: int = 40
    """Passes over the bags."""
    batch_size: int = 8
    """Bags of a step, and bags at once in a test."""
    learning_rate: float = 5e-4
    """Peak rate of AdamW, after a twentieth of all steps and before a cosine to zero."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    seed: int = 0
    """Of new weights, dropout, order and folds."""
    num_folds: int = 5
    """Of a cross-validation, where the bags bring no folds of their own."""

    def __post_init__(self) -> None:
        self.aggregator_options = plain_options(self.aggregator_options)
        if not 0 <= self.learning_rate < math.inf:
            raise MivpgError(f"learning_rate is {self.learning_rate}, expected a number of at least 0.")
        for name, least in (("num_train_epochs", 1), ("batch_size", 1), ("num_folds", 2), ("num_query_tokens", 1)):
            if (value := getattr(self, name)) < least:
                raise MivpgError(f"{name} is {value}, expected at least {least}.")


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of a bag."""

    id: str
    probabilities: list[float]
    """Of each class."""
    instance_scores: list[float] | None = None
    """Of each instance, the logit of class 1 (binary) or of the bag's predicted class."""

    @property
    def label(self) -> int:
        """The most probable class."""
        return int(np.argmax(self.probabilities))


def load_labelled_bags(path: Path, *, root: Path | None = None) -> BagSet:
    """Bags with labels: an `.npz` of the whole set, or a bag file with a label and a features file a bag.

    Args:
        path: The file.
        root: Of a bag file, as in `load_bag_file`.

    Raises:
        MivpgError: There is no such file, or it is not as it has to be.
        BagError: A bag has no label or no features, its features or coordinates cannot be read, or they differ from
            the first bag's.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return read_bag_set(path)
    if suffix not in (".jsonl", ".csv"):
        raise MivpgError(f"{path} ends in {path.suffix!r}, expected a bag set, .npz, or a bag file, .jsonl or .csv.")
    samples = load_bag_file(path, root=root)
    for sample in samples:
        if sample.label is None:
            raise BagError(f"{path}: bag {sample.id!r} has no label, expected one of each bag.")
        if sample.features is None:
            raise BagError(f"{path}: bag {sample.id!r} has no features; `mivpg extract` makes them from its images.")
    if any(sample.split is not None for sample in samples):
        logger.info("%s: its splits are not read, since a cross-validation makes folds of its own.", path)
    names = sorted({sample.label for sample in samples if sample.label is not None})
    bags: list[LabelledBag] = []
    for sample in samples:
        assert sample.features is not None and sample.label is not None
        with naming(sample):
            check_record(sample)
            features, coords = read_features(sample.features)
        if coords is None and sample.image_coords is not None:
            coords = torch.tensor(sample.image_coords, dtype=torch.float32)  # (N, 2)
        bag = LabelledBag(
            id=sample.id,
            instances=features.float(),
            label=names.index(sample.label),
            coords=coords,
            group=sample.group,
        )
        bags.append(bag)
        if (kind := _kind(bag)) != (first_kind := _kind(bags[0])):
            raise BagError(
                f"{path}: bag {bags[0].id!r} has {first_kind} and bag {bag.id!r} has {kind}, expected all bags alike."
            )
    return BagSet(bags=bags, label_names=names)


def _kind(bag: LabelledBag) -> str:
    """What all bags of a bag file have to share, in words."""
    _, num_tokens, width = bag.instances.shape
    return f"features (N, {num_tokens}, {width}) {'without' if bag.coords is None else 'with'} coordinates"


def make_classifier(config: ClassifierConfig, *, width: int, num_labels: int) -> MivpgForBagClassification:
    """A new classifier, drawn from `config.seed`.

    Args:
        config: What it is.
        width: D, of the instances.
        num_labels: Classes.

    Raises:
        MivpgError: An option has a value that it cannot have.
    """
    torch.manual_seed(config.seed)
    qformer = {
        **DEFAULT_QFORMER,
        **(config.qformer or {}),
        "instance_correlation": config.instance_correlation,
        "position_encoding": config.position_encoding,
        "encoder_hidden_size": width,
    }
    try:
        model_config = MivpgConfig(
            vision_config=None,
            text_config=None,
            qformer_config=qformer,
            image_embeds_size=width,
            num_query_tokens=config.num_query_tokens,
            patch_pooling=config.patch_pooling,
            aggregator=config.aggregator,
            aggregator_options=config.aggregator_options,
            num_labels=num_labels,
        )
    except StrictDataclassError as error:
        raise MivpgError(one_line(error)) from error
    return MivpgForBagClassification(model_config)


def train_classifier(model: MivpgForBagClassification, bags: Sequence[LabelledBag], config: ClassifierConfig) -> None:
    """Trains in place; the order of the bags is a function of seed and epoch.

    Raises:
        MivpgError: There is no bag, or the loss is no longer a number.
    """
    if not bags:
        raise MivpgError("there is no bag to train on.")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    num_steps = config.num_train_epochs * -(-len(bags) // config.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 20, num_steps)
    model.train()
    for epoch in tqdm(range(config.num_train_epochs), unit="epoch", leave=False, disable=None):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(bags), generator=generator).tolist()
        for start in range(0, len(order), config.batch_size):
            batch = [bags[index] for index in order[start : start + config.batch_size]]
            labels = torch.tensor([bag.label for bag in batch], device=model.device)
            loss = model(**collate(batch, model.device), labels=labels).loss
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not (loss.isfinite() and grad_norm.isfinite()):
                ids = ", ".join(bag.id for bag in batch)
                raise MivpgError(
                    f"the loss is {loss.item()} and its gradient's norm {grad_norm.item()} in epoch {epoch}, at the "
                    f"bags {ids}; take a lower learning_rate."
                )
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()


def collate(bags: Sequence[LabelledBag], device: torch.device) -> dict[str, Tensor]:
    """`image_embeds` (B, N, P, D), `image_mask` (B, N) and, where the bags have them, `image_coords` (B, N, 2).

    Instances (N, D) are images of one token.

    Raises:
        BagError: Some bags have coordinates and some have none.
    """
    images = [bag.instances if bag.instances.ndim == 3 else bag.instances[:, None] for bag in bags]
    image_embeds, image_mask = pad_bags(images)
    batch = {"image_embeds": image_embeds.to(device), "image_mask": image_mask.to(device)}
    coords = [bag.coords.float() for bag in bags if bag.coords is not None]
    if 0 < len(coords) < len(bags):
        with_one = next(bag for bag in bags if bag.coords is not None)
        without = next(bag for bag in bags if bag.coords is None)
        raise BagError(f"bag {with_one.id!r} has coordinates and bag {without.id!r} has none, expected all bags alike.")
    if coords:
        batch["image_coords"] = pad_bags(coords)[0].to(device)
    return batch


@torch.no_grad()
def predict(
    model: MivpgForBagClassification,
    bags: Sequence[LabelledBag],
    *,
    batch_size: int = 32,
    with_instances: bool = False,
) -> list[Prediction]:
    """What the classifier says of each bag, in their order.

    Args:
        model: In eval mode.
        bags: Their labels are not read.
        batch_size: Bags at once.
        with_instances: Also score each instance (`MivpgForBagClassification.score_instances`).
    """
    by_size = sorted(range(len(bags)), key=lambda index: len(bags[index].instances))  # little padding
    found: dict[int, Prediction] = {}
    for start in range(0, len(bags), batch_size):
        rows = by_size[start : start + batch_size]
        batch = collate([bags[index] for index in rows], model.device)
        probabilities = class_probabilities(model(**batch).logits)
        scores: Iterator[Tensor | None] = iter([None] * len(rows))
        if with_instances:
            scores = iter(model.score_instances(**batch))
        for index, row, of_instances in zip(rows, probabilities, scores, strict=True):
            instances = None
            if of_instances is not None:
                column = 0 if of_instances.shape[-1] == 1 else int(row.argmax())
                of_bag = bags[index].instances
                num_tokens = of_bag.shape[1] if of_bag.ndim == 3 and model.config.patch_pooling == "none" else 1
                instances = of_instances[: len(of_bag) * num_tokens, column].tolist()
            found[index] = Prediction(bags[index].id, row.tolist(), instances)
    return [found[index] for index in range(len(bags))]


def score_predictions(bags: Sequence[LabelledBag], predictions: Sequence[Prediction]) -> dict[str, float]:
    """Accuracy, AUC (of several classes one against the rest, averaged), and AUC of instances where both are known.

    What is not defined, an AUC of one class, is left out.
    """
    from sklearn.metrics import roc_auc_score

    labels = np.array([bag.label for bag in bags])
    probabilities = np.array([prediction.probabilities for prediction in predictions])
    scores = {"accuracy": float((probabilities.argmax(axis=1) == labels).mean())}
    if probabilities.shape[1] == 2 and len(set(labels)) == 2:
        scores["auc"] = float(roc_auc_score(labels, probabilities[:, 1]))
    elif len(set(labels)) == probabilities.shape[1] > 2:
        scores["auc"] = float(roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"))
    truth: list[int] = []
    found: list[float] = []
    for bag, prediction in zip(bags, predictions, strict=True):
        if bag.instance_labels is not None and prediction.instance_scores is not None:
            truth += bag.instance_labels.tolist()
            found += prediction.instance_scores
    if len(set(truth)) == 2:
        scores["instance_auc"] = float(roc_auc_score(truth, found))
    return scores


def split_into_folds(bags: Sequence[LabelledBag], config: ClassifierConfig) -> list[tuple[list[int], list[int]]]:
    """Training and test indices of each fold: the bags' own folds, or stratified ones by seed that divide no group.

    Raises:
        MivpgError: Some bags have a fold and some none, or a class has fewer bags (or groups) than there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    given = [bag.fold for bag in bags]
    if all(fold is not None for fold in given):
        names = sorted({fold for fold in given if fold is not None})
        if len(names) < 2:
            raise MivpgError("all bags are in one fold, expected at least two folds.")
        return [
            (
                [index for index, fold in enumerate(given) if fold != name],
                [index for index, fold in enumerate(given) if fold == name],
            )
            for name in names
        ]
    if any(fold is not None for fold in given):
        raise MivpgError("some bags have a fold and some have none; give each bag one, or none.")
    labels = [bag.label for bag in bags]
    groups = [f"bag {index}" if bag.group is None else f"group {bag.group}" for index, bag in enumerate(bags)]
    of_class = [{group for group, other in zip(groups, labels, strict=True) if other == label} for label in set(labels)]
    one_a_bag = len(set(groups)) == len(bags)
    if (least := min(map(len, of_class))) < config.num_folds:
        what = "bags" if one_a_bag else "groups"
        raise MivpgError(f"num_folds is {config.num_folds}, but a class has {least} {what}, fewer than folds.")
    fold_class = StratifiedKFold if one_a_bag else StratifiedGroupKFold
    folds = fold_class(config.num_folds, shuffle=True, random_state=config.seed)
    splits = folds.split(np.zeros(len(labels)), labels, None if one_a_bag else groups)
    return [(train.tolist(), test.tolist()) for train, test in splits]


def cross_validate(bag_set: BagSet, config: ClassifierConfig, out: Path) -> dict[str, Any]:
    """Trains on all folds but one and tests on that one, for each; what is there already is not done again.

    Args:
        bag_set: Bags with labels.
        config: The classifier.
        out: Gets `config.json`, for each fold a model `fold-K/` and its predictions `fold-K.jsonl`, and `metrics.json`.

    Returns:
        What `metrics.json` holds: the scores of each fold, and of each score its mean and standard deviation over the
        folds that have it, and their number (an AUC needs two classes).

    Raises:
        MivpgError: The folder holds a run of another config or other bags, or the folds cannot be made.
    """
    mark = out / "config.json"
    if len(bag_set.label_names) < 2:
        raise MivpgError(f"all bags have the label {bag_set.label_names[0]!r}, expected at least two labels.")
    asked = asdict(config) | {"bags": _digest(bag_set), "label_names": bag_set.label_names}
    if mark.exists():
        found = read_json(mark)
        different = sorted(name for name in asked if not isinstance(found, dict) or found.get(name) != asked[name])
        if different:
            raise MivpgError(f"{out} holds a run with another {', '.join(different)}; name another folder.")
    else:
        refuse_used(out)
    folds = split_into_folds(bag_set.bags, config)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(mark, json.dumps(asked, indent=2) + "\n")
    width = bag_set.bags[0].instances.shape[-1]
    scores = []
    for number, (train, test) in enumerate(folds):
        file = out / f"fold-{number}.jsonl"
        test_bags = [bag_set.bags[index] for index in test]
        if not file.exists():
            model = make_classifier(config, width=width, num_labels=len(bag_set.label_names))
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            train_classifier(model, [bag_set.bags[index] for index in train], config)
            model.save_pretrained(out / f"fold-{number}")
            predictions = predict(model, test_bags, batch_size=config.batch_size, with_instances=True)
            training = _for_card([bag_set.bags[index].label for index in train], test_bags, predictions)
            write_model_card(out / f"fold-{number}", model.config, None, is_whole=True, training=training)
            write_whole(file, "".join(json.dumps(asdict(prediction)) + "\n" for prediction in predictions))
        lines = file.read_text(encoding="utf-8").splitlines()
        scores.append(score_predictions(test_bags, [Prediction(**json.loads(line)) for line in lines]))
        logger.info(
            "fold %d of %d: %s", number + 1, len(folds), ", ".join(f"{k} {v:.3f}" for k, v in scores[-1].items())
        )
    names = dict.fromkeys(name for fold in scores for name in fold)
    values = {name: [fold[name] for fold in scores if name in fold] for name in names}
    results = {
        "folds": scores,
        "mean": {name: float(np.mean(those)) for name, those in values.items()},
        "standard_deviation": {
            name: float(np.std(those, ddof=1)) if len(those) > 1 else 0.0 for name, those in values.items()
        },
        "num_folds": {name: len(those) for name, those in values.items()},
    }
    write_whole(out / "metrics.json", json.dumps(results, indent=2) + "\n")
    return results


def _for_card(
    train_labels: Sequence[int], test_bags: Sequence[LabelledBag], predictions: Sequence[Prediction]
) -> Training:
    """What the model card of a fold says."""
    scores = score_predictions(test_bags, predictions)
    most_common = Counter(train_labels).most_common(1)[0][0]
    right = sum(bag.label == most_common for bag in test_bags) / len(test_bags)
    return Training(
        data=f"{len(train_labels)} bags with a label each.",
        data_licence=NOT_KNOWN,
        scored_on=f"On {len(test_bags)} bags of the fold that was left out.",
        scores={MODEL: scores, "floor the most common label": {**dict.fromkeys(scores, 0.5), "accuracy": right}},
    )


def _digest(bag_set: BagSet) -> str:
    """What tells whether bags, labels, places and folds are still the same."""
    sha256 = hashlib.sha256()
    for bag in bag_set.bags:
        sha256.update(json.dumps([bag.id, bag.label, bag.fold, bag.group, list(bag.instances.shape)]).encode())
        sha256.update(bag.instances.contiguous().numpy().tobytes())
        if bag.coords is not None:
            sha256.update(bag.coords.contiguous().numpy().tobytes())
    return sha256.hexdigest()
