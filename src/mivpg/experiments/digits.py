"""Bags of real handwritten digits (scikit-learn's, 8 x 8 pixels), classified by every aggregator.

    contains    a bag of 10 ± 2 digits is positive when it holds a 9 (after Ilse et al. 2018)
    repeats     a bag of 5 ± 1 digits is positive when two of them are the same: to be told by comparing instances, or
                by counting how many of each digit there are; no instance says it alone

The first is asked of pixels. The second is asked of what a frozen encoder says of each image: from pixels hardly any
aggregator learns it with hundreds of bags, and the question is not whether digits can be read from labels of bags.

Half of the bags are positive. Training bags and test bags are drawn from different digits, and the encoder has seen
those of training alone. Every aggregator has the same bags, optimizer, rate and number of steps.
"""

import csv
import functools
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mivpg.classification import ClassifierConfig, make_classifier, predict, score_predictions, train_classifier
from mivpg.datasets.bag_set import LabelledBag
from mivpg.errors import MivpgError
from mivpg.experiments.runner import clean_processes, num_cores
from mivpg.files import refuse_used, write_whole
from mivpg.report import Picture, Table, Text, markdown_table, spread, what_was_run, write_report
from mivpg.training import QFormerSizes

Task = Literal["contains", "repeats"]
TARGET = 9
BAG_SIZES: dict[Task, tuple[float, float]] = {"contains": (10, 2), "repeats": (5, 1)}
"""Mean and standard deviation."""
METRICS = ("auc", "accuracy", "instance_auc")

QFORMER = QFormerSizes(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    cross_attention_frequency=1,
    initializer_range=0.05,
)


