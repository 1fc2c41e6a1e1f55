"""The miniature slides: what their patches look like, what their reports say, and the files that hold them."""

import csv
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from generated import contents, interrupt_after
from mivpg.datasets.patch_gastric import PatchGastricConfig, stratified_split
from mivpg.errors import MivpgError
from mivpg.miniature import folders, patch_gastric
from mivpg.miniature.biopsies import (
    CLASSES,
    PATCH_TYPES,
    SUBTYPES,
    claims,
    description,
    draw_mix,
    draw_patch,
    facts_of,
    picture_lesson,
    report,
    right_claims,
    right_of_said,
    text_lesson,
)
from mivpg.miniature.patch_gastric import make_patch_gastric, read_truth


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z-]+", text.lower())


VOCABULARY = set(
    words_of(
        """
    a adenocarcinoma and appear around as between bundles by carcinoma cell cells consistent cores dense densely
    differentiated few fibrous float form fronds fused glands grow in infiltrate inflammation invade irregular
    is layer lie lumens lymphocytes lymphoid mainly moderately mucin mucinous mucosa muscle narrow non-solid of
    one papillary part pools poorly regular remain ring scattered secreted sheets shows signet smooth solid
    stroma the thin to tubular tumor type well which with within without
    """
    )
)


def sentences_for(types: list[str]) -> tuple[str, set[str], set[str]]:
    """From the patches alone, written anew: the diagnosis, what a report has to say, and what it must not say."""
    count = Counter(types)
    tumor = [kind for kind in count if kind not in ("smooth muscle", "lymphocytes", "stroma")]
    main = max(tumor, key=lambda kind: count[kind])
    if main != "mucin pools" and {"regular glands", "fused glands"} <= count.keys():
        diagnosis = "well to moderately differentiated tubular adenocarcinoma"
    elif {"fused glands", "solid sheets"} <= count.keys():
        diagnosis = "moderately to poorly differentiated adenocarcinoma"
    else:
        diagnosis = {
            "regular glands": "well differentiated tubular adenocarcinoma",
            "fused glands": "moderately differentiated tubular adenocarcinoma",
            "papillary fronds": "papillary adenocarcinoma",
            "solid sheets": "poorly differentiated adenocarcinoma, solid type",
            "scattered cells": "poorly differentiated adenocarcinoma, non-solid type",
            "signet ring cells": "signet ring cell carcinoma",
            "mucin pools": "mucinous adenocarcinoma",
        }[main]
    growth = {
        "regular glands": "regular tubular glands",
        "fused glands": "irregular fused glands",
        "papillary fronds": "papillary fronds",
        "solid sheets": "solid sheets",
        "scattered cells": "scattered one by one",
        "signet ring cells": "signet ring cells",
    }
    is_single = {"scattered cells", "signet ring cells"} & count.keys()
    is_glandular = {"regular glands", "fused glands", "papillary fronds"} & count.keys()
    holds = {words: kind in count for kind, words in growth.items()}
    holds |= {
        "pools of mucin": main == "mucin pools",
        "mucin secreted by the glands": main != "mucin pools" and "mucin pools" in count and bool(is_glandular),
        "mucin around the cells": main != "mucin pools" and "mucin pools" in count and not is_glandular,
        "within the mucosa": "smooth muscle" not in count,
        "invade the muscle layer": "smooth muscle" in count and not is_single,
        "infiltrate between the bundles of the muscle layer": "smooth muscle" in count and bool(is_single),
        "inflammation": "lymphocytes" in count and "solid sheets" not in count,
        "lymphoid": "lymphocytes" in count and "solid sheets" in count,
        "mainly": len(set(tumor) - {"mucin pools", main}) > 0,
    }
    return diagnosis, {words for words, holds_ in holds.items() if holds_}, {w for w, h in holds.items() if not h}


def mixes(number: int, **options) -> list[dict[str, int]]:
    return [draw_mix(random.Random(f"mix {index}"), **options) for index in range(number)]


