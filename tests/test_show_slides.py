"""Where tiles are drawn and written: against the canvas, the slide's own pixels, and the rules of QuPath's reader."""

import io

import numpy as np
import pytest
from PIL import Image

from mivpg import MivpgError, slide_maps
from mivpg.slide_maps import SlideTiles, as_geojson, draw_heat_map, draw_top_tiles, open_tile, tile_span, top_tiles
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
    assert np.abs(np.asarray(open_tile(tiles, 7)).mean(axis=(0, 1)) - np.asarray(own).mean(axis=(0, 1))).max() < 1
    width, height = slide.dimensions
    for entry in read_as_qupath(as_geojson(tiles, weights)):
        left, top, right, bottom = entry["bounds"]
        assert 0 <= left < right <= width + 1 and 0 <= top < bottom <= height + 1
    heat, top_pictures = pixels_of(draw_heat_map(tiles, weights, title="")), pixels_of(draw_top_tiles(tiles, weights))
    assert (heat.std(axis=(0, 1)) > 10).all()  # the slide is beneath
    first = top_pictures[40:220, 20:220].reshape(-1, 3)  # the heaviest tile comes first, as it is on the slide
    assert np.abs(np.median(first, axis=0) - np.median(np.asarray(own).reshape(-1, 3), axis=0)).max() < 12
