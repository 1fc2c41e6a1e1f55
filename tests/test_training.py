"""Training: the same steps however a batch is divided, and the same end whether or not a run was killed."""

import json
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments, set_seed

from mivpg import training
from mivpg.bags import BagDataset, BagSampler
from mivpg.errors import BagError, MivpgError
from mivpg.files import only_writer
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.training import ModelConfig, ShareSampler, train
from tiny import VISION_WIDTH
from training_script import make_world, tiny_train_config
from warm import Program

torch.set_num_threads(1)  # as in the scripts: sums have to come out the same bit for bit

SCRIPT = Path(__file__).with_name("training_script.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def scores(monkeypatch) -> list[float]:
    """CIDEr of one validation after another, to say which epoch is the best; zero after the last."""
    script: list[float] = []

    class ScriptedScorer:
        def __init__(self, references, metrics):
            self.ids = set(references)

        def score(self, predictions):
            assert set(predictions) == self.ids
            return {"CIDEr": script.pop(0) if script else 0.0, "BLEU@4": 0.0}

    monkeypatch.setattr(training, "CaptionScorer", ScriptedScorer)
    return script


def run_script(*arguments: object, num_processes: int = 1) -> tuple[int, str]:
    """The exit code, and what was written."""
    code, out, err = Program(SCRIPT, *arguments, num_processes=num_processes).wait()
    return code, out + err


def logged(run_dir: Path, name: str) -> list[float]:
    """One value a step or an epoch, from the run's log."""
    entries = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if name in entry]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run_dir.glob("checkpoint-*"))


# However a batch is divided


PHOTOS, PERCEIVER = {"bags": "photos.jsonl"}, {"aggregator": "perceiver"}
RUNS = {"opt": {}, "t5": {"language": "t5"}, "photos": PHOTOS, "perceiver": PERCEIVER, "both": PHOTOS | PERCEIVER}
"""From features where nothing else is said, and by MIVPG."""


@pytest.fixture(scope="module")
def two_processes(world, tmp_path_factory) -> Path:
    """All of `RUNS` by two processes with batches of 4; then `opt` again, whose second process is killed in step 4."""
    folder = tmp_path_factory.mktemp("two")
    runs = [{"output_dir": str(folder / name), "batch_size": 4} | run for name, run in RUNS.items()]
    bags = (world / "bags.jsonl").read_text().splitlines(keepends=True)
    (world / "one_val.jsonl").write_text("".join(bags[:-4]))  # 21 to train on
    runs.append(runs[0] | {"output_dir": str(folder / "one_val"), "bags": "one_val.jsonl", "num_train_epochs": 1})
    runs.append(runs[0] | {"output_dir": str(folder / "killed")})
    kill = ("--kill-at", "4", "--kill-rank", "1")
    code, output = run_script(world, json.dumps(runs), *kill, "--note-captioned", num_processes=2)
    assert (folder / "one_val" / "best").exists(), output
    (folder / "output.txt").write_text(f"{code}\n{output}")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_division_of_a_batch_does_not_change_the_losses(world, two_processes, tmp_path, name, record_property):
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    run = RUNS[name]
    train(tiny_train_config(world, output_dir=whole, batch_size=8, **run))
    if in_parts := name in ("opt", "t5"):
        train(tiny_train_config(world, output_dir=divided, batch_size=2, gradient_accumulation_steps=4, **run))
    expected = torch.tensor(logged(whole, "loss"))
    assert len(expected) == 6  # 21 bags: two blocks of 8 and one of 5, twice
    assert expected.max() - expected.min() > 0.1
    for run_dir in (divided, two_processes / name) if in_parts else (two_processes / name,):
        losses = torch.tensor(logged(run_dir, "loss"))
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
        record_property(
            "loss of a step, batch 8 against 2 x 4 accumulated or two processes x 4",
            (losses - expected).abs().max().item(),
        )
        assert_close_weights(run_dir / "best", whole / "best")
        for metric in ("eval_BLEU@4", "eval_CIDEr"):
            assert logged(run_dir, metric) == pytest.approx(logged(whole, metric))


