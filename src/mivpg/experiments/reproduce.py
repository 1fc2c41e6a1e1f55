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

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mivpg.baselines.training import BaselineConfig
from mivpg.errors import MivpgError
from mivpg.experiments.data import PROMPT, SCALES, BaseName, DataName, ExperimentData, View
from mivpg.experiments.pages import report_parts, write_results
from mivpg.experiments.paper import Arm, Experiment, experiments
from mivpg.experiments.results import Key, Scores, results_of
from mivpg.experiments.runner import EpochByEpoch, FineTuning, RecurrentDecoder, Run, run_all
from mivpg.files import read_json, refuse_used, write_whole
from mivpg.report import Part, training_curves, what_was_run, write_report
from mivpg.training import BEST, LOG_FILE, ModelConfig, TrainConfig

CLAIM = "reproduce.json"
"""Says what a folder's runs depend on."""


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
    if data_root is not None and not data_root.is_dir():
        raise MivpgError(f"--data-root {data_root} is no folder, expected the one with abo, patch_gastric and coco.")
    names = [*names, *(name for name in known if "all" in names and not known[name].apart)]
    chosen = [known[name] for name in dict.fromkeys(names) if name != "all"]
    _claim(out, scale, data_root)
    data = ExperimentData(scale=SCALES[scale], out=out, data_root=data_root)
    arms = {(arm.data, arm.name): arm for experiment in chosen for arm in experiment.arms}
    seeds = range(num_seeds)
    missing = _prepare(data, arms.values())
    runs: dict[Key, Run] = {}
    failed: dict[Key, str] = {}
    with_costs = {(arm.data, arm.name) for experiment in chosen if experiment.with_costs for arm in experiment.arms}
    for key, arm in arms.items():
        for seed in seeds:
            if reason := missing.get(arm.place):
                failed[arm.data, arm.name, seed] = reason
                continue
            try:
                runs[arm.data, arm.name, seed] = _run(data, arm, seed, measures_cost=key in with_costs)
            except MivpgError as error:  # the other arms can run
                print(f"  {arm.data} {arm.name} cannot run: {error}", flush=True)
                failed[arm.data, arm.name, seed] = str(error)
    print(f"Fine-tuning and captioning: {len(arms)} arms, {num_seeds} seeds …", flush=True)
    reasons = run_all(list(runs.values()))
    failed |= {key: f"{run.log}: {reasons[run.name]}" for key, run in runs.items() if run.name in reasons}
    print("Scoring …", flush=True)
    with closing(Scores(data)) as scores:
        results = {experiment.name: results_of(experiment, seeds, scores, failed) for experiment in chosen}
    for experiment in chosen:
        if experiment.measure is not None:
            print(f"Measuring: {experiment.name} …", flush=True)
            results[experiment.name]["finding"] = _finding(data, experiment, runs)
        write_results(out, experiment, results[experiment.name])
    parts: list[Part] = []
    for experiment in chosen:
        parts += report_parts(out, experiment, results[experiment.name])
        parts += training_curves(_logs(experiment, runs), title=f"Training: {experiment.name}, seed 0")
    settings = {"experiments": [experiment.name for experiment in chosen], "seeds": num_seeds}
    write_report(
        out / "report.html",
        title="MIVPG: the paper's experiments" + (" in miniature" if scale == "miniature" else ""),
        lead=_lead(scale, num_seeds),
        parts=[*parts, *what_was_run(settings | read_json(out / CLAIM))],
    )
    return results


def _logs(experiment: Experiment, runs: Mapping[Key, Run]) -> dict[str, Path]:
    """By arm, and data set where there are several, where the runs of the first seed log their training."""
    several = len({arm.data for arm in experiment.arms}) > 1
    logs = {}
    for arm in experiment.arms:
        run = runs.get((arm.data, arm.name, 0))
        if isinstance(run, FineTuning) and run.training is not None and arm.epoch is None:
            logs[f"{arm.data}: {arm.title}" if several else arm.title] = run.training.output_dir / LOG_FILE
    return logs


