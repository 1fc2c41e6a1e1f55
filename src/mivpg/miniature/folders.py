"""A folder of generated data that all processes draw, and that an interrupted run goes on with.

While it is being drawn, `records.partial.jsonl` says what is to be made and, a line each, what has been; at the end
`truth.json` holds all that is true and `miniature.json` says what made it. A folder without any of these is somebody
else's.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from mivpg.errors import MivpgError
from mivpg.files import write_whole
from mivpg.miniature.processes import in_processes

MADE_BY = "miniature.json"
TRUTH = "truth.json"
PARTIAL = "records.partial.jsonl"

Parsed = TypeVar("Parsed")
Record = dict[str, Any]
"""What is true of one product, scene or slide, as JSON holds it."""


def fill_folder(
    root: Path,
    made_by: dict[str, Any],
    make: Callable[[int], Record],
    number: int,
    *,
    unit: str,
    write: Callable[[list[Record]], None],
) -> None:
    """Makes records in all processes, or what is left of them; nothing where the folder is complete.

    Args:
        root: A new or empty folder, or one that an interrupted run has begun.
        made_by: The `generator`, its options and its seed.
        make: The record of an index, a function of that alone; it writes its pictures, each whole or not at all.
        number: Of records.
        unit: What they are, for the progress bar and in messages.
        write: Writes the data set's own files, of all records in the order of their index.

    Raises:
        MivpgError: The folder holds something else, or the same made otherwise.
    """
    if (root / MADE_BY).is_file():
        with _intact(root / MADE_BY):
            _check_same(root, json.loads((root / MADE_BY).read_text(encoding="utf-8")), made_by, unit)
        if (found := len(read_truth(root, dict))) != number:
            raise MivpgError(f"{root / TRUTH} holds {found} {unit}, expected {number}; delete the folder.")
        (root / PARTIAL).unlink(missing_ok=True)  # by a run that was ended between its last two steps
        return
    root.mkdir(parents=True, exist_ok=True)
    done = _resume(root, made_by, unit)
    todo = [index for index in range(number) if index not in done]
    with (
        (root / PARTIAL).open("a", encoding="utf-8") as file,
        closing(in_processes(make, todo, chunksize=2)) as results,
    ):
        progress = tqdm(results, total=number, initial=len(done), desc=unit, disable=None)
        for index, record in zip(todo, progress, strict=True):
            done[index] = record
            file.write(json.dumps({"index": index, "record": record}) + "\n")
            file.flush()
    records = [done[index] for index in range(number)]
    with _intact(root / PARTIAL):  # where some of them come from
        write(records)
    write_whole(root / TRUTH, json.dumps(records) + "\n")
    write_whole(root / MADE_BY, json.dumps(made_by, indent=2) + "\n")
    (root / PARTIAL).unlink()


def write_photo(path: Path, image: Image.Image) -> None:
    """Writes a JPEG file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    image.save(unfinished, format="JPEG", quality=90)
    unfinished.replace(path)


def read_truth(root: Path, parse: Callable[[Record], Parsed]) -> list[Parsed]:
    """What is true of all that a finished folder holds, in order.

    Raises:
        MivpgError: There is nothing of the kind.
    """
    with _intact(root / TRUTH):
        return [parse(record) for record in json.loads((root / TRUTH).read_text(encoding="utf-8"))]


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    """What reading a damaged file raises becomes one line."""
    try:
        yield
    except MivpgError:  # already one of ours, which are ValueErrors, too
        raise
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise MivpgError(f"{path} is damaged, or not what `mivpg miniature` writes: {reason}.") from None


def _resume(root: Path, made_by: dict[str, Any], unit: str) -> dict[int, Record]:
    """Records that an interrupted run has made, by index; begins the file that notes them."""
    file = root / PARTIAL
    if not file.exists() and (found := next(root.iterdir(), None)):
        raise MivpgError(f"{root} is not empty ({found.name}), expected a new folder for the {unit}.")
    with _intact(file), file.open("ab+") as lines:
        lines.seek(0)
        content = lines.read()
        whole = content[: content.rfind(b"\n") + 1]  # what follows the last end of line was cut short
        lines.truncate(len(whole))
        if not whole:
            lines.write(json.dumps(made_by).encode() + b"\n")
            return {}
        header, *entries = map(json.loads, whole.splitlines())
        _check_same(root, header, made_by, unit)
        return {entry["index"]: entry["record"] for entry in entries}


def _check_same(root: Path, found: dict[str, Any], asked: dict[str, Any], unit: str) -> None:
    for name, value in asked.items():
        if found.get(name) != value:
            raise MivpgError(
                f"{root} holds {unit} of {name} = {found.get(name)}, and {value} is asked for; name another folder."
            )
