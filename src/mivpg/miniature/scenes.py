"""Scenes of two or three generated things, what people write of them, and lessons from them.

A scene is a pair (a red lamp on a blue table, a ball under it, a stool in front of a sofa, a chair left of a bed) and
perhaps a third thing left or right of both. No two things of a scene share a noun or a colour. Each has a **role**
(`left`, `top`, `holding`, …) that no other thing of the scene has: what is said by role is said without mistake.

    generator = random.Random(0)
    scene = draw_scene(generator)
    image = photograph_scene(scene, generator)
    captions = references(scene, generator)     # "a red lamp on a blue table with a stool on the left.", …

`right_of_said` reads a caption, a model's as well, and compares what it claims with what is true.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, cast, get_args

import numpy as np
from PIL import Image

from mivpg.miniature.drawing import Block, Camera, Shape, draw
from mivpg.miniature.families import BALL, COLORS, PAPER
from mivpg.miniature.lessons import SHARE_WITH_KEYWORDS, PictureLesson, TextLesson, pixels_of
from mivpg.miniature.products import draw_product
from mivpg.miniature.wording import article, choose, list_up

PHOTO_SIZE = 160
"""Pixels a side."""
NUM_REFERENCES = 5

NOUNS = {
    "chair": ("chair",),
    "stool": ("stool",),
    "sofa": ("sofa", "couch"),
    "table": ("table",),
    "bed": ("bed",),
    "lamp": ("lamp",),
    "bottle": ("bottle",),
    "bag": ("bag",),
    "pillow": ("pillow", "cushion"),
    "cabinet": ("cabinet", "cupboard"),
    "ball": ("ball",),
}
"""The usual word first."""
SCENE_COLORS = ("red", "blue", "green", "yellow", "black", "pink", "purple", "orange")

Relation = Literal["left", "front", "top", "under"]
"""How the first thing of a pair stands to the second."""
Side = Literal["left", "right"]
HOW_OFTEN = (0.4, 0.2, 0.2, 0.2)
"""Of each relation."""
INVERSE = {"left": "right", "front": "behind", "top": "holding", "under": "over", "beside": "beside"}

ROLES = {
    "left": tuple(NOUNS),
    "middle": tuple(NOUNS),
    "right": tuple(NOUNS),
    "front": ("ball", "bag", "pillow", "stool", "bottle"),
    "behind": ("sofa", "cabinet", "bed", "chair"),
    "top": ("lamp", "bottle", "bag", "ball", "pillow"),
    "holding": ("table", "stool", "cabinet"),
    "under": ("ball", "bag", "bottle", "pillow"),
    "over": ("table", "stool"),
}
"""Which things a role is given to."""

CLASSES = (
    *(f"scene {noun}" for noun in NOUNS),
    *(f"scene color {color}" for color in SCENE_COLORS),
    *(f"scene {noun} {role}" for role, nouns in ROLES.items() for noun in nouns),
    *(f"scene {color} {role}" for role in ROLES for color in SCENE_COLORS),
)
"""All that a picture may show: things, colours, and what and which colour is where."""

FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "chair": {"arms": ("none",)},
    "stool": {"shape": ("round",), "legs": ("three thin legs", "four thin legs", "four thick legs")},
    "sofa": {"material": ("fabric",), "shape": ("two seater",)},
    "table": {"shape": ("rectangular",), "legs": ("four thin legs", "four thick legs"), "extra": ("none",)},
    "bed": {"shape": ("single",)},
    "lamp": {"legs": ("round base",)},
    "bottle": {"material": ("plastic",), "extra": ("white cap",)},
    "bag": {"material": ("fabric",)},
    "pillow": {"material": ("fabric",), "shape": ("square",)},
    "cabinet": {"material": ("plastic",), "legs": ("four thick legs",)},
}
"""Forms that are told apart in a small picture: what other traits there are is not seen."""
HEIGHTS = {
    "chair": 1.4,
    "stool": 0.95,
    "sofa": 0.85,
    "table": 0.85,
    "bed": 1.0,
    "lamp": 1.45,
    "bottle": 1.05,
    "bag": 0.9,
    "pillow": 0.75,
    "cabinet": 1.25,
    "ball": 0.7,
}
"""Of things on the floor, in the drawing's unit; small things are larger than life."""
SMALLER = {"front": 0.8, "top": 0.75, "under": 0.6}
"""By role."""
LEAST_SHARE = 0.006
"""How much of the picture each thing's colour covers at least."""


