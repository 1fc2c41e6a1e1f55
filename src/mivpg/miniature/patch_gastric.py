"""The miniature slides: generated patches in the files of PatchGastricADC22, which the reader of that data set reads.

    root/captions.csv                      id, subtype, text; a row a slide
    root/patches_captions/{id}_{hash}.jpg  the patches of all slides, in no order
    root/truth.json                        what is true of each slide, and what each of its patches shows
    root/miniature.json                    what made all this; written last

The same seed gives the same slides, patches and captions. An interrupted run goes on where it was.
"""

import csv
import hashlib
import io
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mivpg.datasets.patch_gastric import CAPTIONS_CSV, PATCHES
from mivpg.errors import MivpgError
from mivpg.files import write_whole
from mivpg.miniature import folders
from mivpg.miniature.biopsies import NUM_PATCHES, draw_mix, draw_patch, facts_of, report
from mivpg.miniature.folders import Record, fill_folder, write_photo


@dataclass(frozen=True, kw_only=True)
class GeneratedSlide:
    """What is true of a slide."""

    id: str
    """32 hexadecimal digits."""
    facts: dict[str, str]
    """As `biopsies.facts_of` gives them."""
    caption: str
    patches: dict[str, str]
    """What each patch shows, by file name."""


def make_patch_gastric(root: Path, *, num_slides: int = 300, mean_patches: int = 30, seed: int = 0) -> Path:
    """Draws slides, or leaves them as they are where they are there already.

    Args:
        root: A new or empty folder, or one that an interrupted run has begun.
        num_slides: 1 or more.
        mean_patches: Of a slide, 5 to 300; most have fewer, and some many more.
        seed: Other slides for another seed.

    Returns:
        `root`, which `PatchGastricConfig` reads.

    Raises:
        MivpgError: The folder holds something else, or slides made otherwise.
    """
    fewest, most = NUM_PATCHES
    if num_slides < 1 or not fewest <= mean_patches <= most or seed < 0:
        raise MivpgError(
            f"num_slides is {num_slides}, mean_patches {mean_patches} and seed {seed}, expected at least 1, "
            f"{fewest} to {most} and at least 0."
        )
    made_by = {
        "generator": "mivpg miniature patch-gastric",
        "num_slides": num_slides,
        "mean_patches": mean_patches,
        "seed": seed,
    }
    make, write = partial(_make_slide, root, seed, mean_patches), partial(_write_table, root)
    fill_folder(root, made_by, make, num_slides, unit="slides", write=write)
    return root


def read_truth(root: Path) -> list[GeneratedSlide]:
    """What is true of generated slides, in the order of `captions.csv`.

    Raises:
        MivpgError: The folder holds no generated slides.
    """
    return folders.read_truth(root, _slide)


def _make_slide(root: Path, seed: int, mean_patches: int, index: int) -> Record:
    """Draws a slide's patches; random numbers depend on (seed, mean_patches, index) alone."""
    generator = random.Random(f"patch gastric {seed} {index}")
    mix = draw_mix(generator, mean_patches=mean_patches)
    facts = facts_of(mix)
    caption = report(facts, generator)
    slide_id = hashlib.sha256(f"{seed} {index}".encode()).hexdigest()[:32]
    patches = {}
    for number, kind in enumerate(kind for kind, count in mix.items() for _ in range(count)):
        patch_hash = hashlib.sha256(f"{seed} {index} {number}".encode()).hexdigest()[:32]
        path = root / PATCHES / f"{slide_id}_{patch_hash}.jpg"
        write_photo(path, draw_patch(kind, generator))
        patches[path.name] = kind
    return {"id": slide_id, "facts": facts, "caption": caption, "patches": dict(sorted(patches.items()))}


def _write_table(root: Path, records: list[Record]) -> None:
    """The table of captions, whole or not at all."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", "subtype", "text"])
    for record in records:
        subtype = record["facts"]["subtype"]
        writer.writerow([record["id"], subtype[0].upper() + subtype[1:], record["caption"]])
    write_whole(root / CAPTIONS_CSV, table.getvalue())


def _slide(record: Record) -> GeneratedSlide:
    return GeneratedSlide(
        id=record["id"],
        facts=dict(record["facts"]),
        caption=record["caption"],
        patches=dict(record["patches"]),
    )
