"""What people write of a product, and what a single picture is described with.

A **catalogue reference** describes a product as annotators of Amazon Berkeley Objects do (the paper's Figure 6 and
appendix C.3): "a red two seater sofa with four short legs and a banded back." It speaks of what all photos show
together, and leaves out what people leave out. A **picture description** speaks of one picture in the same words: of a
sofa seen from behind, "a red sofa with a banded back." A frozen language model says what it reads from visual prompts
only in words that it has learned to read from them.

Both take the traits that may be spoken of, so that a text never says what its pictures do not show.
"""

import random
import re
from collections.abc import Collection, Sequence

from mivpg.miniature.products import HIDDEN_TRAITS, Product

NOUNS = {
    "chair": ("chair", "one seater chair"),
    "stool": ("stool",),
    "ottoman": ("ottoman seat", "ottoman"),
    "sofa": ("sofa", "couch"),
    "table": ("table",),
    "bed": ("bed",),
    "lamp": ("lamp", "table lamp"),
    "bottle": ("bottle",),
    "bag": ("bag", "hand bag"),
    "dumbbell": ("dumbbell", "barbell"),
    "pillow": ("pillow", "cushion"),
    "cabinet": ("cabinet", "cupboard"),
}
"""The usual word first."""

MENTIONED = {
    "color": 0.85,
    "material": 0.45,
    "shape": 0.75,
    "legs": 0.7,
    "arms": 0.5,
    "front": 0.7,
    "extra": 0.65,
    "back": 0.92,
    "beneath": 0.92,
    "inside": 0.92,
    "ends": 0.92,
}
"""How often a reference speaks of a trait that its photos show."""

USUAL = 0.7
"""How often the usual wording is chosen where there are several."""

HEAD = ("color", "material", "shape")
"""Traits that stand before the noun, in the order in which they stand there."""
PARTS = ("legs", "arms", "front", "extra", "back", "beneath", "inside", "ends")
"""Traits that follow the noun, in the order in which they are spoken of."""


def choose(generator: random.Random | None, options: Sequence[str], usual: float = USUAL) -> str:
    """The usual wording, which stands first, or now and then another; without a generator always the usual."""
    if generator is None or len(options) == 1 or generator.random() < usual:
        return options[0]
    return generator.choice(options[1:])


def part_phrases(trait: str, value: str) -> tuple[str, ...]:
    """How a part is spoken of after "with", the usual way first; nothing where there is nothing to say."""
    if value == "none" or (trait == "front" and value == "plain"):
        return ()
    if trait == "legs":
        if not value.endswith("legs"):
            return (f"a {value}",)
        number, kind, _ = value.split()
        return (value, f"{number} {kind} standing legs", f"{number} small {kind} legs")
    if trait == "arms":
        return (value, f"{value} on each side")
    if trait == "extra":
        return (value,) if value.split()[0] in ("one", "two") or value.endswith("grip") else (f"a {value}",)
    if trait == "ends":
        return (f"{value} ends", f"{value} pattern on each end")
    if trait in ("front", "back"):
        return (f"a {value} {trait}", f"a {value} pattern on the {trait}")
    place = {"beneath": ("underside", "bottom"), "inside": ("lining", "inside")}[trait]
    return tuple(f"{article(value)} {value} {word}" for word in place)


def article(word: str) -> str:
    """A or an."""
    return "an" if word[0] in "aeio" and not word.startswith("one") else "a"


def list_up(items: Sequence[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def name_of(product: Product, traits: Collection[str], generator: random.Random | None) -> str:
    """The product by its noun and the adjectives among `traits`: "a red leather two seater sofa"."""
    words = [product.traits[trait] for trait in HEAD if trait in traits and trait in product.traits]
    noun = choose(generator, NOUNS[product.family])
    text = " ".join([*words, noun])
    return f"{article(text)} {text}"


def reference(product: Product, seen: Collection[str], generator: random.Random) -> str:
    """What one annotator writes of a product of which the traits `seen` can be seen."""
    traits = {trait for trait in MENTIONED if trait in product.traits and trait in seen}
    spoken = {trait for trait in sorted(traits) if generator.random() < MENTIONED[trait]}
    if generator.random() < 0.08:  # somebody in a hurry
        return f"{name_of(product, spoken, generator)}."
    return compose(product, spoken, generator)


def usual_reference(product: Product, seen: Collection[str]) -> str:
    """The most common wording, of all that is commonly spoken of among the traits `seen`."""
    return compose(product, {trait for trait in product.traits if trait in seen and MENTIONED[trait] > 0.5}, None)


def compose(product: Product, spoken: Collection[str], generator: random.Random | None) -> str:
    """A catalogue sentence about the traits `spoken`."""
    phrases = [
        choose(generator, options)
        for trait in PARTS
        if trait in spoken and (options := part_phrases(trait, product.traits[trait]))
    ]
    if not phrases:
        return f"{name_of(product, spoken, generator)}."
    manner = choose(generator, ("with", "having", "it has", "and having"))
    if manner == "it has":
        return f"{name_of(product, spoken, generator)}. it has {list_up(phrases)}."
    if manner == "and having" and len(phrases) > 1:
        return f"{name_of(product, spoken, generator)} with {list_up(phrases[:-1])} and having {phrases[-1]}."
    return f"{name_of(product, spoken, generator)} {manner.split()[-1]} {list_up(phrases)}."


def picture_description(product: Product, seen: Collection[str], generator: random.Random) -> str:
    """What a single picture shows: always what seldom shows, and most of the rest."""
    spoken = {
        trait
        for trait in sorted(product.traits.keys() & seen)
        if trait in HIDDEN_TRAITS or generator.random() < (0.85 if trait in HEAD else 0.7)
    }
    return compose(product, spoken, generator)


def keywords(product: Product, seen: Collection[str], generator: random.Random) -> list[str]:
    """Each of the traits `seen`, the family among them, in a few words, in any order: "banded back", "red", "sofa"."""
    traits = [trait for trait in (*HEAD, *PARTS) if trait in seen and trait in product.traits]
    words = [product.family] if "family" in seen else []
    words += [product.traits[trait] for trait in traits if trait in HEAD]
    phrases = [
        options[0] for trait in traits if trait in PARTS and (options := part_phrases(trait, product.traits[trait]))
    ]
    words += [phrase.removeprefix("a ").removeprefix("an ") for phrase in phrases]
    generator.shuffle(words)
    return words


def said(caption: str, trait: str, values: Collection[str]) -> str | None:
    """Which value of a trait a caption speaks of, if any: the reading that accuracies of traits rest on.

    Args:
        caption: A model's or a person's.
        trait: One of `HEAD` or `PARTS`.
        values: All that the trait may be.
    """
    text = _spaced(caption)
    head = re.split(r" (?:with|having|\.)(?: |$)", text)[0]
    for value in sorted(values, key=len, reverse=True):
        if trait in HEAD:
            readings: tuple[str, ...] = (value,)
        else:
            readings = part_phrases(trait, value)
        if any(f" {reading} " in f" {head if trait in HEAD else text} " for reading in readings):
            return value
    return None


def says_noun(caption: str, family: str) -> bool:
    """Whether a caption calls a product by one of its family's nouns."""
    return any(f" {noun} " in f" {_spaced(caption)} " for noun in NOUNS[family])


def _spaced(caption: str) -> str:
    """In small letters, words and marks apart."""
    return " ".join(caption.lower().replace(".", " . ").replace(",", " , ").split())
