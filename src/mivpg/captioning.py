"""Writes captions: of a few bags in memory, or of a whole data set into a file that an interrupted run goes on with.

captions = caption_bags(model, processor, bags, num_beams=5, max_new_tokens=64)
counts = caption_file(model, processor, samples, Path("captions.jsonl"), generation=GenerationOptions())
"""

import dataclasses
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mivpg.bags import Bag, BagCollator, BagDataset, Sample, size_to_sort_by
from mivpg.errors import BagError, MivpgError
from mivpg.files import only_writer, write_whole

if TYPE_CHECKING:
    from mivpg.modeling_mivpg import MivpgForConditionalGeneration
    from mivpg.processing_mivpg import MivpgProcessor

logger = logging.getLogger(__name__)

MODEL_OPTIONS = (
    "aggregator",
    "aggregator_options",
    "patch_pooling",
    "pool_include_prefix",
    "image_size",
    "num_query_tokens",
    "num_prefix_tokens",
    "caption_end_token_id",
)
"""Fields of a model's config that decide what its captions are, and that its weights need not tell."""

NUM_READERS = min(32, max(4, os.cpu_count() or 1))
"""Threads that open images while the model is at work: a fast device sees as many photos as eight cores decode. Pillow
lets go of the interpreter while it decodes."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a caption is written."""

    num_beams: int = 5
    """Captions kept at each token; 1 = greedy, the fastest."""
    max_new_tokens: int = 64
    """Longest caption, in tokens of the language model; PatchGastricADC22 needs about 75, COCO 30."""
    min_new_tokens: int | None = None
    """Shortest caption, in tokens."""

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise MivpgError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if self.min_new_tokens is not None and not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise MivpgError(
                f"min_new_tokens is {self.min_new_tokens}, expected 0 to max_new_tokens ({self.max_new_tokens})."
            )

    def as_kwargs(self) -> dict[str, Any]:
        """Arguments for `caption_bags` and `generate`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class CaptionCounts:
    """What `caption_file` did."""

    num_bags: int
    """Lines of the file, one a bag."""
    num_failed: int
    """Bags that could not be read; their lines hold an error instead of a caption."""
    num_resumed: int
    """Bags that an interrupted run had done before."""


def caption_bags(
    model: "MivpgForConditionalGeneration", processor: "MivpgProcessor", bags: list[Bag], **generate_kwargs: Any
) -> list[str]:
    """Captions of bags, as one batch.

    Args:
        model: Captions in eval mode and is left in the mode it was found in.
        processor: The model's.
        bags: All of images, or all of features of one shape (P, D).
        **generate_kwargs: What transformers' `generate` takes, such as `num_beams` and `max_new_tokens`.

    Raises:
        BagError: The bags do not fit together, or the features of one do not fit the model.
    """
    return _write(model, processor, _collate(model, processor, bags), **generate_kwargs)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the model is left in the mode it was found in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _collate(
    model: "MivpgForConditionalGeneration", processor: "MivpgProcessor", bags: list[Bag]
) -> Mapping[str, Tensor]:
    """What `generate` reads of a batch."""
    width = model.config.image_embeds_size
    for bag in bags:
        if bag.image_embeds is not None and bag.image_embeds.shape[-1] != width:
            raise BagError(f"bag {bag.id!r}: features are {bag.image_embeds.shape[-1]} wide, the model takes {width}.")
    return BagCollator(processor, training=False)(bags)


def _write(
    model: "MivpgForConditionalGeneration",
    processor: "MivpgProcessor",
    inputs: Mapping[str, Tensor],
    **generate_kwargs: Any,
) -> list[str]:
    """Captions of a batch."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    with in_eval_mode(model):
        ids = model.generate(**inputs, **generate_kwargs)  # (B, T)
    if not model.config.is_encoder_decoder:
        ids = ids[:, inputs["input_ids"].shape[1] :]  # a decoder-only model repeats its prompt
    return processor.decode_captions(ids)


