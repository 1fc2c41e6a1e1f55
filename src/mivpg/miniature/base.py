"""The recipe of the miniature base model: a BLIP-2 of two million parameters that comes with the package.

1. A byte-level tokenizer and a small Llama learn the words and the manner of speech of the three miniatures, from text
   alone: to write a sentence from keywords in any order. A keyword is one vector, the sum of its tokens' embeddings. A
   language model of this size that has only read sentences cannot be told by visual prompts what no picture told it
   before.
2. A small ViT learns what a picture shows, from the mean of its tokens. It stands for what CLIP's ViT has learned
   before BLIP-2 sees it.
3. That ViT frozen, as in BLIP-2, a Q-Former and the language model learn to describe single pictures, while the
   language model goes on reading text. The Q-Former also tells what a picture shows, as BLIP-2's first stage has it
   tell which text belongs to a picture; each class by one of its queries, since queries that tell from their mean end
   as one and the same vector: one visual prompt, and nothing to choose from for CSA. Half of the products stand
   beside keywords of what their picture does not show, and the text speaks of both, so that what is read from a
   picture leaves room for more.

What tells the classes, in 2 and 3, is thrown away in the end.

Three miniatures give the lessons: products from one side, scenes, and patches of slides. The model has never seen two
pictures at once, nor a picture beside a text that says more than it and the keywords; of slides it has seen one patch
at a time, and has read reports. What it has seen is in none of the data sets. Everything is a function of the seed; the
last bits depend on the machine.

`encoder_decoder.py` makes another base of it, with another kind of language model, by the same steps.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from mivpg.configuration_mivpg import IMAGE_TOKEN
from mivpg.errors import MivpgError
from mivpg.files import read_json, write_whole
from mivpg.miniature import biopsies, scenes
from mivpg.miniature import product_lessons as products
from mivpg.miniature.lessons import IMAGE_SIZE, PictureLesson, TextLesson
from mivpg.miniature.processes import in_processes
from mivpg.model_card import write_base_card

logger = logging.getLogger(__name__)

PROMPT = "a photo of"
"""BLIP-2's. A decoder-only model writes it before every text: half of the time would leave a frozen model the choice.
An encoder reads it after the visual prompts, as it does when captions are trained on."""

PATCH_SIZE = 12
NUM_QUERIES = 16
VOCABULARY_SIZE = 1024
"""At most; every word of the miniatures is one token, and then there is nothing left to join."""
PAD, BOS, EOS = "<pad>", "<s>", "</s>"

NUM_HELD_OUT = 1500
"""Pictures that the figures are of, but for those beside keywords."""

LOG_FILE = "training_log.jsonl"
RECIPE_FILE = "recipe.json"
UNFINISHED = "unfinished.pt"


Stage = Literal["text", "vision", "language"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How much of everything; the defaults made the model that comes with the package."""

    seed: int = 0
    num_texts: int = 80_000
    text_steps: int = 1400
    text_batch: int = 96
    num_pictures: int = 36_000
    vision_steps: int = 4500
    language_steps: int = 3000
    picture_batch: int = 64
    save_every: int = 250

    @property
    def steps(self) -> int:
        """Of all three stages."""
        return self.text_steps + self.vision_steps + self.language_steps

    def stage(self, step: int) -> tuple[Stage, float]:
        """The stage that a step belongs to, and the share of its peak learning rate: a warm-up, then a cosine."""
        stages: dict[Stage, int] = {
            "text": self.text_steps,
            "vision": self.vision_steps,
            "language": self.language_steps,
        }
        for stage, length in stages.items():
            if step < length:
                warm_up = max(length // 20, 1)
                cosine = (1 + math.cos(math.pi * (step - warm_up) / max(length - warm_up, 1))) / 2
                return stage, (step + 1) / warm_up if step < warm_up else 0.05 + 0.95 * cosine
            step -= length
        raise AssertionError("a step beyond the last")


MUON_RATES: dict[Stage, float] = {"text": 1e-2, "vision": 1e-2, "language": 5e-3}
"""Peaks for the matrices inside the blocks: Muon teaches the ViT in a fifth of the steps that AdamW takes."""
ADAMW_RATE = 2e-3
"""Peak for all else."""

MINIATURES = {products: 0.6, scenes: 0.2, biopsies: 0.2}
"""What lessons are drawn from, and how often."""
CLASSES = tuple(name for miniature in MINIATURES for name in miniature.CLASSES)
"""What the heads tell apart."""


# ── Data ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_text(seed: int, index: int) -> TextLesson:
    """A text of one of the miniatures."""
    generator = random.Random(f"text {seed} {index}")
    return _draw_miniature(generator).text_lesson(generator)


def make_picture(stream: str, index: int) -> PictureLesson:
    """A picture of one of the miniatures."""
    generator = random.Random(f"{stream} {index}")
    return _draw_miniature(generator).picture_lesson(generator)


def _draw_miniature(generator: random.Random) -> Any:
    """A module that gives lessons."""
    (miniature,) = generator.choices(list(MINIATURES), list(MINIATURES.values()))
    return miniature


def make_pictures(stream: str, number: int) -> list[PictureLesson]:
    """Pictures in all processes, with a progress bar."""
    with closing(in_processes(functools.partial(make_picture, stream), range(number), chunksize=32)) as pictures:
        return list(tqdm(pictures, total=number, desc="drawing pictures", disable=None))


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Bytes, and the pieces of words that occur most often."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, BOS, EOS, IMAGE_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def classes_of(picture: PictureLesson) -> Tensor:
    """What a picture shows, of `CLASSES`, as 0 and 1."""
    return torch.tensor([float(name in picture.classes) for name in CLASSES])


# ── The model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def base_config(tokenizer: PreTrainedTokenizerFast, text: PreTrainedConfig) -> Blip2Config:
    """Sizes: 65 tokens a picture, six Q-Former blocks of which three look at them, 16 queries.

    Args:
        tokenizer: Has the image mark.
        text: The language model's.
    """
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "initializer_range": 0.08,
    }
    qformer = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "encoder_hidden_size": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.08,
    }
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text.to_dict(),
        num_query_tokens=NUM_QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )


