"""The parts by themselves: extraction of features, aggregation, one block, and the largest bag that trains."""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aggregation
import blocks
import large_bags
from epochs import draw_photos
from gpu_measuring import Peaks, Sizes, count_work, free, gigabytes, num_bytes_of
from gpu_rivals import held_bytes, make_optimizer, make_vision_model, training_step
from measuring import DEVICE, Spread, in_turn, peak_bytes, seconds, spread
from mivpg import MivpgConfig, MivpgForBagClassification, MivpgForConditionalGeneration, MivpgProcessor
from mivpg.bags import Sample
from mivpg.features import extract_features
from mivpg.miniature import BASE_MODEL
from parameters import draw_zeros

# ── Extraction ──────────────────────────────────────────────────────────────────────────────────────────────────────

EXTRACTION_COLUMNS = ["", "images a second", "of the vision model's", "of bf16 peak"]


@torch.no_grad()
def extraction_rows(sizes: Sizes, peaks: Peaks) -> Iterator[list[Any]]:
    """Images a second of the vision model by itself, and through the package."""
    config = MivpgConfig(vision_config=sizes.vision.to_dict(), qformer_config=sizes.qformer)
    vision_model = make_vision_model(sizes)
    with DEVICE:
        model = MivpgForBagClassification(config, vision_model).eval()
        bag = torch.randn(1, sizes.extraction_batch, 3, sizes.vision.image_size, sizes.vision.image_size)
    draw_zeros(model)
    images = bag[0].to(torch.bfloat16)
    runs = {
        "the vision model by itself": lambda: vision_model(images),
        "get_image_embeds": lambda: model.get_image_embeds(bag),
    }
    bare, ours = runs
    found = in_turn(runs, rounds=sizes.rounds)
    work = count_work(runs[bare])
    num_images = sizes.extraction_batch
    of_peak = work.flops / found.of(bare).median / peaks.flops
    yield [bare, f"{num_images / found.of(bare).median:.0f}", 1, f"{of_peak:.1%}"]
    yield [ours, f"{num_images / found.of(ours).median:.0f}", found.times_as_fast(ours, bare)]
    for width, height in sizes.photos:
        rate = extraction_rate(sizes, model, (width, height))
        share = rate.median * found.of(bare).median / num_images
        yield [f"extract_features from JPEG files of {width} x {height}, float16", rate, f"{share:.3g}"]


def extraction_rate(sizes: Sizes, model: MivpgForBagClassification, photo_size: tuple[int, int]) -> Spread:
    """Images a second of extraction that is under way, by the times at which its files were written.

    A bag fills a batch, so a file is written a batch. All bags hold the same files.
    """
    processor = MivpgProcessor.from_pretrained(BASE_MODEL)
    processor.image_processor.size = {"height": sizes.vision.image_size, "width": sizes.vision.image_size}
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_photos(Path(folder, "photos"), sizes.extraction_batch, size=photo_size)
        photos = tuple(photo for sample in drawn for photo in sample.images)
        bags = [Sample(id=str(number), images=photos) for number in range(sizes.num_extraction_batches)]
        store, batch_size = Path(folder, "store"), sizes.extraction_batch
        extract_features(model, processor, bags, store, dtype=torch.float16, batch_size=batch_size)
        written = sorted(file.stat().st_mtime_ns for file in store.glob("*.safetensors"))
    assert len(written) == len(bags)
    return spread(batch_size * 1e9 / max(after - before, 1) for before, after in pairwise(written))


# ── Aggregation and one block ───────────────────────────────────────────────────────────────────────────────────────


class UnderAutocast(nn.Module):
    """A model that computes in bfloat16 where autocast thinks it safe."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image_embeds: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return self.model(image_embeds)


def aggregation_rows(sizes: Sizes) -> Iterator[list[Any]]:
    """A row a bag size and dtype: MIVPG beside transformers' Q-Former on the concatenated patches."""
    qformer = {"encoder_hidden_size": sizes.vision.hidden_size} | sizes.qformer
    in_float32 = aggregation.make_rivals(qformer, num_queries=sizes.num_prompts)
    in_bfloat16: dict[str, nn.Module] = {name: UnderAutocast(rival) for name, rival in in_float32.items()}
    for num_images in sizes.nums_images_to_aggregate:
        size = (aggregation.BATCH_SIZE, num_images, sizes.num_tokens, sizes.vision.hidden_size)
        image_embeds = torch.randn(size, device=DEVICE)
        for dtype, rivals in (("float32", in_float32), ("bf16 autocast", in_bfloat16)):
            found, peaks = aggregation.compare(rivals, image_embeds, rounds=sizes.rounds, dropout=True)
            yield [f"{num_images}, {dtype}", *aggregation.measured_cells(found, peaks)]


def block_row(sizes: Sizes, num_instances: int) -> Iterator[list[Any]]:
    """In float32: seconds, ratios and kept bytes."""
    times, kept = blocks.block_rows(sizes.block, num_instances, rounds=sizes.rounds)
    yield [*times, *kept[1:]]  # both begin with the size


def correlation_rows(sizes: Sizes) -> Iterator[list[Any]]:
    """A row a way to correlate instances."""
    yield from blocks.correlation_rows(sizes.block, sizes.correlation_instances, rounds=sizes.rounds)
    for package in ("nystrom_attention", "torchmil"):
        if not find_spec(package):
            yield [package, "not installed: left out"]


# ── The largest bag that trains ─────────────────────────────────────────────────────────────────────────────────────

LARGEST_BAG_COLUMNS = ["computed in", "instances", "s", "GB beyond weights and AdamW", "GB in all"]


def largest_bag_rows(sizes: Sizes) -> Iterator[list[Any]]:
    """A row a bag, doubling, without and with gradient checkpointing, under bf16 autocast and in float32."""
    with DEVICE:
        model = large_bags.make_model("none")
    optimizer = make_optimizer(model)
    one_large_bag(model, optimizer, min(sizes.large_bag_instances), torch.float32)  # AdamW's state is there from now on
    end = time.perf_counter() + sizes.seconds_largest
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        for dtype in (torch.bfloat16, torch.float32):
            form = f"{str(dtype).removeprefix('torch.')}{', gradient_checkpointing' * checkpointing}"
            for number in sizes.large_bag_instances:
                if time.perf_counter() > end:
                    yield [form, f"{number:,}", "not tried: the time is over"]
                    break
                measured = one_large_bag(model, optimizer, number, dtype)
                if measured is None:
                    yield [form, f"{number:,}", "out of memory"]
                    free()
                    break
                taken, peak = measured
                yield [form, f"{number:,}", f"{taken:.3g}", gigabytes(peak), gigabytes(peak + held_bytes(model))]


def one_large_bag(
    model: MivpgForConditionalGeneration, optimizer: torch.optim.Optimizer, num_instances: int, dtype: torch.dtype
) -> tuple[float, int] | None:
    """Seconds of a training step, and its peak with the bag; None where it does not fit."""
    try:
        with DEVICE:
            batch = large_bags.make_batch(num_instances)
        step = partial(training_step, model, optimizer, batch, 1, dtype)
        peak = peak_bytes(step) + num_bytes_of(batch.values())
        return seconds(step), peak
    except torch.OutOfMemoryError:
        return None
