"""A page to try a model in: photos in, a caption out, and what it was read from. `mivpg app` serves it.

    opened, refused = open_files(model, processor, [Path("front.jpg"), Path("side.jpg")], max_files=32)
    result = caption_opened(model, processor, opened, prompt="a photo of", num_beams=5)
    comparison = leave_out(model, processor, result, [1])

The functions above `build_page` need no Gradio. What comes from files and from the model, names and captions, is text
on the page and never markup.
"""

# N images of a bag, P patch tokens an image, D vision width

import importlib.util
import json
import math
import os
import random
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup
from PIL import Image

from mivpg.bags import Bag, BagCollator
from mivpg.captioning import in_eval_mode
from mivpg.errors import BagError, MivpgError
from mivpg.images import open_image
from mivpg.likelihood import caption_log_likelihoods, embed_images, without
from mivpg.miniature.catalogue import photograph_product
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.report import as_jpeg, data_uri
from mivpg.slides import Tile, TileOptions, find_tiles
from mivpg.visualization import as_seen, attention_maps, draw_attention

if TYPE_CHECKING:
    import gradio

MAX_TILES = 64
"""Of a slide with more tiles so many are read, evenly spaced along its rows: a page is to answer within a minute."""

SLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".bif")
"""Names of files that are read as slides. OpenSlide reads TIFF files, too, but most of those are pictures."""

SLIDE_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""What TIFF and BigTIFF files begin with, in which all these slides are kept. OpenSlide goes by content: a text with a
slide's name could have it open other files of the machine."""

MAX_PROMPT = 1000
"""Longest prompt, in characters."""

MAX_NEW_TOKENS = 64
"""Longest caption, in tokens."""

NUM_PRODUCTS = 6
"""Generated products that the page has to show."""

THUMBNAIL_SIDE = 240
"""Longest side of a photo on the page, in pixels."""

LOOPBACK = ("127.0.0.1", "localhost")

Progress = Callable[[float, str], None]
"""Told how far a job is, 0 to 1, and what is done now."""


@dataclass(frozen=True, kw_only=True)
class OpenedBag:
    """Photos that were read once: what the model needs of them, and what the page shows."""

    bag: Bag
    """With `image_embeds` (N, P, D), so that a photo less costs no second look by the vision model."""
    names: tuple[str, ...]
    seen: tuple[Image.Image, ...]
    """As the vision model gets them."""
    thumbnails: tuple[Image.Image, ...]

    def without(self, indices: Sequence[int]) -> "OpenedBag":
        """The same bag less some of its photos."""
        kept = [index for index in range(len(self.names)) if index not in set(indices)]
        return OpenedBag(
            bag=without(self.bag, indices),
            names=tuple(self.names[index] for index in kept),
            seen=tuple(self.seen[index] for index in kept),
            thumbnails=tuple(self.thumbnails[index] for index in kept),
        )


