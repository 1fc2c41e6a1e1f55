"""The one place where a picture is opened: whatever a shop or a laboratory keeps on disk becomes 8-bit RGB."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mivpg.errors import BagError
from mivpg.files import DAMAGE, check_is_file

logger = logging.getLogger(__name__)

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded. Pillow knows more, among them EPS, for which it starts another program."""

MAX_PIXELS = 178_000_000
"""Larger pictures are refused before they are decoded: a file of a few bytes can ask for all memory there is."""

SMALL_PIXELS, MAX_PIXELS_A_BYTE = 25_000_000, 2_000
"""Of more pixels than the first, a byte may hold so many. A white photo has 60 to 1,300 a byte; what packs tighter is
blank or made to fill the memory: 330 bytes of WebP can take 3 GB."""

# Pillow warns at half of our limit, for every such file. Set once, because `catch_warnings` is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_has_warned_of_frames = False


def open_image(path: Path) -> Image.Image:
    """Opens a picture as RGB, upright, with every pixel in memory.

    CMYK, 16-bit, palette and grey pictures are converted, transparency is laid on white, the rotation that a camera
    noted (EXIF) is applied, and of an animation the first frame is taken.

    Raises:
        BagError: The file is missing, unreadable, truncated, not a picture, or larger than `MAX_PIXELS`.
    """
    with _opened(path) as image:
        return _as_rgb(path, ImageOps.exif_transpose(image))


def check_image(path: Path) -> None:
    """Looks at a picture's header, which is quick; what is wrong with its pixels shows only when they are decoded.

    Raises:
        BagError: The file is missing, unreadable, not a picture, or larger than `MAX_PIXELS`.
    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture whose header is as it has to be; what goes wrong with it becomes one line."""
    check_is_file(path, "a picture", BagError)
    try:
        if path.stat().st_size == 0:
            raise BagError(f"{path} is empty, expected a picture.")
        with Image.open(path) as image:
            _check(path, image)
            yield image
    except BagError:  # already one of ours, which are ValueErrors, too
        raise
    except UnidentifiedImageError:
        raise BagError(f"{path} is not a picture, expected one of {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError:
        raise BagError(f"{path} has more than the {MAX_PIXELS} pixels allowed.") from None
    except DAMAGE as error:
        raise BagError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None


def _check(path: Path, image: Image.Image) -> None:
    """Looks at the header, before any pixel is decoded."""
    global _has_warned_of_frames
    if image.format not in FORMATS:
        raise BagError(f"{path} is {image.format}, expected one of {', '.join(FORMATS)}.")
    if image.width * image.height == 0:
        raise BagError(f"{path} is {image.width} x {image.height} pixels, expected at least one.")
    if image.width * image.height > MAX_PIXELS:
        raise BagError(f"{path} is {image.width} x {image.height} pixels, more than the {MAX_PIXELS} allowed.")
    if image.width * image.height > max(SMALL_PIXELS, MAX_PIXELS_A_BYTE * (num_bytes := path.stat().st_size)):
        raise BagError(
            f"{path} is {num_bytes} bytes and {image.width} x {image.height} pixels, at most {SMALL_PIXELS} or "
            f"{MAX_PIXELS_A_BYTE} a byte are read; make it smaller if it is a picture."
        )
    if getattr(image, "is_animated", False) and not _has_warned_of_frames:  # only some formats define it
        _has_warned_of_frames = True
        logger.warning("%s holds several frames; of such files the first is used.", path)


def _as_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_grey(path, image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(path: Path, image: Image.Image) -> Image.Image:
    """16 bits a pixel to 8; Pillow's own conversion would cut everything above 255 to white."""
    pixels = np.asarray(image)
    if not (pixels.min() >= 0 and pixels.max() <= 65535) or image.mode == "F":
        raise BagError(f"{path} has pixels of mode {image.mode}, whose white is not known; expected 8 or 16 bits.")
    return Image.fromarray((pixels / 257).round().astype(np.uint8)).convert("RGB")
