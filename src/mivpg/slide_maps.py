"""What was looked at on a slide: a heat map where the tiles lie, the tiles looked at most, and GeoJSON for QuPath.

    tiles = SlideTiles(corners=coords, span=512.0, slide=Path("slide.svs"))
    png = draw_heat_map(tiles, weights)
    features = as_geojson(tiles, weights)

Tiles are known by their upper left corners in pixels of the slide's finest level, as in `coords` of CLAM, TRIDENT and
`mivpg extract`.
"""

# N tiles

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mivpg.errors import MivpgError
from mivpg.slides import Tile, draw_tiles, open_slide
from mivpg.visualization import STYLE, as_png

NUM_TOP = 8
"""Tiles that are shown by themselves, those looked at most."""

TOP_SIDE = 224
"""Of such a tile's picture, in pixels."""

CLOSE_UP = 16
"""Tiles across, at most, of those that lie so close together on a large slide that they are drawn from near."""

LEAST_SIDE = 0.015
"""Of the drawing's longest side, what a tile that has room is drawn as at least."""

COLORS = "viridis"
"""Perceptually even, and told apart by those who do not see red and green apart."""


@dataclass(frozen=True, kw_only=True)
class SlideTiles:
    """Where the images of a bag lie on a slide."""

    corners: np.ndarray
    """(N, 2), x and y of the upper left corners."""
    span: float
    """Of a tile, in the same unit."""
    slide: Path | None
    """The slide file, where there is one to draw on."""
    indices: tuple[int, ...] | None = None
    """Which images of the bag they are; None = all, in their order. Of a case of several slides each has its own."""

    def of_bag(self) -> list[int]:
        """Which images of the bag they are, (n,)."""
        return list(range(len(self.corners)) if self.indices is None else self.indices)


def tile_span(corners: np.ndarray) -> float:
    """The side of tiles that lie side by side: the smallest gap between two of one row, or of one column.

    Not between any two columns, unless no two tiles are in line: each piece of tissue may have a lattice of its own, as
    CLAM cuts them.

    Args:
        corners: (N, 2).

    Raises:
        MivpgError: All lie at one place.
    """
    in_line = [
        np.diff(np.unique(corners[corners[:, across] == line, along]))
        for along, across in ((0, 1), (1, 0))
        for line in np.unique(corners[:, across])
    ]
    gaps = np.concatenate(in_line)
    if not len(gaps):
        gaps = np.concatenate([np.diff(np.unique(axis)) for axis in corners.T])
    if not len(gaps):
        raise MivpgError(
            f"coords: {len(corners)} tiles at one place, so how large one is cannot be told; leave coordinates out."
        )
    return float(gaps.min())


def draw_heat_map(tiles: SlideTiles, weights: Sequence[float], *, title: str) -> bytes:
    """Draws the tiles where they lie, coloured by their weights; beside it, what is looked at most is outlined.

    Beneath both is the slide, or nothing where there is no slide file. A few tiles close together on a large slide are
    drawn from near, outlines and all, beside the slide that says where; scattered small ones are drawn larger.

    Args:
        tiles: All images of a bag, or those of one slide of a case; colours and ranks are those of the whole bag.
        weights: (N,), of the whole bag; they sum to one.
        title: Stands above.

    Raises:
        BagError: The slide cannot be read.

    Returns:
        A PNG.
    """
    even = np.asarray(weights) * len(weights)
    here = even[tiles.of_bag()]
    (left, top), (right, bottom) = tiles.corners.min(axis=0), tiles.corners.max(axis=0) + tiles.span
    box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="black", linewidth=1.5)
    picture = near = None
    if tiles.slide is not None:
        near = _close_up(tiles)
        left, top = 0, 0
        right, bottom = open_slide(tiles.slide).dimensions
        picture = draw_tiles(tiles.slide, [])
    least = LEAST_SIDE * max(right - left, bottom - top)
    larger = near is None and len(here) > 1 and tiles.span < least < tile_span(tiles.corners)
    places = [_square(tiles, index, least if larger else tiles.span) for index in range(len(here))]
    height = float(np.clip(5 * (bottom - top) / (right - left), 2, 9))
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure((11.5, height + 0.9), layout="constrained")
        plain, heat = figure.subplots(1, 2, sharex=near is None, sharey=near is None)
        for axes in (plain, heat):
            if picture is not None:
                axes.imshow(picture, extent=(left, right, bottom, top))
            axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xlabel="x, pixels of the finest level")
            axes.ticklabel_format(style="plain")
            axes.locator_params(nbins=5)
        plain.set_ylabel("y, pixels of the finest level")
        if picture is None:
            plain.add_collection(PatchCollection(places, facecolor="#e4e7eb", edgecolor="white", linewidth=0.3))
        colored = PatchCollection(places, cmap=COLORS, norm=Normalize(0, even.max()), edgecolor="none", linewidth=0)
        colored.set_array(here)
        colored.set_alpha(1 if picture is None else 0.6)
        heat.add_collection(colored)
        figure.colorbar(colored, ax=heat, fraction=0.04, pad=0.02, label="weight of a tile (1 = all tiles alike)")
        what = "what the visual prompts looked at"
        if near is None:
            _outline_top(plain, tiles, weights)
            plain.set_title("the tiles looked at most, in this order")
            heat.set_title(f"{what}; tiles are smaller than drawn" if larger else what)
        else:
            x, y, side = near.x, near.y, near.span
            heat.imshow(near.open(), extent=(x, x + side, y + side, y))
            heat.set(xlim=(x, x + side), ylim=(y + side, y))
            _outline_top(heat, tiles, weights)
            plain.add_patch(box)
            plain.set_title("where the tiles lie")
            heat.set_title(f"{what}, the most in this order")
        figure.suptitle(title, fontweight="bold")
        return as_png(figure, dpi=100)