@dataclass(frozen=True)
class Thing:
    """One of the things of a scene."""

    noun: str
    color: str

    def __str__(self) -> str:
        return f"{self.color} {self.noun}"


@dataclass(frozen=True)
class Scene:
    """What is true of a picture."""

    first: Thing
    relation: Relation
    """Of the first to the second."""
    second: Thing
    third: Thing | None = None
    side: Side = "left"
    """On which the third stands, seen from the camera, of both others."""

    @property
    def things(self) -> tuple[Thing, ...]:
        """Two or three."""
        return (self.first, self.second) if self.third is None else (self.first, self.second, self.third)

    @property
    def row(self) -> tuple[int, ...]:
        """Places in `things` from left to right, where all stand in a row; else nothing."""
        if self.relation != "left":
            return ()
        if self.third is None:
            return (0, 1)
        return (2, 0, 1) if self.side == "left" else (0, 1, 2)

    @property
    def roles(self) -> tuple[str, ...]:
        """Of each of `things`."""
        if self.row:
            names = ("left", "right") if self.third is None else ("left", "middle", "right")
            return tuple(names[self.row.index(place)] for place in range(len(self.things)))
        pair = (self.relation, INVERSE[self.relation])
        return pair if self.third is None else (*pair, self.side)

    def facts(self) -> dict[str, str]:
        """As `from_facts` and `right_of_said` read them."""
        facts = {"relation": str(self.relation)}
        for name, thing in zip(("first", "second", "third"), self.things, strict=False):
            facts |= {name: thing.noun, f"{name} color": thing.color}
        return facts if self.third is None else facts | {"third side": self.side}

    @classmethod
    def from_facts(cls, facts: dict[str, str]) -> "Scene":
        """The scene of which these facts are true."""
        first, second, *third = (
            Thing(facts[name], facts[f"{name} color"]) for name in ("first", "second", "third") if name in facts
        )
        relation, side = cast(Relation, facts["relation"]), cast(Side, facts.get("third side", "left"))
        return cls(first, relation, second, third[0] if third else None, side)

    def claims(self) -> set[tuple[int, str, int]]:
        """All that may be said of where things are: (place in `things`, relation, place of the other).

        A thing's own place in the picture, `left`, `middle` or `right`, is noted as that of the thing to itself.
        """
        pairs = {(0, str(self.relation), 1)}
        if self.third is not None:
            pairs |= {(2, "left", place) if self.side == "left" else (place, "left", 2) for place in (0, 1)}
            pairs |= {(2, "beside", place) for place in (0, 1)}
            others = "right" if self.side == "left" else "left"
            own = {(0, others, 0), (1, others, 1), (2, str(self.side), 2)}
        else:
            own = set()
        if self.row:
            pairs = {claim for claim in pairs if claim[1] == "left"}
            pairs |= {(a, "beside", b) for a, b in pairwise(self.row)}
            own = {(place, role, place) for place, role in enumerate(self.roles)}
        return pairs | {(b, INVERSE[relation], a) for a, relation, b in pairs} | own


