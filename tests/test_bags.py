"""Bags: the order the sampler gives, the reference a bag carries, and what cannot stand in one batch."""

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import BatchSampler, DataLoader

from mivpg.augmentation import augment
from mivpg.bags import (
    Bag,
    BagCollator,
    BagDataset,
    BagSampler,
    Sample,
    assign_splits,
    bag_size,
    check_bags,
    select,
)
from mivpg.errors import BagError, MivpgError

unhurried = settings(deadline=None)  # the machines that run tests have other work, too
sizes_of_bags = st.lists(st.integers(1, 40), max_size=200)
seeds = st.integers(0, 2**32)


def order(sizes: list[int], *, seed: int, block: int, epoch: int = 0) -> list[int]:
    sampler = BagSampler(sizes, seed=seed, block=block)
    sampler.epoch = epoch
    pairs = list(sampler)
    assert {drawn_in for drawn_in, _ in pairs} <= {epoch}
    return [index for _, index in pairs]


def batches(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


# --- the sampler


@unhurried
@given(sizes_of_bags, seeds, st.integers(1, 12), st.integers(0, 3))
def test_an_epoch_holds_every_bag_once(sizes, seed, block, epoch):
    drawn = order(sizes, seed=seed, block=block, epoch=epoch)
    assert sorted(drawn) == list(range(len(sizes))) == list(range(len(BagSampler(sizes, seed=seed, block=block))))


@unhurried
@given(sizes_of_bags, seeds, st.integers(1, 12))
def test_the_order_is_a_function_of_seed_and_epoch(sizes, seed, block):
    sampler = BagSampler(sizes, seed=seed, block=block)
    passes = []
    for epoch in (0, 1, 0):
        sampler.epoch = epoch
        random.seed(epoch + len(passes))  # nothing global is asked
        torch.manual_seed(epoch + len(passes))
        passes.append([index for _, index in sampler])
    assert passes[0] == passes[2] == order(sizes, seed=seed, block=block)
    assert passes[1] == order(sizes, seed=seed, block=block, epoch=1)


def test_seed_and_epoch_change_the_order():
    orders = [order([3] * 50, seed=seed, block=8, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(drawn) for drawn in orders}) == 9


@unhurried
@given(sizes_of_bags, seeds, st.integers(0, 3))
def test_processes_and_accumulation_take_the_same_steps(sizes, seed, epoch):
    """Block 8 as batch 8, as four batches of 2, and as two processes with batch 4, sharded by accelerate itself."""

    def sampler():
        bag_sampler = BagSampler(sizes, seed=seed, block=8)
        bag_sampler.epoch = epoch
        return bag_sampler

    whole = len(sizes) // 8
    one = [sorted(batch) for batch in BatchSampler(sampler(), 8, drop_last=False)]
    accumulated = batches([pair for two in BatchSampler(sampler(), 2, drop_last=False) for pair in two], 8)
    ranks = [
        list(BatchSamplerShard(BatchSampler(sampler(), 4, drop_last=False), 2, rank, even_batches=False))
        for rank in range(2)
    ]
    together = [sorted(first + second) for first, second in zip(*ranks, strict=False)]
    assert one == [sorted(batch) for batch in accumulated]
    assert one[:whole] == together[:whole]


@unhurried
@given(sizes_of_bags, seeds, st.integers(1, 12))
def test_the_incomplete_block_is_last_and_blocks_ascend(sizes, seed, block):
    drawn = batches(order(sizes, seed=seed, block=block), block)
    assert [len(batch) for batch in drawn] == [len(batch) for batch in batches(sizes, block)]
    for batch in drawn:
        assert [sizes[index] for index in batch] == sorted(sizes[index] for index in batch)


@pytest.mark.parametrize("num_bags", [688, 20_000])
def test_little_of_a_batch_is_padding(num_bags):
    """Slides as in PatchGastricADC22: 1 to 1860 patches, 265 on average, batch 8."""
    generator = random.Random(0)
    mean_of_log = math.log(265) - 0.9**2 / 2
    sizes = [min(1860, max(1, round(generator.lognormvariate(mean_of_log, 0.9)))) for _ in range(num_bags)]

    def efficiency(indices: list[int]) -> float:
        return sum(sizes) / sum(max(sizes[i] for i in batch) * len(batch) for batch in batches(indices, 8))

    shuffled = list(range(num_bags))
    generator.shuffle(shuffled)
    assert efficiency(shuffled) < 0.5
    for epoch in range(3):
        drawn = order(sizes, seed=0, block=8, epoch=epoch)
        assert efficiency(drawn) > 0.92
        assert sorted(drawn) == sorted(shuffled)


def test_sorting_leaves_the_order_random():
    """Large bags come early as often as late, the last block is no more of them, and neighbours change."""
    sizes = list(range(100, 504))  # 50 blocks and a rest of 4
    places, in_the_rest, neighbours = [], [], set()
    for epoch in range(200):
        drawn = order(sizes, seed=0, block=8, epoch=epoch)
        places.append(drawn.index(403))
        in_the_rest += drawn[-4:]
        block = next(batch for batch in batches(drawn, 8) if 200 in batch)
        neighbours |= set(block) - {200}
    assert 150 < np.mean(places) < 250
    assert 160 < np.mean(in_the_rest) < 240
    assert len(neighbours) > 20


# --- splits


def test_select():
    samples = [Sample(id=str(split), split=split) for split in ("train", "val", "test", "all", None)]
    chosen = {split: [sample.id for sample in select(samples, split)] for split in ("train", "val", "test", "all")}
    assert chosen == {
        "train": ["train", "all", "None"],
        "val": ["val", "all"],
        "test": ["test", "all"],
        "all": ["train", "val", "test", "all", "None"],
    }
    with pytest.raises(MivpgError, match="split is 'valid', expected one of train, val, test, all"):
        select(samples, "valid")


@unhurried
@given(st.lists(st.integers(0, 9) | st.none(), max_size=80), seeds, st.randoms())
def test_groups_stay_together_whatever_the_order(groups, seed, shuffler):
    samples = [
        Sample(id=f"bag {number}", group=None if group is None else f"group {group}")
        for number, group in enumerate(groups)
    ]
    split = {sample.id: sample.split for sample in assign_splits(samples, seed=seed)}
    of_group: dict[str, set] = {}
    for sample in samples:
        of_group.setdefault(sample.group or sample.id, set()).add(split[sample.id])
    assert all(len(splits) == 1 for splits in of_group.values())

    shuffled = list(samples)
    shuffler.shuffle(shuffled)
    again = assign_splits(shuffled, seed=seed)
    assert {sample.id: sample.split for sample in again} == split
    assert [sample.id for sample in again] == [sample.id for sample in shuffled]


@unhurried
@given(st.integers(0, 1000), seeds)
def test_sizes_of_splits(num_bags, seed):
    splits = Counter(s.split for s in assign_splits([Sample(id=str(i)) for i in range(num_bags)], seed=seed))
    assert splits["train"] == round(0.7 * num_bags)
    assert abs(splits["val"] - 0.1 * num_bags) <= 1
    assert splits.total() == num_bags


def test_a_bag_whose_id_is_a_groups_name_is_not_of_that_group():
    samples = [Sample(id=name) for name in "abcdefgh"] + [Sample(id=f"of {name}", group=name) for name in "abcdefgh"]
    split = {sample.id: sample.split for sample in assign_splits(samples, seed=0)}
    assert any(split[name] != split[f"of {name}"] for name in "abcdefgh")


def test_the_split_of_a_seed_stays_what_it_is():
    """Written down once: a published split must come out the same on every machine and version."""
    samples = [Sample(id=f"B{number:03}") for number in range(20)]
    test = [sample.id for sample in select(assign_splits(samples, seed=1), "test")]
    assert test == ["B002", "B004", "B008", "B018"]
    assert test != [sample.id for sample in select(assign_splits(samples, seed=2), "test")]


# --- opening bags


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def photos(tmp_path) -> tuple[Path, ...]:
    paths = tuple(tmp_path / f"{number}.png" for number in range(3))
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 2), (number, 0, 0)).save(path)
    return paths