@pytest.mark.parametrize(("name", "num_bags", "num_epochs"), [("opt", 5, 2), ("one_val", 1, 1)])
def test_two_processes_score_each_bag_once(world, two_processes, name, num_bags, num_epochs):
    shares = [(two_processes / name / f"captioned-{rank}.txt").read_text().split() for rank in range(2)]
    expected = Counter({f"bag{21 + number}": num_epochs for number in range(num_bags)})
    assert Counter(shares[0] + shares[1]) == expected
    assert len(shares[0]) - len(shares[1]) == num_epochs


def test_one_of_two_processes_is_killed(world, two_processes, tmp_path, capsys):
    """The other ends, too, with a message; the run goes on in one process, with the losses that two would have had."""
    code, output = (two_processes / "output.txt").read_text().split("\n", 1)
    assert int(code) != 0
    assert "Signal 9 (SIGKILL) received by PID" in output
    killed = shutil.copytree(two_processes / "killed", tmp_path / "killed")
    assert checkpoints(killed) == [3]
    config = tiny_train_config(world, output_dir=killed, batch_size=4)
    with pytest.raises(MivpgError, match="gradient_accumulation_steps x processes = 8 and is resumed with 4"):
        train(config, resume=True)
    train(replace(config, batch_size=8), resume=True)
    assert "Resuming from step 3 (epoch 1.00)." in capsys.readouterr().out
    losses, expected = (torch.tensor(logged(run_dir, "loss")) for run_dir in (killed, two_processes / "opt"))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert_close_weights(killed / "best", two_processes / "opt" / "best")


@pytest.mark.slow
def test_a_run_goes_on_in_two_processes(world, two_processes, tmp_path):
    """One that one process began, and one that two began."""
    alone = tmp_path / "alone"
    crash_after(tiny_train_config(world, output_dir=alone, gradient_accumulation_steps=2, batch_size=4), step=4)
    killed = shutil.copytree(two_processes / "killed", tmp_path / "killed")
    runs = [{"output_dir": str(run_dir), "batch_size": 4} for run_dir in (alone, killed)]
    code, output = run_script(world, json.dumps(runs), "--resume", num_processes=2)
    assert code == 0, output
    assert output.count("Resuming from step 3 (epoch 1.00).") == 2
    expected = torch.tensor(logged(two_processes / "opt", "loss"))
    for run_dir in (alone, killed):
        torch.testing.assert_close(torch.tensor(logged(run_dir, "loss")), expected, rtol=0, atol=1e-5)
        assert_close_weights(run_dir / "best", two_processes / "opt" / "best")


def test_dropout_of_a_run_that_goes_on_elsewhere(world, tmp_path, scores):
    """With another number of processes masks cannot be those of an unbroken run, and are not those of its beginning."""
    run_dir = tmp_path / "run"
    config = tiny_train_config(world, output_dir=run_dir, dropout=0.1)
    crash_after(config, step=4)
    (run_dir / "checkpoint-3" / "rng_state.pth").rename(run_dir / "checkpoint-3" / "rng_state_0.pth")
    shutil.copy(run_dir / "checkpoint-3" / "rng_state_0.pth", run_dir / "checkpoint-3" / "rng_state_1.pth")
    seeds = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "set_seed", lambda seed: seeds.append(seed) or set_seed(seed))
        train(config, resume=True)
    assert seeds == [42, 45]


def test_several_gpus_without_torchrun_are_used_singly(world, tmp_path, monkeypatch):
    """What transformers would run under DataParallel."""

    device = TrainingArguments.device.fget

    def with_four_gpus(self):
        found = device(self)
        self._n_gpu = 4
        return found

    monkeypatch.setattr(TrainingArguments, "device", property(with_four_gpus))
    config = tiny_train_config(world, output_dir=tmp_path / "run")
    args = training._training_arguments(config, num_pairs=21, validate=True)
    assert args.n_gpu == 1 and args.train_batch_size == config.batch_size


