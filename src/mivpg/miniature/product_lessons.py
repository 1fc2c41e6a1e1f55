"""What the recipe of the base model learns of products: references from keywords, and single pictures from one side.

Half of the pictures stand beside keywords of what they do not show, and the text speaks of both, so that what is read
from a picture leaves room for more.
"""

import random
from collections.abc import Mapping

from mivpg.miniature.catalogue import PHOTO_SIZE
from mivpg.miniature.lessons import SHARE_WITH_KEYWORDS, PictureLesson, TextLesson, pixels_of
from mivpg.miniature.products import FAMILIES, HIDDEN_TRAITS, draw_product, photograph
from mivpg.miniature.wording import HEAD, PARTS, keywords, picture_description, reference, said, says_noun

CLASSES = (
    *(f"product {family}" for family in FAMILIES),
    *sorted(
        {
            f"product {trait} {value}"
            for family in FAMILIES.values()
            for trait, values in family.traits.items()
            for value in values
        }
    ),
)
"""Families, and values of traits."""


def text_lesson(generator: random.Random) -> TextLesson:
    """A text about a product that nobody has drawn: more often a reference than a description of one picture."""
    product = draw_product(generator)
    hidden = {trait for trait in HIDDEN_TRAITS if generator.random() < 0.65}
    seen = {"family"} | {trait for trait in product.traits if trait not in HIDDEN_TRAITS} | hidden
    write = reference if generator.random() < 0.65 else picture_description
    words = keywords(product, seen, generator) if generator.random() < SHARE_WITH_KEYWORDS else []
    return TextLesson(words, write(product, seen, generator))


def picture_lesson(generator: random.Random) -> PictureLesson:
    """A product from one side, and what that picture shows; half of them beside keywords of what it does not show."""
    product = draw_product(generator)
    view = generator.choice(("front", "front", *FAMILIES[product.family].views))
    photo = photograph(product, view, generator, size=PHOTO_SIZE)
    told = set()
    if generator.random() < 0.5:
        told = {trait for trait in sorted(product.traits.keys() - photo.seen) if generator.random() < 0.65}
    shown = {f"product {trait} {value}" for trait, value in product.traits.items() if trait in photo.seen}
    return PictureLesson(
        pixels=pixels_of(photo.image),
        keywords=keywords(product, told, generator),
        text=picture_description(product, photo.seen | told, generator),
        classes=frozenset({f"product {product.family}"} | shown),
        facts={"family": product.family} | product.traits,
    )


def right_of_said(caption: str, facts: Mapping[str, str]) -> dict[str, bool]:
    """Whether what a caption says of the family and of each trait is so; what it does not speak of is left out."""
    family = facts["family"]
    right = {"family": says_noun(caption, family)}
    for trait in (*HEAD, *PARTS):
        if trait in facts and (spoken := said(caption, trait, FAMILIES[family].traits[trait])) is not None:
            right[trait] = spoken == facts[trait]
    return right
