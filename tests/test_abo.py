"""Amazon Berkeley Objects: the real sample, and generated folders in its layout for what the release has in store."""

import csv
import gzip
import json
import logging
import os
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest

from mivpg.bags import BagDataset, check_bags, select
from mivpg.datasets import AboConfig, DatasetConfig, abo
from mivpg.errors import MivpgError

ABO = Path(__file__).resolve().parents[2] / "shared" / "data" / "abo"


class Shop:
    """Writes a folder in ABO's layout; photos themselves are not needed to read it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.listings: list[dict] = []
        self.captions: dict[str, list[str]] = {}
        self.forgotten: set[str] = set()
        """Image ids that images.csv.gz lacks."""

    def add(self, item_id: str, main: str | None, *others: str, captions=("a thing",), **fields) -> None:
        listing = {"item_id": item_id, "domain_name": "amazon.com", "product_type": [{"value": "SOFA"}]}
        if main is not None:
            listing["main_image_id"] = main
        if others:
            listing["other_image_id"] = list(others)
        self.listings.append(listing | fields)
        if captions:
            self.captions[item_id] = list(captions)

    def write(self) -> None:
        metadata = self.root / "listings" / "metadata"
        metadata.mkdir(parents=True, exist_ok=True)
        half = len(self.listings) // 2
        for name, listings in (("0", self.listings[:half]), ("a", self.listings[half:])):
            with gzip.open(metadata / f"listings_{name}.json.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(listing, ensure_ascii=False) + "\n" for listing in listings)
        ids = {i for one in self.listings for i in (one.get("main_image_id"), *one.get("other_image_id", [])) if i}
        (self.root / "images" / "metadata").mkdir(parents=True, exist_ok=True)
        with gzip.open(self.root / "images/metadata/images.csv.gz", "wt", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image_id", "height", "width", "path"])
            rows.writerows([i, 256, 200, f"{i[:2]}/{i}.jpg"] for i in sorted(ids - self.forgotten))
        (self.root / "captions.json").write_text(json.dumps(self.captions))

    def load(self, **fields):
        self.write()
        return AboConfig(root=self.root, **{"split": "all", **fields}).load()

    def error(self, **fields) -> str:
        with pytest.raises(MivpgError) as error:
            self.load(**fields)
        assert "\n" not in str(error.value)
        return str(error.value)


@pytest.fixture
def shop(tmp_path) -> Shop:
    return Shop(tmp_path)


# --- the real thing


@pytest.mark.skipif(not ABO.is_dir(), reason="the sample of Amazon Berkeley Objects is not beside the project")
@pytest.mark.parametrize(("photos", "side"), [("small", 256), ("original", 1024)])
def test_real_products(photos, side):
    samples = DatasetConfig(abo=AboConfig(root=ABO, split="all", photos=photos)).load()
    assert [(s.id, s.label, len(s.images), len(s.captions)) for s in samples] == [
        ("B074M5HPBD", "LIGHT_BULB", 3, 3),
        ("B0799CK52K", "DUFFEL_BAG", 5, 2),
        ("B07GTFSCHB", "VITAMIN", 4, 2),
    ]
    assert [path.stem for path in samples[1].images] == ["d80a51d3", "25ffa37c", "528c608a", "95f7ee92", "a8a14cd2"]
    assert samples[2].captions[1] == "a cylindrical bottle of capsules with a wide lid."
    check_bags(samples)
    for split in ("train", "val", "test"):
        assert select(samples, split) == samples
    for bag in (BagDataset(samples)[index] for index in range(3)):
        assert {max(image.size) for image in bag.images} == {side}


# --- which photos


def test_the_main_photo_comes_first_and_each_once(shop):
    shop.add("B1", "bbb", "ccc", "aaa", "bbb", "ccc")
    (sample,) = shop.load()
    assert sample.images == tuple(
        shop.root / "images/small" / path for path in ("bb/bbb.jpg", "cc/ccc.jpg", "aa/aaa.jpg")
    )
    (sample,) = shop.load(photos="original")
    assert sample.images[0] == shop.root / "images/original/bb/bbb.jpg"


def test_no_main_image_id(shop):
    shop.add("B1", None, "bbb", "aaa")
    assert [path.stem for path in shop.load()[0].images] == ["bbb", "aaa"]
    assert [path.stem for path in shop.load(only_main_image=True)[0].images] == ["bbb"]


def test_the_single_image_arm_has_the_same_products(shop):
    shop.add("B1", "aaa")
    shop.add("B2", "aaa", "bbb")
    shop.add("B3", "aaa", "aaa")  # one photo, named twice
    shop.add("B4", None)
    assert [(sample.id, len(sample.images)) for sample in shop.load()] == [("B2", 2)]
    assert [(sample.id, len(sample.images)) for sample in shop.load(only_main_image=True)] == [("B2", 1)]
    assert [sample.id for sample in shop.load(min_images=1)] == ["B1", "B2", "B3"]


def test_a_photo_that_images_csv_lacks(shop):
    shop.add("B1", "aaa", "bbb")
    shop.forgotten = {"bbb"}
    assert shop.error() == f"{shop.root / 'images/metadata/images.csv.gz'} lacks image_id 'bbb' of item_id B1."


# --- what a product is


@pytest.mark.parametrize(
    ("product_type", "label"),
    [("CHAIR", "CHAIR"), ([{"value": "CHAIR"}], "CHAIR"), ([{"language_tag": "en_US", "value": "CHAIR"}], "CHAIR")],
)
def test_product_type_as_text_or_list(shop, product_type, label):
    shop.add("B1", "aaa", "bbb", product_type=product_type)
    assert shop.load()[0].label == label


def test_no_product_type(shop):
    shop.add("B1", "aaa", "bbb")
    del shop.listings[0]["product_type"]
    assert shop.load()[0].label is None


def test_products_without_captions_are_left_out_and_counted(shop, caplog):
    shop.add("B2", "aaa", "bbb", captions=("one", "two"))
    shop.add("B1", "aaa", "bbb")
    shop.add("B3", "aaa", "bbb", captions=())
    shop.add("B4", "aaa")
    shop.captions |= {"B5": ["unlisted"], "B3": []}
    with caplog.at_level(logging.INFO):
        samples = shop.load()
    assert [(sample.id, sample.captions) for sample in samples] == [("B1", ("a thing",)), ("B2", ("one", "two"))]
    assert "4 items with captions; 1 have no listing, 1 fewer than 2 photos, 2 remain" in caplog.text


def test_nothing_in_common(shop):
    shop.add("B1", "aaa", "bbb", captions=())
    shop.captions["B2"] = ["a chair"]
    assert "lists no item of" in shop.error()


# --- one item_id under several domains


def test_the_same_photos_under_two_domains_are_one_product(shop):
    shop.add("B1", "aaa", "bbb")
    shop.add("B1", "aaa", "bbb", domain_name="amazon.in")
    shop.add("B1", "aaa", "bbb")
    assert len(shop.load()) == 1


def test_different_photos_under_two_domains(shop):
    shop.add("B1", "aaa", "bbb")
    shop.add("B1", "ccc", "ddd", domain_name="amazon.in")
    shop.add("B2", "eee", "fff", domain_name="amazon.de")
    assert shop.error() == (
        f"{shop.root}: item_id B1 has different photos under amazon.com and amazon.in; "
        "set `domain` to the one that counts."
    )
    for domain, first in (("amazon.com", "aaa"), ("amazon.in", "ccc")):
        one, two = shop.load(domain=domain)
        assert (one.images[0].stem, two.images[0].stem) == (first, "eee")  # what stands elsewhere alone stays
    assert "domain is 'amazon.con', expected one of amazon.com, amazon.de, amazon.in" in shop.error(domain="amazon.con")


def test_domains_of_products_without_captions_do_not_matter(shop):
    shop.add("B1", "aaa", "bbb")
    shop.add("B2", "aaa", "bbb", captions=())
    shop.add("B2", "ccc", "ddd", captions=(), domain_name="amazon.in")
    assert [sample.id for sample in shop.load()] == ["B1"]


def test_listed_twice_under_one_domain(shop):
    shop.add("B1", "aaa", "bbb")
    shop.add("B1", "ccc", "ddd")
    assert "item_id B1 is listed twice under amazon.com, with different photos" in shop.error(domain="amazon.com")


# --- splits


def test_the_split_is_drawn_by_seed(shop):
    for number in range(50):
        shop.add(f"B{number:02}", "aaa", "bbb")
    samples = shop.load(split="random")
    assert [len(select(samples, split)) for split in ("train", "val", "test")] == [35, 5, 10]
    assert samples == shop.load(split="random", split_seed=0, only_main_image=False)
    assert samples != shop.load(split="random", split_seed=1)
    single = shop.load(split="random", only_main_image=True)
    assert [sample.split for sample in single] == [sample.split for sample in samples]


# --- captions


REFERENCES = {"B1": ["a red chair, wooden", 'a "seat"'], "B2": ["eine Stühle"]}


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "caption", "annotator"])
        rows.writerows([item_id, caption, 1] for item_id, captions in REFERENCES.items() for caption in captions)


def pickled(path: Path, data, protocol: int = 4) -> None:
    path.write_bytes(pickle.dumps(data, protocol=protocol))


SHAPE_COMPILER = defaultdict(list, {0: ["a sofa"], 1: ["a chair"], "pcs_name": ["B2", "B1"]})


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("c.json", lambda path: path.write_text(json.dumps(REFERENCES)), REFERENCES),
        ("c.csv", write_csv, REFERENCES),
        ("dict.pkl", lambda path: pickled(path, REFERENCES), REFERENCES),
        ("default.pkl", lambda path: pickled(path, defaultdict(list, REFERENCES)), REFERENCES),
        ("python2.pkl", lambda path: pickled(path, defaultdict(list, REFERENCES), protocol=2), REFERENCES),
        ("ordered.pkl", lambda path: pickled(path, OrderedDict(REFERENCES), protocol=0), REFERENCES),
        ("shapecompiler.pkl", lambda path: pickled(path, SHAPE_COMPILER), {"B1": ["a chair"], "B2": ["a sofa"]}),
    ],
)
def test_captions_in_all_forms(shop, name, write, expected):
    shop.add("B1", "aaa", "bbb")
    shop.add("B2", "aaa", "bbb")
    write(shop.root / name)
    found = {sample.id: list(sample.captions) for sample in shop.load(captions=shop.root / name)}
    assert found == expected


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_may_hold_tuples_but_not_as_names(tmp_path, shop):
    """Forty tuples, each twice in the next, would take years to hash."""
    file = tmp_path / "captions.pkl"
    file.write_bytes(pickle.dumps({"B1": ("a sofa", "a couch"), "B2": ("a lamp",), "B3": ("a", "b", "c"), "B4": ()}))
    assert abo._read_pickle(file) == {"B1": ["a sofa", "a couch"], "B2": ["a lamp"], "B3": ["a", "b", "c"], "B4": []}
    file.write_bytes(b"\x80\x02}K\x01" + b"2\x86" * 40 + b"K\x01s.")
    with pytest.raises(MivpgError, match=r"captions\.pkl is no pickle of plain data: unhashable type: 'list'"):
        abo._read_pickle(file)


def test_a_pickle_runs_nothing(shop):
    shop.add("B1", "aaa", "bbb")
    victim = shop.root / "made by the pickle"
    pickled(shop.root / "c.pkl", {"B1": [Malicious(victim)]})
    assert shop.error(captions=shop.root / "c.pkl") == (
        f"{shop.root / 'c.pkl'} wants to run 'posix.mkdir', expected a pickle of plain dicts and lists."
    )
    assert not victim.exists()
    pickle.loads((shop.root / "c.pkl").read_bytes())
    assert victim.exists()  # so the pickle was able to


@pytest.mark.parametrize("name", ["eval", "getattr", "open", "type", "object", "__import__", "dict.fromkeys"])
def test_builtins_that_are_no_containers_are_refused(shop, name):
    shop.add("B1", "aaa", "bbb")
    module, _, attribute = f"builtins\n{name}\n".partition("\n")
    (shop.root / "c.pkl").write_bytes(f"c{module}\n{attribute}.".encode())
    assert f"wants to run 'builtins.{name}'," in shop.error(captions=shop.root / "c.pkl")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.json", b"{", "is not JSON"),
        ("c.json", b"[]", "holds a list, expected item_id -> list of captions"),
        ("c.json", b'{"B1": "a chair"}', "captions of 'B1' are 'a chair', expected a list of texts"),
        ("c.json", b'{"B1": [1]}', "captions of 'B1' are [1], expected a list of texts"),
        ("c.json", b'{"B1": ["St\xfchle"]}', "cannot be read: 'utf-8' codec"),
        ("c.csv", b"asin,text\nB1,a chair\n", "has the columns asin, text, expected item_id and caption"),
        ("c.csv", b"", "has the columns (none), expected item_id and caption"),
        ("c.csv", b"item_id,caption\nB1\n", "captions of 'B1' are [None]"),
        ("c.pkl", b"version https://git-lfs.github.com/spec/v1\n", "is no pickle of plain data"),
        ("c.pkl", b"", "is no pickle of plain data"),
        ("c.pkl", pickle.dumps({1: ["a chair"]}), "has the key 1, expected an item_id"),
        ("c.pkl", pickle.dumps({0: ["a"], "pcs_name": ["B1", "B2"]}), "captions of 'B2' are None"),
        ("c.txt", b"", "ends in '.txt', expected captions, .json, .csv, .pkl"),
    ],
)
def test_bad_captions_get_one_line(shop, name, content, says):
    shop.add("B1", "aaa", "bbb")
    (shop.root / name).write_bytes(content)
    message = shop.error(captions=shop.root / name)
    assert says in message
    assert str(shop.root / name) in message


# --- files that are missing or damaged


def test_missing_files(shop, tmp_path):
    shop.add("B1", "aaa", "bbb")
    for name in ("c.json", "c.csv"):
        assert shop.error(captions=tmp_path / name) == f"{tmp_path / name} does not exist, expected a text file."
    assert shop.error(captions=tmp_path / "c.pkl") == f"{tmp_path / 'c.pkl'} does not exist, expected captions."
    (tmp_path / "images/metadata/images.csv.gz").unlink()
    with pytest.raises(MivpgError, match=r"images\.csv\.gz does not exist"):
        AboConfig(root=tmp_path).load()
    for path in tmp_path.glob("listings/metadata/*"):
        path.unlink()
    with pytest.raises(MivpgError, match=r"has no listings/metadata/listings_\*\.json\.gz, expected the folder"):
        AboConfig(root=tmp_path).load()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-10])
    elif how == "flipped":
        path.write_bytes(content[:-24] + bytes(255 - byte for byte in content[-24:-14]) + content[-14:])
    else:
        path.write_bytes(b"not compressed")


@pytest.mark.parametrize("how", ["cut", "flipped", "replaced"])
@pytest.mark.parametrize("name", ["images/metadata/images.csv.gz", "listings/metadata/listings_a.json.gz"])
def test_damaged_archives(shop, name, how):
    shop.add("B1", "aaa", "bbb")
    shop.write()
    damage(shop.root / name, how)
    with pytest.raises(MivpgError) as error:
        AboConfig(root=shop.root).load()
    assert str(shop.root / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"item_id": "B1"}', "7", '{"item_id": 1, "domain_name": 2, "other_image_id": 5}']
)
def test_a_line_that_is_no_listing(shop, line):
    shop.write()
    path = shop.root / "listings/metadata/listings_a.json.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"item_id": "B1", "domain_name": "amazon.com"}\n' + line + "\n")
    with pytest.raises(MivpgError, match=r"listings_a\.json\.gz, line 2 is no listing, expected a JSON object"):
        AboConfig(root=shop.root).load()


def test_images_csv_without_its_columns(shop):
    shop.add("B1", "aaa", "bbb")
    shop.write()
    with gzip.open(shop.root / "images/metadata/images.csv.gz", "wt") as file:
        file.write("id,file\n")
    with pytest.raises(MivpgError, match=r"has the columns id, file, expected image_id and path"):
        AboConfig(root=shop.root).load()
