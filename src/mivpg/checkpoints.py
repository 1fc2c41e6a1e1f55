"""Which files a model's frozen weights come from, and whether they are still the same.

A checkpoint holds only what trained. Its `config.json` names the rest under `base`, each part as
`{"path": folder or Hub id, "revision": commit or None, "sha256": {file name: digest}}`.
"""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from mivpg.errors import MivpgError


def locate_base(name_or_path: str | os.PathLike, revision: str | None) -> dict[str, Any]:
    """The entry for a model just loaded: its folder made absolute, or its Hub id with the commit that is cached."""
    if Path(name_or_path).is_dir():
        return {"path": str(Path(name_or_path).resolve()), "revision": None}
    folder = snapshot_download(os.fspath(name_or_path), revision=revision, local_files_only=True)
    return {"path": os.fspath(name_or_path), "revision": Path(folder).name}


def describe_base(base: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries with the digests of their weight files, for writing into a checkpoint."""
    return {
        part: {"path": entry["path"], "revision": entry["revision"], "sha256": entry.get("sha256") or digests(entry)}
        for part, entry in base.items()
    }


def verify_base(checkpoint: str, part: str, entry: Mapping[str, Any]) -> None:
    """Checks that a part of a checkpoint's base is there and is what the checkpoint was trained on.

    Raises:
        MivpgError: It is absent or differs; names the path looked for.
    """
    remedy = f"Put it back, or pass base={{{part!r}: path}} to from_pretrained."
    try:
        found = digests(entry)
    except (FileNotFoundError, LocalEntryNotFoundError, HFValidationError) as error:
        raise MivpgError(f"{checkpoint}: its base {entry['path']} ({part}) is not there. {remedy}") from error
    expected = entry["sha256"]
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise MivpgError(f"{checkpoint}: its base {entry['path']} ({part}) lacks {name}. {remedy}")
        if found[name] != expected.get(name):
            raise MivpgError(
                f"{checkpoint}: its base {entry['path']} ({part}) is another one: sha256 of {name} is "
                f"{found[name][:12]}…, the checkpoint was trained on {expected.get(name, 'nothing')[:12]}…. {remedy}"
            )


def digests(entry: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of each weight file of a base, by file name."""
    folder = Path(entry["path"])
    if not folder.is_dir():
        folder = Path(snapshot_download(entry["path"], revision=entry["revision"], local_files_only=True))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(folder)
    return {file.name: digest(file.resolve(), file.stat().st_mtime_ns, file.stat().st_size) for file in files}


@functools.cache
def digest(file: Path, modified: int, size: int) -> str:
    """sha256 of a file; read once while its time and size stay."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
