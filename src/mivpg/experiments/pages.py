"""What experiments found, for people and for machines: Markdown, CSV, JSON, curves, and the parts of the report."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mivpg.experiments.paper import Experiment
from mivpg.experiments.results import MARGIN, METRICS
from mivpg.files import write_whole
from mivpg.report import BarChart, Part, Picture, Table, Text, markdown_table, spread

COSTS = {
    "trained_parameters": "trained parameters",
    "visual_tokens": "visual tokens a bag",
    "seconds_a_step": "seconds a step",
    "peak_memory_gb": "peak memory, GB",
}


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
    note = f" {results['note']}" if results["note"] else ""
    lines = [f"# {results['title']}", "", f"Seeds {seeds}; mean ± standard deviation.{note}", ""]
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


def write_results(out: Path, experiment: Experiment, results: Mapping[str, Any]) -> None:
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
    if experiment.curve is not None and any(row["seeds"] for row in results["rows"]):
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


def report_parts(out: Path, experiment: Experiment, results: Mapping[str, Any]) -> list[Part]:
    columns = ["data", "", *METRICS]
    parts: list[Part] = [Table(title=experiment.title, note=experiment.note, columns=columns, rows=table_rows(results))]
    bars: dict[str, dict[str, float]] = {}
    for row in results["rows"]:
        if values := row["metrics"]["CIDEr"]:
            bars.setdefault(row["data"], {})[row["title"]] = float(np.mean(values))
    if bars:
        parts.append(BarChart(title=f"CIDEr: {experiment.name}", bars=bars))
    if bars and experiment.curve is not None:
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