@pytest.mark.parametrize(("option", "tolerance"), [("gradient_checkpointing", 1e-5), ("bf16", 0.05)])
def test_saving_memory_hardly_changes_the_losses(world, tmp_path, scores, option, tolerance):
    train(tiny_train_config(world, output_dir=tmp_path / "plain"))
    train(tiny_train_config(world, output_dir=tmp_path / "saving", **{option: True}))
    plain, saving = (torch.tensor(logged(tmp_path / name, "loss")) for name in ("plain", "saving"))
    torch.testing.assert_close(saving, plain, rtol=0, atol=tolerance)
    assert torch.equal(saving, plain) == (option == "gradient_checkpointing")


def assert_close_weights(found: Path, expected: Path) -> None:
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (found, expected))
    for name in expected_weights:
        # Softmax does not see the bias of a key: its gradient is rounding, which AdamW makes into whole steps.
        if not name.endswith(".key.bias"):
            torch.testing.assert_close(weights[name], expected_weights[name], rtol=0, atol=1e-4, msg=name)


@settings(deadline=None)
@given(
    num_bags=st.integers(1, 40),
    batch_size=st.integers(1, 4),
    num_processes=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    epoch=st.integers(0, 2),
)
def test_processes_share_each_block(num_bags, batch_size, num_processes, accumulation, epoch):
    sampler = BagSampler(range(num_bags), seed=0, block=batch_size * num_processes * accumulation)
    sampler.epoch = epoch
    shares = [
        ShareSampler(sampler, batch_size=batch_size, num_processes=num_processes, process_index=index)
        for index in range(num_processes)
    ]
    batches = [list(share) for share in shares]
    assert [len(share) for share in shares] == [len(share) for share in batches]
    assert len({len(share) for share in batches}) == 1  # no process waits for another
    assert all(1 <= len(batch) <= batch_size for share in batches for batch in share)

    order = list(sampler)
    for step, start in enumerate(range(0, num_bags, sampler.block)):
        of_step = slice(step * accumulation, (step + 1) * accumulation)
        seen = Counter(bag for share in batches for batch in share[of_step] for bag in batch)
        block = order[start : start + sampler.block]
        assert set(seen) == set(block)
        if len(block) >= sum(len(share[of_step]) for share in batches):
            assert set(seen.values()) == {1}


# Whether or not a run was killed


KILLED = {
    "dropout": 0.1,
    "num_train_epochs": 3,
    "batch_size": 2,
    "save_steps": 4,
    "save_total_limit": 20,
    "early_stopping_patience": 2,
    "num_workers": 1,
}
"""11 steps an epoch, so checkpoints after steps 4, 8, 11, 12, 16, 20, 22, …"""


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    train(tiny_train_config(world, output_dir=run_dir, **KILLED))
    return run_dir


@pytest.mark.parametrize(
    ("kill", "newest"),
    [
        # between two checkpoints of the second epoch
        pytest.param(("--kill-at", "15"), 12, marks=pytest.mark.slow),
        (("--kill-in-save", "22"), 20),  # as the second epoch ends: model and optimizer are written, the rest is not
    ],
)
def test_a_killed_run_ends_as_an_unbroken_one(world, unbroken, tmp_path, capsys, kill, newest):
    run_dir = tmp_path / "run"
    runs = json.dumps([KILLED | {"output_dir": str(run_dir)}])
    code, output = run_script(world, runs, *kill)
    assert code == -signal.SIGKILL, output
    assert max(checkpoints(run_dir)) == newest

    train(tiny_train_config(world, output_dir=run_dir, **KILLED), resume=True)
    assert f"Resuming from step {newest} (epoch {newest / 11:.2f})." in capsys.readouterr().out
    assert checkpoints(run_dir) == checkpoints(unbroken)
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in unbroken.iterdir()}
    for step in checkpoints(unbroken):
        assert_same_checkpoint(run_dir / f"checkpoint-{step}", unbroken / f"checkpoint-{step}")
    assert logged(run_dir, "loss") == logged(unbroken, "loss")
    assert logged(run_dir, "eval_CIDEr") == logged(unbroken, "eval_CIDEr")
    best, expected = (load_file(folder / "best" / "model.safetensors") for folder in (run_dir, unbroken))
    assert all(torch.equal(best[name], expected[name]) for name in expected)


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """Bit for bit: weights, optimizer, schedule and random numbers."""
    weights, expected_weights = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights), found.name
    for file in ("optimizer.pt", "scheduler.pt"):
        state, expected_state = (torch.load(folder / file, weights_only=True) for folder in (found, expected))
        torch.testing.assert_close(state, expected_state, rtol=0, atol=0)


