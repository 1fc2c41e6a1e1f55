"""`mivpg reproduce` end to end at a size that says nothing, and its statistics against what they should be."""

import csv
import dataclasses
import html
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mivpg.captioning import GenerationOptions, read_captions
from mivpg.errors import MivpgError
from mivpg.experiments import costs, data, reproduce, runner
from mivpg.experiments.data import MINIATURE, PAPER, PROMPT, SCALES, ExperimentData
from mivpg.experiments.pages import report_parts, write_results
from mivpg.experiments.paper import Claim, experiments
from mivpg.experiments.results import METRICS, Difference, has_failed
from mivpg.experiments.runner import Run
from mivpg.miniature import base
from mivpg.miniature.base import Recipe
from mivpg.miniature.catalogue import make_catalogue
from mivpg.miniature.coco import make_coco
from mivpg.miniature.encoder_decoder import make_encoder_decoder_base
from mivpg.miniature.patch_gastric import make_patch_gastric
from mivpg.report import write_report
from mivpg.training import TrainConfig
from test_costs import smaller

CONFIGS = Path(__file__).parents[1] / "configs"


def tiny_scale():
    """The miniature with a few bags and one epoch."""
    draws = {
        "products": lambda root: make_catalogue(root, num_products=14, seed=0),
        "slides": lambda root: make_patch_gastric(root, num_slides=12, mean_patches=5, seed=0),
        "scenes": lambda root: make_coco(root, num_pictures=14, seed=0),
    }
    settings = {
        name: dataclasses.replace(
            MINIATURE.settings[name],
            draw=draw,
            training=dict(MINIATURE.settings[name].training) | {"num_train_epochs": 1},
            generation=GenerationOptions(num_beams=1, max_new_tokens=8),
        )
        for name, draw in draws.items()
    }
    return dataclasses.replace(
        MINIATURE,
        settings=settings,
        subset_sizes=(16, 32),
        unfrozen_sizes=(16,),
        epochs=(0, 2),
        recurrent={"embedding_dim": 8, "hidden_dim": 8, "num_epochs": 1},
        pretraining=None,
    )


TINY_BASE = Recipe(
    num_texts=40, text_steps=1, num_pictures=8, vision_steps=0, language_steps=1, picture_batch=4, text_batch=6
)


def few_arms(scale):
    """A table, another that shares an arm with it, and a figure; a run takes seconds, most of them to start."""
    known = experiments(scale)
    chosen = {
        "table1": {("slides", "csa"), ("slides", "recurrent_vit")},
        "table2": {("products", "zero_shot"), ("products", "csa")},
        "table3": {("products", "csa"), ("slides", "csa"), ("slides", "induced")},
        "table4": {("slides", "csa")},
        "figure4": {("scenes", f"{name}_16") for name in ("none", "ppeg")},
        "figure5": {("slides", "epoch_0"), ("slides", "epoch_2")},
        "figure6": {("products", "csa")},
        "figure8": {("scenes", "ppeg_16")},
        "claims": {("products", "csa")},
        "aggregators": {("products", "qformer_per_image"), ("products", "csa")},
    }
    return only(known, chosen)


def only(known, chosen):
    """Of each experiment that is chosen, those arms."""
    return {
        name: dataclasses.replace(
            known[name], arms=tuple(arm for arm in known[name].arms if (arm.data, arm.name) in those)
        )
        for name, those in chosen.items()
    }


