"""The twelve families of products, and the shapes that a product consists of.

A product is a family (chair, lamp, …) and a value for each of the family's traits. The builder of its family turns them
into shapes for `drawing.draw`. A trait is the name of the part that shows it: a chair whose trait `back` is "striped"
has a face with stripes whose part is `back`. What all of a product shows (its colour, its material) is the part `body`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict, cast

from mivpg.miniature.drawing import Block, Color, Frustum, Material, Paint, Pattern, Shape

COLORS: dict[str, Color] = {
    "red": (196, 42, 42),
    "blue": (44, 86, 176),
    "green": (58, 134, 72),
    "yellow": (232, 194, 48),
    "black": (46, 46, 50),
    "white": (236, 236, 233),
    "grey": (142, 144, 148),
    "brown": (126, 82, 50),
    "pink": (236, 146, 172),
    "purple": (118, 66, 146),
    "orange": (232, 122, 36),
    "beige": (216, 196, 160),
}
HIDDEN_COLORS = ("red", "blue", "green", "yellow", "orange")
"""Of what is beneath or inside."""
FRONT_PATTERNS: tuple[Pattern, ...] = ("plain", "striped", "dotted")
BACK_PATTERNS: tuple[Pattern, ...] = ("plain", "checked", "banded")
"""Of what is behind or at the ends: other words than in front, so that none can be said of the wrong side."""


class Finish(TypedDict):
    """What a shape is made of: `Block(…, **finish)`."""

    color: Color
    material: Material


WOOD: Finish = {"color": (150, 104, 62), "material": "wooden"}
METAL: Finish = {"color": (168, 170, 176), "material": "metal"}
LINEN: Finish = {"color": (240, 240, 238), "material": "fabric"}
PILLOWCASE: Finish = {"color": (250, 250, 248), "material": "fabric"}
CHINA: Finish = {"color": (244, 244, 240), "material": "plastic"}
TEAL: Finish = {"color": (90, 160, 170), "material": "plastic"}
GLAZE: Finish = {"color": (120, 160, 168), "material": "plastic"}
PAPER: Color = (246, 244, 236)

BALL = (2, 2, 2)
ROUND_SEAT, SQUARE_SEAT = (2, 2, 8), (8, 8, 4)


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product; photos of it are drawn."""

    family: str
    traits: dict[str, str]
    """Trait to value, for the traits that the family has."""
    stretch: tuple[float, float, float]
    """How wide, deep and high it is, as a share of its family's."""

    def shapes(self, *, is_open: bool = False) -> list[Shape]:
        """What it consists of; opened, its lid or doors are out of the way."""
        return FAMILIES[self.family].build(self, is_open)

    def color(self, trait: str = "color") -> Color:
        """The colour that a trait names."""
        return COLORS[self.traits[trait]]

    def pattern(self, trait: str) -> Pattern:
        """The pattern that a trait names."""
        return cast(Pattern, self.traits[trait])

    def finish(self) -> Finish:
        """Its own colour and material; plastic where its family has no choice of materials."""
        return {"color": self.color(), "material": cast(Material, self.traits.get("material", "plastic"))}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What its products have in common."""

    build: Callable[[Product, bool], list[Shape]]
    """A product's shapes, closed or open."""
    traits: dict[str, tuple[str, ...]]
    """Trait to possible values."""
    views: tuple[str, ...]
    """From where it is photographed, beside the overview."""
    azimuth: tuple[float, float] = (22, 40)
    """Of the overview, to either side."""


# ── Pieces ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def contrast(color: Color) -> Color:
    """For figures on a colour: dark on light, light on dark."""
    return (38, 38, 44) if sum(color) > 400 else (240, 238, 230)


def darker(color: Color) -> Color:
    """The same colour, as on a handle or in a gap."""
    red, green, blue = color
    return (0.75 * red, 0.75 * green, 0.75 * blue)


def patterned(
    product: Product, trait: str, face: tuple[int, int] | None, size: float, base: Color | None = None
) -> Paint:
    """A face, or all of a shape, with the pattern that a trait names, on the product's colour or another `base`."""
    pattern, base = product.pattern(trait), base or product.color()
    color = base if pattern == "plain" else contrast(base)
    return Paint(part=trait, face=face, pattern=pattern, size=size, color=color)


