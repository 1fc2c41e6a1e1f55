"""Whether memory grows with the number of training steps, or of captions.

python benchmarks/leaks.py [--steps 1000]

Takes the miniature that comes with the package through so many optimizer steps (forward, backward, AdamW) of two bags
of stored features each, of 1 to 5 images, drawn anew, with the options that keep the most between passes; and writes so
many captions with two beams. After a fifth, three fifths and all: the resident set of the process, and how many tensors
Python's garbage collector finds alive. Prints Markdown.
"""

import argparse
import gc
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from measuring import machine, markdown
from mivpg import MivpgForConditionalGeneration, MivpgProcessor
from mivpg.bags import Bag
from mivpg.captioning import caption_bags
from mivpg.cli import quiet_transformers
from mivpg.miniature import BASE_MODEL
from parameters import draw_zeros

OPTIONS = {"patch_pooling": "abmil", "instance_correlation": "csa", "position_encoding": "ppeg"}


def live_tensors() -> int:
    """That the garbage collector knows of, once it has collected."""
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def bags(step: int, model: MivpgForConditionalGeneration) -> list[Tensor]:
    """Two bags of features (N, P, D), of 1 to 5 images, drawn from the step's number."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(1, 6, (2,), generator=generator).tolist()
    return [torch.randn(length, 65, model.config.image_embeds_size, generator=generator) for length in lengths]


def training(model: MivpgForConditionalGeneration, processor: MivpgProcessor) -> Callable[[int], None]:
    """One optimizer step, by its number."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(number: int) -> None:
        batch = processor(image_embeds=bags(number, model), text="a photo of", captions=["a red chair.", "a lamp."])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def captioning(model: MivpgForConditionalGeneration, processor: MivpgProcessor) -> Callable[[int], None]:
    """Two captions, by their number."""

    def step(number: int) -> None:
        opened = [
            Bag(id="", images=None, image_embeds=bag, image_coords=None, prompt="a photo of", caption=None)
            for bag in bags(number, model)
        ]
        caption_bags(model, processor, opened, num_beams=2, max_new_tokens=8)

    return step


def main() -> None:
    """Measures both and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    num_steps = parser.parse_args().steps
    torch.set_num_threads(1)
    quiet_transformers()
    processor = MivpgProcessor.from_pretrained(BASE_MODEL)
    rows = []
    for name, make, start in (("training steps", training, 0), ("captions", captioning, num_steps)):
        torch.manual_seed(0)
        model = MivpgForConditionalGeneration.from_pretrained(BASE_MODEL, **OPTIONS)
        draw_zeros(model)
        step = make(model, processor)
        each = 1 if start == 0 else 2
        for number in range(1, num_steps // each + 1):
            step(start + number)
            if number * each in (num_steps // 5, num_steps * 3 // 5, num_steps):
                megabytes = psutil.Process().memory_info().rss / 1e6
                rows.append([f"{number * each:,} {name}", f"{megabytes:.0f}", f"{live_tensors():,}"])
    print(f"{machine()}\n\n{markdown(['after', 'memory, MB', 'live tensors'], rows)}")


if __name__ == "__main__":
    main()
