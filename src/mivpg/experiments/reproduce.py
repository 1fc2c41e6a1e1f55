"""`mivpg reproduce`: the paper's tables and figures from one command.

    out/runs/products/seed-0/csa/        a run folder; best/ is a model for `mivpg caption --model`
    out/captions/products/seed-0/csa.jsonl, and .scores.json beside it
    out/logs/products/seed-0/csa.txt
    out/table2.json, table2.csv, table2.md
    out/figure4.png with figure4.json, …
    out/report.html                      all of it for people

What is there already is not done again. A run that fails is reported as failed, with its log, and its table goes on
without it.
"""

import csv
import hashlib
import io
import json
import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mivpg.bags import Sample, one_pair_a_reference, select
from mivpg.baselines.training import BaselineConfig
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
from mivpg.experiments.data import PROMPT, SCALES, BaseName, DataName, ExperimentData, View
from mivpg.experiments.paper import Arm, Claim, Experiment, experiments
from mivpg.experiments.runner import EpochByEpoch, FineTuning, RecurrentDecoder, Run, run_all
from mivpg.files import read_json, refuse_used, write_whole
from mivpg.report import BarChart, Part, Picture, Table, Text, markdown_table, write_report
from mivpg.training import BEST, ModelConfig, TrainConfig

METRICS = ("BLEU@4", "METEOR", "ROUGE_L", "CIDEr")

MARGIN = 0.05
"""A difference in CIDEr is absent where its interval lies within this share of the worse arm's CIDEr around zero."""


Key = tuple[DataName, str, int]
"""Data set, arm, seed."""


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


