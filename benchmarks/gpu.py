"""MIVPG at the real BLIP-2's sizes on one GPU, beside what a user would take instead; nothing is downloaded.

python benchmarks/gpu.py

Weights, images and words are random, so that captions mean nothing; sizes, dtypes and steps are those of `mivpg train`
with `dtype: bfloat16` and `bf16: true`: frozen models in bfloat16, what trains in float32 under autocast, AdamW. In
under eight minutes:

- training step and captions, with FLAN-T5-XL and with OPT-2.7b: MIVPG; BLIP-2's Q-Former on the concatenated patches of
  all images; and as LLaVA does, every image token projected into the language model. The three share one vision model
  and one language model, and run in turn; large bags of patches are attended to in MIVPG's folded form, too
  (`gpu_rivals.py`);
- extraction: images a second of ViT-g, and of `extract_features` from files;
- aggregation alone and one block alone, measured as `benchmarks/aggregation.py` and `benchmarks/blocks.py` do;
- the largest bag that trains (all three in `gpu_parts.py`).

What does not fit takes fewer bags at once, and a step then adds up their gradients (`gpu_measuring.py`). What fails
says so and leaves the rest alone. Without a GPU it runs on the CPU, where these sizes take hours. Prints Markdown.
"""

import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

import aggregation
import blocks
from gpu_measuring import Peaks, Sizes, free, gigabytes, measure_peaks
from gpu_parts import (
    EXTRACTION_COLUMNS,
    LARGEST_BAG_COLUMNS,
    aggregation_rows,
    block_row,
    correlation_rows,
    extraction_rows,
    largest_bag_rows,
)
from gpu_rivals import caption_rows, kinds_of_steps, make_rivals, model_row, rival_columns, training_rows
from measuring import machine, markdown

Part = Callable[[], Iterable[list[Any]]]
"""Makes rows of a table."""


class Report:
    """Prints section by section; what fails leaves the rest alone.

    Args:
        seconds_in_all: After which nothing more begins.
    """

    def __init__(self, seconds_in_all: float):
        self.start = time.perf_counter()
        self.seconds_in_all = seconds_in_all
        self.failed: list[str] = []

    def attempt(self, title: str, run: Callable[[], Any]) -> str:
        """Runs it, if there is time; returns what went wrong, if anything."""
        if time.perf_counter() > self.start + self.seconds_in_all:
            return f"Left out: {self.seconds_in_all:.0f} seconds are over."
        problem = ""
        try:
            run()
        except Exception as error:  # whatever it is: minutes on a GPU are dear, and the rest does not need it
            traceback.print_exc()
            problem = f"Stopped: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.failed.append(title.lstrip("# "))
        free()  # here, since the exception holds the tensors of the run that failed
        return problem

    def section(self, title: str, run: Callable[[], Any]) -> None:
        """Prints a title and what `run` prints."""
        print(f"\n{title}\n", flush=True)
        if problem := self.attempt(title, run):
            print(problem, flush=True)

    def table(self, title: str, columns: list[str], *parts: Part) -> None:
        """A section that is a table, printed row by row as it is measured; of a part that fails a row says so."""
        print(f"\n{title}\n\n{markdown(columns, [])}", flush=True)

        def print_row(row: list[Any]) -> None:
            padding = [""] * (len(columns) - len(row))
            print(markdown(columns, [[*row, *padding]]).splitlines()[-1], flush=True)

        def print_part(part: Part) -> None:
            for row in part():
                print_row(row)

        for part in parts:
            if problem := self.attempt(title, partial(print_part, part)):
                print_row([problem])


def caption_models(report: Report, sizes: Sizes, name: str, peaks: Peaks) -> None:
    """What is measured with one language model."""
    rivals = make_rivals(sizes, sizes.languages[name])
    report.table(
        f"### {name}: the models",
        ["", "parameters", "of which train", "GB"],
        lambda: [model_row(rival, model) for rival, model in rivals.items()],
    )
    report.table(
        f"### {name}: a training step on {sizes.batch_size} bags",
        rival_columns("images a bag, from", "images"),
        *(partial(training_rows, sizes, rivals, peaks, kind) for kind in kinds_of_steps(sizes)),
    )
    report.table(
        f"### {name}: captions of {sizes.batch_size} bags of {sizes.usual_images} images, "
        f"{sizes.num_words} tokens each, from pixels",
        rival_columns("beams", "captions"),
        *(partial(caption_rows, sizes, rivals, peaks, num_beams) for num_beams in sizes.nums_beams),
    )


def print_report(sizes: Sizes) -> list[str]:
    """Prints all sections; returns the titles of those that failed."""
    report = Report(sizes.seconds_in_all)
    peaks = measure_peaks(sizes.matrix, sizes.copied_bytes)
    report.attempt("the machine", lambda: print(machine()))
    print(
        f"\nMeasured on it: {peaks.flops / 1e12:.1f} TFLOP/s in a bf16 product of matrices of "
        f"{sizes.matrix:,} x {sizes.matrix:,}, {peaks.num_bytes / 1e9:,.0f} GB/s in a copy of "
        f"{gigabytes(sizes.copied_bytes)} GB; shares below are of these. Operations of matrix products, convolutions "
        "and attention are counted in one run, and so are the bytes that every operation reads and writes, as if there "
        "were no cache. Times are medians (least to most) of rounds in turn, ratios those of one round."
    )
    first, *others = sizes.languages
    report.section(f"## {first}", partial(caption_models, report, sizes, first, peaks))
    report.table("## Extraction", EXTRACTION_COLUMNS, partial(extraction_rows, sizes, peaks))
    report.table(
        f"## Aggregation, forward and backward, {aggregation.BATCH_SIZE} bags, {sizes.num_tokens} tokens an image",
        aggregation.MEASURED_COLUMNS,
        partial(aggregation_rows, sizes),
    )
    report.table(
        "## CSA and cross-attention of one block, forward and backward, float32; MB kept for the backward pass, and "
        "their shares of what sdpa keeps: of these, of these and the bag, and of what two blocks in a row keep",
        [*blocks.TIME_COLUMNS, *blocks.KEPT_COLUMNS[1:]],
        *(partial(block_row, sizes, number) for number in sizes.block_instances),
    )
    report.table(
        f"## CSA alone, {sizes.correlation_instances:,} instances, and Nyström attention of the same width",
        blocks.CORRELATION_COLUMNS,
        partial(correlation_rows, sizes),
    )
    report.table("## The largest bag that trains", LARGEST_BAG_COLUMNS, partial(largest_bag_rows, sizes))
    for name in others:
        report.section(f"## {name}", partial(caption_models, report, sizes, name, peaks))
    print(f"\n{time.perf_counter() - report.start:.0f} seconds in all.")
    return report.failed


def main() -> None:
    torch.manual_seed(0)
    gc.freeze()  # what was imported stays: looking through it takes a tenth of a second each time
    if failed := print_report(Sizes()):
        sys.exit(f"Failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
