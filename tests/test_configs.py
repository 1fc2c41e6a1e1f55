"""The configurations that come with the package: the paper's runs, and their miniature twins from end to end."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from mivpg.miniature.biopsies import claims
from test_cli import done

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ("abo", "coco", "patch_gastric")

SIZES_AND_PATHS = {
    *("model.base", "model.max_caption_tokens", "dataset.features", "output_dir"),
    *(f"dataset.{name}.root" for name in NAMES),
    *("dataset.coco.num_train_pairs", "num_train_epochs", "batch_size", "learning_rate", "warmup_steps", "bf16"),
    *("validation.num_beams", "validation.max_new_tokens", "validation.min_new_tokens"),
}
"""What a miniature run has otherwise; a small model takes large steps, and on a CPU no bf16."""

SMALL = {
    "abo": ("--num-products", "20"),
    "coco": ("--num-pictures", "30"),
    "patch-gastric": ("--num-slides", "20", "--mean-patches", "6"),
}
"""In place of what the commands in the files make."""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields by their dotted names."""
    fields = {}
    for name, value in values.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields


def commands_of(file: Path) -> list[list[str]]:
    """What stands in the comment of a file."""
    comment = "\n".join(line[1:] for line in file.read_text().splitlines() if line.startswith("#")).replace("\\\n", "")
    return [shlex.split(line) for line in re.findall(r"^ +mivpg (.*)$", comment, re.M)]


@pytest.mark.parametrize("name", NAMES)
def test_twins_differ_in_sizes_and_paths_alone(name):
    paper, miniature = (
        flat(yaml.safe_load((CONFIGS / kind / f"{name}.yaml").read_text())) for kind in ("paper", "miniature")
    )
    assert paper.keys() == miniature.keys()
    assert {field for field in paper if paper[field] != miniature[field]} <= SIZES_AND_PATHS


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_the_papers_run_name_its_own_files(name):
    file = CONFIGS / "paper" / f"{name}.yaml"
    values = yaml.safe_load(file.read_text())
    extract, train = commands_of(file)
    assert extract[1] == train[1] == f"configs/paper/{name}.yaml"
    options = dict(zip(extract[2::2], extract[3::2], strict=True))
    assert options["--model"] == values["model"]["base"]
    tokens = "cls" if values["model"]["patch_pooling"] == "cls" else "all"
    assert options.get("--tokens", "all") == tokens
    store = f"{options['--model'].rpartition('/')[2]}_224px_{tokens}_{options['--store-dtype']}"
    assert values["dataset"]["features"] == f"{options['--out']}/{store}"


@pytest.mark.usefixtures("quick_meteor")
@pytest.mark.parametrize(
    "name", ["abo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("coco", "patch_gastric"))]
)
def test_miniature_from_end_to_end(name, tmp_path, monkeypatch):
    """Every command that stands in the file, on fewer records and for one epoch."""
    monkeypatch.chdir(tmp_path)
    for folder in ("src", "configs"):
        (tmp_path / folder).symlink_to(CONFIGS.parent / folder)
    file = Path("configs", "miniature", f"{name}.yaml")
    make, extract, train, evaluate, caption = commands_of(file)
    config = yaml.safe_load(file.read_text())
    root = config["dataset"][name]["root"]

    few = ("--dataset.coco.num-train-pairs", "60") if name == "coco" else ()
    done(*make, *SMALL[make[1]])
    assert "bags.jsonl" in done(*extract, *few)
    done(*train, "--num-train-epochs", "1", *few)
    done(*evaluate, "--num-beams", "1", *few)
    results = json.loads(Path(evaluate[evaluate.index("--out") + 1]).read_text())
    assert results["num_bags"] >= 2 and results["metrics"]["CIDEr"] > 0
    shown = [path for pattern in caption[3:] for path in sorted(Path().glob(pattern))]
    if name == "coco":  # fewer scenes have other names
        shown = sorted(Path(root, "val2014").iterdir())[:1]
    assert shown
    text = done(*caption[:3], *shown).strip()
    assert text
    if name == "patch_gastric":
        assert claims(text)
