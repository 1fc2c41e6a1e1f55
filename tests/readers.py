"""Every reader of a file that somebody hands over, with a small valid file for each: what the fuzzers damage.

`test_fuzz.py` damages them by Hypothesis, `fuzz_coverage.py` by what leads into new lines of code.
"""

import faulthandler
import gzip
import io
import json
import pickle
import random
import signal
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import h5py
import numpy as np
import torch
from cyclopts import CycloptsError, Parameter
from PIL import Image
from safetensors.torch import save

from mivpg.bags import BagDataset
from mivpg.cli import parse
from mivpg.datasets import AboConfig, CocoConfig, DatasetConfig, PatchGastricConfig
from mivpg.datasets.bag_file import BagFileConfig, load_bag_file
from mivpg.datasets.bag_set import read_bag_set
from mivpg.errors import MivpgError
from mivpg.feature_files import features_shape, has_coords, read_features
from mivpg.images import check_image, open_image
from mivpg.slides import TileOptions, find_tiles
from mivpg.training import TrainConfig
from test_slides import pixels_with, write_slide

BAGS = [
    {"id": "sofa-1", "images": ["a/1.png", "a/2.png"], "captions": ["a sofa", "two seats"], "label": "SOFA"},
    {"id": "lamp", "images": ["b.png"], "coords": [[0, 1.5]], "prompt": "a photo of", "group": "g", "label": 7},
    {"id": "slide", "features": "f.safetensors", "captions": ["gland"]},
]
BAGS_CSV = "id,images,captions,label\nsofa-1,a/1.png;a/2.png,a sofa|two seats,SOFA\nlamp,b.png,a lamp,\n"
LISTINGS = [
    {"item_id": "B1", "domain_name": "amazon.com", "main_image_id": "x", "other_image_id": ["y"]}
    | {"product_type": [{"value": "SOFA"}]},
    {"item_id": "B2", "domain_name": "amazon.de", "other_image_id": ["y", "z"], "product_type": "LAMP"},
]
IMAGES_CSV = "image_id,height,width,path\nx,9,9,0/x.jpg\ny,9,9,0/y.jpg\nz,9,9,0/z.jpg\n"
CAPTIONS = {"B1": ["a sofa", "a red sofa"], "B2": ["a lamp"]}
TABLE = "id,subtype,text\ns1,tub1,glands\ns2,por,single cells\n"
COCO = [{"image": "val2014/1.jpg", "caption": ["a cat", "one cat"], "image_id": 1}]
CONFIG = """\
model:
  base: base
  patch_pooling: abmil
  instance_correlation: csa
dataset:
  abo: {root: data, split_seed: 0}
output_dir: run
prompt: a photo of
num_train_epochs: 4
learning_rate: 1.0e-3
bf16: false
validation: {num_beams: 1, max_new_tokens: 64, min_new_tokens: null}
"""
DATASET = "dataset:\n  bag_file: {path: bags.jsonl, split_seed: 3}\n  features: store\n"


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read."""

    valid: Callable[[], bytes]
    """What stands in the file, before it is packed."""
    read: Callable[[Path], Any]
    """Given the file."""
    beside: Callable[[Path], None] = lambda file: None
    """Writes what the reader looks for beside the file."""
    pack: Callable[[bytes], bytes] = bytes
    """From what is damaged within to the file, such as gzip."""
    refusals: tuple[type[Exception], ...] = (MivpgError,)

    def write(self, file: Path) -> Path:
        """A valid file with all that it needs."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.pack(self.valid()))
        self.beside(file)
        return file


def text(content: str) -> Callable[[], bytes]:
    return lambda: content.encode()


def json_lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# ── Data sets ───────────────────────────────────────────────────────────────────────────────────────────────────────


def shop_beside(file: Path) -> None:
    """The other files of Amazon Berkeley Objects, in the folder in which all of this is flat."""
    root = file.parent
    for name, content in {
        "listings/metadata/listings_0.json.gz": gzip.compress(json_lines(LISTINGS), 1),
        "images/metadata/images.csv.gz": gzip.compress(IMAGES_CSV.encode(), 1),
        "captions.json": json.dumps(CAPTIONS).encode(),
    }.items():
        if name != file.name:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)