# ── Patches ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def look(image: Image.Image) -> np.ndarray:
    """Colours and their spread, how rough and how dark and white it is, (21,)."""
    pixels = np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC), np.float32) / 255
    red = pixels[..., 0]
    steps = [np.abs(red[gap:] - red[:-gap]).mean() + np.abs(red[:, gap:] - red[:, :-gap]).mean() for gap in (1, 3, 8)]
    histogram = np.histogram(red, bins=8, range=(0, 1))[0] / red.size
    rough = [red.reshape(12, 8, 12, 8).mean(axis=(1, 3)).std(), red.reshape(24, 4, 24, 4).mean(axis=(1, 3)).std()]
    white = [(pixels.min(axis=-1) > 0.85).mean(), (pixels[..., 2] - pixels[..., 1]).mean()]
    return np.array([*pixels.mean((0, 1)), *pixels.std((0, 1)), *steps, *histogram, *rough, *white])


class TestPatches:
    def test_types_can_be_told_apart(self, record_property):
        """By the nearest mean of a few plain figures, which know nothing of how they were drawn."""
        looks = {
            kind: np.stack([look(draw_patch(kind, random.Random(f"{kind} {i}"))) for i in range(30)])
            for kind in PATCH_TYPES
        }
        learnt = np.concatenate([rows[:15] for rows in looks.values()])
        mean, std = learnt.mean(axis=0), learnt.std(axis=0) + 1e-6
        centroids = np.stack([((rows[:15] - mean) / std).mean(axis=0) for rows in looks.values()])
        right = []
        for index, rows in enumerate(looks.values()):
            distances = np.linalg.norm((rows[15:, None] - mean) / std - centroids, axis=-1)
            right += list(distances.argmin(axis=1) == index)
        record_property("patch types mistaken by nearest mean", float(1 - np.mean(right)))
        assert np.mean(right) > 0.95

    @pytest.mark.parametrize("kind", PATCH_TYPES)
    def test_same_seed_same_patch_and_others_differ(self, kind):
        first, again, other = (np.asarray(draw_patch(kind, random.Random(seed)), int) for seed in (1, 1, 2))
        assert (first == again).all()
        assert np.abs(first - other).mean() > 5
        assert first.shape == (128, 128, 3)
        assert np.asarray(draw_patch(kind, random.Random(1), size=64)).shape == (64, 64, 3)

    @pytest.mark.parametrize("kind", PATCH_TYPES)
    def test_colours_of_hematoxylin_and_eosin(self, kind):
        """Never greener than red or blue: pink, purple or white."""
        red, green, blue = np.asarray(draw_patch(kind, random.Random(3)), int).mean(axis=(0, 1))
        assert green < red + 3 and green < blue + 3


