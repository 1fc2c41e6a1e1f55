"""`mivpg show` as a user meets it: the files, what is in them, a page that runs nothing, and the refusals."""

import io
import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families import save_blip2
from mivpg import (
    GenerationOptions,
    MivpgError,
    MivpgForConditionalGeneration,
    MivpgProcessor,
    attention_maps,
    extract_features,
    show,
)
from mivpg.attention_pictures import draw_heads, draw_patches, draw_words, patch_maps
from mivpg.bags import Bag, BagDataset, Sample
from mivpg.datasets.bag_file import load_bag_file, write_bag_file
from mivpg.feature_files import read_features
from mivpg.likelihood import embed_images
from mivpg.miniature import BASE_MODEL
from mivpg.show import cut_slides, draw_pictures, look_at_bag, page, tiles_on_slides
from mivpg.slides import TileOptions, find_tiles
from test_cli import done, refusal
from test_real_data import ABO, needs_abo
from test_show_slides import SLIDE, needs_slide, read_as_qupath
from test_slides import SMALL, pixels_with, write_slide

FAST = ("--num-beams", 1, "--max-new-tokens", 6)
PHOTO = Image.new("RGB", (40, 40), "white")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A model that pools by AB-MIL, and three photos."""
    folder = tmp_path_factory.mktemp("shop")
    save_blip2(folder / "blip2")
    model = MivpgForConditionalGeneration.from_pretrained(folder / "blip2", patch_pooling="abmil")
    torch.manual_seed(0)
    model.patch_pooling.score.weight.data.normal_()  # else all patches are alike
    model.save_pretrained(folder / "model")
    MivpgProcessor.from_pretrained(folder / "blip2").save_pretrained(folder / "model")
    noise = np.random.default_rng(0)
    for name in ("front", "side", "back"):
        Image.fromarray(noise.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def photos(shop: Path) -> list[Path]:
    return [shop / f"{name}.png" for name in ("front", "side", "back")]


def test_photos(shop, tmp_path):
    out = tmp_path / "out"
    printed = done("show", *photos(shop), "--model", shop / "model", "--out", out, *FAST)
    caption = done("caption", *photos(shop), "--model", shop / "model", *FAST).rstrip("\n")
    assert printed.startswith(f"{caption}\n") and printed.endswith(f"\n{out / 'attention.html'}\n")
    assert {path.name for path in out.iterdir()} == {
        *(f"attention.{ending}" for ending in ("html", "json", "safetensors")),
        *(f"image_{number}.png" for number in (1, 2, 3)),
        "heads.png",
        "words.png",
    }
    arrays = load_file(out / "attention.safetensors")
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    num_words = len(caption.split())
    assert shapes == {
        "image_weights": (3,),
        "combined": (3, 17),
        "patches": (3, 17),
        "heads": (3, 4, 5, 3),
        "word_prompts": (num_words, 5),
        "word_images": (num_words, 3),
    }
    assert arrays["combined"].sum() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(arrays["combined"].sum(dim=1), arrays["image_weights"], atol=1e-6, rtol=0)
    torch.testing.assert_close(arrays["heads"].mean(dim=(0, 1, 2)), arrays["image_weights"], atol=1e-6, rtol=0)
    torch.testing.assert_close(arrays["patches"].sum(dim=1), torch.ones(3), atol=1e-5, rtol=0)

    numbers = json.loads((out / "attention.json").read_text())
    assert numbers["caption"] == caption and numbers["images"] == ["front.png", "side.png", "back.png"]
    assert numbers["image_weights"] == pytest.approx(arrays["image_weights"].tolist(), abs=1e-6)
    assert [entry["word"] for entry in numbers["words"]] == caption.split()
    lines = (out / "attention.json").read_text().splitlines()  # a row of numbers is one line
    assert [json.loads(line.strip(" ,")) for line in lines if line.startswith("    {")] == numbers["words"]
    assert len(lines) == 2 + len(numbers) + num_words + 1
    removal = numbers["removal"]
    assert (removal["num_images"], removal["num_removed"]) == (3, 1)
    for what in ("most", "least", "random"):
        assert f"{removal[what]:+.2f}" in printed
    maps = from_python(shop)
    torch.testing.assert_close(arrays["combined"], maps.combined[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(arrays["heads"], maps.images[:, 0], atol=1e-5, rtol=0)


def from_python(shop: Path):
    model = MivpgForConditionalGeneration.from_pretrained(shop / "model")
    return attention_maps(model, MivpgProcessor.from_pretrained(shop / "model")(images=[[*map(str, photos(shop))]]))


def test_the_page_needs_nothing_and_runs_nothing(shop):
    model = MivpgForConditionalGeneration.from_pretrained(shop / "model")
    processor = MivpgProcessor.from_pretrained(shop / "model")
    pictures = [Image.open(path).convert("RGB") for path in photos(shop)]
    bag = Bag(id="<b>", images=pictures, image_embeds=None, image_coords=None, prompt="<i>", caption=None)
    names = ["<img src=x onerror=alert(1)>", "a.png", "b.png"]
    generation = GenerationOptions(num_beams=1, max_new_tokens=3)
    shown = look_at_bag(model, processor, bag, generation=generation, names=names)
    shown = replace(shown, caption="<script>alert(1)</script> $x$ & a chair")
    shown = replace(shown, words=replace(shown.words, words=("<script>", "&", "“")[: len(shown.words.words)]))
    drawn = draw_pictures(shown)
    html = page(shown, drawn, model="a <model>")
    for raw in ("<script", "<b>", "<i>", "<img src=x", "<model>"):
        assert raw not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x$ &amp; a chair" in html
    assert not re.search(r"https?://|url\(|@import|javascript:", html)
    assert "default-src 'none'" in html
    sources = re.findall(r'src="(.{0,20})', html)
    assert len(sources) == len(drawn) + 3 - 1  # three thumbnails; words are a table
    assert all(source.startswith("data:image/") for source in sources)
    assert html.count("alt=") == len(sources)


@pytest.mark.slow
def test_patches_in_no_square_are_a_note_on_the_page(shop):
    model = MivpgForConditionalGeneration.from_pretrained(shop / "model")
    processor = MivpgProcessor.from_pretrained(shop / "model")
    pictures = [Image.open(path).convert("RGB") for path in photos(shop)]
    bag = Bag(id="x", images=pictures, image_embeds=None, image_coords=None, prompt="", caption=None)
    whole = look_at_bag(model, processor, bag, generation=GenerationOptions(num_beams=1, max_new_tokens=3))
    shown = replace(whole, num_prefix_tokens=0)  # 17 patches
    drawn = draw_pictures(shown)
    note = "Patches are not drawn: 17 tokens an image less 0 before the patches is no square grid"
    assert note in page(shown, drawn, model="a") and note not in page(whole, draw_pictures(whole), model="a")
    alone = pixels_of(draw_patches(whole.photos[0], [], title=""))
    assert pixels_of(drawn["image_1.png"]).shape == alone.shape
    assert set(drawn) == {"image_1.png", "image_2.png", "image_3.png", "heads.png", "words.png"}


def test_another_aggregator_is_refused_before_anything_is_read(shop, monkeypatch):
    model = MivpgForConditionalGeneration.from_pretrained(shop / "model")
    processor = MivpgProcessor.from_pretrained(shop / "model")
    monkeypatch.setattr(model.config, "aggregator", "qformer_per_image")
    monkeypatch.setattr(model, "get_image_embeds", None)
    bag = Bag(id="x", images=[PHOTO], image_embeds=None, image_coords=None, prompt="", caption=None)
    for look in (
        lambda: look_at_bag(model, processor, bag, generation=GenerationOptions()),
        lambda: cut_slides(model, processor, [Path("nowhere.svs")], TileOptions(), prompt=""),
    ):
        with pytest.raises(MivpgError, match="'qformer_per_image': weights of images are MIVPG's"):
            look()


def test_the_page_in_docs_runs(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = (Path(__file__).resolve().parents[1] / "docs" / "attention.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    model = MivpgForConditionalGeneration.from_pretrained(shop / "model")
    processor = MivpgProcessor.from_pretrained(shop / "model")
    pictures = [Image.open(path).convert("RGB") for path in photos(shop)]
    bag = Bag(id="lamp-1", images=pictures, image_embeds=None, image_coords=None, prompt="", caption=None)
    exec(code, {"model": model, "processor": processor, "bag": bag})
    assert (tmp_path / "shown" / "attention.html").is_file()


def test_features_with_coordinates_are_a_map(shop, tmp_path):
    generator = torch.Generator().manual_seed(0)
    coords = torch.tensor([[x, y] for y in range(4) for x in range(5)]) * 256.0 + 1000
    save_file(
        {"image_embeds": torch.randn(20, 1, 24, generator=generator), "coords": coords}, tmp_path / "a.safetensors"
    )
    (tmp_path / "bags.jsonl").write_text('{"id": "slide 1", "features": "a.safetensors"}\n')
    out = tmp_path / "out"
    done("show", "--bags", tmp_path / "bags.jsonl", "--model", shop / "model", "--out", out, *FAST)
    names = {path.name for path in out.iterdir()}
    assert {"heat_map.png", "tiles.geojson"} < names and not any("image" in name or "top" in name for name in names)
    objects = read_as_qupath(json.loads((out / "tiles.geojson").read_text()))
    arrays = load_file(out / "attention.safetensors")
    assert torch.equal(arrays["coords"], coords)
    for entry, (x, y), weight in zip(objects, coords.tolist(), arrays["image_weights"].tolist(), strict=True):
        assert entry["bounds"] == (x, y, x + 256, y + 256)
        assert entry["measurements"]["weight"] == pytest.approx(weight, abs=1e-6)
    assert json.loads((out / "attention.json").read_text())["removal"]["num_removed"] == 5


def test_features_alone_are_a_table(shop, tmp_path):
    save_file({"image_embeds": torch.randn(2, 17, 24)}, tmp_path / "a.safetensors")
    lines = [{"id": name, "features": "a.safetensors"} for name in ("one", "two")]
    bags = tmp_path / "bags.jsonl"
    bags.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    out = tmp_path / "out"
    done("show", "--bags", bags, "--bag", "two", "--model", shop / "model", "--out", out, *FAST)
    assert "nothing to draw on" in (out / "attention.html").read_text()
    refused = [
        refusal(tmp_path, "show", "--bags", bags, *more, "--out", tmp_path / "o") for more in ((), ("--bag", "x"))
    ]
    assert "has 2 bags, so --bag has to name one; ids are 'one', 'two'." in refused[0]
    assert "has no bag 'x'; ids are 'one', 'two'." in refused[1]


def test_a_whole_bag_file_is_checked(shop, tmp_path):
    records = [
        {"id": f"{i}", "images": [str(path) for path in photos(shop)[i:]], "split": "test" if i else "train"}
        for i in range(3)
    ]
    bags = tmp_path / "bags.jsonl"
    bags.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    out = tmp_path / "out"
    given = ("--bags", bags, "--root", "/", "--check", "--model", shop / "model")
    printed = done("show", *given, "--split", "test", "--out", out, *FAST)
    checked = json.loads((out / "check.json").read_text())
    assert [bag["id"] for bag in checked["bags"]] == ["1"]  # of one photo nothing can be taken away
    assert checked["finding"] in printed
    assert f"{checked['most']['mean']:+.2f}" in printed
    assert "'val'" in refusal(tmp_path, "show", *given, "--split", "val", "--out", tmp_path / "other")


def test_refusals(shop, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    picture = photos(shop)[0]
    free = tmp_path / "free"
    for arguments, expected in [
        ((), "show: give the images of one bag, or --bags FILE, or --slide FILE."),
        ((picture, "--bags", tmp_path / "b.csv"), "show: give the images of one bag"),
        ((picture, "--slide", tmp_path / "a.svs"), "show: give the images of one bag"),
        ((picture, "--check"), "show: --check is about a bag file"),
        ((picture, "--bag", "x"), "show: --bag is about a bag file"),
        (("--bags", tmp_path / "b.csv", "--check", "--bag", "x"), "show: --check is about every bag; leave --bag out."),
        ((tmp_path / "no.png",), "no.png does not exist"),
        (("--slide", tmp_path / "no.svs", "--model", shop / "model"), "no.svs does not exist"),
        (
            ("--slide", tmp_path / "a.svs", "--slide", tmp_path / "used" / ".." / "a.svs", "--model", tmp_path / "no"),
            "a.svs is given twice; give each slide once.",
        ),
    ]:
        assert expected in refusal(tmp_path, "show", *arguments, "--out", free), arguments
    assert "used is in use" in refusal(tmp_path, "show", picture, "--out", tmp_path / "used")


# ── Slides ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def case(shop, tmp_path_factory) -> Path:
    """The bag file of a store: one case of two slides, of other resolutions, and a bag without coordinates."""
    pytest.importorskip("openslide")
    folder = tmp_path_factory.mktemp("case")
    write_slide(folder / "a.tif", pixels_with((64, 64, 192, 128)))
    write_slide(folder / "b.tif", pixels_with((0, 0, 192, 64)), mpp=0.4933)
    model = MivpgForConditionalGeneration.from_pretrained(shop / "model")
    processor = MivpgProcessor.from_pretrained(shop / "model")
    samples = [Sample(id="case", slides=(folder / "b.tif", folder / "a.tif"))]
    (extracted,) = extract_features(model, processor, samples, folder / "store", tiling=SMALL)
    save_file({"image_embeds": torch.randn(2, 17, 24)}, folder / "plain.safetensors")
    write_bag_file(folder / "bags.jsonl", [extracted, Sample(id="plain", features=folder / "plain.safetensors")])
    return folder


@pytest.mark.slow
def test_each_slide_of_a_case_is_drawn_by_itself(shop, case, tmp_path):
    given = ("--bags", case / "bags.jsonl", "--bag", "case", "--model", shop / "model", *FAST)
    both, one, none = tmp_path / "both", tmp_path / "one", tmp_path / "none"
    done("show", *given, "--slide", case / "b.tif", "--slide", case / "a.tif", "--out", both)
    of_b, of_a = (find_tiles(case / name, SMALL) for name in ("b.tif", "a.tif"))
    weights = load_file(both / "attention.safetensors")["image_weights"].tolist()
    assert len(of_b) + len(of_a) == len(weights) and len(of_b) > 2
    html = (both / "attention.html").read_text()
    for number, tiles, first in ((1, of_b, 0), (2, of_a, len(of_b))):
        objects = read_as_qupath(json.loads((both / f"tiles_{number}.geojson").read_text()))
        assert [entry["bounds"][:2] for entry in objects] == [(tile.x, tile.y) for tile in tiles]
        measured = [entry["measurements"]["weight"] for entry in objects]
        assert measured == pytest.approx(weights[first : first + len(tiles)], abs=1e-6)
        assert (both / f"heat_map_{number}.png").is_file()
        assert f"{tiles[0].slide.name}: {len(tiles)} tiles of {len(weights)}, " in html
    assert (both / "top_tiles.png").is_file() and "not given" not in html
    names = json.loads((both / "attention.json").read_text())["images"]
    assert names[len(of_b)] == f"tile {len(of_b) + 1} of a.tif at {of_a[0].x}, {of_a[0].y}"

    done("show", *given, "--slide", case / "a.tif", "--out", one)
    assert (one / "tiles.geojson").read_text() == (both / "tiles_2.geojson").read_text()
    assert (
        f"The other {len(of_b)} of {len(weights)} tiles lie on slides that were not given."
        in (one / "attention.html").read_text()
    )
    in_a = sum(index >= len(of_b) for index in np.argsort(-np.asarray(weights))[:8])
    assert 0 < in_a < min(8, len(weights))
    said = f'alt="{in_a} of the {min(8, len(weights))} tiles looked at most, in order; the others lie on slides'
    assert said in (one / "attention.html").read_text()
    assert f'alt="The {min(8, len(weights))} tiles looked at most, in order."' in html
    done("show", *given, "--out", none)  # side by side on a plain canvas
    assert len(json.loads((none / "tiles.geojson").read_text())["features"]) == len(weights)


def test_a_slide_on_which_a_bag_cannot_be_placed(shop, case, tmp_path):
    bags, slide = ("--bags", case / "bags.jsonl"), ("--slide", case / "a.tif")
    write_slide(tmp_path / "c.tif", pixels_with((64, 64, 192, 128)))
    store = load_bag_file(case / "bags.jsonl")[0].features
    with safe_open(store, framework="pt") as stored:
        made_of = json.loads(stored.metadata()["made_of"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    del made_of["tiles"]
    save_file(tensors, tmp_path / "old.safetensors", {"made_of": json.dumps(made_of)})
    save_file(tensors, tmp_path / "foreign.safetensors")
    records = [{"id": name, "features": f"{name}.safetensors"} for name in ("old", "foreign")]
    (tmp_path / "bags.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    others = ("--bags", tmp_path / "bags.jsonl")
    for arguments, expected in [
        (
            (*bags, "--bag", "plain", *slide),
            "plain.safetensors: there are no coords, so it is not known where its images",
        ),
        ((*bags, "--bag", "case", "--slide", tmp_path / "c.tif"), "a.tif, not of "),
        (
            (*others, "--bag", "old", *slide),
            "old.safetensors: coords do not say on which of several slides a tile lies;",
        ),
        (
            (*others, "--bag", "foreign", *slide, "--slide", case / "b.tif"),
            "extract the features anew, or give the one --slide.",
        ),
        ((*bags, "--check", *slide), "show: --check is about every bag; leave --slide out."),
    ]:
        assert expected in refusal(tmp_path, "show", *arguments, "--out", tmp_path / "o"), arguments


def test_the_only_slide_of_a_bag_may_go_by_another_name(shop, case, tmp_path):
    """One alone: of two the other would be drawn with its tiles."""
    model = MivpgForConditionalGeneration.from_pretrained(shop / "model")
    processor = MivpgProcessor.from_pretrained(shop / "model")
    samples = [Sample(id="one", slides=(case / "a.tif",))]
    (sample,) = extract_features(model, processor, samples, tmp_path / "store", tiling=SMALL)
    bag = BagDataset([sample])[0]
    (tmp_path / "a.tif").symlink_to(case / "b.tif")  # another slide of that name
    (tiles,) = tiles_on_slides(sample, bag, [case / "b.tif"])
    assert tiles.slide == case / "b.tif"
    assert tiles.corners.tolist() == [[tile.x, tile.y] for tile in find_tiles(case / "a.tif", SMALL)]
    with pytest.raises(MivpgError, match=r"features were made of .*a\.tif, not of .*b\.tif; give --slide one of these"):
        tiles_on_slides(sample, bag, [case / "a.tif", case / "b.tif"])
    with pytest.raises(MivpgError, match=r"a\.tif and .*a\.tif both go by the name of .*; give --slide one of them"):
        tiles_on_slides(sample, bag, [case / "a.tif", tmp_path / "a.tif"])


def test_slides_are_cut_as_extract_cuts_them_and_no_tile_is_kept_twice(shop, case, monkeypatch):
    model = MivpgForConditionalGeneration.from_pretrained(shop / "model")
    processor = MivpgProcessor.from_pretrained(shop / "model")
    made: list[weakref.ref] = []

    def embed(*arguments):
        part = embed_images(*arguments)
        assert sum(reference() is not None for reference in made) <= 1  # of all tiles so far those of the last step
        made.append(weakref.ref(part.image_embeds))
        return part

    monkeypatch.setattr(show, "TILES_AT_ONCE", 1)
    monkeypatch.setattr(show, "embed_images", embed)
    slides = [case / "b.tif", case / "a.tif"]
    bag, tiles = cut_slides(model, processor, slides, SMALL, prompt="see")
    image_embeds, coords = read_features(load_bag_file(case / "bags.jsonl")[0].features)
    assert len(made) == len(image_embeds) > 4
    torch.testing.assert_close(bag.image_embeds, image_embeds, atol=1e-5, rtol=0)
    assert torch.equal(bag.image_coords, coords)
    for of_slide, slide in zip(tiles, slides, strict=True):
        assert of_slide.corners.tolist() == [[tile.x, tile.y] for tile in find_tiles(slide, SMALL)]


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def reddest(pixels: np.ndarray) -> tuple[float, float]:
    """Row and column, in shares of the picture, of what is red in jet."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    rows, columns = np.nonzero((red > green + 60) & (red > blue + 60))
    assert len(rows) > 20
    return rows.mean() / len(pixels), columns.mean() / pixels.shape[1]


