"""Pictures of one bag, part by part: a photo with the weights of its patches, every head of every block, and words.

`visualization.draw_attention` puts a bag on one sheet, as the paper's Figure 6; these are larger, and `mivpg show` lays
them out on a page.
"""

# L blocks with cross-attention, A attention heads, R queries, N images, W words

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from mivpg.visualization import STYLE, as_png, draw_grid, draw_head_panels

EVEN_COLORS = "viridis"
"""Perceptually even: twice the step in weight looks like twice the step in colour. `jet`, which the paper has, draws
edges where there are none."""

LONGEST_WORD = 20
"""Letters that are drawn of a word; an untrained model writes longer ones."""


@dataclass(frozen=True, kw_only=True)
class PatchMap:
    """One way to look at the patches of a photo."""

    title: str
    grid: np.ndarray
    """(side, side), 1 = all alike."""
    colors: str
    """A colour map of matplotlib."""
    largest: float
    """Where the colours end; they begin at 0."""


def patch_maps(
    index: int, within: np.ndarray | None, combined: np.ndarray | None, *, num_patches: int
) -> list[PatchMap]:
    """The maps of one photo: its patches' weights in jet and in even colours, and where AB-MIL pools both kinds.

    Args:
        index: Of the photo.
        within: (N, side, side), AB-MIL's weights, or None where none pools.
        combined: (N, side, side), cross-attention and pooling in one, or None where patches are not told apart.
        num_patches: P, tokens an image.
    """
    if combined is None:
        return []
    of_bag = combined * len(combined) * num_patches
    largest = float(of_bag.max())
    if within is None:
        return [
            PatchMap(title="cross-attention, jet", grid=of_bag[index], colors="jet", largest=largest),
            PatchMap(title="cross-attention, viridis", grid=of_bag[index], colors=EVEN_COLORS, largest=largest),
        ]
    pooled = within * num_patches
    ends = float(pooled.max())
    return [
        PatchMap(title="AB-MIL, jet", grid=pooled[index], colors="jet", largest=ends),
        PatchMap(title="AB-MIL, viridis", grid=pooled[index], colors=EVEN_COLORS, largest=ends),
        PatchMap(title="× cross-attention", grid=of_bag[index], colors=EVEN_COLORS, largest=largest),
    ]


def draw_patches(photo: Image.Image, maps: Sequence[PatchMap], *, title: str) -> bytes:
    """Draws a photo and, each over it, the weights of its patches.

    Args:
        photo: As the vision model saw it, so that the grid covers it whole.
        maps: Up to three.
        title: Stands above.

    Returns:
        A PNG.
    """
    columns, rows = (2, 2) if maps else (1, 1)
    with matplotlib.style.context(["default", STYLE, {"font.size": 11, "axes.titlesize": 11}]):
        figure = Figure((3 * columns, 2.85 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        first, *others = panels.flat
        first.imshow(photo)
        first.set_title("as the model saw it")
        for axes, patches in zip(others, maps, strict=False):
            _draw_over(axes, photo, patches)
        figure.suptitle(title, fontsize=12, fontweight="bold")
        return as_png(figure, dpi=100)


def _draw_over(axes: Axes, photo: Image.Image, patches: PatchMap) -> None:
    """The photo in grey, and its patches as they are, without smoothing, so that none is taken for more than it is."""
    how = {"cmap": patches.colors, "norm": Normalize(0, patches.largest), "alpha": 0.6, "interpolation": "nearest"}
    drawn = draw_grid(axes, photo, patches.grid, **how)
    axes.set_title(patches.title)
    axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)


def draw_heads(heads: np.ndarray) -> bytes:
    """Draws what each query reads of each image, in every head of every block.

    Args:
        heads: (L, A, R, N); rows sum to one.

    Returns:
        A PNG: a row of panels a block, a column a head; in each a row a query and a column an image, on one scale.
    """
    num_blocks, num_heads = heads.shape[:2]
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure((max(1.1 * num_heads, 5) + 1.2, 1.5 * num_blocks + 0.8), layout="constrained")
        axes = figure.subplots()
        names = [f"head {head + 1}" for head in range(num_heads)]
        panels, gap = heads.reshape(-1, *heads.shape[2:]), 0.1
        scale = draw_head_panels(axes, panels, columns=num_heads, names=names, gap=gap, num_ticks=(4, 4))
        for block in range(num_blocks):
            axes.annotate(
                f"block {block + 1}\nquery",
                (0, (1 + gap) * block + 0.5),
                xytext=(-25, 0),
                textcoords="offset points",
                rotation="vertical",
                horizontalalignment="right",
                verticalalignment="center",
            )
        axes.set_xlabel("image")
        figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.01, label="weight")
        return as_png(figure, dpi=110)


def draw_words(words: Sequence[str], images: np.ndarray, numbers: Sequence[int]) -> bytes:
    """Draws which image each word looked at.

    Args:
        words: Of the caption.
        images: (W, N), the weight of each image that is shown.
        numbers: Of these images, from 1.

    Returns:
        A PNG: a row a word, a column an image.
    """
    with matplotlib.style.context(["default", STYLE, {"font.size": 10}]):
        figure = Figure((2.4 + 0.6 * len(numbers), 0.9 + 0.28 * len(words)), layout="constrained")
        axes = figure.subplots()
        drawn = axes.imshow(images, norm=Normalize(0, images.max()), cmap=EVEN_COLORS, aspect="auto")
        axes.set_xticks(range(len(numbers)), [str(number) for number in numbers])
        axes.set_yticks(range(len(words)), [shorten(word) for word in words])
        axes.set_xlabel("image")
        figure.colorbar(drawn, ax=axes, fraction=0.08, pad=0.03, label="weight")
        return as_png(figure, dpi=100)


def shorten(word: str) -> str:
    return word if len(word) <= LONGEST_WORD else f"{word[: LONGEST_WORD - 1]}…"