def reproduce(
    names: Sequence[str],
    *,
    scale: str,
    out: Path,
    num_seeds: int = 3,
    data_root: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs experiments, or what is left of them.

    Args:
        names: Of experiments, or "all".
        scale: "miniature" or "paper".
        out: A new or empty folder, or that of an interrupted run.
        num_seeds: Seeds 0, 1, …; each draws split and training order.
        data_root: The folder of the real data sets, for the paper's scale.

    Returns:
        What the JSON files hold, by experiment.

    Raises:
        MivpgError: There is no such experiment, the folder holds another scale's, or a data set is missing.
    """
    known = experiments(SCALES[scale])
    if unknown := [name for name in names if name not in known and name != "all"]:
        raise MivpgError(f"there is no experiment {unknown[0]!r}; there are {', '.join(known)} and all.")
    if scale == "paper" and data_root is None:
        raise MivpgError("--scale paper needs --data-root, the folder with abo, patch_gastric and coco.")
    names = [*names, *(name for name in known if "all" in names and not known[name].apart)]
    chosen = [known[name] for name in dict.fromkeys(names) if name != "all"]
    _claim(out, scale, data_root)
    data = ExperimentData(scale=SCALES[scale], out=out, data_root=data_root)
    arms = {(arm.data, arm.name): arm for experiment in chosen for arm in experiment.arms}
    seeds = range(num_seeds)
    missing = _prepare(data, arms.values())
    runs: dict[Key, Run] = {}
    failed: dict[Key, str] = {}
    for arm in arms.values():
        for seed in seeds:
            if reason := missing.get(arm.place):
                failed[arm.data, arm.name, seed] = reason
                continue
            try:
                runs[arm.data, arm.name, seed] = _run(data, arm, seed)
            except MivpgError as error:  # the other arms can run
                print(f"  {arm.data} {arm.name} cannot run: {error}", flush=True)
                failed[arm.data, arm.name, seed] = str(error)
    print(f"Fine-tuning and captioning: {len(arms)} arms, {num_seeds} seeds …", flush=True)
    reasons = run_all(list(runs.values()))
    failed |= {key: f"{run.log}: {reasons[run.name]}" for key, run in runs.items() if run.name in reasons}
    print("Scoring …", flush=True)
    with closing(_Scores(data, runs)) as scores:
        results = {experiment.name: _results(experiment, seeds, scores, failed) for experiment in chosen}
    for experiment in chosen:
        if experiment.measure is not None:
            print(f"Measuring: {experiment.name} …", flush=True)
            results[experiment.name]["finding"] = _finding(data, experiment, runs)
        _write(out, experiment, results[experiment.name])
    write_report(
        out / "report.html",
        title="MIVPG: the paper's experiments" + (" in miniature" if scale == "miniature" else ""),
        lead=_lead(scale, num_seeds),
        parts=[part for experiment in chosen for part in _report_parts(out, experiment, results[experiment.name])],
    )
    return results


def _claim(out: Path, scale: str, data_root: Path | None) -> None:
    """Makes the folder that of these settings, so that no run is taken for one of others."""
    mark = out / "reproduce.json"
    settings = {name: value for name, value in asdict(SCALES[scale]).items() if name != "settings"}
    of_data = {
        name: {key: value for key, value in asdict(those).items() if key != "draw"}
        for name, those in SCALES[scale].settings.items()
    }
    asked = json.loads(json.dumps([settings, of_data, data_root and data_root.resolve()], default=str))
    if mark.exists():
        if (found := read_json(mark)) != {"scale": scale, "settings": asked}:
            other = found.get("scale") if isinstance(found, dict) else None
            raise MivpgError(f"{out} holds experiments of other settings, at the scale {other!r}; name another folder.")
        return
    refuse_used(out)
    write_whole(mark, json.dumps({"scale": scale, "settings": asked}, indent=2) + "\n")


def _prepare(data: ExperimentData, arms: Collection[Arm]) -> dict[tuple[DataName, View, BaseName], str]:
    """Makes ready what arms read.

    Returns:
        Of what is not there, why; the arms that can run without it go on.

    Raises:
        MivpgError: None can.
    """
    missing: dict[tuple[DataName, View, BaseName], str] = {}
    for place in dict.fromkeys(arm.place for arm in arms):
        if place in data.stores:
            continue
        print(f"Data: {place[0]}, {place[1]} images …", flush=True)
        try:
            data.prepare(*place)
        except MivpgError as error:
            missing[place] = str(error)
    able = [f"{arm.data} {arm.name}" for arm in arms if arm.place not in missing]
    for reason in dict.fromkeys(missing.values()):
        if not able:
            raise MivpgError(reason)
        print(f"  {reason}", flush=True)
    if missing:
        print(f"  These arms can run without it: {', '.join(able)}.", flush=True)
    return missing


def _run(data: ExperimentData, arm: Arm, seed: int) -> Run:
    """The run of an arm with a seed; arms of several epochs of one training share it."""
    if arm.recurrent:
        return _recurrent_decoder(data, arm, seed)
    run = _fine_tuning(data, arm, seed)
    return run if arm.epoch is None else _epoch_by_epoch(data, arm, run, seed)


def _caption_file(out: Path, arm: Arm, seed: int) -> Path:
    return out / "captions" / arm.data / f"seed-{seed}" / f"{arm.name}.jsonl"


def _epoch_by_epoch(data: ExperimentData, arm: Arm, run: FineTuning, seed: int) -> EpochByEpoch:
    assert run.training is not None
    num_epochs = max(data.scale.epochs)
    training = replace(
        run.training,
        output_dir=run.training.output_dir.with_name("epoch_by_epoch"),
        num_train_epochs=num_epochs,
        save_total_limit=num_epochs,
    )
    epochs = {epoch: _caption_file(data.out, replace(arm, name=f"epoch_{epoch}"), seed) for epoch in data.scale.epochs}
    num_steps = run.num_steps // run.training.num_train_epochs * num_epochs
    return EpochByEpoch(
        name=f"{arm.data} seed {seed} epoch by epoch",
        log=run.log.with_name("epoch_by_epoch.txt"),
        model=run.model,
        training=training,
        captions=dict.fromkeys(epochs.values(), training.dataset),
        epochs=epochs,
        generation=run.generation,
        prompt=run.prompt,
        num_steps=num_steps,
        cost=num_steps,
    )


def _recurrent_decoder(data: ExperimentData, arm: Arm, seed: int) -> Run:
    dataset = data.dataset(arm.data, arm.view, seed)
    place = Path(arm.data, f"seed-{seed}")
    if arm.backbone is None:
        features = train_features = data.stored[arm.data]
        made_by = f"the vision model of {data.scale.base}"
    else:
        features = data.backbone_features(arm.backbone, augmented=False)
        train_features = data.backbone_features(arm.backbone, augmented=True) if arm.augmented else features
        made_by = data.backbone(arm.backbone).description
    return RecurrentDecoder(
        name=f"{arm.data} seed {seed} {arm.name}",
        log=data.out / "logs" / place / f"{arm.name}.txt",
        captions={_caption_file(data.out, arm, seed): dataset},
        dataset=dataset,
        folder=data.out / "runs" / place / arm.name,
        train_features=train_features,
        features=features,
        config=BaselineConfig(features_from=made_by, seed=seed, **data.scale.recurrent),
        cost=100.0 * len(next(iter(train_features.values()))),
    )


def _fine_tuning(data: ExperimentData, arm: Arm, seed: int) -> FineTuning:
    settings = data.scale.settings[arm.data]
    dataset = data.dataset(arm.data, arm.view, seed, arm.num_pairs, arm.base)
    place = Path(arm.data, f"seed-{seed}")
    model = ModelConfig(base=data.base(arm.base), max_caption_tokens=settings.max_caption_tokens, **arm.model)
    training = TrainConfig(
        model=model,
        dataset=dataset,
        output_dir=data.out / "runs" / place / arm.name,
        prompt=PROMPT,
        seed=seed,
        validation=settings.generation,
        num_workers=0,
        save_total_limit=1,
        **settings.training,
    )
    num_pairs = len(one_pair_a_reference(select(dataset.load(), "train")))
    num_steps = training.num_train_epochs * math.ceil(num_pairs / training.batch_size) if arm.trains else 0
    return FineTuning(
        measures_cost=True,
        name=f"{arm.data} seed {seed} {arm.name}",
        log=data.out / "logs" / place / f"{arm.name}.txt",
        model=model,
        training=training if arm.trains else None,
        captions={_caption_file(data.out, arm, seed): dataset},
        generation=settings.generation,
        prompt=PROMPT,
        num_steps=num_steps,
        cost=num_steps * (3 if arm.model.get("patch_pooling") == "none" and arm.view == "all" else 1),
    )


class _Scores:
    """Scores of captions, each computed once: one METEOR for all."""

    def __init__(self, data: ExperimentData, runs: Mapping[Key, Run]) -> None:
        self.data = data
        self.runs = runs
        self.meteor = Meteor(find_java())
        self.scorers: dict[tuple[DataName, int], tuple[CaptionScorer, list[Sample], list[Sample]]] = {}

    def close(self) -> None:
        self.meteor.end()

    def scorer(self, data: DataName, seed: int) -> tuple[CaptionScorer, list[Sample], list[Sample]]:
        """The scorer of a test split, its bags, and those that floors draw from."""
        if (data, seed) not in self.scorers:
            samples = self.data.dataset(data, "pixels", seed).load()
            test = select(samples, "test")
            references = {sample.id: sample.captions for sample in test}
            scorer = CaptionScorer(references, METRICS, meteor=self.meteor)
            self.scorers[data, seed] = (scorer, test, select(samples, "train"))
        return self.scorers[data, seed]

    def of_run(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """`metrics`, and `cider` of each bag; None where the run failed."""
        file = _caption_file(self.data.out, arm, seed)
        if not file.exists():
            return None
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        cache = file.with_suffix(".scores.json")
        if cache.exists() and (known := json.loads(cache.read_text(encoding="utf-8")))["captions"] == digest:
            return known
        captions = read_captions(file)
        scorer, _, _ = self.scorer(arm.data, seed)
        scores = {
            "captions": digest,
            "metrics": scorer.score(captions),
            "cider": scorer.cider_of_each(captions),
            "of_labels": self.of_labels(captions, arm.data, seed),
        }
        write_whole(cache, json.dumps(scores) + "\n")
        return scores

    def of_labels(self, captions: Mapping[str, str], data: DataName, seed: int) -> dict[str, float]:
        """Of slides, whose captions repeat: how many name the subtype, and scores of captions not trained on."""
        if data != "slides":
            return {}
        _, test, train = self.scorer(data, seed)
        found = {"label": share_naming_the_label(captions, train, test)}
        rest = unseen_bags(train, test)
        found["unseen"] = len(rest) / len(test)
        if rest:
            references = {sample.id: sample.captions for sample in rest}
            scorer = CaptionScorer(references, METRICS, meteor=self.meteor)
            found |= scorer.score({sample.id: captions[sample.id] for sample in rest})
        return found

    def floors(self, data: DataName, seed: int) -> dict[str, dict[str, float]]:
        """What costs nothing, on the same test split."""
        cache = self.data.out / "captions" / data / f"seed-{seed}" / "floors.json"
        if not cache.exists():
            scorer, test, train = self.scorer(data, seed)
            floors = {
                name: scorer.score(those) | {"of_labels": self.of_labels(those, data, seed)}
                for name, those in caption_floors(train, test, seed=seed).items()
            }
            write_whole(cache, json.dumps(floors) + "\n")
        return json.loads(cache.read_text(encoding="utf-8"))


def _results(
    experiment: Experiment, seeds: Sequence[int], scores: _Scores, failed: Mapping[Key, str]
) -> dict[str, Any]:
    """What the JSON file of an experiment holds."""
    rows: list[dict[str, Any]] = []
    floors: list[dict[str, Any]] = []
    each: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for arm in experiment.arms:
        found = {seed: of_run for seed in seeds if (of_run := scores.of_run(arm, seed)) is not None}
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
                "failed": {str(seed): failed[arm.data, arm.name, seed] for seed in seeds if seed not in found},
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
        "seeds": list(seeds),
        "rows": rows,
        "floors": floors,
        "examples": _examples(experiment, scores, seeds[0]),
        "differences": [
            asdict(difference) | {"verdict": difference.verdict} for difference in _differences(experiment, each)
        ],
    }


def _finding(data: ExperimentData, experiment: Experiment, runs: Mapping[Key, Run]) -> dict[str, Any]:
    """What an experiment measures on its trained models: `values`, `tables`, and `pictures`, which lie beside.

    It is measured again only where a model is another, which its captions tell.
    """
    assert experiment.measure is not None
    models: dict[tuple[DataName, str], dict[int, Path]] = {}
    digest = hashlib.sha256()
    for arm in experiment.arms:
        for (name, arm_name, seed), run in sorted(runs.items()):
            if (name, arm_name) == (arm.data, arm.name) and isinstance(run, FineTuning) and run.is_done:
                assert run.training is not None
                models.setdefault((arm.data, arm.name), {})[seed] = run.training.output_dir / BEST
                for file in run.captions:
                    digest.update(f"{name} {arm_name} {seed} ".encode() + file.read_bytes())
    cache = data.out / f"{experiment.name}.finding.json"
    if cache.exists() and (known := read_json(cache))["models"] == digest.hexdigest():
        return known
    try:
        if not models:
            raise MivpgError("none of its models could be trained.")
        finding = experiment.measure(data, models)
    except MivpgError as error:
        return {"values": {}, "tables": [], "pictures": {}, "failed": str(error)}
    pictures = {title: f"{experiment.name}-{number}.png" for number, title in enumerate(finding.pictures, start=1)}
    for title, picture in pictures.items():
        write_whole(data.out / picture, finding.pictures[title])
    found = {
        "models": digest.hexdigest(),
        "values": finding.values,
        "tables": [asdict(table) for table in finding.tables],
        "pictures": pictures,
    }
    write_whole(cache, json.dumps(found) + "\n")
    return read_json(cache)  # as another run will find it


def _examples(experiment: Experiment, scores: _Scores, seed: int) -> list[dict[str, Any]]:
    """Of some test bags, what people and every arm write; which, the seed alone decides."""
    written = {}
    for arm in experiment.arms:
        file = _caption_file(scores.data.out, arm, seed)
        if file.exists():
            written[arm.title] = read_captions(file)
    if not experiment.num_examples or not written:
        return []
    _, test, _ = scores.scorer(experiment.arms[0].data, seed)
    chosen = random.Random(f"examples {seed}").sample(test, min(experiment.num_examples, len(test)))
    return [
        {
            "id": sample.id,
            "references": list(sample.captions),
            "captions": {title: captions[sample.id] for title, captions in written.items()},
        }
        for sample in chosen
    ]


COSTS = {
    "trained_parameters": "trained parameters",
    "visual_tokens": "visual tokens a bag",
    "seconds_a_step": "seconds a step",
    "peak_memory_gb": "peak memory, GB",
}


def _costs(scores: _Scores, arm: Arm, seeds: Iterable[int]) -> dict[str, list[float]]:
    """What the runs of an arm measured, by seed."""
    costs: dict[str, list[float]] = {}
    for seed in seeds:
        run = scores.runs[arm.data, arm.name, seed]
        if isinstance(run, FineTuning) and run.cost_file.exists():
            for name, value in json.loads(run.cost_file.read_text(encoding="utf-8")).items():
                costs.setdefault(name, []).append(value)
    return costs


def cost_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Data set, title and the median over seeds of what each arm costs."""
    rows = []
    for row in results["rows"]:
        if costs := row["costs"]:
            parameters, tokens, seconds, memory = (float(np.median(costs[name])) for name in COSTS)
            rows.append(
                [row["data"], row["title"], f"{parameters:,.0f}", f"{tokens:.0f}", f"{seconds:.3f}", f"{memory:.2f}"]
            )
    return rows


def _differences(
    experiment: Experiment, each: Mapping[tuple[str, str], Mapping[int, Mapping[str, float]]]
) -> list[Difference]:
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
            interval = bootstrap_interval_over_seeds(values)
            found.append(Difference(claim=claim, data=data, margin=margin, **interval))
    return found


# ── What is written ─────────────────────────────────────────────────────────────────────────────────────────────────


def _lead(scale: str, num_seeds: int) -> str:
    seeds = f"{num_seeds} seeds, each of which draws split and training order; mean ± standard deviation over seeds."
    if scale == "miniature":
        return f"Generated data: the figures say how the mechanism behaves, nothing of real photos or slides. {seeds}"
    return seeds


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return "–"
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def has_failed(results: Mapping[str, Any]) -> bool:
    """Whether an arm, or what was to be measured on them, failed."""
    return any(row["failed"] for row in results["rows"]) or "failed" in results.get("finding", {})


def table_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Arms, then floors: data set, title and metrics."""
    rows = [
        [row["data"], row["title"], *(spread(row["metrics"][metric]) for metric in METRICS)] for row in results["rows"]
    ]
    rows += [
        [row["data"], f"floor: {row['floor']}", *(spread(row["metrics"][metric]) for metric in METRICS)]
        for row in results["floors"]
    ]
    return rows


LABEL_COLUMNS = ["data", "", "subtype named", "captions not trained on", *METRICS]
LABEL_NOTE = (
    "Slides' captions repeat, so: how many captions are next to a training caption of the right subtype; and the "
    "scores of the slides whose own caption was not trained on, with their share of the test slides."
)


def label_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Of slides: how many captions name the subtype, and scores where the true caption was not trained on."""
    rows = []
    for row in [*results["rows"], *results["floors"]]:
        if of_labels := row["of_labels"]:
            name = row.get("title") or f"floor: {row['floor']}"
            columns = [[seed[key] for seed in of_labels if key in seed] for key in ("label", "unseen", *METRICS)]
            rows.append([row["data"], name, *(spread(column) for column in columns)])
    return rows


def difference_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Claims with their intervals and verdicts."""
    return [
        [
            difference["data"],
            f"{difference['claim']['better']} - {difference['claim']['worse']}",
            difference["claim"]["says"],
            f"{difference['mean']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})",
            f"±{difference['margin']:.3f}",
            difference["verdict"],
        ]
        for difference in results["differences"]
    ]


DIFFERENCE_COLUMNS = ["data", "arms", "claim", "CIDEr, 95 % interval", "margin", "effect"]


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table, the differences and what failed."""
    seeds = ", ".join(map(str, results["seeds"]))
    lines = [f"# {results['title']}", "", f"Seeds {seeds}; mean ± standard deviation.", ""]
    lines += markdown_table(["data", "", *METRICS], table_rows(results))
    if rows := label_rows(results):
        lines += ["", LABEL_NOTE, "", *markdown_table(LABEL_COLUMNS, rows)]
    for example in results["examples"]:
        lines += ["", f"{example['id']}: {' / '.join(example['references'])}", ""]
        lines += [f"- {title}: {caption}" for title, caption in example["captions"].items()]
    if rows := cost_rows(results):
        lines += ["", *markdown_table(["data", "", *COSTS.values()], rows)]
    if results["differences"]:
        lines += ["", *markdown_table(DIFFERENCE_COLUMNS, difference_rows(results))]
    finding = results.get("finding", {})
    for table in finding.get("tables", []):
        lines += ["", f"## {table['title']}", "", table["note"], "", *markdown_table(table["columns"], table["rows"])]
    for title, file in finding.get("pictures", {}).items():
        lines += ["", f"![{title}]({file})"]
    if "failed" in finding:
        lines += ["", f"Failed: {finding['failed']}"]
    for row in results["rows"]:
        for seed, reason in row["failed"].items():
            lines += ["", f"Failed: {row['title']} on {row['data']}, seed {seed}: {reason}"]
    return "\n".join(lines) + "\n"


def _write(out: Path, experiment: Experiment, results: Mapping[str, Any]) -> None:
    write_whole(out / f"{experiment.name}.json", json.dumps(results, indent=2) + "\n")
    write_whole(out / f"{experiment.name}.md", as_markdown(results))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["data", "arm", "metric", "seed", "value"])
    for row in results["rows"]:
        for metric, values in row["metrics"].items():
            for seed, value in zip(row["seeds"], values, strict=True):
                writer.writerow([row["data"], row["arm"], metric, seed, value])
    write_whole(out / f"{experiment.name}.csv", table.getvalue())
    if experiment.curve is not None:
        write_whole(out / f"{experiment.name}.png", draw_curve(experiment, results))


