"""Where tiles are drawn and written: against the canvas, the slide's own pixels, and the rules of QuPath's reader."""

import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from mivpg import MivpgError, slide_maps
from mivpg.slide_maps import SlideTiles, as_geojson, draw_heat_map, draw_top_tiles, find_tile, tile_span, top_tiles
from mivpg.slides import TileOptions, find_tiles
from test_real_data import DATA

SLIDE = DATA / "slides" / "CMU-1-Small-Region.svs"
needs_slide = pytest.mark.skipif(not SLIDE.is_file(), reason=f"the slide is not at {SLIDE}")

CORNERS = np.array([[x, y] for y in (1000, 1512, 2024) for x in (100, 612, 1124)], dtype=float)
TILES = SlideTiles(corners=CORNERS, span=512.0, slide=None)


def weights_with(heaviest: int) -> list[float]:
    weights = np.full(9, 0.05)
    weights[heaviest] = 0.6
    return weights.tolist()


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def middle(pixels: np.ndarray, color: tuple[int, int, int]) -> tuple[float, float]:
    rows, columns = np.nonzero(np.abs(pixels - color).max(axis=2) < 12)
    assert len(rows) > 100
    return rows.mean(), columns.mean()


def test_the_heaviest_tile_is_drawn_where_it_lies():
    yellow, dark = (253, 231, 37), (72, 24, 106)  # 1 and 1/12 of the way through viridis
    places = {}
    for heaviest in (0, 2, 6):
        pixels = pixels_of(draw_heat_map(TILES, weights_with(heaviest), title="slide"))
        heat = pixels[:, pixels.shape[1] // 2 : int(0.9 * pixels.shape[1])]  # without the colour bar
        places[heaviest] = np.subtract(middle(heat, yellow), middle(heat, dark))
    (top, left), (_, right), (bottom, _) = places[0], places[2], places[6]
    assert top < -50 and left < -50
    assert right > 50 and bottom > 50


def test_on_each_slide_of_a_case_its_own_tiles_are_drawn():
    """Of a bag of 18 tiles the second nine: colours, ranks and numbers are those of the whole bag."""
    case = replace(TILES, indices=tuple(range(9, 18)))
    alone, first, second = np.full(9, 0.05), np.full(18, 0.025), np.full(18, 0.025)
    alone[6], first[6], second[15] = 0.6, 0.575, 0.575
    yellow = (253, 231, 37)

    def heat(tiles: SlideTiles, weights: np.ndarray) -> np.ndarray:
        pixels = pixels_of(draw_heat_map(tiles, weights.tolist(), title="slide"))
        return pixels[:, pixels.shape[1] // 2 : int(0.9 * pixels.shape[1])]

    assert middle(heat(case, second), yellow) == pytest.approx(
        middle(heat(TILES, alone), yellow), abs=8
    )  # a tile is 95 wide
    assert (np.abs(heat(case, first) - yellow).max(axis=2) < 12).sum() < 100  # the heaviest lies on the other slide
    objects = read_as_qupath(as_geojson(case, second.tolist()))
    assert [entry["name"] for entry in objects] == [f"tile {number}" for number in range(10, 19)]
    assert [entry["bounds"][:2] for entry in objects] == [tuple(corner) for corner in CORNERS.tolist()]
    assert objects[6]["measurements"] == {"weight": 0.575, "weight, 1 = even": pytest.approx(10.35), "rank": 1}
    assert min(entry["measurements"]["rank"] for entry in read_as_qupath(as_geojson(case, first.tolist()))) > 1
    assert draw_top_tiles([case], second.tolist()) is None  # there is no slide to read


def test_the_size_of_tiles_is_the_smallest_gap():
    assert tile_span(CORNERS) == 512
    assert tile_span(CORNERS[[0, 2]]) == 1024  # of two with one between them, it cannot be known
    assert tile_span(np.array([[0, 0], [0, 256.5]])) == 256.5
    apart = np.array([[1037, 0], [1549, 0], [1240, 3000], [1752, 3000]])  # two pieces, a lattice each, as CLAM has it
    assert tile_span(apart) == 512
    with pytest.raises(MivpgError, match="2 tiles at one place"):
        tile_span(np.zeros((2, 2)))


def read_as_qupath(document: dict) -> list[dict]:
    """By the rules of QuPath 0.6 (`QuPathTypeAdapters`, `ROITypeAdapters`): what it would refuse or ignore fails."""
    assert document["type"] == "FeatureCollection"
    found = []
    for feature in document["features"]:
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1] and len(ring) >= 4  # else JTS raises
        assert all(len(place) == 2 for place in ring)
        # Counterclockwise, as RFC 7946 asks of an outer ring; by the shoelace formula, of axes to the right and up.
        assert sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in pairwise(ring)) > 0
        properties = feature["properties"]
        assert properties["objectType"] in ("annotation", "detection", "tile", "cell")
        assert len(properties["color"]) == 3 and all(isinstance(part, int) for part in properties["color"])
        assert all(isinstance(value, int | float) for value in properties["measurements"].values())
        xs, ys = zip(*ring, strict=True)
        found.append({"bounds": (min(xs), min(ys), max(xs), max(ys))} | properties)
    return found


