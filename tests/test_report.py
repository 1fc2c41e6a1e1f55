"""The page needs nothing else and shows what it was given, as text; the picture keeps its words inside."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.axes import Axes
from PIL import Image, ImageColor

from mivpg import report
from mivpg.bags import Sample
from mivpg.errors import BagError
from mivpg.evaluation_report import MOST_PHOTOS, NUM_EXAMPLES, training_log, write_evaluation_report
from mivpg.report import (
    BagExample,
    BarChart,
    Examples,
    Listing,
    Part,
    Picture,
    Table,
    Text,
    draw_chart,
    draw_example,
    is_number,
    training_curves,
    what_was_run,
    write_report,
)
from mivpg.versions import installed_versions

HOSTILE = """</style></title>--><script>alert("1")</script><img src='http://x' onerror="2"> {{ 3 }} & 'ü' $_$"""
VOID = {"meta", "img"}
LONG = "a one seater chair with four thin legs and a red cushion " * 8 + "W" * 200


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, and the text of each, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


@pytest.fixture
def example(tmp_path) -> BagExample:
    images = []
    for name, size in {"a.png": (900, 300), "b.jpg": (30, 40), "c.png": (1, 700)}.items():
        images.append(tmp_path / name)
        Image.new("RGB", size, "red").save(images[-1], comment=b"a remark of the camera")
    return BagExample(
        id="B07",
        title="a lamp",
        images=images,
        weights=[0.25, 0.75, 0.0],
        references=["a white lamp", "a desk lamp"],
        captions={"zero_shot": "a photo", "mivpg": "a white desk lamp", "single_image": "a desk"},
    )


@pytest.fixture
def chart() -> BarChart:
    return BarChart(
        title="CIDEr",
        bars={"few photos": {"zero_shot": 0.25, "mivpg": 1.0}, "many photos": {"zero_shot": -0.5}},
        intervals={"few photos": {"mivpg": (0.9, 1.1)}},
        emphasised="mivpg",
    )


def hostile_parts(example: BagExample) -> list[Part]:
    hostile = BagExample(
        id=HOSTILE,
        title=HOSTILE,
        images=example.images,
        weights=None,
        references=[HOSTILE],
        captions={HOSTILE: HOSTILE},
    )
    return [
        Table(title=HOSTILE, note=HOSTILE, columns=["", HOSTILE], rows=[[HOSTILE, HOSTILE]], emphasised=[HOSTILE]),
        BarChart(title=HOSTILE, note=HOSTILE, bars={HOSTILE: {HOSTILE: 1.0}}, emphasised=HOSTILE),
        Text(title=HOSTILE, paragraphs=[HOSTILE]),
        Picture(title=HOSTILE, note=HOSTILE, png=b"PNG", alt=HOSTILE),
        Listing(title=HOSTILE, note=HOSTILE, text=HOSTILE),
        Examples(title=HOSTILE, note=HOSTILE, examples=[hostile], emphasised=HOSTILE),
    ]


def test_data_is_text_wherever_it_stands(tmp_path, example):
    write_report(tmp_path / "a.html", title=HOSTILE, lead=HOSTILE, parts=hostile_parts(example))
    write_report(tmp_path / "b.html", title="x", lead="x", parts=[])
    page, empty = Page(tmp_path / "a.html"), Page(tmp_path / "b.html")
    count = dict.fromkeys(["title", "h1", "h3", "td", "dt"], 1) | {
        "h2": 6,
        "p": 7,
        "th": 2,
        "dd": 2,
        "span": 1,
        "pre": 1,
    }
    for tag, number in count.items():
        assert page.text(tag).count(HOSTILE) == number, tag
    assert "script" not in dict(page.elements)
    assert len(page.all("img")) == 2 + len(example.images)
    assert [HOSTILE, "data:image/png;base64,UE5H"] in [[img["alt"], img["src"]] for img in page.all("img")]
    assert page.text("style") == empty.text("style")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_no_rule_of_a_style_stands_twice():
    """The pages look alike since they share one file, not since two were kept alike."""
    rules: dict[str, list[str]] = {}
    for template in sorted(Path(report.__file__).with_name("templates").glob("*.html.jinja")):
        styles = re.findall(r"<style>(.*?)</style>", template.read_text(encoding="utf-8"), re.DOTALL)
        assert len(styles) == 1, template.name
        for rule in re.findall(r"[^{}]+\{[^{}]*\}", styles[0]):
            rules.setdefault(" ".join(rule.split()), []).append(template.name)
    assert len(rules) > 50
    assert {rule: files for rule, files in rules.items() if len(files) > 1} == {}


def test_nothing_comes_from_elsewhere(tmp_path, example, chart):
    examples = Examples(title="e", examples=[example], emphasised="mivpg")
    write_report(tmp_path / "a.html", title="t", lead="l", parts=[chart, examples])
    page = Page(tmp_path / "a.html")
    assert {attributes["src"].split(",")[0] for attributes in page.all("img")} == {
        "data:image/jpeg;base64",
        "data:image/svg+xml;base64",
    }
    assert not {"script", "link", "iframe", "object"} & dict(page.elements).keys()
    assert "url(" not in page.source and "@import" not in page.source and "http" not in "".join(page.text("style"))
    assert re.findall(rb'(?:href|src)="(?!#)|url\((?!#)', draw_chart(chart)) == []


def test_a_page_is_what_browsers_expect(tmp_path):
    write_report(tmp_path / "new" / "a.html", title="t", lead="l", parts=[])
    page = Page(tmp_path / "new" / "a.html")
    assert page.source.startswith("<!DOCTYPE html>\n") and page.source.endswith("</html>\n")
    assert page.all("html") == [{"lang": "en"}]
    assert page.text("title") == ["t"]
    assert {"charset": "utf-8"} in page.all("meta")
    assert "viewport" in [attributes.get("name") for attributes in page.all("meta")]


@pytest.mark.slow
def test_bytes_are_the_same_in_another_process(tmp_path, example, chart):
    write_report(tmp_path / "a.html", title="t", lead="l", parts=[chart, *hostile_parts(example)])
    draw_example(example, "mivpg", tmp_path / "drawn.png")
    again = """
