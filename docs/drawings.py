"""The drawings of the pages, as SVG: `python docs/drawings.py` writes them into docs/images.

Each is 700 pixels wide on white, so that it can be read in a column of text, on a light page or a dark one.
"""

from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
WIDTH = 700

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

    def text(self, x: float, y: float, words: str, *, size: int = 13, anchor: str = "middle", weight: str = "") -> None:
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
            size, weight = (14, "bold") if number == 0 else (12, "")
            self.text(x + width / 2, top + 17 * number, line, size=size, weight=weight)

    def path(self, points: str, fill: str = "none", stroke: str = LINE) -> None:
        self.add(f'<path d="{points}" fill="{fill}" stroke="{stroke}" stroke-linejoin="round"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        line = " ".join(f"{x},{y}" for x, y in points)
        self.add(f'<polyline points="{line}" fill="none" stroke="{LINE}" stroke-width="1.6" marker-end="url(#head)"/>')

    def squares(self, x: float, y: float, colours: list[str], *, size: int = 18, gap: int = 4, down: bool = False):
        """Squares in a row, or in a column."""
        for number, colour in enumerate(colours):
            step = number * (size + gap)
            self.rectangle(x + (0 if down else step), y + (step if down else 0), size, size, colour)

    def legend(self, y: float) -> None:
        names = {
            "frozen": "frozen",
            "trained": "BLIP-2's, trained",
            "added": "what MIVPG adds, trained",
            "data": "data",
        }
        x = 20.0
        for kind, name in names.items():
            self.rectangle(x, y - 11, 14, 14, *FILLS[kind], radius=3)
            self.text(x + 20, y, name, size=12, anchor="start")
            x += 50 + 7 * len(name)

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
    d = Drawing(270, "Two bags: four photos of a chair, and the tiles of a slide")
    wood, seat = "#d7b48a", "#c62828"
    d.text(160, 24, "a product's photos", size=15, weight="bold")
    for x, name in ((20, "front"), (92, "side"), (164, "back"), (236, "underside")):
        d.rectangle(x, 44, 66, 80, "#fafafa")
        d.text(x + 33, 142, name, size=12)
    for x, back in ((20, seat), (164, "#1e88e5")):  # the back is blue, which the front does not show
        d.rectangle(x + 20, 54, 26, 32, back)
        d.rectangle(x + 16, 86, 34, 7, seat)
        for leg in (18, 44):
            d.rectangle(x + leg, 93, 4, 22, wood)
    d.rectangle(108, 54, 6, 32, "#1e88e5")
    d.rectangle(108, 86, 34, 7, seat)
    for leg in (108, 138):
        d.rectangle(leg, 93, 4, 22, wood)
    d.rectangle(248, 62, 42, 42, wood)
    for x, y in ((251, 65), (281, 65), (251, 95), (281, 95)):
        d.rectangle(x, y, 6, 6, "#8d6e63")
    d.arrow((160, 152), (160, 184))
    d.text(160, 204, "“a red chair with a blue back”")
    d.text(160, 232, "N images of P = 257 tokens each;", size=12)
    d.text(160, 249, "pooled to N instances", size=12)

    d.text(540, 24, "a slide's tiles", size=15, weight="bold")
    d.rectangle(400, 44, 280, 100, "#fafafa")
    d.path("M425,100 C430,60 500,50 540,68 C580,50 655,62 655,98 C650,135 560,125 530,132 C480,138 428,135 425,100 z",
           "#f3c6dc", "#ad6a8d")  # fmt: skip
    tiles = {3: range(4, 10), 4: range(1, 11), 5: range(1, 11), 6: range(2, 9)}
    for row, columns in tiles.items():
        for column in columns:
            d.rectangle(420 + 22 * column, 66 + 18 * (row - 3), 20, 16, "none", "#6a1b4d")
    d.arrow((540, 152), (540, 184))
    d.text(540, 204, "“moderately differentiated adenocarcinoma”")
    d.text(540, 232, "N images (up to 1,860), one CLS token each;", size=12)
    d.text(540, 249, "N instances", size=12)
    return d


def draw_model() -> Drawing:
    """Figure 2c: from images to the caption."""
    d = Drawing(350, "From a bag of images through MIVPG to a caption")
    for shift in (12, 6, 0):
        d.rectangle(20 + shift, 72 - shift, 78, 56, "#ffffff")
    d.text(59, 98, "images", size=14, weight="bold")
    d.text(62, 150, "(B, N, 3, h, w)", size=12)
    d.arrow((112, 100), (146, 100))
    d.box(148, 72, 118, 56, "vision model", "ViT", kind="frozen")
    d.arrow((268, 100), (330, 100))
    d.text(300, 150, "image_embeds", size=12)
    d.text(300, 166, "(B, N, P, D)", size=12)
    d.box(332, 72, 118, 56, "patch pooling", "AB-MIL, Eq. 4", kind="added")
    d.arrow((452, 100), (536, 100))
    d.text(494, 150, "instances", size=12)
    d.text(494, 166, "(B, M, D)", size=12)
    d.box(538, 72, 142, 56, "MIVPG", "Q-Former + CSA, PPEG", kind="trained")
    d.box(538, 12, 142, 32, "R query tokens", kind="trained")
    d.arrow((609, 46), (609, 70))
    d.arrow((640, 130), (640, 190), (85, 190), (85, 218))
    d.text(420, 207, "what the R queries have read (B, R, H)", size=12)
    d.box(20, 220, 130, 56, "projection", "linear, H → E", kind="trained")
    d.arrow((152, 248), (186, 248))
    d.squares(190, 238, [FILLS["trained"][0]] * 6, size=20)
    d.text(262, 232, "visual prompts", size=12)
    d.text(262, 278, "R vectors (B, R, E)", size=12)
    d.squares(346, 238, ["#ffffff"] * 4, size=20)
    d.text(392, 232, "prompt text", size=12)
    d.text(394, 278, "“a photo of”", size=12)
    d.arrow((446, 248), (474, 248))
    d.box(476, 220, 126, 56, "language model", "OPT, T5, Llama …", kind="frozen")
    d.arrow((604, 248), (628, 248))
    d.text(663, 244, "caption", size=14, weight="bold")
    d.text(663, 262, "“a chair …”", size=12)
    d.legend(328)
    return d


def draw_block() -> Drawing:
    """Figures 2a and 7: one block of MIVPG, and where such blocks stand."""
    d = Drawing(500, "A block of MIVPG and the stack of twelve blocks")
    d.text(230, 22, "a block with cross-attention", size=15, weight="bold")
    d.text(120, 50, "instances x (B, M, D)")
    d.text(350, 50, "queries q of the block before (B, R, H)")
    d.arrow((120, 58), (120, 88))
    d.box(30, 90, 180, 50, "PPEG", "x ← x + PPEG(x)", kind="added")
    d.arrow((120, 142), (120, 178))
    d.box(30, 180, 180, 66, "CSA (Eq. 9)", "Q = x,  K = V = q", "x ← x + W_o Attention", kind="added")
    d.arrow((350, 58), (350, 168))
    d.arrow((350, 110), (240, 110), (240, 213), (212, 213))
    d.box(260, 170, 180, 50, "self-attention", "among the queries", kind="trained")
    d.arrow((350, 222), (350, 268))
    d.box(260, 270, 180, 66, "cross-attention", "Q = q,  K = V = x", "Eq. 6", kind="trained")
    d.arrow((120, 248), (120, 303), (258, 303))
    d.arrow((350, 338), (350, 368))
    d.box(260, 370, 180, 44, "feed-forward", kind="trained")
    d.arrow((120, 303), (120, 440))
    d.arrow((350, 416), (350, 440))
    d.text(120, 458, "x for the next block", size=12)
    d.text(350, 458, "q for the next block", size=12)

    d.text(590, 22, "the stack", size=15, weight="bold")
    d.text(590, 50, "R = 32 query tokens")
    d.arrow((590, 56), (590, 70))
    for number in range(12):
        with_cross = number % 2 == 0
        y = 72 + 29 * number
        d.rectangle(505, y, 170, 24, *FILLS["trained"], radius=5)
        d.text(590, y + 16, f"{number}   " + ("reads instances" if with_cross else "queries alone"), size=12)
    d.arrow((590, 418), (590, 440))
    d.text(590, 458, "to the language projection", size=12)
    d.legend(488)
    return d


def draw_pooling() -> Drawing:
    """Figure 2b: weighted pooling, and what a query makes of it."""
    d = Drawing(300, "AB-MIL has one row of weights, cross-attention one for every query and head")
    colours = list(COLOURS)
    alphas = (0.08, 0.30, 0.12, 0.06, 0.34, 0.10)
    d.text(170, 24, "AB-MIL: one row of weights", size=15, weight="bold")
    d.text(515, 24, "cross-attention: a row for each query", size=15, weight="bold")
    for left in (40, 390):
        d.squares(left, 46, colours, size=26, gap=14)
        d.text(left - 10, 64, "x", size=14, anchor="end")
    for number, alpha in enumerate(alphas):
        d.rectangle(40 + 40 * number, 140 - 150 * alpha, 26, 150 * alpha, "#b0bec5")
        d.text(53 + 40 * number, 156, f"{alpha:.2f}".lstrip("0"), size=12)
    d.text(30, 120, "α", size=14, anchor="end")
    d.arrow((155, 166), (155, 198))
    d.box(95, 200, 120, 36, "z = Σ α x", kind="added")
    d.text(155, 262, "one vector an image (Eq. 3, 4)", size=12)
    rows = ((0.05, 0.5, 0.1, 0.1, 0.2, 0.05), (0.3, 0.1, 0.05, 0.05, 0.4, 0.1), (0.1, 0.1, 0.4, 0.25, 0.05, 0.1))
    for row, weights in enumerate(rows):
        y = 90 + 30 * row
        for number, weight in enumerate(weights):
            grey = round(255 - 330 * weight)
            d.rectangle(390 + 40 * number, y, 26, 22, f"#{grey:02x}{grey:02x}ff")
        d.text(380, y + 16, f"q{'₁₂₃'[row]}", size=14, anchor="end")
        d.box(648, y, 36, 22, f"z{'₁₂₃'[row]}", kind="trained")
        d.arrow((624, y + 11), (646, y + 11))
    d.text(515, 206, "every row sums to one", size=12)
    d.text(515, 240, "R vectors a bag, in each of A heads (Eq. 6)", size=12)
    d.text(515, 262, "a multi-head multiple-instance pooling", size=12)
    return d


def draw_scenarios() -> Drawing:
    """Figure 3 as we read it: bags of patches, bags of images, and one path for all."""
    d = Drawing(370, "Three kinds of bags go one way to 32 visual prompts")
    for x, name in ((75, "images"), (225, "tokens of the vision model"), (425, "instances"), (610, "to 32 prompts")):
        d.text(x, 24, name, size=14, weight="bold")
    rows = (
        ("one picture", 1, "N = 1, P = 257", "every token: M = P", "none", "PPEG, no CSA"),
        ("tiles of a slide", 4, "N ≤ 1,860, CLS alone", "one a tile: M = N", "cls", "CSA"),
        ("several photos", 3, "N = 2 … 21, P = 257", "one a photo: M = N", "abmil", "CSA, no PPEG"),
    )
    for number, (name, images, tokens, instances, pooling, options) in enumerate(rows):
        y = 44 + 98 * number
        d.rectangle(10, y, 680, 88, "#fafafa", "#cfd8dc", radius=8)
        for image in range(images):
            d.rectangle(44 + 12 * image, y + 14 + 4 * image, 26, 26, COLOURS[image])
        d.text(75, y + 74, name, size=12)
        d.arrow((124, y + 36), (150, y + 36))
        if pooling == "cls":
            d.squares(190, y + 26, list(COLOURS[:4]), size=14)
        else:
            for image in range(images):
                left = 205 - 22 * (images - 1) + 46 * image
                for row in range(3):
                    d.squares(left, y + 14 + 14 * row, [COLOURS[image]] * 3, size=12, gap=2)
        d.text(225, y + 74, tokens, size=12)
        d.arrow((302, y + 36), (352, y + 36))
        d.text(327, y + 28, pooling, size=12)
        if pooling == "none":
            d.squares(359, y + 30, [COLOURS[0]] * 9, size=12, gap=3)
        else:
            d.squares(425 - 11 * images, y + 27, list(COLOURS[:images]))
        d.text(425, y + 74, instances, size=12)
        d.arrow((500, y + 36), (540, y + 36))
        d.box(542, y + 14, 136, 44, "MIVPG", options, kind="trained")
        d.text(610, y + 74, "32 visual prompts", size=12)
    d.text(350, 356, "One path with three settings: patch_pooling, instance_correlation, position_encoding", size=12)
    return d


def draw_permutations() -> Drawing:
    """What moves when instances or queries change places."""
    d = Drawing(310, "Instances change places: prompts stay. Queries change places: prompts do, too.")
    instances, queries = list(COLOURS[:4]), ["#90caf9", "#ffcc80", "#a5d6a7"]
    cases = (
        (60, "as it was", instances, queries),
        (280, "instances permuted", [instances[i] for i in (2, 0, 3, 1)], queries),
        (500, "queries permuted", instances, [queries[i] for i in (1, 2, 0)]),
    )
    for x, name, of_case, asked in cases:
        d.text(x + 70, 24, name, size=15, weight="bold")
        d.text(x + 70, 52, "instances", size=12)
        d.squares(x + 28, 60, of_case)
        d.arrow((x + 70, 84), (x + 70, 110))
        d.box(x + 16, 112, 108, 44, "Q-Former", kind="trained")
        d.text(x - 18, 124, "queries", size=12)
        d.squares(x - 32, 132, asked, size=12, gap=2)
        d.arrow((x + 70, 158), (x + 70, 186))
        d.squares(x + 40, 190, asked)
        d.text(x + 70, 228, "visual prompts", size=12)
    d.text(130, 262, "z₁ z₂ z₃")
    d.text(350, 262, "z₁ z₂ z₃: the same")
    d.text(570, 262, "z₂ z₃ z₁: permuted likewise")
    d.text(350, 292, "invariant in the instances, equivariant in the queries", size=14, weight="bold")
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