@dataclass(frozen=True, kw_only=True)
class DigitArm:
    """An aggregator under the classifier."""

    name: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ClassifierConfig`."""


def _mivpg(name: str, title: str, correlation: str) -> DigitArm:
    options = {"aggregator": "mivpg", "instance_correlation": correlation, "qformer": QFORMER}
    return DigitArm(name=name, title=title, options=options)


ARMS = (
    DigitArm(name="mean", title="Mean", options={"aggregator": "mean"}),
    DigitArm(name="max", title="Max", options={"aggregator": "max"}),
    DigitArm(name="mi_net_instances", title="mi-Net", options={"aggregator": "mi_net_instances"}),
    DigitArm(name="mi_net", title="MI-Net", options={"aggregator": "mi_net"}),
    DigitArm(name="abmil", title="AB-MIL", options={"aggregator": "abmil"}),
    DigitArm(
        name="gated_abmil",
        title="AB-MIL, gated",
        options={"aggregator": "abmil", "aggregator_options": {"gated": True}},
    ),
    DigitArm(name="ds_mil", title="DS-MIL", options={"aggregator": "ds_mil"}),
    DigitArm(name="dtfd_mil", title="DTFD-MIL", options={"aggregator": "dtfd_mil"}),
    DigitArm(name="deep_sets", title="DeepSets", options={"aggregator": "deep_sets"}),
    DigitArm(name="set_transformer", title="Set Transformer", options={"aggregator": "set_transformer"}),
    DigitArm(
        name="transmil",
        title="TransMIL",
        options={"aggregator": "transmil", "aggregator_options": {"size": 128, "num_heads": 4}},
    ),
    DigitArm(
        name="perceiver",
        title="Perceiver",
        options={
            "aggregator": "perceiver",
            "aggregator_options": {"depth": 3, "num_heads": 4, "head_size": 16},
        },
    ),
    _mivpg("without_csa", "Q-Former", "none"),
    _mivpg("self_attention", "MIVPG, full self-attention", "self_attention"),
    _mivpg("csa_constant", "MIVPG, control for CSA", "csa_constant"),
    _mivpg("csa", "MIVPG", "csa"),
)


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """How large the experiment is."""

    num_train_bags: tuple[int, ...] = (50, 100, 200, 400)
    num_test_bags: int = 1000
    num_seeds: int = 3
    num_steps: Mapping[Task, int] = field(default_factory=lambda: {"contains": 600, "repeats": 800})
    """Of the optimizer, whatever the number of bags."""
    batch_size: int = 16
    learning_rate: float = 5e-4


def make_bags(task: Task, digits: np.ndarray, labels: np.ndarray, number: int, seed: int) -> list[LabelledBag]:
    """Bags drawn from these digits, every second one positive.

    Args:
        task: What makes a bag positive.
        digits: (n, D), a digit a row, as pixels or as an encoder sees it.
        labels: (n,), 0 to 9.
        number: Of bags.
        seed: Of the draw.
    """
    generator = np.random.default_rng(seed)
    mean, deviation = BAG_SIZES[task]
    of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
    bags = []
    for index in range(number):
        positive = index % 2 == 0
        size = int(np.clip(round(generator.normal(mean, deviation)), 2, 10 if task == "repeats" else None))
        if task == "contains":
            pool = range(10) if positive else [digit for digit in range(10) if digit != TARGET]
            shown = generator.choice(list(pool), size=size)
            if positive and TARGET not in shown:
                shown[generator.integers(size)] = TARGET
            instance_labels = shown == TARGET
        else:
            shown = generator.permutation(10)[:size]
            instance_labels = np.zeros(size, dtype=bool)
            if positive:
                one, other = generator.permutation(size)[:2]
                shown[one] = shown[other]
                instance_labels[[one, other]] = True
        rows = [generator.choice(of_digit[digit]) for digit in shown]
        bags.append(
            LabelledBag(
                id=str(index),
                instances=torch.from_numpy(digits[rows]).float(),
                label=int(positive),
                instance_labels=torch.from_numpy(instance_labels.astype(np.int64)),
            )
        )
    return bags


def split_digits(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Digits (n, 64), standardised, and labels (n,): three fifths to train on, the others to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.4, random_state=seed, stratify=labels)
    digits = (digits - digits[train].mean()) / digits[train].std()
    return (digits[train], labels[train]), (digits[test], labels[test])


@functools.cache
def encode_digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What a small network that has learned the training digits of `split_digits` says of them, and of the others.

    Its probabilities of the ten digits, standardised, and turned into as many numbers as an image has pixels, so that
    no aggregator works in a narrower space here: (n, 64) each, of variance 1.
    """
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    (train, labels), (test, _) = split_digits(seed)
    encoder = MLPClassifier((64,), max_iter=300, random_state=seed).fit(train, labels)
    scaler = StandardScaler().fit(encoder.predict_proba(train))
    frame = np.linalg.qr(np.random.default_rng(seed).normal(size=(64, 10)))[0].T * np.sqrt(6.4)  # orthogonal rows
    encoded_train, encoded_test = (scaler.transform(encoder.predict_proba(rows)) @ frame for rows in (train, test))
    return encoded_train, encoded_test


def run_digits(out: Path, config: DigitsConfig | None = None) -> dict[str, Any]:
    """Trains and tests every aggregator; what is there already is not done again.

    Args:
        out: Gets `digits.json`, `.csv`, `.md` and `.png`, `report.html`, and a file a classifier in `classifiers/`.
        config: How large it is.

    Returns:
        What `digits.json` holds: by task, arm and number of training bags, a list of scores over seeds.

    Raises:
        MivpgError: The folder holds something else; or, when all else is done and written, classifiers failed.
    """
    config = config or DigitsConfig()
    mark = out / "config.json"
    asked = json.dumps({**asdict(config), "arms": [asdict(arm) for arm in ARMS]}, indent=2) + "\n"
    if mark.exists() and mark.read_text(encoding="utf-8") != asked:
        raise MivpgError(f"{out} holds digits of another size, or other aggregators; name another folder.")
    if not mark.exists():
        refuse_used(out)
    write_whole(mark, asked)
    jobs = [
        (arm, task, number, seed)
        for arm in ARMS
        for task in get_args(Task)
        for number in config.num_train_bags
        for seed in range(config.num_seeds)
    ]
    missing = [(out, config, *job) for job in jobs if not _file(out, *job).exists()]
    with (
        clean_processes().Pool(num_cores(), initializer=_start_process) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="classifier", disable=None) as progress,
    ):
        failures = []
        for failure in pool.imap_unordered(_run_job, missing):
            progress.update()
            failures += [failure] if failure else []
    results: dict[str, Any] = {task: {} for task in get_args(Task)}
    for arm, task, number, seed in jobs:
        of_seeds = results[task].setdefault(arm.name, {}).setdefault(str(number), [])
        if (file := _file(out, arm, task, number, seed)).exists():
            of_seeds.append(json.loads(file.read_text(encoding="utf-8")))
    write_whole(out / "digits.json", json.dumps(results, indent=2) + "\n")
    write_whole(out / "digits.png", draw_digits(config, results))
    _write_tables(out, config, results)
    if failures:
        raise MivpgError(f"{len(failures)} classifiers failed, and the tables go without them; first {failures[0]}")
    return results


def _file(out: Path, arm: DigitArm, task: Task, number: int, seed: int) -> Path:
    return out / "classifiers" / f"{task}-{arm.name}-{number}-{seed}.json"


def _start_process() -> None:
    """One thread each."""
    torch.set_num_threads(1)
    threadpool_limits(1)


def _run_job(job: tuple[Path, DigitsConfig, DigitArm, Task, int, int]) -> str | None:
    """One classifier; says what failed, if it did."""
    try:
        _classify(*job)
    except Exception as error:
        _, _, arm, task, number, seed = job
        return f"{task} {arm.name}, {number} bags, seed {seed}: {type(error).__name__}: {error}"
    return None


def _classify(out: Path, config: DigitsConfig, arm: DigitArm, task: Task, number: int, seed: int) -> None:
    (train_digits, train_labels), (test_digits, test_labels) = split_digits(seed)
    if task == "repeats":
        train_digits, test_digits = encode_digits(seed)
    train = make_bags(task, train_digits, train_labels, number, seed)
    test = make_bags(task, test_digits, test_labels, config.num_test_bags, seed + 1000)
    classifier = ClassifierConfig(
        num_train_epochs=max(1, config.num_steps[task] // -(-number // config.batch_size)),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=seed,
        **arm.options,
    )
    model = make_classifier(classifier, width=64, num_labels=2)
    train_classifier(model, train, classifier)
    scores = score_predictions(test, predict(model, test, batch_size=100, with_instances=True))
    write_whole(_file(out, arm, task, number, seed), json.dumps(scores) + "\n")


# ── What is written ─────────────────────────────────────────────────────────────────────────────────────────────────

COLORS = [f"C{index}" for index in range(10)]


def _rows(config: DigitsConfig, results: Mapping[str, Any], task: str, metric: str) -> list[list[str]]:
    return [
        [arm.title, *(spread(_values(results, task, arm, number, metric)) for number in config.num_train_bags)]
        for arm in ARMS
    ]


def _values(results: Mapping[str, Any], task: str, arm: DigitArm, number: int, metric: str) -> list[float]:
    """A metric over seeds, where it is defined."""
    return [scores[metric] for scores in results[task][arm.name][str(number)] if metric in scores]


TITLES = {
    ("contains", "auc"): "A 9 in the bag: AUC of bags",
    ("contains", "instance_auc"): "A 9 in the bag: AUC of instances",
    ("repeats", "auc"): "Two alike in the bag, through an encoder: AUC of bags",
}


def _write_tables(out: Path, config: DigitsConfig, results: Mapping[str, Any]) -> None:
    columns = ["", *(f"{number} bags" for number in config.num_train_bags)]
    lines: list[str] = []
    alt = "AUC over the number of training bags, a line an aggregator; the tables below have the numbers"
    parts: list[Any] = [Picture(title="At a glance", png=(out / "digits.png").read_bytes(), alt=alt)]
    for (task, metric), title in TITLES.items():
        rows = _rows(config, results, task, metric)
        lines += [f"## {title}", "", *markdown_table(columns, rows), ""]
        parts.append(Table(title=title, columns=columns, rows=rows))
    write_whole(out / "digits.md", "\n".join(lines))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["task", "arm", "train_bags", "seed", *METRICS])
    for task, arms in results.items():
        for arm, numbers in arms.items():
            for number, of_seeds in numbers.items():
                for seed, scores in enumerate(of_seeds):
                    writer.writerow([task, arm, number, seed, *(scores.get(metric, "") for metric in METRICS)])
    write_whole(out / "digits.csv", table.getvalue())
    about = Text(
        title="What was run",
        paragraphs=[
            f"Real digits, {config.num_test_bags} test bags of digits that no training bag holds, "
            f"{config.num_seeds} seeds, {config.num_steps['contains']} steps of {config.batch_size} bags at "
            f"{config.learning_rate:g} for every aggregator, {config.num_steps['repeats']} where two are alike; those "
            "bags hold what a frozen encoder, trained on the training digits, says of each image. An instance's score "
            "is the aggregator's own where it is defined by them, else what the classifier says of a bag that holds "
            "this instance alone."
        ],
    )
    write_report(
        out / "report.html",
        title="Bags of digits",
        lead="Every aggregator under the same classifier, over the number of training bags.",
        parts=[*parts, about, *what_was_run(asdict(config))],
    )


def draw_digits(config: DigitsConfig, results: Mapping[str, Any]) -> bytes:
    """AUC over the number of training bags, a line an aggregator, a panel a question."""
    figure = Figure(figsize=(15, 5.5), layout="constrained")
    panels = figure.subplots(1, len(TITLES), sharey=True)
    for axes, ((task, metric), title) in zip(panels, TITLES.items(), strict=True):
        for index, arm in enumerate(ARMS):
            means = []
            for number in config.num_train_bags:
                values = _values(results, task, arm, number, metric)
                means.append(np.mean(values) if values else np.nan)
            is_ours = arm.options["aggregator"] == "mivpg"
            axes.plot(
                config.num_train_bags,
                means,
                marker="o" if is_ours else ".",
                linestyle="-" if index < len(COLORS) else "--",
                linewidth=2 if is_ours else 1.2,
                color=COLORS[index % len(COLORS)],
                label=arm.title,
            )
        axes.set(xscale="log", xlabel="training bags")
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(config.num_train_bags, [str(number) for number in config.num_train_bags])
        axes.minorticks_off()
        axes.axhline(0.5, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("AUC")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, metadata={"Software": None})
    return buffer.getvalue()
