"""What stops a run, through `mivpg train`: one line, exit code 1, and the last good checkpoint in its place."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mivpg import training
from mivpg.cli import main
from test_training import checkpoints, logged
from training_script import make_world, tiny_train_config

KILLS = Path(__file__).parents[1] / "benchmarks" / "kills.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def config(world, tmp_path) -> Path:
    """A run of 3 epochs with 3 steps each, and a checkpoint after each epoch."""
    file = tmp_path / "run.yaml"
    config = tiny_train_config(world, output_dir=tmp_path / "run", dropout=0.1, num_train_epochs=3)
    file.write_text(yaml.safe_dump(training._as_plain(config)))
    return file


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 2 MB, on which a run of ours needs half a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or run("mount", "-t", "tmpfs", "-o", "size=2m", "none", disk) != 0:
        pytest.skip("mounting a disk takes root")
    yield disk
    run("umount", "-l", disk)


def run(*command: str | Path) -> int:
    return subprocess.run(command, check=False, capture_output=True).returncode


def fill(disk: Path) -> None:
    """Leaves no room but what is free in the last block of each file."""
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


def make_read_only(disk: Path) -> None:
    assert run("mount", "-o", "remount,ro", disk) == 0


def make_writable(disk: Path) -> None:
    assert run("mount", "-o", "remount,rw", disk) == 0
    (disk / "filler").unlink(missing_ok=True)


def at_step(patch: pytest.MonkeyPatch, step: int, what: Callable[[], None]) -> None:
    """Does something before a step is made."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            what()

    patch.setattr(training.RunCallback, "on_step_begin", on_step_begin, raising=False)


def stopped(capsys, *command: str | Path) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as exit:
        main(["train", *map(str, command)])
    assert exit.value.code == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    (line,) = captured.err.splitlines()
    return line


def goes_on(config: Path, run_dir: Path) -> None:
    main(["train", str(config), "--output-dir", str(run_dir), "--resume"])
    assert len(logged(run_dir, "loss")) == 9
    assert (run_dir / "best").is_dir() and not (run_dir / ".unfinished").exists()