@dataclass(frozen=True, kw_only=True)
class Beam:
    """One of the captions that beam search ends with."""

    caption: str
    score: float
    """What beam search ranks by: the log-likelihood over the number of tokens."""
    log_likelihood: float
    """Of the whole caption and of its end, in nats."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a model says of a bag."""

    opened: OpenedBag
    beams: tuple[Beam, ...]
    """The best first; it is the caption."""
    weights: tuple[float, ...] | None
    """Of each photo, which sum to one; None where the model's aggregator has none."""
    attention: bytes | None
    """A PNG of what the visual prompts looked at."""
    note: str
    """Why there are no weights, or no picture of them."""

    @property
    def caption(self) -> str:
        return self.beams[0].caption


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What changes when photos are left out."""

    left_out: tuple[int, ...]
    whole: Result
    rest: Result
    log_likelihoods: tuple[tuple[float, float], tuple[float, float]]
    """A row for the caption of all photos and for that of the others, a column for all photos and for the others."""


# ── Opening ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def quietly(share: float, what: str) -> None:
    """A `Progress` that tells nobody."""


def open_files(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    paths: Sequence[Path],
    *,
    max_files: int,
    progress: Progress = quietly,
) -> tuple[OpenedBag | None, list[str]]:
    """Reads photos, or one slide, one after the other: only one of them is in memory as large as it is.

    Args:
        model: Whose vision model looks at them.
        processor: The model's.
        paths: Pictures, or one file with a name of `SLIDE_SUFFIXES`.
        max_files: More are refused.
        progress: Is told which file is read.

    Returns:
        The bag, None if there is none, and a sentence for each file that was refused; the others are in the bag.
    """
    if len(paths) > max_files:
        return None, [f"These are {len(paths)} files, and at most {max_files} are read at once; take some away."]
    slides = [path for path in paths if path.suffix.lower() in SLIDE_SUFFIXES]
    if slides and len(paths) > 1:
        return None, [f"{slides[0].name} is a slide, which is read by itself; take the other files away."]
    refused: list[str] = []
    if slides:
        try:
            return open_slide_file(model, processor, slides[0], progress), refused
        except MivpgError as error:
            return None, [_sentence(error, slides[0])]

    def pictures() -> Iterable[tuple[str, Image.Image]]:
        for number, path in enumerate(paths):
            progress(number / len(paths), f"reading {path.name}")
            try:
                yield path.name, open_image(path)
            except BagError as error:
                refused.append(_sentence(error, path))

    return open_pictures(model, processor, pictures()), refused


def _sentence(error: MivpgError, path: Path) -> str:
    """What is wrong with a file, by the name that its owner knows: where the server keeps it is nobody's business."""
    return str(error).replace(str(path), path.name)