def colored(product: Product, trait: str, face: tuple[int, int]) -> Paint:
    """A face of which a trait names the colour."""
    return Paint(part=trait, face=face, color=product.color(trait))


def legs(product: Product, width: float, depth: float, height: float) -> list[Shape]:
    """What a seat or a table of `width` x `depth` (halves) stands on, up to `height`."""
    style = product.traits["legs"]
    if style == "round base":
        radius = 0.75 * min(width, depth)
        return [
            Frustum(center=(0, 0, height / 2), half=(0.07, 0.07, height / 2), part="legs", **METAL),
            Frustum(center=(0, 0, 0.03), half=(radius, radius, 0.03), top=0.8, part="legs", **METAL),
        ]
    thickness = {"thin": 0.032, "thick": 0.085, "short": 0.06}[style.split()[-2]]
    places: list[tuple[float, float]] = [(-1, -1), (1, -1), (-1, 1), (1, 1)]
    if style.startswith("three"):
        places = [(-0.9, -0.7), (0.9, -0.7), (0, 1)]
    inset = 0.86
    finish = WOOD if product.stretch[0] > 1 else METAL
    return [
        Frustum(
            center=(x * width * inset, y * depth * inset, height / 2),
            half=(thickness, thickness, height / 2),
            bottom=0.7,
            part="legs",
            **finish,
        )
        for x, y in places
    ]


def underside(product: Product, width: float, depth: float, height: float) -> Shape:
    """A plate below a seat, whose lower face has the colour that is seen from beneath; its rim hides it from above."""
    kind = Frustum if product.traits["shape"] == "round" else Block
    rim: Finish = {"color": product.color(), "material": "fabric"}
    lower = (colored(product, "beneath", (2, -1)),)
    return kind(center=(0, 0, height), half=(width, depth, 0.012), paints=lower, **rim)


def box_walls(product: Product, width: float, depth: float, tall: float, middle: float, size: float) -> list[Shape]:
    """An open box: its outside in the product's colour, its inside in the lining's.

    Args:
        product: Its traits `front` and `back` pattern the walls there, where it has them.
        width: Half of it.
        depth: Half of it.
        tall: Half its height.
        middle: How high its middle is.
        size: Of the patterns.
    """
    finish = product.finish()
    walls: list[Shape] = [
        Block(
            center=(sign * width, 0, middle),
            half=(0.025, depth, tall),
            paints=(colored(product, "inside", (0, -sign)),),
            **finish,
        )
        for sign in (-1, 1)
    ]
    for sign, trait in ((-1, "front"), (1, "back")):
        outside = [patterned(product, trait, (1, sign), size)] if trait in product.traits else []
        walls.append(
            Block(
                center=(0, sign * depth, middle),
                half=(width, 0.025, tall),
                paints=(*outside, colored(product, "inside", (1, -sign))),
                **finish,
            )
        )
    bottom = Block(
        center=(0, 0, middle - tall + 0.04), half=(width, depth, 0.03), color=product.color("inside"), part="inside"
    )
    return [*walls, bottom]


# ── Families ────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_chair(product: Product, is_open: bool) -> list[Shape]:
    """A seat, a leaning back that is patterned on both sides, and perhaps armrests."""
    (w, d, h), finish = product.stretch, product.finish()
    width, depth, seat = 0.46 * w, 0.44 * d, 0.5 * h
    is_round = product.traits["shape"] == "round"
    spread = 0.72 if is_round else 1.0
    shapes: list[Shape] = [
        *legs(product, spread * width, spread * depth, seat - 0.06),
        underside(product, 0.9 * width, 0.9 * depth, seat - 0.085),
        Block(
            center=(0, 0, seat),
            half=(width, depth, 0.08),
            roundness=ROUND_SEAT if is_round else SQUARE_SEAT,
            **finish,
        ),
        Block(
            center=(0, depth - 0.03, seat + 0.08 + 0.44 * h),
            half=(width, 0.06, 0.44 * h),
            roundness=(2, 8, 2) if is_round else (16, 8, 16),
            paints=(patterned(product, "back", (1, 1), 0.31), patterned(product, "front", (1, -1), 0.31)),
            turn=(-6, 0, 0),
            **finish,
        ),
    ]
    if product.traits["arms"] == "armrests":
        for side in (-1, 1):
            rest = Block(
                center=(side * width, 0, seat + 0.3),
                half=(0.05, depth, 0.04),
                roundness=(4, 8, 4),
                part="arms",
                **finish,
            )
            post = Block(
                center=(side * width, (-0.1 if is_round else -0.8) * depth, seat + 0.14),
                half=(0.03, 0.03, 0.15),
                part="arms",
                **finish,
            )
            shapes += [rest, post]
    return shapes


