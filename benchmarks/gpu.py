"""MIVPG at the real BLIP-2's sizes on one GPU, beside what a user would take instead; nothing is downloaded.

python benchmarks/gpu.py

Weights, images and words are random, so that captions mean nothing; sizes, dtypes and steps are those of `mivpg train`
with `dtype: bfloat16` and `bf16: true`: frozen models in bfloat16, what trains in float32 under autocast, AdamW. In
under eight minutes:

- training step and captions, with FLAN-T5-XL and with OPT-2.7b: MIVPG; BLIP-2's Q-Former on the concatenated patches of
  all images; and as LLaVA does, every image token projected into the language model. The three share one vision model
  and one language model, and run in turn; large bags of patches are attended to in MIVPG's folded form, too;
- extraction: images a second of ViT-g, and of `extract_features` from files;
- aggregation alone and one block alone, measured as `benchmarks/aggregation.py` and `benchmarks/blocks.py` do;
- the largest bag that trains.

What does not fit takes fewer bags at once, and a step then adds up their gradients. A section that fails says so and
leaves the others alone. Without a GPU it runs on the CPU, where these sizes take hours. Prints Markdown.
"""

import gc
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Blip2Config, Blip2VisionConfig, PreTrainedConfig

import aggregation
import blocks
import large_bags
from epochs import draw_photos
from measuring import DEVICE, Spread, in_turn, machine, markdown, peak_bytes, seconds, spread
from mivpg import MivpgConfig, MivpgForBagClassification, MivpgForConditionalGeneration, MivpgProcessor
from mivpg.bags import Sample
from mivpg.features import extract_features
from mivpg.loading import language_model_class
from mivpg.miniature import BASE_MODEL
from parameters import LANGUAGE_MODELS, draw_zeros

