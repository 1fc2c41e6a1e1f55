"""Features of one bag in our files and other tools': what was stored comes back, and what is wrong gets one line."""

import math
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mivpg.errors import BagError
from mivpg.feature_files import features_shape, has_coords, read_features

SHARED = Path(__file__).parents[2] / "shared" / "data" / "slide_features"


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


def test_features_come_back_as_they_were(tmp_path, features):
    coords = torch.tensor([[0, 0], [256, 0], [0, 256]])
    save_file({"image_embeds": features, "coords": coords}, tmp_path / "a.safetensors")
    save_file({"image_embeds": features[:, 0].clone()}, tmp_path / "flat.safetensors")
    np.save(tmp_path / "a.npy", features.numpy())
    np.save(tmp_path / "flat.npy", features[:, 0].numpy())
    np.save(tmp_path / "fortran.npy", np.asfortranarray(features.numpy(), dtype=">f8"))
    for name, expected, positions in [
        ("a.safetensors", features, coords.float()),
        ("flat.safetensors", features[:, :1], None),
        ("a.npy", features, None),
        ("flat.npy", features[:, :1], None),
        ("fortran.npy", features, None),
    ]:
        image_embeds, found = read_features(tmp_path / name)
        assert image_embeds.dtype == torch.float32
        assert torch.equal(image_embeds, expected)
        assert found is positions is None or (found.dtype == torch.float32 and torch.equal(found, positions))
        assert features_shape(tmp_path / name) == tuple(expected.shape)


def test_bfloat16_features_become_float32(tmp_path, features):
    save_file({"image_embeds": features.bfloat16()}, tmp_path / "a.safetensors")
    assert torch.equal(read_features(tmp_path / "a.safetensors")[0], features.bfloat16().float())


def test_features_own_their_memory(tmp_path, features):
    np.save(tmp_path / "a.npy", features.numpy())
    image_embeds, _ = read_features(tmp_path / "a.npy")
    image_embeds.zero_()
    assert torch.equal(read_features(tmp_path / "a.npy")[0], features)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def cut(path: Path, num_bytes: int = 4) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def npy(array) -> callable:
    return lambda path: np.save(path, array, allow_pickle=True)


def h5(**arrays) -> callable:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array

    return write


def safetensors(**tensors: torch.Tensor) -> callable:
    return lambda path: save_file(tensors, path)


