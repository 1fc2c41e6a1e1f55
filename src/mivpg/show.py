"""One bag, its caption, and what was looked at when it was written: pictures, arrays and a page of its own.

shown = look_at_bag(model, processor, bag, generation=GenerationOptions())
write_shown(shown, Path("out"), model="runs/products/best")

out/attention.html           everything on one page, without anything from the network
out/attention.json           the caption, the weight of each image and of each word, and what removing images does
out/attention.safetensors    all arrays
out/image_….png              the patches of each photo that is shown; heads.png: every head; words.png: every word
out/heat_map.png             of a slide; top_tiles.png: the tiles looked at most; tiles.geojson: for QuPath
"""

# L blocks with cross-attention, A attention heads, R queries, N images, P patch tokens an image, W words

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_hex
from PIL import Image
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from mivpg.attention_pictures import EVEN_COLORS, draw_heads, draw_patches, draw_words, patch_maps
from mivpg.bags import Bag, BagCollator
from mivpg.captioning import GenerationOptions, caption_bags
from mivpg.errors import BagError
from mivpg.files import write_whole
from mivpg.likelihood import Removal, embed_images, remove_images
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.report import as_jpeg, data_uri, percent
from mivpg.slide_maps import (
    SlideTiles,
    as_geojson,
    draw_heat_map,
    draw_top_tiles,
    open_tile,
    tile_span,
    top_tiles,
)
from mivpg.slides import TileOptions, find_tiles
from mivpg.templating import make_environment
from mivpg.visualization import MAX_PHOTOS, AttentionMaps, as_seen, attention_maps, patch_grids
from mivpg.word_attention import WordWeights, word_weights

TILES_AT_ONCE = 64
"""That the vision model sees."""

THUMBNAIL_SIDE = 96
"""Of a photo at the head of a column, in pixels."""


@dataclass(frozen=True, kw_only=True)
class ShownBag:
    """A bag and what a model looked at when it wrote its caption."""

    bag: Bag
    """With `image_embeds`."""
    names: tuple[str, ...]
    """Of its images."""
    photos: list[Image.Image] | None
    """As the vision model saw them; None of stored features and of tiles."""
    tiles: SlideTiles | None
    """Where the images lie, where that is known."""
    caption: str
    maps: AttentionMaps
    words: WordWeights | None
    """None where the language model gives no attention."""
    removal: Removal | None
    """None of a bag of one image, or where PPEG finds no lattice without some of the tiles."""
    num_prefix_tokens: int

    @property
    def weights(self) -> list[float]:
        """Of each image, (N,); they sum to one."""
        return self.maps.combined[0].sum(dim=1).tolist()

    @property
    def heads(self) -> Tensor:
        """(L, A, R, N), what each query reads of each image in every head of every block."""
        images = self.maps.images[:, 0]  # (L, A, R, M)
        return images.unflatten(3, (len(self.names), -1)).sum(dim=4).float().cpu()

    def most_attended(self) -> list[int]:
        """The images that are shown, in their order: of a large bag those looked at most."""
        order = np.argsort(-np.asarray(self.weights), kind="stable")
        return sorted(order[:MAX_PHOTOS].tolist())


def look_at_bag(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    bag: Bag,
    *,
    generation: GenerationOptions,
    names: Sequence[str] | None = None,
    slide: Path | None = None,
    span: float | None = None,
) -> ShownBag:
    """Captions a bag, and asks what was looked at and whether it mattered.

    Args:
        model: As in `caption_bags`.
        processor: The model's.
        bag: Of images, or of features with or without coordinates.
        generation: How the caption is written.
        names: Of its images; by default their numbers, and where they lie.
        slide: On which its coordinates lie, if there is a file of it.
        span: Of a tile, in the unit of the coordinates; by default their smallest gap.

    Raises:
        BagError: The features do not fit the model.
        MivpgError: Another aggregator stands in MIVPG's place.
    """
    photos = None if bag.images is None else as_seen(processor, bag.images)
    bag = embed_images(model, processor, bag)
    assert bag.image_embeds is not None
    (caption,) = caption_bags(model, processor, [bag], **generation.as_kwargs())
    maps = attention_maps(model, BagCollator(processor, training=False)([bag]))
    weights = maps.combined[0].sum(dim=1).tolist()
    removal = None
    if len(weights) > 1:
        try:
            removal = remove_images(model, processor, bag, caption, weights)
        except BagError:  # what is left of a slide need not have a neighbour on each axis, as PPEG asks for
            removal = None
    tiles = None
    known_as = [f"image {number}" for number in range(1, len(weights) + 1)]
    if bag.image_coords is not None and (span is not None or len(bag.image_coords.unique(dim=0)) > 1):
        corners = bag.image_coords.double().numpy()
        tiles = SlideTiles(corners=corners, span=tile_span(corners) if span is None else span, slide=slide)
        known_as = [f"tile {number} at {x:.0f}, {y:.0f}" for number, (x, y) in enumerate(corners, start=1)]
    return ShownBag(
        bag=bag,
        names=tuple(names or known_as),
        photos=photos,
        tiles=tiles,
        caption=caption,
        maps=maps,
        words=word_weights(model, processor, bag, caption, maps.images[:, 0]),
        removal=removal,
        num_prefix_tokens=model.config.num_prefix_tokens,
    )


