"""Results for people to read: one HTML page with everything inside, and one picture of one bag.

    write_report(out / "report.html", title="Demo", lead="What was run.", parts=[Table(…), BarChart(…), Examples(…)])
    draw_example(example, "mivpg", out / "example.png")

Whatever comes from data, captions above all, is text on the page and never markup.
"""

import io
import json
import math
import textwrap
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import matplotlib
import matplotlib.style
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from mivpg.files import write_whole
from mivpg.images import open_image
from mivpg.templating import make_environment
from mivpg.versions import installed_versions

THUMBNAIL_SIDE = 200
"""Longest side of a photo on the page, in pixels."""

INK, MUTED, GREY, PALE, ACCENT = "#22262b", "#646b75", "#a3abb5", "#d5d9de", "#2f6690"
"""The page has the same colours, and others in the dark."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers to compare; a column of nothing but numbers is set to the right."""

    kind: ClassVar[str] = "table"

    title: str
    note: str = ""
    columns: Sequence[str]
    """A heading for each cell of a row; the first, above the rows' names, may be empty."""
    rows: Sequence[Sequence[str]]
    """Each row's name and its cells, as they are to be read."""
    emphasised: Sequence[str] = ()
    """Names of the rows in bold."""

    def is_numeric(self, column: int) -> bool:
        return all(is_number(row[column]) for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class BarChart:
    """Values of one unit as bars from zero, the value written beside each."""

    kind: ClassVar[str] = "chart"

    title: str
    note: str = ""
    bars: Mapping[str, Mapping[str, float]]
    """Group to name to value. A single group may have the empty name."""
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """Group to name to the lower and upper end of a line drawn over that bar; any may be missing."""
    emphasised: str = ""
    """The name whose bars stand out."""

    def format(self, value: float) -> str:
        """With as many decimals for every value as show three figures of the largest."""
        largest = max(abs(value) for values in self.bars.values() for value in values.values())
        decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 0
        return f"{value:.{decimals}f}".replace("-", "−")

    @property
    def alt(self) -> str:
        """The chart in words, for those who do not see it."""
        groups = []
        for group, values in self.bars.items():
            words = []
            for name, value in values.items():
                interval = self.intervals.get(group, {}).get(name)
                ends = "" if interval is None else f" ({' to '.join(map(self.format, interval))})"
                words.append(f"{name} {self.format(value)}{ends}")
            groups.append(f"{group}: {', '.join(words)}" if group else ", ".join(words))
        return f"Bar chart. {'; '.join(groups)}."


@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs under a heading."""

    kind: ClassVar[str] = "text"

    title: str
    paragraphs: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure that exists as a PNG already."""

    kind: ClassVar[str] = "picture"

    title: str
    note: str = ""
    png: bytes
    alt: str
    """What it shows, for those who do not see it."""
    is_chart: bool = False
    """Whether it is drawn as charts are: narrow, dark on a transparent ground."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Text that keeps its lines, such as a configuration in YAML."""

    kind: ClassVar[str] = "listing"

    title: str
    note: str = ""
    text: str


@dataclass(frozen=True, kw_only=True)
class BagExample:
    """One bag, what was written about it and what models wrote."""

    id: str
    title: str
    images: Sequence[Path]
    """The main photo first; none, where a bag holds features."""
    weights: Sequence[float] | None
    """How much each photo counted, summing to one."""
    references: Sequence[str]
    captions: Mapping[str, str]
    """System to caption, in the order to show."""

    def __post_init__(self) -> None:
        assert self.weights is None or len(self.weights) == len(self.images)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Bags with their photos and captions."""

    kind: ClassVar[str] = "examples"

    title: str
    note: str = ""
    examples: Sequence[BagExample]
    emphasised: str
    """The system whose caption stands first, in bold."""


Part = Table | BarChart | Text | Picture | Listing | Examples
"""A section of a report."""


def write_report(path: Path, *, title: str, lead: str, parts: Sequence[Part]) -> None:
    """Writes one page that needs nothing else: pictures and styles inside, no script, nothing from the network.

    The same parts give the same bytes. The file is written whole or not at all.

    Args:
        path: The HTML file; its folder is made if need be.
        title: Heading of the page and name of its tab.
        lead: What the page is about, in a sentence or three.
        parts: The sections, in order.

    Raises:
        BagError: A photo cannot be read.
    """
    environment = make_environment(is_html=True)
    environment.filters |= {"thumbnail": thumbnail, "draw_chart": draw_chart, "data_uri": data_uri, "percent": percent}
    page = environment.get_template("report.html.jinja").render(title=title, lead=lead, parts=parts)
    write_whole(path, page.encode(errors="replace"))  # half a surrogate pair, which JSON can hold, has no UTF-8


def what_was_run(settings: Mapping[str, Any]) -> list[Part]:
    """The last sections of every report: the configuration as YAML, and the versions that ran it."""
    plain = json.loads(json.dumps(settings, default=str))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return [
        Listing(title="Configuration", text=text),
        Table(title="Versions", columns=["", "version"], rows=[[*item] for item in installed_versions().items()]),
    ]


def training_curves(logs: Mapping[str, Path], *, title: str = "Training") -> list[Part]:
    """Loss and validation CIDEr over epochs, a line a run.

    Args:
        logs: Name to `log.jsonl` of a run folder.
        title: Of the section.

    Returns:
        One section, or none where none of the logs is there.
    """
    runs = {
        name: [json.loads(line) for line in log.read_text().splitlines()] for name, log in logs.items() if log.exists()
    }
    if not runs:
        return []
    words = []
    for name, entries in runs.items():
        of_run = [f"{what} {of_entries[-1][1]:.3f}" for what, of_entries in _curves(entries).items() if of_entries]
        words.append(f"{name} {', '.join(of_run)}")
    note = (
        "The loss is the mean of some steps; CIDEr is that of the validation split, by which the best epoch is chosen."
    )
    alt = f"Curves over epochs; at the end: {'; '.join(words)}."
    return [Picture(title=title, note=note, png=draw_training(runs), alt=alt, is_chart=True)]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation of values over seeds, for a cell."""
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{deviation}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def is_number(cell: str) -> bool:
    """Whether a cell begins like a number (-0.03 [-0.05, 0.01]) or says that there is none (–)."""
    return cell.lstrip("+-−–—±~≈<>≤≥[( ")[:1].isdigit() or not any(map(str.isalnum, cell))


def percent(weight: float) -> str:
    return f"{100 * weight:.0f}\N{NO-BREAK SPACE}%"


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{b64encode(content).decode()}"


def thumbnail(path: Path) -> bytes:
    """A small JPEG of a photo.

    Raises:
        BagError: As `open_image`.
    """
    image = open_image(path)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return as_jpeg(image)


def as_jpeg(image: Image.Image) -> bytes:
    """A small file of it."""
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=85, comment=b"")  # Pillow would copy the comment of a JPEG
    return jpeg.getvalue()


