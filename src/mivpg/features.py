"""The feature store: what the frozen vision model says of each image, computed once and read in every epoch.

    samples = extract_features(model, processor, samples, Path("features"))

A bag is one safetensors file, which `read_features` reads. `features.json` beside them says what made them all, and
each file's metadata says of which images, so that features of two kinds are never mixed.

The vision model sees the images of all bags in the same batches whatever is stored already and however many processes
share the work, since the last bits of a feature depend on its batch: a run that was killed ends with the same bytes as
one that was not.
"""

# N images a bag, n images of a batch, whatever their bags, P patch tokens an image, D vision width

import hashlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import PIL
import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from mivpg.bags import Sample, check_record, naming
from mivpg.captioning import NUM_READERS, check_batch_size, in_eval_mode, read_record
from mivpg.checkpoints import stat
from mivpg.errors import BagError, MivpgError
from mivpg.feature_files import features_shape, name_in_store
from mivpg.files import write_whole
from mivpg.modeling_mivpg import MivpgVisualPromptModel
from mivpg.processing_mivpg import MivpgProcessor, pad_bags
from mivpg.slides import Tile, TileOptions, draw_tiles, find_tiles, open_slide

logger = logging.getLogger(__name__)

Tokens = Literal["all", "cls"]
_Picture = Path | Tile

NUM_WRITERS = 4
"""Threads that bring bags to the disk while the model sees other images."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MADE_OF = "made_of"
"""In the metadata of a bag's file: its id and its images, as JSON."""
FOUND_AS = "found_as"
"""In `features.json`, what is good to know and decides nothing: where the model came from, and library versions."""


@torch.no_grad()
def extract_features(
    model: MivpgVisualPromptModel,
    processor: MivpgProcessor,
    samples: Sequence[Sample],
    folder: Path,
    *,
    tokens: Tokens = "all",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    tiling: TileOptions | None = None,
) -> list[Sample]:
    """Runs the frozen vision model once on every image of every bag, with a progress bar on a terminal.

    Slides are cut into tiles, which become the images of their bag; a picture of where the tiles lie is saved in
    `folder/tiles`.

    A bag becomes one file of the folder: `image_embeds` (N, P, D) and, where they are known, `coords` (N, 2). Those of
    tiles are their upper left corners in pixels of the slide's finest level, not rounded; the slides of a case lie side
    by side, all in pixels of the first one. Those of images are the `image_coords` of the sample. A bag whose file is
    there is not done again, so an interrupted run goes on when it is started again. Under `torchrun` each process does
    its share of the bags.

    Args:
        model: Sees in eval mode and is left in the mode it was found in.
        processor: The model's.
        samples: Bags of images; one that stands here several times, with other captions, is done once.
        folder: The store; made where it does not exist.
        tokens: `all` that the vision model gives of an image, or its first, `cls`, alone: P = 1.
        dtype: Of the stored features. float32 keeps what the model computed, 16 bits halve the store.
        batch_size: Images that the vision model sees at once; bags of several sizes fill a batch. Another one can
            change the last bits of a feature.
        tiling: How slides are cut.

    Returns:
        The samples with `features` in place of `images` or `slides`.

    Raises:
        BagError: A bag cannot be read, or `dtype` cannot hold its features; bags that were written are kept.
        MivpgError: There is no vision model, or the store was made otherwise: by another vision model, with other
            settings of the image processor, of other tokens, in another dtype, with another release of Pillow, or of
            images or coordinates that have changed since.
    """
    check_batch_size(batch_size)
    if dtype not in DTYPES:
        raise MivpgError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}.")
    if tokens not in get_args(Tokens):
        raise MivpgError(f"tokens is {tokens!r}, expected all or cls.")
    if model.vision_model is None or processor.image_processor is None:
        raise MivpgError("Features are made of images, but this model has no vision model or no image processor.")
    if tokens == "cls" and model.config.num_prefix_tokens == 0:
        raise MivpgError("tokens is 'cls', but this vision model has no such token; its images are patches alone.")
    bags = _distinct(samples)
    maker = _maker(model.vision_model, processor.image_processor) | {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
    }
    tiling = tiling or TileOptions()
    if any(bag.slides for bag in bags):
        maker["tiles"] = asdict(tiling)
    process = PartialState(cpu=model.device.type == "cpu")
    with process.main_process_first():
        _claim(folder, maker, of_model=model)
    missing: dict[str, Sequence[_Picture]] = {}  # the pictures of each bag that has no file yet
    num_there = 0
    mine = _share_of(bags, process.process_index, process.num_processes)
    for bag in tqdm(mine, desc="looking at what is stored", unit="bag", delay=1, leave=False, disable=None):
        if (file := folder / name_in_store(bag.id)).exists():
            _check_is_made_of(file, bag)
            num_there += features_shape(file)[0]
        else:
            missing[bag.id] = _pictures_of(bag, tiling)
    num_missing = sum(map(len, missing.values()))

    opened = _open_batches(processor, bags, missing, batch_size)
    announced = False
    # disable=None: no bar where the output is not a terminal
    with (
        in_eval_mode(model),
        closing(opened),
        ThreadPoolExecutor(NUM_WRITERS) as writers,
        tqdm(total=num_there + num_missing, initial=num_there, unit="image", disable=None) as progress,
    ):
        writing: list[Future[None]] = []  # the bags of one batch, while the model sees the next
        seen: list[tuple[list[Any], Tensor]] = []  # origin and features (P, D) of a bag that is not whole yet
        start = time.monotonic()
        for batch in opened:
            opening = time.monotonic() - start
            start = time.monotonic()
            pixel_values, _ = pad_bags([image.pixel_values for image in batch])  # (n, 1, 3, h, w)
            image_embeds = model.get_image_embeds(pixel_values.to(model.vision_model.device))[:, 0]  # (n, P, D)
            if tokens == "cls":
                image_embeds = image_embeds[:, :1]
            rows = image_embeds.to("cpu", dtype)
            if not announced:
                announced = True
                # From now on the next batch is opened while the model sees one.
                seconds = max(opening, time.monotonic() - start) * num_missing / len(batch)
                num_bags = (len(missing), len(mine) - len(missing))
                _announce(folder, num_missing, *num_bags, num_missing * rows[0].nbytes, seconds)
            for written in writing:
                written.result()
            writing = []
            for image, row in zip(batch, rows, strict=True):
                if image.bag.id not in missing:
                    continue
                seen.append((image.origin, row))
                if len(seen) == len(missing[image.bag.id]):
                    writing.append(writers.submit(_write_bag, folder, image.bag, missing[image.bag.id], seen))
                    seen = []
                progress.update()
        for written in writing:
            written.result()
    process.wait_for_everyone()
    return [replace(sample, images=(), slides=(), features=folder / name_in_store(sample.id)) for sample in samples]


