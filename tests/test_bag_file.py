"""A bag file becomes samples; what is wrong with it gets one line that names the file, the line and the field."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mivpg.bags import BagDataset, Sample, check_bags, select
from mivpg.datasets import AboConfig, DatasetConfig
from mivpg.datasets.bag_file import BagFileConfig, load_bag_file, write_bag_file
from mivpg.errors import BagError, MivpgError


def write_jsonl(path: Path, *records: dict) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def test_every_field_arrives(tmp_path):
    path = write_jsonl(
        tmp_path / "bags.jsonl",
        {
            "id": "a",
            "images": ["x/1.jpg", "/elsewhere/2.jpg"],
            "coords": [[0, 1.5], [2, 3]],
            "captions": ["one", "zwei Stühle"],
            "prompt": "",
            "label": "sofa",
            "group": "g",
            "split": "val",
        },
        {"id": 7, "features": "7.npy", "images": None, "split": "all"},
    )
    first, second = load_bag_file(path, root=Path("/"))
    assert first.id == "a"
    assert first.images == (tmp_path / "x/1.jpg", Path("/elsewhere/2.jpg"))
    assert first.image_coords == ((0.0, 1.5), (2.0, 3.0))
    assert first.captions == ("one", "zwei Stühle")
    assert (first.prompt, first.label, first.group, first.split) == ("", "sofa", "g", "val")
    assert (second.id, second.images, second.features) == ("7", (), tmp_path / "7.npy")
    assert (second.prompt, second.label, second.group, second.split) == (None, None, None, "all")


def test_what_is_written_is_read_as_the_same_samples(tmp_path):
    samples = [
        Sample(
            id="a",
            images=(tmp_path / "x" / "1.jpg", tmp_path / "2.jpg"),
            image_coords=((0.0, 1.5), (2.0, 3.0)),
            captions=("one", "zwei Stühle"),
            prompt="",
            label="sofa",
            group="g",
            split="val",
        ),
        Sample(id="b", features=tmp_path / "store" / "b.safetensors", captions=("two",), split="train"),
        Sample(id="c", images=(tmp_path / "3.jpg",), split="all"),
    ]
    write_bag_file(tmp_path / "bags" / "all.jsonl", samples)
    read = load_bag_file(tmp_path / "bags" / "all.jsonl", root=tmp_path)
    resolved = [
        replace(s, images=tuple(p.resolve() for p in s.images), features=s.features and s.features.resolve())
        for s in read
    ]
    assert resolved == samples


def test_csv_and_json_lines_say_the_same(tmp_path):
    jsonl = write_jsonl(
        tmp_path / "bags.jsonl",
        {"id": "a", "images": ["1.jpg", "2 b.jpg"], "captions": ["a chair, red", 'a "seat"'], "label": "chair"},
        {"id": "b", "features": "b.npy"},
    )
    table = tmp_path / "bags.csv"
    table.write_text(
        'id,images,features,captions,label\na,1.jpg; 2 b.jpg;,,"a chair, red | a ""seat""",chair\n\nb,,b.npy,,\n',
        encoding="utf-8",
    )
    assert load_bag_file(table) == load_bag_file(jsonl)


@pytest.mark.parametrize("name", ["bags.jsonl", "bags.csv"])
def test_an_empty_label_or_group_is_none(tmp_path, name):
    text = "id,label,group\na,,\n" if name.endswith("csv") else '{"id": "a", "label": "", "group": ""}\n'
    (tmp_path / name).write_text(text)
    (sample,) = load_bag_file(tmp_path / name)
    assert sample.label is None and sample.group is None


@pytest.mark.parametrize("name", ["bags.jsonl", "bags.csv"])
def test_what_windows_programs_write(tmp_path, name):
    """A byte order mark and carriage returns."""
    text = (
        "id,captions\r\na,ein Stück\r\n" if name.endswith("csv") else '{"id": "a", "captions": ["ein Stück"]}\r\n\r\n'
    )
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    (sample,) = load_bag_file(tmp_path / name)
    assert (sample.id, sample.captions) == ("a", ("ein Stück",))