def start_with_llama(texts: Sequence[TextLesson]) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """A tokenizer of these texts, and a model that knows nothing, its language model a Llama."""
    tokenizer = make_tokenizer([" ".join(["", *text.keywords, PROMPT, text.text]) for text in texts])
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Blip2ForConditionalGeneration(base_config(tokenizer, llama))
    model.query_tokens.data.normal_(std=0.02)
    return model, make_processor(tokenizer)


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Blip2Processor:
    """BLIP-2's, for pictures of the miniature's size."""
    image_processor = BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=NUM_QUERIES)


def pixel_values(processor: Blip2Processor, pictures: Sequence[PictureLesson]) -> Tensor:
    """(n, 3, h, w), as the image processor normalizes."""
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2) / 255
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    return (pixels - mean) / std


def mirror_half(pixels: Tensor, pictures: Sequence[PictureLesson], generator: random.Random) -> Tensor:
    """Half of the pictures (n, 3, h, w) mirrored, of those that can be."""
    mirrored = [picture.can_be_mirrored and generator.random() < 0.5 for picture in pictures]
    return torch.where(torch.tensor(mirrored)[:, None, None, None], pixels.flip(-1), pixels)


def pad(rows: Sequence[list[int]], value: int) -> Tensor:
    """(n, T)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def keyword_embeds(model: Blip2ForConditionalGeneration, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """One vector a keyword, (n, H), the sum of its tokens' embeddings."""
    embedding = model.language_model.get_input_embeddings().weight
    if not words:
        return embedding[:0]
    rows = tokenizer([f" {word}" for word in words])["input_ids"]
    starts = np.cumsum([0, *map(len, rows[:-1])])
    flat = torch.tensor([token for row in rows for token in row])
    return F.embedding_bag(flat, embedding, torch.from_numpy(starts), mode="sum")


def has_encoder(model: Blip2ForConditionalGeneration) -> bool:
    """Whether an encoder reads keywords, visual prompts and the prompt, and a decoder writes the text alone."""
    return model.config.text_config.is_encoder_decoder


