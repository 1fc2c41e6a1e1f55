"""The command line as its users meet it: what each command writes, and the one line that bad input gets."""

import io
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import TrainerCallback

from families import save_blip2, save_language_model, save_vision_model
from mivpg import (
    GenerationOptions,
    MivpgError,
    MivpgForConditionalGeneration,
    MivpgProcessor,
    images,
    score_captions,
    training,
)
from mivpg.cli import main
from mivpg.datasets import BagFileConfig, CocoConfig, DatasetConfig, PatchGastricConfig
from mivpg.miniature import BASE_MODEL
from test_abo import Shop
from test_images import png_of
from warm import Result

FAST = ("--num-beams", 1, "--max-new-tokens", 6)


def mivpg(*arguments: Any) -> Result:
    """Runs a command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
    return Result(code, out.getvalue(), err.getvalue())


def mivpg_process(*arguments: Any, **environment: str) -> Result:
    """Runs a command as a user does."""
    command = [sys.executable, "-m", "mivpg.cli", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return Result(run.returncode, run.stdout, run.stderr)


def done(*arguments: Any) -> str:
    """The standard output of a command that has to succeed, and to keep quiet beside it."""
    result = mivpg(*arguments)
    assert (result.code, result.err) == (0, ""), result
    return result.out


def refusal(folder: Path, *arguments: Any, code: int = 1) -> str:
    """The line that a command is refused with; it leaves the folder as it was."""
    before = contents(folder)
    result = mivpg(*arguments)
    assert result.code == code, result
    assert one_line(result.err)
    assert contents(folder) == before
    return result.err.removeprefix("mivpg: ").removesuffix("\n")


def one_line(err: str) -> bool:
    return err.startswith("mivpg: ") and err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


class World:
    """Small models, and the photos of seven products; photo `i` shows something else than photo `k`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blip2 = save_blip2(folder / "blip2")
        self.vision = save_vision_model(folder / "vision", "clip_vision_model")
        self.language = save_language_model(folder / "language", "opt")
        self.photos = [folder / f"{i}.png" for i in range(7)]
        for i, path in enumerate(self.photos):
            photo(i).save(path)
        splits = ["train"] * 4 + ["val"] + ["test"] * 2
        self.bags = write_bags(
            folder / "bags.jsonl",
            *(
                {
                    "id": f"product {i}",
                    "images": [f"{i}.png", f"{(i + 1) % 7}.png"],
                    "captions": [f"a chair with {i} legs", f"chair, {i} legs"],
                    "split": split,
                }
                for i, split in enumerate(splits)
            ),
        )

    def config(self, folder: Path, **fields: Any) -> Path:
        """A training config whose run goes into `folder`."""
        qformer = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "hidden_dropout_prob": 0.0,
            "initializer_range": 0.2,
        }
        defaults = {
            "model": {
                "language": str(self.language),
                "vision": str(self.vision),
                "num_query_tokens": 4,
                "qformer": qformer,
            },
            "dataset": {"bag_file": {"path": str(self.bags)}},
            "output_dir": str(folder / "run"),
            "num_train_epochs": 2,
            "batch_size": 4,
            "num_workers": 0,
            "validation": {"num_beams": 1, "max_new_tokens": 4},
        }
        return write_yaml(folder / "train.yaml", defaults | fields)


def photo(i: int) -> Image.Image:
    y, x = np.mgrid[0:24, 0:40]
    return Image.fromarray(np.stack([(x * 6 + i * 40) % 256, (y * (10 - i)) % 256, 255 - x * 3], -1).astype(np.uint8))


def write_yaml(path: Path, fields: Any) -> Path:
    path.write_text(yaml.safe_dump(fields))
    return path


