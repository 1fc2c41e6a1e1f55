"""The user's own data: a JSON lines or CSV file with one bag a line.

    {"id": "sofa-1", "images": ["sofa-1/front.jpg", "sofa-1/side.jpg"], "captions": ["a two seater sofa"]}

Besides `id` every field may be left out: `images`, `slides` (slide files, which `mivpg extract` cuts) or `features` (a
file that `read_features` reads), `coords` ([x, y] for each image), `captions`, `prompt`, `label`, `group` and `split`.
An empty `label` or `group` counts as left out. Paths are relative to the file, and may not lead out of `root`: its
folder, unless another is given. A CSV file names the fields in its first line, puts `;` between images and between
slides and `|` between captions, and has no `coords`.

What is wrong with the file is found here; what is wrong with one bag (no image, a file that cannot be read, an empty
caption) is found when that bag is opened, so that one bad bag does not stop a run over thousands.
"""

import csv
import difflib
import json
import os
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mivpg.bags import SPLITS, Sample, Split, assign_splits
from mivpg.errors import MivpgError
from mivpg.files import check_is_file, each_once, path_below, write_whole

CSV_FIELDS = ("id", "images", "slides", "features", "captions", "prompt", "label", "group", "split")
FIELDS = (*CSV_FIELDS, "coords")


@dataclass(kw_only=True)
class BagFileConfig:
    """A bag file."""

    path: Path
    """A `.jsonl` or `.csv` file."""
    root: Path | None = None
    """The folder in which all that it names has to lie, `/` = anywhere; None = the folder of the file itself."""
    split_seed: int | None = None
    """Draw train, val and test at random, 70/10/20, groups kept whole; None = as the file says."""

    def load(self) -> list[Sample]:
        """Reads the file.

        Raises:
            MivpgError: As `load_bag_file`, or the file has splits and so has `split_seed`.
        """
        samples = load_bag_file(self.path, root=self.root)
        if self.split_seed is None:
            return samples
        for sample in samples:
            if sample.split is not None:
                raise MivpgError(f"{self.path}: bag {sample.id!r} has a split; leave out split_seed or the splits.")
        return assign_splits(samples, seed=self.split_seed)


