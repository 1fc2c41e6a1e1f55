"""Slides: which tiles hold tissue, what is read of them, and how they become bags of features."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from families import save_blip2
from mivpg import (
    BagDataset,
    BagError,
    MivpgError,
    MivpgForConditionalGeneration,
    MivpgProcessor,
    Sample,
    extract_features,
    slides,
)
from mivpg.bags import check_bags
from mivpg.datasets.bag_file import load_bag_file
from mivpg.feature_files import read_features
from mivpg.layers import lattice_cells
from mivpg.miniature import BASE_MODEL
from mivpg.slides import TileOptions, draw_tiles, find_tiles, tissue_mask
from test_cli import done

REAL = Path(__file__).parents[2] / "shared" / "data" / "slides" / "CMU-1-Small-Region.svs"
real_slide = pytest.mark.skipif(not REAL.is_file(), reason="the real slide of ../shared/data is not there")

PINK = (214, 120, 170)


def write_slide(path: Path, pixels: np.ndarray, *, mpp: float | None = 0.5, side: int = 64) -> Path:
    """A tiled TIFF of one level, which OpenSlide reads as a slide; pixels (h, w, 3) uint8."""
    height, width, _ = pixels.shape
    rows, columns = -(-height // side), -(-width // side)
    padded = np.full((rows * side, columns * side, 3), 255, np.uint8)
    padded[:height, :width] = pixels
    tiles = [
        padded[r * side : (r + 1) * side, c * side : (c + 1) * side].tobytes()
        for r in range(rows)
        for c in range(columns)
    ]
    long, short, ratio = 4, 3, 5  # TIFF's numbers for the types of values
    tags: list[tuple[int, int, list[int]]] = [
        (256, long, [width]),
        (257, long, [height]),
        (258, short, [8, 8, 8]),
        (259, short, [1]),  # not compressed
        (262, short, [2]),  # RGB
        (277, short, [3]),
        (284, short, [1]),
        (322, long, [side]),
        (323, long, [side]),
        (324, long, [0] * len(tiles)),
        (325, long, [side * side * 3] * len(tiles)),
    ]
    if mpp is not None:
        per_cm = round(10_000 / mpp * 1000)
        tags += [(282, ratio, [per_cm, 1000]), (283, ratio, [per_cm, 1000]), (296, short, [3])]
    tags.sort()
    sizes, formats = {short: 2, long: 4, ratio: 8}, {short: "H", long: "I", ratio: "I"}
    end = 8 + 2 + 12 * len(tags) + 4
    places = {}
    for tag, kind, values in tags:
        size = struct.calcsize(f"<{len(values)}{formats[kind]}")
        if size > 4:
            places[tag], end = end, end + size + size % 2
    first_tile = end
    offsets = [first_tile + i * side * side * 3 for i in range(len(tiles))]
    directory, extra = b"", b""
    for tag, kind, values in tags:
        if tag == 324:
            values = offsets
        content = struct.pack(f"<{len(values)}{formats[kind]}", *values)
        count = len(content) // sizes[kind]
        field = struct.pack("<I", places[tag]) if tag in places else content.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, count) + field
        if tag in places:
            extra += content + b"\0" * (len(content) % 2)
    header = b"II" + struct.pack("<HI", 42, 8) + struct.pack("<H", len(tags))
    path.write_bytes(header + directory + struct.pack("<I", 0) + extra + b"".join(tiles))
    return path


def pixels_with(*rectangles: tuple[int, int, int, int], size: tuple[int, int] = (320, 256)) -> np.ndarray:
    """White, (h, w, 3), with stained rectangles (left, top, right, bottom) that are no two pixels alike."""
    width, height = size
    pixels = np.full((height, width, 3), 245, np.uint8)
    grain = np.random.default_rng(0).integers(-14, 15, (height, width, 3))
    for left, top, right, bottom in rectangles:
        pixels[top:bottom, left:right] = (np.array(PINK) + grain[top:bottom, left:right]).astype(np.uint8)
    return pixels


SMALL = TileOptions(mpp=0.5, size=64, min_tissue=0.5)


class TestTiles:
    def test_those_with_tissue_row_by_row(self, tmp_path):
        slide = write_slide(tmp_path / "a.tif", pixels_with((64, 64, 192, 128), (256, 192, 320, 256)))
        tiles = find_tiles(slide, SMALL)
        assert [(tile.x, tile.y) for tile in tiles] == [(64, 64), (128, 64), (256, 192)]

    def test_half_a_tile_of_tissue_is_enough_for_those_who_ask_for_less(self, tmp_path):
        slide = write_slide(tmp_path / "a.tif", pixels_with((0, 0, 96, 64)))
        for min_tissue, number in ((0.9, 1), (0.6, 1), (0.4, 2), (0.0, 2)):
            options = TileOptions(mpp=0.5, size=64, min_tissue=min_tissue)
            assert len(find_tiles(slide, options)) == number, min_tissue

    def test_a_tile_is_what_the_slide_shows_there(self, tmp_path):
        pixels = pixels_with((64, 64, 192, 128))
        tile = find_tiles(write_slide(tmp_path / "a.tif", pixels), SMALL)[1]
        assert np.array_equal(np.asarray(tile.open()), pixels[64:128, 128:192])

    def test_microns_a_pixel_decide_how_much_a_tile_shows(self, tmp_path):
        pixels = pixels_with((0, 0, 256, 128))
        slide = write_slide(tmp_path / "a.tif", pixels, mpp=0.25)
        (first, second) = find_tiles(slide, SMALL)  # half as fine as the slide
        assert (first.span, second.x, second.y) == (128, 128, 0)
        expected = Image.fromarray(pixels[:128, 128:256]).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(second.open()), np.asarray(expected))

    def test_a_resolution_that_the_file_does_not_say(self, tmp_path):
        slide = write_slide(tmp_path / "a.tif", pixels_with((0, 0, 128, 128)), mpp=None)
        with pytest.raises(BagError, match=r"a\.tif does not say how many microns a pixel has; give slide_mpp"):
            find_tiles(slide, SMALL)
        assert len(find_tiles(slide, TileOptions(mpp=0.5, size=64, slide_mpp=0.5))) == 4

    def test_a_slide_coarser_than_asked_for(self, tmp_path):
        slide = write_slide(tmp_path / "a.tif", pixels_with((0, 0, 128, 128)), mpp=1.0)
        with pytest.raises(BagError, match=r"has 1\.000 microns a pixel, and tiles of 0\.5 are asked for; .* 1\.000"):
            find_tiles(slide, SMALL)

    @pytest.mark.parametrize("color", [245, 128, 12])
    def test_no_tissue(self, tmp_path, color):
        slide = write_slide(tmp_path / "a.tif", np.full((256, 256, 3), color, np.uint8))
        with pytest.raises(BagError, match=r"no tile of 64 pixels at 0\.5 microns a pixel holds 50% tissue; lower"):
            find_tiles(slide, SMALL)

    def test_tissue_alone(self, tmp_path):
        slide = write_slide(tmp_path / "a.tif", pixels_with((0, 0, 320, 256)))
        assert len(find_tiles(slide, SMALL)) == 20

    def test_files_that_are_no_slides(self, tmp_path):
        with pytest.raises(BagError, match=r"none\.svs does not exist"):
            find_tiles(tmp_path / "none.svs", SMALL)
        (tmp_path / "letter.svs").write_text("Dear pathologist")
        with pytest.raises(BagError, match=r"letter\.svs is no slide that OpenSlide can read, or was cut short"):
            find_tiles(tmp_path / "letter.svs", SMALL)

    def test_a_slide_that_was_cut_short(self, tmp_path):
        whole = write_slide(tmp_path / "whole.tif", pixels_with((0, 0, 320, 256))).read_bytes()
        (tmp_path / "cut.tif").write_bytes(whole[:-30_000])
        with pytest.raises(BagError, match=r"cut\.tif (is damaged at|is no slide)"):
            find_tiles(tmp_path / "cut.tif", SMALL)

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("mpp", 0, "a finite number greater than 0"),
            ("mpp", math.nan, "a finite number greater than 0"),
            ("mpp", math.inf, "a finite number greater than 0"),
            ("size", 0, "a finite number greater than 0"),
            ("slide_mpp", -1, "a finite number greater than 0"),
            ("min_tissue", 1.5, "0 to 1"),
        ],
    )
    def test_options_that_no_slide_has(self, name, value, expected):
        with pytest.raises(MivpgError, match=rf"^{name} is {value}, expected {expected}\.$"):
            TileOptions(**{name: value})

    def test_never_more_than_a_block_is_read(self, tmp_path, monkeypatch):
        read, sizes = slides._read, []
        monkeypatch.setattr(slides, "BLOCK", 100)
        monkeypatch.setattr(
            slides, "_read", lambda path, where, level, size: (sizes.append(size), read(path, where, level, size))[1]
        )
        slide = write_slide(tmp_path / "a.tif", pixels_with((64, 64, 192, 128)))
        mask = tissue_mask(slide, 0.5)
        assert len(sizes) == 12 and max(max(size) for size in sizes) <= 100
        monkeypatch.setattr(slides, "BLOCK", 2048)
        assert (mask != tissue_mask(slide, 0.5)).mean() < 0.1

    def test_otsus_threshold_is_where_the_kinds_lie_farthest_apart(self):
        generator = np.random.default_rng(0)
        values = np.concatenate([generator.normal(0.1, 0.03, 700), generator.normal(0.6, 0.1, 300)]).clip(0, 1)
        threshold = slides._otsu(values)

        def apart(at: float) -> float:
            low, high = values[values <= at], values[values > at]
            return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

        assert apart(threshold) >= 0.999 * max(apart(at) for at in np.linspace(0, 1, 400))

    def test_the_picture_of_the_tiles(self, tmp_path):
        slide = write_slide(tmp_path / "a.tif", pixels_with((64, 64, 192, 128)))
        picture = np.asarray(draw_tiles(slide, find_tiles(slide, SMALL)), int)
        assert picture.shape == (256, 320, 3)
        plain = np.asarray(draw_tiles(slide, []), int)
        changed = np.abs(picture - plain).max(axis=-1) > 3
        assert changed[66:126, 66:190].mean() > 0.9 and not changed[:60].any() and not changed[140:].any()


class TestBags:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        return save_blip2(tmp_path_factory.mktemp("base") / "blip2")

    @pytest.fixture
    def model(self, folder):
        return MivpgForConditionalGeneration.from_pretrained(folder)

    @pytest.fixture
    def processor(self, folder):
        return MivpgProcessor.from_pretrained(folder)

    @pytest.fixture
    def cases(self, tmp_path) -> list[Sample]:
        first = write_slide(tmp_path / "a.tif", pixels_with((64, 64, 192, 128)))
        second = write_slide(tmp_path / "b.tif", pixels_with((0, 0, 128, 64), (256, 192, 320, 256)))
        return [
            Sample(id="one", slides=(first,), captions=("a tumour.",)),
            Sample(id="two", slides=(second, first), captions=("another.",)),
        ]

    def test_features_are_those_of_the_tiles_as_images(self, tmp_path, model, processor, cases):
        one, two = extract_features(model, processor, cases, tmp_path / "store", batch_size=3, tiling=SMALL)
        paths = []
        for number, tile in enumerate(find_tiles(cases[0].slides[0], SMALL)):
            paths.append(tmp_path / f"{number}.png")
            tile.open().save(paths[-1])
        (images,) = extract_features(
            model, processor, [Sample(id="images", images=tuple(paths))], tmp_path / "images", batch_size=3
        )
        assert one.slides == () and one.captions == ("a tumour.",)
        assert torch.equal(read_features(one.features)[0], read_features(images.features)[0])
        assert read_features(one.features)[1].tolist() == [[64, 64], [128, 64]]
        assert len(read_features(two.features)[0]) == 5

    def test_slides_of_a_case_lie_side_by_side_on_one_lattice(self, tmp_path, model, processor, cases):
        (two,) = extract_features(model, processor, cases[1:], tmp_path / "store", tiling=SMALL)
        coords = read_features(two.features)[1]
        assert coords[:3].tolist() == [[0, 0], [64, 0], [256, 192]]
        assert coords[3:].tolist() == [[384 + 64, 64], [384 + 128, 64]]  # five columns, and one of nothing
        with safe_open(two.features, "pt") as stored:
            made_of = json.loads(stored.metadata()["made_of"])
        assert made_of["id"] == two.id and len(made_of["slides"]) == 2

    @pytest.mark.parametrize("mpps", [(0.4933,), (0.5, 0.4933), (0.4933, 0.5), (0.5, 0.25)])
    def test_tiles_whose_span_is_no_whole_number_lie_on_one_lattice(self, tmp_path, model, processor, mpps):
        """Tiles begin at whole pixels, and slides of one case differ by some percent: in pixels they are no lattice."""
        pixels, tiling = pixels_with((0, 0, 320, 32), (16, 64, 320, 256)), TileOptions(mpp=0.5, size=16, min_tissue=0.5)
        paths = [write_slide(tmp_path / f"{mpp}.tif", pixels, mpp=mpp) for mpp in mpps]
        expected, first_column = [], 0
        for path, mpp in zip(paths, mpps, strict=True):
            span = 16 * 0.5 / mpp
            cells = [(round(tile.y / span), round(tile.x / span)) for tile in find_tiles(path, tiling)]
            expected += [(row, first_column + column) for row, column in cells]
            first_column += -(-320 // span) + 1
        (bag,) = extract_features(
            model, processor, [Sample(id="x", slides=tuple(paths))], tmp_path / "store", tiling=tiling
        )
        coords = read_features(bag.features)[1]
        assert max(column for _, column in expected) > 16  # wide enough for what is rounded to add up
        assert lattice_cells(coords).tolist() == [[*cell] for cell in expected]
        in_pixels = torch.tensor(expected, dtype=torch.float64).flip(1) * (16 * 0.5 / mpps[0])
        torch.testing.assert_close(coords.double(), in_pixels, rtol=1e-4, atol=0)  # the file rounds its resolution

    def test_places_that_were_rounded_are_a_lattice_however_wide(self):
        numbers = torch.arange(2000)
        for places in ((numbers * 506.53).round(), numbers * 126.63):  # to pixels, and to what 32 bits hold
            coords = torch.stack([places, places.flip(0)], dim=1)
            assert torch.equal(lattice_cells(coords), torch.stack([numbers.flip(0), numbers], dim=1))

    @pytest.mark.parametrize(
        ("coords", "message"),
        [
            ([(0, 0), (1, 0), (2.5, 1)], "no regular lattice on the x axis: their smallest gap is 1,"),
            ([(0, 0), (0, 1), (0, 6.5)], "no regular lattice on the y axis: their smallest gap is 1,"),
            ([(0, 0), (1, 0), (1, 0)], "Two images of a bag stand at the same image_coords"),
            ([(0, 0), (1, 0), (0, torch.inf)], "image_coords hold NaN or infinity"),
        ],
    )
    def test_places_that_are_no_lattice_are_the_fault_of_a_bag(self, coords, message):
        with pytest.raises(BagError, match=message):
            lattice_cells(torch.tensor(coords))

    def test_what_is_there_is_not_done_again_and_the_bytes_are_the_same(self, tmp_path, model, processor, cases):
        def contents(store):
            return {path.name: path.read_bytes() for path in store.rglob("*") if path.is_file()}

        extract_features(model, processor, cases, tmp_path / "one go", batch_size=2, tiling=SMALL)
        extract_features(model, processor, cases[:1], tmp_path / "store", batch_size=2, tiling=SMALL)
        seen = []
        model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        extract_features(model, processor, cases, tmp_path / "store", batch_size=2, tiling=SMALL)
        assert seen == [2, 2, 1]
        assert contents(tmp_path / "store") == contents(tmp_path / "one go")
        extract_features(model, processor, cases, tmp_path / "store", batch_size=2, tiling=SMALL)
        assert len(seen) == 3
        assert {name for name in contents(tmp_path / "store") if name.endswith(".jpg")} == {
            f"{sample.features.stem}-{k}.jpg"
            for sample, count in zip(
                extract_features(model, processor, cases, tmp_path / "store", tiling=SMALL), (1, 2), strict=True
            )
            for k in range(count)
        }

    def test_another_way_to_cut_is_another_store(self, tmp_path, model, processor, cases):
        extract_features(model, processor, cases[:1], tmp_path / "store", tiling=SMALL)
        with pytest.raises(MivpgError, match=r"made with tiles = \{.*'size': 64.*'size': 32"):
            extract_features(
                model, processor, cases, tmp_path / "store", tiling=TileOptions(mpp=0.5, size=32, min_tissue=0.5)
            )

    def test_another_slide_under_the_same_name(self, tmp_path, model, processor, cases):
        extract_features(model, processor, cases[:1], tmp_path / "store", tiling=SMALL)
        write_slide(cases[0].slides[0], pixels_with((0, 0, 64, 64)))
        with pytest.raises(MivpgError, match=r"was made of another image than .*a\.tif is now"):
            extract_features(model, processor, cases[:1], tmp_path / "store", tiling=SMALL)

    def test_a_case_without_tissue_is_named(self, tmp_path, model, processor):
        blank = write_slide(tmp_path / "blank.tif", pixels_with())
        with pytest.raises(BagError, match=r"bag 'x': .*blank\.tif: no tile .* tissue"):
            extract_features(model, processor, [Sample(id="x", slides=(blank,))], tmp_path / "store", tiling=SMALL)

    def test_a_bag_file_names_slides(self, tmp_path):
        (tmp_path / "bags.jsonl").write_text(json.dumps({"id": "x", "slides": ["a.svs", "b.svs"]}) + "\n")
        (tmp_path / "bags.csv").write_text("id,slides\nx,a.svs; b.svs\n")
        for name in ("bags.jsonl", "bags.csv"):
            assert load_bag_file(tmp_path / name)[0].slides == (tmp_path / "a.svs", tmp_path / "b.svs")

    def test_a_slide_is_not_trained_on_as_it_is(self, cases):
        for attempt in (lambda: check_bags(cases), lambda: BagDataset(cases)[0]):
            with pytest.raises(BagError, match=r"bag 'one': a slide, which .*; cut it with `mivpg extract` first"):
                attempt()

    def test_a_bag_of_two_kinds(self, cases, tmp_path):
        both = Sample(id="x", slides=cases[0].slides, images=(tmp_path / "a.png",))
        with pytest.raises(BagError, match=r"both images and slides, expected one of them"):
            BagDataset([both])[0]


@real_slide
class TestRealSlide:
    def test_tiles_at_half_a_micron(self):
        tiles = find_tiles(REAL, TileOptions())
        assert len(tiles) == 40  # of 88; looked at
        assert tiles[0].span == pytest.approx(256 * 0.5 / 0.499)
        darkness = [255 - np.asarray(tile.open()).mean() for tile in tiles]
        assert min(darkness) > 15

    def test_one_that_was_cut_short(self, tmp_path):
        (tmp_path / "cut.svs").write_bytes(REAL.read_bytes()[:-100_000])
        with pytest.raises(BagError, match=r"cut\.svs is no slide that OpenSlide can read, or was cut short"):
            find_tiles(tmp_path / "cut.svs", TileOptions())

    def test_from_the_slide_to_a_caption(self, tmp_path):
        """As a user does it, with the model in the package, which knows nothing of tissue."""
        (tmp_path / "bags.jsonl").write_text(json.dumps({"id": "CMU-1", "slides": [str(REAL)]}) + "\n")
        files = ("--dataset.bag-file.path", tmp_path / "bags.jsonl", "--dataset.bag-file.root", "/")
        options = (*files, "--tiling.mpp", 1.0)
        (line,) = done("extract", "--model", BASE_MODEL, "--out", tmp_path / "features", *options).splitlines()
        bags = Path(line)
        assert bags.parent.name == "base_model_96px_all_float16_tiles-256px-1.0mpp"
        (picture,) = (bags.parent / "tiles").iterdir()
        assert Image.open(picture).size == (898, 1200)
        image_embeds, coords = read_features(load_bag_file(bags)[0].features)
        assert image_embeds.shape == (len(coords), 65, 128) and len(coords) == 9
        done("caption", "--model", BASE_MODEL, "--bags", bags, "--out", tmp_path / "captions.jsonl", "--num-beams", 1)
        assert json.loads((tmp_path / "captions.jsonl").read_text().splitlines()[0])["caption"]
