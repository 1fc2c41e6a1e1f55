"""Amazon Berkeley Objects: products with several photos each, in the layout of the official archives.

    root/listings/metadata/listings_*.json.gz     what a product is, and the ids of its photos
    root/images/metadata/images.csv.gz            where the photo of an id is
    root/images/small/…, root/images/original/…   the photos

The archives hold no captions. Those that people wrote come apart, keyed by `item_id`, as JSON
(`{item_id: [captions]}`), CSV (columns `item_id` and `caption`, a row a caption) or one of the pickles in circulation,
which are read without running any code in them. A product without captions is left out.
"""

import csv
import io
import json
import logging
import pickle
import reprlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

from mivpg.bags import Sample, assign_splits
from mivpg.errors import MivpgError
from mivpg.files import DAMAGE, check_columns, check_is_file, open_text, path_below, read_json

logger = logging.getLogger(__name__)

IMAGES_CSV = Path("images", "metadata", "images.csv.gz")
LISTINGS = "listings/metadata/listings_*.json.gz"

SHORT = reprlib.Repr()
"""Shows what a file holds in a line; in full, a few bytes of lists within lists may be gigabytes of text."""
SHORT.maxlevel = 2


@dataclass(kw_only=True)
class AboConfig:
    """Amazon Berkeley Objects."""

    root: Path
    """The folder with `listings` and `images`, as the archives unpack."""
    captions: Path | None = None
    """A `.json`, `.csv` or `.pkl` file; None = `captions.json` in `root`."""
    photos: Literal["small", "original"] = "small"
    """`small` is at most 256 pixels a side."""
    split: Literal["random", "all"] = "random"
    """`random` = 70/10/20 by `split_seed`; `all` = every product is in every split."""
    split_seed: int = 0
    """Another seed, another split."""
    min_images: int = 2
    """Products with fewer photos are left out, as in the paper."""
    only_main_image: bool = False
    """Keep one photo of each of the same products, the paper's single-image comparison."""
    domain: str | None = None
    """Whose listing counts where marketplaces show different photos under one `item_id`, such as `amazon.com`."""

    def load(self) -> list[Sample]:
        """Reads captions, listings and image paths; photos stay closed.

        Returns:
            The products that have captions and `min_images` photos, by `item_id`; the main photo comes first.

        Raises:
            MivpgError: A file is missing or damaged, a listing names a photo that `images.csv.gz` lacks, or an
                `item_id` has different photos under two domains and `domain` chooses none of them.
        """
        captions_path = self.root / "captions.json" if self.captions is None else self.captions
        captions = _read_captions(captions_path)
        listings = self._choose_listings(captions)
        paths = _read_image_paths(self.root / IMAGES_CSV, {image for listing in listings for image in listing.images})
        folder = self.root / "images" / self.photos
        samples = []
        for listing in listings:
            for image in listing.images:
                if image not in paths:
                    raise MivpgError(f"{self.root / IMAGES_CSV} lacks image_id {image!r} of item_id {listing.item_id}.")
            if len(listing.images) >= self.min_images:
                try:
                    images = tuple(path_below(self.root, folder, paths[image]) for image in listing.images)
                except MivpgError as error:
                    raise MivpgError(f"{self.root / IMAGES_CSV}: path {error}, expected photos below it.") from None
                samples.append(
                    Sample(
                        id=listing.item_id,
                        images=images[:1] if self.only_main_image else images,
                        captions=captions[listing.item_id],
                        label=listing.product_type,
                        split="all",
                    )
                )
        logger.info(
            "%s: %d items with captions; %d have no listing, %d fewer than %d photos, %d remain.",
            captions_path,
            len(captions),
            len(captions) - len(listings),
            len(listings) - len(samples),
            self.min_images,
            len(samples),
        )
        if not samples:
            raise MivpgError(f"{self.root} lists no item of {captions_path} with {self.min_images} photos or more.")
        return samples if self.split == "all" else assign_splits(samples, seed=self.split_seed)

    def _choose_listings(self, captions: dict[str, tuple[str, ...]]) -> "list[_Listing]":
        """One listing for each captioned item, by `item_id`."""
        by_domain: dict[str, dict[str, _Listing]] = {}
        for listing in _read_listings(self.root):
            if listing.item_id in captions:
                first = by_domain.setdefault(listing.item_id, {}).setdefault(listing.domain, listing)
                if first.images != listing.images:
                    raise MivpgError(
                        f"{self.root}: item_id {listing.item_id} is listed twice under {listing.domain}, "
                        "with different photos."
                    )
        domains = {domain for listings in by_domain.values() for domain in listings}
        if self.domain is not None and self.domain not in domains:
            raise MivpgError(f"domain is {self.domain!r}, expected one of {', '.join(sorted(domains))}.")
        return [self._choose_listing(by_domain[item_id]) for item_id in sorted(by_domain)]

    def _choose_listing(self, by_domain: "dict[str, _Listing]") -> "_Listing":
        first, *others = (by_domain[domain] for domain in sorted(by_domain))
        if self.domain is not None:
            return by_domain.get(self.domain, first)
        for other in others:
            if other.images != first.images:
                raise MivpgError(
                    f"{self.root}: item_id {first.item_id} has different photos under {first.domain} and "
                    f"{other.domain}; set `domain` to the one that counts."
                )
        return first


@dataclass(frozen=True, kw_only=True)
class _Listing:
    item_id: str
    domain: str
    images: tuple[str, ...]
    """Image ids, the main one first, each once."""
    product_type: str | None