def test_no_checkpoint_is_made_twice(world, tmp_path, scores, monkeypatch):
    saved = []
    save_checkpoint = training.MivpgTrainer._save_checkpoint

    def spy(self, *args):
        saved.append(self.state.global_step)
        save_checkpoint(self, *args)

    monkeypatch.setattr(training.MivpgTrainer, "_save_checkpoint", spy)
    train(tiny_train_config(world, output_dir=tmp_path / "run", save_steps=1))
    assert saved == [1, 2, 3, 4, 5, 6]


def test_each_epoch_has_an_order_of_its_own(world, tmp_path, scores, monkeypatch):
    opened = []
    get_bag = BagDataset.__getitem__

    def spy(self, index):
        if self.training:
            opened.append(index)
        return get_bag(self, index)

    monkeypatch.setattr(BagDataset, "__getitem__", spy)
    config = tiny_train_config(world, output_dir=tmp_path / "run", save_steps=2)
    train(config)
    first, second = opened[:21], opened[21:]
    assert {epoch for epoch, _ in first} == {0}
    assert {epoch for epoch, _ in second} == {1}
    assert [index for _, index in first] != [index for _, index in second]

    config.output_dir = tmp_path / "resumed"
    crash_after(config, step=5)
    opened.clear()
    train(config, resume=True)  # from checkpoint 4, which is one step into the second epoch
    assert opened == second[8:]


def test_early_stopping_counts_on_after_resuming(world, tmp_path, scores, capsys):
    config = tiny_train_config(world, output_dir=tmp_path / "run", num_train_epochs=6, early_stopping_patience=2)
    scores += [0.3, 0.1]
    crash_after(config, step=7)
    scores += [0.2, 0.9]
    train(config, resume=True)
    assert "Resuming from step 6 (epoch 2.00)." in capsys.readouterr().out
    assert checkpoints(tmp_path / "run") == [3, 9]  # the best, and the third epoch: two without improvement
    assert logged(tmp_path / "run", "eval_CIDEr") == [0.3, 0.1, 0.2]