def write_bags(path: Path, *bags: dict[str, Any]) -> Path:
    """A bag file; photos of other folders are linked beside it, since it may name nothing outside of its own."""
    photos = [Path(image) for bag in bags for image in bag.get("images", ())]
    for photo in photos:
        if photo.is_absolute() and not (path.parent / photo.name).exists():
            (path.parent / photo.name).symlink_to(photo)
    names = [
        bag | ({"images": [Path(image).name for image in bag["images"]]} if "images" in bag else {}) for bag in bags
    ]
    path.write_text("".join(json.dumps(bag) + "\n" for bag in names))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run and what the terminal showed."""
    folder = tmp_path_factory.mktemp("trained")
    out = done("train", world.config(folder), "--learning-rate", 0.01, "--model.qformer.hidden-dropout-prob", 0.1)
    return folder / "run", out


# ── What each command does ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["import mivpg", "from mivpg.cli import main; main(['--help'])"])
def test_help_and_import_load_neither_torch_nor_transformers(command):
    code = f"{command}\nimport sys; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "[]\n")
    assert ("Usage: mivpg COMMAND" in run.stdout) == ("--help" in command)


def test_every_public_name_is_found():
    package = sys.modules["mivpg"]
    names = {"DatasetConfig", "GenerationOptions", "ModelConfig", "as_seen", "load_bag_file", "load_labelled_bags"}
    assert names <= set(package.__all__)
    assert all(getattr(package, name) for name in package.__all__)


def test_help_lists_commands_and_their_fields():
    for command in ("train", "caption", "evaluate"):
        assert command in done("--help")
    assert "--learning-rate" in done("train", "--help")
    assert "--strict" in done("caption", "--help")
    for field in ("--dataset.abo.root", "--num-beams", "--validation.num-beams"):
        assert field in done("evaluate", "--help")


def test_version_names_what_the_package_stands_on():
    out = done("--version")
    assert f"torch {torch.__version__}" in out
    assert out.startswith("mivpg ")
    assert "Java: " in out


def test_train_goes_by_the_file_and_first_by_the_command_line(trained):
    folder, out = trained
    assert "Training on 8 captions of 4 bags, validating on 1 bags." in out
    assert out.endswith(f"{folder / 'best'}\n")
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["learning_rate"] == 0.01
    assert written["num_train_epochs"] == 2
    assert written["model"]["qformer"]["hidden_size"] == 16
    assert written["model"]["qformer"]["hidden_dropout_prob"] == 0.1
    model = MivpgForConditionalGeneration.from_pretrained(folder / "best")
    assert model.config.qformer_config.hidden_size == 16
    assert model.config.qformer_config.hidden_dropout_prob == 0.1
    assert model.config.qformer_config.attention_probs_dropout_prob == 0.1  # BLIP-2's, which the file leaves alone


class InterruptAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_is_resumed(world, trained, tmp_path, monkeypatch):
    command = ("train", world.config(tmp_path), "--learning-rate", 0.01, "--model.qformer.hidden-dropout-prob", "0.1")
    with monkeypatch.context() as patch:
        init = training.MivpgTrainer.__init__

        def interrupted(self, *arguments, **options):
            init(self, *arguments, **options)
            self.add_callback(InterruptAt(3))

        patch.setattr(training.MivpgTrainer, "__init__", interrupted)
        result = mivpg(*command)
    assert (result.code, result.err) == (130, "mivpg: interrupted\n")

    assert "output_dir" in refusal(tmp_path, *command)
    assert "learning_rate = 0.01 and is resumed with 0.1" in refusal(
        tmp_path, *command[:3], 0.1, "--resume", *command[4:]
    )
    assert "Resuming from step 2 (epoch 1.00)." in done(*command, "--resume")
    unbroken, resumed = (load_file(run / "best" / "model.safetensors") for run in (trained[0], tmp_path / "run"))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert "This run is finished." in done(*command, "--resume")


def test_resume_without_a_run_starts_one(world, tmp_path):
    assert "there is nothing to resume" in done("train", world.config(tmp_path, num_train_epochs=1), "--resume")


def test_caption_prints_the_caption_of_one_bag(world):
    model, processor = (of.from_pretrained(world.blip2) for of in (MivpgForConditionalGeneration, MivpgProcessor))
    for bag in (world.photos[:1], world.photos[1:4]):
        inputs = processor(images=[[Image.open(path) for path in bag]], text=["a photo of"])
        ids = model.generate(**inputs, num_beams=3, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        out = done("caption", *bag, "--model", world.blip2, "--prompt", "a photo of", *("--num-beams", 3), *FAST[2:])
        assert out == f"{expected}\n"


def test_without_a_model_the_one_in_the_package_captions_and_says_what_it_is(world):
    result = mivpg("caption", *world.photos[1:4], *FAST)
    assert result.code == 0 and len(result.out.splitlines()) == 1
    assert one_line(result.err) and "trained on generated pictures" in result.err
    named = mivpg("caption", *world.photos[1:4], "--model", BASE_MODEL, *FAST)
    assert named.out == result.out and named.err == ""


def test_what_a_miniature_holds_is_told_in_one_line(tmp_path):
    out = done("miniature", "abo", "--out", tmp_path / "shop", "--num-products", 3, "--seed", 5)
    assert out.startswith(f"{tmp_path / 'shop'}: 3 generated products with ")
    out = done("miniature", "coco", "--out", tmp_path / "scenes", "--num-pictures", 3, "--seed", 5)
    assert out == f"{tmp_path / 'scenes'}: 3 generated scenes.\n"
    assert len(CocoConfig(root=tmp_path / "scenes").load()) == 3
    out = done("miniature", "patch-gastric", "--out", tmp_path / "slides", "--num-slides", 2, "--mean-patches", 6)
    assert out == f"{tmp_path / 'slides'}: 2 generated slides.\n"
    assert len(PatchGastricConfig(root=tmp_path / "slides").load()) == 2
    assert "num_products = 3, and 4 is asked for" in refusal(
        tmp_path, "miniature", "abo", "--out", tmp_path / "shop", "--num-products", 4, "--seed", 5
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    for name in ("abo", "coco", "patch-gastric"):
        assert "expected a new folder" in refusal(tmp_path, "miniature", name, "--out", tmp_path / "mine")
    assert "expected a new folder" in refusal(tmp_path, "miniature-base", "--out", tmp_path / "mine")


def test_caption_writes_the_captions_of_a_file(world, tmp_path):
    options = ("--bags", world.bags, "--model", world.blip2, *FAST)
    assert "7 bags, 0 of them could not be read" in done("caption", *options, "--out", tmp_path / "new" / "out.jsonl")
    lines = lines_of(tmp_path / "new" / "out.jsonl")
    assert [line["id"] for line in lines] == [f"product {i}" for i in range(7)]
    assert len({line["caption"] for line in lines}) > 3
    one = done("caption", world.photos[2], world.photos[3], "--model", world.blip2, *FAST)
    assert one == f"{lines[2]['caption']}\n"

    rows = "".join(f"{line['id']},{i}.png;{(i + 1) % 7}.png\n" for i, line in enumerate(lines))
    csv = world.folder / "bags.csv"
    csv.write_text(f"id,images\n{rows}")
    done("caption", "--bags", csv, "--model", world.blip2, *FAST, "--out", tmp_path / "csv.jsonl")
    assert (tmp_path / "csv.jsonl").read_bytes() == (tmp_path / "new" / "out.jsonl").read_bytes()


def test_caption_goes_on_where_it_was_interrupted(world, tmp_path, monkeypatch):
    command = ("caption", "--bags", world.bags, "--model", world.blip2, *FAST, "--batch-size", 2, "--out")
    done(*command, tmp_path / "unbroken.jsonl")
    generate, calls = MivpgForConditionalGeneration.generate, []

    def generate_twice(self, **inputs):
        calls.append(inputs)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return generate(self, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(MivpgForConditionalGeneration, "generate", generate_twice)
        assert mivpg(*command, tmp_path / "out.jsonl").code == 130
    assert len(lines_of(tmp_path / "out.jsonl.partial")) == 4
    line = refusal(tmp_path, *command, tmp_path / "out.jsonl", "--prompt", "another")
    assert f"{tmp_path / 'out.jsonl.partial'} was begun with prompt = " in line
    assert "delete it" in line
    done(*command, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert "exists already" in refusal(tmp_path, *command, tmp_path / "out.jsonl")


def test_the_author_of_a_file_of_captions_is_told_by_its_weights(world, trained):
    """What is drawn at random at each start is left out: it has no effect before it is trained."""
    load = MivpgForConditionalGeneration.from_pretrained
    first, second = load(world.blip2), load(world.blip2)
    names = {name for name, weight in first.named_parameters() if not torch.equal(weight, second.get_parameter(name))}
    assert names
    assert first.fingerprint() == second.fingerprint()
    second.language_projection.bias.data += 1
    assert first.fingerprint() != second.fingerprint()

    first, second = load(trained[0] / "best"), load(trained[0] / "best")
    assert first.fingerprint() == second.fingerprint()
    drawn_before_training = next(name for name in first.trained_state_dict() if "correlation" in name)
    second.get_parameter(drawn_before_training).data += 1
    assert first.fingerprint() != second.fingerprint()


@pytest.mark.usefixtures("quick_meteor")
def test_evaluate_writes_metrics_beside_floors(world, trained, tmp_path):
    """One of three test bags cannot be read; the other two are scored."""
    (tmp_path / "broken.png").write_text("no picture")
    bags = [bag | {"images": [str(world.folder / name) for name in bag["images"]]} for bag in lines_of(world.bags)]
    broken = {"id": "broken", "images": ["broken.png"], "captions": ["a chair"], "split": "test"}
    file = write_bags(tmp_path / "bags.jsonl", *bags, broken)
    config = world.config(tmp_path, dataset={"bag_file": {"path": str(file)}})
    command = ("evaluate", config, "--model", trained[0] / "best", "--out", tmp_path / "METRICS.json", *FAST)
    code, out, err = mivpg(*command)
    assert (code, err) == (3, "")

    results = json.loads((tmp_path / "METRICS.json").read_text())
    assert (results["num_bags"], results["num_references"], results["num_unreadable_bags"]) == (2, 4, 1)
    assert (results["model"], results["split"], results["seed"]) == (str(trained[0] / "best"), "test", 0)
    assert set(results["floors"]) == {"constant", "random_train"}
    metrics = {"BLEU@1", "BLEU@2", "BLEU@3", "BLEU@4", "METEOR", "ROUGE_L", "CIDEr"}
    assert set(results["metrics"]) == set(results["floors"]["constant"]) == metrics

    lines = lines_of(tmp_path / "METRICS.captions.jsonl")
    assert [line["id"] for line in lines] == ["product 5", "product 6", "broken"]
    assert "broken.png is not a picture" in lines[2]["error"]
    references = {bag["id"]: bag["captions"] for bag in bags[5:]}
    floor = score_captions(dict.fromkeys(references, "a chair with 0 legs"), references, metrics=["BLEU@1", "CIDEr"])
    assert {name: results["floors"]["constant"][name] for name in floor} == floor
    assert out.splitlines()[0].split() == list(results["metrics"])
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["model", "constant", "random_train"]
    assert "1 more bags could not be read" in out
    page = (tmp_path / "METRICS.html").read_text()
    assert page.count("data:image/png") == 1  # the run's curves
    assert "2 bags of split test with 4 references; 1 more could not be read." in page
    assert "Floor: one constant caption" in page and f"root: {world.folder}" not in page and f"path: {file}" in page


@pytest.mark.usefixtures("quick_meteor")
def test_an_evaluation_that_stopped_after_captioning_goes_on(world, trained, tmp_path, monkeypatch):
    """Its captions are written once, and taken for no other model's; the scores are those of an unbroken one."""
    command = ["evaluate", world.config(tmp_path), "--model", trained[0] / "best", *FAST]
    done(*command, "--out", tmp_path / "unbroken.json")
    metrics, captions = tmp_path / "METRICS.json", tmp_path / "METRICS.captions.jsonl"

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mivpg.evaluation_report.write_evaluation_report", interrupt)
        assert mivpg(*command, "--out", metrics).code == 130
    assert captions.exists() and not metrics.exists()
    line = refusal(tmp_path, *command, "--out", metrics, "--validation.min-new-tokens", 2)
    assert f"{captions} was begun with min_new_tokens = " in line
    line = refusal(tmp_path, *command, "--out", metrics, "--split", "val")
    assert f"{captions} was begun with data = '2 bags, sha256 " in line and "and '1 bags, sha256 " in line
    with monkeypatch.context() as patch:
        patch.setattr(MivpgForConditionalGeneration, "generate", None)
        done(*command, "--out", metrics)
    assert metrics.read_bytes() == (tmp_path / "unbroken.json").read_bytes()
    assert captions.read_bytes() == (tmp_path / "unbroken.captions.jsonl").read_bytes()
    names = {path.name for path in tmp_path.glob("METRICS*")}
    assert names == {"METRICS.json", "METRICS.html", "METRICS.captions.jsonl"}
    metrics.unlink()
    assert f"{captions} exists already" in refusal(tmp_path, *command, "--out", metrics)