def cut_slide(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, path: Path, options: TileOptions, *, prompt: str
) -> tuple[Bag, float]:
    """The tiles of a slide as a bag of features, and how large a tile is on it.

    Args:
        model: Whose vision model sees the tiles.
        processor: The model's.
        path: The slide file.
        options: How it is cut.
        prompt: Precedes the caption.

    Raises:
        BagError: As in `find_tiles`.
        MivpgError: The model has no vision model.
    """
    tiles = find_tiles(path, options)
    parts: list[Tensor] = []
    for start in tqdm(range(0, len(tiles), TILES_AT_ONCE), unit="batch", disable=None):
        pictures = [tile.open() for tile in tiles[start : start + TILES_AT_ONCE]]
        part = Bag(id=path.name, images=pictures, image_embeds=None, image_coords=None, prompt="", caption=None)
        embedded = embed_images(model, processor, part).image_embeds
        assert embedded is not None
        parts.append(embedded)
    coords = torch.tensor([(tile.x, tile.y) for tile in tiles], dtype=torch.float32)
    bag = Bag(
        id=path.name, images=None, image_embeds=torch.cat(parts), image_coords=coords, prompt=prompt, caption=None
    )
    return bag, tiles[0].span


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_shown(shown: ShownBag, out: Path, *, model: str) -> None:
    """Writes pictures, arrays, numbers and the page.

    Args:
        shown: A bag.
        out: The folder; it is made if need be.
        model: Its name, as it was given.

    Raises:
        BagError: The slide cannot be read.
    """
    pictures = draw_pictures(shown)
    for name, png in pictures.items():
        write_whole(out / name, png)
    write_whole(out / "attention.safetensors", save(arrays(shown)))
    if shown.tiles is not None:
        write_whole(out / "tiles.geojson", json.dumps(as_geojson(shown.tiles, shown.weights)))
    numbers = {"model": model} | as_numbers(shown)
    write_whole(out / "attention.json", json.dumps(numbers, indent=2, ensure_ascii=False).encode(errors="replace"))
    write_whole(out / "attention.html", page(shown, pictures, model=model).encode(errors="replace"))


def arrays(shown: ShownBag) -> dict[str, np.ndarray]:
    """What `attention.safetensors` holds, float32.

    `image_weights` (N,); `combined` (N, P), cross-attention and pooling in one weight a patch, which sum to one;
    `patches` (N, P), AB-MIL's weights within each image, where it pools; `heads` (L, A, R, N); `coords` (N, 2), where
    they are known; `word_prompts` (W, R) and `word_images` (W, N), where the language model gives attention.
    """
    found = {"image_weights": torch.tensor(shown.weights), "combined": shown.maps.combined[0], "heads": shown.heads}
    if shown.maps.patches is not None:
        found["patches"] = shown.maps.patches[0]
    if shown.bag.image_coords is not None:
        found["coords"] = shown.bag.image_coords
    if shown.words is not None:
        found |= {"word_prompts": shown.words.prompts, "word_images": shown.words.images}
    return {name: np.ascontiguousarray(array.float().cpu().numpy()) for name, array in found.items()}


def as_numbers(shown: ShownBag) -> dict[str, Any]:
    """What `attention.json` holds."""
    words = None
    if shown.words is not None:
        shares = shown.words.prompts.sum(dim=1).tolist()
        words = [
            {"word": word, "attention_to_prompts": share, "images": row}
            for word, share, row in zip(shown.words.words, shares, shown.words.images.tolist(), strict=True)
        ]
    return {
        "id": shown.bag.id,
        "prompt": shown.bag.prompt,
        "caption": shown.caption,
        "images": [*shown.names],
        "image_weights": shown.weights,
        "words": words,
        "removal": None if shown.removal is None else asdict(shown.removal),
    }


