"""Work for all cores, which Ctrl-C ends at once and without a word from the workers."""

import os
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], *, chunksize: int
) -> Generator[Result, None, None]:
    """Results in the order of the items; closed early, what has not begun is left undone.

    Args:
        function: Of a module's top level.
        items: What it is called with, one by one.
        chunksize: How many a process takes at once.
    """
    # Ctrl-C reaches every process of a terminal; it is the parent's to answer.
    processes = ProcessPoolExecutor(os.cpu_count(), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield from processes.map(function, items, chunksize=chunksize)
    finally:
        processes.shutdown(cancel_futures=True)