def test_evaluate_writes_captions_as_validation_of_the_file_says(world, tmp_path, monkeypatch):
    asked: list[GenerationOptions] = []

    def record(*arguments: Any) -> None:
        asked.extend(argument for argument in arguments if isinstance(argument, GenerationOptions))

    monkeypatch.setattr("mivpg.cli.run_evaluation", record)
    config = world.config(tmp_path, validation={"num_beams": 2, "max_new_tokens": 96, "min_new_tokens": 8})
    command = ("--model", world.blip2, "--out", tmp_path / "METRICS.json")
    done("evaluate", config, *command)
    done("evaluate", config, *command, "--num-beams", 3, "--validation.min-new-tokens", 5)
    done("evaluate", "--dataset.bag-file.path", world.bags, *command, "--max-new-tokens", 7)
    assert asked == [
        GenerationOptions(num_beams=2, max_new_tokens=96, min_new_tokens=8),
        GenerationOptions(num_beams=3, max_new_tokens=96, min_new_tokens=5),
        GenerationOptions(max_new_tokens=7),
    ]


def test_extract_fills_a_store_that_train_takes(world, trained, tmp_path, caplog):
    config = world.config(tmp_path)
    model = trained[0] / "best"
    (line,) = done("extract", config, "--model", model, "--out", tmp_path / "features").splitlines()
    bags = Path(line)
    assert bags == tmp_path / "features" / "best_28px_all_float16" / "bags.jsonl"
    assert {bag["split"] for bag in lines_of(bags)} == {"train", "val", "test"}
    done("extract", config, "--model", model, "--out", tmp_path / "features", "--tokens", "cls")
    assert (tmp_path / "features" / "best_28px_cls_float16" / "bags.jsonl").exists()

    fields = {"dataset": {"bag_file": {"path": str(bags)}}, "output_dir": str(tmp_path / "from bags")}
    done("train", world.config(tmp_path, **fields), "--learning-rate", 0.01)
    assert (tmp_path / "from bags" / "best").is_dir()
    # The data set itself, its captions and splits, with the store in place of its images.
    config, store = world.config(tmp_path), ("--dataset.features", bags.parent)
    done("train", config, *store, "--learning-rate", 0.01, "--output-dir", tmp_path / "from store")
    logs = [lines_of(tmp_path / name / "log.jsonl") for name in ("from bags", "from store")]
    assert [line["loss"] for line in logs[0] if "loss" in line] == [line["loss"] for line in logs[1] if "loss" in line]
    done("extract", config, *store, "--model", model, "--out", tmp_path / "features")  # the store itself is not read
    next(bags.parent.glob("*.safetensors")).unlink()
    line = refusal(tmp_path, "train", config, *store, "--output-dir", tmp_path / "incomplete")
    assert re.match(r".*_float16 holds no features of bag 'product \d'; `mivpg extract` makes what is missing", line)


