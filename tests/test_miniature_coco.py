"""The generated scenes: what is drawn, what is said of it, and the files that the reader of MSCOCO finds.

What captions say is compared with the pixels of each thing, which are those that change when it changes its colour.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from generated import contents
from mivpg.datasets import CocoConfig
from mivpg.errors import MivpgError
from mivpg.miniature import coco, folders, scenes
from mivpg.miniature.coco import make_coco, read_facts
from mivpg.miniature.drawing import draw
from mivpg.miniature.scenes import (
    CLASSES,
    NOUNS,
    SCENE_COLORS,
    Scene,
    Thing,
    arrange,
    classes_of,
    description,
    draw_scene,
    photograph_scene,
    picture_lesson,
    references,
    right_of_said,
    text_lesson,
)

NUM_PICTURES = 30


# ── What is seen, and what is said of it ────────────────────────────────────────────────────────────────────────────


@dataclass
class Seen:
    """Where a thing's visible pixels lie; rows count from above."""

    rows: np.ndarray
    columns: np.ndarray

    @property
    def middle(self) -> float:
        return float(self.columns.min() + self.columns.max()) / 2


def look(scene: Scene, generator: random.Random, size: int = 96) -> list[Seen]:
    """The pixels of each thing in the picture that `photograph_scene` takes with the same generator."""
    drawn = []

    def remember(shapes, camera, **_):
        drawn.append((shapes, camera))
        return draw(shapes, camera, size=size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "draw", remember)
        image = np.asarray(photograph_scene(scene, generator)).astype(int)
    shapes, camera = drawn[-1]
    seen = []
    for thing in scene.things:
        other = [
            replace(shape, color=tuple(255 - c / 2 for c in shape.color))
            if shape.part in (thing.noun, str(thing))
            else shape
            for shape in shapes
        ]
        changed = np.asarray(draw(other, camera, size=size)[0]).astype(int)
        seen.append(Seen(*np.nonzero(np.abs(changed - image).max(axis=2) > 25)))
    return seen


HOLDS = {
    "left": lambda one, other: one.middle < other.middle - 8,
    "right": lambda one, other: one.middle > other.middle + 8,
    "next": lambda one, other: abs(one.middle - other.middle) > 8,
    "front": lambda one, other: (
        one.rows.max() > other.rows.max() and abs(one.middle - other.middle) < np.ptp(other.columns)
    ),
    "behind": lambda one, other: HOLDS["front"](other, one),
    "on": lambda one, other: (
        one.rows.min() < other.rows.min() and one.rows.max() < other.rows.max() and HOLDS["within"](one, other)
    ),
    "holding": lambda one, other: HOLDS["on"](other, one),
    "under": lambda one, other: one.rows.min() > other.rows.min() and HOLDS["within"](one, other),
    "over": lambda one, other: HOLDS["under"](other, one),
    "within": lambda one, other: (
        other.columns.min() - 4 <= one.columns.min() and one.columns.max() <= other.columns.max() + 4
    ),
}  # fmt: skip
SAME = {"beside": "next", "underneath": "under", "above": "over", "carrying": "holding"}
THING = rf"an? (?:(?:{'|'.join(SCENE_COLORS)}) )?({'|'.join(word for words in NOUNS.values() for word in words)})"
SAYING = (
    r"(?:(?:is|standing|placed|that stands) )?"
    r"(?:to the |on the |in )?(left|right|front|next|beside|behind|on|holding|carrying|under|underneath|over|above)"
    r"(?: of| to| top of)?"
)
BESIDES = (
    r"(?:on |to |in )?(?:its )?(left|right|front|next|beside|behind|on|under|underneath)(?: top)?(?: of| to)? ?(?:it)?"
)
IN_PAIRS = {  # how a pattern's (noun, saying, noun) are found in its groups
    rf"{THING} {SAYING} (?={THING})": (0, 1, 2),
    rf"{THING} with {THING} (?!on the){BESIDES}\b": (1, 2, 0),
}


