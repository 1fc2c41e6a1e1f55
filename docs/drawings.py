"""The drawings of the pages, as SVG: `python docs/drawings.py` writes them into docs/images.

Each is on white, so that it can be read on a light page or a dark one, and narrow, so that a phone, whose column of
text is about 360 pixels wide, shows its letters hardly smaller.
"""

from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
WIDTH = 420

INK, LINE = "#263238", "#546e7a"
FILLS = {
    "data": ("#ffffff", "#546e7a"),
    "frozen": ("#eceff1", "#90a4ae"),
    "trained": ("#fff3e0", "#ef6c00"),
    "added": ("#e3f2fd", "#1565c0"),
}
"""Fill and outline: tensors, frozen models, what BLIP-2 trains, and what MIVPG adds to it."""
COLOURS = ("#1e88e5", "#e53935", "#43a047", "#fdd835", "#8e24aa", "#fb8c00")


class Drawing:
    """An SVG that is put together shape by shape; all numbers are pixels, from the upper left corner."""

    def __init__(self, height: int, title: str):
        self.height, self.title = height, title
        self.shapes: list[str] = []

    def add(self, shape: str) -> None:
        self.shapes.append(shape)

    def text(
        self, x: float, y: float, words: str, *, size: float = 13.5, anchor: str = "middle", weight: str = ""
    ) -> None:
        bold = f' font-weight="{weight}"' if weight else ""
        self.add(f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"{bold}>{escape(words)}</text>')

    def rectangle(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = LINE, radius: int = 0
    ) -> None:
        self.add(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" stroke="{stroke}"/>'
        )

    def box(self, x: float, y: float, width: float, height: float, *lines: str, kind: str = "data") -> None:
        """A labelled box; the first line is bold."""
        self.rectangle(x, y, width, height, *FILLS[kind], radius=6)
        top = y + height / 2 + 5 - 8.5 * (len(lines) - 1)
        for number, line in enumerate(lines):
            size, weight = (15, "bold") if number == 0 else (13.5, "")
            self.text(x + width / 2, top + 17 * number, line, size=size, weight=weight)

    def path(self, points: str, fill: str = "none", stroke: str = LINE) -> None:
        self.add(f'<path d="{points}" fill="{fill}" stroke="{stroke}" stroke-linejoin="round"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        line = " ".join(f"{x},{y}" for x, y in points)
        self.add(f'<polyline points="{line}" fill="none" stroke="{LINE}" stroke-width="1.6" marker-end="url(#head)"/>')

    def squares(self, x: float, y: float, colours: list[str], *, size: int = 18, gap: int = 4) -> None:
        """Squares in a row."""
        for number, colour in enumerate(colours):
            self.rectangle(x + number * (size + gap), y, size, size, colour)

    def legend(self, y: float) -> None:
        names = {
            "frozen": "frozen",
            "trained": "BLIP-2's, trained",
            "data": "data",
            "added": "MIVPG's own, trained",
        }
        for number, (kind, name) in enumerate(names.items()):
            x, line = 20 + 200 * (number % 2), y + 22 * (number // 2)
            self.rectangle(x, line - 12, 14, 14, *FILLS[kind], radius=3)
            self.text(x + 22, line, name, anchor="start")

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" font-family="Helvetica, Arial, sans-serif" fill="{INK}" role="img">'
        )
        marker = (
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{LINE}"/></marker></defs>'
        )
        paper = f'<rect width="{WIDTH}" height="{self.height}" fill="#ffffff"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", marker, paper, *self.shapes, "</svg>"]) + "\n"


def draw_bags() -> Drawing:
    """Figure 1: what a bag is."""
    d = Drawing(488, "Two bags: four photos of a chair, and the tiles of a slide")
    wood, seat = "#d7b48a", "#c62828"
    d.text(210, 24, "a product's photos", size=16, weight="bold")
    left = dict(zip(("front", "side", "back", "underside"), (18, 118, 218, 318), strict=True))
    for name, x in left.items():
        d.rectangle(x, 40, 84, 84, "#fafafa")
        d.text(x + 42, 142, name)
    for x, back in ((left["front"], seat), (left["back"], "#1e88e5")):  # blue, which the front does not show
        d.rectangle(x + 29, 52, 26, 32, back)
        d.rectangle(x + 25, 84, 34, 7, seat)
        for leg in (27, 53):
            d.rectangle(x + leg, 91, 4, 22, wood)
    x = left["side"]
    d.rectangle(x + 25, 52, 6, 32, "#1e88e5")
    d.rectangle(x + 25, 84, 34, 7, seat)
    for leg in (25, 55):
        d.rectangle(x + leg, 91, 4, 22, wood)
    x = left["underside"]
    d.rectangle(x + 21, 61, 42, 42, wood)
    for foot, y in ((24, 64), (54, 64), (24, 94), (54, 94)):
        d.rectangle(x + foot, y, 6, 6, "#8d6e63")
    d.arrow((210, 152), (210, 178))
    d.text(210, 200, "“a red chair with a blue back”", size=15)
    d.text(210, 226, "N images of P = 257 tokens each, pooled to N instances")

    d.text(210, 274, "a slide's tiles", size=16, weight="bold")
    d.rectangle(70, 290, 280, 100, "#fafafa")
    tissue = (
        "M95,346 C100,306 170,296 210,314 C250,296 325,308 325,344 C320,381 230,371 200,378 C150,384 98,381 95,346 z"
    )
    d.path(tissue, "#f3c6dc", "#ad6a8d")
    tiles = {3: range(4, 10), 4: range(1, 10), 5: range(1, 10), 6: range(2, 9)}
    for row, columns in tiles.items():
        for column in columns:
            d.rectangle(90 + 22 * column, 312 + 18 * (row - 3), 20, 16, "none", "#6a1b4d")
    d.arrow((210, 398), (210, 424))
    d.text(210, 446, "“moderately differentiated adenocarcinoma”", size=15)
    d.text(210, 472, "N images (up to 1,860), one CLS token each: N instances")
    return d


def draw_model() -> Drawing:
    """Figure 2c: from images to the caption."""
    d = Drawing(480, "From a bag of images through MIVPG to a caption")
    for shift in (12, 6, 0):
        d.rectangle(30 + shift, 16 + shift, 84, 44, "#ffffff")
    d.text(72, 43, "images", size=15, weight="bold")
    d.text(200, 36, "(B, N, 3, h, w)")
    d.arrow((130, 46), (258, 46))
    d.box(260, 16, 150, 60, "vision model", "ViT", kind="frozen")
    d.arrow((335, 78), (335, 152))
    d.text(325, 110, "image_embeds", anchor="end")
    d.text(325, 128, "(B, N, P, D)", anchor="end")
    d.box(260, 154, 150, 60, "patch pooling", "AB-MIL, Eq. 4", kind="added")
    d.arrow((258, 184), (168, 184))
    d.text(213, 176, "instances")
    d.text(213, 202, "(B, M, D)")
    d.box(10, 94, 156, 34, "R query tokens", kind="trained")
    d.arrow((88, 130), (88, 152))
    d.box(10, 154, 156, 60, "MIVPG", "Q-Former + CSA, PPEG", kind="trained")
    d.arrow((88, 216), (88, 272))
    d.text(98, 240, "what the R queries have read", anchor="start")
    d.text(98, 258, "(B, R, H)", anchor="start")
    d.box(10, 274, 140, 60, "projection", "linear, H → E", kind="trained")
    d.arrow((152, 304), (182, 304))
    d.squares(186, 295, [FILLS["trained"][0]] * 6)
    d.text(251, 286, "visual prompts")
    d.text(251, 332, "(B, R, E)")
    d.squares(328, 295, ["#ffffff"] * 4)
    d.text(370, 286, "prompt text")
    d.text(370, 332, "“a photo of”")
    d.arrow((315, 318), (315, 352))
    d.box(240, 354, 170, 60, "language model", "OPT, T5, Llama …", kind="frozen")
    d.arrow((238, 384), (150, 384))
    d.text(96, 380, "caption", size=15, weight="bold")
    d.text(96, 400, "“a chair …”")
    d.legend(446)
    return d


def draw_block() -> Drawing:
    """Figures 2a and 7: one block of MIVPG, and where such blocks stand."""
    d = Drawing(660, "A block of MIVPG and the stack of twelve blocks")
    d.text(210, 22, "a block with cross-attention", size=16, weight="bold")
    d.text(105, 50, "instances x")
    d.text(105, 68, "(B, M, D)")
    d.text(315, 50, "queries q of the")
    d.text(315, 68, "block before (B, R, H)")
    d.arrow((105, 76), (105, 104))
    d.box(15, 106, 180, 54, "PPEG", "x ← x + PPEG(x)", kind="added")
    d.arrow((105, 162), (105, 192))
    d.box(15, 194, 180, 72, "CSA (Eq. 9)", "Q = x,  K = V = q", "x ← x + W_o Attention", kind="added")
    d.arrow((315, 76), (315, 182))
    d.arrow((315, 124), (212, 124), (212, 230), (197, 230))
    d.box(227, 184, 180, 54, "self-attention", "among the queries", kind="trained")
    d.arrow((315, 240), (315, 288))
    d.box(227, 290, 180, 72, "cross-attention", "Q = q,  K = V = x", "Eq. 6", kind="trained")
    d.arrow((105, 268), (105, 326), (225, 326))
    d.arrow((315, 364), (315, 390))
    d.box(227, 392, 180, 44, "feed-forward", kind="trained")
    d.arrow((105, 326), (105, 462))
    d.arrow((315, 438), (315, 462))
    d.text(105, 480, "x for the next block")
    d.text(315, 480, "q for the next block")

    d.text(210, 524, "the stack: R = 32 queries through twelve blocks", size=15, weight="bold")
    d.text(10, 550, "even blocks read instances, odd ones see queries alone", anchor="start")
    for number in range(12):
        x = 10 + 34 * number
        d.rectangle(x, 576, 26, 26, *FILLS["trained"], radius=4)
        d.text(x + 13, 594, str(number))
        if number % 2 == 0:
            d.arrow((x + 13, 556), (x + 13, 575))
        if number < 11:
            d.path(f"M{x + 26},589 h8")
    d.legend(626)
    return d


def draw_pooling() -> Drawing:
    """Figure 2b: weighted pooling, and what a query makes of it."""
    d = Drawing(530, "AB-MIL has one row of weights, cross-attention one for every query and head")
    colours = list(COLOURS)
    alphas = (0.08, 0.30, 0.12, 0.06, 0.34, 0.10)
    left, pitch = 80, 40

    d.text(210, 24, "AB-MIL: one row of weights", size=16, weight="bold")
    d.text(left - 12, 62, "x", size=15, anchor="end")
    d.squares(left, 44, colours, size=26, gap=pitch - 26)
    for number, alpha in enumerate(alphas):
        d.rectangle(left + pitch * number, 138 - 150 * alpha, 26, 150 * alpha, "#b0bec5")
        d.text(left + 13 + pitch * number, 155, f"{alpha:.2f}".lstrip("0"))
    d.text(left - 12, 120, "α", size=15, anchor="end")
    d.arrow((left + 113, 164), (left + 113, 188))
    d.box(left + 53, 190, 120, 36, "z = Σ α x", kind="added")
    d.text(210, 250, "one vector an image (Eq. 3, 4)")

    d.text(210, 300, "cross-attention: a row for each query", size=16, weight="bold")
    d.text(left - 12, 338, "x", size=15, anchor="end")
    d.squares(left, 320, colours, size=26, gap=pitch - 26)
    rows = ((0.05, 0.5, 0.1, 0.1, 0.2, 0.05), (0.3, 0.1, 0.05, 0.05, 0.4, 0.1), (0.1, 0.1, 0.4, 0.25, 0.05, 0.1))
    for row, weights in enumerate(rows):
        y = 364 + 32 * row
        for number, weight in enumerate(weights):
            grey = round(255 - 330 * weight)
            d.rectangle(left + pitch * number, y, 26, 24, f"#{grey:02x}{grey:02x}ff")
        d.text(left - 12, y + 17, f"q{'₁₂₃'[row]}", size=15, anchor="end")
        d.arrow((left + 232, y + 12), (left + 254, y + 12))
        d.box(left + 256, y, 40, 24, f"z{'₁₂₃'[row]}", kind="trained")
    d.text(210, 484, "every row sums to one")
    d.text(210, 504, "R vectors a bag, in each of A heads (Eq. 6):")
    d.text(210, 522, "a multi-head multiple-instance pooling")
    return d


def draw_scenarios() -> Drawing:
    """Figure 3 as we read it: bags of patches, bags of images, and one path for all."""
    d = Drawing(494, "Three kinds of bags go one way to 32 visual prompts")
    for x, name in ((42, "images"), (148, "tokens"), (282, "instances"), (376, "prompts")):
        d.text(x, 24, name, size=15, weight="bold")
    rows = (
        ("one picture", 1, "N = 1, P = 257", "every token an instance, M = P", "none", "PPEG, no CSA"),
        ("tiles of a slide", 4, "N ≤ 1,860, CLS alone", "one instance a tile, M = N", "cls", "CSA"),
        ("several photos", 3, "N = 2 … 21, P = 257", "one instance a photo, M = N", "abmil", "CSA, no PPEG"),
    )
    for number, (name, images, tokens, instances, pooling, options) in enumerate(rows):
        y = 40 + 136 * number
        d.rectangle(6, y, 408, 126, "#fafafa", "#cfd8dc", radius=8)
        for image in range(images):
            d.rectangle(14 + 10 * image, y + 14 + 6 * image, 26, 26, COLOURS[image])
        d.arrow((76, y + 36), (93, y + 36))
        if pooling == "cls":
            d.squares(112, y + 28, list(COLOURS[:4]), size=15)
        else:
            for image in range(images):
                left = 132.5 - 18 * (images - 1) + 36 * image
                for row in range(3):
                    d.squares(left, y + 20 + 11 * row, [COLOURS[image]] * 3, size=9, gap=2)
        d.arrow((204, y + 36), (238, y + 36))
        d.text(219, y + 28, pooling)
        if pooling == "none":
            d.squares(242, y + 32, [COLOURS[0]] * 9, size=7, gap=2)
        else:
            d.squares(284 - 11 * images, y + 27, list(COLOURS[:images]))
        d.arrow((328, y + 36), (344, y + 36))
        d.box(346, y + 18, 60, 36, "MIVPG", kind="trained")
        d.text(16, y + 92, name, anchor="start", size=14, weight="bold")
        d.text(404, y + 92, tokens, anchor="end")
        d.text(16, y + 114, instances, anchor="start")
        d.text(404, y + 114, options, anchor="end")
    d.text(210, 466, "One path with three settings: patch_pooling,")
    d.text(210, 484, "instance_correlation, position_encoding")
    return d


def draw_permutations() -> Drawing:
    """What moves when instances or queries change places."""
    d = Drawing(370, "Instances change places: prompts stay. Queries change places: prompts do, too.")
    instances, queries = list(COLOURS[:4]), ["#90caf9", "#ffcc80", "#a5d6a7"]
    cases = (
        (70, ("as it was",), instances, queries, ("z₁ z₂ z₃",)),
        (210, ("instances", "permuted"), [instances[i] for i in (2, 0, 3, 1)], queries, ("z₁ z₂ z₃:", "the same")),
        (350, ("queries", "permuted"), instances, [queries[i] for i in (1, 2, 0)], ("z₂ z₃ z₁:", "likewise")),
    )
    for x, names, of_case, asked, outcome in cases:
        for line, name in enumerate(names):
            d.text(x, 24 + 19 * line, name, size=16, weight="bold")
        d.text(x, 70, "instances")
        d.squares(x - 42, 78, of_case)
        d.arrow((x, 102), (x, 126))
        d.box(x - 62, 128, 124, 60, kind="trained")
        d.text(x, 152, "Q-Former", size=15, weight="bold")
        d.text(x - 54, 178, "queries", anchor="start")
        d.squares(x + 8, 166, asked, size=14, gap=2)
        d.arrow((x, 190), (x, 214))
        d.squares(x - 31, 218, asked)
        d.text(x, 258, "visual prompts")
        for line, words in enumerate(outcome):
            d.text(x, 286 + 18 * line, words)
    d.text(210, 336, "invariant in the instances,", size=15, weight="bold")
    d.text(210, 356, "equivariant in the queries", size=15, weight="bold")
    return d


DRAWINGS = {
    "bags": draw_bags,
    "model": draw_model,
    "block": draw_block,
    "pooling": draw_pooling,
    "scenarios": draw_scenarios,
    "permutations": draw_permutations,
}


if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