def build_stool(product: Product, is_open: bool) -> list[Shape]:
    """A high seat."""
    (w, _, h) = product.stretch
    width, seat = 0.42 * w, 0.82 * h
    is_round = product.traits["shape"] == "round"
    spread = 0.72 if is_round else 0.95
    return [
        *legs(product, spread * width, spread * width, seat - 0.06),
        underside(product, 0.86 * width, 0.86 * width, seat - 0.085),
        Block(
            center=(0, 0, seat),
            half=(width, width, 0.085),
            roundness=ROUND_SEAT if is_round else SQUARE_SEAT,
            **product.finish(),
        ),
    ]


def build_ottoman(product: Product, is_open: bool) -> list[Shape]:
    """A box to sit on, square or round, whose lid comes off."""
    (w, d, h), finish = product.stretch, product.finish()
    is_round = product.traits["shape"] == "round"
    width, depth = 0.5 * w, (0.5 * w if is_round else 0.46 * d)
    has_legs = product.traits["legs"] != "none"
    foot = 0.14 if has_legs else 0.03
    tall = 0.2 * h + 0.05
    middle = foot + tall
    shapes = legs(product, 0.8 * width, 0.8 * depth, foot + 0.02) if has_legs else []
    if is_round:
        lining = product.color("inside")
        shapes += [
            Frustum(
                center=(0, 0, middle),
                half=(width, depth, tall),
                is_open=is_open,
                paints=(patterned(product, "front", None, 0.36),),
                **finish,
            ),
            Frustum(center=(0, 0, foot + 0.04), half=(0.97 * width, 0.97 * depth, 0.03), color=lining, part="inside"),
        ]
        if is_open:
            inner = Frustum(
                center=(0, 0, middle),
                half=(0.94 * width, 0.94 * depth, tall),
                is_open=True,
                color=lining,
                material="fabric",
                part="inside",
            )
            shapes.append(inner)
    else:
        shapes += box_walls(product, width, depth, tall, middle, 0.32)
    if not is_open:
        lid = Block(
            center=(0, 0, middle + tall + 0.05),
            half=(1.02 * width, 1.02 * depth, 0.07),
            roundness=ROUND_SEAT if is_round else (16, 16, 4),
            **finish,
        )
        shapes.append(lid)
    return shapes


def build_sofa(product: Product, is_open: bool) -> list[Shape]:
    """One to three seats, each with a cushion below and a patterned one behind, between two armrests."""
    (w, d, h), finish = product.stretch, product.finish()
    seats = {"one": 1, "two": 2, "three": 3}[product.traits["shape"].split()[0]]
    width, depth = (0.26 + 0.36 * seats) * w, 0.42 * d
    foot = {"four short legs": 0.12, "four thin legs": 0.26}[product.traits["legs"]]
    base = foot + 0.14
    arm_height = {"low armrests": 0.14, "high armrests": 0.48}[product.traits["arms"]] * h
    shapes: list[Shape] = [
        *legs(product, 0.95 * width, 0.9 * depth, foot + 0.02),
        underside(product, 0.97 * width, 0.95 * depth, foot),
        Block(center=(0, 0, base), half=(width, depth, 0.13), roundness=(16, 16, 8), **finish),
        Block(
            center=(0, depth, base + 0.28 * h),
            half=(width, 0.13, 0.42 * h),
            roundness=(16, 8, 8),
            paints=(patterned(product, "back", (1, 1), 0.4),),
            **finish,
        ),
    ]
    inner = 2 * (width - 0.1) / seats
    for i in range(seats):
        x = -width + 0.1 + inner * (i + 0.5)
        seat = Block(
            center=(x, -0.08, base + 0.18), half=(0.48 * inner, 0.85 * depth, 0.1), roundness=SQUARE_SEAT, **finish
        )
        cushion = Block(
            center=(x, 0.62 * depth, base + 0.42 * h),
            half=(0.47 * inner, 0.1, 0.26 * h),
            roundness=(8, 4, 8),
            paints=(patterned(product, "front", (1, -1), 0.31),),
            turn=(-10, 0, 0),
            **finish,
        )
        shapes += [seat, cushion]
    shapes += [
        Block(
            center=(side * (width + 0.06), 0, base + arm_height / 2),
            half=(0.1, depth + 0.08, 0.14 + arm_height / 2),
            roundness=(8, 16, 8),
            part="arms",
            **finish,
        )
        for side in (-1, 1)
    ]
    return shapes


