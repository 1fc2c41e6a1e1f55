"""Trains a backbone on generated patches: what it knows before it sees a slide, as the miniature's ViT knows it.

    weights = pretrain_backbone("densenet121", Path("densenet121"))

The patches are drawn as those that the miniature's vision model has learned from (`mivpg.miniature.biopsies`), each
with one class, what it shows, and as large as those of slides; none is in a data set. They are made `image_size` pixels
wide, as `backbone_features` makes those of slides, and the network trains on crops of them: what a crop costs is the
square of its side, and the vectors of p3x3 see no more of a patch than a crop does.
"""

import dataclasses
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mivpg.baselines.backbones import IMAGE_SIZE, make_network, normalized, resized
from mivpg.errors import MivpgError
from mivpg.files import read_json, write_whole
from mivpg.miniature.biopsies import PATCH_TYPES, draw_patch

WEIGHTS_FILE = "weights.safetensors"
RECORD_FILE = "pretraining.json"

BATCH_SIZE = 32
PEAK_RATE = 1e-3
"""Of AdamW, after a warm-up over a tenth of the steps and before a cosine."""
BATCH_NORM_MOMENTUM = 0.1
"""EfficientNet's 0.01 would leave half of what evaluation normalizes by as it was at the start, after 70 steps."""
NUM_HELD_OUT = 500


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """How a backbone learns what patches show."""

    name: str
    """One of `mivpg.baselines.backbones.BACKBONES`."""
    num_pictures: int = 4000
    num_epochs: int = 2
    seed: int = 0
    """Of weights, pictures, their order and their crops."""
    image_size: int = IMAGE_SIZE
    """Pixels a side of a patch, as features will be made of it."""
    crop_size: int = 96
    """Pixels a side of the piece of a patch that a step sees; `image_size` = all of it."""

    def __post_init__(self) -> None:
        if min(self.num_pictures, self.num_epochs) < 1:
            raise MivpgError(
                f"num_pictures is {self.num_pictures} and num_epochs {self.num_epochs}, expected at least 1 of each."
            )
        if not 32 <= self.crop_size <= self.image_size:
            raise MivpgError(f"crop_size is {self.crop_size}, expected 32 to image_size, {self.image_size}.")


def pretrain_backbone(out: Path, config: PretrainingConfig) -> Path:
    """Trains a backbone and a head that tells the ten types of patches.

    The same config gives the same weights on one machine with as many threads.

    Args:
        out: A folder; one that holds a backbone of this config already is left as it is.
        config: Which backbone, and how long.

    Returns:
        The safetensors file that `load_backbone` reads. `pretraining.json` beside it holds the config, `accuracy` (on
        held-out patches, whole and cropped) and `seconds`.

    Raises:
        MivpgError: MONAI is not installed, or the folder holds a backbone of another config.
    """
    weights, record = out / WEIGHTS_FILE, out / RECORD_FILE
    asked = dataclasses.asdict(config)
    if record.exists():
        if (found := read_json(record)["config"]) != asked:
            raise MivpgError(f"{record}: made with {found}, and {asked} is asked for; name another folder.")
        return weights
    start = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = _train(config)
    network.eval()
    accuracy = {
        "whole": held_out_accuracy(network, config.image_size),
        "crops": held_out_accuracy(network, config.image_size, config.crop_size),
    }
    write_whole(weights, save({name: value.contiguous() for name, value in network.state_dict().items()}))
    done: dict[str, Any] = {
        "config": asked,
        "accuracy": accuracy,
        "num_held_out": NUM_HELD_OUT,
        "seconds": round(time.monotonic() - start, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_whole(record, json.dumps(done, indent=2) + "\n")  # last: with it, the backbone is whole
    return weights


def _train(config: PretrainingConfig) -> nn.Module:
    network = make_network(config.name, num_classes=len(PATCH_TYPES)).train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = BATCH_NORM_MOMENTUM
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    steps_an_epoch = math.ceil(config.num_pictures / BATCH_SIZE)
    num_steps = config.num_epochs * steps_an_epoch
    warm_up = max(num_steps // 10, 1)
    progress = tqdm(range(num_steps), desc=f"pretraining {config.name}", unit="step", disable=None)
    for step in progress:
        epoch, place = divmod(step, steps_an_epoch)
        order = random.Random(f"{config.seed} {epoch}").sample(range(config.num_pictures), config.num_pictures)
        indices = order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]
        generator = random.Random(f"{config.seed} {step} crops")
        pictures = [draw_picture(f"backbone {config.seed}", index) for index in indices]
        crops = [_turned_crop(image, config.image_size, config.crop_size, generator) for image, _ in pictures]
        share = (step + 1) / warm_up if step < warm_up else 0.5 + 0.5 * math.cos(math.pi * step / num_steps)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * share
        loss = F.cross_entropy(network(normalized(crops)), torch.tensor([kind for _, kind in pictures]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return network


def draw_picture(stream: str, index: int) -> tuple[Image.Image, int]:
    """A patch as large as those of generated slides, and the number of its type in `PATCH_TYPES`."""
    generator = random.Random(f"{stream} {index}")
    kind = generator.choice(PATCH_TYPES)
    return draw_patch(kind, generator), PATCH_TYPES.index(kind)


def _turned_crop(image: Image.Image, image_size: int, crop_size: int, generator: random.Random) -> Image.Image:
    """A square anywhere in a patch, turned by quarter turns and mirrored; its class stays."""
    image = resized(image, image_size).rotate(90 * generator.randrange(4))
    if generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, upper = (generator.randint(0, image_size - crop_size) for _ in range(2))
    return image.crop((left, upper, left + crop_size, upper + crop_size))


@torch.no_grad()
def held_out_accuracy(network: nn.Module, image_size: int, crop_size: int | None = None) -> float:
    """The share of patches, none of which it was trained on, of which a network in evaluation mode tells the type.

    Args:
        network: With a head for `PATCH_TYPES`.
        image_size: Pixels a side of a patch.
        crop_size: Of the piece from the middle that it sees; None = all of it.
    """
    right: list[Tensor] = []
    for start in range(0, NUM_HELD_OUT, BATCH_SIZE):
        pictures = [draw_picture("held out", index) for index in range(start, min(start + BATCH_SIZE, NUM_HELD_OUT))]
        images = [resized(image, image_size) for image, _ in pictures]
        if crop_size is not None:
            near = (image_size - crop_size) // 2
            images = [image.crop((near, near, near + crop_size, near + crop_size)) for image in images]
        right.append(network(normalized(images)).argmax(dim=1) == torch.tensor([kind for _, kind in pictures]))
    return float(torch.cat(right).float().mean())
