"""Model cards: what a run knows stands in them, what nobody knows is called not known, and both outlive a copy."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, ModelCard, metadata_load, metadata_save
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from families import save_blip2
from mivpg import MivpgForBagClassification, MivpgForConditionalGeneration, MivpgProcessor
from mivpg.bags import Sample, select
from mivpg.classification import cross_validate, make_classifier
from mivpg.cli import main
from mivpg.datasets import DatasetConfig
from mivpg.datasets.abo import AboConfig
from mivpg.datasets.bag_file import load_bag_file
from mivpg.datasets.bag_set import BagSet
from mivpg.evaluation import TRAINING_METRICS, caption_floors, score_captions
from mivpg.evaluation_report import training_log
from mivpg.miniature import BASE_MODEL
from mivpg.model_card import CARD, DATA_LICENCES, Training, read_training, write_base_card, write_model_card
from mivpg.training import LOG_FILE, ModelConfig, _data_for_card, train
from test_classification import bags_of, config_of
from training_script import make_world, tiny_train_config

TRAINING = Training(
    data="3 bags with 4 captions, of `shop.csv`, read as `bag_file`.",
    data_licence="not known",
    scored_on="On 2 validation bags.",
    scores={"this model": {"BLEU@4": 0.5, "CIDEr": 1.25}, "floor label": {"BLEU@4": 0.25, "CIDEr": 1.5}},
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def best(world, tmp_path_factory) -> Path:
    """What two epochs made."""
    return train(tiny_train_config(world, output_dir=tmp_path_factory.mktemp("runs") / "run"))


def card(folder: Path) -> str:
    return (folder / CARD).read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """First cell to the others, of every table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: others for first, *others in lines}


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0].strip()


def test_a_run_says_base_data_scores_and_floors(world, best):
    text = card(best)
    samples = load_bag_file(world / "bags.jsonl")
    train_samples, val = select(samples, "train"), select(samples, "val")
    digest = json.loads((best / "config.json").read_text())["base"]["language_model"]["sha256"]["model.safetensors"]
    assert section(text, "Base").splitlines()[0] == f"- language model: `opt` (sha256 of model.safetensors {digest})"
    assert section(text, "Data") == "21 bags with 63 captions, of `bags.jsonl`, read as `bag_file`."

    logged = [json.loads(line) for line in (best.parent / LOG_FILE).read_text().splitlines()]
    best_epoch = max((entry for entry in logged if "eval_CIDEr" in entry), key=lambda entry: entry["eval_CIDEr"])
    references = {sample.id: sample.captions for sample in val}
    expected = {"this model": [f"{best_epoch[f'eval_{metric}']:.3f}" for metric in TRAINING_METRICS]}
    for name, captions in caption_floors(train_samples, val, seed=42).items():
        scores = score_captions(captions, references, metrics=TRAINING_METRICS)
        expected[f"floor {name}"] = [f"{scores[metric]:.3f}" for metric in TRAINING_METRICS]
    found = rows(section(text, "Metrics"))
    assert {name: found[name] for name in expected} == expected and found[""] == list(TRAINING_METRICS)
    assert f"after step {best_epoch['step']} of 6" in text


def test_it_names_no_folder_of_the_machine(world, best):
    assert str(world) not in card(best) and str(best.parent) not in card(best)


def test_a_checkpoint_in_the_middle_of_a_run_knows_its_base_alone(best):
    text = card(next(best.parent.glob("checkpoint-*")))
    assert section(text, "Base") == section(card(best), "Base")
    assert section(text, "Data").startswith("Not known: ") and section(text, "Metrics").startswith("Not measured here.")
    assert rows(section(text, "Licences"))["data"] == ["not known"]


def test_a_whole_copy_keeps_what_the_run_knew(best, tmp_path):
    MivpgForConditionalGeneration.from_pretrained(best).save_pretrained(tmp_path / "whole")
    text = card(tmp_path / "whole")
    assert "All weights are in this folder." in text and "All weights are in this folder." not in card(best)
    assert section(text, "Metrics") == section(card(best), "Metrics")
    assert "whether it was changed after\nthat is not known" in section(text, "Data")
    MivpgForConditionalGeneration.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "again")
    assert section(card(tmp_path / "again"), "Metrics") == section(text, "Metrics")


def test_its_run_is_found_by_the_page_of_an_evaluation(best):
    """On what a run really leaves; `test_report.py` has folders that are of no run."""
    for model in (best, *best.parent.glob("checkpoint-*")):
        assert training_log(model) == best.parent / LOG_FILE


def command_of(text: str) -> list[str]:
    """What the card says to type, in words."""
    return re.search(r"^mivpg (.*)$", section(text, "Use"), re.MULTILINE)[1].replace('"this folder"', "FOLDER").split()


