"""A training run killed at random moments and resumed each time, beside the same run unbroken.

    python benchmarks/kills.py [--kills 20] [--seed 0]

The run is `mivpg train` on a generated catalogue, from photos, with dropout, readers in processes of their own, and
checkpoints within epochs and at their ends. Its whole process group gets SIGKILL, which leaves no time to tidy up: at a
moment drawn from the time that a run takes, or, every second time, while a checkpoint is being written. After each kill
every checkpoint in the folder has to be whole. One that reaches its end is compared bit for bit with the unbroken one,
and the next begins in a new folder. Prints Markdown, and exits with 1 where anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from mivpg.miniature import BASE_MODEL
from mivpg.miniature.catalogue import make_catalogue

UNFINISHED = ".unfinished"
"""A checkpoint stands in this folder while it is written."""

FILES_IN_SAVE = 11
"""Of a checkpoint's twelve files so many are there when the run is killed, at most."""


def run_config(folder: Path) -> dict[str, Any]:
    """A run of 36 steps with a checkpoint every 3 steps and at the ends of its three epochs."""
    return {
        "model": {"base": str(BASE_MODEL), "patch_pooling": "abmil", "instance_correlation": "csa"},
        "dataset": {"abo": {"root": str(folder / "abo")}},
        "output_dir": str(folder / "unbroken"),
        "references": "random",
        "num_train_epochs": 3,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "save_total_limit": 3,
        "logging_steps": 1,
        "num_workers": 1,
        "validation": {"num_beams": 1, "max_new_tokens": 16},
    }


def start(config: Path, run_dir: Path) -> subprocess.Popen:
    """`mivpg train --resume` in a process group of its own, on one thread: sums have to come out the same."""
    command = [sys.executable, "-m", "mivpg.cli", "train", config, "--output-dir", run_dir, "--resume"]
    with (run_dir.parent / f"{run_dir.name}.txt").open("a") as output:
        return subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill_in_save(process: subprocess.Popen, run_dir: Path, begun: float, num_files: int) -> None:
    """Waits for a checkpoint of which so many files are there."""
    while process.poll() is None:
        files = unfinished_files(run_dir, begun)
        if files is not None and len(files) >= num_files:
            break
        time.sleep(0.0005)
    kill(process)


def unfinished_files(run_dir: Path, begun: float) -> list[Path] | None:
    """Those of the checkpoint that is being written; None where there is none but one that an earlier kill has left."""
    try:
        if (run_dir / UNFINISHED).stat().st_ctime < begun:
            return None
        return [path for path in (run_dir / UNFINISHED).rglob("*") if path.is_file()]
    except FileNotFoundError:  # whole now, and renamed
        return None


def kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run_dir.glob("checkpoint-*"))


def last_step(run_dir: Path) -> int:
    """The step of the last line of the log; 0 where there is none."""
    log = run_dir / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """All that a checkpoint holds: each tensor and number under a name.

    Raises:
        Exception: Whatever reading a file that is not whole raises.
    """
    found: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        found |= flat(torch.load(folder / file, weights_only=False), file)
    return found | {"log": json.loads((folder / "trainer_state.json").read_text())["log_history"]}


def flat(value: Any, name: str) -> dict[str, Any]:
    """Nested dicts and lists as one dict."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple) and len(value) < 100:
        return {k: v for key, inner in enumerate(value) for k, v in flat(inner, f"{name}/{key}").items()}
    return {name: value}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of what is not the same bit for bit; times are left out."""
    if found.keys() != expected.keys():
        return sorted(found.keys() ^ expected.keys())
    return [name for name, value in expected.items() if not same(found[name], value)]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if hasattr(expected, "tobytes"):
        return found.tobytes() == expected.tobytes()
    return without_times(found) == without_times(expected)


def without_times(value: Any) -> Any:
    """Log entries without seconds, and what is computed from them."""
    if not isinstance(value, list):
        return value
    timed = ("runtime", "per_second")
    return [
        {k: v for k, v in entry.items() if not k.endswith(timed)} for entry in value if "train_runtime" not in entry
    ]


def log_of(run_dir: Path) -> list[dict[str, float]]:
    return without_times([json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()])


def compare(run_dir: Path, unbroken: Path) -> list[str]:
    """What differs between two finished runs."""
    wrong = [] if checkpoints(run_dir) == checkpoints(unbroken) else [f"checkpoints {checkpoints(run_dir)}"]
    wrong += [] if log_of(run_dir) == log_of(unbroken) else ["log.jsonl"]
    wrong += differences(load_file(run_dir / "best/model.safetensors"), load_file(unbroken / "best/model.safetensors"))
    for step in checkpoints(unbroken):
        name = f"checkpoint-{step}"
        wrong += [
            f"{name}: {what}" for what in differences(read_checkpoint(run_dir / name), read_checkpoint(unbroken / name))
        ]
    return wrong


def run_with_kills(folder: Path, num_kills: int, seed: int) -> list[str]:
    """Prints a row for each kill and each comparison; returns what was wrong."""
    make_catalogue(folder / "abo", num_products=70, seed=0)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(run_config(folder)))
    unbroken = folder / "unbroken"
    begun = time.monotonic()
    if start(config, unbroken).wait() != 0:
        return [f"the unbroken run failed: {(folder / 'unbroken.txt').read_text()}"]
    seconds = time.monotonic() - begun
    print(f"Unbroken: {last_step(unbroken)} steps, checkpoints {checkpoints(unbroken)}, {seconds:.0f} s.\n")
    print("| kill | run | after | last step in the log | a checkpoint was half done | newest checkpoint |")
    print("|---:|---:|---:|---:|---|---|", flush=True)

    generator = random.Random(seed)
    wrong: list[str] = []
    done, number, finished = 0, 0, 0
    run_dir = folder / "killed-0"
    while done < num_kills or run_dir.exists():
        begun = time.time()
        process = start(config, run_dir)
        if done < num_kills and done % 2:
            kill_in_save(process, run_dir, begun, generator.randint(0, FILES_IN_SAVE))
        elif done < num_kills:
            try:
                process.wait(generator.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                kill(process)
        else:
            process.wait()
        if process.returncode == -signal.SIGKILL:
            done += 1
            files = unfinished_files(run_dir, begun)
            what = "no" if files is None else f"yes, {len(files)} files"
            newest = max(checkpoints(run_dir), default=None) if run_dir.exists() else None
            print(
                f"| {done} | {number} | {time.time() - begun:.1f} s | {last_step(run_dir)} | {what} | "
                f"{'none' if newest is None else newest} |",
                flush=True,
            )
            for step in checkpoints(run_dir):
                try:
                    read_checkpoint(run_dir / f"checkpoint-{step}")
                except Exception as error:  # whatever a torn file causes
                    wrong.append(f"kill {done}: checkpoint-{step} is not whole: {error}")
        elif process.returncode == 0:
            wrong += [f"run {number}: {what}" for what in compare(run_dir, unbroken)]
            number, finished = number + 1, finished + 1
            run_dir = folder / f"killed-{number}"
        else:
            return [*wrong, f"run {number} failed: {(folder / f'{run_dir.name}.txt').read_text()}"]
    print(f"\n{done} kills, {finished} runs that reached their end: {len(wrong) or 'no'} differences.")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if wrong := run_with_kills(Path(folder), options.kills, options.seed):
            sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
