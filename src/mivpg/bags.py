"""From a record of a data set to a batch, the same for pixels and for stored features.

A data set is a list of `Sample`s (`mivpg.datasets` reads them from files). `BagDataset` opens one as a `Bag`,
`BagSampler` puts bags of like size together, and `BagCollator` hands a list of bags to the processor, which pads.
What is random in training is a function of (seed, epoch, index), so a resumed run sees what an unbroken one sees.
"""

# N images of a bag, P patch tokens an image, D vision width

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mivpg.augmentation import augment
from mivpg.errors import BagError, MivpgError
from mivpg.feature_files import features_shape, has_coords, read_features
from mivpg.images import check_image, open_image

Split = Literal["train", "val", "test", "all"]
SPLITS: tuple[Split, ...] = get_args(Split)

BLOCKS_PER_WINDOW = 100
"""Bags are sorted by size inside windows of this many blocks. On bags of 1 to 1860 patches in blocks of 8 a window of
100 leaves 6 % padding, of 16 a fifth, no sorting two thirds."""

HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")
"""Half of a pair that stands for one character: JSON may hold it, no tokenizer takes it."""

SIZE_JITTER = 0.05
"""Sizes are multiplied by up to 1 ± this before sorting, so that bags of a small data set change their neighbours."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One record of a data set; nothing is opened yet."""

    id: str
    images: tuple[Path, ...] = ()
    slides: tuple[Path, ...] = ()
    """Slide files of one case, instead of images; `extract_features` cuts them into tiles."""
    features: Path | None = None
    """A file that `read_features` reads, instead of images."""
    image_coords: tuple[tuple[float, float], ...] | None = None
    """x and y of each image, where positions are known, in any unit; PPEG needs them on a regular lattice. Those in a
    features file go before."""
    captions: tuple[str, ...] = ()
    """The references, each a description of the whole bag."""
    prompt: str | None = None
    """What precedes the caption of this bag; None = the prompt of the run."""
    label: str | None = None
    """A class, such as the product type, for the label-based floor of an evaluation."""
    group: str | None = None
    """What must not be divided between splits, such as a patient."""
    split: Split | None = None
    """Where the bag belongs, "all" = in each; None = the data set has no splits."""


@dataclass(kw_only=True)
class Bag:
    """One opened bag, with `images`, `pixel_values` or `image_embeds`."""

    id: str
    images: list[Image.Image] | None
    image_embeds: Tensor | None
    """(N, P, D) float32."""
    image_coords: Tensor | None
    """(N, 2) float32, x and y in any unit; PPEG needs them on a regular lattice."""
    prompt: str
    caption: str | None
    """The reference drawn for training, else None."""
    pixel_values: Tensor | None = None
    """(N, 3, h, w), images as the vision model gets them."""


def select(samples: Iterable[Sample], split: str) -> list[Sample]:
    """The samples of one split; a sample of split "all" is in each, one without a split in train alone.

    Raises:
        MivpgError: There is no such split.
    """
    if split not in SPLITS:
        raise MivpgError(f"split is {split!r}, expected one of {', '.join(SPLITS)}.")
    if split == "all":
        return list(samples)
    return [s for s in samples if s.split in (split, "all") or (s.split is None and split == "train")]


def one_pair_a_reference(samples: Iterable[Sample]) -> list[Sample]:
    """A sample for each reference of each bag, so that an epoch trains on every pair once, as BLIP-2 does on COCO."""
    return [replace(sample, captions=(caption,)) for sample in samples for caption in sample.captions]