def store_name(
    model: str, processor: MivpgProcessor, tokens: Tokens, dtype: str, tiling: TileOptions | None = None
) -> str:
    """A name for a store that says what is in it, "blip2-opt-2.7b_224px_cls_float16", and how slides are cut."""
    size = (
        getattr(processor.image_processor, "crop_size", None) or getattr(processor.image_processor, "size", None) or {}
    )
    pixels = "x".join(str(side) for side in dict.fromkeys(dict(size).values()))
    cut = "" if tiling is None else f"_tiles-{tiling.size}px-{tiling.mpp}mpp"
    return f"{model}_{pixels}px_{tokens}_{dtype}{cut}"


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """Each bag once.

    Raises:
        BagError: A record is not as it has to be, or two bags have one id.
    """
    bags: dict[str, Sample] = {}
    for sample in samples:
        with naming(sample):
            check_record(sample)
            if sample.features is not None:
                raise BagError(f"features already ({sample.features}), expected images to make them of.")
            first = bags.setdefault(sample.id, sample)
            if (sample.images, sample.slides, sample.image_coords) != (first.images, first.slides, first.image_coords):
                raise BagError("two bags of this id, with other images or coordinates; give each an id of its own.")
    return list(bags.values())


def _share_of(bags: list[Sample], index: int, number: int) -> list[Sample]:
    """The bags that one of several processes does: neighbours, of about as many images (or slides) as the others'."""
    total = sum(len(bag.images) + len(bag.slides) for bag in bags)
    share, before = [], 0
    for bag in bags:
        if before * number // total == index:
            share.append(bag)
        before += len(bag.images) + len(bag.slides)
    return share


def _announce(folder: Path, num_images: int, num_missing: int, num_there: int, num_bytes: int, seconds: float) -> None:
    """Says what is to be done, after the first batch, which tells how large and how slow it is."""
    size = f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
    span = f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(round(seconds / 60), 1)} minutes"
    logger.info(
        "%s: %d images of %d bags to see, %d bags there already; %s, about %s.",
        folder,
        num_images,
        num_missing,
        num_there,
        size,
        span,
    )


