"""How the benchmarks measure: rivals in turn, since machines are noisy, and memory by what the allocator was asked for.

What counts is a ratio of neighbours in time: its median, and the least and the most of it.
"""

import gc
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g} to {self.most:.3g})"


def spread(values: Iterable[float]) -> Spread:
    """Median, least and most."""
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Seconds:
    """What each rival took, round by round."""

    rounds: Mapping[str, list[float]]

    def of(self, rival: str) -> Spread:
        """Seconds a run."""
        return spread(self.rounds[rival])

    def times_as_fast(self, rival: str, than: str) -> Spread:
        """How many times as fast as another it is, round by round."""
        return spread(other / one for one, other in zip(self.rounds[rival], self.rounds[than], strict=True))


def in_turn(rivals: Mapping[str, Callable[[], Any]], *, rounds: int = 7, warm_up: int = 1) -> Seconds:
    """Runs rivals one after the other, round by round, every second round backwards."""
    for _ in range(warm_up):
        for run in rivals.values():
            run()
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds):
        names = list(rivals) if number % 2 == 0 else list(reversed(rivals))
        for name in names:
            taken[name].append(seconds(rivals[name]))
    return Seconds(taken)


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one run, the device's work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that a run holds at once beyond what was there before it.

    Weights, and gradients where a run before made them, are there before. On the CPU what the allocator was asked for
    is summed up event by event: a process's own peak also counts what it had freed and not handed back.
    """
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for event in memory_events(profiler):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory_events(profiler: profile) -> list[Any]:
    """What was allocated, and with a minus what was given back, in order."""
    events = profiler.profiler.kineto_results.events()
    return sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """What a forward pass keeps for its backward pass: what there is more after it, once its result is let go.

    Args:
        run: The forward pass; of its result only the graph is held, and with it what was saved there.
    """
    gc.collect()
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        graph = run().grad_fn
        kept = torch.cuda.memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            graph = run().grad_fn
        kept = sum(event.nbytes() for event in memory_events(profiler))
    assert graph is not None, "a forward pass that keeps nothing"
    return kept


def markdown(columns: list[str], rows: Iterable[list[Any]]) -> str:
    """A table, numbers on the right."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def machine() -> str:
    """What measured: device, threads, versions, commit."""
    if DEVICE.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"
    return (
        f"{device}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, commit {commit()}"
    )


def commit() -> str:
    """Of the checkout that this file lies in, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    if not shutil.which("git"):
        return "unknown"
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
