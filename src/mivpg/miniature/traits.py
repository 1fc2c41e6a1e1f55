"""How much of what a product's photos show a caption says right, and what one photo lets anybody say.

The catalogue is generated, so what is true of a product, and which photo shows it, is known. Chance is what the most
common value of the training products gets; an oracle sees all that the main photo shows.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from mivpg.evaluation import bootstrap_interval
from mivpg.miniature.catalogue import CatalogueProduct
from mivpg.miniature.drawing import Pattern
from mivpg.miniature.products import FAMILIES
from mivpg.miniature.wording import HEAD, PARTS, said, usual_reference


def most_common_values(products: Iterable[CatalogueProduct]) -> dict[tuple[str, str], str]:
    """The value to guess of a trait that one cannot see, by (family, trait)."""
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for product in products:
        for trait in set().union(*product.seen) & product.traits.keys():
            counts[product.family, trait][product.traits[trait]] += 1
    return {place: counter.most_common(1)[0][0] for place, counter in counts.items()}


def oracle_caption(
    product: CatalogueProduct, guesses: Mapping[tuple[str, str], str], *, only_main: bool, guess: bool
) -> str:
    """What somebody writes who sees every trait of the main photo, or of all photos, in the usual wording.

    Args:
        product: What is true of it.
        guesses: The most common values.
        only_main: Whether only the main photo is seen.
        guess: Whether the other traits of its photos are guessed; else they are passed over.
    """
    shown = set(product.seen[0]) if only_main else set().union(*product.seen)
    if not guess:
        return usual_reference(product.as_product(), shown)
    hidden = product.hidden()
    traits = product.traits | {trait: guesses.get((product.family, trait), product.traits[trait]) for trait in hidden}
    return usual_reference(replace(product.as_product(), traits=traits), shown | hidden)


def trait_accuracies(
    captions: Mapping[str, Mapping[str, str]],
    products: Sequence[CatalogueProduct],
    guesses: Mapping[tuple[str, str], str],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Trait to where it is seen, `main` photo or `other`, to the share of captions that say it right.

    Only traits of which there is something to say count: a plain front or missing armrests are passed over, as people
    do. `chance` always says the most common value, `oracle` sees the main photo and guesses the rest; both always
    speak of the trait. `said` is the share of captions that speak of it at all.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for trait in (*HEAD, *PARTS):
        for where in ("main", "other"):
            those = [
                product
                for product in products
                if trait in (product.seen[0] if where == "main" else product.hidden()) and can_be_said(product, trait)
            ]
            if not those:
                continue
            row: dict[str, Any] = {"num_products": len(those)}
            chance = [guesses.get((p.family, trait)) == p.traits[trait] for p in those]
            row["chance"] = round(float(np.mean(chance)), 4)
            row["oracle"] = 1.0 if where == "main" else row["chance"]
            for arm, by_id in captions.items():
                spoken = [_said_by(by_id[p.item_id], p, trait) for p in those]
                right = [value == p.traits[trait] for value, p in zip(spoken, those, strict=True)]
                row[arm] = {
                    "right": round(float(np.mean(right)), 4),
                    "said": round(float(np.mean([value is not None for value in spoken])), 4),
                }
            table.setdefault(trait, {})[where] = row
    return table


def can_be_said(product: CatalogueProduct, trait: str) -> bool:
    """Whether there are words for this trait's value."""
    value = product.traits.get(trait)
    return value is not None and value != "none" and (trait, value) != ("front", "plain")


def hidden_traits(product: CatalogueProduct) -> list[str]:
    """What other photos show, the main one does not, and there are words for."""
    return [trait for trait in product.hidden() if can_be_said(product, trait)]


def says_nothing_wrong(caption: str, product: CatalogueProduct) -> bool:
    """Whether all that a caption says of a product's traits is so, and it names no part that the product has not."""
    head_is_right = all(_said_by(caption, product, t) in (None, product.traits[t]) for t in HEAD if t in product.traits)
    return head_is_right and all(_said_by(caption, product, t) in (None, product.traits.get(t)) for t in PARTS)


def names_hidden(caption: str, product: CatalogueProduct) -> bool:
    """Whether a caption says right something that only other photos than the main one show."""
    return any(_said_by(caption, product, trait) == product.traits[trait] for trait in hidden_traits(product))


EVERY_VALUE = {
    trait: {value for family in FAMILIES.values() for value in family.traits.get(trait, ())} for trait in PARTS
}
"""Of each part, on whatever family; a caption may say what this one never has."""
for _trait in ("front", "back", "ends"):
    EVERY_VALUE[_trait].update(get_args(Pattern))


def _said_by(caption: str, product: CatalogueProduct, trait: str) -> str | None:
    return said(caption, trait, EVERY_VALUE[trait] if trait in PARTS else FAMILIES[product.family].traits[trait])


def hidden_accuracy(
    captions: Mapping[str, str],
    products: Sequence[CatalogueProduct],
    seed: int,
    others: Mapping[str, CatalogueProduct] | None = None,
) -> dict[str, float]:
    """Of the traits that only other photos show, the share that captions name right, with its 95 % interval.

    Args:
        captions: By id.
        products: Whose traits are asked for.
        seed: Of the bootstrap.
        others: Products by id whose hidden traits are asked for instead.
    """
    shares = []
    for product in products:
        asked = product if others is None else others[product.item_id]
        if hidden := hidden_traits(asked):
            caption = captions[product.item_id]
            shares.append(sum(_said_by(caption, asked, trait) == asked.traits[trait] for trait in hidden) / len(hidden))
    return bootstrap_interval(shares, seed=seed) | {"num_products": len(shares)}


def swap_partners(products: Iterable[CatalogueProduct]) -> dict[str, str]:
    """Another product for each, of the same family where it has another."""
    by_family: defaultdict[str, list[str]] = defaultdict(list)
    for product in sorted(products, key=lambda product: product.item_id):
        by_family[product.family].append(product.item_id)
    return {item_id: ids[(place + 1) % len(ids)] for ids in by_family.values() for place, item_id in enumerate(ids)}