def said_in(caption: str) -> list[tuple[str, str, str]]:
    """What a caption says of two things, with words for patterns other than `scenes` has."""
    found = []
    for pattern, order in IN_PAIRS.items():
        for match in re.finditer(rf"(?={pattern})", caption):
            one, saying, other = (match.groups()[place] for place in order)
            found.append((one, SAME.get(saying, saying), other))
    if match := re.match(rf"{SAYING} {THING} there is {THING}", caption):
        found.append((match[3], SAME.get(match[1], match[1]), match[2]))
    if match := re.search(rf"{THING} between {THING} and {THING}", caption):
        found += [(match[1], "next", match[2]), (match[1], "next", match[3])]
    if match := re.search(rf"{THING} on the left(?:, {THING} in the middle)? and {THING} on the right", caption):
        found += [(match[1], "left", other) for other in match.groups()[1:] if other]
        found += [(other, "left", match[3]) for other in match.groups()[:2] if other]
    if match := re.search(rf"{THING}(?:, {THING})? and {THING} from left to right", caption):
        names = [name for name in match.groups() if name]
        found += [(one, "left", other) for one, other in pairwise(names)]
    if match := re.search(rf"(?:with|and) {THING} on the (left|right)\.", caption):
        others = {name for name in re.findall(THING, caption) if name != match[1]}
        found += [(match[1], match[2], other) for other in sorted(others)]
    return found


def test_what_is_said_is_seen():
    kinds: Counter[str] = Counter()
    for index in range(20):
        generator = random.Random(f"said {index}")
        scene = draw_scene(generator)
        captions = [*references(scene, generator), description(scene, generator)]
        seen = look(scene, generator)
        by_word = {word: one for thing, one in zip(scene.things, seen, strict=True) for word in NOUNS[thing.noun]}
        for caption in captions:
            assert set(re.findall(THING, caption)) <= by_word.keys()
            for one, saying, other in said_in(caption):
                assert HOLDS[saying](by_word[one], by_word[other]), (index, caption)
                kinds[saying] += 1
    assert kinds.keys() == HOLDS.keys() - {"within"} and sum(kinds.values()) > 100, kinds


def test_the_check_can_fail():
    generator = random.Random(3)
    scene = Scene(Thing("ball", "red"), "left", Thing("sofa", "blue"), Thing("lamp", "green"), "right")
    ball, sofa, lamp = look(scene, generator)
    assert HOLDS["left"](ball, sofa) and HOLDS["left"](sofa, lamp) and not HOLDS["left"](lamp, ball)
    assert said_in("a red ball to the left of a sofa with a lamp on its right.") == [
        ("ball", "left", "sofa"),
        ("lamp", "right", "sofa"),
    ]


def test_every_thing_is_seen():
    for index in range(30):
        generator = random.Random(f"seen {index}")
        scene = draw_scene(generator)
        for thing, seen in zip(scene.things, look(scene, generator), strict=True):
            assert len(seen.rows) >= 0.01 * 96**2, (index, thing)


def test_things_keep_apart():
    """None stands in another: no two boxes around things overlap, but those of what is under a table."""
    for index in range(40):
        generator = random.Random(f"apart {index}")
        scene = draw_scene(generator)
        corners = [np.concatenate([shape.corners() for shape in shapes]) for shapes in arrange(scene, generator)[0]]
        low, high = (np.array([end(each, axis=0) for each in corners]) for end in (np.min, np.max))
        for one in range(len(low)):
            for other in range(one):
                if {one, other} == {0, 1} and scene.relation == "under":
                    assert (
                        high[0, 2] < high[1, 2]
                        and (low[1, :2] < low[0, :2]).all()
                        and (high[0, :2] < high[1, :2]).all()
                    )
                    continue
                overlap = np.minimum(high[one], high[other]) - np.maximum(low[one], low[other])
                assert overlap.min() < 1e-6, (index, scene)


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def words_of(texts) -> set[str]:
    return set(re.findall(r"[a-z]+", " ".join(texts)))


def test_captions_look_like_captions():
    counts: Counter[int] = Counter()
    for index in range(300):
        generator = random.Random(f"captions {index}")
        scene = draw_scene(generator)
        captions = references(scene, generator)
        assert len(set(captions)) == 5
        for caption in captions:
            assert re.fullmatch(r"[a-z ,]+\.", caption) and "  " not in caption and " ," not in caption
            counts[len(re.findall(THING, caption))] += 1
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)
    assert counts.keys() == {2, 3} and counts[3] > 300  # some speak of two things only


def test_text_lessons_use_the_words_of_descriptions():
    generator = random.Random(5)
    pictures = words_of(description(draw_scene(generator), generator) for _ in range(3000))
    lessons = [text_lesson(generator) for _ in range(1500)]
    assert words_of(lesson.text for lesson in lessons) <= pictures
    assert words_of(word for lesson in lessons for word in lesson.keywords) <= pictures
    assert 0.87 < np.mean([bool(lesson.keywords) for lesson in lessons]) < 0.93
    assert len(pictures) < 70


