"""What a feature store saves: an epoch of the slides miniature, and one image of ViT-g's size.

python benchmarks/stored_features.py [--num-slides 60] [--repeats 5]

Draws the miniature and fills the store in a temporary folder. Then, in turn, an epoch of training steps from pixels and
from the store, and what ViT-g takes for one image (random weights, real size, float32) against reading its features.
Ratios are those of neighbours in time. Prints Markdown.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Blip2VisionConfig, Blip2VisionModel

from mivpg import BagCollator, BagDataset, MivpgForConditionalGeneration, MivpgProcessor
from mivpg.bags import BagSampler, Sample, select
from mivpg.datasets import DatasetConfig
from mivpg.datasets.patch_gastric import PatchGastricConfig
from mivpg.feature_files import read_features
from mivpg.features import extract_features
from mivpg.miniature import BASE_MODEL
from mivpg.miniature.patch_gastric import make_patch_gastric

BATCH_SIZE = 8


def one_epoch(model: MivpgForConditionalGeneration, processor: MivpgProcessor, samples: list[Sample]) -> None:
    """Forward, backward and AdamW on every bag once."""
    dataset = BagDataset(samples, prompt="a photo of", training=True)
    collate = BagCollator(processor, training=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    order = [index for _, index in BagSampler(dataset.sizes(), seed=0, block=BATCH_SIZE)]
    for start in range(0, len(order), BATCH_SIZE):
        batch = collate([dataset[index] for index in order[start : start + BATCH_SIZE]])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(slow: Callable[[], object], fast: Callable[[], object], repeats: int, title: str) -> None:
    """A row: seconds of both, and the ratio of each pair of neighbours."""
    slow(), fast()  # warm
    times = [[seconds(slow), seconds(fast)] for _ in range(repeats)]
    ratios = [one / other for one, other in times]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    print(
        f"| {title} | {medians[0]:.4g} | {medians[1]:.4g} | {statistics.median(ratios):.4g} | "
        f"{min(ratios):.4g} to {max(ratios):.4g} |",
        flush=True,
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-slides", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print("| | from pixels, s | from the store, s | ratio, median | least and most |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        root = make_patch_gastric(Path(folder, "slides"), num_slides=arguments.num_slides)
        config = DatasetConfig(patch_gastric=PatchGastricConfig(root=root))
        model = MivpgForConditionalGeneration.from_pretrained(
            BASE_MODEL, patch_pooling="cls", instance_correlation="csa"
        )
        processor = MivpgProcessor.from_pretrained(BASE_MODEL)
        config.features = Path(folder, "store")
        samples = PatchGastricConfig(root=root).load()
        extract_features(model, processor, samples, config.features, tokens="cls", dtype=torch.float16)
        pixels, stored = select(samples, "train"), select(config.load(), "train")
        number = sum(len(sample.images) for sample in pixels)
        compare(
            lambda: one_epoch(model, processor, pixels),
            lambda: one_epoch(model, processor, stored),
            arguments.repeats,
            f"an epoch of the slides miniature, {len(pixels)} slides, {number} patches",
        )
        vit_g = Blip2VisionModel(Blip2VisionConfig()).eval()
        image = torch.randn(1, 3, 224, 224)
        for title, rows in (("all 257 tokens", 257), ("CLS alone", 1)):
            file = Path(folder, f"{rows}.safetensors")
            save_file({"image_embeds": torch.randn(1, rows, 1408).half()}, file)
            with torch.no_grad():
                compare(
                    lambda: vit_g(pixel_values=image),
                    lambda file=file: read_features(file),
                    arguments.repeats,
                    f"an image of ViT-g's size, {title} ({file.stat().st_size / 1000:.1f} kB)",
                )


if __name__ == "__main__":
    main()
