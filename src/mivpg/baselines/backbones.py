"""The frozen CNNs of arXiv 2202.03432 and their features "p3x3": nine vectors a patch.

    backbone = load_backbone("densenet121", weights=Path("densenet121.safetensors"))
    files = slide_features(backbone, samples, Path("features/densenet121"))

The networks are MONAI's. Weights are those of its classes: what `mivpg.baselines.pretraining` writes, or, of ImageNet,
`DenseNet121(spatial_dims=2, in_channels=3, out_channels=1000, pretrained=True).state_dict()` on a machine that may
download them. Without weights a backbone is random and says so. A random EfficientNet-B3 sees next to nothing, since
its normalization layers have not seen a picture either: its map is of the order of 1e-5.
"""

# n pictures, C channels, h x w cells of a map, N patches of a slide, P vectors of a patch (9 of a map of 9 to 11 cells)

import hashlib
import json
import math
import pickle
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mivpg.augmentation import augment as augment_image
from mivpg.bags import Sample, check_record, naming
from mivpg.errors import BagError, MivpgError
from mivpg.feature_files import name_in_store
from mivpg.files import read_json, write_whole
from mivpg.images import open_image

BACKBONES = ("densenet121", "efficientnet_b3")

IMAGE_SIZE = 300
"""Pixels a side of a patch of PatchGastricADC22; the maps are 9 x 9 (DenseNet-121) and 10 x 10 (EfficientNet-B3)."""
STRIDE = 32
"""Pixels a cell of a map."""
POOL = 3
"""Cells a side that are averaged to one vector."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, in red, green and blue."""

HEADS = ("class_layers.out.", "_fc.")
"""What tells classes in MONAI's two networks; a backbone does without."""


class Backbone(nn.Module):
    """A CNN of MONAI up to its last map, frozen.

    Args:
        name: One of `BACKBONES`.
        network: MONAI's, with whatever head.
        weights: Where its weights come from, in words.
    """

    def __init__(self, name: str, network: nn.Module, weights: str) -> None:
        super().__init__()
        self.name = name
        self.network = network.eval().requires_grad_(False)
        self.description = f"{name}, {weights}"
        """For every record of what was made with it."""

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """The last feature map.

        Args:
            pixel_values: (n, 3, H, W), as `normalized` makes them.

        Returns:
            (n, C, h, w).
        """
        return _feature_map(self.name, self.network, pixel_values)


def make_network(name: str, num_classes: int) -> nn.Module:
    """MONAI's network in 2D for RGB, with random weights from torch's generator.

    Raises:
        MivpgError: There is no such backbone, or MONAI is not installed.
    """
    if name not in BACKBONES:
        raise MivpgError(f"backbone is {name!r}, expected one of {', '.join(BACKBONES)}.")
    try:
        from monai.networks.nets import DenseNet121, EfficientNetBN
    except ImportError:
        raise MivpgError(f'backbone {name} takes MONAI: pip install "mivpg[baselines]".') from None
    if name == "densenet121":
        return DenseNet121(spatial_dims=2, in_channels=3, out_channels=num_classes)
    network = EfficientNetBN(
        "efficientnet-b3", pretrained=False, spatial_dims=2, in_channels=3, num_classes=num_classes
    )
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            # MONAI counts all channels as a depthwise convolution's fan-out, which is its kernel alone in the original:
            # the signal would shrink below the normalization's epsilon, and hardly train.
            nn.init.normal_(layer.weight, std=math.sqrt(2 / math.prod(layer.kernel_size)))
    return network


def _feature_map(name: str, network: Any, pixel_values: Tensor) -> Tensor:
    """The map (n, C, h, w) that a network's head averages, after its last activation as in Keras."""
    if name == "densenet121":
        return F.relu(network.features(pixel_values))
    maps = network._swish(network._bn0(network._conv_stem(network._conv_stem_padding(pixel_values))))
    maps = network._blocks(maps)
    return network._swish(network._bn1(network._conv_head(network._conv_head_padding(maps))))


