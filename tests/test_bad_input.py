"""What a file can do to the one who opens it: lead elsewhere, fill the memory, wait for ever, end in a traceback."""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save

from mivpg import MivpgForConditionalGeneration, MivpgProcessor, files, slides
from mivpg.bags import BagDataset, Sample, check_record
from mivpg.datasets import CocoConfig
from mivpg.datasets.abo import _read_captions
from mivpg.datasets.bag_file import BagFileConfig, load_bag_file
from mivpg.datasets.bag_set import read_bag_set
from mivpg.errors import BagError, MivpgError
from mivpg.feature_files import features_shape, read_features
from mivpg.features import read_slides
from mivpg.files import read_json, read_yaml
from mivpg.images import open_image
from mivpg.miniature import BASE_MODEL
from mivpg.slides import TileOptions, find_tiles, open_slide
from readers import CONFIG, READERS, bag_set, hdf5, in_time, torch_file
from test_slides import REAL, pixels_with, real_slide, write_slide

# ── No file at all ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_not_waited_for(tmp_path, name):
    """A pipe that nobody writes to, a device that never ends, a folder, a link in a circle, nothing."""
    file = READERS[name].write(tmp_path / name)
    file.unlink()
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path), Path.mkdir):
        put(file)
        with pytest.raises(MivpgError) as error:
            in_time(lambda: READERS[name].read(file))
        assert name in str(error.value)
        file.rmdir() if file.is_dir() else file.unlink()
    with pytest.raises(MivpgError, match=rf"{name}.*(does not exist|No such file)"):
        READERS[name].read(file)


# ── Names that lead out of the root ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("field", ["images", "slides", "features"])
@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.png", "a/../../secret.png", "./../secret.png"])
def test_a_bag_file_names_nothing_outside_its_folder(tmp_path, field, name):
    folder = tmp_path / "given"
    folder.mkdir()
    record = {"id": "a", field: name if field == "features" else [name]}
    (folder / "bags.jsonl").write_text(json.dumps(record))
    (folder / "bags.csv").write_text(f"id,{field}\na,{name}\n")
    for file in ("bags.jsonl", "bags.csv"):
        with pytest.raises(MivpgError, match=rf"{file}, line \d: .*leads out of .*given; .*--root") as error:
            load_bag_file(folder / file)
        assert repr(name) in str(error.value)
        assert load_bag_file(folder / file, root=Path("/"))[0].id == "a"
    assert BagFileConfig(path=folder / "bags.jsonl", root=Path("/")).load()[0].id == "a"


