"""What finished runs come to: scores of their captions, floors beside them, and the differences that the paper claims.

Scores lie beside the captions they are of, so that they are computed once, whichever tables an arm stands in.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mivpg.bags import Sample, select
from mivpg.captioning import read_captions
from mivpg.errors import MivpgError
from mivpg.evaluation import (
    CaptionScorer,
    Meteor,
    bootstrap_interval_over_seeds,
    caption_floors,
    find_java,
    share_naming_the_label,
    unseen_bags,
)
from mivpg.experiments.data import DataName, ExperimentData
from mivpg.experiments.paper import Arm, Claim, Experiment
from mivpg.experiments.runner import cost_file
from mivpg.files import read_json, write_whole

METRICS = ("BLEU@4", "METEOR", "ROUGE_L", "CIDEr")

MARGIN = 0.05
"""A difference in CIDEr is absent where its interval lies within this share of the worse arm's CIDEr around zero."""


Key = tuple[DataName, str, int]
"""Data set, arm, seed."""

Scored = dict[tuple[DataName, str], dict[int, dict[str, float]]]
"""By data set and arm, then by seed: CIDEr of each bag; those of runs that failed are not there."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A claim, measured."""

    claim: Claim
    data: str
    mean: float
    """Of CIDEr, over seeds and bags."""
    low: float
    high: float
    margin: float

    @property
    def verdict(self) -> str:
        """Present, absent, inconclusive, or the other way round."""
        if self.low > 0:
            return "present"
        if self.high < 0:
            return "the other way round"
        return "absent" if -self.margin < self.low and self.high < self.margin else "inconclusive"


class TestSplit:
    """The bags that runs of a seed are scored on, and those that floors draw from."""

    def __init__(self, samples: Sequence[Sample], meteor: Meteor) -> None:
        self.train = select(samples, "train")
        self.test = select(samples, "test")
        self.meteor = meteor
        captions = [
            [(sample.id, sample.label, *sample.captions) for sample in those] for those in (self.train, self.test)
        ]
        self.digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
        """Of what scores depend on beside a run's captions."""

    @cached_property
    def scorer(self) -> CaptionScorer:
        return self._scorer_of(self.test)

    @cached_property
    def unseen(self) -> CaptionScorer | None:
        """Of the bags whose captions were not trained on, where there are any."""
        rest = unseen_bags(self.train, self.test)
        return self._scorer_of(rest) if rest else None

    def _scorer_of(self, samples: Sequence[Sample]) -> CaptionScorer:
        return CaptionScorer({sample.id: sample.captions for sample in samples}, METRICS, meteor=self.meteor)

    def of_labels(self, captions: Mapping[str, str]) -> dict[str, float]:
        """How many captions name the bag's label, and scores of those that were not trained on."""
        found = {"label": share_naming_the_label(captions, self.train, self.test), "unseen": 0.0}
        if self.unseen is not None:
            found["unseen"] = len(self.unseen.references) / len(self.test)
            found |= self.unseen.score({bag: captions[bag] for bag in self.unseen.references})
        return found


