"""One bag, its caption, and what was looked at when it was written: pictures, arrays and a page of its own.

shown = look_at_bag(model, processor, bag, generation=GenerationOptions())
write_shown(shown, Path("out"), model="runs/products/best")

out/attention.html           everything on one page, without anything from the network
out/attention.json           the caption, the weight of each image and of each word, and what removing images does
out/attention.safetensors    all arrays
out/image_….png              the patches of each photo that is shown; heads.png: every head; words.png: every word
out/heat_map.png             of a slide; top_tiles.png: the tiles looked at most; tiles.geojson: for QuPath
out/heat_map_1.png           of the first of several slides of a case, and so on; likewise tiles_1.geojson
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
from mivpg.bags import Bag, BagCollator, Sample
from mivpg.captioning import GenerationOptions, caption_bags
from mivpg.errors import MivpgError
from mivpg.features import PlacedSlide, place_tiles, read_slides
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
    find_tile,
    tile_span,
    top_tiles,
)
from mivpg.slides import TileOptions, find_tiles
from mivpg.templating import make_environment
from mivpg.visualization import (
    MAX_PHOTOS,
    AttentionMaps,
    as_seen,
    attention_maps,
    check_has_weights,
    patch_grids,
)
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
    tiles: tuple[SlideTiles, ...]
    """Where the images lie on each slide that is drawn, or on a plain canvas; empty where that is not known."""
    caption: str
    maps: AttentionMaps
    words: WordWeights | None
    """None where the language model gives no attention."""
    removal: Removal | None
    """None of a bag of one image."""
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

    def patch_grids(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """AB-MIL's weights of the patches and the combined ones, (N, side, side), as far as they are told apart.

        Raises:
            MivpgError: The patches are no square grid.
        """
        combined = patch_grids(self.maps.combined[0].float().cpu().numpy(), self.num_prefix_tokens)
        if self.maps.patches is None:
            return None, combined
        return patch_grids(self.maps.patches[0].float().cpu().numpy(), self.num_prefix_tokens), combined

    @property
    def no_map(self) -> str:
        """Why nothing is drawn over the photos; empty where something is, and where patches are not told apart."""
        try:
            self.patch_grids()
        except MivpgError as error:
            return str(error)
        return ""

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
    tiles: Sequence[SlideTiles] | None = None,
) -> ShownBag:
    """Captions a bag, and asks what was looked at and whether it mattered.

    Args:
        model: As in `caption_bags`.
        processor: The model's.
        bag: Of images, or of features with or without coordinates.
        generation: How the caption is written.
        names: Of its images; by default their numbers, and where they lie.
        tiles: Where they lie on slides; by default its coordinates on a plain canvas.

    Raises:
        BagError: The features do not fit the model.
        MivpgError: Another aggregator stands in MIVPG's place.
    """
    check_has_weights(model)
    photos = None if bag.images is None else as_seen(processor, bag.images)
    bag = embed_images(model, processor, bag)
    assert bag.image_embeds is not None
    (caption,) = caption_bags(model, processor, [bag], **generation.as_kwargs())
    maps = attention_maps(model, BagCollator(processor, training=False)([bag]))
    weights = maps.combined[0].sum(dim=1).tolist()
    removal = remove_images(model, processor, bag, caption, weights) if len(weights) > 1 else None
    if tiles is None and bag.image_coords is not None and len(bag.image_coords.unique(dim=0)) > 1:
        corners = bag.image_coords.double().numpy()
        tiles = [SlideTiles(corners=corners, span=tile_span(corners), slide=None)]
    return ShownBag(
        bag=bag,
        names=tuple(names or _known_as(len(weights), tiles or ())),
        photos=photos,
        tiles=tuple(tiles or ()),
        caption=caption,
        maps=maps,
        words=word_weights(model, processor, bag, caption, maps.images[:, 0]),
        removal=removal,
        num_prefix_tokens=model.config.num_prefix_tokens,
    )


def _known_as(num_images: int, slides: Sequence[SlideTiles]) -> list[str]:
    """Each image by its number and, where that is drawn, by where it lies."""
    names = [f"image {number}" for number in range(1, num_images + 1)]
    for tiles in slides:
        of_slide = f" of {tiles.slide.name}" if tiles.slide is not None and tiles.indices is not None else ""
        for index, (x, y) in zip(tiles.of_bag(), tiles.corners, strict=True):
            names[index] = f"tile {index + 1}{of_slide} at {x:.0f}, {y:.0f}"
    return names


# ── Slides ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def cut_slides(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    paths: Sequence[Path],
    options: TileOptions,
    *,
    prompt: str,
) -> tuple[Bag, list[SlideTiles]]:
    """The tiles of a slide, or of all slides of a case, as a bag of features, and where they lie.

    Args:
        model: Whose vision model sees the tiles.
        processor: The model's.
        paths: The slide files.
        options: How they are cut.
        prompt: Precedes the caption.

    Raises:
        BagError: As in `find_tiles`.
        MivpgError: The model has no vision model, or another aggregator stands in MIVPG's place.
    """
    check_has_weights(model)
    tiles = [tile for path in paths for tile in find_tiles(path, options)]
    coords, placed = place_tiles(paths, tiles)
    name = ", ".join(path.name for path in paths)
    image_embeds: Tensor | None = None  # (N, P, D), filled as it is made: two of a large slide would not fit
    for start in tqdm(range(0, len(tiles), TILES_AT_ONCE), unit="batch", disable=None):
        pictures = [tile.open() for tile in tiles[start : start + TILES_AT_ONCE]]
        part = Bag(id=name, images=pictures, image_embeds=None, image_coords=None, prompt="", caption=None)
        embedded = embed_images(model, processor, part).image_embeds
        assert embedded is not None
        if image_embeds is None:
            image_embeds = embedded.new_empty(len(tiles), *embedded.shape[1:])
        image_embeds[start : start + len(embedded)] = embedded
    bag = Bag(id=name, images=None, image_embeds=image_embeds, image_coords=coords, prompt=prompt, caption=None)
    return bag, [_tiles_of(coords, placed, number, path) for number, path in enumerate(paths)]


def tiles_on_slides(sample: Sample, bag: Bag, slides: Sequence[Path]) -> list[SlideTiles]:
    """Where the images of a bag lie on the slides that they were cut from.

    Args:
        sample: Says where the bag's features are.
        bag: The same, opened.
        slides: The slide; or slides of a case, each known by its name among those that the features were made of.

    Raises:
        MivpgError: The bag does not say where its images lie, or on which of several slides; a slide is not of the
            case; two are the same one of it.
    """
    given = ", ".join(map(str, slides))
    where = f"bag {sample.id!r}" if sample.features is None else str(sample.features)
    if bag.image_coords is None:
        raise MivpgError(
            f"{where}: there are no coords, so it is not known where its images lie on {given}; add them, or leave "
            "--slide out."
        )
    made_of, placed = ([], None) if sample.features is None else read_slides(sample.features)
    if placed is None and max(len(made_of), len(slides)) > 1:
        raise MivpgError(
            f"{where}: coords do not say on which of several slides a tile lies; extract the features anew, or "
            f"{'give the one --slide' if len(made_of) < 2 else 'leave --slide out'}."
        )
    if placed is None:
        corners = bag.image_coords.double().numpy()
        return [SlideTiles(corners=corners, span=tile_span(corners), slide=slides[0])]
    found: dict[int, SlideTiles] = {}
    for slide in slides:
        numbers = [number for number, of_case in enumerate(placed) if of_case.slide.name == slide.name]
        if len(numbers) > 1:  # in different folders
            numbers = [number for number in numbers if placed[number].slide.resolve() == slide.resolve()]
        if len(placed) == len(slides) == 1:  # which may go by another name now
            numbers = [0]
        if len(numbers) != 1:
            names = ", ".join(str(path) for path in made_of)
            raise MivpgError(f"{where}: features were made of {names}, not of {slide}; give --slide one of these.")
        (number,) = numbers
        if number in found:
            raise MivpgError(
                f"{where}: {found[number].slide} and {slide} both go by the name of {made_of[number]}; give --slide "
                "one of them."
            )
        found[number] = _tiles_of(bag.image_coords, placed, number, slide)
    return [*found.values()]


def _tiles_of(coords: Tensor, placed: Sequence[PlacedSlide], number: int, slide: Path) -> SlideTiles:
    """Of one slide of a case, in its own pixels, from coordinates (N, 2) on the lattice of the case."""
    of_case = placed[number]
    first = sum(other.num_tiles for other in placed[:number])
    indices = range(first, first + of_case.num_tiles)
    cells = coords[first : indices.stop].double().numpy() / placed[0].span - [of_case.first_column, 0]
    return SlideTiles(
        corners=np.round(np.round(cells) * of_case.span),
        span=of_case.span,
        slide=slide,
        indices=tuple(indices) if len(placed) > 1 else None,
    )


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
    for tiles, number in zip(shown.tiles, _numbers_of_files(shown), strict=True):
        write_whole(out / f"tiles{number}.geojson", json.dumps(as_geojson(tiles, shown.weights)))
    numbers = {"model": model} | as_numbers(shown)
    write_whole(out / "attention.json", as_lines(numbers).encode(errors="replace"))
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


def as_lines(numbers: dict[str, Any]) -> str:
    """JSON of a line an entry and, of a list of records, a line a record: a row of numbers is one line."""
    lines = []
    for name, value in numbers.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            records = ",\n".join(f"    {json.dumps(record, ensure_ascii=False)}" for record in value)
            text = f"[\n{records}\n  ]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        lines.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _numbers_of_files(shown: ShownBag) -> list[str]:
    """What tells the files of several slides apart; of one, nothing."""
    return [""] if len(shown.tiles) == 1 else [f"_{number}" for number in range(1, len(shown.tiles) + 1)]


def draw_pictures(shown: ShownBag) -> dict[str, bytes]:
    """Every picture as a PNG, by its file's name."""
    pictures = {}
    if shown.photos is not None:
        pooled, grids = (None, None) if shown.no_map else shown.patch_grids()
        for index in shown.most_attended():
            maps = patch_maps(index, pooled, grids, num_patches=shown.maps.combined.shape[2])
            title = f"image {index + 1}: {shown.weights[index]:.0%} of the attention"
            pictures[f"image_{index + 1}.png"] = draw_patches(shown.photos[index], maps, title=title)
    for tiles, number in zip(shown.tiles, _numbers_of_files(shown), strict=True):
        pictures[f"heat_map{number}.png"] = draw_heat_map(tiles, shown.weights, title=_title(shown, tiles))
    if top := draw_top_tiles(shown.tiles, shown.weights):
        pictures["top_tiles.png"] = top
    pictures["heads.png"] = draw_heads(shown.heads.numpy())
    if shown.words is not None and shown.words.words:
        chosen = shown.most_attended()
        numbers = [index + 1 for index in chosen]
        pictures["words.png"] = draw_words(shown.words.words, shown.words.images[:, chosen].numpy(), numbers)
    return pictures