def test_extract_passes_bad_bags_over_and_its_exit_code_says_so(world, tmp_path):
    bags = [
        {"id": name, "images": [str(photo)]} for name, photo in (("first", world.photos[0]), ("last", world.photos[1]))
    ]
    bad = {"id": "bad", "images": [str(world.photos[0]), "missing.png"]}
    file = write_bags(tmp_path / "bags.jsonl", bags[0], bad, bags[1])
    command = ("extract", "--dataset.bag-file.path", file, "--model", world.blip2, "--out", tmp_path / "features")
    missing = f"bag 'bad': {tmp_path / 'missing.png'} does not exist, expected a picture."
    assert mivpg(*command, "--strict") == (1, "", f"mivpg: {missing}\n")
    result = mivpg(*command)
    store = tmp_path / "features" / "blip2_28px_all_float16"
    assert result.code == 3 and one_line(result.err)
    assert result.err == f"mivpg: 1 of 3 bags could not be read; {store / 'errors.jsonl'} says why.\n"
    assert result.out == f"{store / 'bags.jsonl'}\n"
    assert [bag["id"] for bag in lines_of(store / "bags.jsonl")] == ["first", "last"]
    assert lines_of(store / "errors.jsonl") == [{"id": "bad", "error": missing}]


def test_a_bag_file_outlives_its_photos(world, tmp_path):
    for name in ("a.png", "b.png"):
        photo(3).save(tmp_path / name)
    bags = [{"id": name, "images": [name]} for name in ("a.png", "b.png")]
    options = ("--model", world.blip2, "--out", tmp_path / "features")
    command = ("extract", "--dataset.bag-file.path", write_bags(tmp_path / "bags.jsonl", *bags), *options)
    made = Path(done(*command).strip())
    before = contents(made.parent)
    for bag in bags:
        (tmp_path / bag["id"]).unlink()
    assert done(*command) == f"{made}\n"
    assert contents(made.parent) == before
    # Nothing that can be read, and nothing stored of it.
    others = write_bags(tmp_path / "others.jsonl", {"id": "c", "images": ["c.png"]})
    result = mivpg("extract", "--dataset.bag-file.path", others, *options)
    assert (result.code, result.out) == (1, "")
    assert result.err == f"mivpg: none of 1 bags could be read; {made.parent / 'errors.jsonl'} says why.\n"
    assert made.read_bytes() == before[made]


def test_a_store_that_lacks_a_bad_bag_is_read_without_it(world, tmp_path, caplog):
    photo(3).save(tmp_path / "a.png")
    bad = [{"id": f"bad {split}", "images": ["missing.png"], "split": split} for split in ("train", "test")]
    bags = write_bags(tmp_path / "bags.jsonl", *bad, {"id": "good", "images": ["a.png"], "split": "test"})
    command = ("extract", "--dataset.bag-file.path", bags, "--model", world.blip2, "--out", tmp_path / "features")
    store = Path(mivpg(*command).out.strip()).parent
    dataset = DatasetConfig(bag_file=BagFileConfig(path=bags), features=store)
    caplog.clear()
    assert [(sample.id, sample.features.parent) for sample in dataset.load()] == [("good", store)]
    assert [record.message for record in caplog.records] == [
        f"2 bags are left out, since `mivpg extract` could not read them; the first of {store / 'errors.jsonl'}: "
        f"bag 'bad train': {tmp_path / 'missing.png'} does not exist, expected a picture."
    ]
    lines = (store / "errors.jsonl").read_text().splitlines(keepends=True)
    (store / "errors.jsonl").write_text(lines[0])
    with pytest.raises(MivpgError, match=r"holds no features of bag 'bad test'; `mivpg extract` makes what is missing"):
        dataset.load()
    (store / "errors.jsonl").write_text(lines[0] + "{")
    with pytest.raises(MivpgError, match=r'errors\.jsonl, line 2 is not {"id", "error"}; run `mivpg extract` again'):
        dataset.load()
    (store / "errors.jsonl").write_text("".join(lines))
    write_bags(bags, *bad)
    with pytest.raises(MivpgError, match=r"holds no features, since no bag could be read \(errors\.jsonl: bag 'bad tr"):
        dataset.load()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", ["train", "caption"])
def test_progress_bars_are_for_terminals(world, tmp_path, command):
    def shown(stream: io.StringIO, out: Path) -> str:
        arguments: dict[str, tuple[Any, ...]] = {
            "train": (world.config(tmp_path, num_train_epochs=1), "--output-dir", out),
            "caption": ("--bags", world.bags, "--model", world.blip2, *FAST, "--out", out),
        }
        with redirect_stdout(io.StringIO()), redirect_stderr(stream):
            main([command, *map(str, arguments[command])])
        return stream.getvalue()

    assert shown(io.StringIO(), tmp_path / "quiet") == ""
    assert "100%" in shown(Terminal(), tmp_path / "bar")


def test_a_refusal_as_a_process(tmp_path):
    result = mivpg_process("caption", tmp_path / "no.png", "--model", "no-such-owner/no-such-model")
    assert (result.code, result.out) == (1, "")
    assert result.err == f"mivpg: {tmp_path / 'no.png'} does not exist, expected a picture.\n"