RIVALS: dict[str, dict[str, Any]] = {
    "MIVPG": {"patch_pooling": "abmil", "instance_correlation": "csa"},
    "concatenation": {"patch_pooling": "none", "instance_correlation": "none"},
    "LLaVA-style": {"patch_pooling": "none", "aggregator": "linear_projection"},
}
OURS = "MIVPG"
aten = torch.ops.aten
MOVING_NOTHING = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view)
"""Operations that make no view and yet touch no memory."""
NOT_WORDS = 10
"""Ids below are the language models' special tokens."""


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
    seconds_each: float = 3.0
    """For the rounds of one comparison; there are two at least."""
    seconds_largest: float = 45.0
    """After which no larger bag is tried."""
    seconds_in_all: float = 400.0
    """After which no section begins."""

    @property
    def num_tokens(self) -> int:
        """P, CLS and the patches of an image."""
        return (self.vision.image_size // self.vision.patch_size) ** 2 + 1


# ── What the device can do, and what a run asks of it ───────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Peaks:
    """What the device reaches at best, measured on it: tables of cards say what no program sees."""

    flops: float
    """A second, in a large product of bfloat16 matrices."""
    num_bytes: float
    """A second, read or written, in a large copy."""


def measure_peaks(sizes: Sizes) -> Peaks:
    """The best of several runs of each."""
    left, right = torch.randn(2, sizes.matrix, sizes.matrix, device=DEVICE, dtype=torch.bfloat16)
    source = torch.ones(sizes.copied_bytes, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    found = in_turn({"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, rounds=10, warm_up=3)
    return Peaks(
        flops=2 * sizes.matrix**3 / found.of("product").least,
        num_bytes=2 * sizes.copied_bytes / found.of("copy").least,
    )


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
    """Sums up what PyTorch's operations read and write, each tensor once an operation, as if there were no cache."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is aten.embedding:
            self.total += 2 * result.nbytes  # of the table only the rows that are asked for
        elif not func.is_view and func.overloadpacket not in MOVING_NOTHING:
            tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
            # What is expanded says that it has more bytes than there are.
            self.total += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)
        return result


# ── Rivals side by side ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Measured:
    """One rival's run on all bags of a batch."""

    at_once: int
    """Bags that the device holds at once."""
    seconds: Spread
    ours_is_faster: Spread
    """How many times as fast as this MIVPG is."""
    peak: int
    """Bytes beyond what was there before the run."""
    work: Work


def side_by_side(
    runs: Mapping[str, Callable[[int], Any]], batch_size: int, seconds_each: float
) -> dict[str, Measured | None]:
    """Measures rivals in turn.

    Args:
        runs: Each takes the number of bags that the device holds at once, and runs on all bags.
        batch_size: All bags.
        seconds_each: How long the rounds may take, of which there are two at least.

    Returns:
        None for a rival that cannot hold one bag.
    """
    most = {name: most_at_once(run, batch_size) for name, run in runs.items()}
    fitting = {name: partial(runs[name], at_once) for name, (at_once, _) in most.items() if at_once}
    peak = {name: peak_bytes(run) for name, run in fitting.items()}
    work = {name: count_work(run) for name, run in fitting.items()}
    once = sum(taken for _, taken in most.values())
    found = in_turn(fitting, rounds=min(max(int(seconds_each / once), 2), 7), warm_up=0)
    return {
        name: Measured(most[name][0], found.of(name), found.times_as_fast(OURS, name), peak[name], work[name])
        if name in fitting
        else None
        for name in runs
    }


def most_at_once(run: Callable[[int], Any], batch_size: int) -> tuple[int, float]:
    """The most bags at once that fit, halving, and the seconds that the run took; (0, 0.0) where not one fits."""
    at_once = batch_size
    while at_once:
        try:
            return at_once, seconds(partial(run, at_once))
        except torch.OutOfMemoryError:
            pass
        free()  # here, since the exception holds the tensors of the run that failed
        at_once //= 2
    return 0, 0.0


def free() -> None:
    """Gives the device's memory back that nothing holds any more."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no CUDA device


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f}"


# ── The three models ────────────────────────────────────────────────────────────────────────────────────────────────


def make_vision_model(sizes: Sizes) -> nn.Module:
    """The frozen vision model in bfloat16."""
    with DEVICE:
        return AutoModel.from_config(sizes.vision, dtype=torch.bfloat16)


def make_rivals(sizes: Sizes, language: PreTrainedConfig) -> dict[str, MivpgForConditionalGeneration]:
    """The rivals between one frozen vision model and one frozen language model in bfloat16."""
    vision_model = make_vision_model(sizes)
    with DEVICE:
        language_model = language_model_class(language).from_config(language, dtype=torch.bfloat16)
    blip2 = Blip2Config(
        vision_config=sizes.vision.to_dict(),
        qformer_config={"encoder_hidden_size": sizes.vision.hidden_size} | sizes.qformer,
        text_config=language.to_dict(),
        image_token_index=language.vocab_size - 1,
    )
    rivals = {}
    for name, options in RIVALS.items():
        per_image = options.get("aggregator") == "linear_projection"
        num_prompts = sizes.num_tokens if per_image else sizes.num_prompts
        config = MivpgConfig.from_blip2(blip2, num_query_tokens=num_prompts, **options)
        with DEVICE:
            rivals[name] = MivpgForConditionalGeneration(config, vision_model, language_model)
        draw_zeros(rivals[name])
    return rivals


def make_batch(
    sizes: Sizes, model: MivpgForConditionalGeneration, num_images: int, *, stored: bool, captioned: bool
) -> dict[str, Tensor]:
    """Bags and a short prompt, as pixels or as a store has them; with a caption each where it trains."""
    config, vision = model.config, sizes.vision
    num_prompts = config.num_query_tokens * (num_images if config.prompts_per_image else 1)

    def words(number: int) -> Tensor:
        return torch.randint(NOT_WORDS, config.image_token_index, (sizes.batch_size, number))

    with DEVICE:
        marks = torch.full((sizes.batch_size, num_prompts), config.image_token_index)
        ids = torch.cat([marks, words(aggregation.NUM_PROMPT_TOKENS)], dim=1)
        batch = {}
        if captioned:
            caption = words(sizes.num_words)
            batch["labels"] = caption
            if not config.is_encoder_decoder:
                batch["labels"] = torch.cat([torch.full_like(ids, -100), caption], dim=1)
                ids = torch.cat([ids, caption], dim=1)
        if stored:
            size = (sizes.batch_size, num_images, sizes.num_tokens, vision.hidden_size)
            batch["image_embeds"] = torch.randn(size, dtype=torch.bfloat16)
        else:
            batch["pixel_values"] = torch.randn(sizes.batch_size, num_images, 3, vision.image_size, vision.image_size)
        return batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def split(batch: dict[str, Tensor], at_once: int) -> list[dict[str, Tensor]]:
    """The same bags, so many at once."""
    parts = zip(*(value.split(at_once) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def num_positions(model: MivpgForConditionalGeneration) -> float:
    """Tokens that the language model can read; T5's positions are relative."""
    return model.config.text_config.to_dict().get("max_position_embeddings", math.inf)


def num_bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# ── A step of training, and captions ────────────────────────────────────────────────────────────────────────────────


def rival_columns(first: str, things: str) -> list[str]:
    """Of a table that `rival_rows` fills."""
    columns = [first, "", "bags at once", "s", "MIVPG is so many times as fast", f"{things} a second"]
    return [*columns, "GB beyond weights and AdamW", "GB in all", "TFLOP", "of bf16 peak", "of bandwidth"]


def rival_rows(
    sizes: Sizes,
    peaks: Peaks,
    batches: Mapping[str, dict[str, Tensor]],
    run: Callable[[str, dict[str, Tensor], int], Any],
    *,
    max_tokens: float,
    num_things: int,
    held: Mapping[str, int],
) -> Iterator[list[Any]]:
    """A row a rival.

    Args:
        sizes: What is measured.
        peaks: What the device can do.
        batches: Of each rival.
        run: Takes a rival's name, its batch and how many of its bags the device holds at once.
        max_tokens: That the language model may read; what has more is not run.
        num_things: Images or captions of a run.
        held: Bytes of weights and AdamW's state.
    """
    lengths = {name: batch["input_ids"].shape[1] for name, batch in batches.items()}
    runs = {name: partial(run, name, batch) for name, batch in batches.items() if lengths[name] <= max_tokens}
    found = side_by_side(runs, sizes.batch_size, sizes.seconds_each)
    for name in batches:
        if name not in runs:
            yield [name, f"not run: {lengths[name]:,} tokens, and the language model reads {max_tokens:,}"]
            continue
        measured = found[name]
        if measured is None:
            yield [name, "not even one bag fits"]
            continue
        taken = measured.seconds.median
        yield [
            name,
            measured.at_once,
            measured.seconds,
            measured.ours_is_faster,
            f"{num_things / taken:.1f}",
            gigabytes(measured.peak),
            gigabytes(measured.peak + held[name] + num_bytes_of(batches[name].values())),
            f"{measured.work.flops / 1e12:.3g}",
            f"{measured.work.flops / taken / peaks.flops:.1%}",
            f"{measured.work.num_bytes / taken / peaks.num_bytes:.1%}",
        ]


def training_step(
    model: MivpgForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    at_once: int,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward for so many bags at once, AdamW for all."""
    parts = split(batch, at_once)
    try:
        for part in parts:
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                loss = model(**part).loss
            (loss / len(parts)).backward()
        optimizer.step()
    finally:
        optimizer.zero_grad()  # also of a step that did not fit


def training_rows(
    sizes: Sizes, rivals: Mapping[str, MivpgForConditionalGeneration], peaks: Peaks
) -> Iterator[list[Any]]:
    """A row a rival, for each kind of step."""
    trained = {name: [p for p in model.train().parameters() if p.requires_grad] for name, model in rivals.items()}
    optimizers = {name: torch.optim.AdamW(those, lr=1e-5, fused=True) for name, those in trained.items()}
    held = {name: num_bytes_of([*rivals[name].parameters(), *those, *those]) for name, those in trained.items()}
    for num_images, stored, checkpointing in kinds_of_steps(sizes):
        rows = rival_rows(
            sizes,
            peaks,
            {
                name: make_batch(sizes, model, num_images, stored=stored, captioned=True)
                for name, model in rivals.items()
            },
            lambda name, batch, at_once: training_step(rivals[name], optimizers[name], batch, at_once),
            max_tokens=num_positions(rivals[OURS]),
            num_things=sizes.batch_size * num_images,
            held=held,
        )
        for model in rivals.values():
            if checkpointing:
                model.gradient_checkpointing_enable()
            else:
                model.gradient_checkpointing_disable()
        title = f"{num_images}, {'features' if stored else 'pixels'}{', gradient_checkpointing' * checkpointing}"
        for row in rows:
            yield [title, *row]


def kinds_of_steps(sizes: Sizes) -> Iterator[tuple[int, bool, bool]]:
    """Images a bag, whether from stored features, whether with gradient checkpointing."""
    yield sizes.usual_images, True, True
    for num_images in sizes.nums_images:
        yield num_images, False, False
        yield num_images, True, False


def write_captions(
    model: MivpgForConditionalGeneration, batch: dict[str, Tensor], at_once: int, *, num_beams: int, num_words: int
) -> None:
    """So many words for every bag; no caption ends before."""
    for part in split(batch, at_once):
        ids = model.generate(**part, num_beams=num_beams, min_new_tokens=num_words, max_new_tokens=num_words)
        assert ids.shape[1] >= num_words


def caption_rows(
    sizes: Sizes, rivals: Mapping[str, MivpgForConditionalGeneration], peaks: Peaks
) -> Iterator[list[Any]]:
    """A row a rival, greedily and with beams, from pixels."""
    for model in rivals.values():
        model.eval().requires_grad_(False)  # FlopCounterMode looks for the graph of what could have one
    batches = {
        name: make_batch(sizes, model, sizes.usual_images, stored=False, captioned=False)
        for name, model in rivals.items()
    }
    for num_beams in sizes.nums_beams:
        write = partial(write_captions, num_beams=num_beams, num_words=sizes.num_words)
        rows = rival_rows(
            sizes,
            peaks,
            batches,
            lambda name, batch, at_once, write=write: write(rivals[name], batch, at_once),
            max_tokens=num_positions(rivals[OURS]) - sizes.num_words,
            num_things=sizes.batch_size,
            held={name: num_bytes_of(model.parameters()) for name, model in rivals.items()},
        )
        for row in rows:
            yield [num_beams, *row]


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
    found = in_turn(runs)
    work = count_work(runs[bare])
    num_images = sizes.extraction_batch
    of_peak = work.flops / found.of(bare).median / peaks.flops
    yield [bare, f"{num_images / found.of(bare).median:.0f}", 1, f"{of_peak:.1%}"]
    yield [ours, f"{num_images / found.of(ours).median:.0f}", found.times_as_fast(ours, bare), ""]
    for width, height in sizes.photos:
        rate = extraction_rate(sizes, model, (width, height))
        share = rate.median * found.of(bare).median / num_images
        yield [f"extract_features from JPEG files of {width} x {height}, float16", rate, f"{share:.3g}", ""]


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


# ── Aggregation and one block by themselves ─────────────────────────────────────────────────────────────────────────


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
            found, peaks = aggregation.compare(rivals, image_embeds, rounds=7, dropout=True)
            yield [f"{num_images}, {dtype}", *aggregation.measured_cells(found, peaks)]


def block_rows(sizes: Sizes) -> Iterator[list[Any]]:
    """A row a size of bag, in float32: seconds, ratios and kept bytes."""
    for number in sizes.block_instances:
        times, kept = blocks.block_rows(sizes.block, number, rounds=7)
        yield [*times, *kept[1:]]  # both begin with the size


def correlation_rows(sizes: Sizes) -> Iterator[list[Any]]:
    """A row a way to correlate instances."""
    yield from blocks.correlation_rows(sizes.block, sizes.correlation_instances, rounds=7)
    for package in ("nystrom_attention", "torchmil"):
        if not find_spec(package):
            yield [package, "not installed: left out"]


# ── The largest bag that trains ─────────────────────────────────────────────────────────────────────────────────────

LARGEST_BAG_COLUMNS = ["computed in", "instances", "s", "GB beyond weights and AdamW", "GB in all"]


def largest_bag_rows(sizes: Sizes) -> Iterator[list[Any]]:
    """A row a bag, doubling, without and with gradient checkpointing, under bf16 autocast and in float32."""
    with DEVICE:
        model = large_bags.make_model("none")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    held = num_bytes_of([*model.parameters(), *trained, *trained])
    smallest = min(sizes.large_bag_instances)
    one_large_bag(model, optimizer, smallest, torch.float32)  # AdamW's state is there from now on
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
                yield [form, f"{number:,}", f"{taken:.3g}", gigabytes(peak), gigabytes(peak + held)]


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


# ── The report ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Report:
    """Prints section by section; one that fails leaves the others alone.

    Args:
        seconds_in_all: After which no section begins.
    """

    def __init__(self, seconds_in_all: float):
        self.start = time.perf_counter()
        self.seconds_in_all = seconds_in_all
        self.failed: list[str] = []

    def section(self, title: str, run: Callable[[], Any]) -> None:
        """Prints a title and what `run` prints."""
        print(f"\n{title}\n", flush=True)
        if time.perf_counter() > self.start + self.seconds_in_all:
            print(f"Left out: {self.seconds_in_all:.0f} seconds are over.")
            return
        try:
            run()
        except Exception as error:  # whatever it is: minutes on a GPU are dear, and the other sections do not need it
            traceback.print_exc()
            print(f"\nThis section stopped: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            self.failed.append(title.lstrip("# "))
        free()

    def table(self, title: str, columns: list[str], rows: Callable[[], Iterable[list[Any]]]) -> None:
        """A section that is a table, printed row by row as it is measured."""

        def run() -> None:
            print(markdown(columns, []), flush=True)
            for row in rows():
                padding = [""] * (len(columns) - len(row))
                print(markdown(columns, [[*row, *padding]]).splitlines()[-1], flush=True)

        self.section(title, run)


def caption_models(report: Report, sizes: Sizes, name: str, peaks: Peaks) -> None:
    """What is measured with one language model."""
    rivals = make_rivals(sizes, sizes.languages[name])
    report.table(
        f"### {name}: the models",
        ["", "parameters", "of which train", "GB"],
        lambda: [
            [
                rival,
                f"{sum(p.numel() for p in model.parameters()):,}",
                f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}",
                gigabytes(num_bytes_of(model.parameters())),
            ]
            for rival, model in rivals.items()
        ],
    )
    report.table(
        f"### {name}: a training step on {sizes.batch_size} bags",
        rival_columns("images a bag, from", "images"),
        lambda: training_rows(sizes, rivals, peaks),
    )
    report.table(
        f"### {name}: captions of {sizes.batch_size} bags of {sizes.usual_images} images, "
        f"{sizes.num_words} tokens each, from pixels",
        rival_columns("beams", "captions"),
        lambda: caption_rows(sizes, rivals, peaks),
    )


def print_report(sizes: Sizes) -> list[str]:
    """Prints all sections; returns the titles of those that failed."""
    report = Report(sizes.seconds_in_all)
    peaks = measure_peaks(sizes)
    print(
        f"{machine()}\n\nMeasured on it: {peaks.flops / 1e12:.1f} TFLOP/s in a bf16 product of matrices of "
        f"{sizes.matrix:,} x {sizes.matrix:,}, {peaks.num_bytes / 1e9:,.0f} GB/s in a copy of "
        f"{gigabytes(sizes.copied_bytes)} GB; shares below are of these. Operations of matrix products, convolutions "
        "and attention are counted in one run, and so are the bytes that every operation reads and writes, as if there "
        "were no cache. Times are medians (least to most) of rounds in turn, ratios those of one round."
    )
    first, *others = sizes.languages
    report.section(f"## {first}", lambda: caption_models(report, sizes, first, peaks))
    report.table("## Extraction", EXTRACTION_COLUMNS, lambda: extraction_rows(sizes, peaks))
    report.table(
        f"## Aggregation, forward and backward, {aggregation.BATCH_SIZE} bags, {sizes.num_tokens} tokens an image",
        aggregation.MEASURED_COLUMNS,
        lambda: aggregation_rows(sizes),
    )
    report.table(
        "## CSA and cross-attention of one block, forward and backward, float32; MB kept for the backward pass, and "
        "their shares of all that the other form keeps, and without the updated instances",
        [*blocks.TIME_COLUMNS, *blocks.KEPT_COLUMNS[1:]],
        lambda: block_rows(sizes),
    )
    report.table(
        f"## CSA alone, {sizes.correlation_instances:,} instances, and Nyström attention of the same width",
        blocks.CORRELATION_COLUMNS,
        lambda: correlation_rows(sizes),
    )
    report.table("## The largest bag that trains", LARGEST_BAG_COLUMNS, lambda: largest_bag_rows(sizes))
    for name in others:
        report.section(f"## {name}", partial(caption_models, report, sizes, name, peaks))
    print(f"\n{time.perf_counter() - report.start:.0f} seconds in all.")
    return report.failed


def main() -> None:
    torch.manual_seed(0)
    if failed := print_report(Sizes()):
        sys.exit(f"Failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
