"""The README's code runs, with a small random BLIP-2 in place of the real one and the photos that it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from families import save_blip2
from mivpg.cli import main

README = Path(__file__).resolve().parents[1] / "README.md"
HUB_ID = "Salesforce/blip2-opt-2.7b"


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands_of(page: Path = README, language: str = "bash") -> list[str]:
    """What the page says to type into a shell, a line each; comments are left out."""
    text = "\n".join(blocks(language, page)).replace("\\\n", "")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line and not line.startswith("#")]


@pytest.fixture
def shop(tmp_path, monkeypatch) -> Path:
    """A folder with the photos, `products.csv` and `run.yaml` of the README."""
    save_blip2(tmp_path / "blip2")
    (tmp_path / "photos").mkdir()
    for name, colour in {"front": "red", "side": "green", "back": "blue"}.items():
        Image.new("RGB", (40, 30), colour).save(tmp_path / "photos" / f"{name}.jpg")
    header, *rows = blocks("csv")[0].splitlines()
    more = [row.replace(row.split(",")[0], f"{row.split(',')[0]}-{i}") for i in range(10) for row in rows]
    (tmp_path / "products.csv").write_text("\n".join([header, *more]))
    run = yaml.safe_load(blocks("yaml")[0].replace(HUB_ID, str(tmp_path / "blip2")))
    run |= {"num_train_epochs": 1, "num_workers": 0, "validation": {"num_beams": 1, "max_new_tokens": 3}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    bags = np.repeat(np.arange(20), 3)
    np.savez(tmp_path / "set.npz", x=np.random.default_rng(0).normal(size=(60, 4)), bag=bags, y=np.arange(20) % 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python(shop, capsys):
    (code,) = blocks("python")
    exec(code.replace(HUB_ID, str(shop / "blip2")), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.usefixtures("quick_meteor")
def test_commands(shop):
    commands = [command for command in commands_of() if command.startswith("mivpg ")]
    assert [command.split()[1] for command in commands] == [
        "demo",
        "caption",
        "--version",
        "caption",
        "train",
        "evaluate",
        "caption",
        "caption",
        "train",
        "extract",
        "classify",
        "reproduce",
    ]
    for command in commands:
        arguments = command.replace(HUB_ID, str(shop / "blip2")).split()[1:]
        if "runs/demo" in command or "reproduce" in command:
            continue  # tests/test_demo.py runs the first two, and the last has a test below
        if arguments[0] in ("caption", "evaluate"):
            arguments += ["--max-new-tokens", "3", "--num-beams", "1"]
        if arguments[0] == "classify":
            arguments += ["--num-train-epochs", "2"]
        main(arguments)
    assert len(list((shop / "features" / "blip2_28px_all_float16").glob("*.safetensors"))) == 20
    assert len(list((shop / "runs" / "classify").glob("fold-*.jsonl"))) == 5
    assert (shop / "metrics.json").is_file() and (shop / "captions.jsonl").is_file()


def test_reproduce_is_asked_for_what_test_reproduce_runs(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("mivpg.experiments.reproduce.reproduce", lambda names, **how: asked.append((names, how)) or {})
    (command,) = (command for command in commands_of() if command.startswith("mivpg reproduce"))
    main(command.split()[1:])
    how = {"scale": "miniature", "out": Path("runs/paper"), "num_seeds": 3, "data_root": None}
    assert asked == [(("table2",), how)]


@pytest.mark.slow
def test_several_processes(shop):
    """The line for four GPUs, with two processes on the CPU."""
    (command,) = (command for command in commands_of() if command.startswith("torchrun"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = command.replace("--nproc-per-node 4", "--nproc-per-node 2").split()[1:]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run([*launcher, *words], check=True, capture_output=True, env=os.environ | {"PATH": path})
    assert (shop / "runs" / "products" / "best" / "model.safetensors").is_file()


def test_no_command_is_left_out():
    """`mivpg` in bash runs above, in sh in `test_docs.py`; the others install, make or start it."""
    programs = {command.split()[0] for language in ("bash", "sh") for command in commands_of(README, language)}
    assert programs == {"mivpg", "torchrun", "git", "python3", "pip", "make"}
    assert [command for command in commands_of() if command.startswith("make")] == ["make demo"]


def test_every_field_of_its_yaml_is_known():
    from dataclasses import fields

    from mivpg.datasets import DatasetConfig
    from mivpg.training import ModelConfig, TrainConfig

    for block in blocks("yaml"):
        values = yaml.safe_load(block)
        assert values.keys() <= {field.name for field in fields(TrainConfig)}
        assert values["model"].keys() <= {field.name for field in fields(ModelConfig)}
        assert values.get("dataset", {}).keys() <= {field.name for field in fields(DatasetConfig)}