@pytest.mark.parametrize("field", ["zz" * 9999, "id", "captions", "coords", "split"])
def test_what_is_wrong_is_told_in_short(tmp_path, field):
    (tmp_path / "bags.jsonl").write_text(json.dumps({"id": "a"} | {field: [{}] * 9999}))
    with pytest.raises(MivpgError) as error:
        load_bag_file(tmp_path / "bags.jsonl")
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_a_line_separator_inside_a_caption_ends_no_line(tmp_path):
    path = tmp_path / "bags.jsonl"
    path.write_text(json.dumps({"id": "a", "captions": ["one\u2028two"]}, ensure_ascii=False), encoding="utf-8")
    assert load_bag_file(path)[0].captions == ("one\u2028two",)


GOOD = '{"id": "a", "images": ["1.jpg"]}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD + '{"id": "b", "images": [}', "line 2 is not JSON"),
        (GOOD + "[" * 100_000, "line 2 is not JSON"),
        (GOOD + '["b"]', "line 2 is no object"),
        (GOOD + '{"images": ["2.jpg"]}', "line 2: no id"),
        (GOOD + '{"id": ""}', "line 2: no id"),
        (GOOD + "\n" + GOOD, "line 3: id 'a' stands on line 1 already"),
        ('{"id": "a", "image": ["1.jpg"]}', "line 1: unknown field 'image', did you mean 'images'"),
        ('{"id": "a", "zzz": 1}', "line 1: unknown field 'zzz', expected id, images,"),
        ('{"id": "a", "images": "1.jpg"}', "line 1: images is '1.jpg', expected a list of texts"),
        ('{"id": "a", "captions": [1]}', r"line 1: captions is \[1\], expected a list of texts"),
        ('{"id": "a", "prompt": ["x"]}', r"line 1: prompt is \['x'\], expected a text"),
        ('{"id": true}', "line 1: id is True, expected a text"),
        ('{"id": "a", "coords": [[1, 2, 3]]}', r"line 1: coords is .*, expected a list of \[x, y\]"),
        ('{"id": "a", "coords": 5}', "line 1: coords is 5"),
        ('{"id": "a", "split": "valid"}', "line 1: split is 'valid', expected train, val, test, all"),
        ('{"id": "a", "split": "val"}\n{"id": "b"}', "bag 'a' has a split and bag 'b' has none"),
        (
            '{"id": "a", "split": "val", "group": "g"}\n{"id": "b", "split": "test", "group": "g"}',
            r"group 'g' is in two splits, val \(bag 'a'\) and test \(bag 'b'\)",
        ),
        ("", "holds no bag"),
        ("\n \n", "holds no bag"),
    ],
)
def test_bad_json_lines_get_one_line(tmp_path, content, says):
    path = tmp_path / "bags.jsonl"
    path.write_text(content)
    with pytest.raises(MivpgError, match=says) as error:
        load_bag_file(path)
    assert not isinstance(error.value, BagError)  # it is the file, so no run goes on
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("id,images\na,1.jpg\na,2.jpg\n", "line 3: id 'a' stands on line 2 already"),
        ("id,image\na,1.jpg\n", "line 1: unknown field 'image', did you mean 'images'"),
        ("id;images\na;1.jpg\n", "line 1: columns are separated by ';'"),
        ("id,coords\na,1\n", "line 1: unknown field 'coords'"),
        ("images\n1.jpg\n", "line 2: no id"),
        ("id,images\na,1.jpg,2.jpg\n", "line 2: 3 columns, expected 2"),
        ("id,images\na\n", "line 2: 1 columns, expected 2"),
        (f"id,images\na,{'1.jpg;' * 30_000}\n", r"line 2: field larger than .*; write such bags as JSON lines"),
        ("id,id\na,b\n", "line 1: a column occurs twice"),
        ('id,images\na,"1.jpg\n', "line 2: unexpected end of data"),
        ("id,images\n", "holds no bag"),
        ("", "holds no bag"),
    ],
)
def test_bad_csv_gets_one_line(tmp_path, content, says):
    path = tmp_path / "bags.csv"
    path.write_text(content)
    with pytest.raises(MivpgError, match=says) as error:
        load_bag_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(MivpgError, match=r"missing\.jsonl does not exist, expected a bag file"):
        load_bag_file(tmp_path / "missing.jsonl")
    with pytest.raises(MivpgError, match=r"ends in '\.xlsx', expected a bag file, \.jsonl or \.csv"):
        load_bag_file(tmp_path / "bags.xlsx")
    for name in ("latin.jsonl", "latin.csv"):
        (tmp_path / name).write_bytes("id,captions\na,Stück\n".encode("latin-1"))
        with pytest.raises(MivpgError, match=f"{name} is not UTF-8"):
            load_bag_file(tmp_path / name)


