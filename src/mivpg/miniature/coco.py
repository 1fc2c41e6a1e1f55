"""Miniature MSCOCO: generated scenes in the files of Karpathy's split, which the COCO reader reads.

    root/train2014/COCO_train2014_000000000123.jpg   the pictures
    root/val2014/COCO_val2014_000000000456.jpg       those of val and test, and some that one trains on
    root/annotations/coco_karpathy_train.json        a caption an entry; …_val.json and …_test.json a picture an entry
    root/truth.json                                  what is true of each picture
    root/miniature.json                              what made all this; written last

The same seed gives the same pictures and captions. An interrupted run goes on where it was.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mivpg.bags import Split
from mivpg.errors import MivpgError
from mivpg.files import write_whole
from mivpg.miniature.folders import Record, fill_folder, read_truth, write_photo
from mivpg.miniature.scenes import draw_scene, photograph_scene, references

LARGEST_ID = 581_929
"""Of a picture, as in MSCOCO."""
SHARE_OF_OTHER_SPLITS = 0.1
"""Of all pictures, for validation and as many for testing."""
SHARE_FROM_VAL = 0.27
"""Of the training pictures, those that lie in `val2014`, as in Karpathy's split."""


@dataclass(frozen=True)
class Place:
    """Where a picture stands."""

    image_id: int
    split: Split
    folder: str
    """`train2014` or `val2014`."""

    @property
    def image(self) -> str:
        """Its path from the root."""
        return f"{self.folder}/COCO_{self.folder}_{self.image_id:012d}.jpg"


def make_coco(root: Path, *, num_pictures: int = 1000, seed: int = 0) -> Path:
    """Draws the pictures and writes what is said of them; nothing is done where all is there already.

    Args:
        root: A new or empty folder, or one that an interrupted run has begun.
        num_pictures: 3 to 581929: a tenth each for validation and testing, at least one of each split.
        seed: Other pictures and captions for another seed.

    Returns:
        The root, for `CocoConfig(root=…)`.

    Raises:
        MivpgError: The folder holds something else, or scenes made otherwise.
    """
    if not 3 <= num_pictures <= LARGEST_ID or seed < 0:
        raise MivpgError(
            f"num_pictures is {num_pictures} and seed {seed}, expected 3 to {LARGEST_ID} and a seed of at least 0."
        )
    made_by = {"generator": "mivpg miniature coco", "num_pictures": num_pictures, "seed": seed}
    places = place_pictures(num_pictures, seed)
    make, write = partial(_make_picture, root, seed, places), partial(_write_texts, root)
    fill_folder(root, made_by, make, num_pictures, unit="scenes", write=write)
    return root


def read_facts(root: Path) -> dict[str, dict[str, str]]:
    """What is true of each picture, as `scenes.right_of_said` reads it, by the id of its sample.

    Raises:
        MivpgError: There are no generated scenes.
    """
    return dict(read_truth(root, lambda record: (Path(record["image"]).stem, dict(record["facts"]))))


def place_pictures(num_pictures: int, seed: int) -> list[Place]:
    """The id, split and folder of each picture, in the order of ids."""
    generator = random.Random(f"coco places {seed}")
    others = max(int(num_pictures * SHARE_OF_OTHER_SPLITS), 1)
    train = num_pictures - 2 * others
    from_val = int(train * SHARE_FROM_VAL)
    numbers: dict[tuple[Split, str], int] = {
        ("val", "val2014"): others,
        ("test", "val2014"): others,
        ("train", "val2014"): from_val,
        ("train", "train2014"): train - from_val,
    }
    kinds = [kind for kind, number in numbers.items() for _ in range(number)]
    generator.shuffle(kinds)
    ids = sorted(generator.sample(range(1, LARGEST_ID + 1), num_pictures))
    return [Place(image_id, *kind) for image_id, kind in zip(ids, kinds, strict=True)]


def _make_picture(root: Path, seed: int, places: Sequence[Place], index: int) -> Record:
    """Draws the picture of an index; random numbers depend on (seed, index) alone."""
    generator = random.Random(f"coco {seed} {index}")
    scene = draw_scene(generator)
    write_photo(root / places[index].image, photograph_scene(scene, generator))
    return asdict(places[index]) | {
        "image": places[index].image,
        "facts": scene.facts(),
        "captions": references(scene, generator),
    }


def _write_texts(root: Path, records: list[Record]) -> None:
    """Karpathy's files, each whole or not at all."""
    entries: dict[Split, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for record in records:
        image, captions = record["image"], record["captions"]
        if record["split"] == "train":
            image_id = f"coco_{record['image_id']}"
            entries["train"] += [{"caption": caption, "image": image, "image_id": image_id} for caption in captions]
        else:
            entries[record["split"]].append({"image": image, "caption": captions})
    for split, those in entries.items():
        write_whole(root / "annotations" / f"coco_karpathy_{split}.json", json.dumps(those, indent=1) + "\n")