def assign_splits(
    samples: Sequence[Sample], *, seed: int, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
) -> list[Sample]:
    """Draws train, val and test at random, the same on every machine whatever the order of the samples.

    Samples of one group stay together. A group goes where its first bag falls, so with large groups the sizes are
    as near to the fractions as whole groups allow.

    Args:
        samples: In any order; they come back in it.
        seed: Another seed, another split.
        fractions: The shares of train, val and test; they sum to one.
    """
    units: dict[tuple[bool, str], list[Sample]] = {}
    for sample in samples:
        unit = (True, sample.group) if sample.group is not None else (False, sample.id)
        units.setdefault(unit, []).append(sample)
    order = sorted(units)
    random.Random(seed).shuffle(order)

    end_of_train = round(fractions[0] * len(samples))
    end_of_val = round((fractions[0] + fractions[1]) * len(samples))
    splits: dict[str, Split] = {}
    for unit in order:
        position = len(splits)
        split: Split = "train" if position < end_of_train else "val" if position < end_of_val else "test"
        splits.update((sample.id, split) for sample in units[unit])
    return [replace(sample, split=splits[sample.id]) for sample in samples]


def bag_size(sample: Sample) -> int:
    """The number of images of a bag; of stored features, by their file's header."""
    return len(sample.images) if sample.features is None else features_shape(sample.features)[0]


def size_to_sort_by(sample: Sample) -> int:
    """Its `bag_size`; 0 where that cannot be read, and what is wrong is said when the bag is opened."""
    try:
        return bag_size(sample)
    except BagError:
        return 0


def check_bags(samples: Iterable[Sample]) -> None:
    """Finds before training what would stop it in the middle: files are looked at (names, headers), not decoded.

    Raises:
        BagError: The first bag that lacks images, a file or a caption, names a file that is no picture, or whose
            features differ from the others'.
    """
    first: Sample | None = None
    first_kind = ""
    for sample in samples:
        with naming(sample):
            check_record(sample)
            _check_has_caption(sample)
            _check_is_cut(sample)
            for path in sample.images:
                check_image(path)
            kind = _kind_of_sample(sample)
        if first is None:
            first, first_kind = sample, kind
        elif kind != first_kind:
            raise BagError(_mixed(first.id, first_kind, sample.id, kind))


@contextmanager
def naming(sample: Sample) -> Iterator[None]:
    """Puts the bag's id before what is wrong with it."""
    try:
        yield
    except BagError as error:
        raise BagError(f"bag {sample.id!r}: {error}") from None


def check_record(sample: Sample) -> None:
    kinds = {"images": sample.images, "slides": sample.slides, "features": sample.features}
    given = [kind for kind, value in kinds.items() if value]
    if len(given) > 1:
        raise BagError(f"both {' and '.join(given)}, expected one of them.")
    if not given:
        raise BagError("no image, expected at least one (or a slide, or a features file).")
    if sample.slides and sample.image_coords is not None:
        raise BagError("slides and coordinates, but tiles bring their own; leave the coordinates out.")
    if any(not caption.strip() for caption in sample.captions):
        raise BagError("an empty caption; fill it in or leave it out.")
    for text in (sample.prompt or "", *sample.captions):
        if HALF_A_CHARACTER.search(text):
            raise BagError(f"half a character (a lone surrogate) in the text {text!r}; correct it.")
    if sample.image_coords is not None and len(sample.image_coords) != bag_size(sample):
        raise BagError(f"{bag_size(sample)} images and {len(sample.image_coords)} coordinates, expected as many.")


def _check_is_cut(sample: Sample) -> None:
    if sample.slides:
        raise BagError("a slide, which is too large to be opened as it is; cut it with `mivpg extract` first.")


def _check_has_caption(sample: Sample) -> None:
    if not sample.captions:
        raise BagError("no caption, expected at least one to train on.")


def has_positions(sample: Sample) -> bool:
    """Whether it is known where the images of a bag lie.

    Raises:
        BagError: Its features file cannot be read.
    """
    return sample.image_coords is not None or (sample.features is not None and has_coords(sample.features))


def _kind_of_sample(sample: Sample) -> str:
    shape = None if sample.features is None else features_shape(sample.features)
    return _kind(shape, has_positions(sample))


def _kind_of_bag(bag: Bag) -> str:
    return _kind(None if bag.image_embeds is None else bag.image_embeds.shape, bag.image_coords is not None)


