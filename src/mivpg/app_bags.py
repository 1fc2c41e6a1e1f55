"""What the page reads: photos, one slide, or a generated product, each looked at once. Nothing here needs Gradio.

opened, refused = open_files(model, processor, [Path("front.jpg"), Path("side.jpg")], max_files=32)
answer = caption_opened(model, processor, opened, prompt="a photo of", num_beams=5)      # mivpg.app_answers
"""

# N images of a bag, P patch tokens an image, D vision width

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mivpg.bags import Bag
from mivpg.errors import BagError, MivpgError
from mivpg.images import open_image
from mivpg.layers import PyramidPositionEncoding
from mivpg.likelihood import embed_images, without
from mivpg.miniature.catalogue import photograph_product
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.slide_maps import SlideTiles
from mivpg.slides import Tile, TileOptions, find_tiles
from mivpg.visualization import as_seen

MAX_TILES = 64
"""Of a slide with more tiles so many are read at most: a page is to answer within a minute."""

SLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".bif")
"""Names of files that are read as slides. OpenSlide reads TIFF files, too, but most of those are pictures."""

SLIDE_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""What TIFF and BigTIFF files begin with, in which all these slides are kept. OpenSlide goes by content: a text with a
slide's name could have it open other files of the machine."""

NUM_PRODUCTS = 6
"""Generated products that the page has to show."""

THUMBNAIL_SIDE = 240
"""Longest side of a photo on the page, in pixels."""

Progress = Callable[[float, str], None]
"""Told how far a job is, 0 to 1, and what is done now."""


@dataclass(frozen=True, kw_only=True)
class OpenedBag:
    """Photos that were read once: what the model needs of them, and what the page shows."""

    bag: Bag
    """With `image_embeds` (N, P, D), so that a photo less costs no second look by the vision model."""
    names: tuple[str, ...]
    seen: tuple[Image.Image, ...]
    """As the vision model gets them."""
    thumbnails: tuple[Image.Image, ...]
    tiles: SlideTiles | None = None
    """Where they lie, if they were cut from a slide."""
    taken: str = ""
    """Which of a slide's tiles they are, as a sentence."""

    @property
    def noun(self) -> str:
        """What one of them is called."""
        return "photo" if self.tiles is None else "tile"

    def without(self, indices: Sequence[int]) -> "OpenedBag":
        """The same bag less some of its photos.

        Raises:
            MivpgError: There is no such photo, none is left out, or all are.
        """
        number, chosen = len(self.names), sorted(set(indices))
        if unknown := [index for index in chosen if not 0 <= index < number]:
            raise MivpgError(
                f"{self.noun} {unknown[0] + 1} is to be left out, and there are {self.noun}s 1 to {number}; "
                "choose among them."
            )
        if not 0 < len(chosen) < number:
            raise MivpgError(
                f"{len(chosen)} of {number} {self.noun}s are left out, expected at least one, and not all."
            )
        kept = [index for index in range(len(self.names)) if index not in set(indices)]
        return OpenedBag(
            bag=without(self.bag, indices),
            names=tuple(self.names[index] for index in kept),
            seen=tuple(self.seen[index] for index in kept),
            thumbnails=tuple(self.thumbnails[index] for index in kept),
            tiles=None if self.tiles is None else replace(self.tiles, corners=self.tiles.corners[kept]),
            taken=self.taken,
        )


def quietly(share: float, what: str) -> None:
    """A `Progress` that tells nobody."""


def open_files(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    paths: Sequence[Path],
    *,
    max_files: int,
    progress: Progress = quietly,
) -> tuple[OpenedBag | None, list[str]]:
    """Reads photos, or one slide, one after the other: only one of them is in memory as large as it is.

    Args:
        model: Whose vision model looks at them.
        processor: The model's.
        paths: Pictures, or one file with a name of `SLIDE_SUFFIXES`.
        max_files: More are refused.
        progress: Is told which file is read.

    Returns:
        The bag, None if there is none, and a sentence for each file that was refused; the others are in the bag.
    """
    if len(paths) > max_files:
        return None, [f"These are {len(paths)} files, and at most {max_files} are read at once; take some away."]
    slides = [path for path in paths if path.suffix.lower() in SLIDE_SUFFIXES]
    if slides and len(paths) > 1:
        return None, [f"{slides[0].name} is a slide, which is read by itself; take the other files away."]
    refused: list[str] = []
    if slides:
        try:
            return open_slide_file(model, processor, slides[0], progress), refused
        except MivpgError as error:
            return None, [sentence(error, slides[0])]

    def pictures() -> Iterable[tuple[str, Image.Image]]:
        for number, path in enumerate(paths):
            progress(number / len(paths), f"reading {path.name}")
            try:
                yield path.name, open_image(path)
            except BagError as error:
                refused.append(sentence(error, path))

    return open_pictures(model, processor, pictures()), refused


