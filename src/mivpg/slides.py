"""Slide files as bags of tiles. A whole slide is never in memory: tissue is found on a small picture of it.

    tiles = find_tiles(Path("slide.svs"), TileOptions())
    picture = tiles[0].open()

It takes OpenSlide: `pip install 'mivpg[slides]'`.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from mivpg.errors import BagError, MivpgError
from mivpg.files import check_is_file
from mivpg.images import MAX_PIXELS

if TYPE_CHECKING:
    from openslide import OpenSlide

MASK_MPP = 8.0
"""Microns per pixel of the picture on which tissue is found; a cell is about one pixel."""
LEAST_SATURATION, MOST_SATURATION = 0.05, 0.2
"""Between them Otsu's threshold is believed: blank glass alone, or tissue alone, has no two kinds of pixels."""
BLOCK = 2048
"""Pixels a side that are read at once."""
MAX_SIDE, MAX_SLIDE_PIXELS, MAX_TILES = 2**20, 10**11, 10**6
"""Larger slides are refused before a pixel is read, since a file of a few bytes can say that it is one. A slide of
200,000 x 100,000 pixels has 300,000 tiles of 256."""
MOST_ENLARGEMENT = 1.1
"""How far a tile may be finer than the slide itself; objectives of one name differ by some percent."""