# ── The chart ───────────────────────────────────────────────────────────────────────────────────────────────────────

CHART_WIDTH = 360
"""In points; narrow, so that its letters can still be read on a phone."""

CHART_STYLE = {
    "svg.fonttype": "path",  # looks the same on every machine
    "svg.hashsalt": "mivpg",  # ids are random without one
    "text.parse_math": False,  # a name may hold a dollar
    "font.size": 12,
    "axes.edgecolor": PALE,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": PALE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": PALE,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.color": INK,
    "ytick.major.size": 0,
}


def draw_chart(chart: BarChart) -> bytes:
    """An SVG on a transparent ground: a line a bar, group under group, names at the left and values at the right."""
    rows: list[tuple[str, float | None, tuple[float, float] | None, bool]] = []  # label, value, interval, is bold
    for group, values in chart.bars.items():
        intervals = chart.intervals.get(group, {})
        rows += [(group, None, None, True)] if group else []
        rows += [(name, values[name], intervals.get(name), name == chart.emphasised) for name in values]
    labels = [textwrap.fill(label, 20) for label, *_ in rows]
    heights = [10 + 15 * len(label.splitlines()) for label in labels]  # in points, as the data's y below
    gaps = [8 if value is None else 0 for _, value, *_ in rows]  # above a group
    ends = list(accumulate(gap + height for gap, height in zip(gaps, heights, strict=True)))
    middles = [end - height / 2 for end, height in zip(ends, heights, strict=True)]

    with matplotlib.style.context(["default", CHART_STYLE]):
        figure = Figure((CHART_WIDTH / 72, (ends[-1] + 32) / 72), layout="constrained")  # 72 points an inch
        axes = figure.add_subplot()
        axes.set_yticks(middles, labels)
        for tick, (_, value, interval, is_bold), y in zip(axes.get_yticklabels(), rows, middles, strict=True):
            weight = "bold" if is_bold else "normal"
            tick.set_fontweight(weight)
            if value is None:
                continue
            axes.barh(y, value, height=16, color=ACCENT if is_bold else GREY)
            if interval is not None:
                axes.hlines(y, *interval, color=INK, linewidth=1.5)
            axes.annotate(
                chart.format(value),
                (1, y),
                xycoords=("axes fraction", "data"),
                xytext=(52, 0),
                textcoords="offset points",
                horizontalalignment="right",
                verticalalignment="center_baseline",
                fontweight=weight,
            )
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_ylim(ends[-1], 0)  # from the top down
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.locator_params(axis="x", nbins=4)
        svg = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # else the hour and web addresses stand there
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    return svg.getvalue()


# ── Curves ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(epoch, value) of what a run logged."""
    keys = {"loss": "loss", "CIDEr": "eval_CIDEr"}
    return {
        what: [(entry["epoch"], entry[key]) for entry in entries if entry.get(key) is not None]
        for what, key in keys.items()
    }