def caption_samples(
    model: "MivpgForConditionalGeneration",
    processor: "MivpgProcessor",
    samples: Sequence[Sample],
    *,
    generation: GenerationOptions,
    prompt: str = "",
    batch_size: int = 8,
    start: int = 0,
) -> Generator[tuple[str, str | BagError], None, None]:
    """Captions bags in the order given, with a progress bar on a terminal.

    While the model writes, the next batch is put together and the images of the one after it are read, so three batches
    are in memory as the vision model gets them, however large the data set is and its images are.

    Args:
        model: As in `caption_bags`.
        processor: The model's.
        samples: What to caption.
        generation: How.
        prompt: Precedes the caption of samples without a prompt of their own.
        batch_size: Bags captioned at once.
        start: How many samples to pass over.

    Yields:
        Bag id and caption, or what is wrong with the bag.
    """
    check_batch_size(batch_size)
    opened = _read_ahead(BagDataset(samples, prompt=prompt, processor=processor), start, batch_size)

    def next_batch() -> tuple[list[tuple[str, Bag | BagError]], Mapping[str, Tensor] | BagError]:
        batch = list(islice(opened, batch_size))
        return batch, _collated(model, processor, [bag for _, bag in batch if isinstance(bag, Bag)])

    # disable=None: no bar where the output is not a terminal
    with (
        closing(opened),
        ThreadPoolExecutor(1) as collator,
        tqdm(total=len(samples), initial=start, unit="bag", disable=None) as progress,
    ):
        batch, inputs = next_batch()
        while batch:
            following = collator.submit(next_batch)
            readable = [bag for _, bag in batch if isinstance(bag, Bag)]
            results = iter(caption_each(model, processor, readable, generation, inputs=inputs))
            for bag_id, bag in batch:
                yield bag_id, next(results) if isinstance(bag, Bag) else bag
                progress.update()
            batch, inputs = following.result()


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise MivpgError(f"batch_size is {batch_size}, expected at least 1.")


def _read_ahead(dataset: BagDataset, start: int, num_ahead: int) -> Generator[tuple[str, Bag | BagError], None, None]:
    """Opens bags in order, `num_ahead` of them before they are asked for."""

    def open_bag(index: int) -> tuple[str, Bag | BagError]:
        try:
            return dataset.samples[index].id, dataset[index]
        except BagError as error:
            return dataset.samples[index].id, error

    readers = ThreadPoolExecutor(NUM_READERS)
    try:
        indices = iter(range(start, len(dataset)))
        waiting = deque(readers.submit(open_bag, index) for index in islice(indices, num_ahead))
        while waiting:
            opened = waiting.popleft().result()
            waiting.extend(readers.submit(open_bag, index) for index in islice(indices, 1))
            yield opened
    finally:
        readers.shutdown(cancel_futures=True)


def _collated(
    model: "MivpgForConditionalGeneration", processor: "MivpgProcessor", bags: list[Bag]
) -> Mapping[str, Tensor] | BagError:
    """What `generate` reads of bags, or why they make no batch."""
    try:
        return _collate(model, processor, bags) if bags else {}
    except BagError as error:
        return error


def caption_each(
    model: "MivpgForConditionalGeneration",
    processor: "MivpgProcessor",
    bags: list[Bag],
    generation: GenerationOptions,
    *,
    inputs: Mapping[str, Tensor] | BagError | None = None,
) -> list[str | BagError]:
    """A caption for each bag, or what is wrong with it; bags that do not fit together are captioned one by one.

    Args:
        model: As in `caption_bags`.
        processor: The model's.
        bags: Any number.
        generation: How captions are written.
        inputs: What the processor made of these bags, or why they make no batch; None = make it now.
    """
    if not bags:
        return []
    try:
        if inputs is None:
            inputs = _collate(model, processor, bags)
        if isinstance(inputs, BagError):
            raise inputs
        return [*_write(model, processor, inputs, **generation.as_kwargs())]
    except BagError as error:
        if len(bags) == 1:
            named = f"bag {bags[0].id!r}: "
            return [error if str(error).startswith(named) else BagError(f"{named}{error}")]
        return [caption_each(model, processor, [bag], generation)[0] for bag in bags]