@dataclass(frozen=True, kw_only=True)
class TileOptions:
    """How a slide is cut."""

    mpp: float = 0.5
    """Microns per pixel of a tile: 0.5 is about 20x."""
    size: int = 256
    """Pixels a side of a tile, before the vision model's own resizing."""
    min_tissue: float = 0.25
    """Share of a tile that is tissue at least."""
    slide_mpp: float | None = None
    """Microns per pixel of the slide itself, for files that do not say; by default what the file says."""

    def __post_init__(self) -> None:
        for name in ("mpp", "size", "slide_mpp"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise MivpgError(f"{name} is {value}, expected a finite number greater than 0.")
        if not 0 <= self.min_tissue <= 1:
            raise MivpgError(f"min_tissue is {self.min_tissue}, expected 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A square of a slide, not read yet."""

    slide: Path
    x: int
    """Of its left edge, in pixels of the slide's finest level, as `coords` of CLAM and TRIDENT."""
    y: int
    """Of its upper edge."""
    span: float
    """Pixels a side on the slide's finest level."""
    size: int
    """Pixels a side of the picture."""

    def open(self) -> Image.Image:
        """Reads the tile, RGB, `size` pixels a side, from the coarsest level that is still fine enough.

        Raises:
            BagError: The file is damaged there.
        """
        slide = open_slide(self.slide)
        level = slide.get_best_level_for_downsample(self.span / self.size)
        side = max(round(self.span / slide.level_downsamples[level]), 1)
        square = _read(self.slide, (self.x, self.y), level, (side, side))
        return square if side == self.size else square.resize((self.size, self.size), Image.Resampling.BICUBIC)


def find_tiles(path: Path, options: TileOptions) -> list[Tile]:
    """The tiles of a slide that hold tissue, row by row.

    Args:
        path: A file of any kind that OpenSlide reads.
        options: How it is cut.

    Raises:
        BagError: The file cannot be read, does not say how large its pixels are, is coarser than `options.mpp`, or
            shows no tissue.
    """
    slide = open_slide(path)
    slide_mpp = _mpp_of(path, slide, options)
    if slide_mpp > options.mpp * MOST_ENLARGEMENT:
        raise BagError(
            f"{path} has {slide_mpp:.3f} microns a pixel, and tiles of {options.mpp} are asked for; choose an mpp of "
            f"at least {slide_mpp:.3f}."
        )
    span = options.size * options.mpp / slide_mpp
    width, height = slide.dimensions
    if (width / span) * (height / span) > MAX_TILES:
        raise BagError(
            f"{path} is {width} x {height} pixels, more than {MAX_TILES} tiles of {span:.1f}; choose larger ones."
        )
    mask = tissue_mask(path, slide_mpp)
    scale = MASK_MPP / slide_mpp  # pixels of the slide to one of the mask
    tiles = []
    for row in range(int(height // span)):
        for column in range(int(width // span)):
            x, y = round(column * span), round(row * span)
            part = mask[int(y / scale) : max(round((y + span) / scale), int(y / scale) + 1)]
            part = part[:, int(x / scale) : max(round((x + span) / scale), int(x / scale) + 1)]
            if part.size and part.mean() >= max(options.min_tissue, 1e-9):
                tiles.append(Tile(slide=path, x=x, y=y, span=span, size=options.size))
    if not tiles:
        raise BagError(
            f"{path}: no tile of {options.size} pixels at {options.mpp} microns a pixel holds {options.min_tissue:.0%} "
            "tissue; lower min_tissue, or leave the slide out."
        )
    return tiles


def tissue_mask(path: Path, slide_mpp: float) -> np.ndarray:
    """Where a slide is coloured, (h, w) of bool, a pixel `MASK_MPP` microns: saturation above Otsu's threshold."""
    small = np.asarray(_overview(path, MASK_MPP / slide_mpp), np.float32)
    most, least = small.max(axis=-1), small.min(axis=-1)
    saturation = (most - least) / np.maximum(most, 1)
    threshold = np.clip(_otsu(saturation), LEAST_SATURATION, MOST_SATURATION)
    return (saturation > threshold) & (most > 30)  # black is no stain, but the edge of a scan


def draw_tiles(path: Path, tiles: Sequence[Tile], *, longest_side: int = 1200) -> Image.Image:
    """A small picture of the slide with the tiles outlined, to look at before trusting them."""
    width, height = open_slide(path).dimensions
    scale = max(width, height) / longest_side
    picture = _overview(path, max(scale, 1.0))
    ratio = picture.width / width
    draw = ImageDraw.Draw(picture, "RGBA")
    for tile in tiles:
        left, top, side = tile.x * ratio, tile.y * ratio, tile.span * ratio
        draw.rectangle((left, top, left + side, top + side), fill=(0, 120, 60, 40), outline=(0, 90, 40, 255))
    return picture


NAMES_A_FILE = re.compile(
    rb"^\s*(?:ImageFile|MapFile|MacroImage|OptimisationFile|FILE_\d|INDEXFILE)[^=]*=(.*)$", re.MULTILINE
)
"""Lines of Hamamatsu's VMS and VMU and of MIRAX's Slidedat.ini, by which a slide of several files names the others."""


def _check_stays_in_its_folder(path: Path) -> None:
    """Raises a `BagError` where a slide that is a list of files names one that lies elsewhere."""
    for index in (path, path.with_suffix("") / "Slidedat.ini"):
        if not index.is_file() or (index == path and index.stat().st_size > 1 << 20):
            continue  # the others are pictures, and large
        for name in NAMES_A_FILE.findall(index.read_bytes()):
            if b"/" in name or b"\\" in name:
                shown = name.decode(errors="replace").strip()
                raise BagError(f"{index} names the file {shown}, expected one in its own folder.")


@functools.lru_cache(maxsize=8)
def open_slide(path: Path) -> "OpenSlide":
    """An open slide, which threads may share; a few stay open.

    Raises:
        MivpgError: OpenSlide is not installed.
        BagError: The file is missing or of no kind that OpenSlide knows.
    """
    try:
        import openslide
    except ImportError:
        raise MivpgError("Slide files take OpenSlide: pip install 'mivpg[slides]'.") from None
    check_is_file(path, "a slide", BagError)
    _check_stays_in_its_folder(path)
    try:
        slide = openslide.OpenSlide(path)
        width, height = slide.dimensions
    except openslide.OpenSlideError as error:
        raise BagError(f"{path} is no slide that OpenSlide can read, or was cut short: {_one_line(error)}.") from None
    if max(width, height) > MAX_SIDE or width * height > MAX_SLIDE_PIXELS:
        raise BagError(
            f"{path} is {width} x {height} pixels, expected at most {MAX_SIDE} a side and {MAX_SLIDE_PIXELS} in all."
        )
    return slide


def _mpp_of(path: Path, slide: "OpenSlide", options: TileOptions) -> float:
    if options.slide_mpp is not None:
        return options.slide_mpp
    try:
        mpp = float(slide.properties["openslide.mpp-x"])
    except (KeyError, ValueError):
        raise BagError(f"{path} does not say how many microns a pixel has; give slide_mpp.") from None
    if not 1e-3 < mpp < 1e3:
        raise BagError(f"{path} says that a pixel has {mpp} microns, which cannot be; give slide_mpp.")
    return mpp


def _overview(path: Path, downsample: float) -> Image.Image:
    """The slide so many times smaller, read in blocks of the level that comes nearest."""
    slide = open_slide(path)
    level = slide.get_best_level_for_downsample(downsample)
    step = slide.level_downsamples[level]
    width, height = slide.level_dimensions[level]
    shrink = downsample / step
    if (width / shrink) * (height / shrink) > MAX_PIXELS:
        raise BagError(f"{path}: a small picture of it has more than the {MAX_PIXELS} pixels allowed; check slide_mpp.")
    picture = Image.new("RGB", (max(round(width / shrink), 1), max(round(height / shrink), 1)), "white")
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            size = (min(BLOCK, width - left), min(BLOCK, height - top))
            block = _read(path, (round(left * step), round(top * step)), level, size)
            first = (round(left / shrink), round(top / shrink))
            last = (round((left + size[0]) / shrink), round((top + size[1]) / shrink))
            small = (last[0] - first[0], last[1] - first[1])
            if min(small) > 0:
                picture.paste(block.resize(small, Image.Resampling.BOX), first)
    return picture


def _read(path: Path, where: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
    """RGB, on white where the slide has nothing."""
    import openslide

    try:
        region = open_slide(path).read_region(where, level, size)
    except openslide.OpenSlideError as error:
        open_slide.cache_clear()  # OpenSlide answers nothing more after an error
        raise BagError(f"{path} is damaged at {where}: {_one_line(error)}.") from None
    picture = Image.new("RGB", region.size, "white")
    picture.paste(region, mask=region.getchannel("A"))
    return picture


def _otsu(values: np.ndarray) -> float:
    """The threshold between 0 and 1 that parts values into the two kinds farthest apart (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=256, range=(0, 1))
    middles = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts), counts.sum() - np.cumsum(counts)
    sums = np.cumsum(counts * middles)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(middles[np.nan_to_num(apart).argmax()])


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