# ── Reports ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestReports:
    def test_all_that_a_report_says_is_true(self):
        """Of every subtype, and of all that can be found together."""
        seen: dict[str, set[str]] = {}
        for index, mix in enumerate(mixes(3000, evenly=True)):
            facts = facts_of(mix)
            text = report(facts, random.Random(index))
            diagnosis, said, unsaid = sentences_for([kind for kind, number in mix.items() for _ in range(number)])
            assert diagnosis in text.lower()
            others = {name for name in SUBTYPES if name != diagnosis and name not in diagnosis}
            assert not {name for name in others if name in text.lower()}
            assert all(words in text for words in said)
            assert not any(re.search(rf"\b{words}\b", text) for words in unsaid)
            assert claims(text) == facts and all(right_claims(text, facts).values())
            for name, value in facts.items():
                seen.setdefault(name, set()).add(value)
        assert seen["subtype"] == set(SUBTYPES)
        assert seen["second"] == set(PATCH_TYPES[:6]) | {"none"} and seen["main"] == set(PATCH_TYPES[:7])
        assert {name: len(values) for name, values in seen.items()} == {
            "subtype": 9, "main": 7, "second": 7, "mucin": 3, "invasion": 3, "inflammation": 3,
        }  # fmt: skip

    def test_no_single_patch_is_enough(self):
        """Every type of patch is found in slides with several reports, two diagnoses or more among them."""
        diagnoses: dict[str, set[str]] = {kind: set() for kind in PATCH_TYPES}
        for mix in mixes(1000, evenly=True):
            for kind in mix:
                diagnoses[kind].add(facts_of(mix)["subtype"])
        assert all(len(names) >= 2 for names in diagnoses.values())

    def test_the_mix_decides(self):
        glands = {"regular glands": 5, "mucin pools": 3}
        assert facts_of(glands)["subtype"] == "well differentiated tubular adenocarcinoma"
        assert facts_of(glands | {"mucin pools": 7})["subtype"] == "mucinous adenocarcinoma"
        assert facts_of(glands | {"fused glands": 1})["subtype"].startswith("well to moderately")
        assert facts_of({"solid sheets": 3, "smooth muscle": 1})["invasion"] == "muscle invaded"
        single = {"solid sheets": 3, "smooth muscle": 1, "scattered cells": 1}
        assert facts_of(single)["invasion"] == "muscle infiltrated"
        single = {"signet ring cells": 3, "mucin pools": 1}
        assert facts_of(single)["mucin"] == "around cells"
        assert facts_of(single | {"regular glands": 1})["mucin"] == "from glands"

    def test_usual_wording(self):
        mix = {"fused glands": 5, "mucin pools": 1, "papillary fronds": 2, "lymphocytes": 3, "stroma": 9}
        assert report(facts_of(mix)) == (
            "Tumor cells mainly form irregular fused glands and in part form papillary fronds, with mucin secreted by "
            "the glands, and remain within the mucosa, with inflammation of the stroma, consistent with moderately "
            "differentiated tubular adenocarcinoma."
        )

    def test_in_the_manner_of_a_report(self):
        lengths = []
        for index, mix in enumerate(mixes(1000)):
            text = report(facts_of(mix), random.Random(index))
            assert re.fullmatch(r"[A-Z][^.]+\.( [A-Z][^.]+\.)?", text) and text.isascii()
            assert not re.search(r"  | ,|,,", text)
            lengths.append(len(text.split()))
        assert min(lengths) >= 4 and max(lengths) <= 45 and 17 < np.mean(lengths) < 24

    def test_many_reports_are_alike(self, record_property):
        """As in the real data, where 155 to 167 of 203 test captions stand verbatim in the training split."""
        facts = {str(index): facts_of(mix) for index, mix in enumerate(mixes(300))}
        texts = {index: report(f, random.Random(f"report {index}")) for index, f in facts.items()}
        splits = stratified_split({index: f["subtype"] for index, f in facts.items()}, 0)
        training = {texts[index] for index, split in splits.items() if split == "train"}
        verbatim = np.mean([texts[index] in training for index, split in splits.items() if split == "test"])
        record_property("share of test reports verbatim in training, of 300 slides", float(verbatim))
        assert 0.55 < verbatim < 0.9
        assert 60 < len(set(texts.values())) < 180

    @pytest.mark.parametrize("mean_patches", [5, 30, 300])
    def test_numbers_of_patches(self, mean_patches):
        numbers = [sum(mix.values()) for mix in mixes(500, mean_patches=mean_patches)]
        assert min(numbers) == 5 if mean_patches < 300 else max(numbers) == 300
        assert all(5 <= number <= 300 for number in numbers)
        if mean_patches == 30:
            assert 25 < np.mean(numbers) < 35 and np.median(numbers) < np.mean(numbers)
        assert all(min(mix.values()) >= 1 for mix in mixes(500, mean_patches=mean_patches))

    def test_subtypes_are_as_unequal_as_in_the_real_data(self):
        counts = Counter(facts_of(mix)["subtype"] for mix in mixes(1000))
        assert counts["well differentiated tubular adenocarcinoma"] > 200 > 60 > counts["signet ring cell carcinoma"]

    @pytest.mark.parametrize(
        ("text", "read"),
        [
            ("", {}),
            ("a red chair.", {}),
            (
                "Papillary adenocarcinoma.",
                {"subtype": "papillary adenocarcinoma", "second": "none", "mucin": "none", "inflammation": "none"},
            ),
            (
                "cells grow in solid sheets and  irregular fused glands with a dense lymphoid stroma",
                {
                    "main": "solid sheets",
                    "second": "fused glands",
                    "mucin": "none",
                    "inflammation": "lymphoid stroma",
                },
            ),
        ],
    )
    def test_reads_what_a_model_may_write(self, text, read):
        assert claims(text) == read