def caption_file(
    model: "MivpgForConditionalGeneration",
    processor: "MivpgProcessor",
    samples: Sequence[Sample],
    out: Path,
    *,
    generation: GenerationOptions,
    prompt: str = "",
    batch_size: int = 8,
    strict: bool = False,
    keep_notes: bool = False,
) -> CaptionCounts:
    """Captions a data set into JSON lines, `{"id", "caption"}` in the order of the samples.

    Bags of like size are captioned together, so that little of a batch is padding, and the largest come first, so that
    what does not fit into memory shows at once. Until all are done the lines stand in that order, batch by batch, in
    `<out>.partial`, beside `<out>.partial.json`, which says what writes them. A later run with the same samples, model
    (weights and options), prompt and generation options goes on there. With the same batch size its batches are those
    of an unbroken run; one that ran out of memory may go on with a smaller one. A bag that cannot be read, or has
    places that are no lattice for PPEG, is logged, gets a line `{"id", "error"}` and is passed over.

    Args:
        model: As in `caption_bags`.
        processor: The model's.
        samples: What to caption, each with an id of its own.
        out: The file to write; it must not exist.
        generation: How captions are written.
        prompt: Precedes the caption of samples without a prompt of their own.
        batch_size: Bags captioned at once.
        strict: Whether to stop at the first bag that cannot be read; what was done before it is kept.
        keep_notes: For a caller that has more to do with the captions: `<out>.partial.json` stays until it deletes it,
            and where both files are there already, nothing is captioned again.

    Raises:
        MivpgError: `out` exists, another run is writing it, two samples have one id, or its partial file belongs to
            other samples, was written otherwise, or does not say how: an earlier version noted less about the model.
        BagError: A bag cannot be read and `strict` is set.
    """
    check_batch_size(batch_size)
    if twice := [bag_id for bag_id, number in Counter(sample.id for sample in samples).items() if number > 1]:
        raise MivpgError(f"samples: several bags have the id {twice[0]!r}, expected an id of its own for each bag.")
    partial, notes_file = out.with_name(out.name + ".partial"), notes_of(out)
    with only_writer(out):
        if out.exists() and not (keep_notes and notes_file.exists()):
            raise MivpgError(f"{out} exists already; delete it or choose another name.")
        begun = out if out.exists() else partial
        notes = _notes(model, samples, prompt, generation)
        kept: dict[str, bool] = {}
        if begun.exists():
            _check_notes(begun, notes_file, notes)
            kept = _resume(begun, samples, batch_size, strict)
            begun.rename(partial)
        if kept:
            logger.info("%s: going on after %d of %d bags.", partial, len(kept), len(samples))
        write_whole(notes_file, json.dumps(notes))  # before the first caption, so that there is none without it

        by_size = sorted(samples, key=size_to_sort_by, reverse=True)
        by_size.sort(key=lambda sample: sample.id not in kept)  # those that are done stand first
        results = caption_samples(
            model, processor, by_size, generation=generation, prompt=prompt, batch_size=batch_size, start=len(kept)
        )
        with partial.open("ab") as file, closing(results):
            num_failed = _append(file, results, batch_size, strict) + sum(kept.values())
        lines = {read_record(line)["id"]: line + b"\n" for line in _whole_lines(partial)}
        write_whole(partial, b"".join(lines[sample.id] for sample in samples))
        partial.rename(out)
        if not keep_notes:
            notes_file.unlink()
    return CaptionCounts(num_bags=len(samples), num_failed=num_failed, num_resumed=len(kept))


