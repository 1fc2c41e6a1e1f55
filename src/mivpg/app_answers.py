"""What a model says of an opened bag: its caption, what that was read from, and what changes without some photos.

    result = caption_opened(model, processor, opened, prompt="a photo of", num_beams=5)
    comparison = leave_out(model, processor, result, [1])
    print(as_json(result, comparison, model="my model"))

`opened` is what `mivpg.app_bags` reads. Nothing here needs Gradio.
"""

# T tokens, V vocabulary

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mivpg.app_bags import OpenedBag, Progress, quietly, sentence
from mivpg.bags import Bag, BagCollator
from mivpg.captioning import in_eval_mode
from mivpg.errors import MivpgError
from mivpg.likelihood import caption_log_likelihoods
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor
from mivpg.slide_maps import draw_heat_map
from mivpg.visualization import attention_maps, draw_attention

MAX_PROMPT = 1000
"""Longest prompt, in characters."""

MAX_NEW_TOKENS = 64
"""Longest caption, in tokens."""


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
    heat_map: bytes | None
    """A PNG of a slide with the weights of its tiles where they lie."""
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
        num_beams: At least 1; all are returned.
        progress: Is told what is done.

    Raises:
        MivpgError: A prompt that is too long, or that the processor refuses, or no beam.
    """
    if num_beams < 1:
        raise MivpgError(f"num_beams is {num_beams}, expected at least 1.")
    if len(prompt) > MAX_PROMPT:
        raise MivpgError(f"The prompt has {len(prompt):,} characters, and at most {MAX_PROMPT:,} are read; shorten it.")
    opened = replace(opened, bag=replace(opened.bag, prompt=prompt))
    progress(0.1, "writing the caption")
    beams = write_beams(model, processor, opened.bag, num_beams=num_beams)
    progress(0.6, "drawing what was looked at")
    weights, attention, heat_map, note = None, None, None, ""
    about = f"{len(opened.names)} {opened.noun}s"
    try:
        maps = attention_maps(model, BagCollator(processor, training=False)([opened.bag]))
        weights = tuple(maps.combined[0].sum(dim=1).tolist())
        if opened.tiles is not None:
            heat_map = draw_heat_map(opened.tiles, weights, title=about)
        attention = draw_attention(
            maps,
            opened.seen,
            num_prefix_tokens=model.config.num_prefix_tokens,
            title=about,
            caption=beams[0].caption,
        )
    except MivpgError as error:  # another aggregator, patches in no square, or a slide that was deleted meanwhile
        slide = None if opened.tiles is None else opened.tiles.slide
        note = str(error) if slide is None else sentence(error, slide)
    return Result(opened=opened, beams=beams, weights=weights, attention=attention, heat_map=heat_map, note=note)


def write_beams(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, bag: Bag, *, num_beams: int
) -> tuple[Beam, ...]:
    """All captions that beam search ends with, the best first; greedy search with one beam."""
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
    if num_beams > 1:
        scores = outputs.sequences_scores
    else:  # greedy search ranks nothing and returns no score: the mean over tokens, as beam search has it
        steps = torch.stack(outputs.scores, dim=1).log_softmax(dim=2)  # (1, T, V)
        written = outputs.sequences[:, -steps.shape[1] :, None]  # (1, T, 1)
        scores = steps.gather(2, written).mean(dim=(1, 2))
    found = zip(captions, scores.tolist(), log_likelihoods.tolist(), strict=True)
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
        MivpgError: There is no such photo, none is left out, or all are.
    """
    bag, others = result.opened.bag, result.opened.without(indices)
    rest = caption_opened(
        model,
        processor,
        others,
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
    if result.opened.tiles is not None:
        values["tiles"] = {"taken": result.opened.taken, "span": result.opened.tiles.span}
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