BAD_FEATURES = {
    "missing.npy": (lambda path: None, "does not exist"),
    "missing.safetensors": (lambda path: None, "does not exist"),
    "folder.npy": (Path.mkdir, "is a folder"),
    "a.pkl": (Path.touch, r"ends in '\.pkl', expected a features file, \.safetensors, \.npy, \.h5 or \.pt"),
    "missing.h5": (lambda path: None, "does not exist"),
    "empty.h5": (Path.touch, "no readable HDF5 file"),
    "cut.h5": (lambda path: (h5(features=np.ones((50, 30)))(path), cut(path)), "no readable HDF5 file"),
    "name.h5": (h5(embeddings=np.ones((2, 3))), "holds embeddings, expected features or feats"),
    "nothing.h5": (h5(), "holds no array, expected features or feats"),
    "integers.h5": (h5(feats=np.ones((2, 3), int)), r"holds torch.int64, expected floating-point"),
    "text.h5": (h5(feats=np.array([[b"a"]])), r"holds \|S1, expected floating-point"),
    "coords.h5": (h5(feats=np.ones((2, 3)), coords=np.ones((3, 2))), r"coords is \(3, 2\), expected \(2, 2\)"),
    "rank4.h5": (h5(feats=np.ones((1, 1, 2, 3))), r"features are \(1, 1, 2, 3\)"),
    "nan.h5": (h5(feats=np.array([[1.0, np.nan]])), "NaN or infinity"),
    "empty.pt": (Path.touch, "no readable .pt file"),
    "code.pt": (lambda path: torch.save({"features": torch.ones(2, 3), "more": Bomb()}, path), "is not run"),
    "pickle.pt": (lambda path: path.write_bytes(pickle.dumps(Bomb())), "is not run"),
    "cut.pt": (
        lambda path: (torch.save(torch.ones(90, 30), path), path.write_bytes(path.read_bytes()[:900])),
        "no read",
    ),
    "name.pt": (lambda path: torch.save({"x": torch.ones(2, 3)}, path), "holds x, expected features or feats"),
    "list.pt": (lambda path: torch.save([1, 2], path), "holds no array"),
    "rank1.pt": (lambda path: torch.save(torch.ones(4), path), r"features are \(4,\)"),
    "integers.pt": (lambda path: torch.save(torch.ones(2, 3).int(), path), r"torch\.int32, expected floating"),
    "empty.npy": (Path.touch, "no readable .npy file"),
    "empty.safetensors": (Path.touch, "no readable safetensors file"),
    "cut.npy": (lambda path: (np.save(path, np.ones((2, 3))), cut(path)), "no readable .npy file"),
    "cut.safetensors": (lambda path: (save_file({"image_embeds": torch.ones(2, 3)}, path), cut(path)), "no readable"),
    "pickle.npy": (lambda path: path.write_bytes(pickle.dumps(Bomb())), "no readable .npy file"),
    "objects.npy": (npy(np.array([Bomb()], dtype=object)), "Python objects"),
    "rank1.npy": (npy(np.ones(4)), r"features are \(4,\), expected \(N, D\) or \(N, P, D\)"),
    "rank4.npy": (npy(np.ones((1, 2, 3, 4))), r"features are \(1, 2, 3, 4\)"),
    "rank1.safetensors": (safetensors(image_embeds=torch.ones(4)), r"features are \(4,\)"),
    "rows.npy": (npy(np.ones((0, 4))), r"features are \(0, 4\), expected"),
    "rows.safetensors": (safetensors(image_embeds=torch.ones(0, 4)), r"features are \(0, 4\), expected"),
    "text.npy": (npy(np.array([["a"]])), "holds <U1, expected floating-point"),
    "integers.npy": (npy(np.ones((2, 3), dtype=np.int64)), "holds torch.int64, expected floating-point"),
    "integers.safetensors": (
        safetensors(image_embeds=torch.ones(2, 3).int()),
        r"torch\.int32, expected floating-point",
    ),
    "nan.npy": (npy(np.array([[1.0, np.nan]])), "NaN or infinity"),
    "overflow.npy": (npy(np.array([[1e300]])), "NaN or infinity"),
    "infinity.safetensors": (safetensors(image_embeds=torch.tensor([[1.0, math.inf]])), "NaN or infinity"),
    "name.safetensors": (safetensors(feats=torch.ones(2, 3)), "holds feats, expected a tensor named image_embeds"),
    "coords.safetensors": (
        safetensors(image_embeds=torch.ones(2, 3), coords=torch.ones(3, 2)),
        r"coords is \(3, 2\), expected \(2, 2\)",
    ),
    "nan_coords.safetensors": (
        safetensors(image_embeds=torch.ones(2, 3), coords=torch.full((2, 2), math.nan)),
        "coords hold NaN",
    ),
}


@pytest.mark.parametrize("name", BAD_FEATURES)
def test_bad_features_get_one_line(tmp_path, name):
    write, says = BAD_FEATURES[name]
    write(tmp_path / name)
    with pytest.raises(BagError, match=says) as error:
        read_features(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("name", ["features", "feats"])
@pytest.mark.parametrize("kind", [".h5", ".pt"])
def test_features_of_other_tools(tmp_path, features, name, kind, leading):
    rows, coords = features[:, 0], torch.tensor([[0, 0], [256, 0], [0, 100_000]])
    stored = {name: rows[None] if leading else rows, "coords": coords[None] if leading else coords, "more": coords}
    path = tmp_path / f"slide{kind}"
    if kind == ".h5":
        h5(**{key: value.numpy() for key, value in stored.items()}, name="text")(path)
    else:
        torch.save(stored, path)
    image_embeds, found = read_features(path)
    assert torch.equal(image_embeds, features[:, :1])
    assert torch.equal(found, coords.float())
    assert features_shape(path) == (3, 1, 4)
    assert has_coords(path)


def test_a_tensor_alone(tmp_path, features):
    torch.save(features[:, 0].half(), tmp_path / "slide.pt")
    assert torch.equal(read_features(tmp_path / "slide.pt")[0], features[:, :1].half().float())
    assert not has_coords(tmp_path / "slide.pt")


def test_big_endian_half_precision(tmp_path, features):
    h5(feats=features[:, 0].numpy().astype(">f2"))(tmp_path / "slide.h5")
    assert torch.equal(read_features(tmp_path / "slide.h5")[0], features[:, :1].half().float())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real features of ../shared/data are not there")
def test_a_real_slides_features():
    image_embeds, coords = read_features(SHARED / "TCGA-AD-6964-01Z-00-DX1.h5")
    assert image_embeds.shape == (777, 1, 512)
    assert coords.shape == (777, 2) and coords[0].tolist() == [10240, 21504]
