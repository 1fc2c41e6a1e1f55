"""MIVPG and what a user would take instead, between one vision model and one language model: steps and captions.

MIVPG; BLIP-2's Q-Former on the concatenated patches of all images; and as LLaVA does, every image token projected into
the language model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Blip2Config, PreTrainedConfig

from aggregation import NUM_PROMPT_TOKENS
from gpu_measuring import Peaks, Sizes, gigabytes, num_bytes_of, side_by_side
from measuring import DEVICE
from mivpg import MivpgConfig, MivpgForConditionalGeneration
from mivpg.loading import language_model_class
from parameters import draw_zeros

RIVALS: dict[str, dict[str, Any]] = {
    "MIVPG": {"patch_pooling": "abmil", "instance_correlation": "csa"},
    "concatenation": {"patch_pooling": "none", "instance_correlation": "none"},
    "LLaVA-style": {"patch_pooling": "none", "aggregator": "linear_projection"},
}
OURS = "MIVPG"
NOT_WORDS = 10
"""Ids below are the language models' special tokens."""

Rivals = Mapping[str, MivpgForConditionalGeneration]


# ── The three models, and bags for them ─────────────────────────────────────────────────────────────────────────────


def make_vision_model(sizes: Sizes) -> nn.Module:
    """The frozen vision model in bfloat16."""
    with DEVICE:  # drawn in float32, since a truncated normal distribution has wrong tails in 16 bits
        return AutoModel.from_config(sizes.vision).to(torch.bfloat16)


def make_rivals(sizes: Sizes, language: PreTrainedConfig) -> Rivals:
    """The rivals between one frozen vision model and one frozen language model in bfloat16."""
    vision_model = make_vision_model(sizes)
    with DEVICE:
        language_model = language_model_class(language).from_config(language, dtype=torch.bfloat16)
    blip2 = Blip2Config(
        vision_config=sizes.vision.to_dict(),
        qformer_config={"encoder_hidden_size": sizes.vision.hidden_size} | sizes.qformer,
        text_config=language.to_dict(),
        image_token_index=language.vocab_size - 1,
    )
    rivals = {}
    for name, options in RIVALS.items():
        per_image = options.get("aggregator") == "linear_projection"
        num_prompts = sizes.num_tokens if per_image else sizes.num_prompts
        config = MivpgConfig.from_blip2(blip2, num_query_tokens=num_prompts, **options)
        with DEVICE:
            rivals[name] = MivpgForConditionalGeneration(config, vision_model, language_model)
        draw_zeros(rivals[name])
    return rivals


def model_row(name: str, model: MivpgForConditionalGeneration) -> list[str]:
    """How large a rival is."""
    parameters = list(model.parameters())
    num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    num_all = sum(parameter.numel() for parameter in parameters)
    return [name, f"{num_all:,}", f"{num_trained:,}", gigabytes(num_bytes_of(parameters))]


def held_bytes(model: nn.Module) -> int:
    """Of weights, and of AdamW's two numbers for each that trains."""
    parameters = list(model.parameters())
    return num_bytes_of(parameters) + 2 * num_bytes_of(those for those in parameters if those.requires_grad)


def num_positions(model: MivpgForConditionalGeneration) -> float:
    """Tokens that the language model can read; T5's positions are relative."""
    return model.config.text_config.to_dict().get("max_position_embeddings", math.inf)


