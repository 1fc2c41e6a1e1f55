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
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import PIL
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from mivpg.bags import Sample, check_record, naming
from mivpg.captioning import NUM_READERS, check_batch_size, in_eval_mode, read_record
from mivpg.checkpoints import stat
from mivpg.errors import BagError, MivpgError
from mivpg.feature_files import ERRORS, features_shape, name_in_store
from mivpg.files import DAMAGE, write_whole
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
    strict: bool = True,
) -> list[Sample]:
    """Runs the frozen vision model once on every image of every bag, with a progress bar on a terminal.

    Slides are cut into tiles, which become the images of their bag; a picture of where the tiles lie is saved in
    `folder/tiles`.

    A bag becomes one file of the folder: `image_embeds` (N, P, D) and, where they are known, `coords` (N, 2). Those of
    tiles are their upper left corners in pixels of the slide's finest level, not rounded; the slides of a case lie side
    by side, all in pixels of the first one. Those of images are the `image_coords` of the sample. A bag whose file is
    there is not done again, so an interrupted run goes on when it is started again; it counts also when its images or
    slides are gone by now, and a warning says of how many bags they are. Under `torchrun` each process does its share
    of the bags.

    A bag that cannot be read stops the run, or, if not `strict`, is logged, noted in `folder/errors.jsonl` and passed
    over; the next run tries it again. In a batch its pictures are seen as blank ones, so that the other bags' features
    are the same to the last bit whatever it is that cannot be read.

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
        strict: Whether to stop at a bag that cannot be read, or that `dtype` cannot hold; those that were written are
            kept.

    Returns:
        The samples with `features` in place of `images` or `slides`, in their order, without those passed over.

    Raises:
        BagError: A bag cannot be read and `strict` is set, or two have one id, or it holds features already.
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
    passed_over = _PassedOver(strict)
    bags = _distinct(samples, passed_over)
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
    num_there = num_gone = 0
    mine = _share_of(bags, process.process_index, process.num_processes)
    for bag in tqdm(mine, desc="looking at what is stored", unit="bag", delay=1, leave=False, disable=None):
        with passed_over.where_unreadable(bag):
            if (file := folder / name_in_store(bag.id)).exists():
                num_gone += not _check_is_made_of(file, bag)
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
        writing: list[tuple[Sample, Future[None]]] = []  # the bags of one batch, while the model sees the next
        seen: list[tuple[list[Any], Tensor]] = []  # origin and features (P, D) of a bag that is not whole yet
        start = time.monotonic()
        for batch in opened:
            opening = time.monotonic() - start
            start = time.monotonic()
            for image in batch:
                if image.error is not None and image.bag.id in missing:  # else it is stored, or another's to note
                    with passed_over.where_unreadable(image.bag):
                        raise image.error
            image_embeds = _see(model, batch)
            rows = (image_embeds[:, :1] if tokens == "cls" else image_embeds).to("cpu", dtype)
            if not announced and any(image.error is None for image in batch):  # blank ones are not seen
                announced = True
                # From now on the next batch is opened while the model sees one.
                seconds = max(opening, time.monotonic() - start) * num_missing / len(batch)
                num_bags = (len(missing), len(mine) - len(missing))
                _announce(folder, num_missing, *num_bags, num_missing * rows[0].nbytes, seconds)
            passed_over.wait_for(writing)
            writing = []
            for image, row in zip(batch, rows, strict=True):
                if image.bag.id not in missing:
                    continue
                seen.append((image.origin, row))
                if len(seen) == len(missing[image.bag.id]):
                    if image.bag.id not in passed_over.errors:
                        written = writers.submit(_write_bag, folder, image.bag, missing[image.bag.id], seen)
                        writing.append((image.bag, written))
                    seen = []
                progress.update()
        passed_over.wait_for(writing)
    for of_process in gather_object([passed_over.errors]):  # which waits for everyone
        passed_over.errors |= of_process
    num_gone = sum(gather_object([num_gone]))
    if process.is_main_process:
        if num_gone:
            logger.warning(
                "%s: images or slides of %d bags are gone; their stored features are kept.", folder, num_gone
            )
        passed_over.note(folder / ERRORS, bags=samples)
    process.wait_for_everyone()
    return [
        replace(sample, images=(), slides=(), features=folder / name_in_store(sample.id))
        for sample in samples
        if sample.id not in passed_over.errors
    ]


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


class _PassedOver:
    """What is wrong with bags that cannot be read; with `strict` the first of them stops the run."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.errors: dict[str, str] = {}
        """By id."""

    @contextmanager
    def where_unreadable(self, bag: Sample) -> Iterator[None]:
        """Takes note of a `BagError`."""
        try:
            yield
        except BagError as error:
            if self.strict:
                raise
            if bag.id not in self.errors:
                logger.warning("%s", error)
                self.errors[bag.id] = str(error)

    def wait_for(self, writing: list[tuple[Sample, Future[None]]]) -> None:
        """Until these bags are on the disk."""
        for bag, written in writing:
            with self.where_unreadable(bag):
                written.result()

    def note(self, file: Path, bags: Sequence[Sample]) -> None:
        """Writes errors in the order of the bags, and no file where there are none."""
        if not self.errors:
            file.unlink(missing_ok=True)
            return
        failed = dict.fromkeys(bag.id for bag in bags if bag.id in self.errors)
        # surrogatepass: an id may hold half a pair
        lines = [
            json.dumps({"id": bag_id, "error": self.errors[bag_id]}, ensure_ascii=False) + "\n" for bag_id in failed
        ]
        write_whole(file, "".join(lines).encode(errors="surrogatepass"))