# ── What bad input gets ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], 'Unknown command "nonsense"'),
        (["caption", "--bagz", "a", "--model", "m"], "Did you mean --bags?"),
        (["caption", "a.jpg", "--model", "m", "--num-beams", "many"], 'unable to convert "many" into int'),
        (["caption", "a.jpg", "--model", "m", "--dtype", "float8"], 'Choose from: "auto"'),
        (["evaluate", "--dataset.abo.root", "a", "--model", "m"], "--out requires an argument"),
    ],
)
def test_a_wrong_command_line(tmp_path, arguments, message):
    assert message in refusal(tmp_path, *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "name what to do: mivpg train CONFIG.yaml [--FIELD VALUE …]"),
        (["evaluate"], "name what to do: mivpg evaluate CONFIG.yaml"),
        (["caption", "--model", "m"], "give the images of one bag, or --bags FILE --out FILE"),
        (["caption", "a.jpg", "--bags", "b.jsonl", "--model", "m"], "give the images of one bag, or --bags"),
        (["caption", "--bags", "b.jsonl", "--model", "m"], "--bags FILE and --out FILE go together"),
        (["caption", "a.jpg", "--model", "m", "--num-beams", "0"], "num_beams is 0, expected at least 1"),
        (["train", "no.yaml"], "no.yaml does not exist, expected settings in YAML"),
    ],
)
def test_a_command_that_asks_for_nothing_that_can_be_done(tmp_path, arguments, message):
    assert message in refusal(tmp_path, *arguments)


def test_several_processes_do_not_write_one_file(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, *others = commands_over(world.bags, world, tmp_path)
    for command in others:
        assert "split the bag file and start one process a part" in refusal(tmp_path, *command)


def cut(path: Path) -> None:
    photo(0).resize((400, 240)).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def bomb(path: Path) -> None:
    path.write_bytes(png_of(30_000, 30_000, bit_depth=8, color_type=2, data=b"never decoded"))


def no_pixels(path: Path) -> None:
    path.write_bytes(b"P6 0 0 255\n")


BAD_PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.png": (lambda path: None, "does not exist, expected a picture."),
    "cut.jpg": (cut, "cannot be read: image file is truncated"),
    "page.jpg": (lambda path: path.write_text("<html>404</html>"), "is not a picture, expected one of "),
    "empty.png": (lambda path: path.touch(), "is empty, expected a picture."),
    "none.ppm": (no_pixels, "is "),
    "bomb.png": (bomb, "has more than the 178000000 pixels allowed."),
}


@pytest.fixture(params=BAD_PICTURES)
def bad_picture(request, tmp_path) -> tuple[Path, str]:
    write, message = BAD_PICTURES[request.param]
    write(tmp_path / request.param)
    return tmp_path / request.param, message


def test_a_bad_picture_on_the_command_line(world, bad_picture, tmp_path):
    path, message = bad_picture
    line = refusal(tmp_path, "caption", world.photos[0], path, "--model", world.blip2)
    assert line.startswith(f"{path} {message}")


def test_a_bad_picture_in_training(world, bad_picture, tmp_path):
    path, message = bad_picture
    file = write_bags(
        tmp_path / "bags.jsonl",
        {"id": "good", "images": [str(world.photos[0])], "captions": ["a chair"]},
        {"id": "bad", "images": [str(world.photos[0]), path.name], "captions": ["a chair"]},
    )
    config = world.config(tmp_path, dataset={"bag_file": {"path": str(file)}})
    if path.name != "cut.jpg":
        assert refusal(tmp_path, "train", config).startswith(f"bag 'bad': {path} {message}")
        return
    # That pixels are missing shows when they are decoded, in the first epoch.
    result = mivpg("train", config)
    assert result.code == 1
    assert one_line(result.err)
    assert f"bag 'bad': {path} {message}" in result.err
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["config.yaml", "data.yaml", "log.jsonl"]
    photo(0).save(path)
    assert "there is nothing to resume" in done("train", config, "--resume")


def test_bad_bags_of_a_file_are_recorded(world, tmp_path, caplog):
    for name, (write, _) in BAD_PICTURES.items():
        write(tmp_path / name)
    np.save(tmp_path / "wide.npy", np.ones((2, 5, 99), dtype=np.float32))
    bad: dict[str, dict[str, Any]] = {name: {"images": [name]} for name in BAD_PICTURES}
    bad |= {"no image": {}, "no images": {"images": []}, "wide": {"features": "wide.npy"}}
    bad |= {"empty caption": {"images": [str(world.photos[0])], "captions": ["a chair", " "]}}
    messages = {name: f"bag {name!r}: {tmp_path / name} {message}" for name, (_, message) in BAD_PICTURES.items()}
    messages |= {name: f"bag {name!r}: no image, expected at least one" for name in ("no image", "no images")}
    messages |= {"wide": "bag 'wide': features are 99 wide, the model takes 24."}
    messages |= {"empty caption": "bag 'empty caption': an empty caption; fill it in or leave it out."}
    good = {"id": "good", "images": [str(world.photos[0])]}
    file = write_bags(tmp_path / "bags.jsonl", good, *({"id": name} | bag for name, bag in bad.items()))

    result = mivpg("caption", "--bags", file, "--out", tmp_path / "out.jsonl", "--model", world.blip2, *FAST)
    out = f"{tmp_path / 'out.jsonl'}: {1 + len(bad)} bags, {len(bad)} of them could not be read.\n"
    assert result == (3, out, "")
    first, *others = lines_of(tmp_path / "out.jsonl")
    assert done("caption", world.photos[0], "--model", world.blip2, *FAST) == f"{first['caption']}\n"
    assert [line["id"] for line in others] == list(messages)
    for line, message in zip(others, messages.values(), strict=True):
        assert line["error"].startswith(message)
        assert line["error"] in caplog.messages