def _append(file: BinaryIO, results: Iterable[tuple[str, str | BagError]], batch_size: int, strict: bool) -> int:
    """Writes a line a bag, brought to the disk batch by batch, and counts the bags that failed."""
    num_failed = 0
    for number, (bag_id, result) in enumerate(results, start=1):
        if isinstance(result, BagError):
            if strict:
                raise result
            logger.warning("%s", result)
            num_failed += 1
            record = {"id": bag_id, "error": str(result)}
        else:
            record = {"id": bag_id, "caption": result}
        # surrogatepass: an id may hold half a pair, and has to be found again
        file.write(json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass") + b"\n")
        if number % batch_size == 0:
            file.flush()
            os.fsync(file.fileno())
    file.flush()
    os.fsync(file.fileno())
    return num_failed


def notes_of(out: Path) -> Path:
    """The file beside a file of captions that notes what writes it, and of which bags."""
    return out.with_name(out.name + ".partial.json")


def read_captions(out: Path) -> dict[str, str]:
    """Bag id to caption of a file that `caption_file` wrote, without the bags that could not be read."""
    # By the end of line that was written: a caption may hold others, such as U+2028, that `splitlines` would cut at.
    records = [json.loads(line) for line in out.read_bytes().split(b"\n") if line]
    return {record["id"]: record["caption"] for record in records if "caption" in record}


def _whole_lines(partial: Path) -> list[bytes]:
    """What follows the last end of line was cut short by a kill."""
    return partial.read_bytes().split(b"\n")[:-1]


def _notes(
    model: "MivpgForConditionalGeneration", samples: Sequence[Sample], prompt: str, generation: GenerationOptions
) -> dict[str, Any]:
    """What decides what the captions are; of the bags, which they are and what they are made of."""
    config, qformer = model.config, model.config.qformer_config
    bags = sha256()
    made_of = (repr(replace(sample, captions=(), label=None, group=None, split=None)) for sample in samples)
    for bag in sorted(made_of):
        bags.update(bag.encode(errors="surrogatepass"))
    notes = {
        "data": f"{len(samples)} bags, sha256 {bags.hexdigest()[:16]}",
        "prompt": prompt,
        **generation.as_kwargs(),
        "base": config.base,
        "dtype": str(model.dtype),
        "trained_weights": model.fingerprint(),
        **{name: getattr(config, name) for name in MODEL_OPTIONS},
        **{name: getattr(qformer, name) for name in qformer.options()},
    }
    return json.loads(json.dumps(notes))  # as it is read back: a tuple comes back as a list


def _check_notes(captions: Path, notes_file: Path, notes: dict[str, Any]) -> None:
    """Raises where going on with captions would mix those of two kinds in a file."""
    begun = read_record(notes_file.read_bytes()) if notes_file.exists() else {}
    remedy = "delete it to start anew, or choose another name for the captions."
    for name, value in notes.items():
        if name not in begun:
            raise MivpgError(
                f"{captions} was begun with an unknown {name}, which {notes_file} does not tell (earlier versions "
                f"noted less): {remedy}"
            )
        if begun[name] != value:
            raise MivpgError(
                f"{captions} was begun with {name} = {begun[name]!r}, and {value!r} is asked for: {remedy}"
            )


def _resume(partial: Path, samples: Sequence[Sample], batch_size: int, strict: bool) -> dict[str, bool]:
    """Cuts a partial file to its whole batches, when strict those before the first bag that failed.

    Returns:
        The ids of the bags that are left in it, and whether each failed.

    Raises:
        MivpgError: A line is not that of a sample, or of one that has a line already.
    """
    lines = _whole_lines(partial)
    missing = {sample.id for sample in samples}
    failed: dict[str, bool] = {}
    for number, line in enumerate(lines, start=1):
        record = read_record(line)
        bag_id = record.get("id")
        if not isinstance(bag_id, str) or bag_id not in missing:
            raise MivpgError(
                f"{partial}, line {number}: found {line[:60].decode(errors='replace')!r}, expected one of the "
                f"{len(missing)} bags that have no line yet; it is of another run: delete it to start anew, or choose "
                "another name for the captions."
            )
        missing.remove(bag_id)
        failed[bag_id] = "error" in record
    num_kept = list(failed.values()).index(True) if strict and any(failed.values()) else len(lines)
    if num_kept < len(samples):
        num_kept -= num_kept % batch_size  # other batches are padded otherwise, and round otherwise
    os.truncate(partial, sum(len(line) + 1 for line in lines[:num_kept]))
    return dict(islice(failed.items(), num_kept))


def read_record(line: bytes) -> dict[str, Any]:
    """The object on a line, empty if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