import sys, test_report
from pathlib import Path
from mivpg.report import draw_example, write_report
folder = Path(sys.argv[1])
example = test_report.example.__wrapped__(folder)
chart = test_report.chart.__wrapped__()
write_report(folder / "b.html", title="t", lead="l", parts=[chart, *test_report.hostile_parts(example)])
draw_example(example, "mivpg", folder / "again.png")
"""
    subprocess.run([sys.executable, "-c", again, tmp_path], check=True, cwd=Path(__file__).parent)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "drawn.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_an_example_shows_all_of_a_bag(tmp_path, example):
    parts = [Examples(title="e", examples=[example], emphasised="mivpg")]
    write_report(tmp_path / "a.html", title="t", lead="l", parts=parts)
    page = Page(tmp_path / "a.html")
    assert page.text("dt") == ["mivpg", "zero_shot", "single_image", "references"]
    assert page.text("dd") == ["a white desk lamp", "a photo", "a desk", "a white lamp", "a desk lamp"]
    assert page.text("figcaption") == ["25\xa0%", "75\xa0%", "0\xa0%"]
    assert page.source.count(">main<") == 1 and page.source.index(">main<") < page.source.index("75\xa0%")
    bars = [attributes["style"] for attributes in page.all("span") if "style" in attributes]
    assert bars == ["width: 25.0%", "width: 75.0%", "width: 0.0%"]
    assert [image["alt"] for image in page.all("img")] == ["photo 1 of 3", "photo 2 of 3", "photo 3 of 3"]


def test_without_weights_there_are_no_bars(tmp_path, example):
    unweighed = BagExample(**(vars(example) | {"weights": None, "references": []}))
    parts = [Examples(title="e", examples=[unweighed], emphasised="mivpg")]
    write_report(tmp_path / "a.html", title="t", lead="l", parts=parts)
    page = Page(tmp_path / "a.html")
    assert "%" not in "".join(text for tag, text in page.texts if tag != "style")
    assert page.source.count(">main<") == 1
    assert "references" not in page.text("dt")
    draw_example(unweighed, "mivpg", tmp_path / "drawn.png")


def test_photos_become_small_and_keep_nothing_but_pixels(tmp_path, example):
    parts = [Examples(title="e", examples=[example], emphasised="mivpg")]
    write_report(tmp_path / "a.html", title="t", lead="l", parts=parts)
    contents = [b64decode(image["src"].split(",")[1]) for image in Page(tmp_path / "a.html").all("img")]
    assert [Image.open(io.BytesIO(content)).size for content in contents] == [(200, 67), (30, 40), (1, 200)]
    assert {Image.open(io.BytesIO(content)).format for content in contents} == {"JPEG"}
    assert b"remark" in example.images[1].read_bytes() and b"remark" not in b"".join(contents)


def test_columns_of_numbers_stand_at_the_right(tmp_path):
    table = Table(
        title="t",
        columns=["", "CIDEr", "difference", "verdict"],
        rows=[["mivpg", "0.9 ± 0.1", "−0.03 [−0.05, 0.01]", "absent"], ["floor", "–", "", "2 of 3"]],
        emphasised=["mivpg"],
    )
    write_report(tmp_path / "a.html", title="t", lead="l", parts=[table])
    page = Page(tmp_path / "a.html")
    assert page.text("th") == ["CIDEr", "difference", "verdict", "mivpg", "floor"]
    assert page.text("td") == ["0.9 ± 0.1", "−0.03 [−0.05, 0.01]", "absent", "–", "2 of 3"]
    assert [cell.get("class") for cell in page.all("td")] == ["number", "number", None] * 2
    assert [row.get("class") for row in page.all("tr")] == [None, "emphasised", None]


def test_a_bag_of_features_has_no_row_of_photos(tmp_path, example):
    unseen = BagExample(**(vars(example) | {"images": [], "weights": None}))
    parts = [Examples(title="e", examples=[unseen], emphasised="mivpg")]
    write_report(tmp_path / "a.html", title="t", lead="l", parts=parts)
    page = Page(tmp_path / "a.html")
    assert "photos" not in [attributes.get("class") for attributes in page.all("div")]
    assert page.text("dd")[0] == "a white desk lamp"


# ── What was run ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_page_ends_with_configuration_and_versions(tmp_path):
    settings = {"seed": 0, "out": Path("runs/demo"), "model": {"base": "müller/blip2", "betas": (0.9, 0.999)}}
    write_report(tmp_path / "a.html", title="t", lead="l", parts=what_was_run(settings))
    page = Page(tmp_path / "a.html")
    assert page.text("h2") == ["Configuration", "Versions"]
    (listing,) = page.text("pre")
    assert yaml.safe_load(listing) == {
        "seed": 0,
        "out": "runs/demo",
        "model": {"base": "müller/blip2", "betas": [0.9, 0.999]},
    }
    rows = dict(zip(page.text("th")[1:], page.text("td"), strict=True))
    assert rows == installed_versions()
    assert rows["torch"] == torch.__version__ and rows["device"] and "version" in rows["Java"]


def write_log(path: Path, losses: list[float], scores: list[float]) -> Path:
    """What a run of so many epochs logs."""
    entries = [{"loss": loss, "epoch": epoch, "step": epoch} for epoch, loss in enumerate(losses, start=1)]
    entries += [{"eval_CIDEr": score, "epoch": epoch, "step": epoch} for epoch, score in enumerate(scores, start=1)]
    entries.append({"train_loss": 9.0, "epoch": len(losses), "step": len(losses)})
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_curves_show_what_runs_logged(tmp_path, monkeypatch):
    drawn: dict[str, dict[str, list[list[float]]]] = {}
    plot = Axes.plot

    def record(axes, x, y, *arguments, label, **options):
        drawn.setdefault(str(len(axes.figure.axes)), {})[label] = [list(x), list(y)]
        return plot(axes, x, y, *arguments, label=label, **options)

    monkeypatch.setattr(Axes, "plot", record)
    logs = {
        "a": write_log(tmp_path / "a.jsonl", [3.0, 2.0], [0.5, 1.5]),
        "b": write_log(tmp_path / "b.jsonl", [4.0, 1.0], []),  # without a validation split
        "c": tmp_path / "never.jsonl",
    }
    (picture,) = training_curves(logs)
    assert drawn["1"] == {"a": [[1, 2], [3.0, 2.0]], "b": [[1, 2], [4.0, 1.0]]}
    assert drawn["2"]["a"] == [[1, 2], [0.5, 1.5]] and np.isnan(drawn["2"]["b"]).all()
    assert picture.alt == "Curves over epochs; at the end: a loss 2.000, CIDEr 1.500; b loss 1.000."
    with Image.open(io.BytesIO(picture.png)) as image:
        assert image.width == 1000
    assert training_curves({"c": tmp_path / "never.jsonl"}) == []


def test_a_single_point_is_seen(tmp_path):
    """Of a run of one epoch; a line needs two."""
    (picture,) = training_curves({"a": write_log(tmp_path / "a.jsonl", [3.0], [])})
    (none,) = training_curves({"a": write_log(tmp_path / "b.jsonl", [math.nan], [])})
    blue = [
        (np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) == (31, 119, 180)).all(axis=-1)
        for png in (picture.png, none.png)
    ]
    assert blue[0].sum() > blue[1].sum() > 0  # the legend has some


def test_a_legend_of_long_names_stays_inside(tmp_path):
    log = write_log(tmp_path / "a.jsonl", [2.0, 1.0], [1.0, 2.0])
    names = ("MIVPG, control for CSA, " + "with many words " * 5, "scenes: Q-Former on each image")
    (picture,) = training_curves(dict.fromkeys(names, log))
    with Image.open(io.BytesIO(picture.png)) as image:
        inked = np.asarray(image.getchannel("A")) > 0
    columns = np.flatnonzero(inked.any(axis=0))
    assert columns.min() > 5 and columns.max() < inked.shape[1] - 5


def test_without_validation_there_is_one_panel(tmp_path):
    with_scores = training_curves({"a": write_log(tmp_path / "a.jsonl", [1.0], [1.0])})[0]
    without = training_curves({"a": write_log(tmp_path / "b.jsonl", [1.0], [])})[0]
    heights = [Image.open(io.BytesIO(picture.png)).height for picture in (with_scores, without)]
    assert heights[0] > 1.7 * heights[1]


# ── The page of `mivpg evaluate` ────────────────────────────────────────────────────────────────────────────────────


def evaluation_page(folder: Path, num_bags: int, photo: Path, floors: tuple[str, ...] = ("constant",)) -> Page:
    """Bag i has CIDEr i."""
    samples = [Sample(id=f"bag {i}", images=(photo,) * 20, captions=(f"reference {i}",)) for i in range(num_bags)]
    results = {
        "metrics": {"BLEU@4": 0.25, "CIDEr": 1.5},
        "floors": {name: {"BLEU@4": 0.125, "CIDEr": 0.5} for name in floors},
        "cider_of_each": {sample.id: float(i) for i, sample in enumerate(samples)},
        "num_bags": num_bags,
        "num_references": num_bags,
        "num_unreadable_bags": 0,
        "split": "test",
        "seed": 0,
        "model": str(folder / "run" / "best"),
    }
    captions = {sample.id: f"caption of {sample.id}" for sample in samples}
    write_evaluation_report(folder / "page.html", results, captions, samples, settings={"seed": 0})
    return Page(folder / "page.html")


def write_run(folder: Path, losses: list[float]) -> Path:
    """What the folder of a run holds of its log; a checkpoint after the first epoch."""
    (folder / "best").mkdir(parents=True)
    (folder / "checkpoint-1").mkdir()
    for file in (folder / "config.yaml", folder / "best" / "config.yaml"):
        file.write_text(f"output_dir: {folder.name}\n")
    log = write_log(folder / "log.jsonl", losses, losses).read_text().splitlines()
    state = {"global_step": 1, "log_history": [json.loads(log[0])]}
    (folder / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_curves_are_those_of_the_run_that_made_the_model(tmp_path):
    first, second = write_run(tmp_path / "a", [3.0, 2.0]), write_run(tmp_path / "b", [4.0, 1.0])
    for run in (first, second):
        assert training_log(run / "best") == training_log(run / "checkpoint-1") == run / "log.jsonl"
    (tmp_path / "link").symlink_to(first / "best")
    assert training_log(tmp_path / "link") == first / "log.jsonl"

    (first / "whole").mkdir()  # saved by hand, of whatever it may be
    assert training_log(first / "whole") is training_log(tmp_path / "nowhere" / "best") is None
    assert training_log(first) is training_log(Path("Salesforce/blip2-opt-2.7b")) is None
    shutil.copytree(second / "checkpoint-1", first / "checkpoint-2")
    shutil.rmtree(first / "best")
    shutil.copytree(second / "best", first / "best")
    assert training_log(first / "checkpoint-2") is training_log(first / "best") is None
    (second / "checkpoint-1" / "trainer_state.json").write_text('{"log_history": []}')  # nothing tells whose it is
    assert training_log(second / "checkpoint-1") is None


def test_an_evaluation_shows_floors_and_both_ends(tmp_path, example):
    page = evaluation_page(tmp_path, 20, example.images[1])
    assert page.text("th")[1:5] == ["CIDEr", "model", "Floor: one constant caption", "version"]
    assert page.text("td")[:4] == ["0.250", "1.500", "0.125", "0.500"]
    titles = page.text("h3")
    assert titles[NUM_EXAMPLES:] == [f"CIDEr {i}.00" for i in (19, 18, 17, 16, 0, 1, 2, 3)]
    assert len(set(titles[:NUM_EXAMPLES])) == NUM_EXAMPLES  # drawn by the seed
    assert "caption of bag 19" in page.text("dd") and "reference 0" in page.text("dd")
    assert len([image for image in page.all("img") if "jpeg" in image["src"]]) == 3 * NUM_EXAMPLES * MOST_PHOTOS
    assert "Training" not in page.text("h2")


def test_an_evaluation_of_two_bags_without_floors(tmp_path, example):
    write_run(tmp_path / "run", [1.0])
    page = evaluation_page(tmp_path, 2, example.images[1], floors=())
    assert "Training" in page.text("h2")
    assert page.text("h3") == [*page.text("h3")[:2], "CIDEr 1.00", "CIDEr 0.00", "CIDEr 0.00", "CIDEr 1.00"]
    assert "There are no floors" in page.text("p")[1] and "could not be read" not in page.text("p")[1]
    assert "Training" in page.text("h2")


@pytest.mark.parametrize("cell", ["1", "-1.5", "−1.5", "+0.2", "12 %", "< 0.01", "[0.1, 0.2]", "(3)", "–", ""])
def test_numbers(cell):
    assert is_number(cell)


@pytest.mark.parametrize("cell", ["absent", "n/a", "-x", "mivpg 2"])
def test_words(cell):
    assert not is_number(cell)


def bar_ends(svg: bytes, colour: str) -> list[tuple[float, float]]:
    """Where each bar of a colour begins and ends."""
    paths = re.findall(rf'<path d="([^"]+)"[^>]*style="fill: {colour}"'.encode(), svg)
    ends = []
    for path in paths:
        x = [float(value) for value in re.findall(rb"[ML] (\S+)", path)]
        ends.append((min(x), max(x)))
    return ends


def test_bars_are_as_long_as_their_values(chart):
    svg = draw_chart(chart)
    (quarter, negative_half), (whole,) = bar_ends(svg, report.GREY), bar_ends(svg, report.ACCENT)
    assert quarter[0] == negative_half[1] == whole[0]  # zero
    length = whole[1] - whole[0]
    assert (quarter[1] - quarter[0]) / length == pytest.approx(0.25, abs=1e-4)
    assert (negative_half[1] - negative_half[0]) / length == pytest.approx(0.5, abs=1e-4)


def test_a_chart_in_words(chart):
    assert chart.alt == (
        "Bar chart. few photos: zero_shot 0.25, mivpg 1.00 (0.90 to 1.10); many photos: zero_shot −0.50."
    )
    assert BarChart(title="", bars={"": {"a": 1234.5, "b": 3.0}}).alt == "Bar chart. a 1234, b 3."
    assert BarChart(title="", bars={"": {"a": 0.0}}).alt == "Bar chart. a 0."


def test_a_chart_needs_no_font_of_the_machine(chart):
    assert b"<text" not in draw_chart(chart)


def test_a_missing_photo_leaves_the_old_files(tmp_path, example):
    out = tmp_path / "out"
    parts = [Examples(title="e", examples=[example], emphasised="mivpg")]
    write_report(out / "a.html", title="t", lead="l", parts=parts)
    draw_example(example, "mivpg", out / "a.png")
    before = {path: path.read_bytes() for path in out.iterdir()}
    example.images[2].unlink()
    with pytest.raises(BagError, match=r"c\.png does not exist"):
        write_report(out / "a.html", title="t", lead="l", parts=parts)
    with pytest.raises(BagError, match=r"c\.png does not exist"):
        draw_example(example, "mivpg", out / "a.png")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    write_report(tmp_path / "a.html", title="t", lead="l", parts=[])
    before = (tmp_path / "a.html").read_bytes()

    def write_half(path: Path, content: bytes) -> None:
        assert path != tmp_path / "a.html"
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path / "a.html", title="new", lead="l", parts=[])
    assert (tmp_path / "a.html").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "a.html"]


def test_half_a_surrogate_pair_stops_nothing(tmp_path, example):
    broken = BagExample(**(vars(example) | {"captions": {"mivpg": "a \ud83d lamp"}}))
    write_report(
        tmp_path / "a.html", title="t", lead="l", parts=[Examples(title="e", examples=[broken], emphasised="mivpg")]
    )
    assert Page(tmp_path / "a.html").text("dd")[0] == "a ? lamp"
    draw_example(broken, "mivpg", tmp_path / "drawn.png")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def test_a_picture_shows_photos_and_weights(tmp_path, example):
    draw_example(example, "mivpg", tmp_path / "drawn.png")
    drawn = pixels(tmp_path / "drawn.png")
    assert drawn.shape[1] == 1200 and 400 < drawn.shape[0] < 700
    red = (np.abs(drawn.astype(int) - (255, 0, 0)) < 5).all(axis=-1)
    assert np.flatnonzero(red.any(axis=0)).tolist() == [*range(41, 339), *range(393, 618), 821]  # inside the frames
    filled = (drawn == ImageColor.getrgb(report.ACCENT)).all(axis=-1)
    assert set(np.flatnonzero(filled.any(axis=0)).tolist()) == {*range(40, 115), *range(356, 581)}  # 75 and 225 of 300


@pytest.mark.parametrize("num_images", [1, 8, 21])
def test_long_words_stay_inside_the_picture(tmp_path, example, num_images):
    long = BagExample(
        **vars(example)
        | {
            "images": example.images[:1] * num_images,
            "weights": [1 / num_images] * num_images,
            "references": [LONG],
            "captions": {"mivpg": LONG},
        }
    )
    draw_example(long, "mivpg", tmp_path / "drawn.png")
    drawn = pixels(tmp_path / "drawn.png")
    inked = (drawn != 255).any(axis=-1)
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    assert columns.min() >= 38 and columns.max() <= 1200 - 38  # a letter may lean out by a pixel or two
    assert rows.min() == 40 and drawn.shape[0] - rows.max() >= 38
    assert drawn.shape[0] < 2000


def test_wrapping_keeps_every_word():
    font = report.load_font(38, bold=True)
    lines = report.wrap(LONG, font, 1000)
    assert max(font.getlength(line) for line in lines) <= 1000
    assert "".join(lines).replace(" ", "") == LONG.replace(" ", "")
    assert report.wrap("two\n words", font, 1000) == ["two words"]
    assert report.wrap("", font, 1000) == [""]