def test_one_bad_bag_leaves_the_others_readable(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    np.save(tmp_path / "1.npy", np.zeros((2, 3), dtype=np.float32))
    bad = [
        {"id": "none"},
        {"id": "missing", "images": ["missing.png"]},
        {"id": "both", "images": ["1.png"], "features": "1.npy"},
        {"id": "empty", "images": ["1.png"], "captions": ["a chair", " "]},
        {"id": "coords", "images": ["1.png"], "coords": [[0, 0], [1, 1]]},
    ]
    good = {"id": "good", "images": ["1.png"], "captions": ["a black square"]}
    samples = load_bag_file(write_jsonl(tmp_path / "bags.jsonl", *bad, good))
    dataset = BagDataset(samples)
    for index, record in enumerate(bad):
        with pytest.raises(BagError, match=f"^bag '{record['id']}': ") as error:
            dataset[index]
        assert "\n" not in str(error.value)
        with pytest.raises(BagError, match=f"^bag '{record['id']}': "):
            check_bags(samples[index : index + 1])
    assert dataset[5].id == "good"
    check_bags(samples[5:])


def test_splits_are_drawn_on_request(tmp_path):
    records = [{"id": str(number), "group": str(number // 2)} for number in range(100)]
    config = BagFileConfig(path=write_jsonl(tmp_path / "bags.jsonl", *records), split_seed=3)
    samples = config.load()
    assert [len(select(samples, split)) for split in ("train", "val", "test")] == [70, 10, 20]
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        assert first.split == second.split
    write_jsonl(config.path, {"id": "a", "split": "test"})
    with pytest.raises(MivpgError, match=r"bags\.jsonl: bag 'a' has a split; leave out split_seed or the splits"):
        config.load()


def test_exactly_one_data_set_is_given(tmp_path):
    bag_file = BagFileConfig(path=write_jsonl(tmp_path / "bags.jsonl", {"id": "a"}))
    assert [sample.id for sample in DatasetConfig(bag_file=bag_file).load()] == ["a"]
    with pytest.raises(MivpgError, match="dataset names nothing, expected one of bag_file, abo"):
        DatasetConfig().load()
    with pytest.raises(MivpgError, match="dataset names bag_file and abo, expected one of bag_file, abo"):
        DatasetConfig(bag_file=bag_file, abo=AboConfig(root=tmp_path)).load()


def test_headers_as_spreadsheets_write_them(tmp_path):
    file = tmp_path / "Products.CSV"
    file.write_text(" ID ,Images,Captions\na,1.jpg;2.jpg,a chair.\n,,\n  \n", encoding="utf-8-sig")
    (sample,) = load_bag_file(file)
    assert sample.id == "a" and [path.name for path in sample.images] == ["1.jpg", "2.jpg"]
    file.write_text("id;images;captions\na;1.jpg;b\n")
    with pytest.raises(MivpgError, match=r"line 1: columns are separated by ';'"):
        load_bag_file(file)
    file.write_text("id,images,price\na,1.jpg,3\n")
    with pytest.raises(MivpgError, match=r"unknown field 'price', .* delete it"):
        load_bag_file(file)