def draw_scene(generator: random.Random) -> Scene:
    """A scene at random."""
    (relation,) = generator.choices(get_args(Relation), HOW_OFTEN)
    first = generator.choice(ROLES[relation])
    second = generator.choice([noun for noun in ROLES[INVERSE[relation]] if noun != first])
    third = generator.choice([noun for noun in NOUNS if noun not in (first, second)])
    things = [Thing(*pair) for pair in zip((first, second, third), generator.sample(SCENE_COLORS, 3), strict=True)]
    return Scene(
        things[0],
        relation,
        things[1],
        things[2] if generator.random() < 0.5 else None,
        generator.choice(("left", "right")),
    )


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def photograph_scene(scene: Scene, generator: random.Random, *, size: int = PHOTO_SIZE) -> Image.Image:
    """A picture from the front, in which every thing and its colour can be seen."""
    while True:
        things, camera = arrange(scene, generator)
        background = generator.uniform(240, 255)
        shapes = [shape for each in things for shape in each]
        image, shares = draw(shapes, camera, size=size, background=background)
        if all(shares.get(str(thing), 0.0) >= LEAST_SHARE for thing in scene.things):
            return image


def arrange(scene: Scene, generator: random.Random) -> tuple[list[list[Shape]], Camera]:
    """Each thing's shapes, where it stands, and from where the scene is seen.

    What has a thing's colour is the part "red chair", all else of it "chair".
    """
    things = [_build(thing, role, generator) for thing, role in zip(scene.things, scene.roles, strict=True)]
    low, high = _extent(things[1])
    wide, deep, tall = high - low
    aside = generator.uniform(-0.3, 0.3) * wide
    if scene.relation == "front":
        things[0] = _moved(things[0], aside, -deep / 2 - generator.uniform(0.1, 0.3) - _size(things[0])[1] / 2)
    elif scene.relation == "top":
        things[0] = _moved(things[0], aside * max(1 - _size(things[0])[0] / wide, 0), 0.0, tall)
    elif scene.relation == "under":
        things[0] = _moved(things[0], aside / 2, -0.15 * deep)
    # What stands together is moved together, from left to right.
    pair = [[0], [1]] if scene.row else [[0, 1]]
    third = [] if scene.third is None else [[2]]
    edge = 0.0
    for group in third + pair if scene.side == "left" else pair + third:
        low, high = _extent([shape for place in group for shape in things[place]])
        y = generator.uniform(-0.12, 0.12)
        for place in group:
            things[place] = _moved(things[place], edge - low[0], y)
        edge += high[0] - low[0] + generator.uniform(0.1, 0.3)
    above = {"front": (22, 28), "under": (12, 17)}.get(scene.relation, (15, 21))
    return things, Camera(azimuth=generator.uniform(-9, 9), elevation=generator.uniform(*above))


def _build(thing: Thing, role: str, generator: random.Random) -> list[Shape]:
    """A thing in plain form, the middle of its base at the origin."""
    if thing.noun == "ball":
        ball = Block(center=(0, 0, 0.5), half=(0.5, 0.5, 0.5), color=COLORS[thing.color], roundness=BALL)
        shapes: list[Shape] = [ball]
    else:
        product = draw_product(generator, thing.noun)
        form = {trait: generator.choice(values) for trait, values in FORMS[thing.noun].items()}
        form["color"] = thing.color
        if role == "over":
            form["legs"] = "four thin legs"
        shapes = replace(product, traits=product.traits | form).shapes()
    color = COLORS[thing.color]
    shapes = [
        replace(shape, part=str(thing) if shape.color == color else thing.noun, paints=())
        for shape in shapes
        if shape.color != PAPER  # a bottle's label would hide its colour
    ]
    low, high = _extent(shapes)
    x, y, _ = (low + high) / 2
    factor = HEIGHTS[thing.noun] * SMALLER.get(role, 1.0) * generator.uniform(0.93, 1.07) / (high[2] - low[2])
    return _moved(_moved(shapes, -x, -y, -low[2]), factor=factor)