def _title(shown: ShownBag, tiles: SlideTiles) -> str:
    """Of a slide's heat map."""
    num_tiles = f"{len(tiles.corners)} tiles"
    if tiles.indices is None:
        return f"{shown.bag.id}: {num_tiles}"
    share = sum(shown.weights[index] for index in tiles.of_bag())
    name = shown.bag.id if tiles.slide is None else tiles.slide.name
    return f"{name}: {num_tiles} of {len(shown.names)}, {share:.0%} of the attention"


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
        heat_maps={
            f"heat_map{number}.png": _title(shown, tiles)
            for tiles, number in zip(shown.tiles, _numbers_of_files(shown), strict=True)
        },
        num_drawn=sum(len(tiles.corners) for tiles in shown.tiles),
        top=top_tiles(shown.weights),
        num_top_drawn=sum(find_tile(shown.tiles, index) is not None for index in top_tiles(shown.weights)),
        changes=None if shown.removal is None else changes(shown.removal),
        verdict=None if shown.removal is None else verdict(shown.removal),
    )


def _thumbnail(shown: ShownBag, index: int) -> bytes | None:
    """A small JPEG of an image, where there is one to see."""
    if shown.photos is not None:
        photo = shown.photos[index].copy()
    elif tile := find_tile(shown.tiles, index):
        photo = tile.open()
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