def draw_pictures(shown: ShownBag) -> dict[str, bytes]:
    """Every picture as a PNG, by its file's name."""
    pictures = {}
    if shown.photos is not None:
        combined = shown.maps.combined[0].float().cpu().numpy()  # (N, P)
        within = None if shown.maps.patches is None else shown.maps.patches[0].float().cpu().numpy()
        grids = patch_grids(combined, shown.num_prefix_tokens)
        pooled = None if within is None else patch_grids(within, shown.num_prefix_tokens)
        for index in shown.most_attended():
            maps = patch_maps(index, pooled, grids, num_patches=combined.shape[1])
            title = f"image {index + 1}: {shown.weights[index]:.0%} of the attention"
            pictures[f"image_{index + 1}.png"] = draw_patches(shown.photos[index], maps, title=title)
    if shown.tiles is not None:
        title = f"{shown.bag.id}: {len(shown.names)} tiles"
        pictures["heat_map.png"] = draw_heat_map(shown.tiles, shown.weights, title=title)
        if shown.tiles.slide is not None:
            pictures["top_tiles.png"] = draw_top_tiles(shown.tiles, shown.weights)
    pictures["heads.png"] = draw_heads(shown.heads.numpy())
    if shown.words is not None and shown.words.words:
        chosen = shown.most_attended()
        numbers = [index + 1 for index in chosen]
        pictures["words.png"] = draw_words(shown.words.words, shown.words.images[:, chosen].numpy(), numbers)
    return pictures


# ── The page ────────────────────────────────────────────────────────────────────────────────────────────────────────


def page(shown: ShownBag, pictures: dict[str, bytes], *, model: str) -> str:
    """One HTML page that needs nothing else: pictures and styles inside, no script, nothing from the network.

    Args:
        shown: A bag.
        pictures: Of `draw_pictures`.
        model: Its name.
    """
    environment = make_environment(is_html=True)
    environment.filters |= {"data_uri": data_uri, "percent": percent}
    return environment.get_template("attention.html.jinja").render(
        shown=shown,
        model=model,
        pictures=pictures,
        chosen=shown.most_attended(),
        columns=[{"number": index + 1, "thumbnail": _thumbnail(shown, index)} for index in shown.most_attended()],
        rows=_word_rows(shown),
        top=None if shown.tiles is None else top_tiles(shown.weights),
        changes=None if shown.removal is None else changes(shown.removal),
        verdict=None if shown.removal is None else verdict(shown.removal),
    )


def _thumbnail(shown: ShownBag, index: int) -> bytes | None:
    """A small JPEG of an image, where there is one to see."""
    if shown.photos is not None:
        photo = shown.photos[index].copy()
    elif shown.tiles is not None and shown.tiles.slide is not None:
        photo = open_tile(shown.tiles, index)
    else:
        return None
    photo.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return as_jpeg(photo)


def _word_rows(shown: ShownBag) -> list[dict[str, Any]]:
    """A row a word, with a cell for each image that is shown: its share, the colour for it and that of the letters."""
    if shown.words is None or not shown.words.words:
        return []
    images = shown.words.images[:, shown.most_attended()].numpy()
    colors = matplotlib.colormaps[EVEN_COLORS](images / images.max())
    rows = []
    for word, shares, row in zip(shown.words.words, images, colors, strict=True):
        cells = [
            {"share": float(share), "color": to_hex(color), "ink": "#000" if share > 0.6 * images.max() else "#fff"}
            for share, color in zip(shares, row, strict=True)
        ]
        rows.append({"word": word, "cells": cells})
    return rows


def changes(removal: Removal) -> dict[str, float]:
    """What was taken out, in words, and how much the log-likelihood changed."""
    return {"the most attended": removal.most, "random ones": removal.random, "the least attended": removal.least}


def verdict(removal: Removal) -> str:
    """Whether the weights of this bag mean something, whichever way it came out."""
    if removal.most < min(removal.least, removal.random, 0):
        return "The caption rests on the images that were looked at most: without them it loses most."
    return "The caption does not rest on the images that were looked at most: without others it loses as much or more."


def summary(shown: ShownBag) -> str:
    """The caption and what removing images does, for the terminal."""
    if shown.removal is None:
        return shown.caption
    removal = shown.removal
    words = ", ".join(f"{change:+.2f} without {what}" for what, change in changes(removal).items())
    return (
        f"{shown.caption}\n"
        f"log-likelihood of the caption {removal.log_likelihood:.2f}; {removal.num_removed} of {removal.num_images} "
        f"images removed: {words}.\n{verdict(removal)}"
    )
