"""A whole set of labelled bags in one `.npz` file, as the classical benchmarks of multiple instance learning are.

    np.savez("musk1.npz", x=x, bag=bag, y=y)

    x            (n, D), numbers: every instance of every bag, a row each
    bag          (n,), integers or texts: which bag a row belongs to
    y            (number of bags,), integers or texts: labels in the order of `np.unique(bag)`; or (n,), the label of
                 each row's bag
    instance_y   (n,), integers: labels of the instances, where known
    fold         (number of bags,), integers: in the order of `np.unique(bag)`, where the source gives folds

Other arrays are not read. Nothing is ever unpickled.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mivpg.errors import MivpgError
from mivpg.files import DAMAGE, check_is_file, check_unpacked, listed

# n instances of the file, D their width


@dataclass
class LabelledBag:
    """One bag with its label."""

    id: str
    instances: Tensor
    """(instances of the bag, D) float32, in the order of the file; (images, P, D) of a bag file's features."""
    label: int
    instance_labels: Tensor | None = None
    """(instances of the bag,) int64."""
    fold: int | None = None
    coords: Tensor | None = None
    """(instances of the bag, 2) x and y, where they are known."""
    group: str | None = None
    """What no cross-validation divides, such as a patient."""


@dataclass
class BagSet:
    """What a file holds."""

    bags: list[LabelledBag]
    """In the order of `np.unique(bag)`; those of a bag file in its order."""
    label_names: list[str]
    """What each label from 0 to C - 1 is called: the texts in sorted order; "0", "1", … where an `.npz` has
    integers."""


def read_bag_set(path: Path) -> BagSet:
    """Reads a file that the module describes.

    Integer labels, which have to be 0 to C - 1, are kept as they are; texts become their place in sorted order.

    Raises:
        MivpgError: The file is missing or no readable `.npz`; an array is missing, holds Python objects or another
            type, or has another shape; integer labels leave one out; a bag has NaN, infinity, or rows with different
            labels.
    """
    arrays = _read_arrays(path)
    x, bag, y = arrays["x"], arrays["bag"], arrays["y"]
    instance_y, fold = arrays.get("instance_y"), arrays.get("fold")

    _check_type(path, "x", x, "iuf", "numbers")
    if x.ndim != 2 or 0 in x.shape:
        raise MivpgError(f"{path}: x is {x.shape}, expected (n, D) with n and D of at least 1.")
    num_instances = len(x)
    _check_type(path, "bag", bag, "iuU", "integers or texts")
    _check_shape(path, "bag", bag, num_instances, "one an instance")
    bag_ids, bag_of_row = np.unique(bag, return_inverse=True)
    in_bags = np.argsort(bag_of_row, kind="stable")
    rows = np.split(in_bags, np.bincount(bag_of_row).cumsum()[:-1])  # of each bag
    _check_type(path, "y", y, "biuU", "integers or texts")
    if instance_y is not None:
        _check_type(path, "instance_y", instance_y, "biu", "integers")
        _check_shape(path, "instance_y", instance_y, num_instances, "one an instance")
    if fold is not None:
        _check_type(path, "fold", fold, "iu", "integers")
        _check_shape(path, "fold", fold, len(bag_ids), "one a bag")

    labels = _labels_of_bags(path, y.astype(np.int64) if y.dtype.kind == "b" else y, bag_ids, rows)
    names, places = np.unique(labels, return_inverse=True)
    if labels.dtype.kind != "U" and (names != np.arange(len(names))).any():
        raise MivpgError(
            f"{path}: y holds {len(names)} different integers from {names[0]} to {names[-1]}, expected 0 to C - 1 "
            "without a gap, or texts."
        )
    with np.errstate(over="ignore"):  # what does not fit becomes infinity, which is found below
        features = torch.from_numpy(x.astype(np.float32))
    instance_labels = None if instance_y is None else torch.from_numpy(instance_y.astype(np.int64))
    bags = []
    for index, bag_id in enumerate(bag_ids):
        instances = features[rows[index]]
        if not instances.isfinite().all():
            raise MivpgError(f"{path}: x of bag {str(bag_id)!r} holds NaN or infinity, expected finite numbers.")
        bags.append(
            LabelledBag(
                id=str(bag_id),
                instances=instances,
                label=int(places[index]),
                instance_labels=None if instance_labels is None else instance_labels[rows[index]],
                fold=None if fold is None else int(fold[index]),
            )
        )
    return BagSet(bags, [str(name) for name in names])


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    check_is_file(path, "a bag set, .npz")
    try:
        file = np.load(path, allow_pickle=False)
    except DAMAGE as error:
        raise _no_npz(path, error) from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise MivpgError(f"{path} is a single array, expected a .npz file with x, bag and y.")
    arrays = {}
    with file:
        assert file.zip is not None
        check_unpacked(path, sum(member.file_size for member in file.zip.infolist()))
        for name in ("x", "bag", "y", "instance_y", "fold"):
            if name in file:
                try:
                    arrays[name] = file[name]
                except DAMAGE as error:
                    if "allow_pickle" in str(error):
                        raise MivpgError(
                            f"{path}: {name} holds Python objects, which are never unpickled; save it as numbers or "
                            "texts of one type."
                        ) from None
                    raise _no_npz(path, error, name) from None
                if not isinstance(arrays[name], np.ndarray):  # a member of the archive that is no array is bytes
                    raise MivpgError(f"{path}: {name} is a file of another kind, expected an array.")
            elif name in ("x", "bag", "y"):
                raise MivpgError(f"{path} holds {listed(file) or 'no array'}, expected an array named {name}.")
    return arrays


def _no_npz(path: Path, error: Exception, name: str | None = None) -> MivpgError:
    where = path if name is None else f"{path}: {name}"
    return MivpgError(f"{where} is no readable .npz file of arrays: {' '.join(str(error).split())}")


def _labels_of_bags(path: Path, y: np.ndarray, bag_ids: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """One label a bag, of `y` in either of its two shapes."""
    num_bags, num_instances = len(bag_ids), sum(map(len, rows))
    if y.shape not in ((num_bags,), (num_instances,)):
        raise MivpgError(f"{path}: y is {y.shape}, expected ({num_bags},), one a bag, or ({num_instances},), its rows.")
    first_of_bag = y[[bag_rows[0] for bag_rows in rows]] if len(y) == num_instances else y
    if num_bags == num_instances:  # both shapes are one
        if (first_of_bag != y).any():
            raise MivpgError(
                f"{path}: y has one label a bag and one a row, as every bag has one row, and the order of the bags is "
                "not that of the rows; sort the rows by bag."
            )
        return y
    if len(y) == num_bags:
        return y
    for bag_id, bag_rows in zip(bag_ids, rows, strict=True):
        if len(different := np.unique(y[bag_rows])) > 1:
            raise MivpgError(
                f"{path}: y of bag {str(bag_id)!r} is {', '.join(map(str, different))} on different rows, expected "
                "one label; labels of instances belong in instance_y."
            )
    return first_of_bag


def _check_type(path: Path, name: str, array: np.ndarray, kinds: str, expected: str) -> None:
    if array.dtype.kind not in kinds:
        raise MivpgError(f"{path}: {name} is {array.dtype}, expected {expected}.")


def _check_shape(path: Path, name: str, array: np.ndarray, length: int, meaning: str) -> None:
    if array.shape != (length,):
        raise MivpgError(f"{path}: {name} is {array.shape}, expected ({length},), {meaning}.")
