"""What attention looks at, against bags of which it is known; each measure is able to fail."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mivpg.bags import Bag
from mivpg.captioning import GenerationOptions
from mivpg.datasets.abo import AboConfig
from mivpg.errors import MivpgError
from mivpg.experiments.attention import (
    add_foreign_photos,
    attention_tables,
    foreign_values,
    measure_attention,
    named_values,
    pixel_values,
    redraw,
)
from mivpg.features import extract_features
from mivpg.miniature import BASE_MODEL
from mivpg.miniature.catalogue import CatalogueProduct, make_catalogue
from mivpg.miniature.drawing import Block, Camera, draw, draw_with_parts
from mivpg.miniature.wording import compose
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor


def product_of(family: str, traits: dict[str, str], *seen: str, item_id: str = "M000000000") -> CatalogueProduct:
    """A product whose photos show these traits, written with spaces."""
    return CatalogueProduct(
        item_id=item_id,
        family=family,
        traits=traits,
        seen=tuple(tuple(traits.split()) for traits in seen),
        views=("front",) * len(seen),
        captions=(),
        images=(),
    )


def bag_of(number: float, num_images: int) -> Bag:
    """Every image is known by the bag's number and its own."""
    embeds = torch.full((num_images, 2, 3), number) + 0.01 * torch.arange(num_images)[:, None, None]
    return Bag(id=str(number), images=None, image_embeds=embeds, image_coords=None, prompt="", caption=None)