def test_a_bag_of_photos(photos):
    sample = Sample(id="a", images=photos, image_coords=((0, 0), (1, 0), (0.5, 2)), captions=("one", "two"))
    bag = BagDataset([sample], prompt="a photo of")[0]
    assert [image.getpixel((0, 0))[0] for image in bag.images] == [0, 1, 2]
    assert bag.image_embeds is None
    assert torch.equal(bag.image_coords, torch.tensor([[0, 0], [1, 0], [0.5, 2]]))
    assert (bag.id, bag.prompt, bag.caption) == ("a", "a photo of", None)
    assert bag_size(sample) == 3


def test_a_bag_of_features(tmp_path, features):
    own = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    save_file({"image_embeds": features}, tmp_path / "bare.safetensors")
    save_file({"image_embeds": features, "coords": own}, tmp_path / "placed.safetensors")
    given_coords = ((5.0, 5.0),) * 3
    samples = [
        Sample(id="a", features=tmp_path / "bare.safetensors", prompt=""),
        Sample(id="b", features=tmp_path / "bare.safetensors", image_coords=given_coords),
        Sample(id="c", features=tmp_path / "placed.safetensors", image_coords=given_coords),
    ]
    bags = [BagDataset(samples, prompt="a photo of")[index] for index in range(3)]
    assert all(bag.images is None and torch.equal(bag.image_embeds, features) for bag in bags)
    assert bags[0].image_coords is None
    assert torch.equal(bags[1].image_coords, torch.tensor(given_coords))
    assert torch.equal(bags[2].image_coords, own)
    assert [bag.prompt for bag in bags] == ["", "a photo of", "a photo of"]  # an empty prompt is one, too