@pytest.mark.parametrize(
    ("damage", "step", "what", "last"),
    [
        (fill, 3, "checkpoint-6", "checkpoint-3"),
        pytest.param(fill, 0, "log.jsonl", "none", marks=pytest.mark.slow),
        pytest.param(make_read_only, 0, "log.jsonl", "none", marks=pytest.mark.slow),
        pytest.param(make_read_only, 3, "log.jsonl", "checkpoint-3", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_takes_no_more(config, small_disk, monkeypatch, capsys, damage, step, what, last):
    run_dir = small_disk / "run"
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: damage(small_disk))
        if damage is make_read_only:  # `mount` does it where no file is open for writing, such as a lock
            patch.setattr(training, "only_writer", lambda *_: nullcontext())
        line = stopped(capsys, config, "--output-dir", run_dir)
    assert line.startswith(f"mivpg: {run_dir / what} cannot be written: ")
    if what == "log.jsonl":  # torch.save and safetensors say it in words of their own
        assert {fill: "No space left on device", make_read_only: "Read-only file system"}[damage] in line
    if damage is fill:
        assert " (0 MB are free); the last good checkpoint is " in line
    assert f"{last}. Mend that and go on from it with --resume." in line
    assert checkpoints(run_dir) == ([3] if step else [])
    assert not (run_dir / ".unfinished").exists()  # it takes the room that is needed
    make_writable(small_disk)
    goes_on(config, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [fill, make_read_only])
def test_a_disk_that_takes_nothing(config, small_disk, capsys, damage):
    run_dir = small_disk / "run"
    run_dir.mkdir()
    damage(small_disk)
    line = stopped(capsys, config, "--output-dir", run_dir)
    assert line.startswith(f"mivpg: {run_dir / 'config.yaml'} cannot be written: ") and " MB are free)" in line
    make_writable(small_disk)
    goes_on(config, run_dir)


@pytest.mark.slow
def test_no_room_for_best(config, small_disk, monkeypatch, capsys):
    run_dir = small_disk / "run"
    publish = training.MivpgTrainer.publish_best
    with monkeypatch.context() as patch:
        patch.setattr(training.MivpgTrainer, "publish_best", lambda *args: fill(small_disk) or publish(*args))
        line = stopped(capsys, config, "--output-dir", run_dir)
    assert line.startswith(f"mivpg: {run_dir / 'best'} cannot be written: ") and "checkpoint-9. Mend that" in line
    assert not (run_dir / "best").exists()
    make_writable(small_disk)
    goes_on(config, run_dir)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_file_that_vanishes(world, config, tmp_path, monkeypatch, capsys, num_workers):
    """In the second epoch, and there again after the run is resumed too early."""
    data = shutil.copytree(world, tmp_path / "data")
    run_dir = tmp_path / "run"
    command = [config, "--dataset.bag-file.path", data / "bags.jsonl", "--num-workers", num_workers]

    def on_epoch_begin(self, args, state, control, begin=training.RunCallback.on_epoch_begin, **kwargs):
        begin(self, args, state, control)
        if self.sampler.epoch == 1:
            (data / "7.npy").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(training.RunCallback, "on_epoch_begin", on_epoch_begin)
        line = stopped(capsys, *command)
    assert line.startswith("mivpg: bag 'bag7': ") and str(data / "7.npy") in line
    assert checkpoints(run_dir) == [3]
    assert str(data / "7.npy") in stopped(capsys, *command, "--resume")
    shutil.copy(world / "7.npy", data)
    main(["train", *map(str, command), "--resume"])
    assert len(logged(run_dir, "loss")) == 9


def test_a_validation_file_that_vanishes_costs_its_bag(world, config, tmp_path, monkeypatch, capsys):
    """In the second epoch: it is scored as an empty caption there and in the third."""
    data = shutil.copytree(world, tmp_path / "data")
    with monkeypatch.context() as patch:
        at_step(patch, 4, (data / "21.npy").unlink)
        main(["train", str(config), "--dataset.bag-file.path", str(data / "bags.jsonl")])
    said = capsys.readouterr().out
    assert said.count("bag 'bag21': ") == said.count("counts as an empty caption") == 2
    assert checkpoints(tmp_path / "run")[-1] == 9 and len(logged(tmp_path / "run", "eval_CIDEr")) == 3


def test_a_reader_that_is_killed(config, tmp_path, monkeypatch, capsys):
    """As a machine without memory does it, in the second epoch."""
    run_dir = tmp_path / "run"

    def kill_readers() -> None:
        readers = multiprocessing.active_children()
        assert readers
        for reader in readers:
            reader.kill()
            reader.join()

    with monkeypatch.context() as patch:
        at_step(patch, 4, kill_readers)
        line = stopped(capsys, config, "--num-workers", "1")
    assert line.startswith("mivpg: A process that reads bags has ended (")
    assert "lower num_workers (1)" in line
    assert f"The last good checkpoint is {run_dir / 'checkpoint-3'}" in line
    goes_on(config, run_dir)  # without readers
    main(["train", str(config), "--output-dir", str(tmp_path / "unbroken")])
    assert logged(run_dir, "loss") == logged(tmp_path / "unbroken", "loss")


@pytest.fixture(scope="module")
def stopped_run(world, tmp_path_factory) -> Path:
    """A run of nine steps that was stopped before its eighth, with checkpoints after the third and the sixth."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, stop)
        with pytest.raises(KeyboardInterrupt):
            training.train(tiny_train_config(world, output_dir=run_dir, dropout=0.1, num_train_epochs=3))
    assert checkpoints(run_dir) == [3, 6]
    return run_dir


def test_a_damaged_file_of_a_run_is_named(config, stopped_run, tmp_path, capsys):
    run_dir = shutil.copytree(stopped_run, tmp_path / "run")
    for name in ("config.yaml", "data.yaml", "checkpoint-6/trainer_state.json"):
        whole = (run_dir / name).read_bytes()
        (run_dir / name).write_text('{"a": [')
        assert stopped(capsys, config, "--resume").startswith(f"mivpg: {run_dir / name} is damaged ("), name
        (run_dir / name).write_bytes(whole)


def middle_of_an_entry(file: Path) -> int:
    """Where a byte of an archive lies that is no padding."""
    with zipfile.ZipFile(file) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
        content = archive.read(entry)
    return file.read_bytes().index(content) + len(content) // 2


def test_a_damaged_checkpoint_is_named(config, stopped_run, tmp_path, capsys):
    """Whichever of its files is damaged or missing; the checkpoint before it is still good."""
    checkpoint = shutil.copytree(stopped_run, tmp_path / "run") / "checkpoint-6"
    for name, pattern in (
        ("optimizer.pt", "optimizer.*"),
        ("scheduler.pt", "scheduler.pt"),
        ("rng_state.pth", "rng_state*.pth"),
    ):
        whole = (checkpoint / name).read_bytes()
        flipped = bytearray(whole)
        flipped[middle_of_an_entry(checkpoint / name)] ^= 1
        for damage in (whole[: len(whole) // 2], bytes(flipped)):
            (checkpoint / name).write_bytes(damage)
            assert stopped(capsys, config, "--resume").startswith(f"mivpg: {checkpoint} is damaged ("), (name, damage)
        (checkpoint / name).unlink()
        assert f"{checkpoint} is damaged (there is no {pattern} in it)" in stopped(capsys, config, "--resume")
        (checkpoint / name).write_bytes(whole)
    torch.save({"another": "optimizer"}, checkpoint / "optimizer.pt")
    assert stopped(capsys, config, "--resume").startswith(f"mivpg: {checkpoint} is damaged (")
    shutil.rmtree(checkpoint)
    goes_on(config, tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        PermissionError(13, "Permission denied"),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_checkpoint_for_which_there_is_no_memory_is_not_called_damaged(world, stopped_run, monkeypatch, error):
    """Nobody is told to delete it."""

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(training.zipfile, "ZipFile", load)
    with pytest.raises(type(error)) as raised:
        training.train(tiny_train_config(world, output_dir=stopped_run, dropout=0.1, num_train_epochs=3), resume=True)
    assert raised.value is error


def test_texts_that_are_too_long_name_their_bags(world, config, tmp_path, capsys):
    """Before training where no caption would have room, in a step with its bags, and in validation as one bad bag."""
    line = stopped(capsys, config, "--prompt", "a photo " * 100)
    assert re.match(r"mivpg: \d+ tokens, .* and 8 for a caption, but the language model has places for 64; ", line)
    data = shutil.copytree(world, tmp_path / "data")
    bags = [json.loads(bag) for bag in (data / "bags.jsonl").read_text().splitlines()]
    command = [config, "--dataset.bag-file.path", data / "bags.jsonl"]

    def give(number: int, **fields: str) -> None:
        changed = [bag | fields if index == number else bag for index, bag in enumerate(bags)]
        (data / "bags.jsonl").write_text("".join(json.dumps(bag) + "\n" for bag in changed))

    give(2, prompt="a photo " * 100)
    line = stopped(capsys, *command, "--output-dir", tmp_path / "train")
    assert re.match(
        r"mivpg: one of the bags .*bag2\b.*: \d+ tokens, .* but the language model has places for 64; ", line
    )
    give(23, prompt="a photo " * 100)
    main(["train", *map(str, command), "--output-dir", str(tmp_path / "val")])
    said = capsys.readouterr().out
    assert said.count("bag 'bag23': ") == said.count("It counts as an empty caption.") == 3
    assert len(logged(tmp_path / "val", "eval_CIDEr")) == 3


def test_a_loss_that_is_no_number_names_its_bags(config, tmp_path, monkeypatch, capsys):
    """The line names the bags that were trained on, and is the only thing that is left of the step."""
    seen: list[list[str]] = []
    compute_loss = training.MivpgTrainer.compute_loss
    collate = training.BagCollator.__call__

    def note(self, bags):
        seen.append([bag.id for bag in bags])
        return collate(self, bags)

    def poisoned(self, *args, **kwargs):
        return compute_loss(self, *args, **kwargs) * (float("nan") if self.state.global_step == 4 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(training.BagCollator, "__call__", note)
        patch.setattr(training.MivpgTrainer, "compute_loss", poisoned)
        line = stopped(capsys, config)
    assert "step 5 has loss nan and gradient norm nan, expected numbers" in line
    of_step = [ids for ids in seen if len(ids) == 8 and len(set(ids)) == 8][-1]
    assert f"its bags are {', '.join(of_step)}, and the last good checkpoint is {tmp_path}/run/checkpoint-3." in line
    assert checkpoints(tmp_path / "run") == [3]
    goes_on(config, tmp_path / "run")


@pytest.mark.parametrize(("rate", "message"), [("1e37", "step 2 has loss "), ("1e39", "after step 1 the weight ")])
def test_no_checkpoint_holds_a_weight_that_is_no_number(config, tmp_path, capsys, rate, message):
    line = stopped(capsys, config, "--learning-rate", rate, "--save-steps", "1")
    assert message in line and "Lower learning_rate" in line
    for step in checkpoints(tmp_path / "run"):
        weights = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
    assert checkpoints(tmp_path / "run") == ([1] if rate == "1e37" else [])


def test_a_kill_while_old_checkpoints_are_deleted(world, tmp_path, monkeypatch):
    """What is left of them is not taken for a checkpoint, and is gone after the next one."""

    class Killed(BaseException):
        pass

    def half(folder, *args, **kwargs):
        if any(Path(folder).glob("*")) and not Path(folder).name.startswith("checkpoint-"):
            next(Path(folder).glob("*.safetensors"), Path("nothing")).unlink(missing_ok=True)
            if (Path(folder) / "optimizer.pt").exists():
                raise Killed
        rmtree(folder, *args, **kwargs)

    rmtree = shutil.rmtree
    config = tiny_train_config(world, output_dir=tmp_path / "run", save_steps=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.shutil, "rmtree", half)
        training.train(config)
    left = checkpoints(tmp_path / "run")
    assert len(left) == 2
    for step in left:
        assert load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
    training.train(dataclasses.replace(config), resume=True)
    assert not (tmp_path / "run" / ".unfinished").exists()


@pytest.mark.slow
def test_twenty_kills():
    """Every run that was killed and resumed ends as one that was not; see the script."""
    command = [sys.executable, KILLS, "--kills", "20", "--seed", "0"]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "20 kills" in found.stdout and "no differences" in found.stdout
