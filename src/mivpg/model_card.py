"""The README.md beside every saved model: base, data, metrics with floors, limits, and the licence of each part.

What is not known is called not known. What a training run knows stands in the card's head, too, so that a model which
is loaded and saved again keeps it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from mivpg import __version__
from mivpg.configuration_mivpg import PROMPTS_PER_IMAGE, MivpgConfig
from mivpg.files import write_whole
from mivpg.templating import make_environment

CARD = "README.md"
NOT_KNOWN = "not known"
MODEL = "this model"
"""Its row among the scores; the others are floors."""

TAGS = ("multiple-instance-learning", "arxiv:2406.02987")

DATA_LICENCES = {
    "bag_file": NOT_KNOWN,
    "abo": "Amazon Berkeley Objects: CC BY 4.0 in the current release, CC BY-NC 4.0 in older ones; "
    "captions of Cap3D: ODC-BY, as their card says",
    "patch_gastric": "PatchGastricADC22: no licence file; its README says research use only",
    "coco": NOT_KNOWN,
}
"""By the field of `DatasetConfig`."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run knows of the model that came of it."""

    data: str
    """What it was trained on, in words."""
    data_licence: str
    scored_on: str = ""
    """The bags that scores are of, in words; empty where nothing scored it."""
    scores: Mapping[str, Mapping[str, float]]
    """`MODEL` and floors to metrics."""


def write_model_card(
    folder: Path,
    config: MivpgConfig,
    base: Mapping[str, Mapping[str, Any]] | None,
    *,
    is_whole: bool,
    training: Training | None,
    was_loaded: bool = False,
    more_tags: Sequence[str] = (),
) -> None:
    """Writes the card of a captioner or a classifier of bags.

    Args:
        folder: That of the model.
        config: Of the model.
        base: Its parts as `MivpgConfig.base` has them; None = it is of no base.
        is_whole: Whether the folder holds the base, too.
        training: What is known of its training, if anything.
        was_loaded: Whether `training` is that of the checkpoint which was loaded, whatever has happened since.
        more_tags: Beside those of every model here.
    """
    entries = {part: _Base.of(part, entry) for part, entry in (base or {}).items()}
    head = {
        "library_name": "mivpg",
        "pipeline_tag": None if config.text_config is None else "image-to-text",
        "base_model": [entry.name for entry in entries.values() if entry.is_on_hub],
        "license": "unknown",
        "tags": list(dict.fromkeys([*TAGS, *more_tags])),
        "mivpg": None if training is None else asdict(training),
    }
    card = make_environment(is_html=False).get_template("model_card.md.jinja")
    text = card.render(
        head=yaml.safe_dump({k: v for k, v in head.items() if v}, sort_keys=False, allow_unicode=True),
        version=__version__,
        config=config,
        base=entries.values(),
        is_whole=is_whole,
        training=training,
        was_loaded=was_loaded,
        beaten_on=_beaten_on(training) if training is not None else {},
        NOT_KNOWN=NOT_KNOWN,
        prompts_of="an image" if config.aggregator in PROMPTS_PER_IMAGE else "a bag",
    )
    write_whole(folder / CARD, text)


def write_base_card(folder: Path, described: Mapping[str, Any]) -> None:
    """Writes the card of a base model that `mivpg.miniature.base` has made.

    Args:
        folder: That of the model.
        described: What its `recipe.json` holds.
    """
    write_whole(folder / CARD, make_environment(is_html=False).get_template("base_card.md.jinja").render(**described))


def is_made(folder: Path) -> bool:
    """Whether a model's card was made by `write_model_card` or by transformers, and not written by hand."""
    text = (folder / CARD).read_text(encoding="utf-8")
    return "\n# A model of mivpg " in text or "This model card has been automatically generated." in text


def read_training(folder: Path) -> Training | None:
    """What a model's card knows of its training; None where it is no card of ours, or knows nothing."""
    try:
        head = metadata_load(folder / CARD) if (folder / CARD).is_file() else None
        training = Training(**head["mivpg"]) if head is not None else None
        if training is not None:
            _beaten_on(training)  # of other shape than ours, it raises
        return training
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
    ):  # people may write into a card what they like
        return None


@dataclass(frozen=True, kw_only=True)
class _Base:
    """A model that this one stands on."""

    part: str
    name: str
    """Its Hub id, or its folder's name: where that lies is nobody else's business."""
    is_on_hub: bool
    made_of: str
    """The commit, or digests of the weight files where they are known."""
    licence: str

    @classmethod
    def of(cls, part: str, entry: Mapping[str, Any]) -> "_Base":
        if entry["revision"] is not None:
            return cls(
                part=part.replace("_", " "),
                name=entry["path"],
                is_on_hub=True,
                made_of=f"commit {entry['revision']}",
                licence=f"{NOT_KNOWN} here; its page on the Hub says",
            )
        folder = Path(entry["path"])
        digests = [f"sha256 of {name} {digest}" for name, digest in entry.get("sha256", {}).items()]
        licence = _licence_of(folder)
        return cls(
            part=part.replace("_", " "),
            name=folder.name,
            is_on_hub=False,
            made_of=", ".join(digests),
            licence=NOT_KNOWN if licence is None else f"{licence}, as its card says",
        )


def _licence_of(folder: Path) -> str | None:
    """What the card in a folder says."""
    try:
        head = metadata_load(folder / CARD) if (folder / CARD).is_file() else None
    except (ValueError, yaml.YAMLError):
        return None
    licence = (head or {}).get("license")
    return None if licence in (None, "unknown") else str(licence)


def _beaten_on(training: Training) -> dict[str, str]:
    """Metric to a floor that reaches as much as the model."""
    found: dict[str, str] = {}
    for floor, scores in training.scores.items():
        for metric, value in scores.items():
            if floor != MODEL and value >= training.scores[MODEL][metric]:
                found[metric] = floor
    return found