def _distinct(samples: Sequence[Sample], passed_over: _PassedOver) -> list[Sample]:
    """Each bag once, without those whose record is not as it has to be.

    Raises:
        BagError: Two bags have one id, or one has features already.
    """
    bags: dict[str, Sample] = {}
    for sample in samples:
        with passed_over.where_unreadable(sample), naming(sample):
            check_record(sample)
            _check_each_once(sample.slides)
        with naming(sample):
            if sample.features is not None:
                raise BagError(f"features already ({sample.features}), expected images to make them of.")
            first = bags.setdefault(sample.id, sample)
            if (sample.images, sample.slides, sample.image_coords) != (first.images, first.slides, first.image_coords):
                raise BagError("two bags of this id, with other images or coordinates; give each an id of its own.")
    return [bag for bag in bags.values() if bag.id not in passed_over.errors]


def _check_each_once(slides: Sequence[Path]) -> None:
    for number, slide in enumerate(slides):
        if slide in slides[:number]:
            raise BagError(f"slide {slide} is named twice, expected each slide of a case once; leave it out once.")


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
    """Says what is to be done, after the first batch that can be read, which tells how large and how slow it is."""
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
    pixel_values: Tensor | None
    """(1, 3, h, w); None where it cannot be read."""
    origin: list[Any]
    """What `_origin` says of its file; of a tile, where it lies."""
    error: BagError | None = None
    """Why it cannot be read."""


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
    try:
        with naming(bag):
            if isinstance(picture, Tile):
                pixel_values, origin = processor.pixels([picture.open()]), [picture.x, picture.y]
            else:
                pixel_values, origin = processor.pixels([picture]), _origin(picture)
    except BagError as error:
        return _OpenedImage(bag=bag, pixel_values=None, origin=[], error=error)
    return _OpenedImage(bag=bag, pixel_values=pixel_values, origin=origin)


def _see(model: MivpgVisualPromptModel, batch: Sequence[_OpenedImage]) -> Tensor:
    """Features (n, P, D) of pictures; those of one that cannot be read are a blank one's, and nobody reads them."""
    pixels = [image.pixel_values for image in batch]
    readable = next((image for image in pixels if image is not None), None)
    if readable is None:
        return torch.zeros(len(batch), 0, 0)
    pixel_values, _ = pad_bags([torch.zeros_like(readable) if image is None else image for image in pixels])
    assert model.vision_model is not None
    return model.get_image_embeds(pixel_values.to(model.vision_model.device))[:, 0]


def _write_bag(folder: Path, bag: Sample, pictures: Sequence[_Picture], seen: list[tuple[list[Any], Tensor]]) -> None:
    """Writes the file of a bag from the origin and the features (P, D) of each of its images."""
    tensors = {"image_embeds": torch.stack([row for _, row in seen])}  # (N, P, D)
    if not torch.isfinite(tensors["image_embeds"]).all():
        dtype = tensors["image_embeds"].dtype
        raise BagError(f"bag {bag.id!r}: features hold NaN or infinity as {dtype}; bfloat16 and float32 hold the most.")
    made_of = {"id": bag.id, "images": [origin for origin, _ in seen]}
    if bag.slides:
        tiles = [picture for picture in pictures if isinstance(picture, Tile)]
        tensors["coords"], placed = place_tiles(bag.slides, tiles)
        made_of |= {"images": [], "slides": [_origin(slide) for slide in bag.slides]}
        made_of["tiles"] = [[slide.num_tiles, slide.first_column, slide.span] for slide in placed]
        for number, slide in enumerate(bag.slides):
            name = Path("tiles", f"{Path(name_in_store(bag.id)).stem}-{number}.jpg")
            outlined = io.BytesIO()
            draw_tiles(slide, [tile for tile in tiles if tile.slide == slide]).save(outlined, "JPEG", quality=85)
            write_whole(folder / name, outlined.getvalue())
    elif (coords := _coords(bag)) is not None:
        tensors["coords"] = coords
    # One entry, since safetensors writes several in no order.
    write_whole(folder / name_in_store(bag.id), save(tensors, {MADE_OF: json.dumps(made_of)}))


