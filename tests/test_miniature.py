"""The generated catalogue: what is drawn, what is said of it, and the files that the reader of ABO finds.

Each is compared with something made otherwise: rays with a walk along them, shares with areas known in closed form, the
traits that a photo shows with what changes in it when they change, sentences with the traits they were made from.
"""

import csv
import gzip
import json
import random
import re
import warnings
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from generated import contents, interrupt_after
from mivpg.datasets import AboConfig
from mivpg.errors import MivpgError
from mivpg.miniature import catalogue
from mivpg.miniature.catalogue import PHOTO_SIZE, CatalogueProduct, make_catalogue, read_truth
from mivpg.miniature.drawing import Block, Camera, Frustum, Material, Paint, Pattern, Shape, draw
from mivpg.miniature.families import COLORS, FAMILIES, HIDDEN_COLORS, Product
from mivpg.miniature.products import HIDDEN_TRAITS, choose_views, draw_product, photograph
from mivpg.miniature.wording import (
    HEAD,
    NOUNS,
    PARTS,
    article,
    compose,
    part_phrases,
    picture_description,
    reference,
    said,
    usual_reference,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
every_second_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if i % 2 else ()) for i, name in enumerate(FAMILIES)]
)
"""The others in `make test-all`: each is a second of drawing."""

WHITE = (250, 250, 250)
FACING = Camera(azimuth=0, elevation=0)


# ── Drawing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def random_rays(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A place 4 from the middle, and directions (3, n) of length one, some of which miss what spans -1 to 1."""
    generator = np.random.default_rng(number)
    origin = generator.normal(size=3)
    origin *= 4 / np.linalg.norm(origin)
    rays = generator.uniform(-1.6, 1.6, size=(3, number)) - origin[:, None]
    return origin.astype(np.float32), (rays / np.linalg.norm(rays, axis=0)).astype(np.float32)


