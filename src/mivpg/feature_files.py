"""Stored features of one bag, in our files and in those of other tools. Nothing is ever unpickled.

    .safetensors   `image_embeds` (N, P, D) or (N, D), optionally `coords` (N, 2): what `extract_features` writes
    .npy           (N, P, D) or (N, D)
    .h5            `features` or `feats`, optionally `coords`: TRIDENT, CLAM and STAMP
    .pt            a tensor, or a dict with `features` or `feats` and optionally `coords`: CLAM

Other tools may put an axis of one before the others. Features without a patch axis get one of P = 1.
"""

# N images of a bag, P patch tokens an image, D vision width

import hashlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mivpg.errors import BagError
from mivpg.files import DAMAGE, check_is_file, check_unpacked, listed

NAMES = ("features", "feats")
"""What other tools call them."""

ERRORS = "errors.jsonl"
"""In a store, what is wrong with each bag that was passed over, `{"id", "error"}`; only where there is one."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What a file holds, unread."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    coords_shape: tuple[int, ...] | None
    read_coords: Callable[[], Tensor] | None


def name_in_store(bag_id: str) -> str:
    """Where a store keeps a bag: its id as far as a file's name can hold it, and a digest that tells all ids apart."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", bag_id).strip("-")[:60]
    digest = hashlib.sha256(bag_id.encode(errors="surrogatepass")).hexdigest()[:16]  # an id may hold half a pair
    return f"{readable}-{digest}.safetensors".lstrip("-")


def features_shape(path: Path) -> tuple[int, int, int]:
    """(N, P, D) of a features file, from its header alone where it has one.

    Raises:
        BagError: As in `read_features`, as far as a header tells.
    """
    with _open(path) as stored:
        return _checked_shape(path, stored)


def has_coords(path: Path) -> bool:
    """Whether a features file holds positions.

    Raises:
        BagError: As in `features_shape`.
    """
    with _open(path) as stored:
        return stored.coords_shape is not None


def read_features(path: Path) -> tuple[Tensor, Tensor | None]:
    """Reads the stored features of one bag.

    Args:
        path: A file of one of the kinds above.

    Returns:
        The features (N, P, D) float32, and the coordinates (N, 2) float32 or None.

    Raises:
        BagError: The file is missing, of another kind, damaged, or holds other shapes, no row, NaN or infinity.
    """
    with _open(path) as stored:
        shape = _checked_shape(path, stored)
        try:
            image_embeds = stored.read()
            if not image_embeds.is_floating_point():
                raise BagError(f"{path} holds {image_embeds.dtype}, expected floating-point features.")
            image_embeds = image_embeds.float().reshape(shape)  # what does not fit becomes infinity
            coords = None if stored.read_coords is None else stored.read_coords().float().reshape(shape[0], 2)
        except (RuntimeError, SafetensorError) as error:  # numbers of four or six bits, and others
            raise _unreadable(path, "features file", error) from None
    if not torch.isfinite(image_embeds).all():
        raise BagError(f"{path}: the features hold NaN or infinity, expected finite numbers.")
    if coords is not None and not torch.isfinite(coords).all():
        raise BagError(f"{path}: coords hold NaN or infinity, expected finite numbers.")
    return image_embeds, coords


def _checked_shape(path: Path, stored: _Stored) -> tuple[int, int, int]:
    shape = stored.shape
    with_patches = (shape[0], 1, shape[1]) if len(shape) == 2 else shape
    if len(with_patches) != 3 or 0 in with_patches:
        raise BagError(f"{path}: features are {shape}, expected (N, D) or (N, P, D) with N, P, D of at least 1.")
    if stored.coords_shape is not None and stored.coords_shape != (shape[0], 2):
        raise BagError(f"{path}: coords is {stored.coords_shape}, expected ({shape[0]}, 2), one x, y an image.")
    return with_patches[0], with_patches[1], with_patches[2]


# ── Kinds of files ──────────────────────────────────────────────────────────────────────────────────────────────────


def _open(path: Path) -> AbstractContextManager[_Stored]:
    openers = {
        ".safetensors": _open_safetensors,
        ".npy": _open_npy,
        ".h5": _open_hdf5,
        ".hdf5": _open_hdf5,
        ".pt": _open_pt,
        ".pth": _open_pt,
    }
    if path.suffix not in openers:
        raise BagError(f"{path} ends in {path.suffix!r}, expected a features file, .safetensors, .npy, .h5 or .pt.")
    check_is_file(path, "stored features", BagError)
    return openers[path.suffix](path)