def test_the_reference_is_a_function_of_seed_epoch_and_index(photos):
    references = ("one", "two", "three")
    samples = [Sample(id=str(number), images=photos[:1], captions=references) for number in range(20)]
    dataset = BagDataset(samples, seed=5, training=True)
    keys = [(epoch, index) for epoch in range(6) for index in range(20)]
    drawn = {key: dataset[key].caption for key in keys}
    random.seed(0)
    torch.manual_seed(0)
    for key in reversed(keys):  # in another order, by another data set
        assert BagDataset(samples, seed=5, training=True)[key].caption == drawn[key]
    assert {dataset[index].caption == drawn[0, index] for index in range(20)} == {True}  # an int is epoch 0

    counts = Counter(drawn.values())
    assert set(counts) == set(references)
    assert min(counts.values()) > 20  # of 120
    assert all(len({drawn[epoch, index] for epoch in range(6)}) > 1 for index in range(20))
    other = BagDataset(samples, seed=6, training=True)
    assert [other[key].caption for key in keys] != list(drawn.values())


def test_a_larger_bag_shows_some_of_its_images_in_each_epoch(tmp_path, photos):
    embeds = torch.arange(50.0)[:, None, None].expand(50, 2, 3).contiguous()
    coords = torch.stack([torch.arange(50.0), torch.zeros(50)], dim=1)
    save_file({"image_embeds": embeds, "coords": coords}, tmp_path / "a.safetensors")
    samples = [Sample(id="a", features=tmp_path / "a.safetensors"), Sample(id="b", images=photos)]
    samples.append(Sample(id="c", features=samples[0].features))
    dataset = BagDataset(samples, max_images=8)
    assert dataset.sizes() == [8, 3, 8]
    assert not torch.equal(dataset[0, 2].image_embeds, dataset[0, 0].image_embeds)
    seen = set()
    for epoch in range(40):
        bag = dataset[epoch, 0]
        rows = bag.image_embeds[:, 0, 0]
        assert len(rows) == 8 and torch.equal(rows, rows.unique())  # in their order, each once
        assert torch.equal(bag.image_coords[:, 0], rows)
        assert torch.equal(dataset[epoch, 0].image_embeds, bag.image_embeds)
        seen |= set(rows.tolist())
    assert seen == set(range(50))
    assert len(dataset[0, 1].images) == 3
    few = BagDataset(samples, max_images=2)[5, 1]
    assert len(few.images) == 2
    assert not torch.equal(BagDataset(samples, max_images=8, seed=1)[0, 0].image_embeds, dataset[0, 0].image_embeds)


