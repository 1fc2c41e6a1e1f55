"""The package as it is handed over: wheel and sdist, built without a network, and the files that name its version."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mivpg import __version__

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(what: str, source: Path, out: Path) -> Path:
    """An sdist or a wheel, as pip has setuptools build it."""
    out.mkdir()
    command = [sys.executable, "-c", BUILD, f"build_{what}", out]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def tracked_files() -> list[Path]:
    """What belongs to the project: all but what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("this is no clone, so what belongs to the project is not known")
    return [Path(line) for line in done.stdout.splitlines() if (ROOT / line).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the project; setuptools leaves things behind where it builds."""
    folder = tmp_path_factory.mktemp("source") / "mivpg"
    for file in tracked_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((ROOT / file).read_bytes())
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("dist") / "sdist")


@pytest.fixture(scope="module")
def wheel(source, sdist, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("dist") / "wheel")


def test_the_wheel_has_all_that_the_package_reads(source, wheel):
    files = contents(wheel)
    package = source / "src"
    for file in package.rglob("*"):
        if file.is_file() and "egg-info" not in str(file):
            assert files[str(file.relative_to(package))] == file.read_bytes()
    assert {"mivpg/templates/report.html.jinja", "mivpg/miniature/base_model/model.safetensors"} <= files.keys()
    assert not [name for name in files if not name.startswith(("mivpg/", f"mivpg-{__version__}.dist-info/"))]
    metadata = files[f"mivpg-{__version__}.dist-info/METADATA"].decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert b"mivpg = mivpg.cli:main" in files[f"mivpg-{__version__}.dist-info/entry_points.txt"]


def test_the_sdist_has_the_project_and_builds_the_same_wheel(source, sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    generated = {"PKG-INFO", "setup.cfg"}  # by setuptools
    unpacked = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    project = {file.relative_to(source) for file in source.rglob("*") if file.is_file()}
    ours = {file for file in project if "egg-info" not in str(file) and file.parts[0] != "build"}
    assert {str(file) for file in ours - unpacked} <= {".gitignore"}
    assert {str(file) for file in unpacked - ours if "egg-info" not in str(file)} == generated
    again = build("wheel", folder, tmp_path / "again")
    assert contents(again) == contents(wheel)


def test_the_wheel_captions_without_the_source(wheel, tmp_path):
    """And without writing where it is installed, which an installation of the system forbids."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")  # what installing it does, but for the command's own file
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    command = [sys.executable, "-m", "mivpg.cli", "caption", "photo.png", "--num-beams", "1", "--max-new-tokens", "3"]
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "site"),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    installed = {path: path.stat().st_mtime_ns for path in (tmp_path / "site").rglob("*")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "site").rglob("*")} == installed
    where = subprocess.run(
        [sys.executable, "-c", "import mivpg; print(mivpg.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(tmp_path / "site")


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    releases = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", __version__)
    assert citation["version"] == releases[0] == __version__


def test_the_citation_names_paper_and_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = citation["references"]
    assert paper["url"].endswith("2406.02987") and len(paper["authors"]) == 9
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Source"] and paper["url"] == project["urls"]["Paper"]


def test_what_git_runs_before_a_commit_is_what_check_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    checks = (ROOT / ".ci" / "check").read_text(encoding="utf-8")
    for hook in hooks:
        program = " ".join(word for word in hook["entry"].split() if word != "--fix")
        assert program in checks