def _claim(out: Path, scale: str, data_root: Path | None) -> None:
    """Makes the folder that of these settings, so that no run is taken for one of others."""
    mark = out / CLAIM
    settings = asdict(SCALES[scale]) | {"data_root": data_root and data_root.resolve()}
    del settings["base"]  # of which runs say by its weights
    settings["settings"] = {
        name: {key: value for key, value in of_data.items() if key != "draw"}
        for name, of_data in settings["settings"].items()
    }
    asked = json.loads(json.dumps(settings, default=str))
    if mark.exists():
        found = read_json(mark)
        known = found if isinstance(found, dict) else {}
        other = [name for name in asked if known.get(name) != asked[name]]
        if "name" in other:
            raise MivpgError(f"{out} holds experiments at the scale {known.get('name')!r}; name another folder.")
        if other:
            raise MivpgError(f"{out} holds experiments with another {', '.join(other)}; name another folder.")
        return
    refuse_used(out)
    write_whole(mark, json.dumps(asked, indent=2) + "\n")


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


def _run(data: ExperimentData, arm: Arm, seed: int, *, measures_cost: bool) -> Run:
    """The run of an arm with a seed; arms of several epochs of one training share it."""
    if arm.recurrent:
        return _recurrent_decoder(data, arm, seed)
    run = _fine_tuning(data, arm, seed, measures_cost=measures_cost)
    return run if arm.epoch is None else _epoch_by_epoch(data, arm, run, seed)


def _settings(training: TrainConfig) -> dict[str, Any]:
    """What a training depends on, as JSON has it, but for data and base, and without the places where things lie."""
    settings = asdict(training)
    del settings["dataset"], settings["output_dir"], settings["model"]["base"]
    return json.loads(json.dumps(settings, default=str))


def _epoch_by_epoch(data: ExperimentData, arm: Arm, run: FineTuning, seed: int) -> EpochByEpoch:
    assert run.training is not None
    num_epochs = max(data.scale.epochs)
    training = replace(
        run.training,
        output_dir=run.training.output_dir.with_name("epoch_by_epoch"),
        num_train_epochs=num_epochs,
        save_total_limit=num_epochs,
    )
    epochs = {epoch: data.caption_file(arm.data, f"epoch_{epoch}", seed) for epoch in data.scale.epochs}
    num_steps = run.num_steps // run.training.num_train_epochs * num_epochs
    return EpochByEpoch(
        name=f"{arm.data} seed {seed} epoch by epoch",
        log=run.log.with_name("epoch_by_epoch.txt"),
        model=run.model,
        training=training,
        captions=dict.fromkeys(epochs.values(), training.dataset),
        epochs=epochs,
        made_of={**run.made_of, "training": _settings(training)},
        generation=run.generation,
        prompt=run.prompt,
        caption_batch=run.caption_batch,
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
    config = BaselineConfig(features_from=made_by, seed=seed, **data.scale.recurrent)
    made_of = {"config": asdict(config), "augmented": arm.augmented}
    if arm.backbone is None:
        made_of["base"] = data.weights_of_base(arm.base)
    return RecurrentDecoder(
        name=f"{arm.data} seed {seed} {arm.name}",
        log=data.out / "logs" / place / f"{arm.name}.txt",
        captions={data.caption_file(arm.data, arm.name, seed): dataset},
        dataset=dataset,
        folder=data.out / "runs" / place / arm.name,
        train_features=train_features,
        features=features,
        config=config,
        made_of=made_of,
        cost=100.0 * len(next(iter(train_features.values()))),
    )


def _fine_tuning(data: ExperimentData, arm: Arm, seed: int, *, measures_cost: bool) -> FineTuning:
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
    num_pairs = data.count_train_pairs(arm.data, seed, arm.num_pairs)
    num_steps = training.num_train_epochs * math.ceil(num_pairs / training.batch_size) if arm.trains else 0
    made_of = {
        "base": data.weights_of_base(arm.base),
        "data": {"view": arm.view, "num_pairs": arm.num_pairs},
        "training": _settings(training),
        "trains": arm.trains,
    }
    return FineTuning(
        measures_cost=measures_cost and arm.trains,
        name=f"{arm.data} seed {seed} {arm.name}",
        log=data.out / "logs" / place / f"{arm.name}.txt",
        model=model,
        training=training if arm.trains else None,
        captions={data.caption_file(arm.data, arm.name, seed): dataset},
        made_of=made_of,
        caption_batch=settings.caption_batch,
        generation=settings.generation,
        prompt=PROMPT,
        num_steps=num_steps,
        cost=num_steps * (3 if arm.model.get("patch_pooling") == "none" and arm.view == "all" else 1),
    )


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


def _lead(scale: str, num_seeds: int) -> str:
    seeds = f"{num_seeds} seeds, each of which draws split and training order; mean ± standard deviation over seeds."
    if scale == "miniature":
        return f"Generated data: the figures say how the mechanism behaves, nothing of real photos or slides. {seeds}"
    return seeds
