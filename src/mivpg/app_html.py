"""The page's pieces. What goes in comes from files and from the model, names and captions: text, and never markup."""

import math
from collections.abc import Sequence
from dataclasses import replace

from markupsafe import Markup

from mivpg.app_answers import Comparison, Result
from mivpg.app_bags import OpenedBag
from mivpg.report import as_jpeg, data_uri

CSS = """
.gradio-container { max-width: 1240px !important; }
.alert { border-left: 4px solid #b3261e; padding: .4rem .8rem; margin: 0; }
#heading .html-container { padding: 0; }
.taken { margin: 0 0 .75rem; }
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


def show_heading(model: str, *, max_files: int, max_file_mb: int) -> str:
    """What the page is, what it takes, and the model's name."""
    return Markup(
        "<h1>Several photos, one caption</h1><p>Drop photos of one thing, or one slide: at most {} files of {} MB. "
        "The model is {}.</p>"
    ).format(max_files, max_file_mb, model)


def show_refused(sentences: Sequence[str]) -> str:
    """Sentences that a screen reader says at once."""
    return Markup("").join(Markup('<p class="alert" role="alert">{}</p>').format(text) for text in sentences)


def show_photos(opened: OpenedBag, weights: Sequence[float] | None = None, numbers: Sequence[int] | None = None) -> str:
    """Photos by number, by default from 1, and name, with the share that each has of the attention; of a slide first
    which of its tiles they are."""
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
            Markup('<li><img src="{}" alt="{} {}, {}"><span class="name">{}. {}</span>{}</li>').format(
                data_uri(as_jpeg(thumbnail), "image/jpeg"), opened.noun, number, name, number, name, share
            )
        )
    taken = Markup('<p class="taken">{}</p>').format(opened.taken) if opened.taken else Markup("")
    return taken + Markup('<ol class="photos">{}</ol>').format(Markup("").join(items))


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
    """The pictures of what was looked at, which a narrow screen scrolls."""
    noun = result.opened.noun
    pictures = Markup("")
    if result.heat_map is not None:
        alt = (
            "The slide twice: with the tiles looked at most outlined and numbered, and with every tile that was read, "
            "where it lies, in colours from blue to yellow"
        )
        pictures += _picture(result.heat_map, "slide.png", "The slide, which scrolls sideways", alt)
    if result.attention is not None:
        alt = (
            f"The {noun}s with their shares of the attention, the weights of their patches over them in colours from "
            f"blue to red, and what each query reads of each {noun}, head by head"
        )
        pictures += _picture(result.attention, "attention.png", "Heat maps, which scroll sideways", alt)
    if result.note:
        pictures += Markup("<p>{}</p>").format(result.note)
    if result.weights is None:
        return pictures
    return (
        Markup(
            "<p>Weights and heat maps say how much of the visual prompts' attention a {} or a patch has: what was "
            "read, not what a word came from.</p>"
        ).format(noun)
        + pictures
    )


def _picture(png: bytes, file: str, label: str, alt: str) -> Markup:
    """A picture that can be scrolled by keyboard, too, and saved under a name."""
    uri = data_uri(png, "image/png")
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><img src="{}" alt="{}"></div>'
        '<p><a download="{}" href="{}">Save this picture</a></p>'
    ).format(label, uri, alt, file, uri)


def show_comparison(comparison: Comparison) -> str:
    """Captions and their likelihoods side by side."""
    noun = comparison.whole.opened.noun
    numbers = _numbers_of(comparison.left_out, noun)
    (all_of_all, all_of_rest), (rest_of_all, rest_of_rest) = comparison.log_likelihoods
    number = len(comparison.whole.opened.names)
    kept = [index + 1 for index in range(number) if index not in comparison.left_out]
    photos = show_photos(replace(comparison.rest.opened, taken=""), comparison.rest.weights, kept)
    cells = [
        (f"all {number} {noun}s", comparison.whole.caption, all_of_all, all_of_rest),
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
    ).format(_verdict(comparison, numbers, noun), rows, numbers, photos)


def show_json(content: str) -> str:
    """JSON in a field that can be scrolled and copied from, not changed."""
    return Markup('<textarea readonly aria-label="JSON" spellcheck="false">{}</textarea>').format(content)


def _numbers_of(indices: Sequence[int], noun: str) -> str:
    """Photos by number, such as "photo 2" and "photos 2, 3"."""
    return f"{noun}{'s' if len(indices) > 1 else ''} {', '.join(str(index + 1) for index in indices)}"


def _verdict(comparison: Comparison, numbers: str, noun: str) -> str:
    """One sentence on what the photos meant for the caption of all of them."""
    (with_all, with_rest), _ = comparison.log_likelihoods
    same = comparison.whole.caption == comparison.rest.caption
    ratio = math.exp(min(abs(with_all - with_rest), 700))  # beyond it a float has no end
    times = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"
    change = f"{times} times {'less' if with_all > with_rest else 'more'} likely" if ratio >= 1.05 else "as likely"
    return (
        f"Without {numbers} the model writes {'the same' if same else 'another'} caption, and finds that of all "
        f"{noun}s {change}."
    )