def build_table(product: Product, is_open: bool) -> list[Shape]:
    """A top on legs, with a vase or a bowl on it or nothing."""
    w, d, h = product.stretch
    is_round = product.traits["shape"] == "round"
    width, depth = (0.6 * w, 0.6 * w) if is_round else (0.74 * w, 0.5 * d)
    top = 0.66 * h
    spread = (0.7, 0.7) if is_round else (0.95, 0.92)
    plate = Frustum if is_round else Block
    shapes: list[Shape] = [
        *legs(product, spread[0] * width, spread[1] * depth, top - 0.04),
        underside(product, 0.97 * width, 0.97 * depth, top - 0.052),
        plate(center=(0, 0, top), half=(width, depth, 0.04), **product.finish()),
    ]
    if product.traits["extra"] == "vase on top":
        shapes += [
            Block(center=(0, 0, top + 0.17), half=(0.1, 0.1, 0.13), roundness=BALL, part="extra", **CHINA),
            Frustum(center=(0, 0, top + 0.32), half=(0.05, 0.05, 0.08), bottom=0.7, part="extra", **CHINA),
        ]
    elif product.traits["extra"] == "bowl on top":
        shapes.append(Frustum(center=(0, 0, top + 0.1), half=(0.22, 0.22, 0.07), bottom=0.45, part="extra", **TEAL))
    return shapes


def build_bed(product: Product, is_open: bool) -> list[Shape]:
    """A wooden frame, a mattress, a blanket in the product's colour, and a board at the head."""
    w, d, h = product.stretch
    is_double = product.traits["shape"] == "double"
    width, depth = (0.72 if is_double else 0.44) * w, 0.86 * d
    board = 0.42 * h
    shapes: list[Shape] = [
        *legs(product, width, depth, 0.2),
        underside(product, 0.97 * width, 0.97 * depth, 0.2),
        Block(center=(0, 0, 0.26), half=(width, depth, 0.06), **WOOD),
        Block(center=(0, 0, 0.39), half=(0.97 * width, 0.98 * depth, 0.1), roundness=(16, 16, 4), **LINEN),
        Block(
            center=(0, -0.26 * d, 0.43),
            half=(0.99 * width, 0.62 * depth, 0.1),
            roundness=(16, 16, 4),
            color=product.color(),
            material="fabric",
            part="color",
        ),
        Block(
            center=(0, depth + 0.04, 0.2 + board),
            half=(1.02 * width, 0.05, board),
            paints=(patterned(product, "back", (1, 1), 0.43, WOOD["color"]),),
            **WOOD,
        ),
    ]
    count = 2 if is_double else 1
    shapes += [
        Block(
            center=((i - (count - 1) / 2) * width, 0.72 * depth, 0.56),
            half=(min(0.4, 0.8 * width / count), 0.17, 0.08),
            roundness=(4, 4, 2),
            **PILLOWCASE,
        )
        for i in range(count)
    ]
    return shapes


