"""What a feature store saves, what passes outside the model while it trains, and how fast images become features.

python benchmarks/epochs.py [--parts store shares extraction] [--rounds 3] [--vision miniature vit-b vit-g]

Everything is drawn in a temporary folder; weights that are not the miniature's are random, at real sizes, and nothing
is downloaded. Prints Markdown, a table a part:

- store: an epoch of training steps on the slides miniature from pixels and from a store, and what ViT-g takes for one
  image against reading its features.
- shares: epochs of `mivpg.training.train` itself. What counts as the model is its forward pass with the loss, its
  backward pass, and the optimizer's step, each waited for on the device. All else is outside: waiting for a batch,
  bringing it to the device, clipping and zeroing gradients (which is arithmetic, and stands apart, too), the schedule,
  the log, and the rest of the trainer's Python. Captions and the checkpoint at the end of an epoch are not in it. The
  first epoch is passed over.
- extraction: images a second of `extract_features`, from JPEG files of 1000 x 750 pixels to a store, against the
  vision model alone on the same batches in memory. What it does once, whatever the number of images (a digest of the
  weights that goes into the store), is measured on a store that is whole, and stands apart.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    Blip2VisionModel,
    TrainerCallback,
)

from measuring import DEVICE, Seconds, in_turn, machine, markdown, spread, synchronize
from mivpg import BagCollator, BagDataset, MivpgConfig, MivpgForConditionalGeneration, MivpgProcessor, training
from mivpg.bags import BagSampler, Sample, select
from mivpg.datasets import DatasetConfig
from mivpg.datasets.abo import AboConfig
from mivpg.datasets.bag_file import BagFileConfig
from mivpg.datasets.patch_gastric import PatchGastricConfig
from mivpg.feature_files import read_features
from mivpg.features import extract_features
from mivpg.miniature import BASE_MODEL
from mivpg.miniature.catalogue import make_catalogue
from mivpg.miniature.patch_gastric import make_patch_gastric
from mivpg.modeling_mivpg import MivpgForBagClassification
from mivpg.training import ModelConfig, TrainConfig
from parameters import draw_zeros

BATCH_SIZE = 8
WIDTH = 1408
"""Of ViT-g's features."""

# ── What a store saves ──────────────────────────────────────────────────────────────────────────────────────────────


def miniature(**options: Any) -> tuple[MivpgForConditionalGeneration, MivpgProcessor]:
    """The base model that comes with the package, and what it adds drawn at random."""
    model = MivpgForConditionalGeneration.from_pretrained(BASE_MODEL, **options)
    draw_zeros(model)
    return model.to(DEVICE), MivpgProcessor.from_pretrained(BASE_MODEL)