@pytest.mark.slow
def test_one_bad_bag_of_a_thousand(world, tmp_path):
    """Strictly it stops there. Else it is reported and passed over, which a process of its own shows to its end."""
    frames = [photo(i).resize((8, 8)) for i in range(3)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.png")
    (tmp_path / "bad.png").write_text("no picture")
    names = {500: "bad.png", 700: "moving.png", 900: "moving.png"}
    bags = [{"id": f"bag {i}", "images": [names.get(i, "still.png")]} for i in range(1000)]
    file = write_bags(tmp_path / "bags.jsonl", *bags)
    command = ("caption", "--bags", file, "--model", world.blip2, "--num-beams", 1, "--max-new-tokens", 1)
    command += ("--batch-size", 100, "--out", tmp_path / "out.jsonl")

    error = f"bag 'bag 500': {tmp_path / 'bad.png'} is not a picture, expected one of {', '.join(images.FORMATS)}."
    before = contents(tmp_path)
    assert mivpg(*command, "--strict") == (1, "", f"mivpg: {error}\n")
    left = {path.name: content for path, content in contents(tmp_path).items() if path not in before}
    assert left.keys() == {"out.jsonl.partial", "out.jsonl.partial.json"}  # to go on from
    assert left["out.jsonl.partial"].count(b"\n") == 500

    result = mivpg_process(*command)
    assert (result.code, result.out) == (3, f"{tmp_path / 'out.jsonl'}: 1000 bags, 1 of them could not be read.\n")
    resumed, *others = result.err.splitlines()
    assert resumed == f"{tmp_path / 'out.jsonl.partial'}: going on after 500 of 1000 bags."
    assert sorted(others) == sorted(
        [error, f"{tmp_path / 'moving.png'} holds several frames; of such files the first is used."]
    )
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == [bag["id"] for bag in bags]
    assert [i for i, line in enumerate(lines) if "error" in line] == [500]


def commands_over(file: Path, world: World, folder: Path) -> Iterable[tuple[Any, ...]]:
    """Each command, over a bag file."""
    config = world.config(folder)
    bags = ("--dataset.bag-file.path", file)
    yield "train", config, *bags
    yield "evaluate", config, *bags, "--model", world.blip2, "--out", folder / "METRICS.json"
    yield "caption", "--bags", file, "--out", folder / "out.jsonl", "--model", world.blip2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "images": ["0.png"]', ", line 2 is not JSON: "),
        ('{"images": ["0.png"]}', ", line 2: no id, expected a text that no other bag has."),
        ('{"id": "a", "images": ["1.png"]}', ", line 2: id 'a' stands on line 1 already."),
        ('{"id": "b", "image": ["1.png"]}', ", line 2: unknown field 'image', did you mean 'images'?"),
    ],
)
def test_a_bad_line_of_a_bag_file(world, tmp_path, line, message):
    (tmp_path / "bags.jsonl").write_text(f'{{"id": "a", "images": ["0.png"], "captions": ["a chair"]}}\n{line}\n')
    for command in commands_over(tmp_path / "bags.jsonl", world, tmp_path):
        assert refusal(tmp_path, *command).startswith(f"{tmp_path / 'bags.jsonl'}{message}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": []}, "no image, expected at least one (or a slide, or a features file)."),
        ({"captions": ["a chair", ""]}, "an empty caption; fill it in or leave it out."),
        ({"captions": []}, "no caption, expected at least one to train on."),
    ],
)
def test_a_bag_that_cannot_be_trained_on(world, tmp_path, fields, message):
    bag = {"id": "bad", "images": [str(world.photos[0])], "captions": ["a chair"]} | fields
    file = write_bags(tmp_path / "bags.jsonl", bag)
    command = next(iter(commands_over(file, world, tmp_path)))
    assert refusal(tmp_path, *command) == f"bag 'bad': {message}"


def test_references_that_cannot_be_scored_are_refused_before_the_model_is_loaded(world, tmp_path):
    bags = [{"id": name, "images": [str(world.photos[0])], "split": "test"} for name in ("good", "bad")]
    captions = (["a chair"], ["a chair", " ... "])
    file = write_bags(
        tmp_path / "bags.jsonl", *({**bag, "captions": of} for bag, of in zip(bags, captions, strict=True))
    )
    for model in (world.blip2, tmp_path / "no model"):
        command = ("evaluate", "--dataset.bag-file.path", file, "--model", model, "--out", tmp_path / "METRICS.json")
        line = refusal(tmp_path, *command, *FAST)  # which leaves no captions
        assert line == "bag 'bad': reference ' ... ' has no words; correct or remove it."


def test_features_of_mixed_widths(world, tmp_path):
    for width in (24, 25):
        np.save(tmp_path / f"{width}.npy", np.ones((2, 17, width), dtype=np.float32))
    bags = [{"id": f"{width} wide", "features": f"{width}.npy", "captions": ["a chair"]} for width in (24, 25)]
    mixed, wide = write_bags(tmp_path / "mixed.jsonl", *bags), write_bags(tmp_path / "wide.jsonl", bags[1])
    config = world.config(tmp_path)
    line = refusal(tmp_path, "train", config, "--dataset.bag-file.path", mixed)
    assert line == (
        "bag '24 wide' has features (N, 17, 24) and bag '25 wide' has features (N, 17, 25), expected all bags alike."
    )
    line = refusal(tmp_path, "train", config, "--dataset.bag-file.path", wide)
    assert line == f"{tmp_path / '25.npy'}: features are 25 wide, the model expects 24."


def test_one_item_under_two_domains(world, tmp_path):
    shop = Shop(tmp_path / "abo")
    shop.add("B001", "a1", "a2", domain_name="amazon.com")
    shop.add("B001", "b1", "b2", domain_name="amazon.de")
    shop.write()
    config = world.config(tmp_path, dataset={"abo": {"root": str(tmp_path / "abo"), "split": "all"}})
    line = refusal(tmp_path, "train", config)
    assert line.startswith(f"{tmp_path / 'abo'}: item_id B001 has different photos under amazon.com and amazon.de")