def load_bag_file(path: Path, *, root: Path | None = None) -> list[Sample]:
    """Reads a bag file; images and features stay closed.

    Args:
        path: A `.jsonl` or `.csv` file.
        root: The folder in which all that it names has to lie, `/` = anywhere; None = the folder of the file itself.

    Raises:
        MivpgError: The file cannot be read, holds no bag, or a line is not as the module says or names a file outside
            of `root`.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise MivpgError(f"{path} ends in {path.suffix!r}, expected a bag file, {' or '.join(readers)}.")
    check_is_file(path, "a bag file")
    lines: dict[str, int] = {}
    samples = []
    try:
        for line, record in readers[suffix](path):
            try:
                sample = _sample(record, path.parent, path.parent if root is None else root)
            except MivpgError as error:
                raise MivpgError(f"{path}, line {line}: {error}") from None
            first_line = lines.setdefault(sample.id, line)
            if first_line != line:
                raise MivpgError(f"{path}, line {line}: id {sample.id!r} stands on line {first_line} already.")
            samples.append(sample)
    except OSError as error:
        raise MivpgError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise MivpgError(f"{path} is not UTF-8; save it in that encoding.") from None
    if not samples:
        raise MivpgError(f"{path} holds no bag, expected one a line.")
    _check_splits(path, samples)
    return samples


def write_bag_file(path: Path, samples: Iterable[Sample]) -> None:
    """Writes bags of images or of features as JSON lines, which `load_bag_file` reads as the same samples.

    Paths in it are relative to the file, so it can be moved together with what it names. To read it where that lies
    outside its folder takes a `root`.
    """
    lines = []
    for sample in samples:
        record: dict[str, Any] = {"id": sample.id}
        if sample.images:
            record["images"] = [os.path.relpath(image, path.parent) for image in sample.images]
        if sample.slides:
            record["slides"] = [os.path.relpath(slide, path.parent) for slide in sample.slides]
        if sample.features is not None:
            record["features"] = os.path.relpath(sample.features, path.parent)
        if sample.image_coords is not None and sample.features is None:  # a features file holds its own
            record["coords"] = sample.image_coords
        if sample.captions:
            record["captions"] = sample.captions
        others = {"prompt": sample.prompt, "label": sample.label, "group": sample.group, "split": sample.split}
        record |= {name: value for name, value in others.items() if value is not None}
        lines.append(json.dumps(record) + "\n")
    write_whole(path, "".join(lines))


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, object_pairs_hook=each_once)
            except (ValueError, RecursionError) as error:
                raise MivpgError(f"{path}, line {number} is not JSON: {error}.") from None
            if not isinstance(record, dict):
                raise MivpgError(f'{path}, line {number} is no object, expected {{"id": …, "images": […]}}.')
            yield number, record


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = [name.strip().lower() for name in next(rows, [])]
            if len(header) == 1 and ";" in header[0]:
                raise MivpgError(f"columns are separated by ';' ({header[0]}), expected ','.")
            _check_fields(header, CSV_FIELDS)
            if len(set(header)) != len(header):
                raise MivpgError("a column occurs twice.")
            for row in rows:
                if not "".join(row).strip():
                    continue
                if len(row) != len(header):
                    raise MivpgError(f"{len(row)} columns, expected {len(header)} as in the first line.")
                record: dict[str, Any] = {field: text for field, text in zip(header, row, strict=True) if text}
                for field in {"images", "slides"} & record.keys():
                    record[field] = [path.strip() for path in record[field].split(";") if path.strip()]
                if "captions" in record:
                    record["captions"] = [caption.strip() for caption in record["captions"].split("|")]
                yield rows.line_num, record
        except (csv.Error, MivpgError) as error:
            hint = "; write such bags as JSON lines (.jsonl)" if "field limit" in str(error) else ""
            raise MivpgError(f"{path}, line {rows.line_num}: {error}{hint}") from None


def _check_fields(names: Iterable[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected {', '.join(known)}; delete it."
            raise MivpgError(f"unknown field {reprlib.repr(name)}, {hint}")


def _sample(record: dict[str, Any], folder: Path, root: Path) -> Sample:
    _check_fields(record, FIELDS)
    bag_id = _text(record, "id")
    if not bag_id:
        raise MivpgError("no id, expected a text that no other bag has.")

    def file(name: str) -> Path:
        try:
            return path_below(root, folder, name)
        except MivpgError as error:
            raise MivpgError(
                f"{error}; name a folder that holds it as root (--root, or dataset.bag_file.root of a run), or / for "
                "any file."
            ) from None

    features = _text(record, "features")
    return Sample(
        id=bag_id,
        images=tuple(file(image) for image in _texts(record, "images")),
        slides=tuple(file(slide) for slide in _texts(record, "slides")),
        features=None if features is None else file(features),
        image_coords=_coords(record),
        captions=_texts(record, "captions"),
        prompt=_text(record, "prompt"),
        label=_text(record, "label") or None,
        group=_text(record, "group") or None,
        split=_split(record),
    )


def _text(record: dict[str, Any], field: str) -> str | None:
    value = record.get(field)
    if isinstance(value, int) and not isinstance(value, bool):  # an id or a label that happens to be a number
        return str(value)
    if value is not None and not isinstance(value, str):
        raise MivpgError(f"{field} is {reprlib.repr(value)}, expected a text.")
    return value


def _texts(record: dict[str, Any], field: str) -> tuple[str, ...]:
    value = record.get(field)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise MivpgError(f"{field} is {reprlib.repr(value)}, expected a list of texts.")
    return tuple(value)


def _coords(record: dict[str, Any]) -> tuple[tuple[float, float], ...] | None:
    value = record.get("coords")
    if value is None:
        return None
    pairs = value if isinstance(value, list) else [value]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(_is_number(number) for number in pair):
            raise MivpgError(f"coords is {reprlib.repr(value)}, expected a list of [x, y].")
    return tuple((float(x), float(y)) for x, y in pairs)


def _is_number(value: Any) -> bool:
    """Whether it is one that float32 can hold, which JSON's `NaN`, `1e999` and `true` are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38


def _split(record: dict[str, Any]) -> Split | None:
    text = _text(record, "split")
    for split in SPLITS:
        if text == split:
            return split
    if text is not None:
        raise MivpgError(f"split is {reprlib.repr(text)}, expected {', '.join(SPLITS)}.")
    return None


def _check_splits(path: Path, samples: list[Sample]) -> None:
    """Every bag has a split or none has, and a group has one: else what is tested on may have been trained on."""
    first_of_group: dict[str, Sample] = {}
    for sample in samples:
        if (sample.split is None) != (samples[0].split is None):
            with_split, without = (sample, samples[0]) if sample.split else (samples[0], sample)
            raise MivpgError(f"{path}: bag {with_split.id!r} has a split and bag {without.id!r} has none.")
        if sample.group is not None:
            first = first_of_group.setdefault(sample.group, sample)
            if first.split != sample.split:
                raise MivpgError(
                    f"{path}: group {sample.group!r} is in two splits, {first.split} (bag {first.id!r}) and "
                    f"{sample.split} (bag {sample.id!r})."
                )