def _close_up(tiles: SlideTiles) -> Tile | None:
    """The square around the tiles, if they are few across and lie in a small part of the slide."""
    assert tiles.slide is not None
    first, last = tiles.corners.min(axis=0) - tiles.span, tiles.corners.max(axis=0) + 2 * tiles.span
    side = float((last - first).max())
    if side > CLOSE_UP * tiles.span or 3 * side > min(open_slide(tiles.slide).dimensions):
        return None
    x, y = (round(float(place)) for place in (first + last - side) / 2)
    return Tile(slide=tiles.slide, x=x, y=y, span=side, size=800)


def _square(tiles: SlideTiles, index: int, side: float) -> Rectangle:
    """A tile, or a larger square around its middle."""
    x, y = tiles.corners[index] + (tiles.span - side) / 2
    return Rectangle((x, y), side, side)


def _outline_top(axes: Axes, tiles: SlideTiles, weights: Sequence[float]) -> None:
    """Black, with numbers on white: stains are pink, purple and blue."""
    number_here = {of_bag: index for index, of_bag in enumerate(tiles.of_bag())}
    for rank, of_bag in enumerate(top_tiles(weights), start=1):
        if of_bag not in number_here:
            continue
        index = number_here[of_bag]
        square = _square(tiles, index, tiles.span)
        square.set(fill=False, edgecolor="black", linewidth=1.5)
        axes.add_patch(square)
        x, y = tiles.corners[index] + tiles.span / 2
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(x, y, str(rank), ha="center", va="center", fontweight="bold", fontsize=8, bbox=box)


def top_tiles(weights: Sequence[float]) -> list[int]:
    """Which tiles are looked at most, the first most of all."""
    return np.argsort(-np.asarray(weights), kind="stable")[:NUM_TOP].tolist()


def draw_top_tiles(slides: Sequence[SlideTiles], weights: Sequence[float]) -> bytes | None:
    """Draws the tiles looked at most, read from their slides, in order.

    Args:
        slides: The tiles of a slide, or of each slide of a case.
        weights: (N,), of the whole bag; they sum to one.

    Raises:
        BagError: A slide is damaged there.

    Returns:
        A PNG; None where none of them is on a slide that is there to read.
    """
    top = [(rank, index) for rank, index in enumerate(top_tiles(weights), start=1) if find_tile(slides, index)]
    if not top:
        return None
    columns = min(len(top), 4)
    rows = -(-len(top) // columns)
    with matplotlib.style.context(["default", STYLE, {"axes.titlesize": 11}]):
        figure = Figure((2.4 * columns, 2.7 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for axes, (rank, index) in zip(panels.flat, top, strict=False):
            tile = find_tile(slides, index)
            assert tile is not None
            axes.imshow(tile.open())
            axes.set_title(f"{rank}: {weights[index]:.2%}, {weights[index] * len(weights):.2g} × even")
        return as_png(figure, dpi=100)


def find_tile(slides: Sequence[SlideTiles], index: int) -> Tile | None:
    """An image of the bag as a tile to read, `TOP_SIDE` pixels a side; None where its slide is not there to read."""
    for tiles in slides:
        if tiles.slide is not None and index in (of_bag := tiles.of_bag()):
            x, y = (round(float(place)) for place in tiles.corners[of_bag.index(index)])
            return Tile(slide=tiles.slide, x=x, y=y, span=tiles.span, size=TOP_SIDE)
    return None


def as_geojson(tiles: SlideTiles, weights: Sequence[float]) -> dict[str, Any]:
    """The tiles and their weights as GeoJSON, which QuPath opens (drag the file onto the slide).

    Each tile is a detection with a colour of its own and the measurements `weight` (the share of the attention),
    `weight, 1 = even` and `rank`; QuPath's measurement maps colour by any of these. QuPath counts from the corner of
    what the scanner has filled where the file says so (OpenSlide's bounds, as in MIRAX), and so do these polygons.

    Args:
        tiles: All images of a bag, or those of one slide of a case.
        weights: (N,), of the whole bag; they sum to one.
    """
    origin = np.zeros(2)
    if tiles.slide is not None:
        properties = open_slide(tiles.slide).properties
        origin = np.array([float(properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy"])
    colors = matplotlib.colormaps[COLORS](np.asarray(weights) / max(weights))
    ranks = {
        index: rank for rank, index in enumerate(np.argsort(-np.asarray(weights), kind="stable").tolist(), start=1)
    }
    features = []
    for index, corner in zip(tiles.of_bag(), tiles.corners - origin, strict=True):
        left, top = (round(float(place), 2) for place in corner)
        right, bottom = (round(float(place) + tiles.span, 2) for place in corner)
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {
                    "objectType": "detection",
                    "name": f"tile {index + 1}",
                    "color": [round(255 * float(part)) for part in colors[index, :3]],
                    "measurements": {
                        "weight": weights[index],
                        "weight, 1 = even": weights[index] * len(weights),
                        "rank": ranks[index],
                    },
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}