def test_a_patch_is_drawn_where_it_is_on_its_photo():
    grid = np.full((2, 3, 3), 0.01)
    grid[0, 2, 0], grid[1, 0, 2] = 0.9, 0.9
    within = grid / grid.sum(axis=(1, 2), keepdims=True)
    places = []
    for index in range(2):
        maps = patch_maps(index, within, grid / grid.sum(), num_patches=9)
        assert [of.colors for of in maps] == ["jet", "viridis", "viridis"]
        assert maps[2].grid.sum() == pytest.approx(9, rel=0.1)  # half of the bag's weight, which is 18 in all
        pixels = pixels_of(draw_patches(PHOTO, maps, title=""))
        jet = pixels[: len(pixels) // 2, pixels.shape[1] // 2 : int(0.93 * pixels.shape[1])]  # top right, no colour bar
        places.append(reddest(jet))
    assert places[0][0] > places[1][0] + 0.3 and places[0][1] < places[1][1] - 0.3


def test_without_abmil_there_are_two_maps_and_without_patches_none():
    grid = np.full((1, 2, 2), 0.25)
    assert [of.colors for of in patch_maps(0, None, grid, num_patches=4)] == ["jet", "viridis"]
    assert patch_maps(0, None, None, num_patches=1) == []
    alone, with_maps = (
        pixels_of(draw_patches(PHOTO, patch_maps(0, None, of, num_patches=4), title="")) for of in (None, grid)
    )
    assert alone.shape[1] < with_maps.shape[1]


def test_each_head_of_each_block_has_its_panel():
    heads = np.full((2, 3, 4, 2), 0.3)
    heads[1, 2, 0] = (0.0, 1.0)
    pixels = pixels_of(draw_heads(heads))
    pixels = pixels[:, : int(0.85 * pixels.shape[1])]  # without the colour bar
    rows, columns = np.nonzero(np.abs(pixels - (253, 231, 37)).max(axis=2) < 25)
    assert rows.min() > 0.4 * len(pixels) and columns.min() > 0.6 * pixels.shape[1]


def test_words_may_hold_anything():
    first, second = (draw_words(["$x$", "{}", "<b>" * 50], np.eye(3), [1, 5, 7]) for _ in range(2))
    assert first == second
    yellow = np.abs(pixels_of(first) - (253, 231, 37)).max(axis=2) < 25
    assert yellow.sum() > 1000  # a long word leaves room for the numbers


# ── Real images ─────────────────────────────────────────────────────────────────────────────────────────────────────


@needs_abo
def test_real_photos_and_the_model_that_comes_along(tmp_path):
    """The weights are those of the pixels of the photos, given in two ways."""
    pictures = sorted((ABO / "images" / "small").rglob("*.jpg"))[:3]
    out = tmp_path / "out"
    done("show", *pictures, "--model", BASE_MODEL, "--out", out, *FAST)
    model = MivpgForConditionalGeneration.from_pretrained(BASE_MODEL)
    processor = MivpgProcessor.from_pretrained(BASE_MODEL)
    expected = attention_maps(model, processor(images=[[*map(str, pictures)]])).combined[0]
    arrays = load_file(out / "attention.safetensors")
    torch.testing.assert_close(arrays["combined"], expected, atol=1e-5, rtol=0)
    assert arrays["combined"].sum() == pytest.approx(1, abs=1e-4)
    assert all(Image.open(out / f"image_{number}.png").size[0] > 400 for number in (1, 2, 3))


@needs_slide
def test_a_real_slide_and_the_model_that_comes_along(tmp_path):
    pytest.importorskip("openslide")
    out = tmp_path / "out"
    done("show", "--slide", SLIDE, "--model", BASE_MODEL, "--out", out, *FAST)
    objects = read_as_qupath(json.loads((out / "tiles.geojson").read_text()))
    assert sum(entry["measurements"]["weight"] for entry in objects) == pytest.approx(1, abs=1e-4)
    assert max(entry["bounds"][2] for entry in objects) > 1500  # over the slide's whole width of 2220 pixels
    assert {"heat_map.png", "top_tiles.png", "attention.html"} < {path.name for path in out.iterdir()}