def test_a_run_folder_that_is_in_use(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("precious")
    config = world.config(tmp_path)
    line = refusal(tmp_path, "train", config)
    assert line == (
        f"output_dir: {tmp_path / 'run'} is not empty; resume the run in it (--resume) or name a new folder."
    )
    assert "holds no config.yaml" in refusal(tmp_path, "train", config, "--resume")
    assert "is a file, expected a folder" in refusal(tmp_path, "train", config, "--output-dir", config)


@pytest.mark.parametrize(
    ("fields", "unknown", "nearest"),
    [
        ({"learning_rat": 0.1}, "learning_rat", "learning_rate"),
        ({"model": {"base": "x", "patch_poling": "abmil"}}, "model.patch_poling", "model.patch_pooling"),
        (
            {"model": {"base": "x", "qformer": {"hiden_size": 8}}},
            "model.qformer.hiden_size",
            "model.qformer.hidden_size",
        ),
        ({"dataset": {"bag_file": {"pth": "x"}}}, "dataset.bag_file.pth", "dataset.bag_file.path"),
        ({"validation": {"num_beam": 2}}, "validation.num_beam", "validation.num_beams"),
        ({1: 2}, "1", "bf16"),
    ],
)
def test_an_unknown_field(world, tmp_path, fields, unknown, nearest):
    config = world.config(tmp_path, **{str(name): value for name, value in fields.items()})
    if 1 in fields:
        config.write_text(config.read_text().replace("'1'", "1"))
    assert refusal(tmp_path, "train", config) == f"{config}: unknown field {unknown}; the nearest known is {nearest}."
    if unknown.startswith("dataset"):
        line = refusal(tmp_path, "evaluate", config, "--model", world.blip2, "--out", tmp_path / "METRICS.json")
        assert line == f"{config}: unknown field {unknown}; the nearest known is {nearest}."


def test_an_unknown_field_on_the_command_line(world, tmp_path):
    line = refusal(tmp_path, "train", world.config(tmp_path), "--model.qformer.hiden-size", 8)
    assert line == (
        "command line: unknown field model.qformer.hiden_size; the nearest known is model.qformer.hidden_size."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "no YAML file that can be read: while parsing"),
        ("- 1", "found list, expected fields and their values in YAML (mivpg train CONFIG.yaml)."),
        ("", "found nothing, expected fields and their values in YAML"),
        ("num_train_epochs: 3", "model is missing; add it, or --model on the command line."),
    ],
)
def test_a_config_that_is_none(tmp_path, text, message):
    (tmp_path / "train.yaml").write_text(text)
    assert refusal(tmp_path, "train", tmp_path / "train.yaml").startswith(f"{tmp_path / 'train.yaml'}: {message}")


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"betas": 0.9}, 1, "{config}: betas: Incorrect number of arguments: expected 2 but got 1."),
        ({"learning_rate": "fast"}, 2, 'Invalid value for [learning_rate] from {config}: unable to convert "fast"'),
        ({"dataset": {"bag_file": {"split_seed": 3}}}, 1, "{config}: dataset.bag_file.path is missing; add it, or "),
        ({"dataset": {}}, 1, "dataset names nothing, expected one of bag_file, abo, patch_gastric, coco."),
        ({"num_train_epochs": 0}, 1, "{config}: num_train_epochs is 0, expected at least 1."),
        ({"validation": {"num_beams": 0}}, 1, "{config}: num_beams is 0, expected at least 1."),
    ],
)
def test_a_field_of_another_kind(world, tmp_path, fields, code, message):
    config = world.config(tmp_path, **fields)
    assert refusal(tmp_path, "train", config, code=code).startswith(message.format(config=config))


def test_a_value_that_no_run_can_have_is_of_the_file_or_of_the_command_line(world, tmp_path):
    config = world.config(tmp_path, batch_size=0)
    assert refusal(tmp_path, "train", config, "--seed", 1).startswith(f"{config}: batch_size is 0, expected at least")
    assert refusal(tmp_path, "train", config, "--batch-size=-1").startswith("batch_size is -1, expected at least 1.")
    config = world.config(tmp_path, validation={"max_new_tokens": 8})
    assert refusal(tmp_path, "train", config, "--validation", '{"num_beams": 0}').startswith("num_beams is 0, expected")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--batch-size", 0), "batch_size is 0, expected at least 1."),
        (("--learning-rate", "nan"), "learning_rate is nan, expected a number of at least 0."),
        (("--weight-decay", -1), "weight_decay is -1.0, expected a number of at least 0."),
        (("--warmup-steps", "nan"), "warmup_steps is nan, expected a number of at least 0."),
        (("--num-workers", -1), "num_workers is -1, expected a number of at least 0."),
        (("--seed", 2**40), "seed is 1099511627776, expected an integer from 0 to 2^32 - 1."),
        (("--betas", 2, 3), "betas are (2.0, 3.0), expected two numbers from 0 to below 1."),
        (("--model.max-caption-tokens", 0), "model.max_caption_tokens is 0, expected at least 1."),
        (("--validation.num-beams", 0), "num_beams is 0, expected at least 1."),
        (("--report-to", "nobody"), "report_to: 'nobody' is not installed; found "),
        (("--model.num-query-tokens", 0), "num_query_tokens is 0, expected at least 1."),
        (
            ("--model.qformer.num-attention-heads", 3),
            "qformer: hidden_size is 16, expected a multiple of num_attention",
        ),
        (("--model.trainable", "nothing"), "config.trainable names 'nothing', but the model has no module"),
        (("--model.base", "x"), "model: base brings its own language, vision, num_query_tokens, qformer;"),
        (("--early-stopping-patience", 1, "--dataset.bag-file.path", "TRAIN"), "early_stopping_patience is set, but"),
    ],
)
def test_a_value_that_no_run_can_have(world, tmp_path, option, message):
    photo(0).save(tmp_path / "0.png")
    file = write_bags(tmp_path / "bags.jsonl", {"id": "a", "images": ["0.png"], "captions": ["a"], "split": "train"})
    option = tuple(file if value == "TRAIN" else value for value in option)
    assert refusal(tmp_path, "train", world.config(tmp_path), *option).startswith(message)