def _moved(shapes: Sequence[Shape], x: float = 0.0, y: float = 0.0, z: float = 0.0, factor: float = 1.0) -> list[Shape]:
    """Scaled about the origin by `factor`, then moved."""
    return [
        replace(
            shape,
            center=(factor * shape.center[0] + x, factor * shape.center[1] + y, factor * shape.center[2] + z),
            half=(factor * shape.half[0], factor * shape.half[1], factor * shape.half[2]),
        )
        for shape in shapes
    ]


def _extent(shapes: Sequence[Shape]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends along x, y and z, (3,) each."""
    corners = np.concatenate([shape.corners() for shape in shapes])
    return corners.min(axis=0), corners.max(axis=0)


def _size(shapes: Sequence[Shape]) -> np.ndarray:
    """Along x, y and z, (3,)."""
    low, high = _extent(shapes)
    return high - low


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────────────────

BETWEEN = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "beside": ("next to", "beside"),
    "front": ("in front of",),
    "behind": ("behind",),
    "top": ("on", "on top of"),
    "holding": ("holding", "carrying"),
    "under": ("under", "underneath"),
    "over": ("over", "above"),
}
"""Said between two things: "a lamp on a table"."""
AFTER = {
    "left": ("on its left", "to its left"),
    "right": ("on its right", "to its right"),
    "beside": ("next to it", "beside it"),
    "front": ("in front of it",),
    "behind": ("behind it",),
    "top": ("on it", "on top of it"),
    "under": ("under it", "underneath it"),
}
"""Said after the second: "a table with a lamp on it"."""
PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
TOGETHER = ("next to each other", "side by side")
IN_ORDER = "from left to right"
VERBS = ("", "standing", "is", "placed", "that stands")
"""Between a thing and what is said between two."""


def references(scene: Scene, generator: random.Random) -> list[str]:
    """What five people write of a scene: each something else, one more and one less of it."""
    captions: dict[str, None] = {}
    while len(captions) < NUM_REFERENCES:
        captions[reference(scene, generator)] = None
    return list(captions)


def reference(scene: Scene, generator: random.Random) -> str:
    """What one of them writes: colours now and then, the third thing and where things are most of the time."""
    speaks_of_colors = generator.choice((1.0, 0.8, 0.8, 0.0))
    names = _names(scene, speaks_of_colors, generator)
    whole = scene if generator.random() < 0.75 else replace(scene, third=None)
    if generator.random() < 0.06:  # somebody in a hurry
        text = list_up(generator.sample(names, len(whole.things)))
    else:
        text = _compose(whole, names, generator, is_all=whole == scene)
    return f"there is {text}." if generator.random() < 0.12 and " is " not in text and text[0] == "a" else f"{text}."


def description(scene: Scene, generator: random.Random) -> str:
    """What a single picture shows: all things, almost always their colours, and where they are."""
    return f"{_compose(scene, _names(scene, 0.94, generator), generator, is_all=True)}."


def keywords(scene: Scene, generator: random.Random) -> list[str]:
    """Each thing with its colour and its role, in any order: "red lamp top", "blue table holding"."""
    words = [f"{thing} {role}" for thing, role in zip(scene.things, scene.roles, strict=True)]
    generator.shuffle(words)
    return words


def _names(scene: Scene, speaks_of_colors: float, generator: random.Random) -> list[str]:
    """What each thing is called."""
    names = []
    for thing in scene.things:
        noun = choose(generator, NOUNS[thing.noun])
        text = f"{thing.color} {noun}" if generator.random() < speaks_of_colors else noun
        names.append(f"{article(text)} {text}")
    return names


def _compose(scene: Scene, names: Sequence[str], generator: random.Random, *, is_all: bool) -> str:
    """Where all things of a scene are.

    Args:
        scene: It may lack the third thing of the picture.
        names: Of its things.
        generator: Of the wording.
        is_all: Whether the picture holds no more; else nothing is said of a thing's place in it.
    """
    if is_all and scene.row and generator.random() < 0.4:
        return _row([names[place] for place in scene.row], generator)
    one, other = (0, 1) if generator.random() < 0.6 else (1, 0)
    if scene.third is not None and scene.row and other not in _beside_third(scene):
        one, other = other, one
    relation = scene.relation if one == 0 else INVERSE[scene.relation]
    if scene.third is None:
        return _pair(names[one], relation, names[other], generator)
    opposite = "right" if scene.side == "left" else "left"
    manner = generator.random()
    if manner < 0.25:  # the second of the pair stands beside the third
        saying = choose(generator, BETWEEN["beside" if generator.random() < 0.5 else opposite])
        return f"{names[one]} {choose(generator, BETWEEN[relation])} {names[other]} {saying} {names[2]}"
    if manner < 0.5 and relation in AFTER:
        saying = choose(generator, BETWEEN["beside" if generator.random() < 0.5 else scene.side])
        after = choose(generator, AFTER[relation])
        return f"{names[2]} {saying} {names[other]} with {names[one]} {after}"
    pair = _pair(names[one], relation, names[other], generator)
    return f"{pair} {'and' if ' with ' in pair else 'with'} {names[2]} {PLACES[scene.side]}"


def _beside_third(scene: Scene) -> tuple[int, ...]:
    """Which of the pair have the third next to them."""
    return tuple(place for place in (0, 1) if (2, "beside", place) in scene.claims())


def _pair(one: str, relation: str, other: str, generator: random.Random) -> str:
    """How one thing stands to another."""
    if relation in ("left", "right") and generator.random() < 0.25:
        if generator.random() < 0.35:
            return f"{one} and {other} {choose(generator, TOGETHER)}"
        relation = "beside"
    saying = choose(generator, BETWEEN[relation])
    manner = generator.random()
    if manner < 0.3 and relation in AFTER:
        return f"{other} with {one} {choose(generator, AFTER[relation])}"
    if manner < 0.42 and relation in AFTER:
        return f"{saying} {other} there is {one}"
    verb = "" if relation in ("holding", "over") else choose(generator, VERBS)
    return " ".join(part for part in (one, verb, saying, other) if part)


def _row(names: Sequence[str], generator: random.Random) -> str:
    """Two or three things from left to right."""
    manner = generator.random()
    if manner < 0.2:
        return f"{list_up(names)} {IN_ORDER}"
    if len(names) == 3 and manner < 0.6:
        ends = [names[0], names[2]]
        generator.shuffle(ends)
        return f"{names[1]} between {ends[0]} and {ends[1]}"
    places = PLACES.values() if len(names) == 3 else (PLACES["left"], PLACES["right"])
    return list_up([f"{name} {place}" for name, place in zip(names, places, strict=True)])


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_FAMILY_OF = {word: family for family, words in NOUNS.items() for word in words}
_MENTION = re.compile(rf"\b(?:(?:a|an|the) )?(?:({'|'.join(COLORS)}) )?({'|'.join(_FAMILY_OF)})\b")
_VERB = re.compile(r"^(?:(?:that|which) )?(?:(?:is|are|stands|standing|sits|sitting|lies|lying|placed) )+")
_RELATION_OF = {saying: relation for relation, sayings in BETWEEN.items() for saying in sayings}
_THERE_IS = ("there is", "is", "stands")


def right_of_said(caption: str, facts: dict[str, str]) -> dict[str, bool]:
    """Of each kind of claim that a caption makes, whether all it claims is right.

    Args:
        caption: A model's or a person's.
        facts: Of the picture, as `Scene.facts` gives them.

    Returns:
        Some of "object", "color" and "relation"; what is not claimed is absent. A colour or a place of a thing that is
        not there is wrong.
    """
    scene = Scene.from_facts(facts)
    place_of = {thing.noun: place for place, thing in enumerate(scene.things)}
    texts, mentions = _read(caption)
    said = [_FAMILY_OF[word] for _, word in mentions]
    right: dict[str, bool] = {}
    if said:
        right["object"] = set(said) <= place_of.keys() and len(set(said)) == len(said)
    colors = [(noun, color) for noun, (color, _) in zip(said, mentions, strict=True) if color is not None]
    if colors:
        right["color"] = all(noun in place_of and scene.things[place_of[noun]].color == color for noun, color in colors)
    claims = list(_claimed(texts, len(said)))
    if claims:
        true = scene.claims()
        right["relation"] = all(
            (place_of.get(said[one], -1), relation, place_of.get(said[other], -1)) in true
            and (one == other or said[one] != said[other])
            for one, relation, other in claims
        )
    return right


def _read(caption: str) -> tuple[list[str], list[tuple[str | None, str]]]:
    """The texts before, between and after a caption's things, and each thing's colour, if said, and noun."""
    caption = " ".join(re.sub(r"[.,]", " ", caption.lower()).split())
    texts, mentions, end = [], [], 0
    for found in _MENTION.finditer(caption):
        texts.append(caption[end : found.start()].strip())
        mentions.append((found[1], found[2]))
        end = found.end()
    return [*texts, caption[end:].strip()], mentions


def _claimed(texts: Sequence[str], number: int) -> Iterator[tuple[int, str, int]]:
    """What is said of where things are: (number of the mention, relation, number of the other).

    Args:
        texts: Before, between and after the mentions, `number` + 1.
        number: Of mentions.
    """
    if number >= 2 and texts[0] in _RELATION_OF and texts[1] in _THERE_IS:  # on a table there is a lamp
        yield 1, _RELATION_OF[texts[0]], 0
    for one in range(number):
        after = _VERB.sub("", f"{texts[one + 1]} ").strip()
        if one + 1 < number:
            if after in _RELATION_OF:
                yield one, _RELATION_OF[after], one + 1
                continue
            if after == "between" and one + 2 < number and texts[one + 2] == "and":
                yield one, "middle", one
                yield from ((one, "beside", end) for end in (one + 1, one + 2))
        yield from ((one, role, one) for role, saying in PLACES.items() if _begins(after, saying))
        if one > 0 and texts[one] == "with":
            yield from (
                (one, relation, one - 1)
                for relation, sayings in AFTER.items()
                if any(_begins(after, saying) for saying in sayings)
            )
        if one > 0 and texts[one] == "and" and any(_begins(after, saying) for saying in TOGETHER):
            yield one, "beside", one - 1
    if texts[-1] == IN_ORDER:
        yield from ((one, "left", one + 1) for one in range(number - 1))


def _begins(text: str, saying: str) -> bool:
    return f"{text} ".startswith(f"{saying} ")


# ── Lessons ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def text_lesson(generator: random.Random) -> TextLesson:
    """A text about a scene that nobody has drawn."""
    scene = draw_scene(generator)
    write = reference if generator.random() < 0.65 else description
    words = keywords(scene, generator) if generator.random() < SHARE_WITH_KEYWORDS else []
    return TextLesson(words, write(scene, generator))


def picture_lesson(generator: random.Random) -> PictureLesson:
    """A scene and what it shows."""
    scene = draw_scene(generator)
    image = photograph_scene(scene, generator)
    return PictureLesson(
        pixels=pixels_of(image),
        keywords=[],
        text=description(scene, generator),
        classes=classes_of(scene),
        facts=scene.facts(),
        can_be_mirrored=False,  # left would be right
    )


def classes_of(scene: Scene) -> frozenset[str]:
    """Which of `CLASSES` a picture of it shows."""
    names = []
    for thing, role in zip(scene.things, scene.roles, strict=True):
        names += [thing.noun, f"color {thing.color}", f"{thing.noun} {role}", f"{thing.color} {role}"]
    return frozenset(f"scene {name}" for name in names)