def _read_listings(root: Path) -> Iterator[_Listing]:
    paths = sorted(root.glob(LISTINGS))
    if not paths:
        raise MivpgError(f"{root} has no {LISTINGS}, expected the folder into which abo-listings.tar was unpacked.")
    for path in paths:
        with open_text(path) as file:
            for line, text in enumerate(file, start=1):
                try:
                    yield _listing(json.loads(text))
                except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
                    raise MivpgError(
                        f"{path}, line {line} is no listing, expected a JSON object with item_id and domain_name."
                    ) from None


def _listing(record: dict[str, Any]) -> _Listing:
    main, others = record.get("main_image_id"), record.get("other_image_id") or []
    product_type = record.get("product_type")
    if isinstance(product_type, list):  # releases differ: a text, or [{"value": text}]
        product_type = product_type[0]["value"]
    item_id, domain = record["item_id"], record["domain_name"]
    images = [main, *others] if main else [*others]
    texts = [item_id, domain, *images, *([] if product_type is None else [product_type])]
    if not isinstance(others, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError
    return _Listing(item_id=item_id, domain=domain, images=tuple(dict.fromkeys(images)), product_type=product_type)


def _read_image_paths(path: Path, image_ids: set[str]) -> dict[str, str]:
    """The paths, below a folder of photos, of the images asked for."""
    with open_text(path) as file:
        rows = csv.DictReader(file)
        check_columns(path, rows, ("image_id", "path"))
        return {row["image_id"]: row["path"] for row in rows if row["image_id"] in image_ids and row["path"]}


def _read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """The references of each item, from whichever kind of file."""
    readers = {".json": read_json, ".csv": _read_csv, ".pkl": _read_pickle}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise MivpgError(f"{path} ends in {path.suffix!r}, expected captions, {', '.join(readers)}.")
    data = readers[suffix](path)
    if not isinstance(data, dict):
        raise MivpgError(f"{path} holds a {type(data).__name__}, expected item_id -> list of captions.")
    if "pcs_name" in data:  # ShapeCompiler numbers its items and names them apart
        items = data["pcs_name"]
        if not isinstance(items, list) or not all(isinstance(item_id, str) for item_id in items):
            raise MivpgError(f"{path}: pcs_name is {SHORT.repr(items)}, expected a list of item_ids.")
        data = {item_id: data.get(number) for number, item_id in enumerate(items)}
    for item_id, captions in data.items():
        if not isinstance(item_id, str):
            raise MivpgError(f"{path} has the key {item_id!r}, expected an item_id.")
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise MivpgError(f"{path}: captions of {item_id!r} are {SHORT.repr(captions)}, expected a list of texts.")
    return {item_id: tuple(captions) for item_id, captions in data.items() if captions}


def _read_csv(path: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = defaultdict(list)
    with open_text(path) as file:
        rows = csv.DictReader(file)
        check_columns(path, rows, ("item_id", "caption"))
        for row in rows:
            captions[row["item_id"]].append(row["caption"])
    return captions


def _read_pickle(path: Path) -> Any:
    check_is_file(path, "captions")
    try:
        # From memory, of which no more can be read than there is: `read` of a file makes room for what it is asked for.
        return _DataUnpickler(path, io.BytesIO(path.read_bytes())).load()
    except MivpgError:  # already one of ours, which are ValueErrors, too
        raise
    except OSError as error:
        raise MivpgError(f"{path} cannot be read: {error.strerror}.") from None
    except (pickle.UnpicklingError, *DAMAGE) as error:
        raise MivpgError(f"{path} is no pickle of plain data: {' '.join(str(error).split())}.") from None


class _DataUnpickler(pickle._Unpickler):
    """Makes plain containers and nothing else: a pickle may name any callable of the machine, and would call it.

    It is Python's own in Python, since the one in C makes room for as many objects as a pickle says that it has.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != ord(pickle.BYTEARRAY8)
    } | {
        ord(pickle.EMPTY_TUPLE): lambda self: self.append([]),
        ord(pickle.TUPLE): lambda self: self.pack(self.pop_mark()),
        ord(pickle.TUPLE1): lambda self: self.pack([self.stack.pop()]),
        ord(pickle.TUPLE2): lambda self: self.pack([self.stack.pop(-2), self.stack.pop()]),
        ord(pickle.TUPLE3): lambda self: self.pack([self.stack.pop(-3), self.stack.pop(-2), self.stack.pop()]),
    }
    """Without the one that makes room for as many bytes as a pickle says that follow. Tuples become lists, which are no
    keys: forty tuples, each twice in the next, take years to hash."""

    stack: list[Any]

    ALLOWED: ClassVar[dict[tuple[str, str], type]] = {
        ("collections", "defaultdict"): defaultdict,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "dict"): dict,
        ("builtins", "list"): list,
    }

    def __init__(self, path: Path, file: BinaryIO) -> None:
        super().__init__(file)
        self.path = path

    def pack(self, values: list[Any]) -> None:
        """In place of a tuple."""
        self.stack.append(values)

    def find_class(self, module: str, name: str) -> type:
        allowed = self.ALLOWED.get((module.replace("__builtin__", "builtins"), name))  # Python 2 wrote __builtin__
        if allowed is None:
            raise MivpgError(
                f"{self.path} wants to run {f'{module}.{name}'!r}, expected a pickle of plain dicts and lists."
            )
        return allowed