def walk(inside, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Small steps along each ray: where it enters (infinite: nowhere), and how deep inside it ever gets.

    Args:
        inside: A function of places (3, n, steps), negative inside.
        origin: (3,).
        rays: (3, n).
    """
    steps = np.linspace(2, 6, 1600)
    values = inside(origin[:, None, None] + rays[:, :, None] * steps)  # (n, steps)
    entered = values < 0
    first = np.where(entered.any(axis=1), steps[entered.argmax(axis=1)], np.inf)
    return first, values.min(axis=1)


class TestRays:
    @pytest.mark.parametrize("roundness", [(2, 2, 2), (4, 4, 2), (2, 2, 8), (8, 8, 4), (2, 8, 2), (16, 8, 16)])
    def test_rounded_block(self, roundness):
        def inside(places):
            return sum(np.abs(place) ** power for place, power in zip(places, roundness, strict=True)) - 1

        origin, rays = random_rays(600)
        lengths, outward = Block(center=(0, 0, 0), half=(1, 1, 1), color=WHITE, roundness=roundness).hit(origin, rays)
        first, deepest = walk(inside, origin.astype(float), rays.astype(float))
        surely, never = deepest < -0.05, deepest > 0.05  # the rest graze it
        assert surely.sum() > 150 and never.sum() > 80
        assert np.isinf(lengths[never]).all()
        np.testing.assert_allclose(lengths[surely], first[surely], atol=0.03)
        places = origin[:, None] + lengths[surely] * rays[:, surely]
        away = outward[:, surely] / np.linalg.norm(outward[:, surely], axis=0)
        assert (inside(places + 0.02 * away) > 0).all() and (inside(places - 0.05 * away) < 0).all()

    def test_ball_in_closed_form(self):
        origin, rays = random_rays(900)
        lengths, outward = Block(center=(0, 0, 0), half=(1, 1, 1), color=WHITE, roundness=(2, 2, 2)).hit(origin, rays)
        square, along = (rays**2).sum(axis=0), origin @ rays
        discriminant = along**2 - square * (origin @ origin - 1)
        hits = discriminant > 0.05
        expected = (-along[hits] - np.sqrt(discriminant[hits])) / square[hits]
        np.testing.assert_allclose(lengths[hits], expected, rtol=1e-3)
        places = origin[:, None] + lengths[hits] * rays[:, hits]
        np.testing.assert_allclose(outward[:, hits] / 2, places, atol=2e-2)
        assert np.isinf(lengths[discriminant < -0.05]).all()

    def test_sharp_box(self):
        def inside(places):
            return np.abs(places).max(axis=0) - 1

        origin, rays = random_rays(700)
        lengths, outward = Block(center=(0, 0, 0), half=(1, 1, 1), color=WHITE).hit(origin, rays)
        first, deepest = walk(inside, origin.astype(float), rays.astype(float))
        surely, never = deepest < -0.02, deepest > 0.01
        assert surely.sum() > 200 and never.sum() > 80
        assert np.isinf(lengths[never]).all()
        np.testing.assert_allclose(lengths[surely], first[surely], atol=0.005)
        places = origin[:, None] + lengths[surely] * rays[:, surely]
        np.testing.assert_allclose((outward[:, surely] * places).sum(axis=0), 1, atol=1e-4)  # of a face it lies in
        assert (np.abs(outward[:, surely]).sum(axis=0) == 1).all()

    @pytest.mark.parametrize(("top", "bottom"), [(1.0, 1.0), (0.35, 1.0), (1.0, 0.7)])
    def test_closed_frustum(self, top, bottom):
        def inside(places):
            x, y, z = places
            return np.maximum(np.hypot(x, y) - ((top + bottom) / 2 + (top - bottom) / 2 * z), np.abs(z) - 1)

        origin, rays = random_rays(600)
        frustum = Frustum(center=(0, 0, 0), half=(1, 1, 1), color=WHITE, top=top, bottom=bottom)
        lengths, outward = frustum.hit(origin, rays)
        first, deepest = walk(inside, origin.astype(float), rays.astype(float))
        surely, never = deepest < -0.02, deepest > 0.01
        assert surely.sum() > 150 and never.sum() > 80
        assert np.isinf(lengths[never]).all()
        np.testing.assert_allclose(lengths[surely], first[surely], atol=0.01)
        places = origin[:, None] + lengths[surely] * rays[:, surely]
        away = outward[:, surely] / np.linalg.norm(outward[:, surely], axis=0)
        assert (inside(places + 0.01 * away) > 0).all() and (inside(places - 0.01 * away) < 0).all()

    @pytest.mark.parametrize(("top", "bottom"), [(1.0, 1.0), (0.35, 1.0), (1.0, 0.7)])
    def test_side_of_a_frustum_in_closed_form(self, top, bottom):
        frustum = Frustum(center=(0, 0, 0), half=(1, 1, 1), color=WHITE, top=top, bottom=bottom)
        lengths, outward = frustum.hit(np.array([4, 0, 0], np.float32), np.array([[-1.0], [0.0], [0.0]], np.float32))
        assert lengths == pytest.approx([4 - (top + bottom) / 2])
        assert outward[0, 0] > 0 and outward[1, 0] == 0
        along = np.array([(top - bottom) / 2, 0, 1])  # up the side, which light has to meet at a right angle
        assert along @ outward[:, 0] == pytest.approx(0, abs=1e-6)

    def test_open_frustum_lets_rays_through_its_ends(self):
        tube = Frustum(center=(0, 0, 0), half=(1, 1, 1), color=WHITE, is_open=True)
        down = np.array([[0.0], [0.0], [-1.0]], np.float32)
        assert np.isinf(tube.hit(np.array([0.5, 0, 4], np.float32), down)[0])
        steep = np.array([[0.25], [0.0], [-1.0]], np.float32)  # in at the top, on to the wall at x = 1 from within
        lengths, outward = tube.hit(np.array([0, 0, 4], np.float32), steep)
        np.testing.assert_allclose(lengths, [4.0], rtol=1e-5)
        np.testing.assert_allclose(outward[:, 0] / np.linalg.norm(outward[:, 0]), [1, 0, 0], atol=1e-5)
        closed = Frustum(center=(0, 0, 0), half=(1, 1, 1), color=WHITE)
        assert closed.hit(np.array([0, 0, 4], np.float32), steep)[0] == pytest.approx([3.0])

    def test_what_lies_behind_the_eye_is_not_met(self):
        away = np.array([[0.0], [-1.0], [0.0]], np.float32)
        eye = np.array([0, -4, 0], np.float32)
        for shape in (
            Block(center=(0, 0, 0), half=(1, 1, 1), color=WHITE),
            Block(center=(0, 0, 0), half=(1, 1, 1), color=WHITE, roundness=(2, 2, 2)),
            Frustum(center=(0, 0, 0), half=(1, 1, 1), color=WHITE),
        ):
            assert np.isinf(shape.hit(eye, away)[0])
            assert np.isfinite(shape.hit(eye, -away)[0])


def pixels(shapes: list[Shape], camera: Camera, size: int = 64) -> np.ndarray:
    return np.asarray(draw(shapes, camera, size=size)[0])


class TestDraw:
    def test_shares_are_areas(self):
        """A box seen head-on is a square, which tells how far away it is seen from; a ball is a circle from there."""
        half = (0.5, 0.5, 0.5)
        _, box = draw([Block(center=(0, 0, 0.5), half=half, color=WHITE)], FACING, size=200)
        per_length = np.sqrt(box["body"]) / 1.0  # share of the picture's side that a length on the box's face takes
        # The square's side is 1 / (2 (D - 0.5) tan), and tan is half of a picture 28 degrees wide.
        distance = 0.5 + 1 / (2 * per_length * np.tan(np.radians(14)))
        circle = np.tan(np.arcsin(0.5 / distance)) / np.tan(np.radians(14)) / 2  # radius
        _, ball = draw([Block(center=(0, 0, 0.5), half=half, color=WHITE, roundness=(2, 2, 2))], FACING, size=200)
        assert ball["body"] == pytest.approx(np.pi * circle**2, rel=0.01)
        _, tube = draw([Frustum(center=(0, 0, 0.5), half=half, color=WHITE, turn=(90, 0, 0))], FACING, size=200)
        assert tube["body"] == pytest.approx(np.pi / 4 * box["body"], rel=0.01)  # its nearer end

    def test_half_a_picture_is_half_the_share(self):
        halves = [
            Block(center=(x, 0, 0.5), half=(0.25, 0.5, 0.5), color=WHITE, part=part)
            for x, part in ((-0.25, "left"), (0.25, "right"))
        ]
        picture, shares = draw(halves, FACING, size=100)
        assert shares["left"] == pytest.approx(shares["right"], rel=1e-6)
        whole = draw([Block(center=(0, 0, 0.5), half=(0.5, 0.5, 0.5), color=WHITE)], FACING, size=100)[1]["body"]
        assert shares["left"] + shares["right"] == pytest.approx(whole, rel=1e-6)
        assert picture.size == (100, 100)

    @pytest.mark.parametrize(
        ("camera", "part"),
        [
            (FACING, "front"),
            (Camera(azimuth=180, elevation=0), "back"),
            (Camera(azimuth=90, elevation=0), "left"),
            (Camera(azimuth=-90, elevation=0), "right"),
            (Camera(azimuth=0, elevation=89), "top"),
            (Camera(azimuth=0, elevation=-89), "beneath"),
        ],
    )
    def test_each_side_is_seen_from_its_own(self, camera, part):
        sides = {
            "front": (1, -1), "back": (1, 1), "left": (0, -1), "right": (0, 1), "top": (2, 1), "beneath": (2, -1),
        }  # fmt: skip
        paints = tuple(Paint(part=name, color=WHITE, face=face) for name, face in sides.items())
        _, shares = draw([Block(center=(0, 0, 0.5), half=(0.5, 0.5, 0.5), color=WHITE, paints=paints)], camera, size=64)
        assert max(shares, key=shares.__getitem__) == part
        assert shares[part] > 0.95 * sum(shares.values()) > 0.3

    @pytest.mark.parametrize("azimuth", [0, 30, 140])
    def test_nothing_shows_through_what_stands_in_front(self, azimuth):
        screen = Block(center=(0, 0, 0.5), half=(0.6, 0.05, 0.5), color=(200, 30, 30), part="screen")
        ball = Block(center=(0, 0.3, 0.5), half=(0.1, 0.1, 0.1), color=WHITE, roundness=(2, 2, 2), part="ball")
        camera = Camera(azimuth=azimuth, elevation=5)
        shares = draw([screen, ball], camera, size=64)[1]
        assert (shares["ball"] == 0) == (azimuth != 140)
        np.testing.assert_array_equal(pixels([screen, ball], camera), pixels([ball, screen], camera))
        if azimuth != 140:
            painted = replace(ball, color=(10, 200, 10))
            np.testing.assert_array_equal(pixels([screen, ball], camera), pixels([screen, painted], camera))

    def test_all_of_it_is_in_the_picture(self):
        generator = random.Random(0)
        for number in range(40):
            product = draw_product(generator)
            camera = Camera(azimuth=generator.uniform(-180, 180), elevation=generator.uniform(-60, -5))  # no shadow
            image = pixels(product.shapes(is_open=number % 2 == 1), camera, size=48)
            border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
            assert (border == 255).all(), (product, camera)

    def test_the_same_scene_gives_the_same_bytes_and_no_warning(self):
        generator = random.Random(1)
        with warnings.catch_warnings(), np.errstate(divide="raise", over="raise", invalid="raise"):
            warnings.simplefilter("error")
            for camera in (FACING, Camera(azimuth=90, elevation=90), Camera(azimuth=17, elevation=-45)):
                for family in FAMILIES:
                    shapes = draw_product(generator, family).shapes()
                    first, again = (draw(shapes, camera, size=40) for _ in range(2))
                    assert first[0].tobytes() == again[0].tobytes() and first[1] == again[1]
                    assert sum(first[1].values()) <= 1

    def test_patterns_are_told_apart(self):
        pictures = {}
        for pattern in get_args(Pattern):
            paint = Paint(part="front", face=(1, -1), color=(20, 20, 20), pattern=pattern, size=0.25)
            block = Block(center=(0, 0, 0.5), half=(0.5, 0.1, 0.5), color=WHITE, paints=(paint,))
            pictures[pattern] = pixels([block], FACING).astype(float)
        for one in get_args(Pattern):
            for other in get_args(Pattern):
                changed = (np.abs(pictures[one] - pictures[other]).max(axis=-1) > 100).mean()
                assert changed == 0 if one == other else changed > 0.1, (one, other)


# ── Products ────────────────────────────────────────────────────────────────────────────────────────────────────────


def views_of(product: Product) -> tuple[str, ...]:
    return ("front", *FAMILIES[product.family].views)


class TestProducts:
    @every_second_family
    def test_every_value_is_drawn_from_every_view(self, family):
        values = FAMILIES[family].traits
        generator = random.Random(family)
        for number in range(max(map(len, values.values()))):
            traits = {trait: options[number % len(options)] for trait, options in values.items()}
            product = Product(family=family, traits=traits, stretch=draw_product(generator, family).stretch)
            for view in views_of(product):
                photo = photograph(product, view, generator, size=24)
                assert photo.view == view
                assert {"family", "shape"} & (traits.keys() | {"family"}) <= photo.seen
                assert "color" in photo.seen or (family == "bed" and view in ("back", "beneath"))
                assert photo.seen <= traits.keys() | {"family"}

    @every_second_family
    def test_no_two_values_of_a_trait_look_alike(self, family):
        where = {"back": "back", "beneath": "beneath", "inside": "inside", "ends": "side"}
        if family == "lamp":
            where["inside"] = "beneath"
        product = draw_product(random.Random(f"apart {family}"), family)
        for trait, values in FAMILIES[family].traits.items():
            alternatives = [replace(product, traits=product.traits | {"front": "plain", trait: v}) for v in values]
            pictures = [
                np.asarray(photograph(one, where.get(trait, "front"), random.Random(0), size=64).image, int)
                for one in alternatives
            ]
            for (a, one), (b, other) in combinations(zip(values, pictures, strict=True), 2):
                assert (np.abs(one - other).max(axis=-1) > 10).mean() > 0.01, (trait, a, b)

    @every_family
    def test_colours_and_patterns_are_such_as_can_be_drawn(self, family):
        """A pattern that `drawing` does not know would be drawn as a plain one."""
        kinds = {"color": COLORS, "material": get_args(Material), "beneath": HIDDEN_COLORS, "inside": HIDDEN_COLORS}
        kinds |= dict.fromkeys(("front", "back", "ends"), get_args(Pattern))
        for trait in kinds.keys() & FAMILIES[family].traits:
            assert set(FAMILIES[family].traits[trait]) <= set(kinds[trait]), trait

    def test_random_products_have_one_value_of_each_trait(self):
        found = Counter()
        for seed in range(2000):
            product = draw_product(random.Random(seed))
            options = FAMILIES[product.family].traits
            assert product.traits.keys() == options.keys()
            assert all(value in options[trait] for trait, value in product.traits.items())
            for hidden in ("beneath", "inside"):
                assert product.traits.get(hidden) != product.traits["color"]
            found.update((product.family, *item) for item in product.traits.items())
        assert len(found) == sum(len(values) for family in FAMILIES.values() for values in family.traits.values())

    @every_second_family
    def test_the_main_photo_hides_and_another_shows(self, family):
        """What is hidden is never seen in the overview, and always from the view that is named for it."""
        where = {"back": "back", "beneath": "beneath", "inside": "inside", "ends": "side"}
        if family == "lamp":
            where["inside"] = "beneath"
        generator = random.Random(family)
        shown, number = Counter(), 25
        for _ in range(number):
            product = draw_product(generator, family)
            hidden = {trait for trait in HIDDEN_TRAITS if trait in product.traits}
            main = photograph(product, "front", generator, size=48)
            assert not main.seen & hidden
            for trait in hidden:
                shown[trait] += trait in photograph(product, where[trait], generator, size=48).seen
        assert shown and all(count >= 0.95 * number for count in shown.values()), shown

    @every_second_family
    def test_seen_is_what_changes_the_photo(self, family):
        """The same photo of a product that differs in one trait: many pixels differ if it is seen, few if it is not."""
        generator = random.Random(f"changes {family}")
        size, counts = 40, Counter()
        for number in range(5):
            product = draw_product(generator, family)
            for trait in ("front", *HIDDEN_TRAITS):
                if trait not in product.traits:
                    continue
                plain, other = ("plain", "checked") if trait in ("front", "back", "ends") else HIDDEN_COLORS[:2]
                if trait == "front" and other not in FAMILIES[family].traits[trait]:
                    other = "striped"
                for view in views_of(product):
                    one, two = (
                        photograph(
                            replace(product, traits=product.traits | {trait: value}),
                            view,
                            random.Random(number),
                            size=size,
                        )
                        for value in (plain, other)
                    )
                    difference = np.abs(np.asarray(one.image, int) - np.asarray(two.image, int)).max(axis=-1)
                    changed = (difference > 25).mean()
                    if trait in two.seen:
                        assert changed > 0.002, (product, trait, view, changed)
                    elif view == "front" and trait in HIDDEN_TRAITS:
                        assert changed == 0, (product, trait)
                    else:
                        assert changed < 0.03, (product, trait, view, changed)
                    counts[trait in two.seen] += 1
        assert counts[True] and counts[False]

    @every_family
    def test_photo_is_a_function_of_the_generator(self, family):
        product = draw_product(random.Random(family), family)
        one, same, other = (photograph(product, "front", random.Random(seed), size=32) for seed in (3, 3, 4))
        assert one.image.tobytes() == same.image.tobytes() != other.image.tobytes()
        assert one.seen == same.seen

    def test_views(self):
        lengths = Counter()
        for seed in range(3000):
            generator = random.Random(seed)
            product = draw_product(generator)
            main, *others = choose_views(product, generator)
            assert main == "front" and set(others) <= {"front", *FAMILIES[product.family].views}
            lengths[1 + len(others)] += 1
        assert set(lengths) == set(range(2, 9))


# ── Wording ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def readings(text: str, product: Product) -> dict[str, str]:
    """The traits that a text speaks of, and the values it gives them."""
    values = FAMILIES[product.family].traits
    found = {trait: said(text, trait, values[trait]) for trait in values}
    return {trait: value for trait, value in found.items() if value is not None}


def speakable(product: Product, traits) -> dict[str, str]:
    """Of these traits, those for whose values references have words."""
    return {
        trait: product.traits[trait]
        for trait in traits
        if trait in product.traits and (trait in HEAD or part_phrases(trait, product.traits[trait]))
    }


def begins_right(text: str, read: dict[str, str], product: Product) -> bool:
    """Whether a text begins with the adjectives it was read to have, in their order, and the product's noun."""
    adjectives = [read[trait] for trait in HEAD if trait in read]
    names = (" ".join([*adjectives, noun]) for noun in NOUNS[product.family])
    return any(re.match(f"an? {re.escape(name)}(?![a-z])", text) for name in names)


def num_phrases(text: str) -> int:
    """How many phrases follow a product's noun."""
    _, _, rest = text.partition(min(re.findall(r" (?:with|having|\. it has)|\. it has|\.$", text), key=text.index))
    return len(re.split(r", | and having | and ", rest)) if rest.strip(" .") else 0


def random_subset(generator: random.Random, items) -> set[str]:
    often = generator.random()
    return {item for item in items if generator.random() < often}


class TestWording:
    def test_composed_sentences_read_back_exactly(self):
        for seed in range(2500):
            generator = random.Random(seed)
            product = draw_product(generator)
            spoken = random_subset(generator, product.traits)
            text = compose(product, spoken, generator)
            assert readings(text, product) == speakable(product, spoken), (text, product, spoken)

    def test_references_speak_of_what_is_seen_alone(self):
        lengths = Counter()
        for seed in range(2500):
            generator = random.Random(f"reference {seed}")
            product = draw_product(generator)
            seen = random_subset(generator, product.traits) | {"family"}
            text = reference(product, seen, generator)
            read = readings(text, product)
            assert read.items() <= speakable(product, seen).items(), (text, product, seen)
            # Nothing else is in it: as many phrases as traits after the noun, and no other words before it.
            assert num_phrases(text) == len(read.keys() & set(PARTS)), text
            assert begins_right(text, read, product), text
            lengths[num_phrases(text)] += 1
        assert len(lengths) >= 6

    def test_descriptions_speak_of_what_is_seen_alone(self):
        for seed in range(2500):
            generator = random.Random(f"description {seed}")
            product = draw_product(generator)
            seen = random_subset(generator, product.traits) | {"family"}
            text = picture_description(product, seen, generator)
            read = readings(text, product)
            assert read.items() <= speakable(product, seen).items(), (text, product, seen)
            assert num_phrases(text) == len(read.keys() & set(PARTS)), text
            assert read.keys() >= seen & set(HIDDEN_TRAITS), text  # which is what such pictures are for
            assert begins_right(text, read, product), text

    def test_usual_reference(self):
        for seed in range(2000):
            generator = random.Random(f"usual {seed}")
            product = draw_product(generator)
            seen = random_subset(generator, product.traits) | {"family"}
            text = usual_reference(product, seen)
            assert readings(text, product) == speakable(product, seen - {"material", "arms"}), text
            assert begins_right(text, readings(text, product), product)
            assert text == usual_reference(product, seen)

    @every_family
    def test_the_most_common_wording_is_the_usual_one(self, family):
        product = draw_product(random.Random(family), family)
        spoken = set(product.traits) - {"material", "arms"}
        texts = Counter(compose(product, spoken, random.Random(seed)) for seed in range(1500))
        (most_common, count), (_, second) = texts.most_common(2)
        assert most_common == usual_reference(product, product.traits.keys())
        assert count > second

    def test_an_example_of_each_manner(self):
        product = Product(
            family="sofa",
            traits={
                "color": "orange",
                "material": "leather",
                "shape": "one seater",
                "legs": "four short legs",
                "arms": "low armrests",
                "front": "plain",
                "back": "banded",
                "beneath": "yellow",
            },
            stretch=(1, 1, 1),
        )
        assert (
            usual_reference(product, product.traits.keys())
            == "an orange one seater sofa with four short legs, a banded back and a yellow underside."
        )
        assert usual_reference(product, {"shape"}) == "a one seater sofa."
        assert usual_reference(product, {"arms", "front"}) == "a sofa."

    @pytest.mark.parametrize(
        ("caption", "trait", "value"),
        [
            ("a red round chair with a round base", "shape", "round"),
            ("a red chair with a round base", "shape", None),
            ("a red chair with a round base", "legs", "round base"),
            ("a blue bottle with a red cap", "color", "blue"),
            ("a bottle with a red cap", "color", None),
            ("A Red Chair.", "color", "red"),
            ("a red chair with a banded pattern on the back", "back", "banded"),
            ("a red chair with a banded pattern on the back", "front", None),
            ("a bag with two handles", "extra", "two handles"),
            ("a sofa", "extra", None),
            ("", "color", None),
        ],
    )
    def test_reads_what_a_model_may_write(self, caption, trait, value):
        every_value = {v for family in FAMILIES.values() for v in family.traits.get(trait, ())}
        assert said(caption, trait, every_value) == value

    def test_articles(self):
        words = {"orange": "an", "ottoman": "an", "one": "a", "red": "a", "white": "a", "hexagonal": "a", "yellow": "a"}
        assert {word: article(word) for word in words} == words
        generator = random.Random(0)
        texts = []
        for _ in range(2000):
            product = draw_product(generator)
            texts.append(reference(product, product.traits, generator))
            texts.append(picture_description(product, product.traits, generator))
        pairs = {pair for text in texts for pair in re.findall(r"\b(an?) (\w+)", text)}
        sounds_open = {"orange", "ottoman"}
        assert {word for indefinite, word in pairs if indefinite == "an"} == sounds_open
        assert not sounds_open & {word for indefinite, word in pairs if indefinite == "a"}
        assert ("a", "one") in pairs
        assert not re.search(r"  | \.|\.\.|,,", " ".join(texts).replace(". ", "."))


# ── Catalogue ───────────────────────────────────────────────────────────────────────────────────────────────────────

NUM_PRODUCTS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[CatalogueProduct]]:
    root = tmp_path_factory.mktemp("catalogue") / "new" / "folder"
    return root, make_catalogue(root, num_products=NUM_PRODUCTS, seed=0)