def read_shop(file: Path, place: str = "") -> None:
    """Puts the file where the data set has it, and reads captions from it where it is one of captions."""
    root = file.parent
    if place:
        (root / place).unlink(missing_ok=True)
        (root / place).symlink_to(file)
        AboConfig(root=root, split="all").load()
    else:
        AboConfig(root=root, captions=file, split="all").load()


def patches_beside(file: Path) -> None:
    (file.parent / "patches_captions").mkdir(exist_ok=True)
    for name in ("s1_0.jpg", "s1_1.jpg", "s2_0.jpg"):
        (file.parent / "patches_captions" / name).touch()


def coco_beside(file: Path) -> None:
    for split in ("val", "test"):
        entry = {"image": f"val2014/{split}.jpg", "caption": ["a dog"]}
        (file.parent / f"coco_karpathy_{split}.json").write_text(json.dumps([entry]))


def bag_set(**arrays: Any) -> dict[str, Any]:
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    return {"x": x, "bag": np.array([0, 0, 1, 1, 2, 2]), "y": np.array([0, 1, 0])} | arrays


def npz(arrays: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def packed_npz(member: bytes) -> bytes:
    """A bag set in which the array x is this file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", member)
        for name in ("bag", "y"):
            archive.writestr(f"{name}.npy", npy(bag_set()[name]))
    return stream.getvalue()


# ── Settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_training(file: Path) -> None:
    def start(config: Annotated[TrainConfig, Parameter(name="*")], *, resume: bool = False) -> None:
        pass

    parse("mivpg train CONFIG.yaml", start, (str(file),))


def read_evaluation(file: Path) -> None:
    def start(*, dataset: DatasetConfig, out: Path) -> None:
        pass

    parse("mivpg evaluate CONFIG.yaml", start, (str(file), "--out", "m.json"), only=("dataset", "validation"))


# ── Pictures, features, slides ──────────────────────────────────────────────────────────────────────────────────────


def picture(kind: str, mode: str = "RGB", **options: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        pixels = random.Random(0).randbytes(9 * 7 * 3)
        stream = io.BytesIO()
        Image.frombytes("RGB", (9, 7), pixels).convert(mode).save(stream, kind, **options)
        return stream.getvalue()

    return make


def animation(kind: str) -> Callable[[], bytes]:
    return picture(kind, save_all=True, append_images=[Image.new("RGB", (9, 7))])


def turned(kind: str) -> Callable[[], bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(kind, exif=exif)


def read_picture(file: Path) -> None:
    check_image(file)
    open_image(file)


def tensors() -> dict[str, torch.Tensor]:
    return {"image_embeds": torch.arange(24.0).reshape(3, 2, 4), "coords": torch.tensor([[0, 0], [8, 0], [0, 8]])}


def hdf5(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip" if np.ndim(array) else None)
    return stream.getvalue()


def torch_file(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def read_stored(file: Path) -> None:
    features_shape(file)
    has_coords(file)
    read_features(file)


def slide() -> bytes:
    """A tiled TIFF that OpenSlide reads as a slide, in part stained."""
    with TemporaryDirectory() as folder:
        return write_slide(Path(folder) / "a.tif", pixels_with((0, 0, 64, 64), size=(128, 64))).read_bytes()


def read_slide(file: Path) -> None:
    for tile in find_tiles(file, TileOptions(size=64))[:4]:
        tile.open()


READERS: dict[str, Reader] = {
    "bags.jsonl": Reader(lambda: json_lines(BAGS), load_bag_file),
    "bags.csv": Reader(text(BAGS_CSV), load_bag_file),
    "drawn.jsonl": Reader(lambda: json_lines(BAGS), lambda file: BagFileConfig(path=file, split_seed=0).load()),
    "opened.jsonl": Reader(lambda: json_lines(BAGS), lambda file: [_open(sample) for sample in load_bag_file(file)]),
    "listings_0.json.gz": Reader(
        lambda: json_lines(LISTINGS),
        lambda file: read_shop(file, "listings/metadata/listings_0.json.gz"),
        shop_beside,
        lambda content: gzip.compress(content, 1),
    ),
    "images.csv.gz": Reader(
        text(IMAGES_CSV),
        lambda file: read_shop(file, "images/metadata/images.csv.gz"),
        shop_beside,
        lambda content: gzip.compress(content, 1),
    ),
    "written.json": Reader(lambda: json.dumps(CAPTIONS).encode(), read_shop, shop_beside),
    "written.csv": Reader(text("item_id,caption\nB1,a sofa\nB2,a lamp\nB1,red\n"), read_shop, shop_beside),
    "written.pkl": Reader(lambda: pickle.dumps(CAPTIONS, 2), read_shop, shop_beside),
    "captions.csv": Reader(
        text(TABLE), lambda file: PatchGastricConfig(root=file.parent, split="all").load(), patches_beside
    ),
    "coco_karpathy_train.json": Reader(
        lambda: json.dumps(COCO).encode(),
        lambda file: CocoConfig(root=file.parent, annotations=file.parent).load(),
        coco_beside,
    ),
    "set.npz": Reader(lambda: npz(bag_set()), read_bag_set),
    "member.npz": Reader(lambda: npy(bag_set()["x"]), read_bag_set, pack=packed_npz),
    "train.yaml": Reader(text(CONFIG), read_training, refusals=(MivpgError, CycloptsError)),
    "evaluate.yaml": Reader(text(DATASET), read_evaluation, refusals=(MivpgError, CycloptsError)),
    "photo.png": Reader(picture("PNG"), read_picture),
    "palette.png": Reader(picture("PNG", "P", transparency=1), read_picture),
    "deep.png": Reader(picture("PNG", "I;16"), read_picture),
    "photo.jpg": Reader(turned("JPEG"), read_picture),
    "cmyk.jpg": Reader(picture("JPEG", "CMYK"), read_picture),
    "moving.gif": Reader(animation("GIF"), read_picture),
    "moving.webp": Reader(animation("WEBP"), read_picture),
    "photo.tif": Reader(turned("TIFF"), read_picture),
    "packed.tif": Reader(picture("TIFF", "CMYK", compression="tiff_lzw"), read_picture),
    "photo.bmp": Reader(picture("BMP"), read_picture),
    "photo.ppm": Reader(picture("PPM"), read_picture),
    "photo.jp2": Reader(picture("JPEG2000"), read_picture),
    "photo.avif": Reader(picture("AVIF"), read_picture),
    "moving.mpo": Reader(animation("MPO"), read_picture),
    "features.safetensors": Reader(lambda: save(tensors()), read_stored),
    "features.npy": Reader(lambda: npy(tensors()["image_embeds"].numpy()), read_stored),
    "features.h5": Reader(
        lambda: hdf5(features=tensors()["image_embeds"][:, 0].numpy(), coords=tensors()["coords"].numpy()), read_stored
    ),
    "features.pt": Reader(
        lambda: torch_file({"features": tensors()["image_embeds"], "coords": tensors()["coords"]}), read_stored
    ),
    "old.pt": Reader(lambda: torch_file(torch.eye(2), _use_new_zipfile_serialization=False), read_stored),
    "slide.tif": Reader(slide, read_slide),
}


def _open(sample: Any) -> None:
    """Opens a bag whose pictures are not there, which has to be said of each."""
    try:
        BagDataset([sample])[0]
    except MivpgError as error:
        assert sample.id in str(error) or repr(sample.id) in str(error)


def problem_with(reader: Reader, file: Path) -> Exception | None:
    """What a reader raises that it should not: any error but ours, and ours where it does not name the file."""
    try:
        reader.read(file)
    except reader.refusals as error:
        if file.name in str(error) and (isinstance(error, CycloptsError) or "\n" not in str(error)):
            return None
        return error
    except Exception as error:
        return error
    return None


SECONDS = 10
"""For one case, on a machine that is busy; a valid file takes a tenth of a second at most."""


class Overdue(BaseException):
    """None that a reader would take for damage, as it would a `TimeoutError`."""


def in_time(work: Callable[[], Any]) -> Any:
    """Ends what takes too long: Python by an alarm, and C, which no alarm reaches, by the end of the process."""

    def stop(*_: Any) -> None:
        raise Overdue(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    try:
        return work()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