def build_lamp(product: Product, is_open: bool) -> list[Shape]:
    """A shade that is patterned all around, with a lining, on a pole and a foot."""
    (w, _, h), color, lining = product.stretch, product.color(), product.color("inside")
    pole = 0.62 * h
    shapes: list[Shape]
    if product.traits["legs"] == "round base":
        shapes = [Frustum(center=(0, 0, 0.03), half=(0.26, 0.26, 0.03), top=0.85, part="legs", **METAL)]
    elif product.traits["legs"] == "three thin legs":
        shapes = [
            Frustum(center=(x * 0.9, y * 0.9, 0.26), half=(0.025, 0.025, 0.29), part="legs", turn=turn, **WOOD)
            for x, y, turn in ((-0.2, -0.12, (-14, 22, 0)), (0.2, -0.12, (-14, -22, 0)), (0, 0.2, (22, 0, 0)))
        ]
    else:
        shapes = [Block(center=(0, 0, 0.22), half=(0.2, 0.2, 0.22), roundness=BALL, part="legs", **GLAZE)]
    top = {"cone": 0.35, "drum": 1.0, "tapered": 0.7}[product.traits["shape"]]
    size = 0.4 * w
    middle = 0.2 + pole + 0.12
    shapes += [
        Frustum(center=(0, 0, (0.2 + pole) / 2 + 0.02), half=(0.03, 0.03, (0.2 + pole) / 2 - 0.02), **METAL),
        Frustum(
            center=(0, 0, middle),
            half=(size, size, 0.25),
            top=top,
            is_open=True,
            color=color,
            material="fabric",
            paints=(patterned(product, "front", None, 0.27),),
        ),
        Frustum(
            center=(0, 0, middle),
            half=(0.97 * size, 0.97 * size, 0.235),
            top=top,
            is_open=True,
            color=lining,
            material="fabric",
            part="inside",
        ),
        Frustum(
            center=(0, 0, middle + 0.23),
            half=(0.96 * size * top, 0.96 * size * top, 0.01),
            color=color,
            material="fabric",
            paints=(colored(product, "inside", (2, -1)),),
        ),
    ]
    return shapes


def build_bottle(product: Product, is_open: bool) -> list[Shape]:
    """A bottle with a cap, and a label of paper that is patterned in front and behind."""
    (w, _, h), finish = product.stretch, product.finish()
    tall = {"tall": 0.66, "short": 0.42}[product.traits["shape"]] * h
    width = 0.34 * w
    cap = COLORS[product.traits["extra"].split()[0]]
    label = tuple(patterned(product, trait, (1, sign), 0.3, PAPER) for trait, sign in (("front", -1), ("back", 1)))
    return [
        Frustum(
            center=(0, 0, 0.012),
            half=(0.9 * width, 0.9 * width, 0.012),
            paints=(colored(product, "beneath", (2, -1)),),
            **finish,
        ),
        Frustum(center=(0, 0, tall + 0.02), half=(width, width, tall), **finish),
        Frustum(center=(0, 0, 2 * tall + 0.1), half=(width, width, 0.09), top=0.45, **finish),
        Frustum(center=(0, 0, 2 * tall + 0.28), half=(0.4 * width, 0.4 * width, 0.1), **finish),
        Frustum(center=(0, 0, 2 * tall + 0.4), half=(0.5 * width, 0.5 * width, 0.08), color=cap, part="extra"),
        Frustum(center=(0, 0, tall), half=(1.02 * width, 1.02 * width, 0.72 * tall), color=PAPER, paints=label),
    ]


def build_bag(product: Product, is_open: bool) -> list[Shape]:
    """A box of fabric or leather with one handle or two, wider when it is open."""
    (w, d, h), finish = product.stretch, product.finish()
    width, depth, tall = 0.5 * w, 0.17 * d, 0.4 * h
    shapes = box_walls(product, width, depth if not is_open else 1.5 * depth, tall, tall, 0.36)
    if not is_open:
        shapes.append(Block(center=(0, 0, 2 * tall), half=(width, depth, 0.02), **finish))
    strap: Finish = {"color": darker(product.color()), "material": "leather"}
    for y in (-depth, depth) if product.traits["extra"] == "two handles" else (0.0,):
        shapes += [
            Block(center=(x, y, 2 * tall + 0.16), half=(0.03, 0.02, 0.18), turn=(0, lean, 0), part="extra", **strap)
            for x, lean in ((-0.2, 12), (0.2, -12))
        ]
        shapes.append(Block(center=(0, y, 2 * tall + 0.335), half=(0.19, 0.02, 0.03), part="extra", **strap))
    return shapes