def test_the_command_that_a_card_names_works(world, best, tmp_path, monkeypatch):
    few = ["--max-new-tokens", "3", "--num-beams", "1"]
    monkeypatch.chdir(tmp_path)
    bags = (world / "bags.jsonl").read_text().splitlines()[:2]
    (tmp_path / "bags.jsonl").write_text("\n".join(bags))
    for bag in map(json.loads, bags):
        shutil.copy(world / bag["features"], tmp_path)
    command = command_of(card(best))  # without a vision model
    main([*(str(best) if word == "FOLDER" else word for word in command), *few])
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 2
    with pytest.raises(SystemExit):
        main(["caption", "--model", str(best), "a.png"])

    blip2 = save_blip2(tmp_path / "blip2")
    MivpgForConditionalGeneration.from_pretrained(blip2).save_pretrained(tmp_path / "whole")
    MivpgProcessor.from_pretrained(blip2).save_pretrained(tmp_path / "whole")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    words = {"FOLDER": str(tmp_path / "whole"), "IMAGE…": "a.png"}
    command = command_of(card(tmp_path / "whole"))
    assert {*words} < {*command}
    main([*(words.get(word, word) for word in command), *few])


def test_licences_are_those_that_cards_state(tmp_path):
    blip2 = save_blip2(tmp_path / "blip2")
    heads = {
        "---\nlicense: mit\n---\n": "mit, as its card says",
        "---\nlicense: unknown\n---\n": "not known",
        "---\nlicense: [\n---\n": "not known",  # no YAML
        "# a card without a head\n": "not known",
    }
    for head, licence in heads.items():
        (blip2 / CARD).write_text(head)
        MivpgForConditionalGeneration.from_pretrained(blip2).save_trained(tmp_path / "trained")
        assert rows(section(card(tmp_path / "trained"), "Licences"))["model, `blip2`"] == [licence]


def test_a_base_on_the_hub_is_linked_and_its_licence_left_to_its_page(best, tmp_path):
    config = MivpgForConditionalGeneration.from_pretrained(best).config
    base = {"model": {"path": "Salesforce/blip2-opt-2.7b", "revision": "59a1ef6", "sha256": {}}}
    write_model_card(tmp_path, config, base, is_whole=False, training=TRAINING)
    assert metadata_load(tmp_path / CARD)["base_model"] == ["Salesforce/blip2-opt-2.7b"]
    assert "- model: `Salesforce/blip2-opt-2.7b` (commit 59a1ef6)\n" in card(tmp_path)
    assert "| not known here; its page on the Hub says |" in card(tmp_path)


def test_no_better_than_a_floor_is_said(best, tmp_path):
    config = MivpgForConditionalGeneration.from_pretrained(best).config
    write_model_card(tmp_path, config, None, is_whole=True, training=TRAINING)
    said = [line for line in card(tmp_path).splitlines() if "no better than" in line]
    assert said == ["**By CIDEr this model is no better than the floor label**, which looks at no image."]
    assert read_training(tmp_path) == TRAINING


@pytest.mark.parametrize(
    "text", ["", "# mine\n", "---\nlicense: mit\n---\n", "---\nmivpg: {a: 1}\n---\n", "---\n[\n---\n"]
)
def test_cards_that_people_write_say_nothing_of_training(tmp_path, text):
    (tmp_path / CARD).write_text(text)
    assert read_training(tmp_path) is None
    (tmp_path / CARD).write_text("---\n" + "- " * 3000 + "\n---\n")
    assert read_training(tmp_path) is None
    assert read_training(tmp_path / "nothing") is None


def test_order_matters_with_ppeg_alone(tmp_path):
    blip2 = save_blip2(tmp_path / "blip2")
    for encoding in ("none", "ppeg"):
        model = MivpgForConditionalGeneration.from_pretrained(blip2, position_encoding=encoding)
        model.save_trained(tmp_path / encoding)
        assert ("their order matters" in card(tmp_path / encoding)) == (encoding == "ppeg")


def test_data_have_the_licence_of_their_kind(tmp_path):
    assert DATA_LICENCES.keys() <= {field.name for field in dataclasses.fields(DatasetConfig)}
    dataset = DatasetConfig(abo=AboConfig(root=tmp_path))
    samples = [Sample(id="a", captions=("a chair", "a red chair"))]
    said = f"1 bags with 2 captions, of `{tmp_path.name}`, read as `abo`."
    assert _data_for_card(dataset, samples) == (said, DATA_LICENCES["abo"])
    (tmp_path / "miniature.json").write_text("{}")
    assert _data_for_card(dataset, samples) == (f"{said} They are generated.", "generated by mivpg, Apache-2.0")


