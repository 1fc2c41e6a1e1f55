"""Random changes of a training image that leave its caption true, as the baselines of PatchGastricADC22 have them."""

import random

import numpy as np
from PIL import Image, ImageOps

HUE, SATURATION, BRIGHTNESS = 0.1, 0.2, 0.2
"""Largest changes: of the colour circle, of a factor around 1, and of white."""


def augment(image: Image.Image, generator: random.Random) -> Image.Image:
    """Turns by quarter turns, mirrors, and changes hue, saturation and brightness (arXiv 2202.03432, `augment`).

    The release draws its saturation factor from 0 to 0.2, in training and testing alike, which leaves next to no
    colour; here it is drawn from 0.8 to 1.2, so that what was trained fits images as they are.

    Args:
        image: RGB; of a tissue, or of anything else that has neither an upper side nor a colour that counts.
        generator: Two calls in the same state change an image alike.
    """
    image = image.rotate(90 * generator.randrange(4), expand=True)
    if generator.random() < 0.5:
        image = ImageOps.mirror(image)
    hue, saturation, value = np.asarray(image.convert("HSV")).transpose(2, 0, 1).astype(np.float32)
    hue = (hue + 256 * generator.uniform(-HUE, HUE)) % 256
    saturation = saturation * generator.uniform(1 - SATURATION, 1 + SATURATION)
    hsv = np.clip(np.stack([hue, saturation, value], axis=2), 0, 255).astype(np.uint8)
    rgb = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")) + 255 * generator.uniform(-BRIGHTNESS, BRIGHTNESS)
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
