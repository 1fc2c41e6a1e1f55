"""Products at random, and photos of them that say which of their traits they show.

What is behind, beneath or inside shows only from there; the first photo is the overview that a shop shows first. A
trait counts as seen where its part covers enough of the picture.
"""

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from mivpg.miniature.drawing import Camera, draw_with_parts
from mivpg.miniature.families import FAMILIES, HIDDEN_COLORS, Product

HIDDEN_TRAITS = ("back", "beneath", "inside", "ends")
"""Traits of which the overview shows not a pixel."""

LEAST_SHARE = {"legs": 0.003, "arms": 0.004, "extra": 0.003}
"""How much of a picture a part covers before its trait counts as seen."""
LEAST_SHARE_OF_OTHERS = 0.012

BODY_TRAITS = ("family", "color", "material", "shape")
"""What is seen wherever the product is seen."""

MOST_OTHER_VIEWS = 7


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo of a product."""

    view: str
    """`front`, `back`, `side`, `top`, `beneath` or `inside`."""
    image: Image.Image
    seen: frozenset[str]
    """Traits that can be seen in it."""
    parts: dict[str, np.ndarray] = field(compare=False)
    """Where in it each part is seen: what `draw_with_parts` returns."""


def draw_product(generator: random.Random, family: str | None = None) -> Product:
    """A product at random."""
    family = generator.choice(list(FAMILIES)) if family is None else family
    traits = {trait: generator.choice(values) for trait, values in FAMILIES[family].traits.items()}
    for trait in ("beneath", "inside"):  # seen against the product's own colour
        while trait in traits and traits[trait] == traits.get("color"):
            traits[trait] = generator.choice(HIDDEN_COLORS)
    width, depth, height = (generator.uniform(0.88, 1.14) for _ in range(3))
    return Product(family=family, traits=traits, stretch=(width, depth, height))


def photograph(product: Product, view: str, generator: random.Random, *, size: int = 192) -> Photo:
    """A photo from about where `view` says."""
    camera, background = _camera(product, view, generator), generator.uniform(240, 255)
    image, parts = draw_with_parts(product.shapes(is_open=view == "inside"), camera, size=size, background=background)
    seen = {trait for trait in BODY_TRAITS if trait == "family" or trait in product.traits}
    if "color" in parts:  # of a bed that of the blanket alone, which is in front
        seen.discard("color")
    seen |= {
        part
        for part, where in parts.items()
        if part in product.traits and where.mean() >= LEAST_SHARE.get(part, LEAST_SHARE_OF_OTHERS)
    }
    return Photo(view=view, image=image, seen=frozenset(seen), parts=parts)


def _camera(product: Product, view: str, generator: random.Random) -> Camera:
    """About where `view` says."""
    least, most = FAMILIES[product.family].azimuth
    ranges = {  # degrees around and above
        "front": ((least, most), (10, 20)),
        "back": ((152, 208), (6, 20)),
        "side": ((62, 90), (5, 18)),
        "top": ((-30, 30), (48, 66)),
        "beneath": ((-35, 35), (-52, -32)),
        "inside": ((-22, 22), (13, 15) if product.family == "cabinet" else (38, 52)),
    }
    around, above = (generator.uniform(*limits) for limits in ranges[view])
    if view in ("front", "side"):  # from either side
        around *= generator.choice((-1, 1))
    return Camera(azimuth=around, elevation=above)


def choose_views(product: Product, generator: random.Random) -> list[str]:
    """From where a shop photographs it: the overview, then 1 to 7 others, in no order."""
    others = FAMILIES[product.family].views
    views = [view for view in others if generator.random() < 0.85]
    while not views or (len(views) < MOST_OTHER_VIEWS and generator.random() < 0.3):
        views.append(generator.choice(("front", *others)))
    generator.shuffle(views)
    return ["front", *views]
