"""Files that are written whole or not at all, and text files read so that what is wrong with one is a line."""

import csv
import errno
import gzip
import io
import json
import os
import stat
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from mivpg.errors import MivpgError

MAX_UNPACKED = 2**30
"""Bytes that a compressed file may unpack to; of a large file `MAX_RATIO` times its size."""
MAX_RATIO = 100
"""Text and features pack to a tenth at best; what packs to a thousandth was made to fill the memory."""
MAX_SETTINGS, MAX_DEPTH = 10**6, 50
"""Characters of a YAML file, as it is and with its aliases written out, of which nine lines can be a thousand million;
and brackets in brackets."""

DAMAGE = (
    *(OSError, EOFError, struct.error, zlib.error, zipfile.BadZipFile, csv.Error, tokenize.TokenError),
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)
"""What the libraries that decode raise for a damaged file; they do not say, so this list is from fuzzing."""


LOCK = ".lock"
"""Ends the name of an empty file that is there while a run writes what it is named after, and after a kill."""


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
def only_writer(file: Path, taken: str | None = None) -> Iterator[None]:
    """Keeps other runs from writing the same file, or what belongs to it; a run that is killed lets go of it.

    Where the file system knows no locks there is none.

    Args:
        file: It need not exist; its folder is made.
        taken: What the error says; by default that the file is being written.

    Raises:
        MivpgError: Another run is writing it.
    """
    from filelock import FileLock, Timeout

    lock_file = file.with_name(file.name + LOCK)
    file.parent.mkdir(parents=True, exist_ok=True)
    # instead of a lock it would leave a file that says which machine's process it is, and stays when that is killed
    lock = FileLock(lock_file, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        written = f"{file} is being written by another run; wait for it, or choose another name."
        raise MivpgError(taken or written) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        with suppress(OSError):  # the disk may have become read-only, which what ends here tells better
            lock_file.unlink()
        lock.release()


def is_first_process() -> bool:
    """Whether this process speaks, and locks, for all that `torchrun` has started."""
    return int(os.environ.get("RANK", "0")) == 0


def check_is_file(path: Path, expected: str, error: type[MivpgError] = MivpgError) -> None:
    """Raises where a path is no file: reading would wait for a pipe, and never end on some devices."""
    try:
        mode = path.stat().st_mode
    except OSError as reason:
        if reason.errno in (errno.ENOENT, errno.ENOTDIR):
            raise error(f"{path} does not exist, expected {expected}.") from None
        raise error(f"{path} cannot be read: {reason.strerror}.") from None
    except ValueError:  # a null byte, or half a surrogate pair
        raise error(f"{str(path)!r} is no name of a file, expected {expected}.") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise error(f"{path} is {kind}, expected {expected}.")


def check_unpacked(path: Path, num_bytes: int, error: type[MivpgError] = MivpgError) -> None:
    """Raises where a file unpacks to so much more than it is that it can only be meant to fill the memory."""
    if num_bytes > max(MAX_UNPACKED, MAX_RATIO * path.stat().st_size):
        raise error(
            f"{path} is {path.stat().st_size} bytes and unpacks to {num_bytes} or more, at most {MAX_UNPACKED} or "
            f"{MAX_RATIO} times its size are read; unpack it yourself if that is right."
        )


def path_below(root: Path, folder: Path, name: str) -> Path:
    """The file that a data file names.

    A link below `root` is followed wherever it leads: it was made on this machine, not by a data file.

    Args:
        root: The file has to lie in it.
        folder: What the name is relative to.
        name: As it stands in the data file.

    Raises:
        MivpgError: The name leads out of `root`.
    """
    if folder == root and ".." not in name and not name.startswith("/"):
        return folder / name  # most of the millions that a bag file may name, at a third of what the check takes
    whole = os.path.abspath(folder / name)  # noqa: PTH100 (a resolved path would follow links)
    inside = os.path.abspath(root).rstrip("/")  # noqa: PTH100
    if whole != inside and not whole.startswith(inside + "/"):
        raise MivpgError(f"{name!r} leads out of {root}")
    # `..` is taken away here, as it was for the check: behind a link the system would go somewhere else.
    return Path(os.path.normpath(folder / name)) if ".." in name else folder / name


class _Unpacked(gzip.GzipFile):
    """What a .gz file unpacks to, as far as it is no bomb."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self.path, self.num_bytes = path, 0

    def read1(self, size: int = -1) -> bytes:
        content = super().read1(size)
        self.num_bytes += len(content)
        check_unpacked(self.path, self.num_bytes)
        return content

    def read(self, size: int | None = -1) -> bytes:
        """All of it; text is read by `read1` otherwise."""
        assert size in (-1, None)
        return b"".join(iter(self.read1, b""))


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file, compressed if its name ends in .gz; what is wrong with its bytes becomes one line."""
    check_is_file(path, "a text file")
    try:
        with (
            _Unpacked(path) if path.suffix == ".gz" else path.open("rb") as stream,
            io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as file,
        ):
            yield file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise MivpgError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds, compressed if its name ends in .gz."""
    with open_text(path) as file:
        try:
            return json.load(file, object_pairs_hook=each_once)
        except (MivpgError, UnicodeDecodeError):  # which are ValueErrors, too
            raise
        except (ValueError, RecursionError) as error:
            raise MivpgError(f"{path} is not JSON: {error}.") from None


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json`, which would keep the last of several values of a field and say nothing."""
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return values


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, in the types of JSON: names that look like numbers become text.

    Raises:
        MivpgError: It cannot be read, a field stands twice, or its aliases make it larger than any settings are.
    """
    import yaml  # takes longer to import than `mivpg --help` to print

    class Loader(yaml.SafeLoader):
        def fetch_flow_collection_start(self, token: Any) -> None:
            if self.flow_level > MAX_DEPTH:  # each level costs as much as all above it
                raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=self.get_mark())
            super().fetch_flow_collection_start(token)

        num_merged = 0

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)
            self.num_merged += len(node.value)
            if self.num_merged > MAX_SETTINGS // 10:  # each level of `<<` may be ten times as long as the one before
                raise yaml.MarkedYAMLError(problem="merges without end", problem_mark=node.start_mark)

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            names = set()
            for name in (name for name, _ in node.value if isinstance(name, yaml.ScalarNode)):
                if name.value in names:
                    raise yaml.MarkedYAMLError(problem=f"{name.value} stands twice", problem_mark=name.start_mark)
                names.add(name.value)
            return node

    check_is_file(path, "settings in YAML")
    if (size := path.stat().st_size) > MAX_SETTINGS:
        raise MivpgError(f"{path} holds no settings, for it has {size} bytes, expected at most {MAX_SETTINGS}.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
        pieces, length = [], 0
        for piece in json.JSONEncoder(default=str).iterencode(values):
            length += len(piece)
            if length > MAX_SETTINGS:
                raise ValueError(f"its aliases make it longer than {MAX_SETTINGS} characters")
            pieces.append(piece)
        return json.loads("".join(pieces))
    except OSError as error:
        raise MivpgError(f"{path}: no YAML file that can be read: {error.strerror}.") from None
    except (yaml.YAMLError, *DAMAGE) as error:  # `!!int x`, `2001-99-99`, a list that holds itself
        raise MivpgError(f"{path}: no YAML file that can be read: {' '.join(str(error).split())}.") from None


def check_columns(path: Path, rows: csv.DictReader, expected: tuple[str, ...]) -> None:
    """Checks that a table has the columns that will be read."""
    found = rows.fieldnames or []
    if not set(expected) <= set(found):
        raise MivpgError(f"{path} has the columns {listed(found) or '(none)'}, expected {' and '.join(expected)}.")


def listed(names: Iterable[Any]) -> str:
    """Names that a file brings, for an error, which is one line though a name may have several."""
    return " ".join(", ".join(map(str, names)).split())


def refuse_used(folder: Path, what_for: str = "") -> None:
    """Raises a `MivpgError` where a folder that is to be made holds something, or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MivpgError(f"{folder} is in use, expected a new or empty folder{what_for}.")


def last_json_line(path: Path) -> Any:
    """The last whole line of a file of JSON lines; None where there is none, or no file."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1]) if lines else None
