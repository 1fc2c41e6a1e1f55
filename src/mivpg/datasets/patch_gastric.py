"""PatchGastricADC22: slides of gastric adenocarcinoma as bags of patches, with a sentence from the report of each.

    root/captions.csv                      columns id, subtype, text; a row a slide
    root/patches_captions/{id}_{hash}.jpg  the patches, 300 x 300 pixels at 20x, of all slides in one folder

The release gives no positions, so the order of a slide's patches (by file name) means nothing. The split follows its
authors' (arXiv 2202.03432): each subtype is divided 70/10/20. Theirs depended on the order of a Python set; this one
depends on the seed alone.
"""

import csv
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mivpg.bags import Sample, Split
from mivpg.errors import MivpgError
from mivpg.files import check_columns, open_text

CAPTIONS_CSV = "captions.csv"
PATCHES = "patches_captions"


@dataclass(kw_only=True)
class PatchGastricConfig:
    """PatchGastricADC22."""

    root: Path
    """The folder with `captions.csv` and `patches_captions`."""
    split: Literal["stratified", "all"] = "stratified"
    """`stratified` = each subtype 70/10/20 by `split_seed`; `all` = every slide is in every split."""
    split_seed: int = 0
    """Another seed, another split."""

    def load(self) -> list[Sample]:
        """Reads the table and the names of the patches; patches stay closed.

        Returns:
            The slides in the order of the table, the patches of each by file name, with the subtype as label.

        Raises:
            MivpgError: A file is missing or not as it has to be, an id stands twice, a slide has no patch, or a patch
                belongs to no slide.
        """
        table = self.root / CAPTIONS_CSV
        slides = _read_table(table)
        patches = _find_patches(self.root / PATCHES)
        if strangers := patches.keys() - slides.keys():
            first = min(strangers)
            raise MivpgError(
                f"{self.root / PATCHES} has {len(patches[first])} patches of {first!r}, and {len(strangers)} ids in "
                f"all, that {table} does not name; add their captions or take them away."
            )
        if without := [slide_id for slide_id in slides if slide_id not in patches]:
            raise MivpgError(
                f"{table} names {without[0]!r}, and {len(without)} slides in all, of which {self.root / PATCHES} has "
                "no patch; unpack all of the archive or take their rows away."
            )
        if self.split == "all":
            splits: dict[str, Split] = dict.fromkeys(slides, "all")
        else:
            splits = stratified_split({slide_id: subtype for slide_id, (subtype, _) in slides.items()}, self.split_seed)
        return [
            Sample(
                id=slide_id,
                images=tuple(patches[slide_id]),
                captions=(text,),
                label=subtype,
                split=splits[slide_id],
            )
            for slide_id, (subtype, text) in slides.items()
        ]


def stratified_split(subtypes: dict[str, str], seed: int) -> dict[str, Split]:
    """Divides the slides of each subtype at int(0.7 n) and int(0.8 n), the same on every machine.

    Args:
        subtypes: Of each slide, by id.
        seed: Another seed, another split.
    """
    by_subtype: defaultdict[str, list[str]] = defaultdict(list)
    for slide_id in sorted(subtypes):
        by_subtype[subtypes[slide_id]].append(slide_id)
    splits: dict[str, Split] = {}
    for subtype, ids in by_subtype.items():
        random.Random(f"{seed} {subtype}").shuffle(ids)
        end_of_train, end_of_val = 7 * len(ids) // 10, 8 * len(ids) // 10
        for place, slide_id in enumerate(ids):
            splits[slide_id] = "train" if place < end_of_train else "val" if place < end_of_val else "test"
    return splits


def _read_table(path: Path) -> dict[str, tuple[str, str]]:
    """Subtype and sentence of each slide, by id."""
    slides: dict[str, tuple[str, str]] = {}
    with open_text(path) as file:
        rows = csv.DictReader(file)
        check_columns(path, rows, ("id", "subtype", "text"))
        for row in rows:
            slide_id, subtype, text = ((row[name] or "").strip() for name in ("id", "subtype", "text"))
            if not slide_id or not text:
                raise MivpgError(f"{path}, line {rows.line_num} lacks an id or a text, expected both.")
            if slide_id in slides:
                raise MivpgError(f"{path}, line {rows.line_num} names {slide_id!r} a second time.")
            slides[slide_id] = subtype, text
    if not slides:
        raise MivpgError(f"{path} has no row, expected a slide a row.")
    return slides


def _find_patches(folder: Path) -> dict[str, list[Path]]:
    """The patches of each slide by file name; one look into the folder, which holds a quarter of a million files."""
    patches: defaultdict[str, list[Path]] = defaultdict(list)
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise MivpgError(f"{folder} cannot be read ({error.strerror}), expected the folder of the patches.") from None
    for name in names:
        if not name.lower().endswith((".jpg", ".jpeg", ".png")):
            continue
        slide_id, separator, _ = name.rpartition("_")
        if not separator:
            raise MivpgError(f"{folder / name} is not named {{id}}_{{hash}}.jpg, so it belongs to no slide.")
        patches[slide_id].append(folder / name)
    return patches