def test_augmented_images_change_with_the_epoch_alone(photos, tmp_path):
    samples = [Sample(id="a", images=photos, captions=("a chair",))]
    dataset = BagDataset(samples, training=True, augmented=True)
    pixels = {epoch: [np.asarray(image) for image in dataset[epoch, 0].images] for epoch in range(3)}
    again = [np.asarray(image) for image in BagDataset(samples, training=True, augmented=True)[1, 0].images]
    assert all(np.array_equal(a, b) for a, b in zip(again, pixels[1], strict=True))
    plain = [np.asarray(image) for image in BagDataset(samples, training=True)[1, 0].images]
    for one, other in ((pixels[0], pixels[1]), (pixels[1], pixels[2]), (pixels[1], plain)):
        assert not all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    save_file({"image_embeds": torch.zeros(2, 1, 3)}, tmp_path / "a.safetensors")
    features = BagDataset([Sample(id="a", features=tmp_path / "a.safetensors")], augmented=True)
    with pytest.raises(BagError, match=r"a\.safetensors holds features, and augmentation changes images"):
        features[0]


def test_augmentation_stays_within_its_bounds():
    """A picture of one colour: its hue, saturation and brightness are as drawn; corners change places."""
    generator = random.Random(0)
    seen = []
    for _ in range(300):
        pixels = np.asarray(augment(Image.new("RGB", (2, 3), (120, 60, 90)), generator), int)
        assert pixels.min(axis=(0, 1)).tolist() == pixels.max(axis=(0, 1)).tolist()
        seen.append(pixels[0, 0].tolist())
    lightness = [max(pixel) - 120 for pixel in seen]
    assert -52 <= min(lightness) < -40 and 40 < max(lightness) <= 52  # a fifth of white
    spread = [max(pixel) - min(pixel) for pixel in seen]
    assert 47 <= min(spread) < 52 and 68 < max(spread) <= 73  # four to six fifths of 60
    corners = np.zeros((2, 2, 3), np.uint8)
    corners[0, 0], corners[0, 1], corners[1, 0], corners[1, 1] = 60, 100, 140, 180
    orders = set()
    for _ in range(200):
        grey = np.asarray(augment(Image.fromarray(corners), generator))[..., 0]
        orders.add(tuple(grey.ravel().argsort()))
    assert len(orders) == 8  # of a square: four turns, mirrored or not


def test_a_bag_that_cannot_be_opened_is_named(photos, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    samples = [
        Sample(id="bad", images=(photos[0], tmp_path / "bad.png"), captions=("x",)),
        Sample(id="bare", images=photos),
    ]
    with pytest.raises(BagError, match=r"^bag 'bad': .*bad\.png is not a picture"):
        BagDataset(samples)[0]
    with pytest.raises(BagError, match=r"^bag 'bare': no caption, expected at least one to train on"):
        BagDataset(samples, training=True)[1]
    assert BagDataset(samples)[1].caption is None  # to be captioned, it needs none


# --- checking all bags beforehand


def test_a_sound_data_set_passes(photos, tmp_path):
    check_bags([Sample(id=str(number), images=photos[: number + 1], captions=("x",)) for number in range(3)])
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.ones((number + 1, 4)))
    check_bags([Sample(id=str(i), features=tmp_path / f"{i}.npy", captions=("x",)) for i in range(3)])
    check_bags([])


def test_what_would_stop_training_is_found_beforehand(photos, tmp_path):
    np.save(tmp_path / "4.npy", np.ones((2, 4)))
    np.save(tmp_path / "5.npy", np.ones((2, 5)))
    np.save(tmp_path / "patches.npy", np.ones((2, 3, 4)))
    save_file({"image_embeds": torch.ones(2, 4), "coords": torch.ones(2, 2)}, tmp_path / "coords.safetensors")
    as_photos = Sample(id="ok", images=photos, captions=("x",))
    as_features = Sample(id="ok", features=tmp_path / "4.npy", captions=("x",))

    def after(good: Sample, **fields) -> str:
        with pytest.raises(BagError) as error:
            check_bags([good, Sample(id="bad", **{"captions": ("x",), **fields})])
        return str(error.value)

    assert after(as_photos, images=(tmp_path / "no.png",)) == (
        f"bag 'bad': {tmp_path / 'no.png'} does not exist, expected a picture."
    )
    assert after(as_photos) == "bag 'bad': no image, expected at least one (or a slide, or a features file)."
    assert after(as_photos, images=photos, captions=()) == "bag 'bad': no caption, expected at least one to train on."
    assert after(as_photos, images=photos, captions=("x", "\t")).startswith("bag 'bad': an empty caption")
    assert after(as_photos, images=photos, features=tmp_path / "4.npy").startswith("bag 'bad': both images and")
    assert after(as_photos, images=photos, image_coords=((0, 0),)).startswith("bag 'bad': 3 images and 1 coordinates")
    assert after(as_photos, slides=(tmp_path / "a.svs",), image_coords=((0, 0),)).startswith(
        "bag 'bad': slides and coordinates"
    )
    assert after(as_features, features=tmp_path / "no.npy").startswith(f"bag 'bad': {tmp_path / 'no.npy'} does not")
    assert after(as_features, features=tmp_path / "5.npy") == (
        "bag 'ok' has features (N, 1, 4) and bag 'bad' has features (N, 1, 5), expected all bags alike."
    )
    assert "features (N, 3, 4)" in after(as_features, features=tmp_path / "patches.npy")
    assert "(N, 1, 4) with coordinates" in after(as_features, features=tmp_path / "coords.safetensors")
    assert "'ok' has images and bag 'bad' has features" in after(as_photos, features=tmp_path / "4.npy")


