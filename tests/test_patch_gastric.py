"""PatchGastricADC22's table and its flat folder of patches."""

import csv
import os
import subprocess
import sys
from collections import Counter

import pytest

from mivpg.datasets.patch_gastric import PatchGastricConfig, stratified_split
from mivpg.errors import MivpgError

SUBTYPES = {"well": 283, "moderately": 265, "papillary": 135, "mod-to-poor": 81, "poor non-solid": 78}
SUBTYPES |= {"poor solid": 67, "well-to-mod": 61, "signet": 17, "mucinous": 3, "compound": 1}
"""As many slides as the real table has of each."""

ROWS = [(f"{i:032x}", f"subtype {i % 3}", f"Sentence, {i}.") for i in range(12)]


@pytest.fixture
def root(tmp_path):
    def write(rows=ROWS, patches=None, columns=("id", "subtype", "text")):
        with (tmp_path / "captions.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        (tmp_path / "patches_captions").mkdir(exist_ok=True)
        names = [f"{row[0]}_{h}.jpg" for row in rows for h in ("b2", "a1")] if patches is None else patches
        for name in names:
            (tmp_path / "patches_captions" / name).touch()
        return tmp_path

    return write


def test_a_sample_a_slide_with_its_patches(root):
    samples = PatchGastricConfig(root=root()).load()
    assert [s.id for s in samples] == [row[0] for row in ROWS]
    assert samples[3].captions == ("Sentence, 3.",) and samples[3].label == "subtype 0"
    assert [path.name for path in samples[3].images] == [f"{ROWS[3][0]}_a1.jpg", f"{ROWS[3][0]}_b2.jpg"]
    assert all(s.image_coords is None for s in samples)


def test_the_real_numbers_of_slides_give_688_100_203():
    subtypes = {f"{subtype} {i}": subtype for subtype, number in SUBTYPES.items() for i in range(number)}
    splits = stratified_split(subtypes, seed=1)
    assert splits.keys() == subtypes.keys()  # each id once, so in one split
    assert Counter(splits.values()) == {"train": 688, "val": 100, "test": 203}
    of_papillary = Counter(split for slide_id, split in splits.items() if subtypes[slide_id] == "papillary")
    assert of_papillary == {"train": 94, "val": 14, "test": 27}
    assert splits != stratified_split(subtypes, seed=2)


@pytest.mark.slow
def test_the_split_depends_on_neither_hash_seed_nor_order():
    program = (
        "from mivpg.datasets.patch_gastric import stratified_split\n"
        "ids = {f'{i:x}': f'type {i % 7}' for i in range(300)}\n"
        "order = sorted(set(ids), key=hash)\n"
        "print(sorted(stratified_split({i: ids[i] for i in order}, 0).items()))"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "77")
    }
    assert len(answers) == 1


def test_all_is_every_split(root):
    assert {s.split for s in PatchGastricConfig(root=root(), split="all").load()} == {"all"}


def test_other_files_in_the_folder_are_passed_over(root):
    patches = [f"{row[0]}_a.jpg" for row in ROWS]
    assert len(PatchGastricConfig(root=root(patches=[*patches, "README.txt", ".DS_Store"])).load()) == len(ROWS)


def test_a_patch_whose_id_has_no_caption(root):
    with pytest.raises(MivpgError, match=r"patches_captions has 2 patches of 'stranger', and 1 ids in all, that .*csv"):
        PatchGastricConfig(root=root(patches=["stranger_1.jpg", "stranger_2.jpg"])).load()


def test_a_caption_without_patches(root):
    names = [f"{row[0]}_a.jpg" for row in ROWS[2:]]
    with pytest.raises(
        MivpgError, match=rf"captions.csv names '{ROWS[0][0]}', and 2 slides in all, of which .* no patch"
    ):
        PatchGastricConfig(root=root(patches=names)).load()


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ROWS, ("id", "type", "text"), r"has the columns id, type, text, expected id and subtype and text"),
        ([*ROWS, ROWS[0]], ("id", "subtype", "text"), rf"line 14 names '{ROWS[0][0]}' a second time"),
        ([("a", "b", " ")], ("id", "subtype", "text"), r"line 2 lacks an id or a text"),
        ([], ("id", "subtype", "text"), r"has no row"),
    ],
)
def test_tables_that_are_something_else(root, rows, columns, message):
    with pytest.raises(MivpgError, match=message):
        PatchGastricConfig(root=root(rows, [], columns)).load()


def test_a_file_name_without_an_id(root):
    with pytest.raises(MivpgError, match=r"patch.jpg is not named \{id\}_\{hash\}.jpg"):
        PatchGastricConfig(root=root(patches=["patch.jpg"])).load()


def test_missing_table_or_folder(root, tmp_path):
    with pytest.raises(MivpgError, match=r"captions.csv does not exist"):
        PatchGastricConfig(root=tmp_path / "none").load()
    (root(patches=[]) / "patches_captions").rmdir()
    with pytest.raises(MivpgError, match=r"patches_captions cannot be read \(No such file"):
        PatchGastricConfig(root=tmp_path).load()