# ── From images to features ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class _OpenedImage:
    """One image, ready for the vision model."""

    bag: Sample
    pixel_values: Tensor
    """(1, 3, h, w)."""
    origin: list[Any]
    """What `_origin` says of its file; of a tile, where it lies."""


def _pictures_of(bag: Sample, tiling: TileOptions) -> Sequence[_Picture]:
    """The images of a bag, or the tiles of its slides."""
    if not bag.slides:
        return bag.images
    with naming(bag):
        return [tile for slide in bag.slides for tile in find_tiles(slide, tiling)]


def _batches(
    bags: Sequence[Sample], missing: Mapping[str, Sequence[_Picture]], batch_size: int
) -> Iterator[list[tuple[Sample, _Picture]]]:
    """The pictures of all bags in order, whatever is missing; a case of slides has batches of its own.

    So tiles need to be found only of what is missing.
    """
    batch: list[tuple[Sample, _Picture]] = []
    for bag in bags:
        if bag.slides and batch:
            yield batch
            batch = []
        for picture in missing.get(bag.id, bag.images):
            batch.append((bag, picture))
            if len(batch) == batch_size:
                yield batch
                batch = []
        if bag.slides and batch:
            yield batch
            batch = []
    if batch:
        yield batch


def _open_batches(
    processor: MivpgProcessor, bags: Sequence[Sample], missing: Mapping[str, Sequence[_Picture]], batch_size: int
) -> Generator[list[_OpenedImage], None, None]:
    """Those batches that hold a picture of a missing bag; the next is opened while the model sees one."""
    needed = (batch for batch in _batches(bags, missing, batch_size) if any(bag.id in missing for bag, _ in batch))
    readers = ThreadPoolExecutor(NUM_READERS)

    def open_batch() -> list[Future[_OpenedImage]]:
        return [readers.submit(_open, processor, bag, picture) for bag, picture in next(needed, [])]

    try:
        batch = open_batch()
        while batch:
            following = open_batch()
            yield [image.result() for image in batch]
            batch = following
    finally:
        readers.shutdown(cancel_futures=True)


def _open(processor: MivpgProcessor, bag: Sample, picture: _Picture) -> _OpenedImage:
    with naming(bag):
        if isinstance(picture, Tile):
            pixel_values, origin = processor.pixels([picture.open()]), [picture.x, picture.y]
        else:
            pixel_values, origin = processor.pixels([picture]), _origin(picture)
        return _OpenedImage(bag=bag, pixel_values=pixel_values, origin=origin)


def _write_bag(folder: Path, bag: Sample, pictures: Sequence[_Picture], seen: list[tuple[list[Any], Tensor]]) -> None:
    """Writes the file of a bag from the origin and the features (P, D) of each of its images."""
    tensors = {"image_embeds": torch.stack([row for _, row in seen])}  # (N, P, D)
    if not torch.isfinite(tensors["image_embeds"]).all():
        dtype = tensors["image_embeds"].dtype
        raise BagError(f"bag {bag.id!r}: features hold NaN or infinity as {dtype}; bfloat16 and float32 hold the most.")
    made_of = {"id": bag.id, "images": [origin for origin, _ in seen]}
    if bag.slides:
        tiles = [picture for picture in pictures if isinstance(picture, Tile)]
        tensors["coords"] = _coords_of_tiles(bag.slides, tiles)
        made_of |= {"images": [], "slides": [_origin(slide) for slide in bag.slides]}
        for number, slide in enumerate(bag.slides):
            name = Path("tiles", f"{Path(name_in_store(bag.id)).stem}-{number}.jpg")
            outlined = io.BytesIO()
            draw_tiles(slide, [tile for tile in tiles if tile.slide == slide]).save(outlined, "JPEG", quality=85)
            write_whole(folder / name, outlined.getvalue())
    elif (coords := _coords(bag)) is not None:
        tensors["coords"] = coords
    # One entry, since safetensors writes several in no order.
    write_whole(folder / name_in_store(bag.id), save(tensors, {MADE_OF: json.dumps(made_of)}))


