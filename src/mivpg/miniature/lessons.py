"""What the recipe of the miniature base model learns from: texts, and single pictures with a text and what they show.

Each of the three miniatures (products, scenes, slides) gives such lessons, from things that no data set of its holds.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

IMAGE_SIZE = 96
"""Of the base model's pictures, pixels a side."""
SHARE_WITH_KEYWORDS = 0.9
"""Of the texts; the others are written out of nothing."""


@dataclass(frozen=True)
class TextLesson:
    """A text, and the keywords from which to write it."""

    keywords: list[str]
    """Of what it speaks, and of more, in any order; none = to be written out of nothing."""
    text: str


@dataclass(frozen=True)
class PictureLesson:
    """A single picture, and what it shows."""

    pixels: np.ndarray
    """(96, 96, 3) uint8."""
    keywords: list[str]
    """Of what it does not show and the text speaks of as well; more often than not there are none."""
    text: str
    classes: frozenset[str]
    """All that it shows, among the miniature's `CLASSES`."""
    facts: dict[str, str]
    """What is true of it, by name, as the miniature's `right_of_said` reads it."""
    can_be_mirrored: bool = True
    """Whether all this is so of its mirror image as well."""


def pixels_of(image: Image.Image) -> np.ndarray:
    """(96, 96, 3) uint8, as the image processor makes a data set's pictures smaller."""
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