def sentence(error: MivpgError, path: Path) -> str:
    """What is wrong with a file, by the name that its owner knows: where the server keeps it is nobody's business."""
    return str(error).replace(str(path), path.name)


def open_slide_file(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, path: Path, progress: Progress = quietly
) -> OpenedBag:
    """A slide's tiles as a bag, with the places where they lie.

    Of many tiles `MAX_TILES` are taken, evenly spaced; but a model with PPEG was trained on tiles side by side, and
    gets those of one square.

    Raises:
        MivpgError: OpenSlide is not installed, the file cannot be read, or shows no tissue.
    """
    with path.open("rb") as file:
        if not file.read(4).startswith(SLIDE_STARTS):
            raise MivpgError(f"{path} is no slide: it is no TIFF file, as those of {', '.join(SLIDE_SUFFIXES)} are.")
    progress(0, f"looking for tissue in {path.name}")
    found = find_tiles(path, TileOptions())
    tiles, taken = found, f"All {len(found)} tiles with tissue were read."
    if len(found) > MAX_TILES:
        if reads_places(model):
            tiles = densest_square(found)
            how = "the square with the most tissue, since this model reads how tiles lie to each other"
        else:
            tiles = [found[number * len(found) // MAX_TILES] for number in range(MAX_TILES)]
            how = "evenly spaced over the slide"
        taken = f"{len(tiles)} of {len(found):,} tiles with tissue were read: {how}."
    places = np.array([(tile.x, tile.y, tile.span) for tile in tiles])  # (N, 3), with the lattice's step

    def pictures() -> Iterable[tuple[str, Image.Image]]:
        for number, tile in enumerate(tiles):
            progress(number / len(tiles), f"reading tile {number + 1} of {len(tiles)}")
            yield f"tile at {tile.x}, {tile.y}", tile.open()

    opened = open_pictures(model, processor, pictures())
    assert opened is not None  # find_tiles raises where there is no tile
    return replace(
        opened,
        bag=replace(opened.bag, image_coords=torch.tensor(places, dtype=torch.float32)),
        tiles=SlideTiles(corners=places[:, :2], span=tiles[0].span, slide=path),
        taken=taken,
    )


def reads_places(model: MivpgForConditionalGeneration) -> bool:
    """Whether a model's PPEG has images on its grid; where patches are instances, it has those of each image alone."""
    has_ppeg = any(isinstance(part, PyramidPositionEncoding) for part in model.modules())
    return has_ppeg and (model.aggregator is not None or model.config.patch_pooling != "none")


def densest_square(tiles: Sequence[Tile]) -> list[Tile]:
    """Those tiles of a slide's lattice that lie in the square of `MAX_TILES` with the most of them."""
    side = math.isqrt(MAX_TILES)
    cells = np.array([(round(tile.y / tile.span), round(tile.x / tile.span)) for tile in tiles])  # (N, 2)
    lattice = np.zeros(cells.max(axis=0) + side, dtype=int)  # a square may reach beyond the last row and column
    lattice[cells[:, 0], cells[:, 1]] = 1
    squares = np.lib.stride_tricks.sliding_window_view(lattice, (side, side)).sum(axis=(2, 3))
    first = np.array(np.unravel_index(squares.argmax(), squares.shape))
    return [tile for tile, cell in zip(tiles, cells - first, strict=True) if cell.min() >= 0 and cell.max() < side]


def open_pictures(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, pictures: Iterable[tuple[str, Image.Image]]
) -> OpenedBag | None:
    """Names and pictures as a bag; None if there is none."""
    names, seen, thumbnails, image_embeds = [], [], [], []
    for name, picture in pictures:
        bag = Bag(id=name, images=[picture], image_embeds=None, image_coords=None, prompt="", caption=None)
        image_embeds.append(embed_images(model, processor, bag).image_embeds)
        names.append(name)
        seen += as_seen(processor, [picture])
        thumbnail = picture.copy()
        thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        thumbnails.append(thumbnail)
    if not names:
        return None
    whole = Bag(
        id="page", images=None, image_embeds=torch.cat(image_embeds), image_coords=None, prompt="", caption=None
    )
    return OpenedBag(bag=whole, names=tuple(names), seen=tuple(seen), thumbnails=tuple(thumbnails))


def generated_products(number: int = NUM_PRODUCTS) -> dict[str, list[tuple[str, Image.Image]]]:
    """Products of the miniature catalogue, drawn now: what to call each, and its photos with their names."""
    products = {}
    for index in range(number):
        product, photos = photograph_product(random.Random(f"page {index}"))
        products[f"{index + 1}. {product.family}, {len(photos)} photos"] = [
            (photo.view, photo.image) for photo in photos
        ]
    return products
