"""The model divided among processes (FSDP): here over gloo, through `mivpg train` where there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.training_args import ParallelMode

from families import save_blip2
from mivpg import training
from mivpg.cli import main
from test_training import checkpoints, logged, run_script
from training_script import make_world, tiny_train_config

SCRIPT = Path(__file__).with_name("fsdp_script.py")


@pytest.mark.slow
@pytest.mark.parametrize("language", ["opt", "t5"])
def test_a_divided_model_is_the_whole_one(tmp_path, language, record_property):
    folder = save_blip2(tmp_path / language, language)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, folder]
    run = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert 0.4 < found["share"] < 0.6  # of all weights
    losses = torch.tensor(found["losses"], dtype=torch.float64)  # (steps, 2), whole and divided
    assert (losses[0] - losses[1]).abs().max() > 1e-3  # it learns
    torch.testing.assert_close(losses[:, 1], losses[:, 0], rtol=0, atol=1e-5)
    for name in ("gradients 0", "gradients 1", "weights", "gathered"):
        record_property(f"{name.split()[0]}, two processes under fully_shard against one", found[name])
        assert found[name] < 1e-5, name
    for num_beams in (1, 3):
        whole, divided = found[f"beams {num_beams}"]
        assert divided == whole
    assert found["loaded"] == found["beams 1"][0]
    assert found["loaded again"]


def test_fsdp_without_a_gpu_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["train", "--model.language", "gpt2", "--dataset.bag-file.path", "bags.jsonl", "--fsdp"]
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: {tmp_path / 'run'}")
    for has_gpu, message in (
        (False, "fsdp divides a model among GPUs, and there is none here; leave it out."),
        (True, "fsdp divides a model among processes; start them with torchrun, or leave it out."),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        with pytest.raises(SystemExit) as exit:
            main([*command[:1], str(file), *command[1:]])
        assert exit.value.code == 1
        assert capsys.readouterr().err == f"mivpg: {message}\n"
    assert not (tmp_path / "run").exists()


def test_fsdp_that_accelerate_does_not_do_is_noticed(tmp_path, monkeypatch):
    """On a CPU it would train copies of the model."""
    monkeypatch.setattr(training, "_check_can_divide", lambda: None)
    monkeypatch.setattr(training.TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    make_world(tmp_path / "world")
    with pytest.raises(AssertionError, match="asked to divide the model, and accelerate does not"):
        training.train(tiny_train_config(tmp_path / "world", output_dir=tmp_path / "run", fsdp=True))


@pytest.mark.slow
@pytest.mark.parametrize("bags", ["bags.jsonl", "photos.jsonl"])
def test_fsdp_through_the_trainer(tmp_path, bags, record_property):
    """All that `fsdp: true` does, with two processes over gloo; killed and resumed."""
    make_world(tmp_path / "world")
    run = {"output_dir": str(tmp_path / "divided"), "batch_size": 4, "bags": bags, "fsdp": True}
    code, output = run_script(
        tmp_path / "world", json.dumps([run]), "--take-for-gpus", "--kill-at", "4", "--note-captioned", num_processes=2
    )
    assert code != 0 and checkpoints(tmp_path / "divided") == [3], output
    assert_trains_as_one(tmp_path, run, ["--take-for-gpus"], 2, 1e-5, record_property)
    noted = [(tmp_path / "divided" / f"captioned-{rank}.txt").read_text() for rank in range(2)]
    assert noted[0] == noted[1] and len(set(noted[0].split())) == 5  # all by all, in one order


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_fsdp_on_gpus(tmp_path, record_property):
    """In as many processes as there are GPUs; killed and resumed."""
    make_world(tmp_path / "world")
    num_gpus = min(torch.cuda.device_count(), 8)
    run = {"output_dir": str(tmp_path / "divided"), "bags": "photos.jsonl", "fsdp": True}
    run |= {"batch_size": 1, "gradient_accumulation_steps": 8 // num_gpus}
    code, output = run_script(tmp_path / "world", json.dumps([run]), "--kill-at", "4", num_processes=num_gpus)
    assert code != 0 and checkpoints(tmp_path / "divided") == [3], output
    assert_trains_as_one(tmp_path, run, [], num_gpus, 1e-3, record_property)


def assert_trains_as_one(folder: Path, run: dict, options: list[str], processes: int, atol, record_property) -> None:
    """Resumes a run, and compares it with the same in one process, undivided."""
    code, output = run_script(folder / "world", json.dumps([run]), "--resume", *options, num_processes=processes)
    assert code == 0 and "Resuming from step 3" in output, output
    training.train(tiny_train_config(folder / "world", output_dir=folder / "one", bags=run["bags"]))
    losses, expected = (torch.tensor(logged(folder / name, "loss")) for name in ("divided", "one"))
    record_property("loss of a step, divided by FSDP against one process", (losses - expected).abs().max().item())
    torch.testing.assert_close(losses, expected, rtol=0, atol=atol)
    weights, of_one = (load_file(folder / name / "best" / "model.safetensors") for name in ("divided", "one"))
    assert weights.keys() == of_one.keys()
    for name in (name for name in of_one if not name.endswith(".key.bias")):
        torch.testing.assert_close(weights[name], of_one[name], rtol=0, atol=10 * atol, msg=name)
