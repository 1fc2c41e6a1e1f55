"""What is measured, what a device can do and what a run asks of it, and rivals side by side."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2VisionConfig, PreTrainedConfig

import blocks
from measuring import DEVICE, Seconds, in_turn, peak_bytes, synchronize
from parameters import LANGUAGE_MODELS

aten = torch.ops.aten
MOVING_NOTHING = (
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
)
"""Operations that make no view and yet touch no memory."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; by default at real size."""

    vision: Blip2VisionConfig = field(default_factory=lambda: Blip2VisionConfig(initializer_range=0.02))
    qformer: dict[str, Any] = field(default_factory=dict)
    """What differs from BLIP-2's."""
    languages: Mapping[str, PreTrainedConfig] = field(default_factory=lambda: LANGUAGE_MODELS)
    num_prompts: int = 32
    num_words: int = 30
    """Of a caption."""
    batch_size: int = 16
    nums_images: tuple[int, ...] = (1, 6, 21)
    usual_images: int = 6
    """Of a bag that is captioned, and that trains with gradient checkpointing."""
    nums_beams: tuple[int, ...] = (1, 5)
    extraction_batch: int = 64
    num_extraction_batches: int = 12
    photos: tuple[tuple[int, int], ...] = ((256, 256), (1000, 750))
    """Width and height of the files that are read; Amazon Berkeley Objects' small ones are of 256 pixels."""
    nums_images_to_aggregate: tuple[int, ...] = (1, 2, 4, 6, 10, 21)
    block: blocks.Sizes = field(default_factory=blocks.Sizes)
    block_instances: tuple[int, ...] = (257, 2048, 20_000, 100_000)
    correlation_instances: int = 20_000
    """Of CSA beside Nyström attention."""
    large_bag_instances: tuple[int, ...] = (100_000, 200_000, 400_000, 800_000, 1_000_000)
    """Tried one after the other, as far as they fit."""
    matrix: int = 16_384
    """Rows and columns of the product that tells the device's peak."""
    copied_bytes: int = 2**31
    rounds: int = 7
    """Of what is compared apart from the language models."""
    seconds_each: float = 3.0
    """For the rounds of one comparison with a language model; there are two at least."""
    seconds_largest: float = 45.0
    """After which no larger bag is tried."""
    seconds_in_all: float = 400.0
    """After which nothing more begins."""

    @property
    def num_tokens(self) -> int:
        """P, CLS and the patches of an image."""
        return (self.vision.image_size // self.vision.patch_size) ** 2 + 1


def free() -> None:
    """Gives the device's memory back that nothing holds any more."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no CUDA device


def num_bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f}"


# ── What the device can do ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Peaks:
    """What the device reaches at best, measured on it: tables of cards say what no program sees."""

    flops: float
    """A second, in a large product of bfloat16 matrices."""
    num_bytes: float
    """A second, read or written, in a large copy."""


def measure_peaks(matrix: int, copied_bytes: int) -> Peaks:
    """The best of several runs of each.

    Args:
        matrix: Rows and columns of what is multiplied.
        copied_bytes: How much is copied.
    """
    left, right = torch.randn(2, matrix, matrix, device=DEVICE, dtype=torch.bfloat16)
    source = torch.ones(copied_bytes, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    found = in_turn({"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, rounds=10, warm_up=3)
    return Peaks(
        flops=2 * matrix**3 / found.of("product").least,
        num_bytes=2 * copied_bytes / found.of("copy").least,
    )


# ── What a run asks of it ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Work:
    """What a run asks of the device."""

    flops: int
    """Of products of matrices, convolutions and attention; a multiply-add is two."""
    num_bytes: int


def count_work(run: Callable[[], Any]) -> Work:
    """Counts one run."""
    with BytesMoved() as moved, FlopCounterMode(display=False) as counter:
        run()
    return Work(counter.get_total_flops(), moved.total)


class BytesMoved(TorchDispatchMode):
    """Sums up what PyTorch's operations read and what they write, as if there were no cache."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket is aten.embedding:
            self.total += 2 * result.nbytes  # of the table only the rows that are asked for
        elif not func.is_view and func.overloadpacket not in MOVING_NOTHING:
            read = [*args, *(value for name, value in kwargs.items() if name != "out")]
            tensors = [value for value in tree_leaves((read, result)) if isinstance(value, Tensor)]
            # What is expanded says that it has more bytes than there are.
            self.total += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)
        return result


# ── Rivals side by side ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Trial:
    """A rival's first runs on all bags of a batch."""

    run: Callable[[], Any]
    at_once: int
    """Bags that the device holds at once."""
    seconds: float
    peak: int
    """Bytes beyond what was there before the run."""
    work: Work


def side_by_side(
    runs: Mapping[str, Callable[[int], Any]], batch_size: int, seconds_each: float
) -> tuple[dict[str, Trial | None], Seconds]:
    """Measures rivals in turn.

    Args:
        runs: Each takes the number of bags that the device holds at once, and runs on all bags.
        batch_size: All bags.
        seconds_each: How long the rounds may take, of which there are two at least.

    Returns:
        First runs, None of a rival that cannot hold one bag; and what the others took.
    """
    trials = {name: try_out(run, batch_size) for name, run in runs.items()}
    fitting = {name: trial for name, trial in trials.items() if trial is not None}
    once = sum(trial.seconds for trial in fitting.values())
    rounds = min(max(int(seconds_each / once), 2), 7)
    return trials, in_turn({name: trial.run for name, trial in fitting.items()}, rounds=rounds, warm_up=0)


def try_out(run: Callable[[int], Any], batch_size: int) -> Trial | None:
    """With the most bags at once that fit, halving; None where not one fits."""
    at_once = batch_size
    while at_once:
        whole_batch = partial(run, at_once)
        try:
            whole_batch()  # loads kernels and makes AdamW's state, which are no part of a run
            start = time.perf_counter()
            peak = peak_bytes(whole_batch)
            synchronize()
            taken = time.perf_counter() - start
            return Trial(whole_batch, at_once, taken, peak, count_work(whole_batch))
        except torch.OutOfMemoryError:
            pass
        free()  # here, since the exception holds the tensors of the run that failed
        at_once //= 2
    return None