def test_a_root_is_what_it_says(tmp_path, monkeypatch):
    """A neighbour whose name begins alike is outside, and so is the file's own folder unless it lies in the root."""
    for folder in ("photos", "photos-of-others", "lists"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "lists" / "bags.jsonl"

    def load(name: str, root: str):
        file.write_text(json.dumps({"id": "a", "images": [name]}))
        return load_bag_file(file, root=tmp_path / root)[0].images[0]

    assert load("../photos/1.png", "photos") == tmp_path / "photos/1.png"
    assert load("../photos/1.png", ".") == tmp_path / "photos/1.png"
    assert load(str(tmp_path / "photos/1.png"), "photos") == tmp_path / "photos/1.png"
    for name in ("../photos-of-others/1.png", "1.png", str(tmp_path / "photos-of-others/1.png")):
        with pytest.raises(MivpgError, match="leads out of"):
            load(name, "photos")
    monkeypatch.chdir(tmp_path / "lists")  # a relative name of the file itself, and a relative root
    file.write_text(json.dumps({"id": "a", "images": ["../photos/1.png"]}))
    with pytest.raises(MivpgError, match="leads out of"):
        load_bag_file(Path("bags.jsonl"))
    assert load_bag_file(Path("bags.jsonl"), root=Path(".."))[0].images == (Path("../photos/1.png"),)


def test_a_link_is_followed_but_nothing_behind_it_is_reached_by_two_dots(tmp_path):
    (tmp_path / "elsewhere" / "photos").mkdir(parents=True)
    (tmp_path / "given").mkdir()
    for name, colour in (("elsewhere/photos/1.png", "red"), ("elsewhere/2.png", "blue"), ("given/2.png", "lime")):
        Image.new("RGB", (1, 1), colour).save(tmp_path / name)
    (tmp_path / "given" / "photos").symlink_to(tmp_path / "elsewhere" / "photos")
    file = tmp_path / "given" / "bags.jsonl"
    file.write_text(json.dumps({"id": "a", "images": ["photos/1.png", "photos/../2.png"]}))
    (sample,) = load_bag_file(file)
    assert [open_image(path).getpixel((0, 0)) for path in sample.images] == [(255, 0, 0), (0, 255, 0)]


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../etc/passwd"])
def test_photos_of_the_public_data_sets_lie_below_their_root(tmp_path, name):
    shop = READERS["images.csv.gz"]
    file = shop.write(tmp_path / "images.csv.gz")
    file.write_bytes(gzip.compress(f"image_id,path\nx,{name}\ny,y.jpg\nz,z.jpg\n".encode()))
    with pytest.raises(MivpgError, match=r"images\.csv\.gz: path '.*passwd' leads out of"):
        shop.read(file)
    coco = READERS["coco_karpathy_train.json"].write(tmp_path / "coco_karpathy_train.json")
    coco.write_text(json.dumps([{"image": name, "caption": ["a"]}]))
    with pytest.raises(MivpgError, match=r"coco_karpathy_train\.json: '.*passwd' leads out of"):
        CocoConfig(root=tmp_path, annotations=tmp_path).load()


def test_an_hdf5_file_reads_no_other(tmp_path):
    """Its format has three ways to keep an array in any file of the machine."""
    secret = np.arange(8, dtype=np.float32).reshape(2, 4)
    (tmp_path / "secret.bin").write_bytes(secret.tobytes())
    (tmp_path / "secret.h5").write_bytes(hdf5(features=secret))
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_dataset("features", (2, 4), "f4", external=[(tmp_path / "secret.bin", 0, 32)])
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["features"] = h5py.ExternalLink(tmp_path / "secret.h5", "features")
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout((2, 4), "f4")
        layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "features", (2, 4))
        file.create_virtual_dataset("features", layout)
    for name in ("raw.h5", "link.h5", "virtual.h5"):
        for read in (read_features, features_shape):
            with pytest.raises(BagError, match=rf"{name}: features (lies in another|is no array of this) file"):
                read(tmp_path / name)
    with h5py.File(tmp_path / "own.h5", "w") as file:  # a second name of an array of its own is nothing strange
        file["somewhere"] = secret
        file["features"] = h5py.SoftLink("/somewhere")
    assert torch.equal(read_features(tmp_path / "own.h5")[0][:, 0], torch.from_numpy(secret))


# ── Files of a few bytes that ask for all the memory there is ───────────────────────────────────────────────────────


LIMIT = 2**22
"""In place of `MAX_UNPACKED`, so that a bomb is made in no time; each unpacks to four times as much."""
PIECES = [bytes(2**20)] * 16


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(files, "MAX_UNPACKED", LIMIT)


def bomb_json(folder: Path) -> Path:
    file = folder / "a.json.gz"
    file.write_bytes(gzip.compress(b"[" + b" " * 2**24 + b"]"))
    return file


def bomb_npz(folder: Path) -> Path:
    file = folder / "a.npz"
    np.savez_compressed(file, **bag_set(x=np.zeros((2**22, 1), np.float32)))
    return file


def claim_npz(folder: Path) -> Path:
    """A header alone, which says 2^50 rows."""
    file = folder / "a.npz"
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**50, 1)}
    with zipfile.ZipFile(file, "w") as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
    return file