# --- the collator


class Recorder:
    """A processor that returns what it was given."""

    def __call__(self, **given):
        return given


def bag(name: str, *, images=None, shape=None, coords=False, caption=None) -> Bag:
    return Bag(
        id=name,
        images=images,
        image_embeds=None if shape is None else torch.ones(shape),
        image_coords=torch.zeros(2, 2) if coords else None,
        prompt=f"prompt of {name}",
        caption=caption,
    )


def test_the_collator_hands_over_pixels():
    pictures = [[Image.new("RGB", (2, 2))], [Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))]]
    bags = [bag(str(i), images=pictures[i], caption=f"caption {i}") for i in range(2)]
    given_ = BagCollator(Recorder(), training=True)(bags)
    assert given_ == {
        "images": pictures,
        "pixel_values": None,
        "image_embeds": None,
        "image_coords": None,
        "text": ["prompt of 0", "prompt of 1"],
        "captions": ["caption 0", "caption 1"],
        "return_tensors": "pt",
    }
    assert BagCollator(Recorder(), training=False)(bags)["captions"] is None


def test_the_collator_hands_over_features():
    bags = [bag("a", shape=(2, 1, 4), coords=True), bag("b", shape=(5, 1, 4), coords=True)]
    given_ = BagCollator(Recorder(), training=False)(bags)
    assert given_["images"] is given_["captions"] is None
    assert [tuple(embeds.shape) for embeds in given_["image_embeds"]] == [(2, 1, 4), (5, 1, 4)]
    assert [tuple(coords.shape) for coords in given_["image_coords"]] == [(2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (bag("b", images=[]), r"bag 'a' has features \(N, 1, 4\) and bag 'b' has images"),
        (bag("b", shape=(2, 1, 5)), r"bag 'a' has features \(N, 1, 4\) and bag 'b' has features \(N, 1, 5\)"),
        (bag("b", shape=(2, 3, 4)), r"features \(N, 1, 4\) and bag 'b' has features \(N, 3, 4\)"),
        (bag("b", shape=(2, 1, 4), coords=True), r"bag 'b' has features \(N, 1, 4\) with coordinates"),
    ],
)
def test_what_cannot_share_a_batch(other, says):
    with pytest.raises(BagError, match=says):
        BagCollator(Recorder(), training=False)([bag("a", shape=(2, 1, 4)), other])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_of_it_together_in_a_data_loader(photos, num_workers):
    samples = [
        Sample(
            id=str(number), images=photos[: number % 3 + 1], captions=tuple(f"{number} {letter}" for letter in "abc")
        )
        for number in range(10)
    ]
    dataset = BagDataset(samples, seed=1, training=True)
    sampler = BagSampler([bag_size(sample) for sample in samples], seed=1, block=4)
    loader = DataLoader(
        dataset,
        batch_size=2,
        sampler=sampler,
        collate_fn=BagCollator(Recorder(), training=True),
        num_workers=num_workers,
    )
    seen = []
    for epoch in range(2):
        sampler.epoch = epoch
        seen.append([caption for batch in loader for caption in batch["captions"]])
        assert seen[-1] == [dataset[pair].caption for pair in sampler]
    assert seen[0] != seen[1]
