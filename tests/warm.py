"""Python programs in processes of their own, without the seven seconds in which each would import torch and more.

They are forked from the server from which `mivpg reproduce` forks its runs, which has imported it all.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mivpg.experiments.runner import clean_processes


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Program:
    """A program that has been started; `Program("-m", "mivpg.cli", "demo")` is `python -m mivpg.cli demo`.

    Args:
        arguments: What a command line has after `python`; without options of Python's own other than -m.
        environment: All of it; by default this process's.
        folder: In which it runs.
        num_processes: If it is not one: started as `torchrun --standalone --nproc-per-node` does it.
    """

    def __init__(
        self,
        *arguments: object,
        environment: Mapping[str, str] = os.environ,
        folder: Path | None = None,
        num_processes: int = 1,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        files = [Path(self._folder.name) / name for name in ("out", "err")]
        self._out, self._err = files
        for file in files:
            file.touch()
        words = [str(argument) for argument in arguments]
        self._process = clean_processes().Process(
            target=_start, args=(words, dict(environment), folder or Path.cwd(), files, num_processes)
        )
        self._process.start()

    @property
    def out(self) -> str:
        """What it has written to its standard output."""
        return self._out.read_text(encoding="utf-8")

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float = 300) -> Result:
        """Its exit code, or less than 0 the signal that ended it, and what it wrote; killed if it takes longer."""
        self._process.join(timeout)
        self._process.kill()
        self._process.join()
        result = Result(self._process.exitcode, self.out, self._err.read_text(encoding="utf-8"))
        self._folder.cleanup()
        return result


def _start(words: list[str], environment: dict[str, str], folder: Path, files: list[Path], num_processes: int) -> None:
    """What happens in the process."""
    gc.freeze()
    np.random.seed()  # noqa: NPY002 (the global one; Python's begins anew in a process that is forked, this one does not)
    torch.set_num_threads(1)  # as in the tests: sums have to come out the same bit for bit
    multiprocessing.set_start_method(None, force=True)  # as it is where a program begins
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    try:
        if num_processes == 1:
            _run(words)
        else:
            _launch(words, num_processes)
    finally:
        atexit._run_exitfuncs()


def _run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, "")
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _launch(words: list[str], num_processes: int) -> None:
    """`torchrun`, whose processes are forked instead of started."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, _run_beside_others)(words)


def _run_beside_others(words: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's own, which is inherited, waits for what blocks
    try:
        _run(words)
    except Exception:
        time.sleep(2)  # as long as a process of its own takes to end; another that was killed has to be noticed first
        raise
