"""Time and memory of the real BLIP-2's size on one GPU, from a step of training to captions; nothing is downloaded.

python benchmarks/real_size.py [blip2-flan-t5-xl | blip2-opt-2.7b]

Weights are random, so that captions mean nothing, but sizes, dtypes and steps are those of `mivpg train` with `dtype:
bfloat16` and `bf16: true`: frozen models in bfloat16, what trains in float32 under autocast, AdamW. Each figure is the
median of five after two to warm up. Prints Markdown.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Blip2Config

from mivpg import MivpgConfig, MivpgForConditionalGeneration
from parameters import LANGUAGE_MODELS, draw_zeros

NUM_WORDS, NUM_PROMPTS, NUM_TOKENS, WIDTH, IMAGE_SIZE = 30, 32, 257, 1408, 224
IMAGE_TOKEN_ID = 32_000
DEVICE = torch.device("cuda")
READINGS = {
    "concatenation": {"patch_pooling": "none", "instance_correlation": "none"},
    "MIVPG": {"patch_pooling": "abmil", "instance_correlation": "csa"},
}


def load(language: str, **options: Any) -> MivpgForConditionalGeneration:
    """The model on the GPU, as `from_pretrained(…, dtype="bfloat16")` would have it."""
    blip2 = Blip2Config(
        vision_config={"initializer_range": 0.02},
        text_config=LANGUAGE_MODELS[language].to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
    )
    with DEVICE:
        model = MivpgForConditionalGeneration(MivpgConfig.from_blip2(blip2, **options))
    draw_zeros(model)
    model.vision_model.to(torch.bfloat16)
    model.language_model.to(torch.bfloat16)
    model.freeze()
    return model


def batch_of(batch_size: int, num_images: int, *, stored: bool, decoder_only: bool) -> dict[str, torch.Tensor]:
    """Bags of `num_images` images with a caption of 30 words each, as pixels or as a store has them."""
    marks = torch.full((batch_size, NUM_PROMPTS), IMAGE_TOKEN_ID)
    words = torch.randint(10, 10_000, (batch_size, NUM_WORDS))
    ids = torch.cat([marks, words], dim=1)
    labels = torch.cat([torch.full_like(marks, -100), words], dim=1) if decoder_only else words
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if stored:
        batch["image_embeds"] = torch.randn(batch_size, num_images, NUM_TOKENS, WIDTH).to(torch.bfloat16)
    else:
        batch["pixel_values"] = torch.randn(batch_size, num_images, 3, IMAGE_SIZE, IMAGE_SIZE)
    return {name: value.to(DEVICE) for name, value in batch.items()}


def measure(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and the peak of the device's memory in GB, what it holds before included."""
    seconds = []
    for number in range(7):
        if number == 2:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]), torch.cuda.max_memory_allocated() / 1e9


def training_steps(model: MivpgForConditionalGeneration, title: str, decoder_only: bool) -> None:
    """Rows of the table: a step of training over bags of several sizes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    model.train()
    for batch_size, num_images, stored, checkpointing in (
        (16, 1, False, False),
        (16, 6, False, False),
        (16, 6, True, False),
        (16, 6, True, True),
        (1, 128, True, False),
    ):
        batch = batch_of(batch_size, num_images, stored=stored, decoder_only=decoder_only)
        if checkpointing:
            model.gradient_checkpointing_enable()

        def step(batch=batch) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds, peak = measure(step)
        if checkpointing:
            model.gradient_checkpointing_disable()
        source = "features" if stored else "pixels"
        kind = f"training step{', gradient checkpointing' * checkpointing}"
        print(f"| {title} | {kind} | {source} | {batch_size} | {num_images} | {seconds:.3f} | {peak:.1f} |", flush=True)


def captions(model: MivpgForConditionalGeneration, title: str, decoder_only: bool) -> None:
    """Rows of the table: 30 words a bag."""
    model.eval()
    for num_beams, num_images in ((1, 6), (5, 6)):
        batch = batch_of(16, num_images, stored=False, decoder_only=decoder_only)
        del batch["labels"]
        batch["input_ids"], batch["attention_mask"] = batch["input_ids"][:, :36], batch["attention_mask"][:, :36]

        def write(batch=batch, num_beams=num_beams) -> None:
            ids = model.generate(**batch, num_beams=num_beams, max_new_tokens=NUM_WORDS, min_new_tokens=NUM_WORDS)
            assert ids.shape[1] >= NUM_WORDS

        seconds, peak = measure(write)
        print(f"| {title} | captions, {num_beams} beams | pixels | 16 | {num_images} | {seconds:.3f} | {peak:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("language", nargs="?", choices=list(LANGUAGE_MODELS), default="blip2-flan-t5-xl")
    language = parser.parse_args().language
    decoder_only = language == "blip2-opt-2.7b"
    print(f"{language}, {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| model | what | from | bags | images a bag | seconds | peak GB |\n|---|---|---|---:|---:|---:|---:|")
    for title, options in READINGS.items():
        model = load(language, **options)
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated() / 1e9
        print(f"| {title} | loaded | | | | | {held:.1f} |", flush=True)
        training_steps(model, title, decoder_only)
        captions(model, title, decoder_only)
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
