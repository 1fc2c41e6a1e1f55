"""MSCOCO captions in Karpathy's split, as BLIP-2's authors publish it: one picture a bag.

    root/train2014/…, root/val2014/…              the pictures
    root/annotations/coco_karpathy_train.json     [{"image", "caption", "image_id"}], a caption an entry
    root/annotations/coco_karpathy_val.json       [{"image", "caption": [captions]}], a picture an entry
    root/annotations/coco_karpathy_test.json      the same

Pictures of `val2014` that are in none of the three files are left alone.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mivpg.bags import Sample, Split
from mivpg.errors import MivpgError
from mivpg.files import path_below, read_json


@dataclass(kw_only=True)
class CocoConfig:
    """MSCOCO captions in Karpathy's split."""

    root: Path
    """The folder with `train2014` and `val2014`, as the archives unpack."""
    annotations: Path | None = None
    """The folder with `coco_karpathy_{train,val,test}.json`; None = `annotations` in `root`."""
    num_train_pairs: int | None = None
    """Train on so many pairs of picture and caption, drawn at random (the paper's Figure 4); None = on all."""
    subset_seed: int = 0
    """Another seed, other pairs. A smaller number of pairs is a part of a larger one of the same seed."""

    def load(self) -> list[Sample]:
        """Reads the captions; pictures stay closed.

        Returns:
            A sample a picture with all its captions (in training those drawn), in the order of the files, by split.

        Raises:
            MivpgError: A file is missing or not as it has to be, a picture stands in two splits, or there are fewer
                training pairs than asked for.
        """
        folder = self.root / "annotations" if self.annotations is None else self.annotations
        samples: list[Sample] = []
        split_of: dict[str, Split] = {}
        splits: tuple[Split, ...] = ("train", "val", "test")
        for split in splits:
            file = folder / f"coco_karpathy_{split}.json"
            pairs = list(_read_pairs(file))
            if split == "train":
                pairs = self._choose(file, pairs)
            captions: defaultdict[str, list[str]] = defaultdict(list)
            for image, caption in pairs:
                captions[image].append(caption)
            for image, those in captions.items():
                if image in split_of:
                    raise MivpgError(
                        f"{file}: {image} is in {split_of[image]}, too, expected each picture in one split."
                    )
                split_of[image] = split
                try:
                    path = path_below(self.root, self.root, image)
                except MivpgError as error:
                    raise MivpgError(f"{file}: {error}, expected a picture below it.") from None
                samples.append(Sample(id=path.stem, images=(path,), captions=tuple(those), split=split))
        return samples

    def _choose(self, file: Path, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The pairs to train on, in their order."""
        if self.num_train_pairs is None:
            return pairs
        if not 1 <= self.num_train_pairs <= len(pairs):
            raise MivpgError(
                f"num_train_pairs is {self.num_train_pairs}, expected 1 to {len(pairs)}, which {file} has."
            )
        order = list(range(len(pairs)))
        random.Random(self.subset_seed).shuffle(order)
        return [pairs[index] for index in sorted(order[: self.num_train_pairs])]


def _read_pairs(file: Path) -> Iterator[tuple[str, str]]:
    """Picture and caption of each pair in one of Karpathy's files, in order.

    Raises:
        MivpgError: The file is missing or holds something else.
    """
    entries = read_json(file)
    if not isinstance(entries, list) or not entries:
        raise MivpgError(f"{file} holds {_kind(entries)}, expected a list of pictures with their captions.")
    for number, entry in enumerate(entries):
        image, captions = (entry.get("image"), entry.get("caption")) if isinstance(entry, dict) else (None, None)
        if isinstance(captions, str):
            captions = [captions]
        if not isinstance(image, str) or not isinstance(captions, list) or not captions:
            raise MivpgError(f"{file}, entry {number} has no `image` and `caption`, expected both.")
        for caption in captions:
            if not isinstance(caption, str) or not caption.strip():
                raise MivpgError(f"{file}, entry {number}: a caption of {image} is {caption!r}, expected a text.")
            yield image, caption.strip()


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else f"a {type(value).__name__}"