def _kind(shape: Sequence[int] | None, coords: bool) -> str:
    """What all bags of a batch have to share, in words."""
    kind = "images" if shape is None else f"features (N, {shape[1]}, {shape[2]})"
    return f"{kind} with coordinates" if coords else kind


def _mixed(first_id: str, first_kind: str, other_id: str, other_kind: str) -> str:
    return f"bag {first_id!r} has {first_kind} and bag {other_id!r} has {other_kind}, expected all bags alike."


class Processor(Protocol):
    """What is asked of `MivpgProcessor`."""

    def pixels(self, bag: Sequence[Image.Image]) -> Tensor: ...

    def __call__(
        self,
        *,
        images: list[list[Image.Image]] | None,
        pixel_values: list[Tensor] | None,
        image_embeds: list[Tensor] | None,
        image_coords: list[Tensor] | None,
        text: list[str],
        captions: list[str] | None,
        return_tensors: str,
    ) -> Mapping[str, Tensor]: ...


class BagDataset(Dataset):
    """Opens bags one at a time.

    Args:
        samples: What `mivpg.datasets` read, of one split.
        prompt: For samples without a prompt of their own.
        seed: Of the choice among several references and among images.
        training: Whether a bag carries a caption: one reference, drawn anew every epoch.
        max_images: Of a larger bag so many images, drawn anew every epoch, in their order.
        augmented: Whether images are turned, mirrored and recoloured, anew every epoch.
        processor: Makes each image ready for the vision model as soon as it is open, so that one of a bag's images at a
            time is in memory as large as it is: thirty photos of a phone are a gigabyte. None = bags hold `images`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        prompt: str = "",
        seed: int = 0,
        training: bool = False,
        max_images: int | None = None,
        augmented: bool = False,
        processor: Processor | None = None,
    ) -> None:
        self.samples = samples
        self.prompt = prompt
        self.seed = seed
        self.training = training
        self.max_images = max_images
        self.augmented = augmented
        self.processor = processor

    def sizes(self) -> list[int]:
        """Images of each bag, as it will be opened."""
        sizes = [bag_size(sample) for sample in self.samples]
        return sizes if self.max_images is None else [min(size, self.max_images) for size in sizes]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | tuple[int, int]) -> Bag:
        """Opens a bag.

        Args:
            index: The number of the sample, or (epoch, number) as `BagSampler` yields it.

        Raises:
            BagError: The bag has no image, an image or features file cannot be read, or training needs a caption.
        """
        epoch, index = (0, index) if isinstance(index, int) else index
        sample = self.samples[index]
        images, pixel_values, image_embeds, coords, caption = None, None, None, None, None
        with naming(sample):
            check_record(sample)
            _check_is_cut(sample)
            chosen = self._choose_images(sample, epoch, index)
            if sample.features is None:
                paths = sample.images if chosen is None else [sample.images[i] for i in chosen]
                opened = self._open_images(paths, random.Random(f"{self.seed} {epoch} {index} augmentation"))
                if self.processor is None:
                    images = list(opened)
                else:
                    pixel_values = _alike([self.processor.pixels([image]) for image in opened])
            elif self.augmented:
                raise BagError(f"{sample.features} holds features, and augmentation changes images; leave one out.")
            else:
                image_embeds, coords = read_features(sample.features)
            if coords is None and sample.image_coords is not None:
                coords = torch.tensor(sample.image_coords, dtype=torch.float32)  # (N, 2)
            if chosen is not None:
                image_embeds = None if image_embeds is None else image_embeds[chosen]
                coords = None if coords is None else coords[chosen]
            if self.training:
                _check_has_caption(sample)
                caption = random.Random(f"{self.seed} {epoch} {index}").choice(sample.captions)
        prompt = self.prompt if sample.prompt is None else sample.prompt
        return Bag(
            id=sample.id,
            images=images,
            image_embeds=image_embeds,
            image_coords=coords,
            prompt=prompt,
            caption=caption,
            pixel_values=pixel_values,
        )

    def _open_images(self, paths: Iterable[Path], generator: random.Random) -> Iterator[Image.Image]:
        for path in paths:
            image = open_image(path)
            yield augment(image, generator) if self.augmented else image

    def _choose_images(self, sample: Sample, epoch: int, index: int) -> list[int] | None:
        """Numbers of the images that this epoch sees; None = all."""
        if self.max_images is None or (number := bag_size(sample)) <= self.max_images:
            return None
        generator = random.Random(f"{self.seed} {epoch} {index} images")
        return sorted(generator.sample(range(number), self.max_images))


def _alike(pixel_values: list[Tensor]) -> Tensor:
    """(N, 3, h, w) of so many (1, 3, h, w)."""
    shapes = list(dict.fromkeys(tuple(image.shape[2:]) for image in pixel_values))
    if len(shapes) > 1:
        raise BagError(f"the image processor makes images of {shapes[0]} and {shapes[1]} pixels, expected one size.")
    return torch.cat(pixel_values)


class BagSampler(Sampler[tuple[int, int]]):
    """An order of bags in which neighbours are of like size, so that little of a batch is padding.

    The order is a function of (seed, epoch) and of the block, the bags of one optimizer step over all processes and
    accumulation steps. How a block is divided among them does not change it: one process with batch 8, accumulation
    of four batches of 2, and two processes with batch 4 take the same steps.

    Args:
        sizes: The number of images of each bag.
        seed: Another seed, another order.
        block: Bags per optimizer step.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, block: int) -> None:
        self.sizes = sizes
        self.seed = seed
        self.block = block
        self.epoch = 0
        """Set before each epoch. Not a `set_epoch` method: accelerate calls those with a count of its own."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields (epoch, index), each index once."""
        generator = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.sizes)))
        generator.shuffle(order)
        # What does not fill a block is set aside before sorting, else it would always be the largest bags.
        whole = len(order) - len(order) % self.block
        blocks = []
        for window in _pieces(order[:whole], BLOCKS_PER_WINDOW * self.block):
            window.sort(key=lambda index: self.sizes[index] * generator.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER))
            blocks += _pieces(window, self.block)
        generator.shuffle(blocks)
        blocks.append(order[whole:])
        for block in blocks:
            block.sort(key=lambda index: self.sizes[index])  # so the parts of a block are alike in size, too
        return iter([(self.epoch, index) for block in blocks for index in block])