def written_ids(
    model: Blip2ForConditionalGeneration, tokenizer: Any, lessons: Sequence[TextLesson] | Sequence[PictureLesson]
) -> list[list[int]]:
    """Tokens that the language model is to write, to the one that ends them; without an encoder, the prompt first."""
    prompt = "" if has_encoder(model) else f"{PROMPT} "
    rows = tokenizer([prompt + lesson.text for lesson in lessons])["input_ids"]
    return [[*row, tokenizer.eos_token_id] for row in rows]


def read_ids(model: Blip2ForConditionalGeneration, tokenizer: Any) -> list[int]:
    """What stands before these tokens: an image mark for each visual prompt and, of an encoder, the prompt."""
    marks = [model.config.image_token_index] * NUM_QUERIES
    return marks + tokenizer(PROMPT)["input_ids"] if has_encoder(model) else marks


def text_loss(
    model: Blip2ForConditionalGeneration,
    tokenizer: Any,
    texts: Sequence[TextLesson] | Sequence[PictureLesson],
    visual_prompts: Tensor | None = None,
) -> Tensor:
    """Of the language model on texts, each after its keywords and, of pictures, its visual prompts (n, R, E)."""
    counts = [len(text.keywords) for text in texts]
    before = keyword_embeds(model, tokenizer, [word for text in texts for word in text.keywords]).split(counts)
    if visual_prompts is not None:
        before = [torch.cat(both) for both in zip(before, visual_prompts, strict=True)]
    ids = written_ids(model, tokenizer, texts)
    embed = model.language_model.get_input_embeddings()
    if has_encoder(model):
        prompt = embed(torch.tensor(tokenizer(PROMPT)["input_ids"]))
        rows, labels = [torch.cat([words, prompt]) for words in before], ids
    else:
        rows = [torch.cat([words, embed(torch.tensor(row))]) for words, row in zip(before, ids, strict=True)]
        labels = [[-100] * len(words) + row for words, row in zip(before, ids, strict=True)]
    return model.language_model(
        inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True),
        attention_mask=pad([[1] * len(row) for row in rows], 0),
        labels=pad(labels, -100),
    ).loss


def picture_losses(
    model: Blip2ForConditionalGeneration,
    head: nn.Linear,
    tokenizer: Any,
    image_embeds: Tensor,
    pictures: Sequence[PictureLesson],
) -> dict[str, Tensor]:
    """Of descriptions and of classes, from what the frozen ViT says of the pictures, (n, P, D)."""
    queries = model.query_tokens.expand(len(pictures), -1, -1)
    queries = model.qformer(query_embeds=queries, encoder_hidden_states=image_embeds).last_hidden_state  # (n, R, H)
    loss = text_loss(model, tokenizer, pictures, model.language_projection(queries))
    tells = torch.arange(len(CLASSES)) % NUM_QUERIES  # which query tells a class
    logits = (queries[:, tells] * head.weight).sum(dim=-1) + head.bias  # (n, C)
    return {"picture": loss, "class": class_loss(logits, pictures)}


def class_loss(logits: Tensor, pictures: Sequence[PictureLesson]) -> Tensor:
    """Of the classes of pictures, told by logits (n, C)."""
    target = torch.stack([classes_of(picture) for picture in pictures])
    return 0.07 * F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(pictures)


@torch.no_grad()
def see(model: Blip2ForConditionalGeneration, processor: Blip2Processor, pictures: Sequence[PictureLesson]) -> Tensor:
    """What the ViT says of each picture, (n, P, D) in half precision."""
    batches = (pictures[start : start + 128] for start in range(0, len(pictures), 128))
    return torch.cat([model.vision_model(pixel_values(processor, b)).last_hidden_state.half() for b in batches])


# ── The recipe ──────────────────────────────────────────────────────────────────────────────────────────────────────


def make_base(out: Path, recipe: Recipe | None = None) -> Path:
    """Trains the base model and writes it as a BLIP-2 folder.

    Args:
        out: A new or empty folder, or one that an interrupted run has begun.
        recipe: How much of everything.

    Returns:
        `out`, with `training_log.jsonl` and `recipe.json` (versions, figures, sha256 of the weights) beside the model.

    Raises:
        MivpgError: The folder holds something else.
    """
    return train(out, recipe or Recipe(), start_with_llama, "base")