def make_small(patch, arms):
    """A run of `reproduce` takes seconds: few bags, a base of few steps, and those arms."""
    patch.setitem(SCALES, "miniature", tiny_scale())
    patch.setattr(reproduce, "experiments", arms)
    patch.setattr(base, "NUM_HELD_OUT", 12)
    patch.setattr(data, "make_encoder_decoder_base", lambda out: make_encoder_decoder_base(out, TINY_BASE))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick_meteor):
    """Every experiment with two seeds, and one run that fails."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    patch = pytest.MonkeyPatch()
    make_small(patch, few_arms)
    patch.setattr(costs, "NUM_IMAGES", (1, 2))
    patch.setattr(costs, "MivpgConfig", smaller)
    broken = out / "runs" / "slides" / "seed-1" / "induced"

    def claim(folder, *settings):
        original(folder, *settings)
        if not (out / "runs").exists():
            broken.mkdir(parents=True)
            (broken / "stranger.txt").write_text("here first")

    original = reproduce._claim
    patch.setattr(reproduce, "_claim", claim)
    try:
        results = reproduce.reproduce(["all", "aggregators"], scale="miniature", out=out, num_seeds=2)
        yield out, results
    finally:
        patch.undo()


def test_every_arm_has_its_scores(whole):
    out, results = whole
    assert results.keys() == few_arms(MINIATURE).keys()
    for name, found in results.items():
        for row in found["rows"]:
            expected = 1 if (row["data"], row["arm"]) == ("slides", "induced") else 2
            assert all(len(values) == expected for values in row["metrics"].values()), (name, row["arm"])
        assert json.loads((out / f"{name}.json").read_text()) == found
        assert {floor["data"] for floor in found["floors"]} == {row["data"] for row in found["rows"]}


def test_an_arm_that_fails_leaves_the_others(whole):
    out, results = whole
    row = next(row for row in results["table3"]["rows"] if (row["data"], row["arm"]) == ("slides", "induced"))
    assert row["seeds"] == [0]
    assert row["failed"].keys() == {"1"}
    assert row["failed"]["1"].startswith(f"{out / 'logs' / 'slides' / 'seed-1' / 'induced.txt'}: output_dir:")
    assert "Failed: MIVPG, induced" in (out / "table3.md").read_text()
    assert "Failed: table3" in (out / "report.html").read_text()


def test_what_trained_models_are_looked_into(whole):
    out, results = whole
    finding = results["figure6"]["finding"]
    assert len(finding["pictures"]) == len(finding["values"]["bags"]) == 3
    page = (out / "report.html").read_text()
    for title, file in finding["pictures"].items():
        assert (out / file).read_bytes().startswith(b"\x89PNG")
        assert f"![{title}]({file})" in (out / "figure6.md").read_text()
    captions = read_captions(out / "captions" / "products" / "seed-0" / "csa.jsonl")
    for bag in finding["values"]["bags"]:
        assert bag["id"] in captions
    titles = [table["title"] for table in results["claims"]["finding"]["tables"]]
    assert "What holds by construction" in titles and all(title in html.unescape(page) for title in titles)
    assert all(fact["holds"] for fact in results["claims"]["finding"]["values"]["facts"])


def test_the_command_says_that_something_failed(whole):
    _, results = whole
    assert [name for name, found in results.items() if has_failed(found)] == ["table3"]


def test_pairs_are_counted_once_for_each_number_that_is_asked_for(whole, caplog):
    found = ExperimentData(scale=tiny_scale(), out=whole[0])
    assert [found.count_train_pairs("scenes", 0, number) for number in (16, 32)] == [16, 32]
    caplog.clear()
    caplog.set_level("INFO", logger="mivpg")
    assert found.count_train_pairs("products", 0, None) == found.count_train_pairs("products", 0, None) > 16
    assert len([line for line in caplog.messages if "items with captions" in line]) == 1


def test_arms_on_other_data_go_on(tmp_path, capsys):
    """One data set is there, another is not, and a base is not: what can run is made ready and named."""
    root = tmp_path / "root"
    make_catalogue(root / "abo", num_products=3, seed=0)
    data = ExperimentData(scale=PAPER, out=tmp_path / "out", data_root=root)
    data.scale = dataclasses.replace(PAPER, base=MINIATURE.base, other_base=str(tmp_path / "nowhere"))
    known = experiments(data.scale)
    arms = [known["table2"].arms[-1], known["figure4"].arms[0]]
    arms += [arm for arm in known["table4"].arms if arm.data == "products" and arm.base == "other"]
    missing = reproduce._prepare(data, arms)
    assert missing.keys() == {("scenes", "all", "main"), ("products", "all", "other")}
    said = capsys.readouterr().out
    assert f"{root / 'coco'} does not exist, expected MSCOCO 2014" in said and "train2014.zip" in said
    assert "nowhere does not exist" in said and "hf download" in said
    assert "These arms can run without it: products csa.\n" in said
    with pytest.raises(MivpgError, match="coco does not exist"):
        reproduce._prepare(data, arms[1:2])


def test_captions_of_several_epochs_are_of_one_training(whole):
    out, results = whole
    folder = out / "runs" / "slides" / "seed-0" / "epoch_by_epoch"
    assert yaml.safe_load((folder / "config.yaml").read_text())["num_train_epochs"] == 2
    assert len(list(folder.glob("checkpoint-*"))) == 2
    for example in results["figure5"]["examples"]:
        assert list(example["captions"]) == ["after 0 epochs", "after 2 epochs"]
        last = read_captions(out / "captions" / "slides" / "seed-0" / "epoch_2.jsonl")
        assert example["captions"]["after 2 epochs"] == last[example["id"]]
    assert len(results["figure5"]["examples"]) == 3
    assert (out / "figure5.png").exists()


def test_costs_are_measured_where_the_table_shows_them(whole):
    out, results = whole
    costs = {row["arm"]: row["costs"] for row in results["aggregators"]["rows"]}
    assert costs["csa"]["visual_tokens"] == [16.0, 16.0]
    assert all(tokens > 32 for tokens in costs["qformer_per_image"]["visual_tokens"])  # two photos at least
    assert all(0 < seconds < 60 for arm in costs.values() for seconds in arm["seconds_a_step"])
    assert costs["csa"]["trained_parameters"][0] > costs["qformer_per_image"]["trained_parameters"][0] > 1e5
    assert not any(row["costs"] for row in results["table2"]["rows"])
    assert "visual tokens a bag" in (out / "aggregators.md").read_text()


def test_every_aggregator_is_in_the_table():
    from mivpg.aggregators.named import AGGREGATORS

    for name in ("products", "slides", "scenes"):
        arms = [arm for arm in experiments(MINIATURE)["aggregators"].arms if arm.data == name]
        assert len({arm.name for arm in arms}) == len(arms)
        names = {arm.model.get("aggregator") for arm in arms}
        assert AGGREGATORS.keys() - names == ({"pooled_projection"} if name == "slides" else set())
        assert {arm.num_pairs for arm in arms} == {2000 if name == "scenes" else None}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_arms_of_one_name_are_the_same_run(scale):
    known = {}
    for experiment in experiments(scale).values():
        for arm in experiment.arms:
            arm = dataclasses.replace(arm, title="", model=dict(arm.model))
            assert known.setdefault((arm.data, arm.name), arm) == arm, experiment.name
    assert ("scenes", "none_2000" if scale is MINIATURE else "none_560000") in known


@pytest.mark.slow
@pytest.mark.usefixtures("quick_meteor")
def test_arms_with_models_of_their_own(tmp_path, monkeypatch):
    """A convolutional backbone, another base, and scenes with the vision model unfrozen."""
    out = tmp_path / "out"
    chosen = {
        "table1": {("slides", "recurrent_densenet121_augmented"), ("slides", "recurrent_vit")},
        "table4": {("slides", "csa"), ("slides", "csa_other")},
        "figure8": {("scenes", "ppeg_16"), ("scenes", "unfrozen_larger_16")},
    }
    make_small(monkeypatch, lambda scale: only(experiments(scale), chosen))
    results = reproduce.reproduce(["table1", "table4", "figure8"], scale="miniature", out=out, num_seeds=1)
    for name, found in results.items():
        assert {(row["data"], row["arm"]) for row in found["rows"]} == chosen[name]
        assert all(len(values) == 1 for row in found["rows"] for values in row["metrics"].values())
    titles = {row["arm"]: row["title"] for row in results["table1"]["rows"]}
    assert titles["recurrent_densenet121_augmented"].endswith("augmented (random weights)")
    assert "random" not in titles["recurrent_vit"]
    plain, augmented = (
        len(list((out / "features" / f"slides_densenet121{name}").glob("*.safetensors"))) for name in ("", "_augmented")
    )
    assert augmented == MINIATURE.num_copies * plain > 0


def test_tables_can_be_read_by_machines(whole):
    out, results = whole
    with (out / "table2.csv").open() as file:
        rows = list(csv.DictReader(file))
    of_csa = [float(row["value"]) for row in rows if row["arm"] == "csa" and row["metric"] == "CIDEr"]
    assert of_csa == next(row for row in results["table2"]["rows"] if row["arm"] == "csa")["metrics"]["CIDEr"]
    assert (out / "figure4.png").read_bytes().startswith(b"\x89PNG")


def test_an_arm_of_two_tables_is_run_once(whole):
    out, results = whole
    folders = [folder.name for folder in (out / "runs" / "products" / "seed-0").iterdir()]
    assert sorted(folders) == ["csa", "qformer_per_image"]  # zero-shot trains nothing
    of_csa = [
        next(row for row in results[name]["rows"] if (row["data"], row["arm"]) == ("products", "csa"))
        for name in ("table2", "table3")
    ]
    assert of_csa[0] == of_csa[1]


def test_arms_differ_in_what_the_table_says_alone(whole):
    out, _ = whole
    folders = sorted((out / "runs" / "products" / "seed-0").iterdir())
    configs = {folder.name: yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders}
    for config in configs.values():
        for name in ("patch_pooling", "instance_correlation", "aggregator"):
            config["model"][name] = None
        config["dataset"]["features"] = config["output_dir"] = None
    assert all(config == configs["csa"] for config in configs.values())


def test_seeds_draw_split_and_order(whole):
    out, _ = whole
    first, second = (
        yaml.safe_load((out / "runs" / "slides" / f"seed-{seed}" / "csa" / "config.yaml").read_text())
        for seed in (0, 1)
    )
    assert first["seed"] != second["seed"]
    assert first["dataset"]["patch_gastric"]["split_seed"] != second["dataset"]["patch_gastric"]["split_seed"]


def test_a_second_run_does_what_is_missing(whole, capsys):
    out, results = whole
    times = {file: file.stat().st_mtime_ns for file in (out / "captions").rglob("*.jsonl")}
    lost = out / "captions" / "products" / "seed-0" / "csa.jsonl"
    captions = lost.read_bytes()
    lost.unlink()
    shutil.rmtree(out / "runs" / "slides" / "seed-1" / "induced")
    again = reproduce.reproduce(["table3"], scale="miniature", out=out, num_seeds=2)
    assert lost.read_bytes() == captions
    assert {file: file.stat().st_mtime_ns for file in times if file != lost} == {
        file: time for file, time in times.items() if file != lost
    }
    row = next(row for row in again["table3"]["rows"] if (row["data"], row["arm"]) == ("slides", "induced"))
    assert len(row["metrics"]["CIDEr"]) == 2 and not row["failed"]
    of_csa = [
        next(row for row in found["table3"]["rows"] if (row["data"], row["arm"]) == ("products", "csa"))
        for found in (again, results)
    ]
    assert of_csa[0] == of_csa[1]


def test_captions_of_another_base_do_not_fill_the_table(whole):
    """They are there, but the run that would write them is refused: so its row says."""
    out, _ = whole
    record = out / "captions" / "products" / "seed-1" / "csa.made_of.json"
    made_of = record.read_text()
    record.write_text(json.dumps(json.loads(made_of) | {"base": "another"}))
    try:
        found = reproduce.reproduce(["table2"], scale="miniature", out=out, num_seeds=2)
    finally:
        record.write_text(made_of)
    row = next(row for row in found["table2"]["rows"] if row["arm"] == "csa")
    assert row["seeds"] == [0] and len(row["metrics"]["CIDEr"]) == 1
    assert "made with another base" in row["failed"]["1"]
    assert has_failed(found["table2"])


def test_what_is_not_there(tmp_path):
    with pytest.raises(MivpgError, match="no experiment 'table9'"):
        reproduce.reproduce(["table9"], scale="miniature", out=tmp_path / "out")
    with pytest.raises(MivpgError, match="needs --data-root"):
        reproduce.reproduce(["table2"], scale="paper", out=tmp_path / "out")
    with pytest.raises(MivpgError, match=r"--data-root \S*data is no folder, expected the one with abo"):
        reproduce.reproduce(["table2"], scale="paper", out=tmp_path / "out", data_root=tmp_path / "data")
    assert not (tmp_path / "out").exists()  # so that the right one can be named
    (tmp_path / "data").mkdir()
    with pytest.raises(MivpgError, match=r"abo does not exist, expected Amazon Berkeley Objects.*abo-listings.tar"):
        reproduce.reproduce(["table2"], scale="paper", out=tmp_path / "out", data_root=tmp_path / "data")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(MivpgError, match="is in use"):
        reproduce.reproduce(["table2"], scale="miniature", out=tmp_path / "used")
    (tmp_path / "other").mkdir()
    reproduce._claim(tmp_path / "other", "paper", tmp_path)
    reproduce._claim(tmp_path / "other", "paper", tmp_path)
    with pytest.raises(MivpgError, match="other holds experiments with another data_root; name another folder"):
        reproduce.reproduce(["table2"], scale="paper", out=tmp_path / "other", data_root=tmp_path / "data")
    with pytest.raises(MivpgError, match="other holds experiments at the scale 'paper'; name another folder"):
        reproduce.reproduce(["table2"], scale="miniature", out=tmp_path / "other")


@pytest.mark.slow
def test_a_killed_parent_takes_its_runs_with_it(tmp_path):
    """Else the next command would start the same runs beside them."""
    script = (
        "from pathlib import Path; from mivpg.experiments.runner import run_all; from sleeping_run import Sleeping; "
        f"folder = Path({str(tmp_path)!r}); "
        "run_all([Sleeping(name='a', log=folder / 'a.txt', captions={folder / 'a.jsonl': None})])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    pid = tmp_path / "a.pid"
    while not pid.exists() or not pid.read_text():
        assert parent.poll() is None
        time.sleep(0.2)
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(int(pid.read_text()), 9)
    raise AssertionError("the run lives on")


class TestRuns:
    """What a run makes sure of before it starts, and what is said of one that failed."""

    def run_of(self, folder: Path, **made_of) -> Run:
        captions = {folder / "captions" / name: None for name in ("csa.jsonl", "csa_too.jsonl")}
        (folder / "captions").mkdir(exist_ok=True)
        return Run(name="csa", log=folder / "log.txt", captions=captions, made_of=made_of)

    def test_captions_of_another_base_are_not_taken_for_its_own(self, tmp_path):
        run = self.run_of(tmp_path, base="a", training={"seed": 0})
        run.claim()
        run.claim()  # after an interruption
        assert not run.is_done
        for file in run.captions:
            file.touch()
        assert run.is_done
        other = self.run_of(tmp_path, base="b", training={"seed": 0})
        assert not other.is_done
        with pytest.raises(MivpgError, match=r"csa.made_of.json: .* made with another base; delete them"):
            other.claim()
        with pytest.raises(MivpgError, match=r"made with another training; delete them"):  # which it no longer has
            self.run_of(tmp_path, base="a").claim()

    def test_captions_without_a_record_are_nobodys(self, tmp_path):
        run = self.run_of(tmp_path, base="a")
        next(iter(run.captions)).touch()
        with pytest.raises(MivpgError, match="made with another base"):
            run.claim()

    def test_a_killed_run_does_not_speak_by_its_last_line(self, tmp_path):
        run = self.run_of(tmp_path)
        run.log.write_text("Training on 630 captions …\n")
        assert runner._reason(run, -9) == "ended by SIGKILL; was there too little memory?"
        assert runner._reason(run, 1) == "Training on 630 captions …"

    @pytest.mark.parametrize(
        ("variable", "count", "names"),
        [("", 0, []), ("", 2, ["0", "1"]), ("5,7", 2, ["5", "7"]), ("GPU-1f", 1, ["GPU-1f"]), ("-1", 0, [])],
    )
    def test_each_gpu_has_one_run(self, monkeypatch, variable, count, names):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: count)
        assert runner.visible_gpus() == names


def test_a_table_of_which_nothing_ran_is_reported(tmp_path):
    """As where a data set is missing: the report says so, and does not draw bars of nothing."""
    experiment = dataclasses.replace(experiments(MINIATURE)["figure4"], claims=())
    rows = [
        {
            "data": arm.data,
            "arm": arm.name,
            "title": arm.title,
            "seeds": [],
            "metrics": {metric: [] for metric in METRICS},
            "of_labels": [],
            "costs": {},
            "failed": {"0": "data/coco does not exist"},
        }
        for arm in experiment.arms
    ]
    results = {
        "title": "Figure 4",
        "note": "",
        "seeds": [0],
        "rows": rows,
        "floors": [],
        "examples": [],
        "differences": [],
    }
    write_results(tmp_path, experiment, results)
    write_report(tmp_path / "report.html", title="T", lead="L", parts=report_parts(tmp_path, experiment, results))
    assert "data/coco does not exist" in (tmp_path / "report.html").read_text()
    assert "data/coco does not exist" in (tmp_path / "figure4.md").read_text()


@pytest.mark.parametrize("scale", [MINIATURE, PAPER], ids=lambda scale: scale.name)
@pytest.mark.parametrize(("name", "folder"), [("products", "abo"), ("slides", "patch_gastric"), ("scenes", "coco")])
def test_settings_are_those_of_the_configs(scale, name, folder):
    """What `mivpg train configs/…` runs is what the tables run."""
    config = yaml.safe_load((CONFIGS / scale.name / f"{folder}.yaml").read_text())
    settings = scale.settings[name]
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for field in config.keys() - {"model", "dataset", "output_dir", "prompt", "seed", "validation"}:
        assert config[field] == settings.training.get(field, defaults[field]), field
    assert settings.training.keys() <= config.keys()
    generation = dataclasses.asdict(settings.generation)
    assert config["validation"] == generation
    assert config["model"]["max_caption_tokens"] == settings.max_caption_tokens
    assert config["prompt"] == PROMPT
    if scale is PAPER:
        assert config["model"]["base"] == scale.base
    assert f"_{settings.tokens}_" in config["dataset"]["features"]
    assert data.NAMES[name][0] == folder


class TestStatistics:
    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [
            (0.01, 0.3, "present"),
            (-0.3, -0.01, "the other way round"),
            (-0.05, 0.09, "absent"),
            (-0.05, 0.2, "inconclusive"),
            (-0.2, 0.05, "inconclusive"),
        ],
    )
    def test_verdicts(self, low, high, verdict):
        claim = Claim(better="a", worse="b", says="a is better")
        difference = Difference(claim=claim, data="slides", mean=(low + high) / 2, low=low, high=high, margin=0.1)
        assert difference.verdict == verdict