def make_batch(
    sizes: Sizes, model: MivpgForConditionalGeneration, num_images: int, *, stored: bool, captioned: bool
) -> dict[str, Tensor]:
    """Bags and a short prompt, as pixels or as a store has them; with a caption each where it trains."""
    config, vision = model.config, sizes.vision
    num_prompts = config.num_query_tokens * (num_images if config.prompts_per_image else 1)

    def words(number: int) -> Tensor:
        return torch.randint(NOT_WORDS, config.image_token_index, (sizes.batch_size, number))

    with DEVICE:
        marks = torch.full((sizes.batch_size, num_prompts), config.image_token_index)
        ids = torch.cat([marks, words(NUM_PROMPT_TOKENS)], dim=1)
        batch = {}
        if captioned:
            caption = words(sizes.num_words)
            batch["labels"] = caption
            if not config.is_encoder_decoder:
                batch["labels"] = torch.cat([torch.full_like(ids, -100), caption], dim=1)
                ids = torch.cat([ids, caption], dim=1)
        if stored:
            size = (sizes.batch_size, num_images, sizes.num_tokens, vision.hidden_size)
            batch["image_embeds"] = torch.randn(size, dtype=torch.bfloat16)
        else:
            batch["pixel_values"] = torch.randn(sizes.batch_size, num_images, 3, vision.image_size, vision.image_size)
        return batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def split(batch: dict[str, Tensor], at_once: int) -> list[dict[str, Tensor]]:
    """The same bags, so many at once."""
    parts = zip(*(value.split(at_once) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


# ── A table of rivals ───────────────────────────────────────────────────────────────────────────────────────────────


def rival_columns(first: str, things: str) -> list[str]:
    """Of a table that `rival_rows` fills."""
    columns = [first, "", "bags at once", "s", "MIVPG is so many times as fast", f"{things} a second"]
    return [*columns, "GB beyond weights and AdamW", "GB in all", "TFLOP", "of bf16 peak", "of bandwidth"]


def rival_rows(
    sizes: Sizes,
    rivals: Rivals,
    peaks: Peaks,
    first: str,
    batches: Mapping[str, dict[str, Tensor]],
    run: Callable[[str, int], Any],
    *,
    num_things: int,
    num_new_tokens: int = 0,
) -> Iterator[list[Any]]:
    """A row a rival.

    Args:
        sizes: What is measured.
        rivals: The models.
        peaks: What the device can do.
        first: What stands in the first column.
        batches: Of each rival.
        run: Takes a rival's name and how many bags of its batch the device holds at once.
        num_things: Images or captions of a run.
        num_new_tokens: That the language model writes after what it has read.
    """
    max_tokens = num_positions(rivals[OURS]) - num_new_tokens  # what has more is not run
    lengths = {name: batch["input_ids"].shape[1] for name, batch in batches.items()}
    runs = {name: partial(run, name) for name in rivals if lengths[name] <= max_tokens}
    trials, seconds = side_by_side(runs, sizes.batch_size, sizes.seconds_each)
    for name, model in rivals.items():
        if name not in runs:
            yield [first, name, f"not run: {lengths[name]:,} tokens, and the language model reads {max_tokens:,}"]
            continue
        trial = trials[name]
        if trial is None:
            yield [first, name, "not even one bag fits"]
            continue
        taken = seconds.of(name).median
        yield [
            first,
            name,
            trial.at_once,
            seconds.of(name),
            seconds.times_as_fast(OURS, name),
            f"{num_things / taken:.1f}",
            gigabytes(trial.peak),
            gigabytes(trial.peak + held_bytes(model) + num_bytes_of(batches[name].values())),
            f"{trial.work.flops / 1e12:.3g}",
            f"{trial.work.flops / taken / peaks.flops:.1%}",
            f"{trial.work.num_bytes / taken / peaks.num_bytes:.1%}",
        ]


# ── A step of training ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StepKind:
    """A kind of training step."""

    num_images: int
    """Of a bag."""
    stored: bool
    """Whether from stored features."""
    checkpointing: bool = False
    """Whether with gradient checkpointing."""

    def __str__(self) -> str:
        source = "features" if self.stored else "pixels"
        return f"{self.num_images}, {source}{', gradient_checkpointing' * self.checkpointing}"


def kinds_of_steps(sizes: Sizes) -> list[StepKind]:
    """In the order in which they are measured."""
    kinds = [StepKind(sizes.usual_images, stored=True, checkpointing=True)]
    return kinds + [StepKind(number, stored) for number in sizes.nums_images for stored in (False, True)]


def training_rows(sizes: Sizes, rivals: Rivals, peaks: Peaks, kind: StepKind) -> Iterator[list[Any]]:
    """A row a rival."""
    for model in rivals.values():
        model.train()
        if kind.checkpointing:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
    optimizers = {name: make_optimizer(model) for name, model in rivals.items()}
    batches = {
        name: make_batch(sizes, model, kind.num_images, stored=kind.stored, captioned=True)
        for name, model in rivals.items()
    }
    yield from rival_rows(
        sizes,
        rivals,
        peaks,
        str(kind),
        batches,
        lambda name, at_once: training_step(rivals[name], optimizers[name], batches[name], at_once),
        num_things=sizes.batch_size * kind.num_images,
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW for what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def training_step(
    model: MivpgForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    at_once: int,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward for so many bags at once, AdamW for all."""
    parts = split(batch, at_once)
    try:
        for part in parts:
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                loss = model(**part).loss
            (loss / len(parts)).backward()
        optimizer.step()
    finally:
        optimizer.zero_grad()  # also of a step that did not fit


# ── Captions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def caption_rows(sizes: Sizes, rivals: Rivals, peaks: Peaks, num_beams: int) -> Iterator[list[Any]]:
    """A row a rival, from pixels."""
    for model in rivals.values():
        model.eval().requires_grad_(False)  # FlopCounterMode looks for the graph of what could have one
    batches = {
        name: make_batch(sizes, model, sizes.usual_images, stored=False, captioned=False)
        for name, model in rivals.items()
    }
    yield from rival_rows(
        sizes,
        rivals,
        peaks,
        str(num_beams),
        batches,
        lambda name, at_once: write_captions(rivals[name], batches[name], at_once, num_beams, sizes.num_words),
        num_things=sizes.batch_size,
        num_new_tokens=sizes.num_words,
    )


def write_captions(
    model: MivpgForConditionalGeneration, batch: dict[str, Tensor], at_once: int, num_beams: int, num_words: int
) -> None:
    """So many words for every bag; no caption ends before."""
    for part in split(batch, at_once):
        ids = model.generate(**part, num_beams=num_beams, min_new_tokens=num_words, max_new_tokens=num_words)
        assert ids.shape[1] >= num_words
