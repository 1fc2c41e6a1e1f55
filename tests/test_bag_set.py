"""One `.npz` becomes a set of labelled bags; what is wrong with it gets one line that names the file and the array."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mivpg.datasets.bag_set import read_bag_set
from mivpg.errors import MivpgError

X = np.arange(10, dtype=np.float64).reshape(5, 2) / 4
BAG = np.array(["b", "a", "b", "c", "a"])
GOOD = {"x": X, "bag": BAG, "y": np.array([1, 0, 1])}


def write(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_every_array_arrives(tmp_path):
    path = write(
        tmp_path / "set.npz",
        **GOOD,
        instance_y=np.array([0, 1, 2, 3, 4], dtype=np.int8),
        fold=np.array([7, 8, 9]),
        other=np.zeros(3),
    )
    bag_set = read_bag_set(path)
    assert bag_set.label_names == ["0", "1"]
    assert [bag.id for bag in bag_set.bags] == ["a", "b", "c"]
    assert [bag.label for bag in bag_set.bags] == [1, 0, 1]
    assert [bag.fold for bag in bag_set.bags] == [7, 8, 9]
    for bag, rows in zip(bag_set.bags, ([1, 4], [0, 2], [3]), strict=True):
        assert bag.instances.dtype == torch.float32
        assert torch.equal(bag.instances, torch.tensor(X[rows], dtype=torch.float32))
        assert bag.instance_labels is not None
        assert bag.instance_labels.tolist() == rows


def test_what_is_optional_may_be_left_out(tmp_path):
    for bag in read_bag_set(write(tmp_path / "set.npz", **GOOD)).bags:
        assert bag.instance_labels is None
        assert bag.fold is None


def test_random_bags_come_back_whole(tmp_path):
    """Against a plain loop over rows."""
    rng = np.random.default_rng(0)
    x, bag = rng.normal(size=(200, 3)).astype(np.float32), rng.integers(0, 30, size=200) - 10
    ids = sorted(set(bag.tolist()))
    labels = {number: int(rng.integers(3)) for number in ids}
    y = np.array([labels[number] for number in bag.tolist()])
    bags = read_bag_set(write(tmp_path / "set.npz", x=x, bag=bag, y=y)).bags
    assert [bag.id for bag in bags] == [str(number) for number in ids]
    for read, number in zip(bags, ids, strict=True):
        expected = [row for row, row_bag in zip(x.tolist(), bag.tolist(), strict=True) if row_bag == number]
        assert read.instances.tolist() == expected
        assert read.label == labels[number]


def test_labels_of_rows_and_of_bags_say_the_same(tmp_path):
    of_bags = read_bag_set(write(tmp_path / "bags.npz", **GOOD))
    of_rows = read_bag_set(write(tmp_path / "rows.npz", **GOOD | {"y": np.array([0, 1, 0, 1, 1])}))
    assert [bag.label for bag in of_rows.bags] == [bag.label for bag in of_bags.bags]


def test_labels_that_are_texts_are_numbered_in_sorted_order(tmp_path):
    bag_set = read_bag_set(write(tmp_path / "set.npz", **GOOD | {"y": np.array(["tumour", "normal", "stroma"])}))
    assert bag_set.label_names == ["normal", "stroma", "tumour"]
    assert [bag.label for bag in bag_set.bags] == [2, 0, 1]


@pytest.mark.parametrize("y", [np.array([True, False, True]), np.array([1, 0, 1], dtype=np.uint8)])
def test_other_kinds_of_integers(tmp_path, y):
    bag_set = read_bag_set(write(tmp_path / "set.npz", **GOOD | {"y": y, "x": X.astype(np.int64)}))
    assert bag_set.label_names == ["0", "1"]
    assert [bag.label for bag in bag_set.bags] == [1, 0, 1]
    assert bag_set.bags[0].instances.dtype == torch.float32


def test_bags_of_one_row_each(tmp_path):
    """Labels of bags and of rows have one shape then; where their orders differ, nobody can tell which it is."""
    one_each = {"x": X[:3], "bag": np.array([3, 1, 2])}
    with pytest.raises(MivpgError, match="sort the rows by bag"):
        read_bag_set(write(tmp_path / "set.npz", **one_each, y=np.array([1, 0, 0])))
    in_order = one_each | {"bag": np.array([1, 2, 3])}
    bags = read_bag_set(write(tmp_path / "set.npz", **in_order, y=np.array([1, 0, 0]))).bags
    assert [bag.label for bag in bags] == [1, 0, 0]


WITH_NAN, WITH_INFINITY, TOO_LARGE = X.copy(), X.copy(), X.copy()
WITH_NAN[2, 1], WITH_INFINITY[3, 0], TOO_LARGE[4, 0] = np.nan, -np.inf, 1e300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[:, 0]}, r"x is \(5,\), expected \(n, D\)"),
        ({"x": X[:0], "bag": BAG[:0]}, r"x is \(0, 2\), expected \(n, D\) with n and D of at least 1"),
        ({"x": X.astype(str)}, "x is <U.*, expected numbers"),
        ({"x": X.astype(complex)}, "x is complex128, expected numbers"),
        ({"x": WITH_NAN}, "x of bag 'b' holds NaN or infinity"),
        ({"x": WITH_INFINITY}, "x of bag 'c' holds NaN or infinity"),
        ({"x": TOO_LARGE}, "x of bag 'a' holds NaN or infinity"),
        ({"bag": BAG[:4]}, r"bag is \(4,\), expected \(5,\), one an instance"),
        ({"bag": BAG[:, None]}, r"bag is \(5, 1\), expected \(5,\)"),
        ({"bag": np.arange(5.0)}, "bag is float64, expected integers or texts"),
        ({"y": np.array([1, 0])}, r"y is \(2,\), expected \(3,\), one a bag, or \(5,\)"),
        ({"y": np.array([[1, 0, 1]])}, r"y is \(1, 3\), expected"),
        ({"y": np.array(1)}, r"y is \(\), expected"),
        ({"y": np.array([1.0, 0.0, 1.0])}, "y is float64, expected integers or texts"),
        ({"y": np.array([-1, 1, 1])}, "y holds 2 different integers from -1 to 1, expected 0 to C - 1"),
        ({"y": np.array([0, 2, 2])}, "y holds 2 different integers from 0 to 2, expected 0 to C - 1"),
        ({"y": np.array([0, 1, 1, 0, 1])}, "y of bag 'b' is 0, 1 on different rows.*instance_y"),
        ({"instance_y": np.zeros(3, int)}, r"instance_y is \(3,\), expected \(5,\), one an instance"),
        ({"instance_y": np.zeros(5)}, "instance_y is float64, expected integers"),
        ({"fold": np.zeros(5, int)}, r"fold is \(5,\), expected \(3,\), one a bag"),
        ({"fold": np.array(["a", "b", "c"])}, "fold is <U1, expected integers"),
        ({"x": np.array([[1, "a"]] * 5, dtype=object)}, "x holds Python objects, which are never unpickled"),
        ({"y": np.array([1, "a", None], dtype=object)}, "y holds Python objects, which are never unpickled"),
        ({"fold": np.array([1, None, 2], dtype=object)}, "fold holds Python objects, which are never unpickled"),
    ],
)
def test_what_is_wrong_with_an_array(tmp_path, changes, message):
    path = write(tmp_path / "set.npz", **GOOD | changes)
    with pytest.raises(MivpgError, match=message) as caught:
        read_bag_set(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x", "bag", "y"])
def test_a_missing_array(tmp_path, name):
    path = write(tmp_path / "set.npz", **{other: array for other, array in GOOD.items() if other != name})
    with pytest.raises(MivpgError, match=rf"set\.npz holds .*, expected an array named {name}"):
        read_bag_set(path)


def test_what_is_no_npz_file(tmp_path):
    path = tmp_path / "set.npz"
    with pytest.raises(MivpgError, match=r"set\.npz does not exist, expected a bag set"):
        read_bag_set(path)
    with pytest.raises(MivpgError, match="is a folder, expected a bag set"):
        read_bag_set(tmp_path)
    for content in (b"", b"x,bag,y\n1,2,3\n", b"PK\x03\x04 and no more"):
        path.write_bytes(content)
        with pytest.raises(MivpgError, match=r"set\.npz is no readable \.npz file"):
            read_bag_set(path)
    with path.open("wb") as file:
        np.save(file, X)
    with pytest.raises(MivpgError, match=r"set\.npz is a single array"):
        read_bag_set(path)


def test_a_damaged_array(tmp_path):
    path = write(tmp_path / "set.npz", **GOOD)
    content = bytearray(path.read_bytes())
    content[content.index(X.tobytes()) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(MivpgError, match=r"set\.npz: x is no readable \.npz file.*CRC"):
        read_bag_set(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "1 2 3")
    with pytest.raises(MivpgError, match=r"set\.npz: x is a file of another kind, expected an array"):
        read_bag_set(path)