def test_foreign_photos_are_of_another_family() -> None:
    bags = [bag_of(number, 2 + number % 3) for number in range(9)]
    products = [product_of(("chair", "lamp", "bed")[number // 3], {}) for number in range(9)]
    chosen = set()
    for seed in range(10):
        for number, mixed in enumerate(add_foreign_photos(bags, products, seed=seed)):
            own, foreign = mixed.image_embeds[:-2], mixed.image_embeds[-2:]
            assert torch.equal(own, bags[number].image_embeds)
            (other,) = set(foreign[:, 0, 0].floor().int().tolist())
            assert other // 3 != number // 3
            assert len(foreign.unique(dim=0)) == 2
            assert all((image == bags[other].image_embeds).flatten(1).all(dim=1).any() for image in foreign)
            chosen.add(other)
    assert chosen == set(range(9))
    again = add_foreign_photos(bags, products, seed=9)
    assert all(torch.equal(one.image_embeds, other.image_embeds) for one, other in zip(
        again, add_foreign_photos(bags, products, seed=9), strict=True
    ))  # fmt: skip


CHAIR = product_of(
    "chair",
    {"color": "red", "back": "banded", "beneath": "blue", "front": "plain", "legs": "four thin legs"},
    "color front legs",
    "color back legs",
    "color back beneath",
    "color",
)


def caption_of(product: CatalogueProduct, *spoken: str) -> str:
    return compose(product.as_product(), spoken, None)


def test_attention_to_foreign_photos_is_counted_in_even_shares() -> None:
    weights = [np.full(6, 1 / 6), np.array([0.2, 0.2, 0.2, 0.2, 0.05, 0.15])]
    right, wrong = (
        caption_of(CHAIR, "back"),
        caption_of(replace(CHAIR, traits=CHAIR.traits | {"back": "checked"}), "back"),
    )
    (uneven,) = foreign_values([np.array([0.1, 0.2, 0.4, 0.1, 0.2])], [""], [""], [CHAIR])["foreign"]["share"]
    assert uneven == pytest.approx((0.3 / 0.6 + 0.3 / 0.8 + 0.3 / 0.9) / 3)
    values = foreign_values(weights, [wrong, right], [right, right], [CHAIR, CHAIR])["foreign"]
    assert values["foreign"] == pytest.approx([1, 0.6])
    assert values["share"] == pytest.approx([0.5, 0.2 / 0.6])
    assert values["own"] == pytest.approx([1, 1.2])
    assert (values["before"], values["after"], values["after - before"]) == ([1, 1], [0, 1], [-1, 0])


def test_attention_to_photos_that_show_what_is_named() -> None:
    """Of this chair photos 2 and 3 show the back, 3 alone the underside, 1 and 2 the legs; a plain front is nothing."""
    row = np.array([0.1, 0.2, 0.4, 0.3])
    values = named_values([row, row], [caption_of(CHAIR, "back", "beneath"), caption_of(CHAIR, "color")], [CHAIR] * 2)
    assert values["named"]["attention"] == pytest.approx([(0.6 + 0.4) / 2])
    assert values["named"]["even"] == pytest.approx([(0.5 + 0.25) / 2])
    assert values["not_named"]["attention"] == pytest.approx([0.3, (0.6 + 0.4 + 0.3) / 3])
    assert values["not_named"]["attention - even"] == pytest.approx([0.3 - 0.5, 1.3 / 3 - 1.25 / 3])

    everywhere = replace(CHAIR, seen=(("back",), ("back",)))
    assert named_values([np.array([0.5, 0.5])], [""], [everywhere])["not_named"]["even"] == []


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> tuple[Path, list[CatalogueProduct]]:
    root = tmp_path_factory.mktemp("claims") / "catalogue"
    return root, make_catalogue(root, num_products=20, seed=3)


def test_photos_are_drawn_again(catalogue) -> None:
    root, products = catalogue
    for product in products[:3]:
        photos = redraw(product)
        for image_id, photo in zip(product.images, photos, strict=True):
            with Image.open(root / "images" / "small" / image_id[:2] / f"{image_id}.jpg") as image:
                assert np.abs(np.asarray(image, int) - np.asarray(photo.image, int)).mean() < 3
    with pytest.raises(MivpgError, match="another version"):
        redraw(replace(products[0], item_id=products[1].item_id))


def test_parts_are_where_their_colour_is() -> None:
    """Of two blocks beside each other, one red and one blue, which hide a third."""
    colors = {"left": (200.0, 0.0, 0.0), "right": (0.0, 0.0, 200.0), "hidden": (0.0, 200.0, 0.0)}
    places = {"left": (-0.25, 0.0), "right": (0.25, 0.0), "hidden": (0.0, 0.5)}
    shapes = [
        Block(center=(x, y, 0.5), half=(0.25, 0.1, 0.5 if y == 0 else 0.2), color=colors[part], part=part)
        for part, (x, y) in places.items()
    ]
    camera = Camera(azimuth=0, elevation=-1)  # from below there is no shadow
    picture, parts = draw_with_parts(shapes, camera, size=40)
    same_picture, shares = draw(shapes, camera, size=40)
    assert picture.tobytes() == same_picture.tobytes()
    assert shares == {part: where.mean() for part, where in parts.items()} and shares["hidden"] == 0
    red, green, blue = np.asarray(picture, int).transpose(2, 0, 1)
    for part, is_it in {"left": red > blue + 30, "right": blue > red + 30}.items():
        whole = parts[part].reshape(40, 2, 40, 2).all(axis=(1, 3))
        assert whole.sum() > 100 and (is_it == whole).mean() > 0.95
        assert is_it[whole].all()  # what differs are pixels that a part covers a half of
    assert (green <= np.maximum(red, blue)).all()


def test_weight_of_patches_on_a_part(catalogue) -> None:
    products = catalogue[1][:4]
    photos = [redraw(product) for product in products]
    even = [np.full((len(those), 64), 1 / 64) for those in photos]
    values = pixel_values(even, products, photos)["pixels"]
    assert len(values["product"]) == 4 and values["part"]
    assert values["part - area"] == pytest.approx([0] * len(values["part"]), abs=1e-12)
    assert values["product - area"] == pytest.approx([0] * 4, abs=1e-12)
    assert all(0.003 < area < 1 for area in values["part area"])

    photo = replace(photos[0][0], seen=frozenset({"legs"}), parts={"legs": np.zeros((256, 256), bool)})
    photo.parts["legs"][32 * 3 : 32 * 3 + 16, 32 * 5 : 32 * 6] = True  # half of the patch in row 3, column 5
    row = np.zeros((1, 64))
    row[0, 3 * 8 + 5], row[0, 0] = 0.6, 0.4
    values = pixel_values([row], [CHAIR], [[photo]])["pixels"]
    assert values["part"] == values["product"] == pytest.approx([0.3])
    assert values["part area"] == pytest.approx([0.5 / 64])


def test_attention_of_trained_models(catalogue, tmp_path) -> None:
    """From a catalogue and model folders to tables; a model that looks at all alike measures so."""
    root, _ = catalogue
    processor = MivpgProcessor.from_pretrained(BASE_MODEL)
    folders: dict[str, dict[int, Path]] = {}
    for arm, pooling in {"alike": "abmil", "concatenation": "none"}.items():
        model = MivpgForConditionalGeneration.from_pretrained(
            BASE_MODEL, patch_pooling=pooling, instance_correlation="none"
        )
        if arm == "alike":
            extract_features(model, processor, AboConfig(root=root).load(), tmp_path / "store")
            for layer in model.qformer.encoder.layer:
                if layer.has_cross_attention:
                    layer.crossattention.attention.key.weight.data.zero_()
        model.save_trained(tmp_path / arm)
        processor.save_pretrained(tmp_path / arm)
        folders[arm] = {0: tmp_path / arm, 1: tmp_path / arm}
    del folders["concatenation"][1]  # a run that failed

    attention = measure_attention(
        folders, root, tmp_path / "store",
        prompt="a photo of", generation=GenerationOptions(num_beams=1, max_new_tokens=8), num_redrawn=2, batch_size=3,
    )  # fmt: skip
    assert attention == json.loads(json.dumps(attention))
    alike, concatenation = attention["alike"], attention["concatenation"]
    assert (alike["seeds"], concatenation["seeds"]) == ([0, 1], [0])
    assert alike["foreign"]["foreign"]["num_bags"] == 2 * concatenation["foreign"]["foreign"]["num_bags"] == 8
    for quantity, expected in {"foreign": 1, "own": 1, "share": 0.5}.items():
        assert alike["foreign"][quantity]["mean"] == pytest.approx(expected, abs=1e-5)
        assert concatenation["foreign"][quantity]["mean"] != pytest.approx(expected, abs=1e-3)
    assert alike["not_named"]["attention - even"]["mean"] == pytest.approx(0, abs=1e-6)
    assert alike["pixels"]["part - area"]["mean"] == pytest.approx(0, abs=1e-6)  # AB-MIL starts as the mean
    assert "pixels" not in concatenation

    foreign, named, pixels = attention_tables(attention)
    assert [row[0] for row in foreign.rows] == ["alike", "concatenation"]
    assert {row[0] for row in pixels.rows} == {"alike"}
    assert all(len(row) == len(table.columns) for table in (foreign, named, pixels) for row in table.rows)
