"""What tests of generated folders share: their contents, and a run that ends early."""

import hashlib
from pathlib import Path

from mivpg.miniature import folders


def contents(root: Path) -> dict[str, str]:
    """The sha256 of every file, by its path."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def interrupt_after(monkeypatch, number: int) -> None:
    """Ends a run, as Ctrl-C does, when so many records are noted."""

    def progress(results, **_):
        for count, result in enumerate(results):
            if count == number:
                raise KeyboardInterrupt
            yield result
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "tqdm", progress)