def build_dumbbell(product: Product, is_open: bool) -> list[Shape]:
    """A grip between two weights, which are patterned at their outer ends."""
    (w, d, _), finish = product.stretch, product.finish()
    radius, half = 0.36 * d, 0.17 * w
    grip = {"metal grip": METAL["color"], "black grip": COLORS["black"]}[product.traits["extra"]]
    along_x = (0, 90, 0)
    shapes: list[Shape] = [
        Frustum(
            center=(0, 0, radius), half=(0.085, 0.085, 0.42), color=grip, material="metal", part="extra", turn=along_x
        )
    ]
    for side in (-1, 1):
        x = side * (0.4 + half)
        end = (patterned(product, "ends", (2, side), 0.27),)
        if product.traits["shape"] == "round":
            shapes.append(
                Frustum(center=(x, 0, radius), half=(radius, radius, half), turn=along_x, paints=end, **finish)
            )
            continue
        height = 0.87 * radius  # of a hexagon that lies on one of its sides
        shapes += [
            Block(center=(x, 0, height), half=(half, radius / 2, 0.866 * radius), turn=(degrees, 0, 0), **finish)
            for degrees in (0, 60, 120)
        ]
        plate = Frustum(
            center=(x + side * half, 0, height),
            half=(0.8 * radius, 0.8 * radius, 0.012),
            turn=along_x,
            paints=end,
            **finish,
        )
        shapes.append(plate)
    return shapes


def build_pillow(product: Product, is_open: bool) -> list[Shape]:
    """A soft block that leans back, patterned on both sides."""
    w, _, h = product.stretch
    shape = product.traits["shape"]
    width, height = (0.66, 0.4) if shape == "rectangular" else (0.5, 0.5)
    return [
        Block(
            center=(0, 0, height * h),
            half=(width * w, 0.2, height * h),
            roundness=BALL if shape == "round" else (4, 2, 4),
            turn=(-14, 0, 0),
            paints=(patterned(product, "front", (1, -1), 0.36), patterned(product, "back", (1, 1), 0.36)),
            **product.finish(),
        )
    ]


def build_cabinet(product: Product, is_open: bool) -> list[Shape]:
    """A case with a lining and a shelf, behind one door or two."""
    (w, d, h), finish = product.stretch, product.finish()
    width, depth, tall = 0.5 * w, 0.28 * d, 0.52 * h
    foot = 0.2
    middle = foot + tall
    shapes: list[Shape] = [
        *legs(product, 0.92 * width, 0.85 * depth, foot),
        Block(center=(0, 0, middle + tall), half=(1.03 * width, 1.05 * depth, 0.03), **finish),
        Block(
            center=(0, 0, foot),
            half=(width, depth, 0.03),
            paints=(colored(product, "inside", (2, 1)),),
            **finish,
        ),
        Block(
            center=(0, depth, middle),
            half=(width, 0.02, tall),
            paints=(patterned(product, "back", (1, 1), 0.4), colored(product, "inside", (1, -1))),
            **finish,
        ),
    ]
    shapes += [
        Block(
            center=(side * width, 0, middle),
            half=(0.025, depth, tall),
            paints=(colored(product, "inside", (0, -side)),),
            **finish,
        )
        for side in (-1, 1)
    ]
    if is_open:
        shelf = Block(center=(0, 0, middle), half=(width, depth, 0.02), color=product.color("inside"), part="inside")
        return [*shapes, shelf]
    gap: Finish = {**finish, "color": COLORS["black"] if sum(product.color()) > 200 else COLORS["grey"]}
    shapes.append(Block(center=(0, -depth, middle), half=(width, 0.02, tall), **gap))
    doors = [(0.0, 0.92, 0.72)]  # middle, half width and knob of each, as shares of the cabinet's
    if product.traits["extra"] == "two doors":
        doors = [(-0.52, 0.4, -0.22), (0.52, 0.4, 0.22)]
    for x, half, knob in doors:
        shapes += [
            Block(
                center=(x * width, -depth - 0.02, middle),
                half=(half * width, 0.02, 0.94 * tall),
                part="extra",
                **finish,
            ),
            Block(
                center=(knob * width, -depth - 0.07, middle),
                half=(0.035, 0.04, 0.035),
                roundness=BALL,
                part="extra",
                **METAL,
            ),
        ]
    return shapes


SOFT, HARD = ("fabric", "leather"), ("wooden", "metal")
MAIN_COLORS = tuple(COLORS)

