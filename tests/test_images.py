"""Pictures as shops have them come out as they look; broken ones are refused with one line that names the file."""

import logging
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mivpg import images
from mivpg.errors import BagError
from mivpg.images import open_image

ABO = Path(__file__).resolve().parents[2] / "shared" / "data" / "abo"


@pytest.fixture
def photo() -> Image.Image:
    """A smooth colour picture, wider than high, so that lossy formats stay near it and a rotation shows."""
    y, x = np.mgrid[0:24, 0:40]
    return Image.fromarray(np.stack([x * 6, y * 10, 255 - x * 3], axis=-1).astype(np.uint8))


def assert_looks_like(image: Image.Image, expected: Image.Image, tolerance: float = 0.0) -> None:
    assert image.mode == "RGB"
    assert image.size == expected.size
    difference = np.abs(np.asarray(image, dtype=float) - np.asarray(expected.convert("RGB"), dtype=float))
    assert difference.max() <= tolerance


def png_of(width: int, height: int, *, bit_depth: int, color_type: int, data: bytes) -> bytes:
    """A PNG such as Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_plain_pictures_are_exact(tmp_path, photo, suffix):
    photo.save(tmp_path / f"a.{suffix}")
    assert_looks_like(open_image(tmp_path / f"a.{suffix}"), photo)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "jp2"])
def test_lossy_pictures_are_near(tmp_path, photo, suffix):
    photo.save(tmp_path / f"a.{suffix}", quality=95)
    assert_looks_like(open_image(tmp_path / f"a.{suffix}"), photo, tolerance=25)


def test_pixels_stay_when_the_file_goes(tmp_path, photo):
    path = tmp_path / "a.png"
    photo.save(path)
    image = open_image(path)
    path.unlink()
    assert_looks_like(image, photo)


def test_cmyk(tmp_path, photo):
    photo.convert("CMYK").save(tmp_path / "a.tif")
    assert_looks_like(open_image(tmp_path / "a.tif"), photo, tolerance=1)


def test_grey_with_alpha_is_laid_on_white(tmp_path):
    Image.new("LA", (3, 2), (0, 51)).save(tmp_path / "a.png")  # black, one fifth opaque
    assert_looks_like(open_image(tmp_path / "a.png"), Image.new("RGB", (3, 2), (204, 204, 204)), tolerance=1)


def test_colour_with_alpha_is_laid_on_white(tmp_path):
    Image.new("RGBA", (3, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert_looks_like(open_image(tmp_path / "a.png"), Image.new("RGB", (3, 2), "white"))


def test_palette_with_transparency_is_laid_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    opened = open_image(tmp_path / "a.png")
    assert [opened.getpixel((0, 0)), opened.getpixel((1, 0))] == [(10, 20, 30), (255, 255, 255)]


def test_one_transparent_colour_is_laid_on_white(tmp_path, photo):
    photo.putpixel((0, 0), (1, 2, 3))
    photo.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_keeps_its_range(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)  # Pillow alone: nearly all white
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    expected = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert_looks_like(open_image(tmp_path / f"a.{suffix}"), expected)


def test_sixteen_bit_colour_keeps_its_range(tmp_path):
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 65535, 32896, 0))
    (tmp_path / "a.png").write_bytes(png_of(1, 1, bit_depth=16, color_type=2, data=pixel))
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_rotation_is_applied(tmp_path, photo, orientation, suffix):
    """What is stored is turned the other way round, so every file shows the same picture."""
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = photo if orientation == 1 else photo.transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    assert_looks_like(open_image(tmp_path / f"a.{suffix}"), photo)


def test_exif_rotation_of_sixteen_bit_grey(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[0, 257, 514]], dtype=np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert np.asarray(open_image(tmp_path / "a.png"))[:, 0, 0].tolist() == [0, 1, 2]


def test_first_frame_of_animations_with_one_warning(tmp_path, photo, caplog, monkeypatch):
    monkeypatch.setattr(images, "_has_warned_of_frames", False)
    for name in ("a.gif", "b.png", "c.webp"):
        photo.save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", photo.size)], lossless=True)
    with caplog.at_level(logging.WARNING):
        for name in ("a.gif", "b.png", "c.webp"):
            # 256 palette entries for a GIF's many colours
            assert_looks_like(open_image(tmp_path / name), photo, tolerance=30 if name == "a.gif" else 0)
    assert len(caplog.records) == 1
    assert "a.gif" in caplog.text


def truncated(path: Path, photo: Image.Image) -> None:
    photo.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("missing.jpg", lambda path, photo: None, "does not exist"),
        ("folder.jpg", lambda path, photo: path.mkdir(), "is a folder"),
        ("empty.jpg", lambda path, photo: path.touch(), "is empty"),
        ("text.jpg", lambda path, photo: path.write_text("<html>404</html>"), "is not a picture"),
        ("cut.jpg", truncated, "cannot be read"),
        ("cut.png", truncated, "cannot be read"),
        ("cut.webp", truncated, "is not a picture|cannot be read"),
        ("magic.png", lambda path, photo: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "is not a picture|cannot be read"),
        ("script.eps", lambda path, photo: photo.save(path), "is EPS, expected one of"),
        ("float.tif", lambda path, photo: photo.convert("F").save(path), "mode F"),
        ("deep.tif", lambda path, photo: Image.new("I", (2, 2), 70_000).save(path), "mode I"),
    ],
)
def test_bad_files_get_one_line(tmp_path, photo, name, write, says):
    path = tmp_path / name
    write(path, photo)
    with pytest.raises(BagError, match=says) as error:
        open_image(path)
    assert str(error.value).count(str(path)) == 1
    assert "\n" not in str(error.value)


def test_a_file_without_permission(tmp_path, photo, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    photo.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(BagError, match=r"a\.png cannot be read: .*Permission denied"):
        open_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the filter of the module
@pytest.mark.parametrize("side", [13_350, 30_000])
def test_decompression_bombs_are_refused_undecoded(tmp_path, side):
    """13,350 squared lies between our limit and Pillow's error; 30,000 squared beyond both."""
    (tmp_path / "bomb.png").write_bytes(png_of(side, side, bit_depth=8, color_type=2, data=b"never decoded"))
    with pytest.raises(BagError, match=r"bomb\.png .*178000000"):
        open_image(tmp_path / "bomb.png")


