"""The demo end to end at a small size, and its figures against captions whose truth is known."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from mivpg.captioning import read_captions
from mivpg.demo import ARMS, DemoConfig, _example_that_works, findings, run_demo, write_demo_report
from mivpg.errors import MivpgError
from mivpg.miniature.catalogue import CatalogueProduct, read_truth
from mivpg.miniature.traits import (
    hidden_accuracy,
    most_common_values,
    names_hidden,
    oracle_caption,
    says_nothing_wrong,
    swap_partners,
    trait_accuracies,
)
from mivpg.report import BagExample
from test_cli import mivpg, one_line
from test_readme import commands_of
from warm import Result

ARM_NAMES = {"zero_shot", "single_image", "patch_concatenation", "mivpg_without_csa", "mivpg"}
METRICS = {"BLEU@4", "METEOR", "ROUGE_L", "CIDEr"}
SMALL = {"--num-products": "24", "--num-train-epochs": "1"}


def words_of(out: Path, options: dict[str, str] | None = None) -> list[str]:
    options = {"--out": str(out)} | SMALL | (options or {})
    return ["demo", *(word for option in options.items() for word in option)]


def start(out: Path, **kwargs) -> subprocess.Popen:
    """A demo as a user starts it."""
    command = [sys.executable, "-m", "mivpg.cli", *words_of(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def finish(process: subprocess.Popen) -> Result:
    output, errors = process.communicate(timeout=300)
    return Result(process.returncode, output, errors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick_meteor) -> Path:
    """A demo that nobody interrupted, without a display."""
    out = tmp_path_factory.mktemp("demo") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DISPLAY", "MPLBACKEND"):
            patch.delenv(name, raising=False)
        code, output, errors = mivpg(*words_of(out))
    assert code == 0, errors
    assert "Traceback" not in output + errors
    return out


def test_results_have_every_arm_metric_and_floor(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["seed"] == 0
    assert results["arms"].keys() == ARM_NAMES
    assert all(scores.keys() == METRICS for scores in results["arms"].values())
    assert results["floors"].keys() == {"constant", "random_train", "label"}
    assert all(scores.keys() == METRICS for scores in results["floors"].values())
    assert results["seconds"].keys() == {"catalogue", "features", "arms", "scores"}
    assert results["num_products"] == {"train": 17, "val": 2, "test": 5}
    assert results["nothing_wrong"].keys() == results["examples"]["nothing_wrong"].keys() == ARM_NAMES
    truth = {product.item_id: product for product in read_truth(whole / "catalogue")}
    for arm in ARM_NAMES:
        captions = read_captions(whole / "captions" / f"{arm}.jsonl")
        right = {item_id for item_id, caption in captions.items() if says_nothing_wrong(caption, truth[item_id])}
        assert results["nothing_wrong"][arm] == round(len(right) / 5, 4)
        assert results["examples"]["nothing_wrong"][arm] == len(right & {*results["examples"]["ids"]})


def test_arms_differ_in_model_and_photos_alone(whole):
    import yaml

    configs = [
        yaml.safe_load((whole / "arms" / name / "config.yaml").read_text())
        for name in sorted(ARM_NAMES - {"zero_shot"})
    ]
    for config in configs:
        config["model"] = {"base": config["model"]["base"]}
        del config["dataset"], config["output_dir"]
    assert all(config == configs[0] for config in configs)
    steps = {
        json.loads((sorted((whole / "arms" / name).glob("checkpoint-*"))[-1] / "trainer_state.json").read_text())[
            "max_steps"
        ]
        for name in ARM_NAMES - {"zero_shot"}
    }
    assert len(steps) == 1


def test_single_image_arms_have_the_main_photo_alone(whole):
    from mivpg.datasets.bag_file import load_bag_file
    from mivpg.feature_files import read_features

    every, main, swapped = (load_bag_file(whole / f"{name}.jsonl") for name in ("all", "main", "swapped"))
    by_id = {sample.id: read_features(sample.features)[0] for sample in every}
    for sample in main:
        assert read_features(sample.features)[0].equal(by_id[sample.id][:1])
    partners = swap_partners(
        [
            CatalogueProduct(**p)
            for p in json.loads((whole / "catalogue/truth.json").read_text())
            if p["item_id"] in {s.id for s in swapped}
        ]
    )
    for sample in swapped:
        features = read_features(sample.features)[0]
        assert features[:1].equal(by_id[sample.id][:1])
        assert features[1:].equal(by_id[partners[sample.id]][1:])


def test_report_and_example_can_be_looked_at(whole):
    page = (whole / "report.html").read_text()
    for arm in ARMS:
        assert arm.title in page
    assert "Traceback" not in page and page.count("data:image/jpeg") > 12
    with Image.open(whole / "example.png") as image:
        assert image.width >= 800


def test_its_model_captions_photos(whole):
    photos = sorted((whole / "catalogue/images/small").rglob("*.jpg"))[:2]
    result = mivpg("caption", "--model", whole / "arms/mivpg/best", *photos)
    assert result.code == 0 and len(result.out.splitlines()) == 1


def test_the_readmes_commands(whole, tmp_path, monkeypatch):
    """The first is what ran here, in another folder; the second reads a product that any catalogue of the seed has."""
    demo, caption = (
        command.split() for command in commands_of() if command.startswith("mivpg") and "runs/demo" in command
    )
    assert demo[1:] == words_of(Path("runs/demo"))[: len(demo) - 1] and len(demo) == 4
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(whole)
    monkeypatch.chdir(tmp_path)
    code, output, errors = mivpg(*caption[1:])
    assert (code, errors) == (0, "") and output.strip()


@pytest.mark.usefixtures("quick_meteor")
@pytest.mark.slow
def test_a_finished_demo_does_nothing_again(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    results = json.loads((whole / "results.json").read_text())
    code, _, errors = mivpg(*words_of(whole))
    assert code == 0, errors
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == before
    again = json.loads((whole / "results.json").read_text())
    assert {**again, "seconds": None} == {**results, "seconds": None}


@pytest.mark.usefixtures("quick_meteor")
@pytest.mark.slow
def test_interrupted_with_ctrl_c_it_goes_on_to_the_same_end(whole, tmp_path):
    out = tmp_path / "interrupted"
    # A shell starts what runs in its background with SIGINT ignored, which children inherit.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    for moment in ("logs", "arms/*/config.yaml"):  # while the arms' processes start, and while they train
        process = start(out, start_new_session=True, preexec_fn=listen)
        deadline = time.monotonic() + 200
        while not list(out.glob(moment)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        time.sleep(1.5)
        os.killpg(process.pid, signal.SIGINT)
        code, output, errors = finish(process)
        assert code == 130 and errors.strip().splitlines()[-1] == "mivpg: interrupted", (output, errors)
        assert "Traceback" not in errors
    code, _, errors = mivpg(*words_of(out))
    assert code == 0, errors
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (whole, out))
    for results in (first, second):
        del results["seconds"], results["model"]
    assert second == first


@pytest.mark.parametrize("options", [{"--seed": "1"}, {"--num-train-epochs": "2"}])
def test_another_demo_in_the_same_folder_is_refused(whole, options):
    code, _, errors = mivpg(*words_of(whole, options))
    assert code == 1 and one_line(errors) and "name another folder" in errors


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(MivpgError, match=r"is in use, expected a new or empty folder"):
        run_demo(tmp_path, DemoConfig(num_products=60))
    with pytest.raises(MivpgError, match=r"is in use"):
        run_demo(tmp_path / "letter.txt", DemoConfig(num_products=60))


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="nothing is read-only for root here")
def test_without_permission_it_is_one_line():
    code, _, errors = mivpg(*words_of(Path("/proc/self/demo")))
    assert code == 1 and one_line(errors) and "/proc/self/demo" in errors


@pytest.mark.parametrize("number", ["0", "3", "-5"])
def test_too_few_products_are_one_line(tmp_path, number):
    code, _, errors = mivpg(*words_of(tmp_path / "demo", {"--num-products": number}))
    assert code == 1 and one_line(errors) and "num_products" in errors
    assert not (tmp_path / "demo").exists()


# ── Figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def pillow(item_id: str, front: str, back: str, *, back_is_seen: bool = True) -> CatalogueProduct:
    return CatalogueProduct(
        item_id=item_id,
        family="pillow",
        traits={"color": "red", "material": "fabric", "shape": "square", "front": front, "back": back},
        seen=(("color", "family", "front", "material", "shape"), ("back", "color") if back_is_seen else ("color",)),
        views=("front", "back"),
        captions=("a pillow.",),
        images=("0", "1"),
    )


PILLOWS = [
    pillow("a", "striped", "dotted"),
    pillow("b", "striped", "dotted"),
    pillow("c", "plain", "checked"),
    pillow("d", "dotted", "plain", back_is_seen=False),
]
CAPTIONS = {
    "a": "a red square pillow with a striped front and a dotted back.",
    "b": "a red pillow with a striped pattern on the back.",
    "c": "a blue round pillow with a checked pattern on the back.",
    "d": "a square pillow.",
}


def test_trait_accuracies_count_what_a_reader_would():
    guesses = most_common_values(PILLOWS)
    assert guesses["pillow", "back"] == "dotted"
    table = trait_accuracies({"arm": CAPTIONS}, PILLOWS, guesses)
    assert table["color"]["main"]["arm"] == {"right": 0.5, "said": 0.75}
    assert table["shape"]["main"]["arm"] == {"right": 0.5, "said": 0.75}
    assert table["front"]["main"] == {
        "num_products": 3,  # a plain front is nothing to speak of
        "chance": pytest.approx(2 / 3, abs=1e-4),
        "oracle": 1.0,
        "arm": {"right": pytest.approx(1 / 3, abs=1e-4), "said": pytest.approx(1 / 3, abs=1e-4)},
    }
    assert table["back"].keys() == {"other"}
    assert table["back"]["other"]["arm"] == {"right": pytest.approx(2 / 3, abs=1e-4), "said": 1.0}
    assert table["back"]["other"]["chance"] == table["back"]["other"]["oracle"] == pytest.approx(2 / 3, abs=1e-4)


def test_hidden_accuracy_asks_for_what_other_photos_show():
    result = hidden_accuracy(CAPTIONS, PILLOWS, seed=0)
    assert result["mean"] == pytest.approx(2 / 3) and result["num_products"] == 3
    assert 0 <= result["low"] < 2 / 3 < result["high"] <= 1
    others = dict(zip("abcd", [PILLOWS[2], PILLOWS[0], PILLOWS[1], PILLOWS[3]], strict=True))
    assert hidden_accuracy(CAPTIONS, PILLOWS, seed=0, others=others)["mean"] == 0


def test_the_example_that_works_says_nothing_wrong_and_something_hidden():
    truth = {product.item_id: product for product in PILLOWS}
    examples = [
        BagExample(id=item_id, title="", images=[], weights=[], references=[], captions={})
        for item_id in ("b", "d", "a")
    ]
    assert [says_nothing_wrong(CAPTIONS[item_id], truth[item_id]) for item_id in "abcd"] == [True, False, False, True]
    assert [names_hidden(CAPTIONS[item_id], truth[item_id]) for item_id in "abcd"] == [True, False, True, False]
    for part in ("a round base", "a red underside", "a banded back", "one handle"):  # which it has not
        assert not says_nothing_wrong(f"a red pillow with {part}.", truth["a"])
    assert says_nothing_wrong("a red pillow.", truth["a"])
    assert _example_that_works(examples, CAPTIONS, truth).id == "a"
    assert _example_that_works(examples[:2], CAPTIONS, truth).id == "b"  # none works


def test_oracles_say_what_they_see():
    guesses = most_common_values(PILLOWS)
    product = PILLOWS[2]
    assert oracle_caption(product, guesses, only_main=True, guess=False) == "a red square pillow."
    assert oracle_caption(product, guesses, only_main=True, guess=True) == "a red square pillow with a dotted back."
    assert oracle_caption(product, guesses, only_main=False, guess=False) == "a red square pillow with a checked back."
    unseen = PILLOWS[3]
    assert "back" not in oracle_caption(unseen, guesses, only_main=False, guess=False)


def test_every_product_gets_photos_of_another_of_its_family():
    rng = random.Random(0)
    families = ["pillow"] * 5 + ["chair"] * 4
    rng.shuffle(families)
    products = [
        CatalogueProduct(item_id=str(i), family=family, traits={}, seen=(), views=(), captions=(), images=())
        for i, family in enumerate(families)
    ]
    partners = swap_partners(products)
    assert sorted(partners) == sorted(partners.values()) == sorted(p.item_id for p in products)
    assert all(a != b and families[int(a)] == families[int(b)] for a, b in partners.items())


def test_findings_say_better_only_where_the_interval_does(whole):
    results = json.loads((whole / "results.json").read_text())
    for low, high, verdict in ((0.1, 0.4, "better"), (-0.4, -0.1, "worse"), (-0.1, 0.4, "no clear difference")):
        results["differences"]["mivpg - patch_concatenation"] = {"mean": (low + high) / 2, "low": low, "high": high}
        assert f"MIVPG against concatenation: {verdict};" in " ".join(findings(results))


def test_captions_are_text_on_the_page(whole, tmp_path):
    results = json.loads((whole / "results.json").read_text())
    photo = next((whole / "catalogue/images/small").rglob("*.jpg"))
    example = BagExample(
        id="x",
        title="pillow",
        images=[photo],
        weights=[1.0],
        references=["<b>bold</b>"],
        captions={"MIVPG": "<script>"},
    )
    write_demo_report(tmp_path / "page.html", results, [example], {})
    assert "<script>" not in (tmp_path / "page.html").read_text()