# ── Lessons ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestLessons:
    def test_texts(self):
        lessons = [text_lesson(random.Random(index)) for index in range(3000)]
        vocabulary = {word for lesson in lessons for word in words_of(" ".join([*lesson.keywords, lesson.text]))}
        assert vocabulary == VOCABULARY
        assert 0.88 < np.mean([bool(lesson.keywords) for lesson in lessons]) < 0.92
        assert 0.62 < np.mean(["subtype" in claims(lesson.text) for lesson in lessons]) < 0.68
        assert lessons[7] == text_lesson(random.Random(7))

    def test_a_report_follows_from_its_keywords(self):
        texts: dict[tuple[str, ...], set[str]] = {}
        for index in range(3000):
            lesson = text_lesson(random.Random(index))
            if lesson.keywords and "subtype" in claims(lesson.text):
                texts.setdefault(tuple(sorted(lesson.keywords)), set()).add(json.dumps(claims(lesson.text)))
        assert len(texts) > 100 and all(len(read) == 1 for read in texts.values())

    def test_pictures(self):
        seen = Counter()
        for index in range(200):
            lesson = picture_lesson(random.Random(index))
            assert lesson.pixels.shape == (96, 96, 3) and lesson.pixels.dtype == np.uint8
            assert lesson.keywords == [] and lesson.classes == {f"patch {lesson.facts['type']}"} <= set(CLASSES)
            assert right_of_said(lesson.text, lesson.facts) == {"type": True}
            assert set(words_of(lesson.text)) <= VOCABULARY
            seen[lesson.facts["type"]] += 1
        assert seen.keys() == set(PATCH_TYPES)

    def test_a_description_never_gives_a_diagnosis(self):
        for kind in PATCH_TYPES:
            for index in range(20):
                text = description(kind, random.Random(index))
                assert "subtype" not in claims(text) and "carcinoma" not in text and "differentiated" not in text
                assert "inva" not in text and "infiltrate" not in text and "mainly" not in text
                for other in PATCH_TYPES:
                    assert right_of_said(text, {"type": other}) == {"type": other == kind}

    @pytest.mark.parametrize("text", ["", "a red chair.", "Tumor cells.", "muscle"])
    def test_what_names_no_type_is_not_judged(self, text):
        assert right_of_said(text, {"type": "stroma"}) == {}


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────

