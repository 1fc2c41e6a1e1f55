"""The miniature catalogue: generated products in the files of Amazon Berkeley Objects, which the ABO reader reads.

    root/listings/metadata/listings_0.json.gz   a product a line, its main photo first
    root/images/metadata/images.csv.gz          where the photos are
    root/images/small/…/….jpg                   the photos
    root/captions.json                          references by item_id
    root/truth.json                             what is true of each product, and what each photo shows
    root/miniature.json                         what made all this; written last

The same seed gives the same products, photos and references. An interrupted run goes on where it was.
"""

import csv
import gzip
import hashlib
import io
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mivpg.errors import MivpgError
from mivpg.files import write_whole
from mivpg.miniature import folders
from mivpg.miniature.folders import Record, fill_folder, write_photo
from mivpg.miniature.products import Photo, Product, choose_views, draw_product, photograph
from mivpg.miniature.wording import reference

PHOTO_SIZE = 128
"""Pixels a side."""
MOST_PRODUCTS = 1_000_000
"""As many as six digits of an `item_id` number."""
DOMAIN = "generated.example"
"""Stands where ABO names a marketplace, so that nobody takes these products for real ones."""

NUM_REFERENCES = (1, 2, 3, 4, 5)
HOW_OFTEN = (0.12, 0.26, 0.34, 0.18, 0.10)
"""Of each number of references."""


@dataclass(frozen=True, kw_only=True)
class CatalogueProduct:
    """What is true of a product of the catalogue; the photos show some of it."""

    item_id: str
    family: str
    traits: dict[str, str]
    seen: tuple[tuple[str, ...], ...]
    """The traits that each photo shows, the main photo first."""
    views: tuple[str, ...]
    """From where each photo was taken."""
    captions: tuple[str, ...]
    images: tuple[str, ...]
    """Image ids, the main one first."""

    def as_product(self) -> Product:
        """For wording; the proportions, which no text speaks of, are not kept."""
        return Product(family=self.family, traits=self.traits, stretch=(1.0, 1.0, 1.0))

    def hidden(self) -> set[str]:
        """Traits that other photos show and the main one does not."""
        return set().union(*self.seen[1:]) - set(self.seen[0])


def make_catalogue(root: Path, *, num_products: int = 2000, seed: int = 0) -> list[CatalogueProduct]:
    """Draws a catalogue, or reads it where it is there already.

    Args:
        root: A new or empty folder, or one that an interrupted run has begun.
        num_products: 1 to a million.
        seed: Other products, photos and references for another seed.

    Returns:
        The products, by `item_id`.

    Raises:
        MivpgError: The folder holds something else, or a catalogue made otherwise.
    """
    if not 1 <= num_products <= MOST_PRODUCTS or seed < 0:
        raise MivpgError(
            f"num_products is {num_products} and seed {seed}, expected 1 to {MOST_PRODUCTS} and a seed of at least 0."
        )
    made_by = {"generator": "mivpg miniature abo", "num_products": num_products, "seed": seed}
    make, write = partial(_make_product, root, seed), partial(_write_metadata, root)
    fill_folder(root, made_by, make, num_products, unit="products", write=write)
    return read_truth(root)


def read_truth(root: Path) -> list[CatalogueProduct]:
    """What is true of a generated catalogue's products.

    Raises:
        MivpgError: The folder is no generated catalogue.
    """
    return folders.read_truth(root, _product)


def product_generator(seed: int, index: int) -> random.Random:
    """What all random numbers of a product come from."""
    return random.Random(f"catalogue {seed} {index}")


def photograph_product(generator: random.Random) -> tuple[Product, list[Photo]]:
    """Draws a product and its photos, the main one first; they come before all else that its generator gives."""
    product = draw_product(generator)
    views = choose_views(product, generator)
    return product, [photograph(product, view, generator, size=PHOTO_SIZE) for view in views]


def _make_product(root: Path, seed: int, index: int) -> Record:
    """Draws a product and writes its photos; random numbers depend on (seed, index) alone."""
    generator = product_generator(seed, index)
    product, photos = photograph_product(generator)
    seen, images = [], []
    for number, photo in enumerate(photos):
        seen.append(tuple(sorted(photo.seen)))
        images.append(hashlib.sha256(f"{seed} {index} {number}".encode()).hexdigest()[:12])
        write_photo(root / "images" / "small" / _path_of(images[-1]), photo.image)
    everything = set().union(*seen)
    (count,) = generator.choices(NUM_REFERENCES, HOW_OFTEN)
    product_of_catalogue = CatalogueProduct(
        item_id=f"M{seed:03d}{index:06d}",
        family=product.family,
        traits=product.traits,
        seen=tuple(seen),
        views=tuple(photo.view for photo in photos),
        captions=tuple(dict.fromkeys(reference(product, everything, generator) for _ in range(count))),
        images=tuple(images),
    )
    return asdict(product_of_catalogue)


def _path_of(image_id: str) -> str:
    return f"{image_id[:2]}/{image_id}.jpg"


def _product(record: Record) -> CatalogueProduct:
    return CatalogueProduct(
        item_id=record["item_id"],
        family=record["family"],
        traits=record["traits"],
        seen=tuple(tuple(traits) for traits in record["seen"]),
        views=tuple(record["views"]),
        captions=tuple(record["captions"]),
        images=tuple(record["images"]),
    )


def _write_metadata(root: Path, records: list[Record]) -> None:
    """Listings, image paths and references, each whole or not at all."""
    products = [_product(record) for record in records]
    listings = "".join(json.dumps(_listing(product)) + "\n" for product in products)
    (root / "listings" / "metadata").mkdir(parents=True, exist_ok=True)
    _write_gz(root / "listings" / "metadata" / "listings_0.json.gz", listings)
    (root / "images" / "metadata").mkdir(parents=True, exist_ok=True)
    _write_gz(root / "images" / "metadata" / "images.csv.gz", _image_table(products))
    captions = {product.item_id: product.captions for product in products}
    write_whole(root / "captions.json", json.dumps(captions, indent=1) + "\n")


def _listing(product: CatalogueProduct) -> dict[str, Any]:
    main, *others = product.images
    return {
        "item_id": product.item_id,
        "domain_name": DOMAIN,
        "item_name": [{"language_tag": "en_US", "value": f"Generated {product.family} {product.item_id}"}],
        "product_type": [{"value": product.family.upper()}],
        "main_image_id": main,
        "other_image_id": others,
    }


def _image_table(products: Iterable[CatalogueProduct]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image_id", "height", "width", "path"])
    for product in products:
        writer.writerows([image, PHOTO_SIZE, PHOTO_SIZE, _path_of(image)] for image in product.images)
    return table.getvalue()


def _write_gz(path: Path, content: str) -> None:
    """Without the time of writing, which gzip would note."""
    write_whole(path, gzip.compress(content.encode(), mtime=0))
