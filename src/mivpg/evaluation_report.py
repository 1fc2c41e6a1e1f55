"""The page that `mivpg evaluate` writes: scores beside floors, captions that did best and worst, and what was run."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from mivpg.bags import Sample
from mivpg.files import read_json
from mivpg.report import BagExample, BarChart, Examples, Part, Table, training_curves, what_was_run, write_report
from mivpg.training import BEST, CONFIG_FILE, LOG_FILE

NUM_EXAMPLES = 4
"""Of each kind."""
MOST_PHOTOS = 12
"""Of an example; a slide has thousands of patches."""

FLOOR_TITLES = {
    "constant": "Floor: one constant caption",
    "random_train": "Floor: a random training caption",
    "label": "Floor: the label's most common caption",
}
MODEL = "model"


def write_evaluation_report(
    path: Path,
    results: Mapping[str, Any],
    predictions: Mapping[str, str],
    samples: Sequence[Sample],
    *,
    settings: Mapping[str, Any],
) -> None:
    """Writes the page.

    Args:
        path: The HTML file.
        results: What METRICS.json holds.
        predictions: Bag id to caption.
        samples: The bags that were scored.
        settings: What captions and scores depend on.

    Raises:
        BagError: A photo cannot be read.
    """
    log = training_log(Path(results["model"]))
    models = {MODEL: results["metrics"]} | {FLOOR_TITLES[name]: scores for name, scores in results["floors"].items()}
    note = f"{results['num_bags']} bags of split {results['split']} with {results['num_references']} references"
    if unreadable := results["num_unreadable_bags"]:
        note += f"; {unreadable} more could not be read"
    note += ". A floor looks at no image."
    if not results["floors"]:
        note += " There are no floors, since the data set has no training captions."
    parts: list[Part] = [
        Table(
            title="Scores",
            note=note,
            columns=["", *results["metrics"]],
            rows=[[name, *(f"{score:.3f}" for score in scores.values())] for name, scores in models.items()],
            emphasised=[MODEL],
        ),
        BarChart(
            title="CIDEr",
            note="It weighs words by how many of these bags use them, so it compares on the same bags alone.",
            bars={"": {name: scores["CIDEr"] for name, scores in models.items()}},
            emphasised=MODEL,
        ),
        *(training_curves({MODEL: log}) if log is not None else []),
        *_examples(results["cider_of_each"], predictions, samples, seed=results["seed"]),
        *what_was_run(settings),
    ]
    write_report(path, title="Captions, scored", lead=f"What {results['model']} writes of bags.", parts=parts)


def training_log(model: Path) -> Path | None:
    """`log.jsonl` of the run that made a model; None where the folder beside it is of no run, or of another.

    A run's `best/` holds the run's own `config.yaml`. A `checkpoint-<step>/` holds what was logged up to its step, with
    which the run's log begins. Anything else in a run's folder came there by other hands.
    """
    folder = model.resolve()
    log, state = folder.parent / LOG_FILE, folder / TRAINER_STATE_NAME
    if not log.is_file():
        return None
    if folder.name == BEST:
        configs = [file for file in (folder / CONFIG_FILE, folder.parent / CONFIG_FILE) if file.is_file()]
        is_of_run = len(configs) == 2 and configs[0].read_bytes() == configs[1].read_bytes()
    elif state.is_file():
        logged = read_json(state)["log_history"]
        lines = log.read_text(encoding="utf-8").splitlines()
        is_of_run = bool(logged) and [json.loads(line) for line in lines[: len(logged)]] == logged
    else:
        is_of_run = False
    return log if is_of_run else None


def _examples(
    cider: Mapping[str, float], predictions: Mapping[str, str], samples: Sequence[Sample], *, seed: int
) -> list[Part]:
    """Bags drawn by the seed, and those of the highest and the lowest CIDEr."""
    drawn = random.Random(f"examples {seed}").sample(samples, min(NUM_EXAMPLES, len(samples)))
    by_score = sorted(samples, key=lambda sample: (-cider[sample.id], sample.id))
    chosen = {
        "Captions drawn by the seed": ("Whatever they score.", drawn),
        "Captions that scored best": ("By their own CIDEr.", by_score[:NUM_EXAMPLES]),
        "Captions that scored worst": ("The worst first.", by_score[: -NUM_EXAMPLES - 1 : -1]),
    }
    return [
        Examples(
            title=title,
            note=f"{note} Of a bag with more photos the first {MOST_PHOTOS} are shown.",
            examples=[
                BagExample(
                    id=sample.id,
                    title=f"CIDEr {cider[sample.id]:.2f}",
                    images=sample.images[:MOST_PHOTOS],
                    weights=None,
                    references=sample.captions,
                    captions={MODEL: predictions[sample.id]},
                )
                for sample in those
            ],
            emphasised=MODEL,
        )
        for title, (note, those) in chosen.items()
    ]