def test_the_card_of_the_base_that_comes_along_is_what_its_recipe_says(tmp_path):
    recipe = json.loads((BASE_MODEL / "recipe.json").read_text())
    write_base_card(tmp_path, recipe)
    assert card(tmp_path) == card(BASE_MODEL)
    assert metadata_load(BASE_MODEL / CARD)["license"] == "apache-2.0"
    assert rows(card(BASE_MODEL))["product_lessons"][1:] == ["14", "0.79"]  # the last of them, the ends


def test_a_fold_says_what_the_most_common_label_would_reach(tmp_path):
    results = cross_validate(
        BagSet(bags=bags_of(12), label_names=["0", "1"]), config_of("mean", num_folds=2), tmp_path / "out"
    )
    text = card(tmp_path / "out" / "fold-0")
    found = rows(section(text, "Metrics"))
    assert found[""][0] == "accuracy" and found["this model"][0] == f"{results['folds'][0]['accuracy']:.3f}"
    assert found["floor the most common label"][:2] == ["0.500", "0.500"]  # as many bags of either label
    assert "It says which label a bag of images has." in text and "mivpg evaluate" not in text


def test_a_classifier_has_a_card_wherever_it_is_saved(tmp_path):
    make_classifier(config_of("mean"), width=4, num_labels=2).save_pretrained(tmp_path / "new")
    text = card(tmp_path / "new")
    assert (
        "It says which label a bag of images has." in text
        and section(text, "Base") == "Not known.\n\nAll weights are in this folder."
    )
    assert section(text, "Metrics") == "Not measured here."

    cross_validate(BagSet(bags=bags_of(12), label_names=["0", "1"]), config_of("mean", num_folds=2), tmp_path / "out")
    fold = tmp_path / "out" / "fold-0"
    MivpgForBagClassification.from_pretrained(fold).save_pretrained(tmp_path / "again")
    assert section(card(tmp_path / "again"), "Metrics") == section(card(fold), "Metrics")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(code.replace("this folder", str(fold)), found := {})
    assert isinstance(found["model"], MivpgForBagClassification)


class FakeHub:
    """Takes what is sent to the Hub, and gives back the card that is there already, if any."""

    def __init__(self, monkeypatch, there_already: str | None) -> None:
        self.cards: list[str] = []
        self.there_already = there_already
        for module in ("utils.hub", "modeling_utils"):
            monkeypatch.setattr(f"transformers.{module}.hf_api", lambda: self)
        monkeypatch.setattr(ModelCard, "load", self.load)

    def create_repo(self, repo_id: str, **kwargs) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def load(self, repo_id: str, **kwargs) -> ModelCard:
        if self.there_already is None:
            raise EntryNotFoundError("no card there")
        return ModelCard(self.there_already)

    def create_commit(self, operations: list[CommitOperationAdd], **kwargs) -> None:
        sent = {
            operation.path_in_repo: Path(operation.path_or_fileobj).read_text()
            for operation in operations
            if operation.path_in_repo == CARD
        }
        self.cards.append(sent[CARD])


@pytest.mark.parametrize("there_already", [None, "# no head\n", "---\ntags: [theirs]\n---\n# An older model\n"])
def test_the_hub_gets_the_same_card(best, tmp_path, monkeypatch, there_already):
    """transformers would send one that it makes up, or the one that is there: of an older model, perhaps."""
    hub = FakeHub(monkeypatch, there_already)
    model = MivpgForConditionalGeneration.from_pretrained(best)
    base = model.config.base
    model.save_pretrained(tmp_path / "here")
    model.push_to_hub("me/shop", tags=["shop"])
    model.save_pretrained(tmp_path / "shop", push_to_hub=True, repo_id="me/shop")
    assert model.config.base == base and json.loads((tmp_path / "shop" / "config.json").read_text())["base"] is None
    expected = card(tmp_path / "here")
    theirs = ["theirs"] if there_already is not None and "theirs" in there_already else []
    for sent, tags in zip(hub.cards, ([*theirs, "shop"], theirs), strict=True):
        added = "".join(f"- {tag}\n" for tag in tags)
        assert sent == expected.replace("- arxiv:2406.02987\n", f"- arxiv:2406.02987\n{added}")
    assert card(tmp_path / "shop") == expected


MADE_UP = "---\nlibrary_name: transformers\n---\n# Model Card\nThis model card has been automatically generated.\n"
"""What transformers writes, as it does for a processor that is sent before its model."""


@pytest.mark.parametrize("there_already", [None, MADE_UP, "---\nmivpg: null\n---\n\n# A model of mivpg 0.1\n"])
def test_where_nothing_is_known_made_cards_are_replaced(monkeypatch, there_already):
    hub = FakeHub(monkeypatch, there_already)
    make_classifier(config_of("mean"), width=4, num_labels=2).push_to_hub("me/labels")
    assert section(hub.cards[-1], "Metrics") == "Not measured here."


