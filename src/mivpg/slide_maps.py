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
from PIL import Image

from mivpg.errors import MivpgError
from mivpg.slides import Tile, draw_tiles, open_slide
from mivpg.visualization import STYLE, as_png

NUM_TOP = 8
"""Tiles that are shown by themselves, those looked at most."""

TOP_SIDE = 224
"""Of such a tile's picture, in pixels."""

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

    Beneath both is the slide, or nothing where there is no slide file.

    Args:
        tiles: N of them.
        weights: (N,), which sum to one.
        title: Stands above.

    Raises:
        BagError: The slide cannot be read.

    Returns:
        A PNG.
    """
    even = np.asarray(weights) * len(weights)
    places = [_square(tiles, index) for index in range(len(even))]
    if tiles.slide is None:
        left, top = tiles.corners.min(axis=0)
        right, bottom = tiles.corners.max(axis=0) + tiles.span
        picture = None
    else:
        left, top = 0, 0
        right, bottom = open_slide(tiles.slide).dimensions
        picture = draw_tiles(tiles.slide, [])
    height = float(np.clip(5 * (bottom - top) / (right - left), 2, 9))
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure((11.5, height + 0.9), layout="constrained")
        plain, heat = figure.subplots(1, 2, sharex=True, sharey=True)
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
        colored.set_array(even)
        colored.set_alpha(1 if picture is None else 0.6)
        heat.add_collection(colored)
        figure.colorbar(colored, ax=heat, fraction=0.04, pad=0.02, label="weight of a tile (1 = all tiles alike)")
        _outline_top(plain, tiles, top_tiles(weights))
        plain.set_title("the tiles looked at most, in this order")
        heat.set_title("what the visual prompts looked at")
        figure.suptitle(title, fontweight="bold")
        return as_png(figure, dpi=100)


def _square(tiles: SlideTiles, index: int) -> Rectangle:
    return Rectangle(tuple(tiles.corners[index]), tiles.span, tiles.span)


def _outline_top(axes: Axes, tiles: SlideTiles, top: Sequence[int]) -> None:
    """Black, with numbers on white: stains are pink, purple and blue."""
    for rank, index in enumerate(top, start=1):
        square = _square(tiles, index)
        square.set(fill=False, edgecolor="black", linewidth=1.5)
        axes.add_patch(square)
        x, y = tiles.corners[index] + tiles.span / 2
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(x, y, str(rank), ha="center", va="center", fontweight="bold", fontsize=8, bbox=box)


def top_tiles(weights: Sequence[float]) -> list[int]:
    """Which tiles are looked at most, the first most of all."""
    return np.argsort(-np.asarray(weights), kind="stable")[:NUM_TOP].tolist()


def draw_top_tiles(tiles: SlideTiles, weights: Sequence[float]) -> bytes:
    """Draws the tiles looked at most, read from the slide, in order.

    Args:
        tiles: Of a slide that is there to read.
        weights: (N,), which sum to one.

    Raises:
        BagError: The slide is damaged there.

    Returns:
        A PNG.
    """
    assert tiles.slide is not None
    top = top_tiles(weights)
    columns = min(len(top), 4)
    rows = -(-len(top) // columns)
    with matplotlib.style.context(["default", STYLE, {"axes.titlesize": 11}]):
        figure = Figure((2.4 * columns, 2.7 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for rank, (axes, index) in enumerate(zip(panels.flat, top, strict=False), start=1):
            axes.imshow(open_tile(tiles, index))
            axes.set_title(f"{rank}: {weights[index]:.2%}, {weights[index] * len(weights):.2g} × even")
        return as_png(figure, dpi=100)


def open_tile(tiles: SlideTiles, index: int) -> Image.Image:
    """Reads a tile from the slide, RGB, `TOP_SIDE` pixels a side."""
    assert tiles.slide is not None
    x, y = (round(float(place)) for place in tiles.corners[index])
    return Tile(slide=tiles.slide, x=x, y=y, span=tiles.span, size=TOP_SIDE).open()


def as_geojson(tiles: SlideTiles, weights: Sequence[float]) -> dict[str, Any]:
    """The tiles and their weights as GeoJSON, which QuPath opens (drag the file onto the slide).

    Each tile is a detection with a colour of its own and the measurements `weight` (the share of the attention),
    `weight, 1 = even` and `rank`; QuPath's measurement maps colour by any of these. QuPath counts from the corner of
    what the scanner has filled where the file says so (OpenSlide's bounds, as in MIRAX), and so do these polygons.

    Args:
        tiles: N of them.
        weights: (N,), which sum to one.
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
    for index, (weight, corner, color) in enumerate(zip(weights, tiles.corners - origin, colors, strict=True)):
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
                    "color": [round(255 * float(part)) for part in color[:3]],
                    "measurements": {
                        "weight": weight,
                        "weight, 1 = even": weight * len(weights),
                        "rank": ranks[index],
                    },
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}
