"""What stands behind the page, against the package's own commands; what it refuses; and that it gives no file away."""

import errno
import html
import http.client
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import isclose
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

import mivpg
from families import save_blip2
from generated import contents
from mivpg import (
    MivpgError,
    MivpgForConditionalGeneration,
    MivpgProcessor,
    app,
    app_answers,
    app_bags,
    app_hosts,
    app_html,
    image_weights,
)
from mivpg.app_answers import as_json, caption_opened, leave_out
from mivpg.app_bags import OpenedBag, generated_products, open_files, open_pictures
from mivpg.bags import Bag
from mivpg.captioning import caption_bags
from mivpg.layers import PyramidPositionEncoding, lattice_cells
from mivpg.miniature import BASE_MODEL
from mivpg.slide_maps import SlideTiles, draw_heat_map
from mivpg.slides import Tile, TileOptions, find_tiles, open_slide
from test_cli import mivpg as command
from test_cli import one_line
from test_images import png_of
from warm import Program

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.*")
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed")
SLIDE = Path(__file__).resolve().parents[2] / "shared" / "data" / "slides" / "CMU-1-Small-Region.svs"
needs_slide = pytest.mark.skipif(
    not SLIDE.is_file() or importlib.util.find_spec("openslide") is None,
    reason="OpenSlide, or the real slide of ../shared/data, is not there",
)

Loaded = tuple[MivpgForConditionalGeneration, MivpgProcessor]


def load(folder: Path) -> Loaded:
    return MivpgForConditionalGeneration.from_pretrained(folder), MivpgProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def embedded() -> Loaded:
    return load(BASE_MODEL)