def test_keywords_say_all_that_the_text_says():
    for index in range(300):
        lesson = text_lesson(random.Random(f"keywords {index}"))
        spoken = " ".join(lesson.keywords)
        if lesson.keywords:
            for color, noun in re.findall(rf"({'|'.join(SCENE_COLORS)}) (\w+)", lesson.text):
                family = next(name for name, words in NOUNS.items() if noun in words)
                assert f"{color} {family} " in spoken


def test_right_of_said_finds_nothing_wrong_in_what_is_true():
    made: Counter[str] = Counter()
    for index in range(500):
        generator = random.Random(f"true {index}")
        scene = draw_scene(generator)
        for caption in [*references(scene, generator), description(scene, generator)]:
            right = right_of_said(caption, scene.facts())
            assert all(right.values()), (caption, scene)
            made.update(right)
            assert ("relation" in right) == bool(said_in(caption) or "each other" in caption or "side by" in caption)
    assert made["object"] == 3000 and made["relation"] > 2700 and made["color"] > 2000


def test_right_of_said_finds_what_is_wrong():
    """Captions of the same scene with two things exchanged, or their colours."""
    for index in range(300):
        generator = random.Random(f"false {index}")
        scene = draw_scene(generator)
        caption = description(scene, generator)
        exchanged = replace(scene, first=scene.second, second=scene.first)
        right = right_of_said(caption, exchanged.facts())
        assert right["object"] and right.get("color", True)
        is_symmetric = re.search(r"beside|next to|side by side|between", caption) is not None
        assert is_symmetric or right["relation"] is False, caption
        colors = [scene.second.color, scene.first.color]
        swapped = replace(
            scene, first=replace(scene.first, color=colors[0]), second=replace(scene.second, color=colors[1])
        )
        right = right_of_said(caption, swapped.facts())
        assert right["object"] and right["relation"]
        named = re.search(rf"({colors[0]}|{colors[1]}) ", caption) is not None
        assert right.get("color", True) is not named


FACTS = Scene(Thing("lamp", "red"), "top", Thing("table", "blue"), Thing("stool", "green"), "left").facts()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red lamp on a blue table.", {"object": True, "color": True, "relation": True}),
        ("a red lamp under a blue table.", {"object": True, "color": True, "relation": False}),
        ("a blue lamp on a table", {"object": True, "color": False, "relation": True}),
        ("a lamp.", {"object": True}),
        ("a lamp and a sofa.", {"object": False}),
        ("a lamp on a lamp.", {"object": False, "relation": False}),
        ("a black sofa next to a table", {"object": False, "color": False, "relation": False}),
        ("a table with a lamp on it and a stool on the left.", {"object": True, "relation": True}),
        ("a table with a lamp on it and a stool on the right.", {"object": True, "relation": False}),
        ("a stool to the left of a table with a lamp on it.", {"object": True, "relation": True}),
        ("a lamp between a stool and a table.", {"object": True, "relation": False}),
        ("under a table there is a stool.", {"object": True, "relation": False}),
        ("The lamp is on the table, the stool stands beside it", {"object": True, "relation": True}),
        ("", {}),
        ("on the left of nothing with and between.", {}),
    ],
)
def test_reading(caption, expected):
    assert right_of_said(caption, FACTS) == expected


# ── Lessons ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_picture_lessons():
    shown: set[str] = set()
    for index in range(12):
        lesson = picture_lesson(random.Random(f"lesson {index}"))
        assert lesson.pixels.shape == (96, 96, 3) and lesson.pixels.dtype == np.uint8
        assert lesson.keywords == []
        scene = Scene.from_facts(lesson.facts)
        assert scene.facts() == lesson.facts and lesson.classes == classes_of(scene)
        assert all(right_of_said(lesson.text, lesson.facts).values())
        again = picture_lesson(random.Random(f"lesson {index}"))
        assert again.text == lesson.text and np.array_equal(again.pixels, lesson.pixels)
        shown |= lesson.classes
    assert len(shown) > 50


def test_classes_tell_scenes_apart():
    """They say all that is said of a scene, and none of them never shows."""
    assert len(set(CLASSES)) == len(CLASSES) and all(name.startswith("scene ") for name in CLASSES)
    told: dict[frozenset[str], set[tuple]] = {}
    for index in range(6000):
        scene = draw_scene(random.Random(f"classes {index}"))
        whole = frozenset(zip(scene.things, scene.roles, strict=True))
        told.setdefault(classes_of(scene), set()).add(tuple(sorted(map(str, whole))))
    assert all(len(those) == 1 for those in told.values())
    assert set().union(*told) == set(CLASSES)


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco") / "scenes", num_pictures=NUM_PICTURES)


