"""Karpathy's files of MSCOCO, in the layout in which BLIP-2's authors publish them."""

import json
import random
from itertools import pairwise

import pytest

from mivpg.datasets.coco import CocoConfig
from mivpg.errors import MivpgError

TRAIN = [
    {"caption": f"caption {c} of {i}", "image": f"val2014/COCO_val2014_{i:012d}.jpg", "image_id": f"coco_{i}"}
    for c in range(5)
    for i in range(20)
]
VAL = [
    {"image": f"val2014/COCO_val2014_{i:012d}.jpg", "caption": [f"{c} of {i}" for c in range(5)]} for i in range(30, 33)
]
TEST = [
    {"image": f"val2014/COCO_val2014_{i:012d}.jpg", "caption": [f" {c} of {i}\n" for c in range(6)]}
    for i in range(40, 44)
]


@pytest.fixture
def root(tmp_path):
    def write(train=TRAIN, val=VAL, test=TEST):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        for name, entries in (("train", train), ("val", val), ("test", test)):
            (tmp_path / "annotations" / f"coco_karpathy_{name}.json").write_text(json.dumps(entries))
        return tmp_path

    return write


def pairs_of(samples):
    return {(s.id, caption) for s in samples if s.split == "train" for caption in s.captions}


def test_a_sample_a_picture_with_all_its_captions(root):
    samples = CocoConfig(root=root()).load()
    assert [sum(s.split == split for s in samples) for split in ("train", "val", "test")] == [20, 3, 4]
    first = samples[0]
    assert first.id == "COCO_val2014_000000000000"
    assert first.images == (root() / "val2014" / "COCO_val2014_000000000000.jpg",)
    assert first.captions == tuple(f"caption {c} of 0" for c in range(5))
    assert samples[-1].captions == tuple(f"{c} of 43" for c in range(6))
    assert pairs_of(samples) == {(item["image"][8:-4], item["caption"]) for item in TRAIN}


def test_annotations_may_lie_elsewhere(root, tmp_path):
    folder = root() / "annotations"
    samples = CocoConfig(root=tmp_path / "pictures", annotations=folder).load()
    assert samples[0].images[0].parent == tmp_path / "pictures" / "val2014"


def test_a_subset_has_as_many_pairs_as_asked_and_smaller_ones_lie_in_larger(root):
    sets = [pairs_of(CocoConfig(root=root(), num_train_pairs=n, subset_seed=3).load()) for n in (1, 10, 37, len(TRAIN))]
    assert [len(pairs) for pairs in sets] == [1, 10, 37, 100]
    assert all(small < large for small, large in pairwise(sets))
    assert sets[1] != pairs_of(CocoConfig(root=root(), num_train_pairs=10, subset_seed=4).load())


def test_a_subset_leaves_validation_and_test_whole_and_the_global_generator_alone(root):
    random.seed(1)
    state = random.getstate()
    samples = CocoConfig(root=root(), num_train_pairs=5).load()
    assert random.getstate() == state
    assert [len(s.captions) for s in samples if s.split != "train"] == [5] * 3 + [6] * 4


@pytest.mark.parametrize("number", [0, -1, 101])
def test_more_pairs_than_there_are(root, number):
    with pytest.raises(MivpgError, match=rf"num_train_pairs is {number}, expected 1 to 100, which .*train.json has"):
        CocoConfig(root=root(), num_train_pairs=number).load()


def test_a_picture_in_two_splits(root):
    with pytest.raises(MivpgError, match=r"karpathy_test.json: val2014/COCO_val2014_0+30.jpg is in val, too"):
        CocoConfig(root=root(test=[*TEST, VAL[0]])).load()


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ([], "holds an empty list"),
        ({"annotations": []}, "holds a dict"),
        ([{"image": "a.jpg"}], "entry 0 has no `image` and `caption`"),
        ([VAL[0], {"caption": ["x"]}], "entry 1 has no `image` and `caption`"),
        ([VAL[0], 3], "entry 1 has no"),
        ([{"image": "a.jpg", "caption": []}], "entry 0 has no"),
        ([{"image": "a.jpg", "caption": [None]}], "entry 0: a caption of a.jpg is None"),
        ([{"image": "a.jpg", "caption": "  "}], "entry 0: a caption of a.jpg is '  '"),
    ],
)
def test_files_that_are_something_else(root, val, message):
    with pytest.raises(MivpgError, match=rf"coco_karpathy_val.json.*{message}"):
        CocoConfig(root=root(val=val)).load()


def test_a_missing_file_and_one_that_is_no_json(root, tmp_path):
    (root() / "annotations" / "coco_karpathy_test.json").unlink()
    with pytest.raises(MivpgError, match=r"coco_karpathy_test.json does not exist"):
        CocoConfig(root=tmp_path).load()
    (tmp_path / "annotations" / "coco_karpathy_test.json").write_text("[{")
    with pytest.raises(MivpgError, match=r"coco_karpathy_test.json is not JSON"):
        CocoConfig(root=tmp_path).load()