def train(
    out: Path,
    recipe: Recipe,
    start: Callable[[Sequence[TextLesson]], tuple[Blip2ForConditionalGeneration, Blip2Processor]],
    stream: str,
) -> Path:
    """Trains what a recipe's stages train and writes it as `make_base` does; `recipe.json` comes last.

    Args:
        out: A new or empty folder, or one that an interrupted run has begun.
        recipe: A stage without steps leaves what it would train as it was.
        start: Makes the model, and its processor, from the texts that it will read.
        stream: Of the pictures; another one, other pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / UNFINISHED
    state_file.with_suffix(".partial").unlink(missing_ok=True)
    if any(out.iterdir()) and not state_file.exists():
        raise MivpgError(f"{out} is not empty, expected a new folder for the base model.")
    began = time.monotonic()
    texts = [make_text(recipe.seed, index) for index in range(recipe.num_texts)]
    torch.manual_seed(recipe.seed)
    model, processor = start(texts)
    tokenizer = processor.tokenizer
    heads = nn.ModuleDict(
        {
            "vision": nn.Linear(model.config.vision_config.hidden_size, len(CLASSES)),
            "language": nn.Linear(model.config.qformer_config.hidden_size, len(CLASSES)),
        }
    )
    optimizers = make_optimizers(model, heads)
    log: list[dict[str, Any]] = []
    first = 0
    if state_file.exists():
        first, log = _resume(state_file, recipe, model, heads, optimizers)
    pictures = make_pictures(f"{stream} {recipe.seed}", recipe.num_pictures)

    progress = tqdm(range(first, recipe.steps), total=recipe.steps, initial=first, desc="training", disable=None)
    recent: dict[str, list[float]] = {}
    image_embeds: Tensor | None = None
    for step in progress:
        stage, share = recipe.stage(step)
        if stage == "language" and image_embeds is None:
            image_embeds = see(model, processor, pictures)  # the ViT is frozen from here on
        generator = random.Random(f"{recipe.seed} {step}")
        chosen = generator.choices(range(len(pictures)), k=recipe.picture_batch)
        batch = [pictures[index] for index in chosen]
        losses: dict[str, Tensor] = {}
        if stage == "vision":
            pixels = mirror_half(pixel_values(processor, batch), batch, generator)
            tokens = model.vision_model(pixels).last_hidden_state
            losses["class"] = class_loss(heads["vision"](tokens.mean(dim=1)), batch)
        elif stage == "language":
            assert image_embeds is not None
            losses |= picture_losses(model, heads["language"], tokenizer, image_embeds[chosen].float(), batch)
        if stage != "vision":
            number = recipe.text_batch if stage == "text" else recipe.text_batch // 3
            losses["text"] = text_loss(model, tokenizer, generator.choices(texts, k=number))
        for optimizer, rate in zip(optimizers, (MUON_RATES[stage], ADAMW_RATE), strict=True):
            optimizer.zero_grad()  # to None, so that what a stage does not use stays as it is
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        sum(losses.values()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for name, loss in losses.items():
            recent.setdefault(name, []).append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            means = {f"{name}_loss": round(float(np.mean(values)), 4) for name, values in recent.items()}
            log.append({"step": step + 1, "stage": stage, "seconds": round(time.monotonic() - began, 1)} | means)
            progress.set_postfix(means)
            recent = {}
        if (step + 1) % recipe.save_every == 0:
            _save(state_file, step + 1, log, recipe, model, heads, optimizers)
            logger.info("step %d of %d: %s", step + 1, recipe.steps, log[-1] if log else {})

    held_out = [picture for picture in make_pictures("held out", NUM_HELD_OUT) if not picture.keywords]
    figures = judge(model, processor, held_out)
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob"):  # for those who fine-tune it; BLIP-2's
        setattr(model.config.qformer_config, dropout, 0.1)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    stored = out / "processor_config.json"  # where MivpgProcessor looks for the prompt; BLIP-2's does not know one
    write_whole(stored, json.dumps(read_json(stored) | {"prompt": PROMPT}, indent=2) + "\n")
    (out / LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in log))
    described = _describe(out, recipe, figures)
    write_base_card(out, described)
    write_whole(out / RECIPE_FILE, json.dumps(described, indent=2) + "\n")
    state_file.unlink(missing_ok=True)
    return out


def make_optimizers(model: nn.Module, heads: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of all blocks, AdamW for embeddings, biases, norms and the heads."""
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 2 and ".layer" in name and "relative_attention_bias" not in name  # T5's are embeddings
    }
    others = [p for name, p in model.named_parameters() if name not in matrices]
    muon = torch.optim.Muon(
        [*matrices.values()], lr=MUON_RATES["text"], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return muon, torch.optim.AdamW([*others, *heads.parameters()], lr=ADAMW_RATE, weight_decay=0.05)


@torch.no_grad()
def describe(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, pictures: Sequence[PictureLesson]
) -> Iterator[str]:
    """What the model says of each picture, greedily."""
    read = read_ids(model, processor.tokenizer)
    for start in range(0, len(pictures), 64):
        batch = pictures[start : start + 64]
        ids = torch.tensor([read] * len(batch))
        output = model.generate(
            pixel_values=pixel_values(processor, batch),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=48,
            do_sample=False,
        )
        written = output if has_encoder(model) else output[:, len(read) :]
        yield from processor.batch_decode(written, skip_special_tokens=True)


@torch.no_grad()
def description_loss(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, pictures: Sequence[PictureLesson]
) -> float:
    """Of the pictures' descriptions, as transformers computes it from pixels."""
    tokenizer = processor.tokenizer
    read, labels = read_ids(model, tokenizer), written_ids(model, tokenizer, pictures)
    rows = [read] * len(pictures)
    if not has_encoder(model):
        rows = [read + row for row in labels]
        labels = [[-100] * len(read) + row for row in labels]
    return model(
        pixel_values=pixel_values(processor, pictures),
        input_ids=pad(rows, tokenizer.pad_token_id),
        attention_mask=pad([[1] * len(row) for row in rows], 0),
        labels=pad(labels, -100),
    ).loss.item()


@torch.no_grad()
def judge(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, pictures: Sequence[PictureLesson]
) -> dict[str, Any]:
    """Figures on pictures that it was not trained on: the loss, and how much of what it says of each trait is right.

    Args:
        model: The base, or another one.
        processor: Its own.
        pictures: All without keywords.
    """
    model.eval()
    losses = [description_loss(model, processor, pictures[i : i + 100]) for i in range(0, len(pictures), 100)]
    right: dict[str, dict[str, list[bool]]] = {}
    for picture, caption in zip(pictures, describe(model, processor, pictures), strict=True):
        for miniature in MINIATURES:
            if picture.classes.isdisjoint(miniature.CLASSES):
                continue
            of_this = right.setdefault(miniature.__name__.rpartition(".")[2], {})
            for trait, is_right in miniature.right_of_said(caption, picture.facts).items():
                of_this.setdefault(trait, []).append(is_right)
    return {
        "num_pictures": len(pictures),
        "loss": float(np.mean(losses)),
        "right_of_said": {
            name: {trait: round(float(np.mean(values)), 4) for trait, values in traits.items()}
            for name, traits in right.items()
        },
        "num_said": {name: {trait: len(values) for trait, values in traits.items()} for name, traits in right.items()},
    }


def _save(
    file: Path, step: int, log: list, recipe: Recipe, model: nn.Module, heads: nn.Module, optimizers: Sequence[Any]
) -> None:
    unfinished = file.with_suffix(".partial")
    state = {"step": step, "log": log, "recipe": dataclasses.asdict(recipe), "model": model.state_dict()}
    torch.save(state | {"heads": heads.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, unfinished)
    unfinished.replace(file)


def _resume(
    file: Path, recipe: Recipe, model: nn.Module, heads: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[int, list[dict[str, Any]]]:
    state = torch.load(file, weights_only=True)
    if state["recipe"] != dataclasses.asdict(recipe):
        raise MivpgError(f"{file} was begun with {state['recipe']}; go on as it was, or name a new folder.")
    model.load_state_dict(state["model"])
    heads.load_state_dict(state["heads"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["log"]


def _describe(out: Path, recipe: Recipe, figures: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to make the model again and to compare."""
    import platform

    import transformers

    return {
        "recipe": dataclasses.asdict(recipe),
        "sha256": {"model.safetensors": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()},
        "figures": figures,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }
