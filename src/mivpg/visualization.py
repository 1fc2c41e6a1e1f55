"""What a model looked at when it wrote a caption: numbers of each image, maps of each patch, and a picture of both.

    batch = processor(images=[photos])
    weights = image_weights(model, batch)                        # (1, N), one number a photo
    maps = attention_maps(model, batch)                          # (1, N, P), and each head of each block
    png = draw_attention(maps, as_seen(processor, photos), num_prefix_tokens=1, title="a chair", caption=caption)

Attention says what was read, not what a word came from: CSA and self-attention mix images before they are read.
"""

# B bags, N images a bag, P patch tokens an image, D vision width, M instances a bag, L blocks with cross-attention,
# A attention heads, R queries

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from mivpg.captioning import in_eval_mode
from mivpg.errors import MivpgError
from mivpg.layers import gather_real, scatter_real
from mivpg.modeling_mivpg import MivpgVisualPromptModel
from mivpg.processing_mivpg import MivpgProcessor


@dataclass(frozen=True, kw_only=True)
class AttentionMaps:
    """Where the visual prompts of each bag looked; padding is 0 throughout."""

    patches: Tensor | None
    """(B, N, P), AB-MIL's weight of each token of an image; rows sum to one. None where no AB-MIL pools patches."""
    images: Tensor
    """(L, B, A, R, M), cross-attention of every block that has it; rows over the M instances sum to one. An instance
    is an image where patches are pooled, M = N, else a token, M = N P."""
    combined: Tensor
    """(B, N, P), one weight a token, the sum over a bag is one: the cross-attention to it, the mean over blocks, heads
    and queries, or the image's, shared out as its tokens were pooled: by AB-MIL's weights, evenly by the mean, by the
    number of features that the maximum took of each, and to the first token alone by `cls`. The sum over tokens is
    what `image_weights` gives."""


def check_has_weights(model: MivpgVisualPromptModel) -> None:
    """Raises before the work is done, not after.

    Raises:
        MivpgError: Another aggregator stands in MIVPG's place.
    """
    if model.qformer is None or model.config.aggregator != "mivpg":
        raise MivpgError(f"aggregator {model.config.aggregator!r}: weights of images are MIVPG's cross-attention.")


def image_weights(model: MivpgVisualPromptModel, batch: Mapping[str, Tensor]) -> Tensor:
    """How much the visual prompts looked at each image of each bag.

    The mean over prompts, heads and blocks of the cross-attention; where every patch is an instance, summed over the
    patches of an image.

    Args:
        model: Looks in eval mode, and is left in the mode and with the attention implementation it was found with.
        batch: What the processor makes: `pixel_values` or `image_embeds`, `image_mask` and, for PPEG, `image_coords`.

    Raises:
        MivpgError: Another aggregator stands in MIVPG's place.

    Returns:
        Weights (B, N); each row sums to one, padding is 0.
    """
    # (B, A, R, M) -> (B, M), at once: a block's own weights are large
    _, looks = _look(model, batch, keep=lambda weights: weights.mean(dim=(1, 2)))
    weights = torch.stack(looks).mean(dim=0)  # (B, M), M = N or N*P
    return weights.unflatten(1, (batch["image_mask"].shape[1], -1)).sum(dim=2)


@torch.no_grad()
def attention_maps(model: MivpgVisualPromptModel, batch: Mapping[str, Tensor]) -> AttentionMaps:
    """Where the visual prompts of each bag looked, patch by patch and head by head (Figure 6).

    Args:
        model: As in `image_weights`.
        batch: Likewise. All weights of all blocks are kept, L A R M numbers a bag.

    Raises:
        MivpgError: Another aggregator stands in MIVPG's place.
    """
    image_embeds, looks = _look(model, batch, keep=lambda weights: weights)
    images = torch.stack(looks)  # (L, B, A, R, M)
    image_mask = batch["image_mask"].to(image_embeds.device)
    weights = images.mean(dim=(0, 2, 3)).unflatten(1, (image_mask.shape[1], -1))  # (B, N, 1 or P)
    if model.config.patch_pooling == "none":
        return AttentionMaps(patches=None, images=images, combined=weights)
    real = gather_real(image_embeds, image_mask).to(model.prompt_dtype)  # (n, P, D)
    shares = scatter_real(_pooling_shares(model, real), image_mask)  # (B, N, P)
    patches = None if model.patch_pooling is None else shares
    return AttentionMaps(patches=patches, images=images, combined=weights * shares)


def _pooling_shares(model: MivpgVisualPromptModel, images: Tensor) -> Tensor:
    """How much of a pooled image (n, P, D) each of its tokens is: (n, P), each row sums to one."""
    if model.patch_pooling is not None:
        return model.patch_pooling.attention_weights(images)
    shares = images.new_zeros(images.shape[:2])
    if model.config.patch_pooling == "cls":
        shares[:, 0] = 1
    elif model.config.patch_pooling == "mean":
        shares += 1 / images.shape[1]
    else:  # max
        winners = images.argmax(dim=1)  # (n, D)
        shares.scatter_add_(1, winners, images.new_full(winners.shape, 1 / images.shape[2]))
    return shares


def _look(
    model: MivpgVisualPromptModel, batch: Mapping[str, Tensor], *, keep: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Image embeddings (B, N, P, D), and what `keep` makes of the cross-attention (B, A, R, M) of each block."""
    check_has_weights(model)
    assert model.qformer is not None
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    looks: list[Tensor] = []

    def keep_look(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        looks.append(keep(output[1]))

    blocks = [layer for layer in model.qformer.encoder.layer if layer.has_cross_attention]
    hooks = [block.crossattention.attention.register_forward_hook(keep_look) for block in blocks]
    implementation = model.qformer.config._attn_implementation
    try:
        with in_eval_mode(model):
            model.qformer.set_attn_implementation("eager")  # no other gives the weights
            image_embeds = inputs.get("image_embeds")
            if image_embeds is None:
                image_embeds = model.get_image_embeds(inputs["pixel_values"], inputs["image_mask"])
            model.get_visual_prompts(image_embeds, inputs["image_mask"], inputs.get("image_coords"))
    finally:
        model.qformer.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()
    return image_embeds, looks


# ── The picture (Figure 6) ──────────────────────────────────────────────────────────────────────────────────────────

WIDTH = 12
"""Of the picture, in inches."""

MAX_PHOTOS = 8
"""Of a larger bag the most attended are shown."""

HEADS_IN_A_ROW = 6

STYLE = {
    "text.parse_math": False,  # a caption may hold a dollar
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "figure.titlesize": 13,
    "figure.labelsize": 11,
}


def as_seen(processor: MivpgProcessor, photos: Sequence[Image.Image]) -> list[Image.Image]:
    """Photos as the vision model gets them, resized and perhaps cropped, so that its patches cover each of them whole.

    Args:
        processor: The model's.
        photos: Of one bag, RGB.
    """
    pixels = processor.pixels(photos, do_rescale=False, do_normalize=False)  # (N, 3, h, w), 0 to 255
    return [Image.fromarray(photo.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()) for photo in pixels]


def draw_attention(
    maps: AttentionMaps,
    photos: Sequence[Image.Image],
    *,
    num_prefix_tokens: int,
    title: str,
    caption: str,
    references: Sequence[str] = (),
) -> bytes:
    """Draws a bag with what the visual prompts looked at, as the paper's Figure 6.

    From the top: the photos with their shares of the cross-attention; the weights of their patches over them, where
    patches were told apart; every head of the last block with cross-attention, whose output becomes the visual prompts,
    a row a query and a column an image, all on one scale; the references and the caption.

    Args:
        maps: Of one bag.
        photos: Its photos, as the vision model saw them (`as_seen`): the grid of patches is laid over each whole photo.
        num_prefix_tokens: Tokens before the patches, `config.num_prefix_tokens`; their share is written, not drawn.
        title: Stands above.
        caption: What the model wrote.
        references: What people wrote.

    Raises:
        MivpgError: The maps are of several bags, of another number of photos, or of patches in no square grid.

    Returns:
        A PNG; the same arguments give the same bytes.
    """
    if maps.combined.shape[:2] != (1, len(photos)):
        num_bags, num_images = maps.combined.shape[:2]
        raise MivpgError(f"maps are of {num_bags} bags of {num_images} images, expected one bag of {len(photos)}.")
    combined = maps.combined[0].float().cpu().numpy()  # (N, P)
    weights = combined.sum(axis=1)  # (N,)
    shown = sorted(np.argsort(-weights, kind="stable")[:MAX_PHOTOS].tolist())
    heads = maps.images[-1, 0].unflatten(2, (len(photos), -1)).sum(dim=3).float().cpu().numpy()  # (A, R, N)
    tokens = combined if maps.patches is None else maps.patches[0].float().cpu().numpy()  # (N, P)
    alike = 1 / (tokens.size if maps.patches is None else tokens.shape[1])  # the weight of a token if all were alike
    grids = patch_grids(tokens / alike, num_prefix_tokens)  # (N, side, side)

    columns = max(len(shown), 4)  # a photo of a small bag is no larger than a quarter
    top_height = (WIDTH / columns + 0.2) * (1 if grids is None else 2)
    bottom_height = 1.9 * math.ceil(len(heads) / HEADS_IN_A_ROW) + 0.7
    lines = [line for text in _words(caption, references) for line in textwrap.wrap(text, 145)]
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure((WIDTH, top_height + bottom_height + 0.2 * len(lines) + 0.7), layout="constrained")
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[top_height, bottom_height])[:, 0]
        panels = top.subplots(1 if grids is None else 2, columns, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for axes, index in zip(panels[0], shown, strict=False):
            axes.imshow(photos[index])
            axes.set_title(f"image {index + 1}: {weights[index]:.0%}")
        if grids is not None:
            label = f"weight within the {'bag' if maps.patches is None else 'image'}\n(1 = all tokens alike)"
            _draw_patches(panels[1, : len(shown)], [photos[i] for i in shown], grids[shown], label)
            name = "CLS" if num_prefix_tokens == 1 else "prefix tokens"
            for axes, index in zip(panels[1], shown if num_prefix_tokens else [], strict=False):
                axes.set_title(f"{name}: {tokens[index, :num_prefix_tokens].sum():.1%}")
        heading = "Images and their shares of the cross-attention, over all blocks, heads and queries"
        if len(shown) < len(photos):
            heading += f"; the {len(shown)} largest of {len(photos)}"
        top.suptitle(heading if grids is None else f"{heading}; below, the weights of their patches", fontsize=11)
        _draw_heads(bottom, heads)
        figure.suptitle(title, fontweight="bold")
        figure.supxlabel("\n".join(lines), x=0.01, horizontalalignment="left")
        return as_png(figure, dpi=120)


def as_png(figure: Figure, *, dpi: int) -> bytes:
    """The same figure gives the same bytes."""
    png = io.BytesIO()
    figure.savefig(png, dpi=dpi, metadata={"Software": None})
    return png.getvalue()


def _words(caption: str, references: Sequence[str]) -> list[str]:
    numbered = [f"Reference {number}: {reference}" for number, reference in enumerate(references, start=1)]
    return [*numbered, f"Caption: {caption}"]


def patch_grids(tokens: np.ndarray, num_prefix_tokens: int) -> np.ndarray | None:
    """Weights of tokens (N, P) as grids of patches (N, side, side).

    Returns:
        None where patches were not told apart: none has a weight, or all have the same.

    Raises:
        MivpgError: The patches are no square grid.
    """
    patches = tokens[:, num_prefix_tokens:]
    if patches.shape[1] < 2 or np.ptp(patches, axis=1).max() == 0:
        return None
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise MivpgError(
            f"{tokens.shape[1]} tokens an image less {num_prefix_tokens} before the patches is no square grid; "
            "num_prefix_tokens has to be the model's."
        )
    return patches.reshape(-1, side, side)


def _draw_patches(panels: Sequence[Axes], photos: Sequence[Image.Image], grids: np.ndarray, label: str) -> None:
    """Weights of patches (n, side, side) in jet over their photos, which are grey beneath; all on one scale."""
    scale = Normalize(grids.min(), grids.max())
    for axes, photo, grid in zip(panels, photos, grids, strict=True):
        draw_grid(axes, photo, grid, cmap="jet", norm=scale, alpha=0.55, interpolation="bilinear")
    panels[-1].figure.colorbar(ScalarMappable(scale, "jet"), ax=panels[-1], fraction=0.05, pad=0.02, label=label)


def draw_grid(axes: Axes, photo: Image.Image, grid: np.ndarray, **how: Any) -> AxesImage:
    """Draws the weights of patches (side, side) over their photo, which is grey beneath.

    Args:
        axes: On which.
        photo: As the vision model saw it; the grid covers it whole.
        grid: The weights.
        **how: For matplotlib's `imshow`.
    """
    axes.imshow(photo.convert("L"), cmap="gray", vmin=0, vmax=255)
    extent = (-0.5, photo.width - 0.5, photo.height - 0.5, -0.5)
    return axes.imshow(grid, extent=extent, **how)


def draw_head_panels(
    axes: Axes, heads: np.ndarray, *, columns: int, names: Sequence[str], gap: float, num_ticks: tuple[int, int]
) -> ScalarMappable:
    """Draws heads (n, R, N), a panel a head: a row a query, a column an image, numbered from 1.

    All panels stand in one frame, since matplotlib takes ten seconds to lay out 72 of them.

    Args:
        axes: The frame; a panel is one unit wide and high.
        heads: What each query reads of each image.
        columns: Panels in a row.
        names: Of the first panels, which stand above them.
        gap: Between two rows.
        num_ticks: About so many numbers of images, and of queries, a panel.

    Returns:
        The one scale of all panels, for a colour bar.
    """
    scale = Normalize(0, heads.max())
    lefts = [1.1 * column for column in range(columns)]
    tops = [(1 + gap) * row for row in range(math.ceil(len(heads) / columns))]
    places = [(left, top) for top in tops for left in lefts]
    for (left, top), head in zip(places, heads, strict=False):
        extent = (left, left + 1, top + 1, top)
        axes.imshow(head, norm=scale, aspect="auto", interpolation="nearest", extent=extent)
    for (left, top), name in zip(places, names, strict=False):
        axes.text(left + 0.5, top - 0.04, name, horizontalalignment="center", verticalalignment="bottom")
    axes.set(xlim=(0, lefts[-1] + 1), ylim=(tops[-1] + 1, 0))
    sides = ((axes.set_xticks, lefts, heads.shape[2]), (axes.set_yticks, tops, heads.shape[1]))
    for (set_ticks, starts, number), most in zip(sides, num_ticks, strict=True):
        ticks = MaxNLocator(most, integer=True, min_n_ticks=1).tick_values(1, number)
        shown = [int(tick) for tick in ticks if 1 <= tick <= number]
        set_ticks(
            [start + (tick - 0.5) / number for start in starts for tick in shown], [*map(str, shown)] * len(starts)
        )
    axes.spines[:].set_visible(False)
    return ScalarMappable(scale)


def _draw_heads(bottom: SubFigure, heads: np.ndarray) -> None:
    """Cross-attention (A, R, N), a panel a head."""
    axes = bottom.subplots()
    columns = min(len(heads), HEADS_IN_A_ROW)
    names = [f"head {head + 1}" for head in range(len(heads))]
    scale = draw_head_panels(axes, heads, columns=columns, names=names, gap=0.25, num_ticks=(MAX_PHOTOS, 5))
    bottom.suptitle("Cross-attention of the last block, head by head: what each query reads of each image", fontsize=11)
    axes.set(xlabel="image", ylabel="query")
    bottom.colorbar(scale, ax=axes, fraction=0.02, pad=0.01, label="weight")