def _coords_of_tiles(slides: Sequence[Path], tiles: Sequence[Tile]) -> Tensor:
    """(N, 2), the upper left corners of the tiles, on one lattice for all slides of a case, which lie side by side.

    In pixels of the first slide's finest level. Another slide of the case may have larger ones, and even a single
    slide's tiles begin at whole pixels, while their span is no whole number: so rows and columns are what is counted.
    """
    span_of = {tile.slide: tile.span for tile in tiles}
    first_columns = [0]
    for slide in slides:  # with an empty column between two slides
        columns = math.ceil(open_slide(slide).dimensions[0] / span_of[slide]) + 1
        first_columns.append(first_columns[-1] + columns)
    first_column_of = dict(zip(slides, first_columns, strict=False))
    span = tiles[0].span
    corners = [
        ((first_column_of[tile.slide] + round(tile.x / tile.span)) * span, round(tile.y / tile.span) * span)
        for tile in tiles
    ]
    return torch.tensor(corners, dtype=torch.float32)


def _coords(bag: Sample) -> Tensor | None:
    """(N, 2), or None where they are not known."""
    return None if bag.image_coords is None else torch.tensor(bag.image_coords, dtype=torch.float32)


# ── What made a store, and of what ──────────────────────────────────────────────────────────────────────────────────


def _maker(vision_model: nn.Module, image_processor: Any) -> dict[str, Any]:
    """What decides, beside an image, what its features are."""
    settings = json.loads(image_processor.to_json_string())
    settings["image_processor_type"] = type(image_processor).__name__  # with the backend, which the settings leave out
    settings.pop("processor_class", None)  # says who holds it
    return {
        "vision_model": weights_digest(vision_model),
        "pillow": PIL.__version__,
        # A setting that is not set may be one that another release of transformers does not know.
        **{f"image_processor.{name}": value for name, value in settings.items() if value is not None},
    }


def weights_digest(module: nn.Module) -> str:
    """sha256 of a module's weights with their names, dtypes and shapes."""
    sha256 = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        sha256.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        sha256.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def _claim(folder: Path, maker: dict[str, Any], of_model: MivpgVisualPromptModel) -> None:
    """Makes the store, or checks that it was made by the same; under which name the model was found may differ.

    Raises:
        MivpgError: It was made by something else, or nothing says by what.
    """
    file = folder / "features.json"
    remedy = "choose another folder, or delete this one to make its features anew."
    if not file.exists():
        if any(folder.glob("*.safetensors")):
            raise MivpgError(
                f"{folder} holds safetensors files, but no features.json that says what made them; {remedy}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        found_as = {
            "model": of_model.name_or_path,
            "revision": getattr(of_model.config, "_commit_hash", None),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        record = maker | {FOUND_AS: found_as}
        write_whole(file, json.dumps(record, indent=2).encode())  # before the first bag: none is without it
        return
    found = read_record(file.read_bytes())
    found.pop(FOUND_AS, None)
    for name in found | maker:
        if found.get(name) != maker.get(name):
            raise MivpgError(
                f"{file}: these features were made with {name} = {found.get(name)!r}, and {maker.get(name)!r} is "
                f"asked for; {remedy}"
            )


def _origin(path: Path) -> list[Any]:
    """What tells whether an image is still the same: path, size, time of the last change and sha256."""
    return [os.fspath(path), *stat(path), _digest(path)]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_is_made_of(file: Path, bag: Sample) -> None:
    """Checks that a bag's file is whole and of this bag's images; one is read only where it was moved or touched.

    Raises:
        BagError: An image is gone.
        MivpgError: The file is damaged, or of other images or coordinates.
    """
    remedy = f"delete the file to extract bag {bag.id!r} anew."
    try:
        with safe_open(file, framework="pt") as stored:
            made_of = json.loads((stored.metadata() or {}).get(MADE_OF, "{}"))
            coords = stored.get_tensor("coords").tolist() if "coords" in stored.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MivpgError(f"{file} is damaged ({' '.join(str(error).split())}); {remedy}") from None
    origins, paths = [*made_of.get("images", []), *made_of.get("slides", [])], [*bag.images, *bag.slides]
    if len(origins) != len(paths):
        raise MivpgError(f"{file} was made of {len(origins)} images, and the bag has {len(paths)}; {remedy}")
    for path, origin in zip(paths, origins, strict=True):
        if not path.is_file():
            raise BagError(f"bag {bag.id!r}: {path} does not exist, expected a picture.")
        if [os.fspath(path), *stat(path)] != origin[:-1] and _digest(path) != origin[-1]:
            raise MivpgError(f"{file} was made of another image than {path} is now; {remedy}")
    if bag.slides:
        return
    wanted = _coords(bag)
    if coords != (None if wanted is None else wanted.tolist()):
        raise MivpgError(f"{file} was made with other coordinates of the images; {remedy}")