class TestCatalogue:
    def test_same_seed_same_bytes(self, made, tmp_path):
        root, products = made
        assert make_catalogue(tmp_path, num_products=NUM_PRODUCTS, seed=0) == products
        assert contents(tmp_path) == contents(root)
        names = {name for name in contents(root) if not name.startswith("images/small/")}
        assert names == {
            "listings/metadata/listings_0.json.gz",
            "images/metadata/images.csv.gz",
            "captions.json",
            "truth.json",
            "miniature.json",
        }

    def test_a_larger_catalogue_begins_with_the_smaller(self, made, tmp_path):
        assert make_catalogue(tmp_path, num_products=NUM_PRODUCTS + 1, seed=0)[:-1] == made[1]

    def test_another_seed_other_products(self, made, tmp_path):
        _, products = made
        others = make_catalogue(tmp_path, num_products=NUM_PRODUCTS, seed=1)
        assert [product.traits for product in others] != [product.traits for product in products]
        for field in ("item_id", "captions"):
            assert not {getattr(p, field) for p in others} & {getattr(p, field) for p in products}
        assert not {i for p in others for i in p.images} & {i for p in products for i in p.images}

    def test_reader_finds_what_is_true(self, made):
        root, products = made
        samples = AboConfig(root=root, split="all").load()
        assert [sample.id for sample in samples] == [product.item_id for product in products]
        for sample, product in zip(samples, products, strict=True):
            assert sample.label == product.family.upper()
            assert sample.captions == product.captions
            assert [path.stem for path in sample.images] == list(product.images)
            assert len(product.images) == len(product.seen) == len(product.views)
            for path in sample.images:
                with Image.open(path) as image:
                    image.load()
                    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (PHOTO_SIZE, PHOTO_SIZE))
        assert len(AboConfig(root=root).load()) == NUM_PRODUCTS
        photos = sorted(path.stem for path in root.rglob("*.jpg"))
        assert photos == sorted(image for product in products for image in product.images)
        assert read_truth(root) == products

    def test_image_table_is_abos(self, made):
        with gzip.open(made[0] / "images" / "metadata" / "images.csv.gz", "rt", newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["image_id", "height", "width", "path"]
        assert all(row[1:] == [str(PHOTO_SIZE), str(PHOTO_SIZE), f"{row[0][:2]}/{row[0]}.jpg"] for row in rows[1:])

    def test_photos_are_of_their_product(self, made):
        """Drawn again from the same seed, without JPEG: hardly anything differs."""
        root, products = made
        generator = random.Random("catalogue 0 0")
        product = draw_product(generator)
        views = choose_views(product, generator)
        assert (product.family, product.traits, tuple(views)) == (
            products[0].family, products[0].traits, products[0].views,
        )  # fmt: skip
        for image_id, view, seen in zip(products[0].images, views, products[0].seen, strict=True):
            photo = photograph(product, view, generator, size=PHOTO_SIZE)
            assert photo.seen == set(seen)
            with Image.open(root / "images" / "small" / image_id[:2] / f"{image_id}.jpg") as image:
                assert np.abs(np.asarray(image, int) - np.asarray(photo.image, int)).mean() < 3

    def test_references_speak_of_what_photos_show(self, tmp_path, monkeypatch):
        """Many products, photographed as stamps."""
        monkeypatch.setattr(catalogue, "PHOTO_SIZE", 24)
        counts, numbers = Counter(), Counter()
        for index in range(120):
            product = catalogue._product(catalogue._make_product(tmp_path, 5, index))
            assert 2 <= len(product.images) <= 8 and product.views[0] == "front"
            assert 1 <= len(product.captions) <= 5 and len(set(product.captions)) == len(product.captions)
            everything = set().union(*product.seen)
            assert product.hidden() == everything - set(product.seen[0])
            for caption in product.captions:
                read = readings(caption, product.as_product())
                assert read.items() <= speakable(product.as_product(), everything).items()
                counts["hidden"] += len(read.keys() & product.hidden())
                counts["references"] += 1
            numbers[len(product.images), len(product.captions)] += 1
        assert counts["hidden"] > counts["references"]  # more than one a reference
        assert {images for images, _ in numbers} >= set(range(2, 7)) and {c for _, c in numbers} == {1, 2, 3, 4, 5}

    @pytest.mark.parametrize("after", [0, 4, NUM_PRODUCTS])
    def test_interrupted_and_gone_on_with(self, made, tmp_path, monkeypatch, after):
        root, products = made
        unfinished = tmp_path / "records.partial.jsonl"
        for count in (after, 0):  # twice, the second time before anything is noted
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                interrupt_after(patch, count)
                make_catalogue(tmp_path, num_products=NUM_PRODUCTS, seed=0)
            assert len(unfinished.read_text().splitlines()) == 1 + after
            with unfinished.open("a") as file:  # and as if it was killed while it wrote
                file.write('{"index": 5, "record": {"item_id": "M0000')
        photo = next(tmp_path.rglob("*.jpg"))
        photo.with_suffix(".partial").write_bytes(photo.read_bytes()[:100])
        assert make_catalogue(tmp_path, num_products=NUM_PRODUCTS, seed=0) == products
        photo.with_suffix(".partial").unlink(missing_ok=True)  # of a product that was noted already: nobody's
        assert contents(tmp_path) == contents(root)

    def test_killed_twice_in_the_middle_of_a_line(self, made, tmp_path, monkeypatch):
        """What was cut short does not run into the line that comes next."""
        root, products = made
        unfinished = tmp_path / "records.partial.jsonl"
        for noted in (2, 4):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                interrupt_after(patch, 2)
                make_catalogue(tmp_path, num_products=NUM_PRODUCTS, seed=0)
            assert len(unfinished.read_text().splitlines()) == 1 + noted
            with unfinished.open("a") as file:
                file.write('{"index": 5, "record": {"item_id": "M0000')
        assert make_catalogue(tmp_path, num_products=NUM_PRODUCTS, seed=0) == products
        assert contents(tmp_path) == contents(root)

    def test_killed_at_the_first_or_the_last_moment(self, made, tmp_path):
        root, products = made
        (tmp_path / "records.partial.jsonl").write_text('{"generator": "miv')
        assert make_catalogue(tmp_path, num_products=NUM_PRODUCTS, seed=0) == products
        (tmp_path / "records.partial.jsonl").write_text("left over\n")
        assert make_catalogue(tmp_path, num_products=NUM_PRODUCTS, seed=0) == products
        assert contents(tmp_path) == contents(root)

    def test_a_finished_one_is_read(self, made, monkeypatch):
        monkeypatch.setattr(catalogue, "_make_product", lambda *_: pytest.fail("draws again"))
        before = contents(made[0])
        assert make_catalogue(made[0], num_products=NUM_PRODUCTS, seed=0) == made[1]
        assert contents(made[0]) == before


def fail(root: Path, **arguments) -> str:
    """The one line that a bad input gives."""
    with pytest.raises(MivpgError) as error:
        make_catalogue(root, **{"num_products": NUM_PRODUCTS, "seed": 0} | arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestBadInput:
    @pytest.mark.parametrize(
        "arguments", [{"num_products": 0}, {"num_products": -1}, {"num_products": 1_000_001}, {"seed": -1}]
    )
    def test_numbers(self, tmp_path, arguments):
        assert str(next(iter(arguments.values()))) in fail(tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()

    def test_folder_in_use(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        assert f"{tmp_path} is not empty (thesis.txt)" in fail(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize("arguments", [{"num_products": 7}, {"seed": 3}])
    @pytest.mark.parametrize("is_finished", [True, False])
    def test_other_seed_or_number(self, made, tmp_path, arguments, is_finished):
        root = made[0]
        if not is_finished:
            root = tmp_path
            (root / "records.partial.jsonl").write_text(
                json.dumps(json.loads((made[0] / "miniature.json").read_text())) + "\n"
            )
        ((name, value),) = arguments.items()
        assert f"{name} = {NUM_PRODUCTS if name == 'num_products' else 0}, and {value} is asked for" in fail(
            root, **arguments
        )

    DAMAGE = (b"", b"{", b"\xff\xfe", b"[]", b"{}", b"[{}]", b"[null]", b"3", b'[{"item_id": "M"}]', b"[" * 100_000)

    @pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
    @pytest.mark.parametrize("name", ["truth.json", "miniature.json", "records.partial.jsonl"])
    def test_damaged(self, made, tmp_path, name, content):
        if name != "records.partial.jsonl":
            for copied in ("truth.json", "miniature.json"):
                (tmp_path / copied).write_bytes((made[0] / copied).read_bytes())
        (tmp_path / name).write_bytes(content + (b"\n" if name.endswith("l") else b""))
        assert str(tmp_path) in fail(tmp_path)

    def test_damaged_record_of_an_interrupted_run(self, made, tmp_path):
        header = json.dumps(json.loads((made[0] / "miniature.json").read_text()))
        for entry in ('{"index": 0}', '{"index": 0, "record": {}}'):
            (tmp_path / "records.partial.jsonl").write_text(f"{header}\n{entry}\n")
            assert "records.partial.jsonl" in fail(tmp_path)

    def test_no_truth(self, made, tmp_path):
        with pytest.raises(MivpgError, match=r"truth\.json"):
            read_truth(tmp_path)
        (tmp_path / "miniature.json").write_bytes((made[0] / "miniature.json").read_bytes())
        assert "truth.json" in fail(tmp_path)

    def test_where_nothing_can_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            make_catalogue(tmp_path / "file" / "catalogue", num_products=1)