def one_epoch(model: MivpgForConditionalGeneration, processor: MivpgProcessor, samples: list[Sample]) -> None:
    """Forward, backward and AdamW on every bag once."""
    dataset = BagDataset(samples, prompt="a photo of", training=True)
    collate = BagCollator(processor, training=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    order = [index for _, index in BagSampler(dataset.sizes(), seed=0, block=BATCH_SIZE)]
    for start in range(0, len(order), BATCH_SIZE):
        batch = collate([dataset[index] for index in order[start : start + BATCH_SIZE]])
        model(**{name: value.to(DEVICE) for name, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def store_of_slides(folder: Path, num_slides: int) -> DatasetConfig:
    """The slides miniature and a store of its CLS tokens."""
    config = DatasetConfig(patch_gastric=PatchGastricConfig(root=folder / "slides"), features=folder / "store")
    assert config.patch_gastric is not None and config.features is not None
    make_patch_gastric(config.patch_gastric.root, num_slides=num_slides)
    samples = config.patch_gastric.load()
    extract_features(*miniature(), samples, config.features, tokens="cls", dtype=torch.float16)
    return config


def what_a_store_saves(folder: Path, *, num_slides: int, rounds: int, vision_config: Blip2VisionConfig) -> str:
    """The table of part `store`."""
    rows = []

    def compare(title: str, slow: Callable[[], Any], fast: Callable[[], Any]) -> None:
        taken = in_turn({"pixels": slow, "store": fast}, rounds=rounds)
        medians = [f"{taken.of(name).median:.3g}" for name in ("pixels", "store")]
        rows.append([title, *medians, taken.times_as_fast("store", "pixels")])

    config = store_of_slides(folder, num_slides)
    assert config.patch_gastric is not None
    pixels, stored = select(config.patch_gastric.load(), "train"), select(config.load(), "train")
    model, processor = miniature(patch_pooling="cls", instance_correlation="csa")
    model.train()
    compare(
        f"an epoch of the slides miniature, {len(pixels)} slides, {sum(len(s.images) for s in pixels):,} patches",
        lambda: one_epoch(model, processor, pixels),
        lambda: one_epoch(model, processor, stored),
    )
    vision_model = Blip2VisionModel(vision_config).eval().to(DEVICE)
    image = torch.randn(1, 3, vision_config.image_size, vision_config.image_size, device=DEVICE)
    num_tokens = (vision_config.image_size // vision_config.patch_size) ** 2 + 1
    for title, rows_stored in ((f"all {num_tokens} tokens", num_tokens), ("CLS alone", 1)):
        file = folder / f"{rows_stored}.safetensors"
        save_file({"image_embeds": torch.randn(1, rows_stored, vision_config.hidden_size).half()}, file)
        with torch.no_grad():
            compare(
                f"an image, {title} of width {vision_config.hidden_size} ({file.stat().st_size / 1000:.1f} kB)",
                lambda: vision_model(pixel_values=image),
                lambda file=file: read_features(file),
            )
    return markdown(["", "from pixels, s", "from the store, s", "ratio"], rows)


# ── What passes outside the model ───────────────────────────────────────────────────────────────────────────────────


class Clock:
    """Adds up the seconds between `start` and `stop`, the device's work included."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.started = 0.0

    def start(self, *hooked: Any) -> None:
        synchronize()
        self.started = time.perf_counter()

    def stop(self, *hooked: Any) -> None:
        synchronize()
        self.seconds += time.perf_counter() - self.started

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time added up."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start()
            result = run(*args, **kwargs)
            self.stop()
            return result

        return timed


@dataclass(frozen=True)
class Epoch:
    """Where the seconds of an epoch went."""

    whole: float
    model: float
    """Forward pass with the loss, backward pass, optimizer's step."""
    waiting: float
    """For the next batch."""
    gradients: float
    """Clipping them, and setting them to zero."""


class TimedTrainer(training.MivpgTrainer):
    """The package's own trainer with clocks around the model and around what hands it batches.

    What the model adds to BLIP-2 is drawn at random; when an epoch ends it is noted in `epochs`.
    """

    def __init__(self, model: MivpgForConditionalGeneration, *others: Any, epochs: list[Epoch], **options: Any) -> None:
        draw_zeros(model)
        super().__init__(model, *others, **options)
        self.of_epoch, self.of_model, self.of_waiting, self.of_gradients = (Clock() for _ in range(4))
        model.register_forward_pre_hook(self.of_model.start)
        model.register_forward_hook(self.of_model.stop)
        self.accelerator.backward = self.of_model.around(self.accelerator.backward)
        self.get_batch_samples = self.of_waiting.around(self.get_batch_samples)
        self._clip_grad_norm = self.of_gradients.around(self._clip_grad_norm)
        model.zero_grad = self.of_gradients.around(model.zero_grad)
        self.add_callback(EpochCallback(self, epochs))

    @property
    def clocks(self) -> tuple[Clock, ...]:
        """In the order of `Epoch`'s fields."""
        return self.of_epoch, self.of_model, self.of_waiting, self.of_gradients

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """With the clock around its step."""
        optimizer = super().create_optimizer(model)
        optimizer.register_step_pre_hook(self.of_model.start)
        optimizer.register_step_post_hook(self.of_model.stop)
        return optimizer


class EpochCallback(TrainerCallback):
    """Sets the clocks to zero before an epoch and notes them after it, before captions are written."""

    def __init__(self, trainer: TimedTrainer, epochs: list[Epoch]) -> None:
        self.trainer = trainer
        self.epochs = epochs

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        for clock in self.trainer.clocks:
            clock.seconds = 0.0
        self.trainer.of_epoch.start()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.of_epoch.stop()
        self.epochs.append(Epoch(*(clock.seconds for clock in self.trainer.clocks)))


def timed_epochs(config: TrainConfig) -> list[Epoch]:
    """Trains, and says where the seconds of each epoch went but the first."""
    epochs: list[Epoch] = []
    timed = partial(TimedTrainer, epochs=epochs)
    with mock.patch.object(training, "MivpgTrainer", timed), contextlib.redirect_stdout(sys.stderr):
        training.train(config)
    return epochs[1:]


def save_language_model(folder: Path) -> Path:
    """The miniature's language model, as a folder of its own."""
    Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL).language_model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(folder)
    return folder


def random_features(folder: Path, *, num_bags: int, num_images: tuple[int, int], num_tokens: int) -> DatasetConfig:
    """A bag file with features of ViT-g's width, between so many and so many images a bag."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    with (folder / "bags.jsonl").open("w") as file:
        for i in range(num_bags):
            number = int(torch.randint(num_images[0], num_images[1] + 1, (), generator=generator))
            features = torch.randn(number, num_tokens, WIDTH, generator=generator).half()
            save_file({"image_embeds": features}, folder / f"{i}.safetensors")
            captions = ["a white chair with four thin legs and a round back."]
            file.write(json.dumps({"id": str(i), "features": f"{i}.safetensors", "captions": captions}) + "\n")
    return DatasetConfig(bag_file=BagFileConfig(path=folder / "bags.jsonl"))


def training_runs(
    folder: Path, *, num_products: int, num_slides: int, num_bags: int, num_instances: int, qformer: dict[str, int]
) -> dict[str, TrainConfig]:
    """What part `shares` trains, by title: two miniatures, and a Q-Former of the given sizes over stored features."""
    photos = {"patch_pooling": "abmil", "instance_correlation": "csa"}
    slides = {"patch_pooling": "cls", "instance_correlation": "csa"}
    make_catalogue(folder / "products", num_products=num_products)
    products = DatasetConfig(abo=AboConfig(root=folder / "products"))
    new = {"language": str(save_language_model(folder / "language")), "image_embeds_size": WIDTH, "qformer": qformer}
    all_tokens = random_features(folder / "all", num_bags=num_bags, num_images=(2, 8), num_tokens=257)
    cls = random_features(folder / "cls", num_bags=num_bags, num_images=(1, num_instances), num_tokens=1)
    runs = {
        "products, pixels": (ModelConfig(base=str(BASE_MODEL), **photos), products, 32),
        "slides, stored CLS": (ModelConfig(base=str(BASE_MODEL), **slides), store_of_slides(folder, num_slides), 8),
        "2 to 8 photos a bag, all 257 tokens stored": (ModelConfig(**new, **photos), all_tokens, 8),
        f"1 to {num_instances} tiles a bag, CLS stored": (ModelConfig(**new, **slides), cls, 8),
    }
    return {
        title: TrainConfig(
            model=model,
            dataset=dataset,
            output_dir=folder / f"run {number}",
            num_train_epochs=3,
            batch_size=batch_size,
            warmup_steps=0,
        )
        for number, (title, (model, dataset, batch_size)) in enumerate(runs.items())
    }


def shares_of_epochs(runs: dict[str, TrainConfig]) -> str:
    """The table of part `shares`."""
    rows = []
    for title, config in runs.items():
        epochs = timed_epochs(config)
        shares = [
            spread(100 * share(epoch) / epoch.whole for epoch in epochs)
            for share in (lambda e: e.whole - e.model, lambda e: e.waiting, lambda e: e.gradients)
        ]
        rows.append([title, spread(epoch.whole for epoch in epochs), *shares])
    columns = ["run", "seconds an epoch", "% outside the model", "% waiting for a batch", "% clipping and zeroing"]
    return markdown(columns, rows)


# ── From images to features ─────────────────────────────────────────────────────────────────────────────────────────


def draw_photos(folder: Path, number: int, *, size: tuple[int, int] = (1000, 750)) -> list[Sample]:
    """Bags of a JPEG file each: colours that run into each other, with the grain of a photo."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    samples = []
    for i in range(number):
        colors = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        grain = generator.normal(0, 6, (size[1], size[0], 1))
        Image.fromarray((np.asarray(colors) + grain).clip(0, 255).astype(np.uint8)).save(
            folder / f"{i}.jpg", quality=90
        )
        samples.append(Sample(id=str(i), images=(folder / f"{i}.jpg",)))
    return samples


VISION_MODELS = {
    "vit-b": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
    },
    "vit-g": {},
}
"""Fields of `Blip2VisionConfig` beside its defaults, for images of 224 pixels."""


def vision_model_of(name: str) -> tuple[MivpgForConditionalGeneration | MivpgForBagClassification, MivpgProcessor]:
    """A model that holds this vision model, and its processor."""
    if name == "miniature":
        return miniature()
    vision = Blip2VisionConfig(image_size=224, initializer_range=0.02, **VISION_MODELS[name])
    qformer = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = MivpgForBagClassification(MivpgConfig(vision_config=vision.to_dict(), qformer_config=qformer))
    processor = MivpgProcessor.from_pretrained(BASE_MODEL)
    processor.image_processor.size = {"height": 224, "width": 224}
    return model.to(DEVICE), processor


def extraction(
    model: MivpgForConditionalGeneration | MivpgForBagClassification,
    processor: MivpgProcessor,
    samples: list[Sample],
    folder: Path,
    *,
    batch_size: int,
    rounds: int,
) -> list[Any]:
    """Images a second of the vision model alone, of `extract_features`, their ratio, and the seconds before it."""
    model.eval()
    paths = [path for sample in samples for path in sample.images]
    batches = [processor.pixels(paths[i : i + batch_size]).to(DEVICE) for i in range(0, len(paths), batch_size)]

    @torch.no_grad()
    def alone() -> None:
        for batch in batches:
            model.vision_model(pixel_values=batch)

    def extract(store: Path) -> None:
        extract_features(model, processor, samples, store, batch_size=batch_size, dtype=torch.float16)

    extract(folder / "whole")
    taken = in_turn(
        {
            "vision model": alone,
            "extraction": lambda: extract(Path(tempfile.mkdtemp(dir=folder))),
            "once": lambda: extract(folder / "whole"),
        },
        rounds=rounds,
        warm_up=0,
    )
    rounds_of = taken.rounds
    extracting = [a - b for a, b in zip(rounds_of["extraction"], rounds_of["once"], strict=True)]
    beyond = Seconds({"vision model": rounds_of["vision model"], "extraction": extracting})
    each = [f"{len(paths) / beyond.of(name).median:.3g}" for name in ("vision model", "extraction")]
    return [len(paths), batch_size, *each, beyond.times_as_fast("extraction", "vision model"), taken.of("once")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["store", "shares", "extraction"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vision", nargs="+", choices=["miniature", *VISION_MODELS], default=["miniature", "vit-b"])
    parser.add_argument("--photos", type=int, default=96, help="for the extraction")
    parser.add_argument("--batch-size", type=int, default=16, help="for the extraction")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{machine()}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "store" in arguments.parts:
            (folder / "a").mkdir()
            vit_g = Blip2VisionConfig(initializer_range=0.02)
            table = what_a_store_saves(folder / "a", num_slides=60, rounds=arguments.rounds, vision_config=vit_g)
            print(f"\n{table}", flush=True)
        if "shares" in arguments.parts:
            (folder / "b").mkdir()
            runs = training_runs(
                folder / "b", num_products=300, num_slides=200, num_bags=32, num_instances=400, qformer={}
            )
            print(f"\n{shares_of_epochs(runs)}", flush=True)
        if "extraction" in arguments.parts:
            samples = draw_photos(folder / "photos", arguments.photos)
            rows = []
            for vision in arguments.vision:
                model, processor = vision_model_of(vision)
                (folder / vision).mkdir()
                options = {"batch_size": arguments.batch_size, "rounds": arguments.rounds}
                rows.append([vision, *extraction(model, processor, samples, folder / vision, **options)])
            columns = ["vision model", "images", "batch", "alone, images a second", "extraction, images a second"]
            columns += ["extraction is so many times as fast", "once, s"]
            print(f"\n{markdown(columns, rows)}", flush=True)


if __name__ == "__main__":
    main()