@dataclass(frozen=True, kw_only=True)
class PlacedSlide:
    """Where one slide of a case lies on the lattice of all its tiles."""

    slide: Path
    num_tiles: int
    """Of the bag, in which the tiles of a slide stand together, slide by slide."""
    first_column: int
    """Of the lattice."""
    span: float
    """Of a tile, in pixels of this slide's finest level."""


def place_tiles(slides: Sequence[Path], tiles: Sequence[Tile]) -> tuple[Tensor, list[PlacedSlide]]:
    """The tiles of all slides of a case on one lattice, on which the slides lie side by side.

    Args:
        slides: Of the case, each once.
        tiles: N of them, slide by slide.

    Returns:
        The upper left corners of the tiles (N, 2), and where each slide lies. Corners are in pixels of the first
        slide's finest level. Another slide of the case may have larger ones, and even a single slide's tiles begin at
        whole pixels, while their span is no whole number: so rows and columns are what is counted.

    Raises:
        BagError: A slide is named twice.
    """
    _check_each_once(slides)
    placed: dict[Path, PlacedSlide] = {}
    first_column = 0
    for slide in slides:  # with an empty column between two slides
        spans = [tile.span for tile in tiles if tile.slide == slide]
        placed[slide] = PlacedSlide(slide=slide, num_tiles=len(spans), first_column=first_column, span=spans[0])
        first_column += math.ceil(open_slide(slide).dimensions[0] / spans[0]) + 1
    span = tiles[0].span
    corners = [
        ((placed[tile.slide].first_column + round(tile.x / tile.span)) * span, round(tile.y / tile.span) * span)
        for tile in tiles
    ]
    return torch.tensor(corners, dtype=torch.float32), list(placed.values())


def read_slides(file: Path) -> tuple[list[Path], list[PlacedSlide] | None]:
    """The slides that a features file was made of, and where each lies on the lattice of its coordinates.

    Args:
        file: Of features, of any kind.

    Returns:
        None for where they lie in stores that did not note it; no slides of files that `extract_features` did not
        write, or wrote of images.

    Raises:
        MivpgError: What the file says of them is damaged.
    """
    if file.suffix != ".safetensors":
        return [], None
    try:
        with safe_open(file, framework="pt") as stored:
            made_of = json.loads((stored.metadata() or {}).get(MADE_OF, "{}"))
        slides = [Path(origin[0]) for origin in made_of.get("slides", [])]
        if "tiles" not in made_of:
            return slides, None
        return slides, [
            PlacedSlide(slide=slide, num_tiles=int(num_tiles), first_column=int(first_column), span=float(span))
            for slide, (num_tiles, first_column, span) in zip(slides, made_of["tiles"], strict=True)
        ]
    except (*DAMAGE, SafetensorError) as error:
        raise MivpgError(f"{file}: what it says of its slides (`{MADE_OF}`) is damaged: {error}.") from None


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


def _check_is_made_of(file: Path, bag: Sample) -> bool:
    """Checks that a bag's file is whole and of this bag's images; one is read only where it was moved or touched.

    Returns:
        Whether its images are there still. Of one that is gone only the name can be checked: its folder may have moved.

    Raises:
        BagError: An image does not exist, and the file was made of one of another name.
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
    all_there = True
    for path, origin in zip(paths, origins, strict=True):
        if not path.is_file():
            all_there = False
            if path.name == Path(origin[0]).name:
                continue
            raise BagError(f"bag {bag.id!r}: {path} does not exist, expected a picture.")
        if [os.fspath(path), *stat(path)] != origin[:-1] and _digest(path) != origin[-1]:
            raise MivpgError(f"{file} was made of another image than {path} is now; {remedy}")
    if bag.slides:
        return all_there
    wanted = _coords(bag)
    if coords != (None if wanted is None else wanted.tolist()):
        raise MivpgError(f"{file} was made with other coordinates of the images; {remedy}")
    return all_there