def _pieces(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class BagCollator:
    """Makes a batch of bags.

    Args:
        processor: Pads and tokenises.
        training: Whether the batch carries captions, to make labels of.
    """

    def __init__(self, processor: Processor, *, training: bool) -> None:
        self.processor = processor
        self.training = training

    def __call__(self, bags: list[Bag]) -> Mapping[str, Tensor]:
        """Hands the bags to the processor.

        Raises:
            BagError: Two bags differ in what a tensor can hold only one of: images or features, their shape, and
                whether coordinates are known.
        """
        for bag in bags[1:]:
            if _kind_of_bag(bag) != _kind_of_bag(bags[0]):
                raise BagError(_mixed(bags[0].id, _kind_of_bag(bags[0]), bag.id, _kind_of_bag(bag)))
        images = [bag.images for bag in bags if bag.images is not None]
        pixel_values = [bag.pixel_values for bag in bags if bag.pixel_values is not None]
        image_embeds = [bag.image_embeds for bag in bags if bag.image_embeds is not None]
        image_coords = [bag.image_coords for bag in bags if bag.image_coords is not None]
        captions = [bag.caption for bag in bags if bag.caption is not None]
        assert not self.training or len(captions) == len(bags), "the data set was not made with training=True"
        return self.processor(
            images=images or None,
            pixel_values=pixel_values or None,
            image_embeds=image_embeds or None,
            image_coords=image_coords or None,
            text=[bag.prompt for bag in bags],
            captions=captions if self.training else None,
            return_tensors="pt",
        )