def draw_training(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG: the loss above, validation CIDEr below it where there is one.

    Args:
        runs: Name to the entries of its `log.jsonl`.
    """
    curves = {textwrap.fill(name, 44): _curves(entries) for name, entries in runs.items()}
    panels = [what for what in ("loss", "CIDEr") if any(of_run[what] for of_run in curves.values())]
    num_columns = 2 if max(map(len, curves)) <= 20 else 1
    num_lines = sum(name.count("\n") + 1 for name in curves)
    height = 2.2 * len(panels) + 0.22 * math.ceil(num_lines / num_columns) + 0.2
    with matplotlib.style.context(["default", {"font.size": 11, "axes.edgecolor": PALE, "text.parse_math": False}]):
        figure = Figure((CHART_WIDTH / 72, height), layout="constrained")
        for number, what in enumerate(panels, start=1):
            axes = figure.add_subplot(len(panels), 1, number)
            for index, (name, of_run) in enumerate(curves.items()):
                style = "-" if index < 10 else "--"  # after ten the colours begin again
                marker = "." if what == "CIDEr" or len(of_run[what]) == 1 else ""  # one point makes no line
                axes.plot(*zip(*of_run[what] or [(math.nan, math.nan)], strict=True), style, marker=marker, label=name)
            axes.set(ylabel=what)
            axes.grid(color=PALE, linewidth=0.5)
            axes.spines[["right", "top"]].set_visible(False)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if number == len(panels):
                axes.set_xlabel("epoch")
                handles, labels = axes.get_legend_handles_labels()
                figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, frameon=False)
        png = io.BytesIO()
        figure.savefig(png, dpi=200, transparent=True, metadata={"Software": None})
    return png.getvalue()


# ── The picture ─────────────────────────────────────────────────────────────────────────────────────────────────────

WIDTH, MARGIN, GAP = 1200, 40, 16
PHOTOS_IN_A_ROW = 8
LARGEST_SIDE = 300
"""Of the square that a photo is fitted into, in pixels; less where there are many photos."""
UNDER_PHOTO = 64
"""Height for the bar and the line below it."""


def draw_example(example: BagExample, system: str, path: Path) -> None:
    """Draws a bag as a PNG: photos in a row, under each its weight, below them one caption and the first reference.

    The file is written whole or not at all.

    Args:
        example: The bag, of at least one photo.
        system: Whose caption.
        path: The PNG file; its folder is made if need be.

    Raises:
        BagError: A photo cannot be read.
    """
    columns = min(len(example.images), PHOTOS_IN_A_ROW)
    width = WIDTH - 2 * MARGIN
    side = min(LARGEST_SIDE, (width - GAP * (columns - 1)) // columns)
    row = side + UNDER_PHOTO

    small, medium, large = load_font(20), load_font(24), load_font(38, bold=True)
    text = [(system, small, MUTED)]
    text += [(line, large, INK) for line in wrap(example.captions[system], large, width)]
    for reference in example.references[:1]:
        line, *rest = wrap(f"reference: {reference}", medium, width - medium.getlength(" …"))
        text.append((f"{line} …" if rest else line, medium, MUTED))

    y = MARGIN + row * math.ceil(len(example.images) / columns)
    picture = Image.new("RGB", (WIDTH, y + sum(line_height(font) for _, font, _ in text) + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for index, image in enumerate(example.images):
        left, top = MARGIN + index % columns * (side + GAP), MARGIN + index // columns * row
        photo = fit(open_image(image), side)
        picture.paste(photo, (left + (side - photo.width) // 2, top + (side - photo.height) // 2))
        draw.rectangle((left, top, left + side - 1, top + side - 1), outline=PALE)
        bottom = top + side + 8
        if index == 0:
            draw.text((left, bottom + 14), "main", MUTED, small)
        if example.weights is not None:
            weight = example.weights[index]
            draw.rectangle((left, bottom, left + side - 1, bottom + 7), fill=PALE)
            if filled := round(weight * side):  # Pillow refuses a rectangle without width
                draw.rectangle((left, bottom, left + filled - 1, bottom + 7), fill=ACCENT)
            draw.text((left + side, bottom + 14), percent(weight), INK, small, anchor="ra")
    for line, font, colour in text:
        y += line_height(font)
        draw.text((MARGIN, y), line, colour, font, anchor="ld")

    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    write_whole(path, png.getvalue())


def load_font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu as matplotlib brings it, in pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(1.4 * font.size)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines no wider than `width`; a word that is wider than a line is broken."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        elif lines[-1]:
            lines[-1] += " "
        for character in word:
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def fit(photo: Image.Image, side: int) -> Image.Image:
    """Small ones grow, too."""
    scale = side / max(photo.size)
    return photo.resize((max(1, round(scale * photo.width)), max(1, round(scale * photo.height))))