def draw_curve(experiment: Experiment, results: Mapping[str, Any]) -> bytes:
    """CIDEr over training pairs or epochs, a line a group of arms, with the standard deviation over seeds."""
    assert experiment.curve is not None
    label, lines = experiment.curve
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for line, name in lines.items():
        points = []
        for arm, row in zip(experiment.arms, results["rows"], strict=True):
            values = row["metrics"]["CIDEr"]
            if arm.name.rpartition("_")[0] == line and values:
                place = arm.num_pairs if arm.epoch is None else arm.epoch
                points.append((place, np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0))
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=name)
    axes.set(xlabel=label, ylabel="CIDEr", title=experiment.title)
    if all(arm.num_pairs for arm in experiment.arms):
        axes.set_xscale("log")
        ticks = sorted({arm.num_pairs for arm in experiment.arms if arm.num_pairs})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    if len(lines) > 1:
        axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _report_parts(out: Path, experiment: Experiment, results: Mapping[str, Any]) -> list[Part]:
    parts: list[Part] = [Table(title=experiment.title, columns=["data", "", *METRICS], rows=table_rows(results))]
    bars: dict[str, dict[str, float]] = {}
    for row in results["rows"]:
        if values := row["metrics"]["CIDEr"]:
            bars.setdefault(row["data"], {})[row["title"]] = float(np.mean(values))
    parts.append(BarChart(title=f"CIDEr: {experiment.name}", bars=bars))
    if experiment.curve is not None:
        alt = "The CIDEr of the table above as curves."
        png = (out / f"{experiment.name}.png").read_bytes()
        parts.append(Picture(title=f"Curves: {experiment.name}", png=png, alt=alt))
    if rows := label_rows(results):
        parts.append(Table(title=f"Subtypes: {experiment.name}", note=LABEL_NOTE, columns=LABEL_COLUMNS, rows=rows))
    for example in results["examples"]:
        rows = [["reference", reference] for reference in example["references"]]
        rows += [[title, caption] for title, caption in example["captions"].items()]
        parts.append(Table(title=f"{experiment.name}: {example['id']}", columns=["", "caption"], rows=rows))
    if rows := cost_rows(results):
        note = "Of a process with one thread: an optimizer step, and the peak of the whole process. Medians over seeds."
        parts.append(
            Table(title=f"Costs: {experiment.name}", note=note, columns=["data", "", *COSTS.values()], rows=rows)
        )
    if results["differences"]:
        parts.append(
            Table(
                title=f"Effects: {experiment.name}",
                note="Bootstrap over seeds and bags. Present: the interval lies above zero. Absent: it holds zero and "
                f"lies within a margin fixed beforehand, {MARGIN:.0%} of the second arm's CIDEr. With three seeds an "
                "interval covers less than 95 % where seeds differ more than bags do.",
                columns=DIFFERENCE_COLUMNS,
                rows=difference_rows(results),
            )
        )
    finding = results.get("finding", {})
    parts += [Table(**table) for table in finding.get("tables", [])]
    for title, file in finding.get("pictures", {}).items():
        parts.append(Picture(title=title, png=(out / file).read_bytes(), alt=title))
    failures = [finding["failed"]] if "failed" in finding else []
    failures += [
        f"{row['title']} on {row['data']}, seed {seed}: {reason}"
        for row in results["rows"]
        for seed, reason in row["failed"].items()
    ]
    if failures:
        parts.append(Text(title=f"Failed: {experiment.name}", paragraphs=failures))
    return parts
