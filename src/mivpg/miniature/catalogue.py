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
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mivpg.errors import MivpgError
from mivpg.files import write_whole
from mivpg.miniature.processes import in_processes
from mivpg.miniature.products import Product, choose_views, draw_product, photograph
from mivpg.miniature.wording import reference

PHOTO_SIZE = 160
"""Pixels a side."""
MOST_PRODUCTS = 1_000_000
"""As many as six digits of an `item_id` number."""
DOMAIN = "generated.example"
"""Stands where ABO names a marketplace, so that nobody takes these products for real ones."""
MADE_BY = "miniature.json"
TRUTH = "truth.json"
PARTIAL = "products.partial.jsonl"

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


def make_catalogue(root: Path, *, num_products: int = 1500, seed: int = 0) -> list[CatalogueProduct]:
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
    if (root / MADE_BY).is_file():
        with _intact(root / MADE_BY):
            _check_same(root, json.loads((root / MADE_BY).read_text(encoding="utf-8")), made_by)
        if len(products := read_truth(root)) != num_products:
            raise MivpgError(f"{root / TRUTH} holds {len(products)} products, expected {num_products}.")
        (root / PARTIAL).unlink(missing_ok=True)  # by a run that was ended between its last two steps
        return products
    root.mkdir(parents=True, exist_ok=True)
    done = _resume(root, made_by)
    todo = [index for index in range(num_products) if index not in done]
    with (
        (root / PARTIAL).open("a", encoding="utf-8") as file,
        closing(in_processes(partial(_make_product, root, seed), todo, chunksize=4)) as results,
    ):
        progress = tqdm(results, total=num_products, initial=len(done), desc="products", disable=None)
        for index, product in zip(todo, progress, strict=True):
            done[index] = product
            file.write(json.dumps({"index": index} | asdict(product)) + "\n")
            file.flush()
    products = [done[index] for index in range(num_products)]
    _write_metadata(root, products)
    write_whole(root / MADE_BY, json.dumps(made_by, indent=2) + "\n")
    (root / PARTIAL).unlink()
    return products


def read_truth(root: Path) -> list[CatalogueProduct]:
    """What is true of a generated catalogue's products.

    Raises:
        MivpgError: The folder is no generated catalogue.
    """
    with _intact(root / TRUTH):
        return [_product(record) for record in json.loads((root / TRUTH).read_text(encoding="utf-8"))]


def _make_product(root: Path, seed: int, index: int) -> CatalogueProduct:
    """Draws a product and writes its photos; random numbers depend on (seed, index) alone."""
    generator = random.Random(f"catalogue {seed} {index}")
    product = draw_product(generator)
    seen, images = [], []
    views = choose_views(product, generator)
    for number, view in enumerate(views):
        photo = photograph(product, view, generator, size=PHOTO_SIZE)
        seen.append(tuple(sorted(photo.seen)))
        images.append(hashlib.sha256(f"{seed} {index} {number}".encode()).hexdigest()[:12])
        path = root / "images" / "small" / _path_of(images[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        photo.image.save(unfinished, format="JPEG", quality=90)
        unfinished.replace(path)
    everything = set().union(*seen)
    (count,) = generator.choices(NUM_REFERENCES, HOW_OFTEN)
    return CatalogueProduct(
        item_id=f"M{seed:03d}{index:06d}",
        family=product.family,
        traits=product.traits,
        seen=tuple(seen),
        views=tuple(views),
        captions=tuple(dict.fromkeys(reference(product, everything, generator) for _ in range(count))),
        images=tuple(images),
    )


def _path_of(image_id: str) -> str:
    return f"{image_id[:2]}/{image_id}.jpg"


def _resume(root: Path, made_by: dict[str, Any]) -> dict[int, CatalogueProduct]:
    """Products that an interrupted run has finished, by index; begins the file that notes them."""
    file = root / PARTIAL
    if not file.exists() and (found := next(root.iterdir(), None)):
        raise MivpgError(f"{root} is not empty ({found.name}), expected a new folder for the catalogue.")
    with _intact(file), file.open("ab+") as lines:
        lines.seek(0)
        content = lines.read()
        whole = content[: content.rfind(b"\n") + 1]  # what follows the last end of line was cut short
        lines.truncate(len(whole))
        if not whole:
            lines.write(json.dumps(made_by).encode() + b"\n")
            return {}
        header, *records = map(json.loads, whole.splitlines())
        _check_same(root, header, made_by)
        return {record["index"]: _product(record) for record in records}


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    """What reading a damaged file raises becomes one line."""
    try:
        yield
    except MivpgError:  # already one of ours, which are ValueErrors, too
        raise
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise MivpgError(f"{path} is damaged, or not what `mivpg miniature abo` writes: {reason}.") from None


def _product(record: dict[str, Any]) -> CatalogueProduct:
    return CatalogueProduct(
        item_id=record["item_id"],
        family=record["family"],
        traits=record["traits"],
        seen=tuple(tuple(traits) for traits in record["seen"]),
        views=tuple(record["views"]),
        captions=tuple(record["captions"]),
        images=tuple(record["images"]),
    )


def _check_same(root: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if found.get(name) != value:
            raise MivpgError(
                f"{root} holds a catalogue of {name} = {found.get(name)}, and {value} is asked for; "
                "name another folder."
            )


def _write_metadata(root: Path, products: list[CatalogueProduct]) -> None:
    """Listings, image paths, references and truth, each whole or not at all."""
    listings = "".join(json.dumps(_listing(product)) + "\n" for product in products)
    (root / "listings" / "metadata").mkdir(parents=True, exist_ok=True)
    _write_gz(root / "listings" / "metadata" / "listings_0.json.gz", listings)
    (root / "images" / "metadata").mkdir(parents=True, exist_ok=True)
    _write_gz(root / "images" / "metadata" / "images.csv.gz", _image_table(products))
    captions = {product.item_id: product.captions for product in products}
    write_whole(root / "captions.json", json.dumps(captions, indent=1) + "\n")
    write_whole(root / TRUTH, json.dumps([asdict(product) for product in products]) + "\n")


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