def without(model: Path, folder: Path, *files: str) -> Path:
    """A copy of a model that lacks files."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name not in files:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def test_a_model_that_is_none(world, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    damaged = without(trained[0] / "best", tmp_path / "damaged", "model.safetensors")
    weights = (trained[0] / "best" / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    no_weights = without(trained[0] / "best", tmp_path / "no weights", "model.safetensors")
    no_blip2 = without(world.blip2, tmp_path / "no blip2", "model.safetensors")
    no_words = without(world.blip2, tmp_path / "no words", *TOKENIZER)
    expected: dict[Any, str] = {
        tmp_path / "empty": "has no config.json, expected the folder of a model.",
        world.photos[0]: "is a file, expected the folder of a model.",
        tmp_path / "absent": "does not exist, expected the folder of a model or a Hub id.",
        "./absent": "does not exist, expected the folder of a model or a Hub id.",
        "tests/absent": "does not exist, expected the folder of a model or a Hub id.",
        world.language: "a model of type 'opt'; BLIP-2 or MIVPG was expected.",
        world.vision: "a model of type 'clip_vision_model'; BLIP-2 or MIVPG was expected.",
        damaged: "trained weights cannot be loaded: ",
        no_weights: "trained weights cannot be loaded: ",
        no_blip2: "weights cannot be loaded: ",
        no_words: "has no tokenizer, expected ",
    }
    for model, message in expected.items():
        line = refusal(tmp_path, "caption", world.photos[0], "--model", model)
        assert line.startswith((f"{model} {message}", f"{model}: {message}")), line


def test_a_model_that_the_hub_cannot_be_asked_for(world, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal(tmp_path, "caption", world.photos[0], "--model", "no-such-owner/no-such-model")
    assert line.startswith("no-such-owner/no-such-model: the model's configuration cannot be loaded: ")


@pytest.mark.parametrize("part", ["language", "vision"])
def test_a_part_of_a_new_model_that_is_none(world, tmp_path, part):
    (tmp_path / "empty").mkdir()
    of = {"language": world.language, "vision": world.vision}
    no_weights = without(of[part], tmp_path / "no weights", "model.safetensors")
    reader = {"language": TOKENIZER, "vision": ("preprocessor_config.json", "processor_config.json")}
    no_reader = without(of[part], tmp_path / "no reader", *reader[part])
    expected = {
        tmp_path / "empty": "has no config.json, expected the folder of a model.",
        tmp_path / "absent": "does not exist, expected the folder of a model or a Hub id.",
        of["vision" if part == "language" else "language"]: f"; a {part} model was expected.",
        no_weights: "weights cannot be loaded: ",
        no_reader: "tokenizer" if part == "language" else "image processor",
    }
    config = world.config(tmp_path)
    for model, message in expected.items():
        line = refusal(tmp_path, "train", config, f"--model.{part}", model)
        assert line.startswith(str(model))
        assert message in line


# ── What shops have, and is read without complaint ──────────────────────────────────────────────────────────────────


def save_as_shops_do(folder: Path) -> dict[str, tuple[Image.Image, Image.Image]]:
    """Pictures of every kind. With each, what it shows, and what a careless reader would make of it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    palette = photo(2).quantize(16)
    alpha = photo(3).convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.repeat(np.uint8([0, 255]), 20), (24, 1))))
    on_white = np.where(np.asarray(alpha)[..., 3:] > 0, np.asarray(photo(3)), np.uint8(255))
    ramp = np.linspace(0, 255, 24 * 40).round().astype(np.uint8).reshape(24, 40)
    deep = zlib.compress(b"".join(b"\0" + row.tobytes() for row in ramp.astype(">u2") * 257))

    photo(0).convert("CMYK").save(folder / "cmyk.tif")
    (folder / "deep.png").write_bytes(png_of(40, 24, bit_depth=16, color_type=0, data=deep))
    palette.save(folder / "palette.png")
    alpha.save(folder / "alpha.png")
    photo(4).save(folder / "turned.png", exif=exif)
    photo(5).save(folder / "moving.png", save_all=True, append_images=[photo(6)])
    with Image.open(folder / "cmyk.tif") as cmyk:
        return {
            "cmyk.tif": (cmyk.convert("RGB"), ImageOps.invert(photo(0))),
            "deep.png": (Image.fromarray(ramp).convert("RGB"), Image.new("RGB", (40, 24), "white")),
            "palette.png": (palette.convert("RGB"), Image.fromarray(np.asarray(palette)).convert("RGB")),
            "alpha.png": (Image.fromarray(on_white), photo(3)),
            "turned.png": (photo(4).transpose(Image.Transpose.ROTATE_270), photo(4)),
            "moving.png": (photo(5), photo(6)),
        }


def test_pictures_of_every_kind_are_captioned_as_what_they_show(world, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "_has_warned_of_frames", False)
    bags = []
    for name, (right, careless) in save_as_shops_do(tmp_path).items():
        right.save(tmp_path / f"right {name}.png")
        careless.save(tmp_path / f"careless {name}.png")
        files = {"found": name, "right": f"right {name}.png", "careless": f"careless {name}.png"}
        bags += [{"id": f"{kind} {name}", "images": [file]} for kind, file in files.items()]
    file = write_bags(tmp_path / "bags.jsonl", *bags)
    done("caption", "--bags", file, "--out", tmp_path / "out.jsonl", "--model", world.blip2, *FAST, "--batch-size", 1)
    captions = [line["caption"] for line in lines_of(tmp_path / "out.jsonl")]
    for found, right, careless in zip(captions[0::3], captions[1::3], captions[2::3], strict=True):
        assert found == right != careless
    assert caplog.messages == [f"{tmp_path / 'moving.png'} holds several frames; of such files the first is used."]


def test_pictures_of_every_kind_are_trained_on(world, tmp_path):
    names = list(save_as_shops_do(tmp_path))
    file = write_bags(tmp_path / "bags.jsonl", {"id": "all", "images": names, "captions": ["a chair"]})
    out = done("train", world.config(tmp_path, num_train_epochs=1), "--dataset.bag-file.path", file)
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    assert "There is no validation split, so the last checkpoint is kept as the best." in out


def test_listings_of_every_kind_are_trained_on(world, tmp_path):
    shop = Shop(tmp_path / "abo")
    shop.add("B001", None, "a1", "a2")
    shop.add("B002", "b1", "b2", product_type="SOFA")
    shop.add("B003", "c1", "c2", product_type=[{"value": "CHAIR"}])
    shop.write()
    for i, name in enumerate(("a1", "a2", "b1", "b2", "c1", "c2")):
        path = tmp_path / "abo" / "images" / "small" / name / f"{name}.jpg"
        path.parent.mkdir(parents=True)
        photo(i).save(path)
    dataset = {"abo": {"root": str(tmp_path / "abo"), "split": "all"}}
    out = done("train", world.config(tmp_path, num_train_epochs=1, dataset=dataset))
    assert "Training on 3 captions of 3 bags, validating on 3 bags." in out


def test_bags_without_a_split_are_not_scored_by_accident(tmp_path):
    """They trained, all of them; only who says so gets their scores."""
    (tmp_path / "bags.jsonl").write_text('{"id": "a", "images": ["a.jpg"], "captions": ["a chair."]}')
    arguments = [
        "evaluate",
        "--dataset.bag-file.path",
        tmp_path / "bags.jsonl",
        "--model",
        "m",
        "--out",
        tmp_path / "m.json",
    ]
    assert "none of its 1 bags is in split 'test' (it has no splits, so every bag trains" in refusal(
        tmp_path, *map(str, arguments)
    )