@pytest.fixture(scope="module", params=["embedded", pytest.param("t5", marks=pytest.mark.slow)])
def loaded(request, tmp_path_factory) -> Loaded:
    """A decoder-only language model that has learned, and a random encoder-decoder."""
    return load(BASE_MODEL if request.param == "embedded" else save_blip2(tmp_path_factory.mktemp("t5"), "t5"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Photos of a generated product that has four or more."""
    product = next(product for product in generated_products().values() if len(product) > 3)
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{name}.png" for name, _ in product]
    for path, (_, picture) in zip(paths, product, strict=True):
        picture.save(path)
    return paths


def opened_from(loaded: Loaded, paths: list[Path]) -> OpenedBag:
    opened, refused = open_files(*loaded, paths, max_files=32)
    assert opened is not None
    assert refused == []
    return opened


def bag_of(paths: list[Path], prompt: str) -> Bag:
    """As `mivpg caption` opens it."""
    images = [Image.open(path).convert("RGB") for path in paths]
    return Bag(id="x", images=images, image_embeds=None, image_coords=None, prompt=prompt, caption=None)


@torch.no_grad()
def log_likelihood(loaded: Loaded, paths: list[Path], prompt: str, caption: str) -> tuple[float, int]:
    """Token by token from the pixels, and the number of tokens."""
    model, processor = loaded
    batch = processor(images=[[*map(str, paths)]], text=[prompt], captions=[caption])
    logits = model(**batch).logits[0]
    places = (batch["labels"][0] != -100).nonzero()[:, 0].tolist()
    shift = 0 if model.config.is_encoder_decoder else 1
    found = [logits[place - shift].log_softmax(-1)[batch["labels"][0, place]].item() for place in places]
    return sum(found), len(found)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """For tests of what is said: pictures take most of the time."""
    draw_nothing(monkeypatch)


def draw_nothing(monkeypatch) -> None:
    for draw in ("draw_attention", "draw_heat_map"):
        monkeypatch.setattr(app_answers, draw, lambda *args, **kwargs: b"")


# ── Captions, weights and what is left without a photo ──────────────────────────────────────────────────────────────


def test_caption_beams_and_weights_are_those_of_the_commands(loaded, photos):
    model, processor = loaded
    result = caption_opened(*loaded, opened_from(loaded, photos), prompt="a photo of", num_beams=4)
    bag = bag_of(photos, "a photo of")
    assert [result.caption] == caption_bags(*loaded, [bag], num_beams=4, max_new_tokens=app_answers.MAX_NEW_TOKENS)
    assert len(result.beams) == 4
    assert all(better.score >= worse.score for better, worse in pairwise(result.beams))
    for beam in result.beams:
        likely, number = log_likelihood(loaded, photos, "a photo of", beam.caption)
        assert isclose(beam.log_likelihood, likely, abs_tol=1e-3)
        if number < app_answers.MAX_NEW_TOKENS and processor.caption_end_token_id is not None:
            assert isclose(beam.score, likely / number, rel_tol=0.02, abs_tol=1e-3)
    expected = image_weights(model, processor(images=[[*map(str, photos)]]))[0].tolist()
    assert result.weights == pytest.approx(expected, abs=1e-5)
    assert result.attention is not None
    assert result.attention.startswith(b"\x89PNG")


def test_another_prompt_another_caption(embedded, photos, undrawn):
    opened = opened_from(embedded, photos)
    one, other = (
        caption_opened(*embedded, opened, prompt=text, num_beams=3) for text in ("a photo of", "the underside")
    )
    assert one.caption != other.caption
    assert [other.caption] == caption_bags(
        *embedded, [bag_of(photos, "the underside")], num_beams=3, max_new_tokens=app_answers.MAX_NEW_TOKENS
    )


def test_left_out_photos_are_gone(loaded, photos, undrawn):
    whole = caption_opened(*loaded, opened_from(loaded, photos), prompt="a photo of", num_beams=3)
    comparison = leave_out(*loaded, whole, [2, 0])
    others = [photos[1], *photos[3:]]
    assert comparison.left_out == (0, 2)
    assert comparison.rest.opened.names == tuple(path.name for path in others)
    assert [comparison.rest.caption] == caption_bags(
        *loaded, [bag_of(others, "a photo of")], num_beams=3, max_new_tokens=app_answers.MAX_NEW_TOKENS
    )
    for row, caption in zip(comparison.log_likelihoods, (whole.caption, comparison.rest.caption), strict=True):
        for found, paths in zip(row, (photos, others), strict=True):
            assert isclose(found, log_likelihood(loaded, paths, "a photo of", caption)[0], abs_tol=1e-3)
    assert sum(comparison.rest.weights or ()) == pytest.approx(1, abs=1e-5)


def test_one_beam_is_greedy_search(loaded, photos, undrawn):
    (beam,) = caption_opened(*loaded, opened_from(loaded, photos), prompt="a photo of", num_beams=1).beams
    assert [beam.caption] == caption_bags(
        *loaded, [bag_of(photos, "a photo of")], num_beams=1, max_new_tokens=app_answers.MAX_NEW_TOKENS
    )
    likely, number = log_likelihood(loaded, photos, "a photo of", beam.caption)
    assert isclose(beam.log_likelihood, likely, abs_tol=1e-3)
    # An empty caption may be of tokens that say nothing, and they count.
    if beam.caption and number < app_answers.MAX_NEW_TOKENS and loaded[1].caption_end_token_id is not None:
        assert isclose(beam.score, likely / number, rel_tol=1e-3)


def test_no_beam_is_refused(embedded, photos):
    with pytest.raises(MivpgError, match=r"^num_beams is 0, expected at least 1\.$"):
        caption_opened(*embedded, opened_from(embedded, photos), prompt="", num_beams=0)


def test_photos_that_are_not_there_cannot_be_left_out(embedded, photos, undrawn):
    whole = caption_opened(*embedded, opened_from(embedded, photos[:4]), prompt="", num_beams=2)
    for wrong in (-1, 4, 99):
        says = f"^photo {wrong + 1} is to be left out, and there are photos 1 to 4; choose"
        with pytest.raises(MivpgError, match=says):
            leave_out(*embedded, whole, [1, wrong])


@pytest.mark.parametrize("all_of_them", [False, True])
def test_something_has_to_be_left_out_and_something_to_stay(embedded, photos, undrawn, all_of_them):
    whole = caption_opened(*embedded, opened_from(embedded, photos), prompt="", num_beams=2)
    number = len(photos) if all_of_them else 0
    with pytest.raises(MivpgError, match=rf"^{number} of {len(photos)} photos are left out, expected at least one"):
        leave_out(*embedded, whole, range(number))


def test_json_says_what_the_page_shows(embedded, photos, undrawn):
    whole = caption_opened(*embedded, opened_from(embedded, photos), prompt="a photo of", num_beams=3)
    comparison = leave_out(*embedded, whole, [1])
    values = json.loads(as_json(whole, comparison, model="a model"))
    assert (values["model"], values["prompt"], values["caption"]) == ("a model", "a photo of", whole.caption)
    assert [beam["caption"] for beam in values["beams"]] == [beam.caption for beam in whole.beams]
    assert [photo["name"] for photo in values["photos"]] == [path.name for path in photos]
    assert sum(photo["weight"] for photo in values["photos"]) == pytest.approx(1, abs=1e-5)
    assert values["left_out"]["photos"] == [photos[1].name]
    assert values["left_out"]["the_others"]["caption"] == comparison.rest.caption
    assert html.unescape(app_html.show_json(as_json(whole, model="a model"))).count('"caption"') == 4
    shown = app_html.show_comparison(comparison)
    for row in comparison.log_likelihoods:
        for value in row:
            assert f"{value:.2f}".replace("-", "−") in shown


def test_model_without_weights_captions_all_the_same(embedded, photos):
    model = MivpgForConditionalGeneration.from_pretrained(BASE_MODEL, aggregator="mean")
    result = caption_opened(model, embedded[1], opened_from(embedded, photos), prompt="", num_beams=2)
    assert (result.weights, result.attention) == (None, None)
    assert "'mean'" in result.note
    assert html.unescape(app_html.show_attention(result)) == f"<p>{result.note}</p>"
    assert "weight" not in app_html.show_photos(result.opened, result.weights)


def test_generated_products_are_always_the_same():
    first, second = generated_products(3), generated_products(3)
    assert list(first) == list(second)
    assert len(first) == 3
    for photos in first.values():
        assert len(photos) > 1


@needs_slide
def test_slide_is_a_bag_of_its_tiles(embedded, monkeypatch):
    model, processor = embedded
    monkeypatch.setattr(app_bags, "MAX_TILES", 6)  # of 40
    opened, refused = open_files(*embedded, [SLIDE], max_files=1)
    assert refused == []
    assert opened is not None and opened.tiles is not None
    found = find_tiles(SLIDE, TileOptions())
    chosen = [found[index] for index in (0, 6, 13, 20, 26, 33)]
    corners = [(tile.x, tile.y) for tile in chosen]
    assert opened.bag.image_coords is not None
    assert opened.bag.image_coords[:, :2].tolist() == [list(map(float, corner)) for corner in corners]
    assert opened.names == tuple(f"tile at {x}, {y}" for x, y in corners)
    assert opened.taken == "6 of 40 tiles with tissue were read: evenly spaced over the slide."
    assert opened.taken in app_html.show_photos(opened)

    result = caption_opened(*embedded, opened, prompt="a photo of", num_beams=2)
    batch = processor(images=[[tile.open() for tile in chosen]])
    weights = image_weights(model, batch)[0].tolist()
    assert result.weights == pytest.approx(weights, abs=1e-5)
    tiles = SlideTiles(corners=np.array(corners, dtype=float), span=chosen[0].span, slide=SLIDE)
    assert result.heat_map == draw_heat_map(tiles, result.weights, title="6 tiles")
    assert app_html.show_attention(result).count("<img") == 2
    assert json.loads(as_json(result, model="x"))["tiles"] == {"taken": opened.taken, "span": chosen[0].span}

    draw_nothing(monkeypatch)
    comparison = leave_out(*embedded, result, [0])
    rest = comparison.rest.opened
    assert rest.tiles is not None
    assert rest.tiles.corners.tolist() == rest.bag.image_coords[:, :2].tolist() == opened.tiles.corners[1:].tolist()
    assert "Without tile 1 " in app_html.show_comparison(comparison)


@needs_slide
def test_slide_that_is_gone_is_said_by_its_name(embedded, tmp_path, monkeypatch):
    """Uploads are deleted after an hour."""
    monkeypatch.setattr(app_bags, "MAX_TILES", 2)
    monkeypatch.setattr(app_answers, "draw_attention", lambda *args, **kwargs: b"")
    slide = tmp_path / "case.svs"
    shutil.copyfile(SLIDE, slide)
    opened = opened_from(embedded, [slide])
    slide.unlink()
    open_slide.cache_clear()
    result = caption_opened(*embedded, opened, prompt="", num_beams=2)
    assert result.caption
    assert result.heat_map is None
    assert result.note.startswith("case.svs does not exist")


@pytest.fixture(scope="module")
def with_ppeg(embedded) -> Loaded:
    """A model that reads where images lie."""
    options = {"patch_pooling": "abmil", "position_encoding": "ppeg"}
    return MivpgForConditionalGeneration.from_pretrained(BASE_MODEL, **options), embedded[1]


@needs_slide
def test_model_that_reads_places_gets_tiles_side_by_side(with_ppeg, undrawn, monkeypatch):
    monkeypatch.setattr(app_bags, "MAX_TILES", 9)  # of 40
    opened = opened_from(with_ppeg, [SLIDE])
    assert opened.bag.image_coords is not None
    assert len(opened.names) == 9
    assert lattice_cells(opened.bag.image_coords).tolist() == [[row, column] for row in range(3) for column in range(3)]
    assert opened.taken.startswith("9 of 40 tiles with tissue were read: the square with the most tissue, since")
    result = caption_opened(*with_ppeg, opened, prompt="", num_beams=2)
    rest = leave_out(*with_ppeg, result, [1, 4, 7]).rest.opened.bag
    assert rest.image_coords is not None
    assert lattice_cells(rest.image_coords).tolist() == [[row, column] for row in range(3) for column in (0, 2)]


def test_densest_square_is_found_among_all(monkeypatch):
    monkeypatch.setattr(app_bags, "MAX_TILES", 16)
    draw = random.Random(0)
    span = 512.4
    for number in (1, 5, 60, 120):
        cells = draw.sample([(row, column) for row in range(14) for column in range(11)], number)
        tiles = [
            Tile(slide=Path("x"), x=round(column * span), y=round(row * span), span=span, size=256)
            for row, column in sorted(cells)
        ]
        found = app_bags.densest_square(tiles)
        for places in ([tile.x for tile in found], [tile.y for tile in found]):
            assert round((max(places) - min(places)) / span) < 4
        most = max(
            sum(top <= row < top + 4 and left <= column < left + 4 for row, column in cells)
            for top in range(14)
            for left in range(11)
        )
        assert len(found) == most


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({"patch_pooling": "abmil"}, False),
        ({"patch_pooling": "abmil", "position_encoding": "ppeg"}, True),
        ({"patch_pooling": "none", "position_encoding": "ppeg"}, False),  # places within each image
        ({"patch_pooling": "mean", "aggregator": "transmil"}, True),
    ],
    ids=["no ppeg", "images", "patches", "transmil"],
)
def test_which_models_read_places(embedded, options, reads):
    """By what they answer when images change places, the kernels drawn."""
    model = MivpgForConditionalGeneration.from_pretrained(BASE_MODEL, **options).eval()
    torch.manual_seed(0)
    for part in model.modules():
        if isinstance(part, PyramidPositionEncoding):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
    embeds = torch.randn(1, 4, 37, model.config.image_embeds_size)
    square, others = ([[0, 0], [1, 0], [0, 1], [1, 1]], [[0, 0], [1, 1], [5, 0], [3, 7]])
    with torch.no_grad():
        one, other = (
            model.get_visual_prompts(embeds, image_coords=None if places is None else torch.tensor([places]).float())
            for places in (square, others)
        )
    assert torch.allclose(one.embeds, other.embeds) != reads
    assert app_bags.reads_places(model) == reads


# ── What is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def bomb(path: Path) -> Path:
    """A file of a few bytes that asks for 7.5 GB."""
    data = zlib.compress(bytes(100))
    path.write_bytes(png_of(50_000, 50_000, bit_depth=8, color_type=2, data=data))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_wrong_files_get_a_sentence_each_and_the_others_are_read(embedded, photos, tmp_path):
    whole = photos[0].read_bytes()
    wrong = [
        written(tmp_path / "notes.txt", b"a red chair"),
        bomb(tmp_path / "bomb.png"),
        written(tmp_path / "cut.png", whole[: len(whole) // 2]),
        written(tmp_path / "empty.jpg", b""),
        written(tmp_path / "page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ]
    opened, refused = open_files(*embedded, [photos[0], *wrong, photos[1]], max_files=32)
    assert opened is not None
    assert opened.names == (photos[0].name, photos[1].name)
    assert len(refused) == len(wrong)
    for path, sentence in zip(wrong, refused, strict=True):
        assert sentence.startswith(path.name)
        assert sentence.endswith(".")
        assert str(tmp_path) not in sentence
    assert "178000000 pixels allowed" in refused[1]


def test_nothing_but_wrong_files_is_no_bag(embedded, tmp_path):
    assert open_files(*embedded, [], max_files=1) == (None, [])
    opened, refused = open_files(*embedded, [bomb(tmp_path / "bomb.png")], max_files=1)
    assert opened is None
    assert len(refused) == 1


def test_too_many_files_and_slides_among_photos_are_refused(embedded, photos, tmp_path):
    opened, refused = open_files(*embedded, photos[:3], max_files=2)
    assert (opened, refused) == (None, ["These are 3 files, and at most 2 are read at once; take some away."])
    slide = written(tmp_path / "case.svs", b"")
    opened, refused = open_files(*embedded, [photos[0], slide], max_files=2)
    assert (opened, refused) == (None, ["case.svs is a slide, which is read by itself; take the other files away."])


def test_damaged_slide_and_missing_openslide_get_a_sentence(embedded, tmp_path, monkeypatch):
    slide = written(tmp_path / "case.svs", b"no slide")
    if importlib.util.find_spec("openslide") is not None:
        opened, (sentence,) = open_files(*embedded, [slide], max_files=2)
        assert opened is None
        assert sentence.startswith("case.svs is no slide")
    monkeypatch.setitem(sys.modules, "openslide", None)
    slide.write_bytes(b"II*\0 no slide")
    opened, refused = open_files(*embedded, [slide], max_files=2)
    assert (opened, refused) == (None, ["Slide files take OpenSlide: pip install 'mivpg[slides]'."])


def test_a_prompt_has_a_limit(embedded, photos):
    opened, _ = open_files(*embedded, photos[:1], max_files=2)
    with pytest.raises(MivpgError, match="1,001 characters, and at most 1,000"):
        caption_opened(*embedded, opened, prompt="a" * 1001, num_beams=2)


def test_a_text_that_names_another_file_as_its_slide_is_refused(embedded, tmp_path):
    """OpenSlide goes by content: as Hamamatsu's index file it would read that file, and say whether it is there."""
    secret = written(tmp_path / "secret.jpg", b"")
    lines = ["[Virtual Microscope Specimen]", "NoLayers=1", "NoJpegColumns=1", "NoJpegRows=1"]
    for name in ("x.svs", "x.ndpi", "x.vms"):
        index = written(tmp_path / name, "\n".join([*lines, f"ImageFile={secret}", f"MapFile={secret}"]).encode())
        opened, (sentence,) = open_files(*embedded, [index], max_files=2)
        assert opened is None
        assert sentence.startswith(name) and "secret" not in sentence and str(tmp_path) not in sentence


def test_names_and_captions_are_text_not_markup(embedded, photos):
    name = '<img src=x onerror="alert(1)">{0}.png'
    opened = open_pictures(*embedded, [(name, Image.open(path).convert("RGB")) for path in photos[:2]])
    assert opened is not None
    result = caption_opened(*embedded, opened, prompt="", num_beams=2)
    beams = tuple(replace(beam, caption="<script>alert(1)</script>{0}") for beam in result.beams)
    result = replace(result, beams=beams, note=name)
    comparison = leave_out(*embedded, result, [0])
    comparison = replace(comparison, rest=replace(comparison.rest, beams=beams))
    for shown in (
        app_html.show_heading(name, max_files=1, max_file_mb=1),
        app_html.show_photos(opened, result.weights),
        app_html.show_caption(result),
        app_html.show_beams(result),
        app_html.show_attention(replace(result, attention=None)),
        app_html.show_comparison(comparison),
        app_html.show_json(as_json(result, model="</textarea><script>")),
        app_html.show_refused([f"{name} is not a picture."]),
    ):
        assert "<script" not in shown
        assert "<img src=x" not in shown
        assert "{0}" in shown


def test_command_without_gradio_names_the_extra(monkeypatch):
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    result = command("app")
    assert (result.code, result.err) == (1, "mivpg: The page takes Gradio: pip install 'mivpg[app]'.\n")


# ── The server ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Served:
    """A page that is served in this process, and plain requests to it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.host = urlsplit(address).netloc

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """The path is sent as it stands, with its dots."""
        connection = http.client.HTTPConnection(self.host, timeout=30)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.read()

    def upload(self, content: bytes) -> tuple[int, bytes]:
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head + content + b"\r\n--x--\r\n"
        return self.request("POST", "/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=x")


@pytest.fixture(scope="module")
def served(embedded, tmp_path_factory) -> Iterator[Served]:
    folder = str(tmp_path_factory.mktemp("uploads"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", folder)
        patch.setenv("GRADIO_EXAMPLES_CACHE", folder)
        page = app.build_page(*embedded, name="the miniature", max_files=6, max_file_mb=1)
        try:
            yield Served(app.launch(page, host="127.0.0.1", port=None, max_files=6, max_file_mb=1))
        finally:
            page.close(verbose=False)


@pytest.fixture
def secret(tmp_path, photos) -> Path:
    """A picture of this machine, which nobody uploaded."""
    path = tmp_path / "secret.png"
    path.write_bytes(photos[0].read_bytes())
    return path


@needs_gradio
def test_page_and_what_was_uploaded_are_served(served, photos):
    """So that what follows is refused because of what is asked for."""
    status, page = served.request("GET", "/")
    assert status == 200
    assert b"mivpg" in page
    status, answer = served.upload(photos[0].read_bytes())
    assert status == 200
    (path,) = json.loads(answer)
    assert served.request("GET", f"/gradio_api/file={path}") == (200, photos[0].read_bytes())


@needs_gradio
def test_no_file_of_the_machine_is_served(served, secret, photos):
    _, answer = served.upload(photos[0].read_bytes())
    (uploaded,) = json.loads(answer)
    up = os.path.relpath(secret, Path(uploaded).parent)
    source = Path(app.__file__)
    for target in (str(secret), f"{Path(uploaded).parent}/{up}", os.path.relpath(secret), "/etc/hostname", str(source)):
        assert target == "/etc/hostname" or Path(target).is_file()
        twice = quote(quote(target, safe=""), safe="")
        for spelled in (target, quote(target), quote(target, safe=""), twice, f"file://{target}"):
            for route in (
                "/gradio_api/file=",
                "/gradio_api/file/",
                "/file=",
                "/file/",
                "/static/",
                "/assets/",
                "/svelte/",
                "/gradio_api/proxy=",
                "/gradio_api/custom_component/0/client/component/",
                "/",
            ):
                status, content = served.request("GET", f"{route}{spelled}")
                assert status >= 400, (route, spelled, status)
                assert secret.read_bytes() not in content
                assert b"def build_page" not in content
    for deep in ("/static/", "/assets/"):
        status, _ = served.request("GET", f"{deep}{'../' * 12}{str(secret)[1:]}")
        assert status >= 400


@needs_gradio
def test_path_of_the_machine_is_no_upload(served, secret):
    """The page sends paths of files that it uploaded; a path of another file is refused, and not read."""
    _, config = served.request("GET", "/config")
    files = next(part["id"] for part in json.loads(config)["components"] if part["type"] == "file")
    event = next(event for event in json.loads(config)["dependencies"] if [files, "upload"] in event["targets"])
    stated = {"path": str(secret), "orig_name": "secret.png", "meta": {"_type": "gradio.FileData"}}
    for data in (stated, stated | {"url": f"file://{secret}"}):
        body = {"data": [[data]], "fn_index": event["id"], "session_hash": "s", "trigger_id": files}
        status, answer = served.request(
            "POST", "/gradio_api/queue/join", json.dumps(body).encode(), Content_Type="application/json"
        )
        assert status == 200, answer
        status, stream = served.request("GET", "/gradio_api/queue/data?session_hash=s")
        messages = [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: ")]
        (done,) = [message for message in messages if message["msg"] == "process_completed"]
        assert not done["success"]
        assert "data:image" not in stream.decode()


@needs_gradio
def test_large_file_is_cut_off_while_it_arrives(served):
    assert served.upload(bytes(2**20 - 1))[0] == 200
    status, answer = served.upload(bytes(2**20 + 1))
    assert status == 413
    assert b"maximum allowed size" in answer


@needs_gradio
def test_more_than_the_page_reads_is_refused_before_it_is_stored(served):
    """No byte of it is sent here, so an answer that came later would not come."""
    post = partial(served.request, "POST", "/gradio_api/upload", Content_Type="multipart/form-data; boundary=x")
    assert post(Content_Length=str(8 * 2**20)) == (413, b"Too much at once; the page reads 6 files of 1 MB.")
    assert post(Transfer_Encoding="chunked") == (411, b"Say how long it is (Content-Length).")
    assert post(Content_Length="a lot")[0] == 400
    assert post(b"--x--\r\n")[0] == 200


FOREIGN = (
    "elsewhere.example",
    "127.0.0.1.elsewhere.example",
    "localhost.elsewhere.example:7860",
    "10.0.0.1",
    "[::2]",
    "",
)


@needs_gradio
def test_other_names_for_this_machine_are_refused(served):
    assert served.request("GET", "/", Host="localhost:7860")[0] == 200
    for name in FOREIGN:
        for path in ("/", "/config", "/gradio_api/info"):
            assert served.request("GET", path, Host=name)[0] == 400, name


@needs_gradio
@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost", "127.1"])
def test_every_loopback_address_answers_to_its_own_names_alone(host):
    import gradio

    if host == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with gradio.Blocks(analytics_enabled=False) as page:
        pass
    try:
        served = Served(app.launch(page, host=host, port=None, max_files=6, max_file_mb=1))
        port = served.host.rsplit(":", 1)[1]
        assert served.request("GET", "/config")[0] == 200
        for name in ("localhost", "LOCALHOST", "127.0.0.1", "127.0.0.2", "[::1]"):
            assert served.request("GET", "/config", Host=f"{name}:{port}")[0] == 200, name
        for name in FOREIGN:
            assert served.request("GET", "/config", Host=name)[0] == 400, name
        for origin in ("http://evil.example", "http://evil.example:7860", "null", "http://127.0.0.1.evil.example"):
            assert served.request("GET", "/config", Origin=origin)[0] == 400, origin
        assert served.request("GET", "/config", Origin=f"http://localhost:{port}")[0] == 200
    finally:
        page.close(verbose=False)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("192.0.2.1", None, "192.0.2.1: Cannot assign requested address"),  # of no machine (RFC 5737)
        ("a..b", None, "'a..b': .*label"),
        ("127.0.0.1", 0, "--port is 0, expected 1 to 65535"),
        ("127.0.0.1", 70_000, "--port is 70000, expected 1 to 65535"),
    ],
)
def test_address_that_cannot_be_had_says_why(host, port, says):
    with pytest.raises(MivpgError, match=f"^{says}") as caught:
        app_hosts.check_address(host, port)
    assert "free" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EADDRINUSE, errno.EACCES])
def test_port_that_is_taken_or_not_allowed_is_not_free(monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(app_hosts.socket, "create_server", refuse)
    with pytest.raises(MivpgError, match=r"^127\.0\.0\.1: port 80 is not free there; choose another --port"):
        app_hosts.check_address("127.0.0.1", 80)
    with pytest.raises(MivpgError, match="no port from 7860 to 7959 is free there"):
        app_hosts.check_address("127.0.0.1", None)


@needs_gradio
def test_another_failure_is_said_as_it_is(monkeypatch):
    import gradio

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gradio.Blocks, "launch", fail)
    with pytest.raises(MivpgError, match=r"could not be served there: .*No space left on device"):
        app.launch(gradio.Blocks(), host="127.0.0.1", port=None, max_files=6, max_file_mb=1)


@needs_gradio
def test_page_asks_nothing_of_other_machines(served):
    _, page = served.request("GET", "/")
    text = page.decode()
    for loads in ('src="http', "src='http", 'href="http', "@import", "fonts.googleapis", "cdnjs"):
        assert loads not in text, loads
    _, config = served.request("GET", "/config")
    values = json.loads(config)
    assert values["analytics_enabled"] is False


@needs_gradio
def test_port_in_use_is_one_line(served):
    result = command("app", "--port", served.host.split(":")[1])
    assert result.code == 1
    assert one_line(result.err.split("\n", 1)[1])
    assert "free there; choose another --port" in result.err


@needs_gradio
def test_limits_below_one_are_refused():
    result = command("app", "--max-files", 0)
    assert result.code == 1
    assert "expected at least 1 of each" in result.err


@needs_gradio
def test_command_serves_writes_nothing_and_clears_up(tmp_path):
    """In a process and a folder of its own, as from an installation that nobody may write to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work, uploads = tmp_path / "work", tmp_path / "uploads"
    work.mkdir()
    uploads.mkdir()
    package = Path(mivpg.__file__).parent
    before = {path for path in contents(package) if "__pycache__" not in path}
    environment = os.environ | {"TMPDIR": str(uploads)}
    run = Program("-m", "mivpg.cli", "app", "--port", port, environment=environment, folder=work)
    try:
        while run.is_running and not run.out:
            time.sleep(0.1)
        assert run.out == f"http://127.0.0.1:{port}/\n"
        page = Served(f"http://127.0.0.1:{port}")
        assert page.request("GET", "/")[0] == 200
        assert page.upload(b"x")[0] == 200
        assert [path for path in uploads.glob("mivpg-*/**/*") if path.is_file()]
        run.send_signal(signal.SIGTERM)
    finally:
        code, _, err = run.wait(timeout=20)
    assert code == 130
    assert "Traceback" not in err
    assert not list(uploads.glob("mivpg-*"))
    assert not list(work.iterdir())
    assert {path for path in contents(package) if "__pycache__" not in path} == before