@contextmanager
def _open_safetensors(path: Path) -> Iterator[_Stored]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, *DAMAGE) as error:
        raise _unreadable(path, "safetensors file", error) from None
    with file:
        names = set(file.keys())
        if "image_embeds" not in names:
            raise BagError(f"{path} holds {listed(sorted(names))}, expected a tensor named image_embeds.")
        with_coords = "coords" in names
        yield _Stored(
            shape=tuple(file.get_slice("image_embeds").get_shape()),
            read=lambda: file.get_tensor("image_embeds"),
            coords_shape=tuple(file.get_slice("coords").get_shape()) if with_coords else None,
            read_coords=(lambda: file.get_tensor("coords")) if with_coords else None,
        )


@contextmanager
def _open_npy(path: Path) -> Iterator[_Stored]:
    """Maps the file into memory, which reads its header only and cannot hold pickled objects."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except DAMAGE as error:
        raise _unreadable(path, ".npy file of numbers", error) from None
    yield _Stored(shape=array.shape, read=lambda: _tensor(path, array), coords_shape=None, read_coords=None)


@contextmanager
def _open_hdf5(path: Path) -> Iterator[_Stored]:
    try:
        import h5py
    except ImportError:
        raise BagError(f"{path} is an HDF5 file, which takes h5py: pip install 'mivpg[slides]'.") from None

    def read(name: str) -> Tensor:
        try:
            _check_is_number(path, arrays[name].dtype)  # before it is read: a text of any length counts as 16 bytes
            check_unpacked(path, arrays[name].nbytes, BagError)
            return _tensor(path, arrays[name][()])
        except BagError:
            raise
        except DAMAGE as error:  # cut short, or compressed by a filter that is not here
            raise _unreadable(path, "HDF5 file", error) from None

    try:
        file = h5py.File(path, "r")
    except DAMAGE as error:
        raise _unreadable(path, "HDF5 file", error) from None
    with file:
        try:
            arrays = _own_arrays(path, file)
        except BagError:
            raise
        except DAMAGE as error:
            raise _unreadable(path, "HDF5 file", error) from None
        yield _of_another_tool(path, {name: array.shape for name, array in arrays.items()}, read)


def _own_arrays(path: Path, file: Any) -> dict[str, Any]:
    """The arrays of an HDF5 file, of which its format allows each to lie in any other file of the machine."""
    import h5py

    if not any(name in file for name in NAMES):
        raise BagError(f"{path} holds {listed(file) or 'no array'}, expected {' or '.join(NAMES)}.")
    arrays = {}
    for name in (*NAMES, "coords"):
        link = file.get(name, getlink=True)
        if link is None:
            continue
        array = None if isinstance(link, h5py.ExternalLink) else file.get(name)
        if not isinstance(array, h5py.Dataset) or array.shape is None:
            raise BagError(f"{path}: {name} is no array of this file, expected one.")
        if array.external or array.is_virtual or array.file != file:
            raise BagError(f"{path}: {name} lies in another file, expected it in this one.")
        arrays[name] = array
    return arrays


@contextmanager
def _open_pt(path: Path) -> Iterator[_Stored]:
    """What torch can load without running code that the file names."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
        else:
            unpacked = 0  # the format of old releases packs nothing
    except DAMAGE as error:
        raise _unreadable(path, ".pt file", error) from None
    check_unpacked(path, unpacked, BagError)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise BagError(
            f"{path} is no .pt file of tensors alone, and what else it holds is not run: {reason}."
        ) from None
    except DAMAGE as error:
        raise _unreadable(path, ".pt file", error) from None
    tensors = content if isinstance(content, dict) else {NAMES[0]: content}
    tensors = {name: value.detach() for name, value in tensors.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
            raise BagError(f"{path}: {name} is {tensor.layout} on {tensor.device}, expected a plain tensor.")
        check_unpacked(path, tensor.numel() * tensor.element_size(), BagError)  # one number can stand for all
    yield _of_another_tool(path, {name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__)


def _of_another_tool(path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> _Stored:
    name = next((name for name in NAMES if name in shapes), None)
    if name is None:
        raise BagError(f"{path} holds {listed(shapes) or 'no array'}, expected {' or '.join(NAMES)}.")
    shape, coords_shape = shapes[name], shapes.get("coords")
    return _Stored(
        shape=_without_first_axis_of_one(shape),
        read=lambda: read(name),
        coords_shape=None if coords_shape is None else _without_first_axis_of_one(coords_shape),
        read_coords=None if coords_shape is None else lambda: read("coords"),
    )


def _without_first_axis_of_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of three axes: some tools store a slide as a batch of one."""
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _tensor(path: Path, array: Any) -> Tensor:
    """A copy of an array of numbers, since torch knows none of the other byte orders and widths."""
    _check_is_number(path, array.dtype)
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):
            return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(array.astype(np.int64))


def _check_is_number(path: Path, dtype: np.dtype) -> None:
    if not np.issubdtype(dtype, np.number):
        raise BagError(f"{path} holds {dtype}, expected floating-point features.")


def _unreadable(path: Path, kind: str, error: Exception) -> BagError:
    return BagError(f"{path} is no readable {kind}: {' '.join(str(error).split())}.")