def test_where_nothing_is_known_a_card_written_by_hand_stays(monkeypatch):
    written = "---\nlicense: mit\n---\n# Labels of ours\n\nAsk us.\n"
    hub = FakeHub(monkeypatch, written)
    make_classifier(config_of("mean"), width=4, num_labels=2).push_to_hub("me/labels", tags=["labels"])
    assert metadata_load_of(hub.cards[-1]) == {"license": "mit", "tags": ["labels"]}
    assert hub.cards[-1].endswith("# Labels of ours\n\nAsk us.\n")


def test_where_nothing_is_known_the_card_there_says_what_it_knows(best, monkeypatch):
    hub = FakeHub(monkeypatch, card(best))
    model = make_classifier(config_of("mean"), width=4, num_labels=2)
    model.push_to_hub("me/labels")
    assert metadata_load_of(hub.cards[-1])["mivpg"] == dataclasses.asdict(read_training(best))
    hub.there_already = None
    model.push_to_hub("me/others")  # of which it says nothing
    assert "mivpg" not in metadata_load_of(hub.cards[-1])


def metadata_load_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def cached(cache: Path, revision: str, commit: str) -> Path:
    """Where a cache, as huggingface_hub lays it out, has a revision of me/shop."""
    folder = cache / "models--me--shop"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return folder / "snapshots" / commit


def test_of_a_model_on_the_hub_the_card_is_read_too(best, tmp_path):
    """A checkpoint, a whole model, and one without a card; each is another revision."""
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    shutil.copytree(best, cached(tmp_path / "cache", "trained", "a" * 40))
    MivpgForConditionalGeneration.from_pretrained(best).save_pretrained(cached(tmp_path / "cache", "whole", "b" * 40))
    shutil.copytree(best, bare := cached(tmp_path / "cache", "bare", "c" * 40))
    (bare / CARD).unlink()
    known = read_training(best)
    for revision, expected in (("trained", known), ("whole", known), ("bare", None)):
        model = MivpgForConditionalGeneration.from_pretrained("me/shop", revision=revision, **hub)
        assert model._training == expected, revision


def test_the_card_on_the_hub_is_asked_for_as_other_files_are(tmp_path, monkeypatch):
    """And a Hub that does not answer keeps no model from being loaded."""
    make_classifier(config_of("mean"), width=4, num_labels=2).save_pretrained(
        folder := cached(tmp_path / "cache", "v2", "a" * 40)
    )
    (folder / CARD).unlink()
    asked = []

    def cached_file(name, file, **hub):
        asked.append((name, file, hub))
        raise OSError("no answer")

    monkeypatch.setattr("mivpg.checkpoints.cached_file", cached_file)
    hub = {"cache_dir": tmp_path / "cache", "revision": "v2", "token": "t", "local_files_only": True}
    assert MivpgForBagClassification.from_pretrained("me/shop", **hub)._training is None
    assert asked == [("me/shop", CARD, hub)]


def test_weights_that_are_given_have_no_card():
    model = make_classifier(config_of("mean"), width=4, num_labels=2)
    again = MivpgForBagClassification.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert again._training is None
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


def test_a_card_survives_what_transformers_does_to_it(best, tmp_path):
    """`MivpgProcessor.push_to_hub`, as every processor's, loads the card that is on the Hub and sends it again."""
    ModelCard(card(best)).save(tmp_path / CARD)
    assert read_training(tmp_path) == read_training(best) is not None
    assert card(tmp_path).split("\n---\n")[1] == card(best).split("\n---\n")[1]


def test_the_head_is_what_the_hub_reads(best):
    head = metadata_load(best / CARD)
    assert (head["library_name"], head["pipeline_tag"], head["license"]) == ("mivpg", "image-to-text", "unknown")
    assert card(best).startswith("---\n") and yaml.safe_load(card(best).split("---\n")[1]) == head


@pytest.mark.parametrize(
    "scores", [None, {"floor label": {"CIDEr": 1.5}}, {"this model": {}, "floor label": {"CIDEr": 1}}]
)
def test_scores_that_people_changed_say_nothing_of_training(best, tmp_path, scores):
    config = MivpgForConditionalGeneration.from_pretrained(best).config
    write_model_card(tmp_path, config, None, is_whole=True, training=TRAINING)
    head = metadata_load(tmp_path / CARD)
    metadata_save(tmp_path / CARD, head | {"mivpg": head["mivpg"] | {"scores": scores}})
    assert read_training(tmp_path) is None


def test_a_run_that_starts_from_another_names_both(world, best, tmp_path):
    config = tiny_train_config(world, output_dir=tmp_path / "run")
    config = dataclasses.replace(config, model=ModelConfig(base=str(best), trainable=["language_model", "qformer"]))
    second = train(config)
    data = read_training(best).data
    assert read_training(second).data == f"{data} Before, in another run: {data}"
    assert "which a language model reads" in card(second)
    assert "which a frozen language model reads" in card(best)
