"""Figure 6 shows what the model looked at in bags that the seed alone chose."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from families import save_blip2
from mivpg import (
    BagCollator,
    BagDataset,
    MivpgError,
    MivpgForConditionalGeneration,
    MivpgProcessor,
    Sample,
    caption_bags,
)
from mivpg.captioning import GenerationOptions
from mivpg.experiments import figure6
from mivpg.experiments.figure6 import look_at_bags
from mivpg.visualization import attention_maps
from tiny import randomize_added_weights

OPTIONS = {"seed": 0, "prompt": "a photo of", "generation": GenerationOptions(num_beams=1, max_new_tokens=6)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model whose every part is drawn."""
    base = save_blip2(tmp_path_factory.mktemp("base"))
    model = MivpgForConditionalGeneration.from_pretrained(base, patch_pooling="abmil", instance_correlation="csa")
    randomize_added_weights(model, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    MivpgProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """Six bags of 1 to 4 photos."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    samples = []
    for bag in range(6):
        images = []
        for photo in range(bag % 4 + 1):
            images.append(folder / f"{bag}-{photo}.png")
            pixels = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 50), Image.Resampling.NEAREST).save(images[-1])
        samples.append(Sample(id=f"bag {bag}", images=tuple(images), captions=("a chair", "a seat"), label="CHAIR"))
    return samples


@pytest.fixture
def quick(monkeypatch) -> None:
    """Drawing takes a second a picture; here the words stand for it."""
    monkeypatch.setattr(figure6, "draw_attention", lambda maps, photos, **words: repr(words).encode())


@pytest.mark.filterwarnings("ignore:Glyph")  # an untrained model writes any character
def test_numbers_are_those_of_the_model(trained, samples):
    bags = look_at_bags(trained, samples, num_bags=2, **OPTIONS)
    model, processor = (kind.from_pretrained(trained) for kind in (MivpgForConditionalGeneration, MivpgProcessor))
    for png, record in bags:
        (sample,) = (sample for sample in samples if sample.id == record["id"])
        assert Image.open(io.BytesIO(png)).format == "PNG"
        assert record["images"] == [str(path) for path in sample.images]
        assert record["references"] == ["a chair", "a seat"]
        bag = BagDataset([sample], prompt="a photo of")[0]
        assert record["caption"] == caption_bags(model, processor, [bag], **OPTIONS["generation"].as_kwargs())[0]
        maps = attention_maps(model, BagCollator(processor, training=False)([bag]))
        expected = {
            "patches": maps.patches[0],
            "combined": maps.combined[0],
            "image_weights": maps.combined[0].sum(dim=1),
            "heads": maps.images[-1, 0],
        }
        for name, weights in expected.items():
            torch.testing.assert_close(torch.tensor(record[name]), weights, atol=1e-5, rtol=0)
        assert maps.patches[0].std() > 1e-3  # the control: not all alike


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_seed_alone_chooses(trained, samples):
    chosen = set()
    for seed in range(4):
        options = OPTIONS | {"seed": seed}
        bags = look_at_bags(trained, samples, num_bags=2, **options)
        assert bags == look_at_bags(trained, samples, num_bags=2, **options)
        chosen.add(tuple(record["id"] for _, record in bags))
    assert len(chosen) > 1


def test_a_bag_without_photos_is_refused(trained, samples, tmp_path):
    stored = [replace(sample, images=(), features=tmp_path / "a.npy") for sample in samples]
    with pytest.raises(MivpgError, match="has no images to draw; load the data set without `features`"):
        look_at_bags(trained, stored, num_bags=1, **OPTIONS)