def open_slide_file(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, path: Path, progress: Progress = quietly
) -> OpenedBag:
    """A slide's tiles as a bag, with the places where they lie; of many tiles `MAX_TILES`.

    Raises:
        MivpgError: OpenSlide is not installed, the file cannot be read, or shows no tissue.
    """
    with path.open("rb") as file:
        if not file.read(4).startswith(SLIDE_STARTS):
            raise MivpgError(f"{path} is no slide: it is no TIFF file, as those of {', '.join(SLIDE_SUFFIXES)} are.")
    progress(0, f"looking for tissue in {path.name}")
    tiles = find_tiles(path, TileOptions())
    if len(tiles) > MAX_TILES:
        tiles = [tiles[number * len(tiles) // MAX_TILES] for number in range(MAX_TILES)]

    def pictures() -> Iterable[tuple[str, Image.Image]]:
        for number, tile in enumerate(tiles):
            progress(number / len(tiles), f"reading tile {number + 1} of {len(tiles)}")
            yield f"tile at {tile.x}, {tile.y}", tile.open()

    opened = open_pictures(model, processor, pictures())
    assert opened is not None  # find_tiles raises where there is no tile
    return replace(opened, bag=replace(opened.bag, image_coords=_coords(tiles)))


def _coords(tiles: Sequence[Tile]) -> torch.Tensor:
    return torch.tensor([(tile.x, tile.y) for tile in tiles], dtype=torch.float32)  # (N, 2)


def open_pictures(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, pictures: Iterable[tuple[str, Image.Image]]
) -> OpenedBag | None:
    """Names and pictures as a bag; None if there is none."""
    names, seen, thumbnails, image_embeds = [], [], [], []
    for name, picture in pictures:
        bag = Bag(id=name, images=[picture], image_embeds=None, image_coords=None, prompt="", caption=None)
        image_embeds.append(embed_images(model, processor, bag).image_embeds)
        names.append(name)
        seen += as_seen(processor, [picture])
        thumbnail = picture.copy()
        thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        thumbnails.append(thumbnail)
    if not names:
        return None
    whole = Bag(
        id="page", images=None, image_embeds=torch.cat(image_embeds), image_coords=None, prompt="", caption=None
    )
    return OpenedBag(bag=whole, names=tuple(names), seen=tuple(seen), thumbnails=tuple(thumbnails))


def generated_products(number: int = NUM_PRODUCTS) -> dict[str, list[tuple[str, Image.Image]]]:
    """Products of the miniature catalogue, drawn now: what to call each, and its photos with their names."""
    products = {}
    for index in range(number):
        product, photos = photograph_product(random.Random(f"page {index}"))
        products[f"{index + 1}. {product.family}, {len(photos)} photos"] = [
            (photo.view, photo.image) for photo in photos
        ]
    return products


# ── Captions, and what they were read from ──────────────────────────────────────────────────────────────────────────


def caption_opened(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    opened: OpenedBag,
    *,
    prompt: str,
    num_beams: int,
    progress: Progress = quietly,
) -> Result:
    """Writes a bag's caption and says what it was read from.

    Args:
        model: Captions in eval mode and is left in the mode it was found in.
        processor: The model's.
        opened: What `open_files` read.
        prompt: Text that the model reads before it writes.
        num_beams: At least 2; all are returned.
        progress: Is told what is done.

    Raises:
        MivpgError: A prompt that is too long, or that the processor refuses.
    """
    if len(prompt) > MAX_PROMPT:
        raise MivpgError(f"The prompt has {len(prompt):,} characters, and at most {MAX_PROMPT:,} are read; shorten it.")
    opened = replace(opened, bag=replace(opened.bag, prompt=prompt))
    progress(0.1, "writing the caption")
    beams = write_beams(model, processor, opened.bag, num_beams=num_beams)
    progress(0.6, "drawing what was looked at")
    weights, attention, note = None, None, ""
    try:
        maps = attention_maps(model, BagCollator(processor, training=False)([opened.bag]))
        weights = tuple(maps.combined[0].sum(dim=1).tolist())
        attention = draw_attention(
            maps,
            opened.seen,
            num_prefix_tokens=model.config.num_prefix_tokens,
            title=f"{len(opened.names)} photos",
            caption=beams[0].caption,
        )
    except MivpgError as error:  # another aggregator, or patches in no square
        note = str(error)
    return Result(opened=opened, beams=beams, weights=weights, attention=attention, note=note)


def write_beams(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, bag: Bag, *, num_beams: int
) -> tuple[Beam, ...]:
    """All captions that beam search ends with, the best first."""
    inputs = BagCollator(processor, training=False)([bag])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    with in_eval_mode(model):
        outputs = model.generate(
            **inputs,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=MAX_NEW_TOKENS,
            return_dict_in_generate=True,
            output_scores=True,
        )
    captions = processor.decode_captions(outputs.sequences, inputs["input_ids"])
    log_likelihoods = caption_log_likelihoods(model, processor, [bag] * num_beams, captions)
    found = zip(captions, outputs.sequences_scores.tolist(), log_likelihoods.tolist(), strict=True)
    return tuple(Beam(caption=text, score=score, log_likelihood=likely) for text, score, likely in found)


def leave_out(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    result: Result,
    indices: Sequence[int],
    *,
    progress: Progress = quietly,
) -> Comparison:
    """Captions a bag again without some of its photos, and asks both bags for both captions.

    Args:
        model: As in `caption_opened`.
        processor: The model's.
        result: What it said of the whole bag.
        indices: Of the photos to leave out, from 0.
        progress: Is told what is done.

    Raises:
        MivpgError: No photo is left out, or all are.
    """
    number = len(result.opened.names)
    if not 0 < len(set(indices)) < number:
        raise MivpgError(f"{len(set(indices))} of {number} photos are left out, expected at least one, and not all.")
    bag = result.opened.bag
    rest = caption_opened(
        model,
        processor,
        result.opened.without(indices),
        prompt=bag.prompt,
        num_beams=len(result.beams),
        progress=progress,
    )
    captions = [result.caption, rest.caption]
    columns = [caption_log_likelihoods(model, processor, [each] * 2, captions) for each in (bag, rest.opened.bag)]
    (all_of_all, all_of_rest), (rest_of_all, rest_of_rest) = torch.stack(columns, dim=1).tolist()
    return Comparison(
        left_out=tuple(sorted(set(indices))),
        whole=result,
        rest=rest,
        log_likelihoods=((all_of_all, all_of_rest), (rest_of_all, rest_of_rest)),
    )


def as_json(result: Result, comparison: Comparison | None = None, *, model: str) -> str:
    """What the page shows, for machines."""
    values: dict[str, Any] = {"model": model, "prompt": result.opened.bag.prompt, **_values(result)}
    if comparison is not None:
        (all_of_all, all_of_rest), (rest_of_all, rest_of_rest) = comparison.log_likelihoods
        values["left_out"] = {
            "photos": [result.opened.names[index] for index in comparison.left_out],
            "log_likelihood_of_the_caption": {"all_photos": all_of_all, "the_others": all_of_rest},
            "log_likelihood_of_the_others_caption": {"all_photos": rest_of_all, "the_others": rest_of_rest},
            "the_others": _values(comparison.rest),
        }
    return json.dumps(values, indent=2, ensure_ascii=False)


def _values(result: Result) -> dict[str, Any]:
    weights = result.weights or [None] * len(result.opened.names)
    photos = [{"name": name, "weight": weight} for name, weight in zip(result.opened.names, weights, strict=True)]
    return {"caption": result.caption, "beams": [vars(beam) for beam in result.beams], "photos": photos}


# ── The page in pieces ──────────────────────────────────────────────────────────────────────────────────────────────

CSS = """
.gradio-container { max-width: 1240px !important; }
.alert { border-left: 4px solid #b3261e; padding: .4rem .8rem; margin: 0; }
.caption { font-size: 1.35rem; line-height: 1.4; }
.photos { list-style: none; margin: 0; padding: 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.photos li { margin: 0; min-width: 0; }
.photos img { width: 100%; height: 7.5rem; object-fit: contain; background: #fff; border-radius: 4px; }
.photos .name { display: block; overflow-wrap: anywhere; font-size: .85rem; }
.photos .bar { display: block; height: .5rem; background: var(--border-color-primary); }
.photos .bar span { display: block; height: 100%; background: #2f6690; }
.results table { width: 100%; border-collapse: collapse; }
.results table, .results tr { border: 0 !important; }
.results th, .results td { text-align: left; padding: .3rem .5rem .3rem 0; vertical-align: top; border: 0;
  border-bottom: 1px solid var(--border-color-primary); }
.results .number { text-align: right; font-variant-numeric: tabular-nums; }
.results td.number { white-space: nowrap; }
@media (max-width: 500px) { .results table { font-size: .85rem; } }
#json textarea { width: 100%; height: 16rem; padding: .5rem; font-family: var(--font-mono); font-size: .8rem;
  color: inherit; background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 3px solid #2f6690; }
.scroll img { min-width: 900px; max-width: none; width: 100%; }
"""

COPY_JSON = """() => {
  document.querySelector('#json textarea').select();
  document.execCommand('copy');  // the newer interface is missing where the address is neither loopback nor https
}"""


def show_refused(sentences: Sequence[str]) -> str:
    """Sentences that a screen reader says at once."""
    return Markup("").join(Markup('<p class="alert" role="alert">{}</p>').format(text) for text in sentences)


def show_photos(opened: OpenedBag, weights: Sequence[float] | None = None, numbers: Sequence[int] | None = None) -> str:
    """Photos by number, by default from 1, and name, with the share that each has of the attention."""
    items = []
    numbers = range(1, len(opened.names) + 1) if numbers is None else numbers
    for index, (number, name, thumbnail) in enumerate(zip(numbers, opened.names, opened.thumbnails, strict=True)):
        share = Markup("")
        if weights is not None:
            largest = weights[index] / max(weights)
            share = Markup(
                '<span class="bar" aria-hidden="true"><span style="width: {:.1%}"></span></span>weight {:.1%}'
            ).format(largest, weights[index])
        items.append(
            Markup('<li><img src="{}" alt="photo {}, {}"><span class="name">{}. {}</span>{}</li>').format(
                data_uri(as_jpeg(thumbnail), "image/jpeg"), number, name, number, name, share
            )
        )
    return Markup('<ol class="photos">{}</ol>').format(Markup("").join(items))


def show_caption(result: Result) -> str:
    """The caption, large."""
    return Markup('<p class="caption" role="status">{}</p>').format(result.caption or "(the model wrote nothing)")


def show_beams(result: Result) -> str:
    """All beams with their scores."""
    rows = Markup("").join(
        Markup(
            '<tr><td class="number">{}</td><td>{}</td><td class="number">{}</td><td class="number">{}</td></tr>'
        ).format(number, beam.caption, _number(beam.score), _number(beam.log_likelihood))
        for number, beam in enumerate(result.beams, start=1)
    )
    return Markup(
        "<p>Nearer to zero is likelier. The score, by which beams are ranked, is a mean over tokens.</p>"
        '<table><thead><tr><th class="number">Beam</th><th>Caption</th><th class="number">Score</th>'
        '<th class="number">Log-likelihood</th></tr></thead><tbody>{}</tbody></table>'
    ).format(rows)


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def show_attention(result: Result) -> str:
    """The picture of what was looked at, which a narrow screen scrolls."""
    if result.attention is None:
        return Markup("<p>{}</p>").format(result.note)
    picture = data_uri(result.attention, "image/png")
    alt = (
        "The photos with their shares of the attention, the weights of their patches over them in colours from blue to "
        "red, and what each query reads of each photo, head by head"
    )
    return Markup(
        "<p>Weights and heat maps say how much of the visual prompts' attention a photo or a patch has: what was read, "
        "not what a word came from.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Heat maps, which scroll sideways">'
        '<img src="{}" alt="{}"></div><p><a download="attention.png" href="{}">Save this picture</a></p>'
    ).format(picture, alt, picture)


def show_comparison(comparison: Comparison) -> str:
    """Captions and their likelihoods side by side."""
    numbers = _numbers_of(comparison.left_out)
    (all_of_all, all_of_rest), (rest_of_all, rest_of_rest) = comparison.log_likelihoods
    number = len(comparison.whole.opened.names)
    kept = [index + 1 for index in range(number) if index not in comparison.left_out]
    photos = show_photos(comparison.rest.opened, comparison.rest.weights, kept)
    cells = [
        (f"all {number} photos", comparison.whole.caption, all_of_all, all_of_rest),
        (f"without {numbers}", comparison.rest.caption, rest_of_all, rest_of_rest),
    ]
    rows = Markup("").join(
        Markup(
            '<tr><th scope="row">{}</th><td>{}</td><td class="number">{}</td><td class="number">{}</td></tr>'
        ).format(who, caption, _number(of_all), _number(of_rest))
        for who, caption, of_all, of_rest in cells
    )
    return Markup(
        "<p>{} Numbers are log-likelihoods of both captions.</p><table><thead><tr><th>Read from</th><th>Caption</th>"
        '<th class="number">with all</th><th class="number">without</th></tr></thead>'
        "<tbody>{}</tbody></table><h3>Weights without {}</h3>{}"
    ).format(_verdict(comparison, numbers), rows, numbers, photos)


def show_json(content: str) -> str:
    """JSON in a field that can be scrolled and copied from, not changed."""
    return Markup('<textarea readonly aria-label="JSON" spellcheck="false">{}</textarea>').format(content)


def _numbers_of(indices: Sequence[int]) -> str:
    """Photos by number, such as "photo 2" and "photos 2, 3"."""
    return f"photo{'s' if len(indices) > 1 else ''} {', '.join(str(index + 1) for index in indices)}"


def _verdict(comparison: Comparison, numbers: str) -> str:
    """One sentence on what the photos meant for the caption of all of them."""
    (with_all, with_rest), _ = comparison.log_likelihoods
    same = comparison.whole.caption == comparison.rest.caption
    ratio = math.exp(min(abs(with_all - with_rest), 700))  # beyond it a float has no end
    times = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"
    change = "less" if with_all > with_rest else "more"
    return (
        f"Without {numbers} the model writes {'the same' if same else 'another'} caption, and finds that of all photos "
        f"{times} times {change} likely."
    )


# ── The page ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_installed() -> None:
    """Raises a `MivpgError` where Gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise MivpgError("The page takes Gradio: pip install 'mivpg[app]'.")


def build_page(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, *, name: str, max_files: int, max_file_mb: int
) -> "gradio.Blocks":
    """The page; its two limits stand on it.

    Raises:
        MivpgError: The model has no vision model.
    """
    import gradio as gr

    if processor.image_processor is None:
        raise MivpgError(f"{name} has no vision model: it takes stored features, and the page takes photos.")
    products = generated_products()
    first = next(iter(products))

    def tell(progress: gr.Progress) -> Progress:
        return lambda share, what: progress(share, desc=what)

    def forget() -> dict[Any, Any]:
        """What was said of other photos must not stand beside these."""
        return {
            result: None,
            results: gr.Column(visible=False),
            comparison: "",
            chosen: gr.CheckboxGroup(choices=[], value=[]),
        }

    def open_dropped(paths: list[str] | None, progress: gr.Progress = gr.Progress()) -> dict[Any, Any]:  # noqa: B008
        found, refused = open_files(
            model, processor, [Path(path) for path in paths or []], max_files=max_files, progress=tell(progress)
        )
        photos_shown = "" if found is None else show_photos(found)
        return {opened: found, refusal: show_refused(refused), photos: photos_shown, product: None, **forget()}

    def open_product(label: str | None) -> dict[Any, Any]:
        found = open_pictures(model, processor, products[label]) if label else None
        shown = "" if found is None else show_photos(found)
        return {opened: found, refusal: "", photos: shown, **forget()}

    def choose_product(label: str | None) -> dict[Any, Any]:
        return {files: None, **open_product(label)}

    def write(
        found: OpenedBag | None,
        text: str,
        number: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:
        if found is None:
            return {refusal: show_refused(["There is no photo yet; drop some, or pick a generated product."])}
        try:
            said = caption_opened(model, processor, found, prompt=text, num_beams=int(number), progress=tell(progress))
        except MivpgError as error:
            return {refusal: show_refused([str(error)])}
        choices = [(f"{index + 1}. {photo}", index) for index, photo in enumerate(found.names)]
        return {
            result: said,
            refusal: "",
            photos: show_photos(found, said.weights),
            results: gr.Column(visible=True),
            caption: show_caption(said),
            beams: show_beams(said),
            attention: show_attention(said),
            chosen: gr.CheckboxGroup(choices=choices, value=[]),
            comparison: "",
            code: show_json(as_json(said, model=name)),
        }

    def compare(
        said: Result | None,
        indices: list[int],
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:
        if said is None:
            return {refusal: show_refused(["There is no caption yet."])}
        try:
            found = leave_out(model, processor, said, indices, progress=tell(progress))
        except MivpgError as error:
            return {comparison: show_refused([str(error)])}
        return {comparison: show_comparison(found), code: show_json(as_json(said, found, model=name))}

    with gr.Blocks(title="mivpg", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        opened, result = gr.State(time_to_live=3600), gr.State(time_to_live=3600)
        gr.Markdown(f"# Several photos, one caption\n\nThe model is {name}.")
        with gr.Row():
            with gr.Column(min_width=300):
                files = gr.File(
                    label=f"Photos of one thing, or one slide (at most {max_files} files of {max_file_mb} MB)",
                    file_count="multiple",
                    height=180,
                )
                product = gr.Radio(label="Or a generated product", choices=list(products), value=first)
                refusal = gr.HTML(elem_id="refusal")
            with gr.Column(min_width=300):
                prompt = gr.Textbox(
                    label="Prompt",
                    info="What the model reads before it writes.",
                    value=processor.prompt,
                    max_length=MAX_PROMPT,
                )
                num_beams = gr.Slider(
                    2, 10, value=5, step=1, label="Beams", info="Captions that are kept at each token."
                )
                button = gr.Button("Write the caption", variant="primary")
        photos = gr.HTML(elem_id="photos")
        with gr.Column(visible=False, elem_classes="results") as results:
            gr.Markdown("## Caption")
            caption = gr.HTML(elem_id="caption")
            gr.Markdown("## Beams")
            beams = gr.HTML(elem_id="beams")
            gr.Markdown("## Heat maps")
            attention = gr.HTML(elem_id="attention")
            gr.Markdown("## Leave photos out")
            chosen = gr.CheckboxGroup(label="Photos to leave out", choices=[])
            compare_button = gr.Button("Compare without them")
            comparison = gr.HTML(elem_id="comparison")
            gr.Markdown("## JSON")
            code = gr.HTML(elem_id="json")
            copy_button = gr.Button("Copy the JSON")

        forgotten = [result, results, comparison, chosen]
        shown = [opened, refusal, photos, *forgotten]
        answers = [result, refusal, photos, results, caption, beams, attention, chosen, comparison, code]
        # One job at a time: who asks for a caption while photos are read gets that of these photos.
        private: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "model"}
        for event in (files.upload, files.delete, files.clear):
            event(open_dropped, files, [*shown, product], show_progress_on=photos, **private)
        product.input(choose_product, product, [*shown, files], show_progress_on=photos, **private)
        button.click(write, [opened, prompt, num_beams], answers, show_progress_on=photos, **private)
        prompt.submit(write, [opened, prompt, num_beams], answers, show_progress_on=photos, **private)
        compare_button.click(
            compare, [result, chosen], [comparison, refusal, code], show_progress_on=comparison, **private
        )
        copy_button.click(None, js=COPY_JSON, **private)
        page.load(open_product, product, shown, show_progress="hidden", **private)
    return page.queue(default_concurrency_limit=1, max_size=16, api_open=False)


def launch(page: "gradio.Blocks", *, host: str, port: int | None, max_file_mb: int) -> str:
    """Starts to serve a page, without waiting.

    Args:
        page: What `build_page` made.
        host: The address to listen on.
        port: By default the first free one from 7860.
        max_file_mb: Larger files are cut off while they arrive.

    Raises:
        MivpgError: There is no such address here, or no such port is free.

    Returns:
        The page's address.
    """
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # Another site's page could name this machine as itself and read what is here; such requests have its name.
    hosts = LOOPBACK if host in LOOPBACK else ("*",)
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(  # Gradio's own white on orange, and its pale grey, are hard to read
        button_primary_background_fill="#2f6690",
        button_primary_background_fill_hover="#244f70",
        block_info_text_color="*neutral_600",
    )
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inline=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=max_file_mb * 2**20,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]},
            theme=theme,
            css=CSS,
        )
    except OSError:
        asked = "no port from 7860 on" if port is None else f"port {port} is not"
        raise MivpgError(f"{host}: {asked} free there; choose another --port, or another --host.") from None
    return address


def serve(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_files: int = 32,
    max_file_mb: int = 50,
) -> None:
    """Serves the page until it is interrupted or told to end; what was uploaded is deleted then.

    Args:
        model: What captions.
        processor: The model's.
        name: What the page calls it.
        host: The address to listen on; the default is seen from this machine alone.
        port: By default the first free one from 7860.
        max_files: Read at once.
        max_file_mb: Largest file, in megabytes.

    Raises:
        MivpgError: A limit below one, a model without a vision model, or no free port.
    """
    if min(max_files, max_file_mb) < 1:
        raise MivpgError(f"--max-files is {max_files} and --max-file-mb {max_file_mb}, expected at least 1 of each.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are deleted then, too
    with tempfile.TemporaryDirectory(prefix="mivpg-") as folder:
        # Gradio serves whatever lies in these two, which by default all its pages on a machine share.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_EXAMPLES_CACHE": folder}
        page = build_page(model, processor, name=name, max_files=max_files, max_file_mb=max_file_mb)
        try:
            print(launch(page, host=host, port=port, max_file_mb=max_file_mb), flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)