FAMILIES: dict[str, Family] = {
    "chair": Family(
        build=build_chair,
        traits={
            "color": MAIN_COLORS,
            "shape": ("round", "square"),
            "legs": ("four thin legs", "four thick legs", "round base"),
            "arms": ("armrests", "none"),
            "front": FRONT_PATTERNS,
            "back": BACK_PATTERNS,
            "beneath": HIDDEN_COLORS,
        },
        views=("back", "beneath", "side"),
    ),
    "stool": Family(
        build=build_stool,
        traits={
            "color": MAIN_COLORS,
            "shape": ("round", "square"),
            "legs": ("three thin legs", "four thin legs", "four thick legs", "round base"),
            "beneath": HIDDEN_COLORS,
        },
        views=("beneath", "side"),
    ),
    "ottoman": Family(
        build=build_ottoman,
        traits={
            "color": MAIN_COLORS,
            "material": SOFT,
            "shape": ("round", "square"),
            "legs": ("four short legs", "none"),
            "front": FRONT_PATTERNS,
            "inside": HIDDEN_COLORS,
        },
        views=("inside", "top", "side"),
    ),
    "sofa": Family(
        build=build_sofa,
        traits={
            "color": MAIN_COLORS,
            "material": SOFT,
            "shape": ("one seater", "two seater", "three seater"),
            "legs": ("four short legs", "four thin legs"),
            "arms": ("low armrests", "high armrests"),
            "front": FRONT_PATTERNS,
            "back": BACK_PATTERNS,
            "beneath": HIDDEN_COLORS,
        },
        views=("back", "beneath", "side", "top"),
    ),
    "table": Family(
        build=build_table,
        traits={
            "color": MAIN_COLORS,
            "shape": ("round", "rectangular"),
            "legs": ("four thin legs", "four thick legs", "round base"),
            "extra": ("vase on top", "bowl on top", "none"),
            "beneath": HIDDEN_COLORS,
        },
        views=("beneath", "top", "side"),
    ),
    "bed": Family(
        build=build_bed,
        traits={
            "color": MAIN_COLORS,
            "shape": ("single", "double"),
            "legs": ("four thin legs", "four thick legs"),
            "back": BACK_PATTERNS,
            "beneath": HIDDEN_COLORS,
        },
        views=("back", "beneath", "side", "top"),
    ),
    "lamp": Family(
        build=build_lamp,
        traits={
            "color": MAIN_COLORS,
            "shape": ("cone", "drum", "tapered"),
            "legs": ("round base", "three thin legs", "ball base"),
            "front": FRONT_PATTERNS,
            "inside": HIDDEN_COLORS,
        },
        views=("beneath", "side", "top"),
    ),
    "bottle": Family(
        build=build_bottle,
        traits={
            "color": MAIN_COLORS,
            "material": ("metal", "plastic"),
            "shape": ("tall", "short"),
            "extra": ("black cap", "white cap", "red cap"),
            "front": FRONT_PATTERNS,
            "back": BACK_PATTERNS,
            "beneath": HIDDEN_COLORS,
        },
        views=("back", "beneath", "side"),
        azimuth=(2, 14),
    ),
    "bag": Family(
        build=build_bag,
        traits={
            "color": MAIN_COLORS,
            "material": SOFT,
            "extra": ("one handle", "two handles"),
            "front": FRONT_PATTERNS,
            "back": BACK_PATTERNS,
            "inside": HIDDEN_COLORS,
        },
        views=("back", "inside", "side"),
    ),
    "dumbbell": Family(
        build=build_dumbbell,
        traits={
            "color": MAIN_COLORS,
            "material": ("metal", "plastic"),
            "shape": ("hexagonal", "round"),
            "extra": ("metal grip", "black grip"),
            "ends": BACK_PATTERNS,
        },
        views=("side", "top"),
        azimuth=(0, 4),
    ),
    "pillow": Family(
        build=build_pillow,
        traits={
            "color": MAIN_COLORS,
            "material": SOFT,
            "shape": ("square", "round", "rectangular"),
            "front": FRONT_PATTERNS,
            "back": BACK_PATTERNS,
        },
        views=("back", "side"),
    ),
    "cabinet": Family(
        build=build_cabinet,
        traits={
            "color": MAIN_COLORS,
            "material": HARD,
            "legs": ("four thin legs", "four thick legs"),
            "extra": ("one door", "two doors"),
            "back": BACK_PATTERNS,
            "inside": HIDDEN_COLORS,
        },
        views=("back", "inside", "side"),
    ),
}