OPTIONS = {"num_slides": 5, "mean_patches": 7, "seed": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides") / "new" / "folder"
    assert make_patch_gastric(folder, **OPTIONS) == folder
    return folder


def in_this_process(function, items, *, chunksize):
    yield from map(function, items)


class TestFiles:
    def test_same_seed_same_bytes_in_one_process_or_many(self, root, tmp_path, monkeypatch):
        monkeypatch.setattr(folders, "in_processes", in_this_process)
        make_patch_gastric(tmp_path, **OPTIONS)
        assert contents(tmp_path) == contents(root)
        names = {name for name in contents(root) if not name.startswith("patches_captions/")}
        assert names == {"captions.csv", "truth.json", "miniature.json"}

    def test_more_slides_begin_with_the_same(self, root, tmp_path):
        make_patch_gastric(tmp_path, **OPTIONS | {"num_slides": 6})
        assert read_truth(tmp_path)[:-1] == read_truth(root)

    def test_another_seed_other_slides(self, root, tmp_path):
        make_patch_gastric(tmp_path, **OPTIONS | {"seed": 1})
        here, there = read_truth(root), read_truth(tmp_path)
        assert not {slide.id for slide in here} & {slide.id for slide in there}
        kinds = [[Counter(slide.patches.values()) for slide in slides] for slides in (here, there)]
        assert all(one != other for one, other in zip(*kinds, strict=True))

    def test_reader_finds_what_is_true(self, root):
        with (root / "captions.csv").open(newline="") as file:
            assert next(csv.reader(file)) == ["id", "subtype", "text"]
        samples, slides = PatchGastricConfig(root=root).load(), read_truth(root)
        assert [sample.id for sample in samples] == [slide.id for slide in slides]
        for sample, slide in zip(samples, slides, strict=True):
            assert re.fullmatch(r"[0-9a-f]{32}", sample.id)
            assert [path.name for path in sample.images] == list(slide.patches)
            assert 5 <= len(sample.images) <= 300
            assert sample.captions == (slide.caption,)
            diagnosis, said, _ = sentences_for(list(slide.patches.values()))
            assert sample.label is not None and sample.label.lower() == diagnosis == slide.facts["subtype"]
            assert diagnosis in slide.caption.lower() and all(words in slide.caption for words in said)
            assert slide.facts == facts_of(Counter(slide.patches.values())) == claims(slide.caption)
            for path in sample.images:
                with Image.open(path) as image:
                    image.load()
                    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (128, 128))

    def test_file_names_do_not_give_the_types_away(self, tmp_path, monkeypatch):
        """Files stand in the order of their hashes, in which like types are not together."""
        monkeypatch.setattr(patch_gastric, "draw_patch", lambda kind, generator: Image.new("RGB", (4, 4)))
        (tmp_path / "patches_captions").mkdir()
        changes, expected = 0.0, 0.0
        for index in range(20):
            kinds = list(patch_gastric._make_slide(tmp_path, 0, 30, index)["patches"].values())
            changes += sum(a != b for a, b in pairwise(kinds))
            shares = np.array(list(Counter(kinds).values())) / len(kinds)
            expected += len(kinds) * (1 - (shares**2).sum())
        assert 0.85 < changes / expected < 1.15

    @pytest.mark.parametrize("after", [(0,), (3,), (2, 2), (OPTIONS["num_slides"],)])
    def test_interrupted_and_gone_on_with(self, root, tmp_path, monkeypatch, after):
        """Once or twice, after so many slides each."""
        monkeypatch.setattr(folders, "in_processes", in_this_process)
        unfinished = tmp_path / "records.partial.jsonl"
        for number in after:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                interrupt_after(patch, number)
                make_patch_gastric(tmp_path, **OPTIONS)
            assert not (tmp_path / "miniature.json").exists() and not (tmp_path / "captions.csv").exists()
            with unfinished.open("a") as file:  # and as if it was killed while it wrote
                file.write('{"index": 4, "record": {"id": "0123')
        assert len(unfinished.read_text().splitlines()) == 1 + sum(after) + 1
        patch_file = next((tmp_path / "patches_captions").glob("*.jpg"), tmp_path / "patches_captions" / "a_b.jpg")
        patch_file.with_suffix(".partial").write_bytes(b"half a patch")
        make_patch_gastric(tmp_path, **OPTIONS)
        patch_file.with_suffix(".partial").unlink(missing_ok=True)  # of a slide that was noted already: nobody's
        assert contents(tmp_path) == contents(root)

    def test_finished_ones_stay(self, root, monkeypatch):
        monkeypatch.setattr(patch_gastric, "_make_slide", lambda *_: pytest.fail("draws again"))
        before = contents(root)
        assert make_patch_gastric(root, **OPTIONS) == root
        assert contents(root) == before


def fail(root: Path, **options) -> str:
    """The one line that a bad input gives."""
    with pytest.raises(MivpgError) as error:
        make_patch_gastric(root, **OPTIONS | options)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestBadInput:
    @pytest.mark.parametrize("options", [{"num_slides": 0}, {"mean_patches": 4}, {"mean_patches": 301}, {"seed": -1}])
    def test_numbers(self, tmp_path, options):
        assert f" {next(iter(options.values()))}" in fail(tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()

    def test_folder_in_use(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        assert f"{tmp_path} is not empty (thesis.txt), expected a new folder" in fail(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize("options", [{"num_slides": 7}, {"mean_patches": 8}, {"seed": 3}])
    @pytest.mark.parametrize("is_finished", [True, False])
    def test_made_with_other_options(self, root, tmp_path, options, is_finished):
        made_by = json.loads((root / "miniature.json").read_text())
        folder = root if is_finished else tmp_path
        if not is_finished:
            (folder / "records.partial.jsonl").write_text(json.dumps(made_by) + "\n")
        ((name, value),) = options.items()
        message = fail(folder, **options)
        assert str(folder) in message and "name another folder" in message
        assert f"{name} = {OPTIONS[name]}, and {value} is asked for" in message

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{}", b"[null]", b'[{"id": "M"}]', b"[" * 100_000])
    @pytest.mark.parametrize("name", ["truth.json", "miniature.json", "records.partial.jsonl"])
    def test_damaged(self, root, tmp_path, name, content):
        if name != "records.partial.jsonl":
            for copied in ("truth.json", "miniature.json"):
                (tmp_path / copied).write_bytes((root / copied).read_bytes())
        (tmp_path / name).write_bytes(content + (b"\n" if name.endswith("l") else b""))
        assert str(tmp_path) in fail(tmp_path)