def bomb_hdf5(folder: Path) -> Path:
    """An array of which nothing is stored, so that all of it is the fill value: eight terabytes."""
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("features", (2**40, 2), "f4", chunks=(1024, 2))
    return folder / "a.h5"


def bomb_pt(folder: Path) -> Path:
    """One number that stands for all: four terabytes."""
    file = folder / "a.pt"
    file.write_bytes(torch_file({"features": torch.zeros(1, 1).expand(2**20, 2**20)}))
    return file


def bomb_zipped_pt(folder: Path) -> Path:
    """torch writes its archives unpacked, and reads packed ones."""
    file = folder / "a.pt"
    with (
        zipfile.ZipFile(io.BytesIO(torch_file({"features": torch.zeros(4, 2**20)}))) as archive,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    return file


def bomb_yaml(folder: Path) -> Path:
    """A thousand million texts in nine lines."""
    lines = [f"a0: &a0 [{', '.join(['lol'] * 10)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    file = folder / "a.yaml"
    file.write_text("\n".join(lines))
    return file


def bomb_png_comment(folder: Path) -> Path:
    """A long comment in a picture of one pixel."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 2**24, zip=True)
    Image.new("RGB", (1, 1)).save(folder / "a.png", pnginfo=info)
    return folder / "a.png"


@pytest.mark.parametrize(
    ("make", "read", "says"),
    [
        (bomb_json, read_json, "unpacks to"),
        (bomb_npz, read_bag_set, "unpacks to"),
        (claim_npz, read_bag_set, "no readable .npz"),
        (bomb_hdf5, read_features, "unpacks to"),
        (bomb_pt, read_features, "unpacks to"),
        (bomb_zipped_pt, read_features, "unpacks to"),
        (bomb_yaml, read_yaml, "aliases make it longer"),
        (bomb_png_comment, open_image, "cannot be read: .*too large"),
    ],
)
def test_bombs(tmp_path, small_limit, make, read, says):
    file = make(tmp_path)
    assert file.stat().st_size < LIMIT / files.MAX_RATIO
    with pytest.raises(MivpgError, match=says) as error:
        read(file)
    assert str(file) in str(error.value)


def test_a_packed_text_is_read_no_further_than_the_limit(tmp_path, small_limit):
    with pytest.raises(MivpgError) as error:
        read_json(bomb_json(tmp_path))
    unpacked = int(str(error.value).split("unpacks to ")[1].split()[0])
    assert LIMIT < unpacked < LIMIT + 2**18


def test_what_packs_well_and_is_no_bomb_is_read(tmp_path, small_limit):
    """More than the limit, but of a file that is large itself."""
    noise = np.random.default_rng(0).standard_normal((2**18, 4)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=np.tile(noise, (1, 4)), compression="gzip", chunks=(2**10, 16))
    assert read_features(tmp_path / "a.h5")[0].shape == (2**18, 1, 16)
    (tmp_path / "a.json").write_text(json.dumps("a" * 2 * LIMIT))
    assert len(read_json(tmp_path / "a.json")) == 2 * LIMIT  # not packed, so as large as it looks


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"MAX_SIDE": 127}, "128 x 64 pixels, expected at most 127 a side"),
        ({"MAX_SLIDE_PIXELS": 8000}, "128 x 64 pixels, expected at most .* 8000 in all"),
        ({"MAX_TILES": 1}, r"128 x 64 pixels, more than 1 tiles of 64\.0"),
        ({"MAX_PIXELS": 7}, "a small picture of it has more than the 7 pixels"),
    ],
)
def test_slides_that_are_too_large_are_refused_unread(tmp_path, monkeypatch, limits, says):
    file = READERS["slide.tif"].write(tmp_path / "slide.tif")
    READERS["slide.tif"].read(file)
    slides.open_slide.cache_clear()
    for name, value in limits.items():
        monkeypatch.setattr(slides, name, value)
    with pytest.raises(BagError, match=rf"slide\.tif.*{says}"):
        find_tiles(file, TileOptions(size=64))
    slides.open_slide.cache_clear()


def test_a_slide_whose_pixels_are_centimetres(tmp_path):
    write_slide(tmp_path / "a.tif", pixels_with((0, 0, 64, 64), size=(128, 64)), mpp=20_000)
    with pytest.raises(
        BagError, match=r"a\.tif says that a pixel has 20000\.0 microns, which cannot be; give slide_mpp"
    ):
        find_tiles(tmp_path / "a.tif", TileOptions(size=64))


@real_slide
@pytest.mark.parametrize("mpp", [b"0.0000", b"1e-300", b"-0.499"])
def test_a_slide_that_says_nonsense_of_its_pixels(tmp_path, mpp):
    content = REAL.read_bytes()
    assert b"MPP = 0.4990" in content
    (tmp_path / "a.svs").write_bytes(content.replace(b"MPP = 0.4990", b"MPP = " + mpp))
    with pytest.raises(BagError, match=r"a\.svs says that a pixel has .* microns, which cannot be; give slide_mpp"):
        find_tiles(tmp_path / "a.svs", TileOptions())
    assert find_tiles(tmp_path / "a.svs", TileOptions(slide_mpp=0.499))


# ── Found by damaging files ─────────────────────────────────────────────────────────────────────────────────────────

LONG = "1" + "0" * 5000

FOUND = {
    "a number of 5000 digits": ("bags.jsonl", f'{{"id": "a", "label": {LONG}}}', "line 1 is not JSON"),
    "a coordinate beyond float": ("bags.jsonl", '{"id": "a", "coords": [[1e999, 0]]}', "line 1: coords is"),
    "a coordinate of 400 digits": ("bags.jsonl", f'{{"id": "a", "coords": [[{LONG[:400]}, 0]]}}', "line 1: coords is"),
    "a coordinate that is NaN": ("bags.jsonl", '{"id": "a", "coords": [[NaN, 0]]}', "line 1: coords is"),
    "coordinates that are a text": ("bags.jsonl", '{"id": "a", "coords": ["12"]}', "line 1: coords is"),
    "a field twice": ("bags.jsonl", '{"id": "a", "label": "x", "label": "y"}', "'label' stands twice"),
    "digits in captions": ("written.json", f'{{"B1": [{LONG}]}}', "is not JSON"),
    "an item twice": ("written.json", '{"B1": ["a"], "B1": ["b"]}', "'B1' stands twice"),
    "digits in COCO": ("coco_karpathy_train.json", f"[{LONG}]", "is not JSON"),
    "an item_id that is a list": ("listings_0.json.gz", '{"item_id": [], "domain_name": "a"}', "line 1 is no listing"),
    "no product_type in the list": (
        "listings_0.json.gz",
        '{"item_id": "B1", "domain_name": "a", "product_type": []}',
        "line 1 is no listing",
    ),
    "a domain that is none": ("listings_0.json.gz", '{"item_id": "B1", "domain_name": null}', "line 1 is no listing"),
    "a column whose name has two lines": ("written.csv", '"item\nid",caption\n', "has the columns item id, caption"),
    "a field whose name is a line's end": ("evaluate.yaml", 'dataset: {"a\\nb": 1}', "unknown field dataset.a b;"),
    "a list where fields belong": ("evaluate.yaml", "dataset: [{'': null}]", 'Unknown field ""'),
    "an int that is none": ("train.yaml", "seed: !!int x", "no YAML file"),
    "an empty int": ("train.yaml", "seed: !!int ''", "no YAML file"),
    "a bool that is none": ("train.yaml", "bf16: !!bool x", "no YAML file"),
    "a day that is none": ("train.yaml", "prompt: 2001-99-99", "no YAML file"),
    "a time that is none": ("train.yaml", "prompt: !!timestamp x", "no YAML file"),
    "settings in a circle": ("train.yaml", "model: &a {base: *a}", "no YAML file"),
    "a key that is a list": ("train.yaml", "? [a, b]\n: 1", "no YAML file"),
    "nested a thousand deep": ("train.yaml", "a: " + "[" * 3000, "nested more than"),
    "a data file for settings": ("train.yaml", "a: 1\n" * 10**6, "no settings"),
    "a setting twice": ("train.yaml", CONFIG + "output_dir: other\n", "output_dir stands twice"),
}


@pytest.mark.parametrize("what", FOUND)
def test_found(tmp_path, what):
    name, content, says = FOUND[what]
    file = READERS[name].write(tmp_path / name)
    file.write_bytes(READERS[name].pack(content.encode()))
    with pytest.raises(MivpgError, match=says) as error:
        READERS[name].read(file)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_as_windows_writes_them(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\r\nprompt: Stück\r\n", encoding="utf-8-sig")
    assert read_yaml(tmp_path / "a.yaml") == {"seed": 1, "prompt": "Stück"}


def test_anchors_may_be_used_and_overridden(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: &c {<<: *a, x: 4}\nd: {<<: *c}\n")
    ours = read_yaml(tmp_path / "a.yaml")
    assert ours["b"] == {"x": 1, "y": 3} and ours["d"] == ours["c"] == {"x": 4, "y": 2}


STRANGE = {
    "sparse": torch.eye(3).to_sparse(),
    "complex": torch.zeros(2, 2, dtype=torch.complex64),
    "meta": torch.zeros(2, 2, device="meta"),
    "bool": torch.zeros(2, 2, dtype=torch.bool),
    "number": torch.tensor(1.0),
    "empty": torch.zeros(0, 2),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_that_are_no_features(tmp_path, kind):
    (tmp_path / "a.pt").write_bytes(torch_file({"features": STRANGE[kind]}))
    with pytest.raises(BagError, match=r"a\.pt"):
        read_features(tmp_path / "a.pt")


def test_a_parameter_comes_without_its_gradient(tmp_path):
    (tmp_path / "a.pt").write_bytes(torch_file({"features": torch.nn.Parameter(torch.eye(2))}))
    assert not read_features(tmp_path / "a.pt")[0].requires_grad


@pytest.mark.parametrize("shape", [None, (), (0, 4), (2,), (1, 1, 2, 4)])
def test_arrays_of_hdf5_that_are_no_features(tmp_path, shape):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if shape is None:
            file["features"] = h5py.Empty("f4")
        else:
            file["features"] = np.zeros(shape, np.float32)
        file["coords"] = h5py.Empty("f4")
    with pytest.raises(BagError, match=r"a\.h5"):
        read_features(tmp_path / "a.h5")


def test_a_floating_point_type_that_no_machine_has(tmp_path):
    """Found by atheris: h5py learns of it when it is asked how large the array is."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(2**20)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5py.h5d.create(file.id, b"features", kind, h5py.h5s.create_simple((2, 4)))
    with pytest.raises(BagError, match=r"a\.h5 is no readable HDF5 file: Insufficient precision"):
        read_features(tmp_path / "a.h5")


def test_a_bad_name_is_one_bad_bag(tmp_path):
    """Half a surrogate pair, a null byte, too long a name: what JSON can hold and no folder can."""
    names = ["\ud800.png", "a\0.png", "n" * 300 + ".png", ""]
    lines = [
        json.dumps({"id": f"{n}{kind}", kind: [name] if kind == "images" else name + ".npy"})
        for n, name in enumerate(names)
        for kind in ("images", "features")
    ]
    (tmp_path / "bags.jsonl").write_text("\n".join(lines))
    samples = load_bag_file(tmp_path / "bags.jsonl")
    for number, sample in enumerate(samples):
        with pytest.raises(BagError, match=f"^bag '{sample.id}': "):
            BagDataset(samples)[number]


@pytest.mark.parametrize("number", [2**24, 2**32 - 1])
@pytest.mark.parametrize(
    ("code", "num_bytes"), [("}r", 4), ("X", 4), ("\x8b", 4), ("\x8d", 8), ("\x8e", 8), ("\x95", 8), ("\x96", 8)]
)
def test_a_pickle_that_says_it_has_millions_of_objects(tmp_path, code, num_bytes, number):
    """Of 12 bytes; the unpickler in C made room for all of them, and the one in Python for texts and bytes."""
    file = READERS["written.pkl"].write(tmp_path / "written.pkl")
    file.write_bytes(b"\x80\x02" + code.encode("latin-1") + number.to_bytes(num_bytes, "little") + b".")
    tracemalloc.start()
    with pytest.raises(MivpgError, match=r"written\.pkl"):
        READERS["written.pkl"].read(file)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_an_archive_of_several_disks(tmp_path):
    """Python's `is_zipfile` has an error of its own for it."""
    file = READERS["features.pt"].write(tmp_path / "features.pt")
    end = file.read_bytes().rindex(b"PK\x05\x06")
    locator = b"PK\x06\x07" + (1).to_bytes(4, "little") + (0).to_bytes(8, "little") + (9).to_bytes(4, "little")
    file.write_bytes(file.read_bytes()[:end] + locator + file.read_bytes()[end:])
    with pytest.raises(BagError, match=r"features\.pt is no readable \.pt file: .*multiple disks"):
        read_features(file)


@pytest.mark.parametrize("name", ["features.npy", "member.npz"])
def test_an_array_whose_header_is_cut(tmp_path, name):
    """NumPy hands it to Python's tokenizer, which has an error of its own."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,".ljust(118)
    file = READERS[name].write(tmp_path / name)
    file.write_bytes(READERS[name].pack(b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header))
    with pytest.raises(MivpgError, match=f"{name}.* is no readable"):
        READERS[name].read(file)


def test_names_of_several_lines_are_told_in_one(tmp_path):
    np.savez(tmp_path / "a.npz", **{"a\nb": np.zeros(2)})
    (tmp_path / "a.safetensors").write_bytes(save({"a\nb": torch.zeros(2)}))
    (tmp_path / "a.h5").write_bytes(hdf5(**{"a\nb": np.zeros(2)}))
    (tmp_path / "a.pt").write_bytes(torch_file({"a\nb": torch.zeros(2)}))
    for name, read in (("npz", read_bag_set), *((kind, read_features) for kind in ("safetensors", "h5", "pt"))):
        with pytest.raises(MivpgError, match=rf"a\.{name} holds a b, expected") as error:
            read(tmp_path / f"a.{name}")
        assert "\n" not in str(error.value)


def test_merges_within_merges_are_no_bomb(tmp_path):
    lines = [f"a{number}: &a{number} {{<<: [{', '.join([f'*a{number - 1}'] * 10)}]}}" for number in range(1, 10)]
    (tmp_path / "a.yaml").write_text("\n".join(["a0: &a0 {k: 1}", *lines]))
    with pytest.raises(MivpgError, match=r"a\.yaml: .* merges without end"):
        read_yaml(tmp_path / "a.yaml")


def test_what_a_pickle_holds_is_shown_in_short(tmp_path):
    nested = [1]
    for _ in range(9):
        nested = [nested] * 10
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"a": nested}))
    with pytest.raises(MivpgError, match=r"c\.pkl: captions of 'a' are .*, expected a list of texts") as error:
        _read_captions(tmp_path / "c.pkl")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("names", [5, None, [[1]], "B1"])
def test_items_that_are_named_apart(tmp_path, names):
    (tmp_path / "c.json").write_text(json.dumps({"pcs_name": names}))
    with pytest.raises(MivpgError, match=r"c\.json: pcs_name is .*, expected a list of item_ids"):
        _read_captions(tmp_path / "c.json")


def test_a_field_that_stands_twice_is_found_among_many(tmp_path):
    fields = [f'"{number}": 1' for number in range(50_000)]
    (tmp_path / "a.json").write_text("{" + ",".join([*fields, fields[-1]]) + "}")
    with pytest.raises(MivpgError, match="'49999' stands twice"):
        read_json(tmp_path / "a.json")


def test_numbers_that_are_arrays_are_no_features(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", (4, 5), dtype=np.dtype(("f4", (3,))))
    with pytest.raises(BagError, match=r"a\.h5"):
        read_features(tmp_path / "a.h5")


@pytest.mark.parametrize(("dtype", "width"), [("F4", 4), ("F6_E2M3", 4)])
def test_numbers_of_few_bits_are_no_features(tmp_path, dtype, width):
    bits = 2 * 2 * width * int(dtype[1])
    header = json.dumps({"image_embeds": {"dtype": dtype, "shape": [2, 2, width], "data_offsets": [0, bits // 8]}})
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(bits // 8))
    with pytest.raises(BagError, match=r"a\.safetensors"):
        read_features(file)


def test_coordinates_with_an_axis_more(tmp_path):
    torch.save({"features": torch.zeros(4, 128), "coords": torch.zeros(2, 4, 2)}, tmp_path / "a.pt")
    with pytest.raises(BagError, match=r"a\.pt: coords is \(2, 4, 2\), expected \(4, 2\)"):
        read_features(tmp_path / "a.pt")


@pytest.mark.parametrize("texts", [{"prompt": "\ud800"}, {"captions": ("a chair", "a \udfff")}])
def test_half_a_character_costs_its_bag(texts):
    with pytest.raises(BagError, match="half a character"):
        check_record(Sample(id="a", images=(Path("a.png"),), **texts))


@pytest.mark.parametrize(
    ("index", "line"),
    [
        ("a.vms", "[Virtual Microscope Specimen]\nNoLayers=1\nImageFile=../secret/private.jpg"),
        ("a.vmu", "[Uncompressed Virtual Microscope Specimen]\n MapFile = /secret/private.jpg"),
        ("a/Slidedat.ini", "[DATAFILE]\r\nFILE_COUNT = 1\r\nFILE_0 = ../secret.dat\r\n"),
        ("a/Slidedat.ini", "[HIERARCHICAL]\nINDEXFILE = ..\\\\secret.dat"),
    ],
)
def test_a_slide_of_several_files_stays_in_its_folder(tmp_path, index, line):
    """VMS, VMU and MIRAX are lists of names, which OpenSlide would open wherever they lead."""
    pytest.importorskip("openslide")
    file = tmp_path / index
    file.parent.mkdir(exist_ok=True)
    file.write_text(line)
    if file.parent != tmp_path:
        (file := tmp_path / "a.mrxs").touch()
    with pytest.raises(BagError, match=r"names the file .*, expected one in its own folder"):
        open_slide(file)


@pytest.mark.parametrize("made_of", ["{", "[]", '{"slides": 5, "tiles": []}', '{"slides": [["a"]], "tiles": [[1, 2]]}'])
def test_what_a_features_file_says_of_its_slides(tmp_path, made_of):
    content = save({"image_embeds": torch.zeros(2, 4)}, {"made_of": made_of})
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(MivpgError, match=r"a\.safetensors: what it says of its slides"):
        read_slides(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "5"),
        ("tokenizer.json", "{}"),
        ("generation_config.json", "[]"),
        ("processor_config.json", "[]"),
    ],
)
def test_a_damaged_model_folder_is_named(tmp_path, name, content):
    folder = shutil.copytree(BASE_MODEL, tmp_path / "model")
    assert (folder / name).is_file()
    (folder / name).write_text(content)
    with pytest.raises(MivpgError, match=re.escape(str(folder))) as error:
        MivpgProcessor.from_pretrained(folder)
        MivpgForConditionalGeneration.from_pretrained(folder)
    assert "\n" not in str(error.value)