def load_backbone(name: str, weights: Path | None = None, seed: int = 0) -> Backbone:
    """A frozen backbone, in evaluation mode.

    Args:
        name: One of `BACKBONES`.
        weights: A safetensors or torch file of the state dict of MONAI's network, with any head or none; None = random.
        seed: Of random weights.

    Raises:
        MivpgError: There is no such backbone, MONAI is not installed, or the file is not of that network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network(name, num_classes=1)
    if weights is None:
        return Backbone(name, network, f"random weights of seed {seed}, never trained")
    state = _read_weights(weights)
    expected = {key: value for key, value in network.state_dict().items() if not key.startswith(HEADS)}
    found = {key: value for key, value in state.items() if not key.startswith(HEADS)}
    for key in expected | found:
        if key not in found or key not in expected:
            which = "lacks" if key not in found else "holds"
            raise MivpgError(f"{weights} {which} {key}, expected the state dict of MONAI's {name}.")
        if found[key].shape != expected[key].shape:
            raise MivpgError(
                f"{weights}: {key} is {tuple(found[key].shape)}, expected {tuple(expected[key].shape)} of MONAI's "
                f"{name}."
            )
    network.load_state_dict(found, strict=False)  # all but the head, which is not used
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    return Backbone(name, network, f"weights of {weights.name} (sha256 {digest}…)")


def _read_weights(weights: Path) -> dict[str, Tensor]:
    remedy = "expected a safetensors or torch file of a state dict"
    if not weights.is_file():
        raise MivpgError(f"{weights} does not exist or is not a file, {remedy}.")
    try:
        if weights.suffix == ".safetensors":
            return load_file(weights)
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise MivpgError(f"{weights} cannot be read, {remedy}: {reason}.") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MivpgError(f"{weights} holds something else than names and tensors, {remedy}.")
    return state


def resized(image: Image.Image, image_size: int) -> Image.Image:
    """Square, by bicubic interpolation; a picture of that size as it is."""
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC)


def normalized(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as (n, 3, H, W), of mean 0 and deviation 1 on ImageNet."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def pool_p3x3(maps: Tensor) -> Tensor:
    """Means of 3 x 3 cells that do not overlap (Keras's AveragePooling2D(3)); cells left over at the far rims are lost.

    Args:
        maps: (n, C, h, w).

    Returns:
        (n, P, C), P = (h // 3) (w // 3), row by row.

    Raises:
        MivpgError: The map has less than 3 cells a side.
    """
    if min(maps.shape[-2:]) < POOL:
        raise MivpgError(
            f"the last map has {maps.shape[-2]} x {maps.shape[-1]} cells, expected at least {POOL} x {POOL} to "
            f"average: image_size of at least {POOL * STRIDE}, and {IMAGE_SIZE} for the nine vectors of p3x3."
        )
    return F.avg_pool2d(maps, POOL).flatten(2).transpose(1, 2)  # (n, P, C)


def backbone_features(
    backbone: Backbone, images: Iterable[Image.Image], *, image_size: int = IMAGE_SIZE, batch_size: int = 16
) -> Tensor:
    """What a backbone says of pictures.

    Args:
        backbone: Runs where its weights are.
        images: RGB, of any size; at least one.
        image_size: To which pixels a side they are resized first.
        batch_size: Pictures at once.

    Returns:
        (n, P, C) float32 on the CPU; 9 vectors a picture at 300 pixels.

    Raises:
        MivpgError: `image_size` is too small.
    """
    device = next(backbone.parameters()).device
    batch: list[Image.Image] = []
    rows = []
    for image in images:
        batch.append(resized(image, image_size))
        if len(batch) == batch_size:
            rows.append(pool_p3x3(backbone(normalized(batch).to(device))).cpu())
            batch = []
    if batch:
        rows.append(pool_p3x3(backbone(normalized(batch).to(device))).cpu())
    return torch.cat(rows)


# ── A store of slides ───────────────────────────────────────────────────────────────────────────────────────────────


def slide_features(
    backbone: Backbone,
    samples: Sequence[Sample],
    folder: Path,
    *,
    image_size: int = IMAGE_SIZE,
    augment: bool = False,
    num_copies: int = 1,
    seed: int = 0,
) -> dict[str, list[Path]]:
    """Runs a backbone once on every patch of every slide, and again for each augmented copy.

    A file is written whole or not at all, and what is there is skipped, so an interrupted run goes on. Each is a
    features file (`mivpg.feature_files`) of (N, P, C), float32.

    Args:
        backbone: Of `load_backbone`.
        samples: Slides with images.
        folder: A new one, or one begun with the same backbone and options; `features.json` in it says which.
        image_size: As in `backbone_features`.
        augment: Whether patches are turned, mirrored and recoloured; every copy otherwise. For training slides only:
            the release does it to those of validation and test, too.
        num_copies: Of each slide; the release has 4. More than one takes `augment`.
        seed: Of the augmentation, which depends on (seed, slide, copy) alone.

    Returns:
        The files of each slide's copies, by its id.

    Raises:
        MivpgError: The folder holds other features, or options do not go together.
        BagError: A slide has no images, or one of them cannot be read.
    """
    if num_copies < 1 or (num_copies > 1 and not augment):
        raise MivpgError(
            f"num_copies is {num_copies} and augment {augment}, expected 1 copy, or several that are augmented."
        )
    made_by: dict[str, Any] = {"backbone": backbone.description, "image_size": image_size, "augment": augment}
    if augment:
        made_by["seed"] = seed
    _claim(folder, made_by)
    files = {
        sample.id: [folder / _name_of_copy(sample.id, copy, augment) for copy in range(num_copies)]
        for sample in samples
    }
    missing = [
        (sample, copy, file) for sample in samples for copy, file in enumerate(files[sample.id]) if not file.exists()
    ]
    for sample, copy, file in tqdm(missing, desc=backbone.description, unit="slide", disable=None):
        with naming(sample):
            check_record(sample)
            if not sample.images:
                raise BagError("no images, expected patches for a backbone to look at.")
            images: Iterable[Image.Image] = map(open_image, sample.images)
            if augment:
                generator = random.Random(f"{seed} {sample.id} {copy} augmentation")
                images = (augment_image(image, generator) for image in images)
            rows = backbone_features(backbone, images, image_size=image_size)  # (N, P, C)
        write_whole(file, save({"image_embeds": rows.contiguous()}))
    return files


def _name_of_copy(slide_id: str, copy: int, augment: bool) -> str:
    name = Path(name_in_store(slide_id))
    return f"{name.stem}-aug{copy}{name.suffix}" if augment else name.name


def _claim(folder: Path, made_by: dict[str, Any]) -> None:
    """Makes the folder, or checks that it was made by the same."""
    file = folder / "features.json"
    remedy = "choose another folder, or delete this one to make its features anew."
    if not file.exists():
        if any(folder.glob("*.safetensors")):
            raise MivpgError(f"{folder} holds features, but no features.json that says what made them; {remedy}")
        write_whole(file, json.dumps(made_by, indent=2) + "\n")  # before the first slide: none is without it
    elif (found := read_json(file)) != made_by:
        raise MivpgError(f"{file}: these features were made with {found}, and {made_by} is asked for; {remedy}")
