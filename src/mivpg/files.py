"""Files that are written whole or not at all, and text files read so that what is wrong with one is a line."""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mivpg.errors import MivpgError


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file, which gets its name when it is on the disk; where that fails, an old one stays as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file, compressed if its name ends in .gz; what is wrong with its bytes becomes one line."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
                yield file
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield file
    except FileNotFoundError:
        raise MivpgError(f"{path} does not exist.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise MivpgError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds, compressed if its name ends in .gz."""
    with open_text(path) as file:
        try:
            return json.load(file)
        except (json.JSONDecodeError, RecursionError) as error:
            raise MivpgError(f"{path} is not JSON: {error}.") from None


def check_columns(path: Path, rows: csv.DictReader, expected: tuple[str, ...]) -> None:
    """Checks that a table has the columns that will be read."""
    found = rows.fieldnames or []
    if not set(expected) <= set(found):
        raise MivpgError(f"{path} has the columns {', '.join(found) or '(none)'}, expected {' and '.join(expected)}.")


def refuse_used(folder: Path, what_for: str = "") -> None:
    """Raises a `MivpgError` where a folder that is to be made holds something, or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MivpgError(f"{folder} is in use, expected a new or empty folder{what_for}.")


def last_json_line(path: Path) -> Any:
    """The last whole line of a file of JSON lines; None where there is none, or no file."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1]) if lines else None