class Scores:
    """Scores of captions, each computed once: one METEOR for all."""

    def __init__(self, data: ExperimentData) -> None:
        self.data = data
        self.meteor = Meteor(find_java())
        self.splits: dict[tuple[DataName, int], TestSplit] = {}

    def close(self) -> None:
        self.meteor.end()

    def split(self, data: DataName, seed: int) -> TestSplit:
        """What a seed's runs are scored on."""
        if (data, seed) not in self.splits:
            self.splits[data, seed] = TestSplit(self.data.dataset(data, "pixels", seed).load(), self.meteor)
        return self.splits[data, seed]

    def of_run(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """`metrics`, and `cider` of each bag; None where the run failed.

        Raises:
            MivpgError: The captions are not of the bags of the test split; names their file.
        """
        file = self.data.caption_file(arm.data, arm.name, seed)
        if not file.exists():
            return None
        split = self.split(arm.data, seed)
        made_of = {"captions": hashlib.sha256(file.read_bytes()).hexdigest(), "references": split.digest}
        cache = file.with_suffix(".scores.json")
        if cache.exists() and (known := read_json(cache)).get("made_of") == made_of:
            return known
        captions = read_captions(file)
        try:
            metrics = split.scorer.score(captions)
        except MivpgError as error:
            raise MivpgError(f"{file}: {error}") from None
        scores = {
            "made_of": made_of,
            "metrics": metrics,
            "cider": split.scorer.cider_of_each(captions),
            "of_labels": self._of_labels(arm.data, split, captions),
        }
        write_whole(cache, json.dumps(scores) + "\n")
        return scores

    def _of_labels(self, data: DataName, split: TestSplit, captions: Mapping[str, str]) -> dict[str, float]:
        return split.of_labels(captions) if data == "slides" else {}  # whose captions repeat

    def floors(self, data: DataName, seed: int) -> dict[str, dict[str, Any]]:
        """What costs nothing, on the same test split."""
        cache = self.data.out / "captions" / data / f"seed-{seed}" / "floors.json"
        split = self.split(data, seed)
        if cache.exists() and (known := read_json(cache)).get("references") == split.digest:
            return known["floors"]
        floors = {
            name: split.scorer.score(those) | {"of_labels": self._of_labels(data, split, those)}
            for name, those in caption_floors(split.train, split.test, seed=seed).items()
        }
        write_whole(cache, json.dumps({"references": split.digest, "floors": floors}) + "\n")
        return floors


def results_of(
    experiment: Experiment, seeds: Sequence[int], scores: Scores, failed: Mapping[Key, str]
) -> dict[str, Any]:
    """What the JSON file of an experiment holds."""
    rows: list[dict[str, Any]] = []
    floors: list[dict[str, Any]] = []
    each: Scored = {}
    for arm in experiment.arms:
        found, reasons = {}, {}
        for seed in seeds:
            if reason := failed.get((arm.data, arm.name, seed)):  # captions that are there may be of something else
                reasons[seed] = reason
                continue
            try:
                of_run = scores.of_run(arm, seed)
            except MivpgError as error:
                reasons[seed] = str(error)
                continue
            if of_run is not None:
                found[seed] = of_run
        each[arm.data, arm.name] = {seed: of_run["cider"] for seed, of_run in found.items()}
        metrics = {metric: [of_run["metrics"][metric] for of_run in found.values()] for metric in METRICS}
        rows.append(
            {
                "data": arm.data,
                "arm": arm.name,
                "title": scores.data.title(arm.title, arm.backbone),
                "seeds": list(found),
                "metrics": metrics,
                "of_labels": [of_run["of_labels"] for of_run in found.values() if of_run["of_labels"]],
                "costs": _costs(scores, arm, found) if experiment.with_costs else {},
                "failed": {str(seed): reasons.get(seed, "it wrote no captions") for seed in seeds if seed not in found},
            }
        )
    for name in dict.fromkeys(row["data"] for row in rows if row["seeds"]):
        of_seeds = [scores.floors(name, seed) for seed in seeds]
        for floor in of_seeds[0]:
            metrics = {metric: [of_seed[floor][metric] for of_seed in of_seeds] for metric in METRICS}
            of_labels = [of_seed[floor]["of_labels"] for of_seed in of_seeds if of_seed[floor]["of_labels"]]
            floors.append({"data": name, "floor": floor, "metrics": metrics, "of_labels": of_labels})
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "note": experiment.note,
        "seeds": list(seeds),
        "rows": rows,
        "floors": floors,
        "examples": _examples(experiment, scores, seeds[0], each),
        "differences": [
            asdict(difference) | {"verdict": difference.verdict} for difference in _differences(experiment, each)
        ],
    }


def _examples(experiment: Experiment, scores: Scores, seed: int, scored: Scored) -> list[dict[str, Any]]:
    """Of some test bags, what people and every arm write; which, the seed alone decides."""
    written = {
        arm.title: read_captions(scores.data.caption_file(arm.data, arm.name, seed))
        for arm in experiment.arms
        if seed in scored[arm.data, arm.name]
    }
    if not experiment.num_examples or not written:
        return []
    test = scores.split(experiment.arms[0].data, seed).test
    chosen = random.Random(f"examples {seed}").sample(test, min(experiment.num_examples, len(test)))
    return [
        {
            "id": sample.id,
            "references": list(sample.captions),
            "captions": {title: captions[sample.id] for title, captions in written.items()},
        }
        for sample in chosen
    ]


def _costs(scores: Scores, arm: Arm, seeds: Iterable[int]) -> dict[str, list[float]]:
    """What the runs of an arm measured, by seed."""
    costs: dict[str, list[float]] = {}
    for seed in seeds:
        file = cost_file(scores.data.caption_file(arm.data, arm.name, seed))
        if file.exists():
            for name, value in json.loads(file.read_text(encoding="utf-8")).items():
                costs.setdefault(name, []).append(value)
    return costs


def _differences(experiment: Experiment, each: Scored) -> list[Difference]:
    """Of every claim, on every data set that has both of its arms."""
    found = []
    for data in dict.fromkeys(arm.data for arm in experiment.arms):
        for claim in experiment.claims:
            better, worse = each.get((data, claim.better), {}), each.get((data, claim.worse), {})
            seeds = sorted(better.keys() & worse.keys())
            if not seeds:
                continue
            values = [[better[seed][bag] - worse[seed][bag] for bag in sorted(worse[seed])] for seed in seeds]
            margin = MARGIN * float(np.mean([np.mean(list(worse[seed].values())) for seed in seeds]))
            same_bags = all(worse[seed].keys() == worse[seeds[0]].keys() for seed in seeds)
            interval = bootstrap_interval_over_seeds(values, same_bags=same_bags)
            found.append(Difference(claim=claim, data=data, margin=margin, **interval))
    return found


def has_failed(results: Mapping[str, Any]) -> bool:
    """Whether an arm, or what was to be measured on them, failed."""
    return any(row["failed"] for row in results["rows"]) or "failed" in results.get("finding", {})