def test_the_reader_reads_it(root):
    samples = CocoConfig(root=root).load()
    facts = read_facts(root)
    assert {sample.id for sample in samples} == facts.keys() and len(facts) == NUM_PICTURES
    assert Counter(sample.split for sample in samples) == {"train": 24, "val": 3, "test": 3}
    folders = Counter((sample.split, sample.images[0].parent.name) for sample in samples)
    assert folders == {
        ("train", "train2014"): 18,
        ("train", "val2014"): 6,
        ("val", "val2014"): 3,
        ("test", "val2014"): 3,
    }
    for sample in samples:
        assert len(sample.captions) == 5 and sample.images[0].is_file()
        assert re.fullmatch(r"COCO_(train|val)2014_\d{12}\.jpg", sample.images[0].name)
        assert all(all(right_of_said(caption, facts[sample.id]).values()) for caption in sample.captions)
    assert len(CocoConfig(root=root, num_train_pairs=50).load()) <= NUM_PICTURES


@pytest.mark.parametrize(("number", "others"), [(3, 1), (10, 1), (1000, 100)])
def test_splits(number, others):
    places = coco.place_pictures(number, 0)
    assert Counter(place.split for place in places) == {"train": number - 2 * others, "val": others, "test": others}
    assert len({place.image for place in places}) == number
    assert {place.folder for place in places if place.split != "train"} == {"val2014"}


def test_same_seed_same_bytes_whatever_the_processes(root, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "in_processes", lambda function, items, chunksize: (function(item) for item in items))
    assert contents(make_coco(tmp_path / "a", num_pictures=NUM_PICTURES)) == contents(root)
    other = contents(make_coco(tmp_path / "b", num_pictures=3, seed=1))
    assert not other.keys() & {name for name in contents(root) if name.endswith("jpg")}


def test_an_interrupted_run_goes_on(root, tmp_path, monkeypatch):
    drawn = []

    def stop(function, items, chunksize):
        for item in items:
            if len(drawn) == 5:
                raise KeyboardInterrupt
            drawn.append(item)
            yield function(item)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "in_processes", stop)
        with pytest.raises(KeyboardInterrupt):
            make_coco(tmp_path, num_pictures=NUM_PICTURES)
    assert not (tmp_path / "miniature.json").exists()
    with pytest.raises(MivpgError, match="seed = 0, and 4 is asked for"):
        make_coco(tmp_path, num_pictures=NUM_PICTURES, seed=4)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    assert len(kept) == 5
    make_coco(tmp_path, num_pictures=NUM_PICTURES)
    assert contents(tmp_path) == contents(root)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_finished_one_is_left_alone(root, monkeypatch):
    monkeypatch.setattr(coco, "_make_picture", lambda *_: pytest.fail("draws again"))
    before = contents(root)
    assert make_coco(root, num_pictures=NUM_PICTURES) == root
    assert contents(root) == before


@pytest.mark.parametrize("arguments", [{"num_pictures": 2}, {"num_pictures": 1_000_000}, {"seed": -1}])
def test_bad_numbers(tmp_path, arguments):
    with pytest.raises(MivpgError, match=str(next(iter(arguments.values())))):
        make_coco(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_foreign_folder(root, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(MivpgError, match=r"is not empty \(thesis\.txt\), expected a new folder"):
        make_coco(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(MivpgError, match=f"num_pictures = {NUM_PICTURES}, and 40 is asked for; name another folder"):
        make_coco(root, num_pictures=40)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"generator": "mivpg miniature abo"}'])
@pytest.mark.parametrize("name", ["miniature.json", "records.partial.jsonl"])
def test_damaged(tmp_path, name, content):
    (tmp_path / name).write_text(content + "\n")
    with pytest.raises(MivpgError, match=re.escape(str(tmp_path))):
        make_coco(tmp_path)


@pytest.mark.parametrize("content", ["3", "[3]", "[{}]", '[{"image": 3, "facts": {}}]', '[{"image": "a", "facts": 3}]'])
def test_damaged_truth(tmp_path, content):
    (tmp_path / "truth.json").write_text(content)
    with pytest.raises(MivpgError, match=r"truth\.json"):
        read_facts(tmp_path)


def test_truth_says_what_the_annotations_hold(root):
    records = json.loads((root / "truth.json").read_text())
    train = json.loads((root / "annotations" / "coco_karpathy_train.json").read_text())
    assert {entry["image"] for entry in train} == {r["image"] for r in records if r["split"] == "train"}
    assert all(int(entry["image"][-16:-4]) == int(entry["image_id"].removeprefix("coco_")) for entry in train)