def crash_after(config, step):
    """Trains until a step and no further."""

    class Crash(Exception):
        pass

    def crash(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(training.RunCallback, "on_step_begin", crash, raising=False)
        train(config)


# What a run leaves


def test_best_is_the_model_of_the_best_epoch(world, tmp_path, scores):
    scores += [0.1, 0.8, 0.5]
    run_dir = tmp_path / "run"
    best = train(tiny_train_config(world, output_dir=run_dir, num_train_epochs=3, logging_steps=100))
    assert best == run_dir / "best"
    assert len(logged(run_dir, "loss")) == 3
    assert checkpoints(run_dir) == [6, 9]
    weights, of_best, of_last = (
        load_file(folder / "model.safetensors") for folder in (best, run_dir / "checkpoint-6", run_dir / "checkpoint-9")
    )
    assert all(torch.equal(weights[name], of_best[name]) for name in of_best)
    assert not torch.equal(weights["query_tokens"], of_last["query_tokens"])
    assert not any((best / file).exists() for file in ("optimizer.pt", "rng_state.pth", "trainer_state.json"))
    assert not (run_dir / ".unfinished").exists()
    MivpgForConditionalGeneration.from_pretrained(best)


def test_frozen_weights_stay_and_the_rest_moves(world, tmp_path, scores):
    config = tiny_train_config(world, output_dir=tmp_path / "run", num_train_epochs=1)
    training.set_seed(config.seed)
    before, _ = config.model.load()
    before = before.state_dict()
    after = MivpgForConditionalGeneration.from_pretrained(train(config))
    for name, weight in after.state_dict().items():
        moved = not torch.equal(weight, before[name])
        if not name.endswith(".key.bias"):  # as above
            assert moved == after.trains(name), name
    assert 0 < sum(after.trains(name) for name in before) < len(before)


def test_weight_decay_spares_biases_and_norms(world, tmp_path, scores):
    trainer = make_trainer(tiny_train_config(world, output_dir=tmp_path / "run"))
    decayed, spared = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert {parameter.ndim for parameter in spared["params"]} == {1}
    assert min(parameter.ndim for parameter in decayed["params"]) == 2
    assert any(parameter is trainer.model.query_tokens for parameter in decayed["params"])


def make_trainer(config):
    samples = config.dataset.load()
    model, processor = config.model.load()
    return training.MivpgTrainer(
        model,
        training._training_arguments(config, num_pairs=len(samples), validate=True),
        processor,
        BagDataset(samples, training=True),
        BagDataset(samples),
        validation=config.validation,
    )


def test_without_validation_the_last_checkpoint_is_kept(world, tmp_path, capsys):
    bags = [json.loads(line) for line in (world / "bags.jsonl").read_text().splitlines()]
    file = world / "no_val.jsonl"
    file.write_text("".join(json.dumps(bag | {"split": "train"}) + "\n" for bag in bags))
    config = tiny_train_config(world, output_dir=tmp_path / "run")
    config.dataset.bag_file.path = file
    best = train(config)
    assert "no validation split" in capsys.readouterr().out
    last = tmp_path / "run" / f"checkpoint-{max(checkpoints(tmp_path / 'run'))}"
    weights, of_last = load_file(best / "model.safetensors"), load_file(last / "model.safetensors")
    assert all(torch.equal(weights[name], of_last[name]) for name in of_last)

    with pytest.raises(MivpgError, match="early_stopping_patience is set, but the data set has no validation split"):
        train(replace(config, output_dir=tmp_path / "other", early_stopping_patience=1))
    assert not (tmp_path / "other").exists()


# What goes wrong


def test_a_run_folder_in_use(world, tmp_path, scores, capsys):
    config = tiny_train_config(world, output_dir=tmp_path / "run", num_train_epochs=1)
    best = train(config)
    with pytest.raises(MivpgError, match=r"output_dir: .*run is not empty; resume the run in it"):
        train(config)
    for other, message in (
        (replace(config, early_stopping_patience=2), "early_stopping_patience = None and is resumed with 2"),
        (replace(config, model=replace(config.model, num_query_tokens=4)), "model.num_query_tokens = 3 .* with 4"),
    ):
        with pytest.raises(MivpgError, match=f"config.yaml: the run was begun with {message}"):
            train(other, resume=True)
    assert train(config, resume=True) == best  # finished: nothing is left to do
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert train(replace(config, output_dir=moved), resume=True) == moved / "best"

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    with pytest.raises(MivpgError, match=r"notes holds no config.yaml, expected the folder of a run"):
        train(replace(config, output_dir=tmp_path / "notes"), resume=True)
    with pytest.raises(MivpgError, match=r"todo.txt is a file, expected a folder"):
        train(replace(config, output_dir=tmp_path / "notes" / "todo.txt"))


def test_a_run_that_goes_on_twice_at_a_time(world, tmp_path, scores, monkeypatch):
    config = tiny_train_config(world, output_dir=tmp_path / "run", num_train_epochs=2, save_steps=2)
    refused = []

    def resume_it_too(self, args, state, control, **kwargs):
        if state.global_step == 3 and not refused:
            with pytest.raises(MivpgError) as error:
                train(config, resume=True)
            refused.append(str(error.value))

    monkeypatch.setattr(training.RunCallback, "on_step_begin", resume_it_too, raising=False)
    best = train(config)
    assert refused == [
        f"output_dir: another process trains in {tmp_path / 'run'}; wait for it, or name a new folder.",
    ]
    assert {path.name for path in best.parent.glob("config*")} == {"config.yaml"}


@pytest.mark.slow
def test_two_processes_are_kept_out_of_a_run(world, tmp_path):
    """The first is refused, and the other does not wait for it."""
    with only_writer(tmp_path / "run" / "config.yaml"):
        code, output = run_script(world, json.dumps([{"output_dir": str(tmp_path / "run")}]), num_processes=2)
    assert code != 0
    assert f"output_dir: another process trains in {tmp_path / 'run'}; wait" in output
    assert not list((tmp_path / "run").iterdir())


def test_a_run_that_was_killed_before_it_began(world, tmp_path, scores):
    """Its folder holds a lock, which nobody has."""
    config = tiny_train_config(world, output_dir=tmp_path / "runs" / "run", num_train_epochs=1)
    config.output_dir.mkdir(parents=True)
    (config.output_dir / "config.yaml.lock").touch()
    assert train(config).is_dir()


def test_resuming_with_other_bags(world, tmp_path, scores):
    config = tiny_train_config(world, output_dir=tmp_path / "run")
    file = world / "growing.jsonl"
    lines = (world / "bags.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines[4:]))
    config.dataset.bag_file.path = file
    crash_after(config, step=4)
    file.write_text("".join(lines))
    with pytest.raises(
        MivpgError, match=r"data.yaml: the run was begun with num_train_bags = 17 and is resumed with 21;"
    ):
        train(config, resume=True)


def test_resuming_nothing_is_starting(world, tmp_path, scores, capsys):
    config = tiny_train_config(world, output_dir=tmp_path / "run", num_train_epochs=1)
    crash_after(config, step=2)  # before the first checkpoint
    config = replace(config, learning_rate=0.02)
    assert train(config, resume=True) == tmp_path / "run" / "best"
    assert "run: there is nothing to resume, so this starts." in capsys.readouterr().out


def test_a_loss_that_is_no_number_stops_before_the_step(world, tmp_path, scores):
    config = tiny_train_config(world, output_dir=tmp_path / "run")
    compute_loss = training.MivpgTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        return compute_loss(self, *args, **kwargs) * (float("nan") if self.state.global_step == 4 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.MivpgTrainer, "compute_loss", poisoned)
        with pytest.raises(MivpgError, match=r"step 5 has loss nan .* good checkpoint is .*checkpoint-3\.") as error:
            train(config)
    assert "\n" not in str(error.value)
    assert checkpoints(tmp_path / "run") == [3]
    train(config, resume=True)  # goes on from the third step


def test_a_checkpoint_without_a_trained_weight(world, tmp_path, scores):
    config = tiny_train_config(world, output_dir=tmp_path / "run")
    crash_after(config, step=4)
    file = tmp_path / "run" / "checkpoint-3" / "model.safetensors"
    weights = load_file(file)
    del weights["query_tokens"]
    save_file(weights, file)
    with pytest.raises(MivpgError, match="query_tokens"):
        train(config, resume=True)
    assert checkpoints(tmp_path / "run") == [3]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bag_that_cannot_be_opened(world, tmp_path, scores, num_workers):
    bags = [json.loads(line) for line in (world / "bags.jsonl").read_text().splitlines()]
    (world / "bad.npy").write_bytes((world / "3.npy").read_bytes()[:128] + bytes.fromhex("0000c07f") * 144)  # NaN
    bags[3]["features"] = "bad.npy"
    file = world / "bad.jsonl"
    file.write_text("".join(json.dumps(bag) + "\n" for bag in bags))
    config = tiny_train_config(world, output_dir=tmp_path / "run", num_workers=num_workers)
    config.dataset.bag_file.path = file
    with pytest.raises(BagError, match=r"bag 'bag3': .*bad.npy") as error:
        train(config)
    assert "\n" not in str(error.value)


def test_an_unreadable_validation_bag_costs_itself_alone(world, tmp_path, capsys):
    """It is scored as an empty caption, said once an epoch, and the epoch's checkpoint is made."""
    lines = (world / "bags.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    broken = next(record for record in records if record["split"] == "val")
    for record in records:
        record["features"] = str(world / record["features"])
    np.save(tmp_path / "broken.npy", np.full((2, 3, VISION_WIDTH), np.nan, np.float32))
    broken["features"] = "broken.npy"
    (tmp_path / "bags.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = tiny_train_config(world, output_dir=tmp_path / "run", num_train_epochs=1)
    config.dataset.bag_file.path, config.dataset.bag_file.root = tmp_path / "bags.jsonl", Path("/")
    train(config)
    said = capsys.readouterr().out
    assert said.count(f"bag {broken['id']!r}") == 1 and "counts as an empty caption" in said
    assert (tmp_path / "run" / "best").is_dir()
    assert len(logged(tmp_path / "run", "eval_CIDEr")) == 1


def test_a_run_of_one_step_learns(world, tmp_path, scores):
    """A share of one step for warm-up is none: its rate would be 0."""
    config = tiny_train_config(world, output_dir=tmp_path / "run", num_train_epochs=1, batch_size=32, warmup_steps=0.05)
    best = train(config)
    set_seed(config.seed)
    start, _ = config.model.load()
    learned = load_file(best / "model.safetensors")
    assert not torch.equal(learned["query_tokens"], start.query_tokens)


def test_bags_that_the_model_cannot_read(world, tmp_path):
    config = tiny_train_config(world, output_dir=tmp_path / "run")
    config.model.image_embeds_size = 99
    with pytest.raises(MivpgError, match=r"0.npy: features are 12 wide, the model expects 99"):
        train(config)
    file = world / "images.jsonl"
    Image.new("RGB", (8, 8)).save(world / "a.png")
    file.write_text(json.dumps({"id": "a", "images": ["a.png"], "captions": ["a chair"], "split": "train"}) + "\n")
    config.dataset.bag_file.path = file
    with pytest.raises(MivpgError, match=r"bag 'a' has images, but the model has no vision model"):
        train(config)
    file.write_text(file.read_text().replace("train", "test"))
    with pytest.raises(MivpgError, match=r"none of its 1 bags is in the train split"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("encoding", "has_coords", "warns"), [("ppeg", False, True), ("ppeg", True, False), ("none", False, False)]
)
def test_positions_that_ppeg_does_not_find_are_told(world, tmp_path, scores, capsys, encoding, has_coords, warns):
    records = [json.loads(line) for line in (world / "bags.jsonl").read_text().splitlines()]
    for record in records:
        images = np.load(world / record["features"])
        features = {"features": images[:, 0]} | (
            {"coords": np.mgrid[: len(images), :1].reshape(2, -1).T} if has_coords else {}
        )
        with h5py.File(tmp_path / f"{record['id']}.h5", "w") as file:
            for name, values in features.items():
                file[name] = values
        record["features"] = f"{record['id']}.h5"
    (tmp_path / "bags.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = tiny_train_config(world, output_dir=tmp_path / "run", num_train_epochs=1)
    config.dataset.bag_file.path = tmp_path / "bags.jsonl"
    config.model.position_encoding, config.model.patch_pooling = encoding, "cls"
    train(config)
    assert ("has no coordinates, so ppeg lays the instances out on a square" in capsys.readouterr().out) == warns


def test_a_model_is_named_by_base_or_by_language(world):
    for config, message in (
        (ModelConfig(), "expected a base, or a language model"),
        (ModelConfig(language="opt"), "expected a vision model, or image_embeds_size"),
        (
            ModelConfig(base="blip2", language="opt", num_query_tokens=8),
            "base brings its own language, num_query_tokens",
        ),
    ):
        with pytest.raises(MivpgError, match=f"model: {message}"):
            config.load()