def test_a_few_bytes_that_ask_for_much_memory_are_refused_undecoded(tmp_path, monkeypatch):
    """A white picture of as many pixels is read where it is kept as photos are."""
    monkeypatch.setattr(images, "SMALL_PIXELS", 1_000)
    white = Image.new("RGB", (2_000, 1_000), "white")
    for suffix in ("bmp", "gif", "jpg", "png", "tif"):
        white.save(tmp_path / f"white.{suffix}")
        assert open_image(tmp_path / f"white.{suffix}").size == (2_000, 1_000)
    white.save(tmp_path / "white.webp", lossless=True)
    with pytest.raises(
        BagError, match=r"white\.webp is \d+ bytes and 2000 x 1000 pixels, at most 1000 or 2000 a byte "
    ):
        open_image(tmp_path / "white.webp")


def test_large_but_allowed_pictures_are_quiet(tmp_path):
    """In a process of its own, as pytest has its own filters of warnings."""
    # above half of the limit, where Pillow warns
    Image.new("1", (9_500, 9_500)).save(tmp_path / "large.png", compress_level=0)
    code = "import sys, pathlib, mivpg.images as i; print(i.open_image(pathlib.Path(sys.argv[1])).size)"
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "large.png"], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("(9500, 9500)", "")


@pytest.mark.skipif(not ABO.is_dir(), reason="the sample of Amazon Berkeley Objects is not beside the project")
def test_real_photos_open():
    paths = sorted(ABO.glob("images/small/*/*.jpg"))
    assert len(paths) == 12
    for path in paths:
        image = open_image(path)
        assert image.mode == "RGB"
        assert max(image.size) == 256
        assert np.asarray(image).std() > 10