def test_geojson_holds_each_tile_where_it_lies_with_its_weight():
    weights = weights_with(4)
    objects = read_as_qupath(as_geojson(TILES, weights))
    assert [entry["bounds"] for entry in objects] == [(x, y, x + 512, y + 512) for x, y in CORNERS.tolist()]
    measured = [entry["measurements"] for entry in objects]
    assert [of["weight"] for of in measured] == weights
    assert measured[4]["rank"] == 1 and measured[4]["weight, 1 = even"] == pytest.approx(5.4)
    assert sorted(of["rank"] for of in measured) == list(range(1, 10))
    assert objects[4]["color"] == [253, 231, 37] and objects[0]["color"] != objects[4]["color"]


def test_geojson_begins_where_qupath_begins(monkeypatch, tmp_path):
    """QuPath leaves out what the scanner has not filled."""

    class Slide:
        properties = {"openslide.bounds-x": "100", "openslide.bounds-y": "1000"}  # noqa: RUF012

    monkeypatch.setattr(slide_maps, "open_slide", lambda path: Slide())
    tiles = SlideTiles(corners=CORNERS, span=512.0, slide=tmp_path / "a.mrxs")
    assert read_as_qupath(as_geojson(tiles, weights_with(0)))[0]["bounds"] == (0, 0, 512, 512)


def test_the_tiles_looked_at_most_come_first():
    assert top_tiles([0.1, 0.5, 0.4]) == [1, 2, 0]
    assert top_tiles(np.arange(20.0)) == list(range(19, 11, -1))


def test_scattered_small_tiles_are_drawn_so_large_that_they_are_seen():
    scattered = SlideTiles(corners=CORNERS * 200, span=512.0, slide=None)
    pixels = pixels_of(draw_heat_map(scattered, weights_with(4), title="slide"))
    heat = pixels[:, pixels.shape[1] // 2 : int(0.9 * pixels.shape[1])]
    yellow = np.abs(heat - (253, 231, 37)).max(axis=2) < 12
    assert 20 < yellow.sum() < 100  # 1.5 % of a panel of 400 pixels or so, squared; as large as it is, it were 1 or 4


@needs_slide
def test_tiles_close_together_are_drawn_from_near():
    block = SlideTiles(corners=CORNERS / 512 * 20 + (1200, 1000), span=20.0, slide=SLIDE)
    near = slide_maps._close_up(block)
    assert near is not None
    assert near.span == pytest.approx(5 * 20)  # three tiles and one of the slide on either side
    assert near.x == pytest.approx(block.corners[:, 0].min() - 20, abs=1)
    assert near.y == pytest.approx(block.corners[:, 1].min() - 20, abs=1)
    assert slide_maps._close_up(SlideTiles(corners=CORNERS, span=512.0, slide=SLIDE)) is None  # most of the slide
    wide = SlideTiles(corners=np.array([[800.0, 900.0], [1200.0, 900.0]]), span=20.0, slide=SLIDE)
    assert slide_maps._close_up(wide) is None  # more than `CLOSE_UP` tiles across
    drawn = pixels_of(draw_heat_map(block, weights_with(0), title="slide"))
    black = (drawn[:, drawn.shape[1] // 2 : int(0.9 * drawn.shape[1])] < 30).all(axis=2)
    assert (black.sum(axis=0) > 200).sum() >= 4  # outlines of tiles, a hundred pixels high each


@needs_slide
def test_on_a_real_slide_tiles_are_what_is_drawn_there():
    openslide = pytest.importorskip("openslide")
    found = find_tiles(SLIDE, TileOptions())
    corners = np.array([(tile.x, tile.y) for tile in found], dtype=float)
    tiles = SlideTiles(corners=corners, span=found[0].span, slide=SLIDE)
    weights = np.full(len(found), 1 / len(found))
    weights[7] *= 3
    weights = (weights / weights.sum()).tolist()
    slide = openslide.OpenSlide(SLIDE)
    own = slide.read_region((found[7].x, found[7].y), 0, (round(found[7].span),) * 2).convert("RGB")
    assert (
        np.abs(np.asarray(find_tile([tiles], 7).open()).mean(axis=(0, 1)) - np.asarray(own).mean(axis=(0, 1))).max() < 1
    )
    width, height = slide.dimensions
    for entry in read_as_qupath(as_geojson(tiles, weights)):
        left, top, right, bottom = entry["bounds"]
        assert 0 <= left < right <= width + 1 and 0 <= top < bottom <= height + 1
    heat, top_pictures = pixels_of(draw_heat_map(tiles, weights, title="")), pixels_of(draw_top_tiles([tiles], weights))
    assert (heat.std(axis=(0, 1)) > 10).all()  # the slide is beneath
    first = top_pictures[40:220, 20:220].reshape(-1, 3)  # the heaviest tile comes first, as it is on the slide
    assert np.abs(np.median(first, axis=0) - np.median(np.asarray(own).reshape(-1, 3), axis=0)).max() < 12
