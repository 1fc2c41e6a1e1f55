"""Bags with labels: every aggregator under the classifier, scores, cross-validation, and going on where it stopped."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mivpg import MivpgForBagClassification, classification
from mivpg.aggregators.named import AGGREGATORS, SCORING_AGGREGATORS
from mivpg.classification import (
    DEFAULT_QFORMER,
    ClassifierConfig,
    Prediction,
    collate,
    cross_validate,
    load_labelled_bags,
    make_classifier,
    predict,
    score_predictions,
    split_into_folds,
    train_classifier,
)
from mivpg.cli import main
from mivpg.configuration_mivpg import Q_FORMERS
from mivpg.datasets.bag_set import BagSet, LabelledBag
from mivpg.errors import BagError, MivpgError
from mivpg.experiments.digits import QFORMER as DIGITS_QFORMER
from mivpg.modeling_mivpg import class_probabilities
from tiny import randomize_weights

WIDTH = 6
QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "cross_attention_frequency": 1,
    "initializer_range": 0.2,
}
EVERY = [*Q_FORMERS, *AGGREGATORS, *SCORING_AGGREGATORS]
NEED_TOKENS = {"linear_projection": 1, "pooled_projection": 1}


def config_of(aggregator: str, **options) -> ClassifierConfig:
    """Small and quick."""
    options = {"num_query_tokens": NEED_TOKENS.get(aggregator, 3), "num_train_epochs": 2} | options
    if aggregator == "transmil":
        options["aggregator_options"] = {"size": 16, "num_heads": 2, "num_landmarks": 4}
    return ClassifierConfig(aggregator=aggregator, qformer=QFORMER, **options)


def bags_of(number: int, num_labels: int = 2, seed: int = 0) -> list[LabelledBag]:
    """The first feature of one instance says the label of its bag."""
    generator = torch.Generator().manual_seed(seed)
    bags = []
    for index in range(number):
        label = index % num_labels
        instances = torch.randn(3 + index % 4, WIDTH, generator=generator) * 0.3
        instance_labels = torch.zeros(len(instances), dtype=torch.long)
        if label:
            instances[1, label - 1] += 4
            instance_labels[1] = 1
        bags.append(LabelledBag(id=f"b{index}", instances=instances, label=label, instance_labels=instance_labels))
    return bags


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("aggregator", EVERY)
def test_every_aggregator_scores_bags_and_instances(aggregator, num_labels):
    bags = bags_of(5, num_labels)
    model = make_classifier(config_of(aggregator), width=WIDTH, num_labels=num_labels)
    labels = torch.tensor([bag.label for bag in bags])
    output = model(**collate(bags, model.device), labels=labels)
    num_logits = 1 if num_labels == 2 else num_labels
    assert output.logits.shape == (5, num_logits) and output.loss.ndim == 0
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    predictions = predict(model, bags, with_instances=True, batch_size=2)
    assert [prediction.id for prediction in predictions] == [bag.id for bag in bags]
    for bag, prediction in zip(bags, predictions, strict=True):
        assert sum(prediction.probabilities) == pytest.approx(1, abs=1e-6)
        assert len(prediction.probabilities) == num_labels
        assert len(prediction.instance_scores) == len(bag.instances)


@pytest.mark.parametrize("aggregator", EVERY)
def test_a_batch_says_what_its_bags_say_alone(aggregator):
    bags = bags_of(6)
    model = make_classifier(config_of(aggregator), width=WIDTH, num_labels=2).eval()
    together = predict(model, bags, batch_size=6, with_instances=True)
    alone = predict(model, bags, batch_size=1, with_instances=True)
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert one.instance_scores == pytest.approx(other.instance_scores, abs=1e-4)


def test_pooled_images_are_the_instances():
    """Where an image's tokens are pooled, it has one score; padding in a batch has none."""
    bags = [
        dataclasses.replace(bag, instances=bag.instances[:, None].repeat(1, 3, 1), instance_labels=None)
        for bag in bags_of(4)
    ]
    model = make_classifier(config_of("mivpg", patch_pooling="mean"), width=WIDTH, num_labels=2).eval()
    predictions = predict(model, bags, with_instances=True, batch_size=4)
    assert [len(prediction.instance_scores) for prediction in predictions] == [3, 4, 5, 6]
    by_token = make_classifier(config_of("mivpg"), width=WIDTH, num_labels=2).eval()
    predictions = predict(by_token, bags, with_instances=True, batch_size=4)
    assert [len(prediction.instance_scores) for prediction in predictions] == [9, 12, 15, 18]


def test_instances_are_scored_as_bags_of_one():
    bag = bags_of(2)[1]
    model = make_classifier(config_of("mivpg"), width=WIDTH, num_labels=2).eval()
    scores = model.score_instances(bag.instances[None, :, None])[0, :, 0]
    with torch.no_grad():
        expected = [model(instance[None, None, None]).logits.item() for instance in bag.instances]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_linear_projection_scores_every_token_by_its_own_prompt():
    """Whole images go in, as it takes no others; the scores of the tokens have the score of the bag as their mean."""
    generator = torch.Generator().manual_seed(0)
    bags = [
        LabelledBag(id=str(number), instances=torch.randn(number, 3, WIDTH, generator=generator), label=0)
        for number in (2, 4)
    ]
    model = make_classifier(config_of("linear_projection", num_query_tokens=3), width=WIDTH, num_labels=2).eval()
    with torch.no_grad():
        batch = collate(bags, model.device)
        scores, logits = model.score_instances(**batch), model(**batch).logits
        for index, bag in enumerate(bags):
            expected = model.classifier(model.aggregator.projection(bag.instances.flatten(0, 1)))
            torch.testing.assert_close(scores[index, : len(expected)], expected)
            torch.testing.assert_close(scores[index, : len(expected)].mean(dim=0), logits[index])
            assert not scores[index, len(expected) :].any()
    predictions = predict(model, bags, with_instances=True)
    assert [len(prediction.instance_scores) for prediction in predictions] == [6, 12]


def test_instances_are_scored_a_few_thousand_at_a_time():
    embeds = torch.randn(1, 5000, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    model = make_classifier(config_of("abmil"), width=WIDTH, num_labels=2).eval()
    sizes = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        scores = model.score_instances(embeds)
        assert len(sizes) > 1 and max(sizes) < 5000 and sum(sizes) == 5000
        torch.testing.assert_close(scores[0], model(embeds[0][:, None]).logits)


def test_binary_loss_and_probabilities_are_those_of_a_logit():
    logits = torch.tensor([[0.3], [-1.2]])
    expected = torch.sigmoid(logits[:, 0])
    assert torch.allclose(class_probabilities(logits)[:, 1], expected)
    model = make_classifier(config_of("mean"), width=WIDTH, num_labels=2)
    bags = bags_of(2)
    output = model(**collate(bags, model.device), labels=torch.tensor([0, 1]))
    p = output.logits[:, 0].sigmoid()
    assert output.loss.item() == pytest.approx(-((1 - p[0]).log() + p[1].log()).item() / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("aggregator", "learning_rate"),
    [
        ("mivpg", 3e-3),
        # The classifier reads the mean over images, in which one hardly shows at first.
        pytest.param("qformer_per_image", 1e-2, marks=pytest.mark.slow),
        pytest.param("abmil", 3e-3, marks=pytest.mark.slow),
        ("ds_mil", 3e-3),
    ],
)
def test_it_learns_and_finds_the_instance(aggregator, learning_rate):
    train, test = bags_of(60, seed=0), bags_of(40, seed=1)
    config = config_of(aggregator, num_train_epochs=12, learning_rate=3 * learning_rate)
    model = make_classifier(config, width=WIDTH, num_labels=2)
    train_classifier(model, train, config)
    scores = score_predictions(test, predict(model, test, with_instances=True))
    assert scores["auc"] > 0.95 and scores["accuracy"] > 0.85 and scores["instance_auc"] > 0.9


def test_a_classifier_survives_saving(tmp_path):
    bags = bags_of(4)
    for aggregator in ("mivpg", "set_transformer", "dtfd_mil"):
        model = make_classifier(config_of(aggregator), width=WIDTH, num_labels=2).eval()
        model.save_pretrained(tmp_path / aggregator)
        again = MivpgForBagClassification.from_pretrained(tmp_path / aggregator).eval()
        assert again.config.text_config is None and again.config.vision_config is None
        assert predict(again, bags) == predict(model, bags)


def test_the_same_seed_gives_the_same_classifier():
    bags = bags_of(12)
    config = config_of("mivpg")
    found = []
    for _ in range(2):
        model = make_classifier(config, width=WIDTH, num_labels=2)
        train_classifier(model, bags, config)
        found.append(predict(model, bags))
    assert found[0] == found[1]


def test_scores_are_scikit_learns():
    from sklearn.metrics import roc_auc_score

    bags = bags_of(4)
    predictions = [Prediction("", [1 - p, p]) for p in (0.2, 0.1, 0.4, 0.9)]
    scores = score_predictions(bags, predictions)
    assert scores == {"accuracy": 0.75, "auc": roc_auc_score([0, 1, 0, 1], [0.2, 0.1, 0.4, 0.9])}
    assert "auc" not in score_predictions(bags[:1], predictions[:1])  # of one class there is none


class TestCrossValidation:
    @pytest.fixture
    def bag_set(self) -> BagSet:
        return BagSet(bags=bags_of(20), label_names=["no", "yes"])

    def test_every_bag_is_tested_once_by_a_model_that_has_not_seen_it(self, bag_set, tmp_path):
        config = config_of("abmil", num_folds=4, seed=3)
        results = cross_validate(bag_set, config, tmp_path / "out")
        tested = [
            json.loads(line)["id"]
            for fold in range(4)
            for line in (tmp_path / "out" / f"fold-{fold}.jsonl").read_text().splitlines()
        ]
        assert sorted(tested) == sorted(bag.id for bag in bag_set.bags)
        for train, test in split_into_folds(bag_set.bags, config):
            assert not set(train) & set(test) and len(train) + len(test) == 20
            assert sorted(bag_set.bags[index].label for index in test) == [0, 0, 1, 1, 1] or len(test) == 5
        accuracies = [fold["accuracy"] for fold in results["folds"]]
        assert results["mean"]["accuracy"] == pytest.approx(np.mean(accuracies))
        assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == results

    def test_a_test_has_batches_of_the_same_size(self, bag_set, tmp_path, monkeypatch):
        sizes = []

        def counted(bags, device):
            sizes.append(len(bags))
            return collate(bags, device)

        monkeypatch.setattr(classification, "collate", counted)
        cross_validate(bag_set, config_of("mean", num_folds=2, batch_size=3), tmp_path / "out")
        assert max(sizes) == 3

    def test_folds_are_made_without_a_warning(self, bag_set):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            folds = split_into_folds(bag_set.bags, config_of("mean", num_folds=4))
        assert sorted(index for _, test in folds for index in test) == list(range(20))

    def test_given_folds_are_kept(self, bag_set):
        bags = [dataclasses.replace(bag, fold=index % 3) for index, bag in enumerate(bag_set.bags)]
        folds = split_into_folds(bags, config_of("abmil"))
        assert [test for _, test in folds] == [[i for i in range(20) if i % 3 == fold] for fold in range(3)]
        bags[0] = dataclasses.replace(bags[0], fold=None)
        with pytest.raises(MivpgError, match="some bags have a fold and some have none"):
            split_into_folds(bags, config_of("abmil"))

    def test_what_is_there_is_not_done_again(self, bag_set, tmp_path):
        config = config_of("mean", num_folds=2)
        first = cross_validate(bag_set, config, tmp_path)
        files = sorted(tmp_path.glob("fold-*.jsonl"))
        files[1].unlink()
        time = files[0].stat().st_mtime_ns
        assert cross_validate(bag_set, config, tmp_path) == first
        assert files[0].stat().st_mtime_ns == time and files[1].exists()
        with pytest.raises(MivpgError, match="a run with another aggregator, seed"):
            cross_validate(bag_set, dataclasses.replace(config, aggregator="max", seed=1), tmp_path)
        moved = [dataclasses.replace(bag, coords=torch.ones(len(bag.instances), 2)) for bag in bag_set.bags]
        for bags in (bags_of(20, seed=9), moved):
            with pytest.raises(MivpgError, match="a run with another bags"):
                cross_validate(BagSet(bags=bags, label_names=["no", "yes"]), config, tmp_path)

    def test_no_group_is_in_training_and_test(self):
        """Bags alike in a group, labels by lot: divided groups would be recognised."""
        bags = [dataclasses.replace(bag, group=str(index // 4)) for index, bag in enumerate(bags_of(40))]
        for train, test in split_into_folds(bags, config_of("mean", num_folds=3)):
            assert not {bags[index].group for index in train} & {bags[index].group for index in test}
            assert {bags[index].label for index in test} == {0, 1}

    def test_what_is_no_run_is_refused(self, bag_set, tmp_path):
        (tmp_path / "letter.txt").touch()
        with pytest.raises(MivpgError, match="is in use"):
            cross_validate(bag_set, config_of("mean"), tmp_path)
        with pytest.raises(MivpgError, match="expected at least two labels"):
            cross_validate(BagSet(bags=bag_set.bags[::2], label_names=["no"]), config_of("mean"), tmp_path / "out")

    def test_more_folds_than_bags_of_a_class(self, bag_set, tmp_path):
        with pytest.raises(MivpgError, match="num_folds is 11, but a class has 10 bags"):
            cross_validate(bag_set, config_of("mean", num_folds=11), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def write_bags(path: Path, *records: dict) -> Path:
    """A bag file whose `features`, arrays here, are files beside it; every second bag is a yes."""
    lines = []
    for index, record in enumerate(records):
        np.save(path.with_name(f"{index}.npy"), record["features"])
        line = {"id": f"b{index}", "label": ["no", "yes"][index % 2], **record, "features": f"{index}.npy"}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


class TestFiles:
    def test_a_bag_file_with_labels(self, tmp_path):
        bags = bags_of(4)
        lines = []
        for bag in bags:
            np.save(tmp_path / f"{bag.id}.npy", bag.instances.numpy())
            lines.append({"id": bag.id, "features": f"{bag.id}.npy", "label": ["no", "yes"][bag.label]})
        file = tmp_path / "bags.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = load_labelled_bags(file)
        assert found.label_names == ["no", "yes"]
        for one, other in zip(found.bags, bags, strict=True):
            assert (one.id, one.label) == (other.id, other.label)
            assert torch.equal(one.instances[:, 0], other.instances)
        lines[2].pop("label")
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(MivpgError, match="'b2' has no label"):
            load_labelled_bags(file)

    def test_coordinates_of_a_bag_file_are_read(self, tmp_path):
        features = np.zeros((2, WIDTH), dtype=np.float32)
        file = write_bags(
            tmp_path / "bags.jsonl",
            {"features": features, "coords": [[0, 0], [0, 1.5]]},
            {"features": features, "coords": [[3, 0], [0, 0]]},
        )
        coords = [bag.coords for bag in load_labelled_bags(file).bags]
        assert [of_bag.tolist() for of_bag in coords] == [[[0, 0], [0, 1.5]], [[3, 0], [0, 0]]]
        assert all(of_bag.dtype == torch.float32 for of_bag in coords)
        write_bags(file, {"features": features, "coords": [[0, 0]]})
        with pytest.raises(BagError, match="bag 'b0': 2 images and 1 coordinates, expected as many"):
            load_labelled_bags(file)

    @pytest.mark.parametrize(
        ("other", "kind"),
        [
            ({"features": np.zeros((3, 1, WIDTH + 1), dtype=np.float32)}, "features (N, 1, 7) without coordinates"),
            ({"features": np.zeros((3, 2, WIDTH), dtype=np.float32)}, "features (N, 2, 6) without coordinates"),
            (
                {"features": np.zeros((1, WIDTH), dtype=np.float32), "coords": [[0, 0]]},
                "features (N, 1, 6) with coordinates",
            ),
        ],
    )
    def test_bags_that_differ_are_found_before_training(self, tmp_path, other, kind):
        features = np.zeros((2, WIDTH), dtype=np.float32)
        file = write_bags(tmp_path / "bags.jsonl", {"features": features}, {"features": features}, other)
        message = f"{file}: bag 'b0' has features (N, 1, 6) without coordinates and bag 'b2' has {kind}, expected all"
        with pytest.raises(BagError, match=re.escape(message)):
            load_labelled_bags(file)

    def test_endings(self, tmp_path):
        with (tmp_path / "set.NPZ").open("wb") as file:
            np.savez(file, x=np.zeros((2, WIDTH)), bag=np.arange(2), y=np.arange(2))
        assert len(load_labelled_bags(tmp_path / "set.NPZ").bags) == 2
        with pytest.raises(MivpgError, match=r"ends in '\.txt', expected a bag set, \.npz, or a bag file, \.jsonl or"):
            load_labelled_bags(tmp_path / "set.txt")

    def test_the_command(self, tmp_path, capsys):
        bags = bags_of(12)
        np.savez(
            tmp_path / "set.npz",
            x=np.concatenate([bag.instances for bag in bags]),
            bag=np.concatenate([[index] * len(bag.instances) for index, bag in enumerate(bags)]),
            y=[bag.label for bag in bags],
        )
        (tmp_path / "config.yaml").write_text("aggregator: abmil\nnum_train_epochs: 3\nnum_folds: 3\n")
        command = ["classify", str(tmp_path / "config.yaml"), "--bags", str(tmp_path / "set.npz")]
        main([*command, "--out", str(tmp_path / "out"), "--num-folds", "2"])
        output = capsys.readouterr().out
        assert "accuracy" in output and "auc" in output and str(tmp_path / "out" / "metrics.json") in output
        assert len(json.loads((tmp_path / "out" / "metrics.json").read_text())["folds"]) == 2
        gated = ["--aggregator-options.gated", "false", "--aggregator-options.embed-size", "8"]
        main([*command, "--out", str(tmp_path / "small"), *gated])
        model = MivpgForBagClassification.from_pretrained(tmp_path / "small" / "fold-0")
        assert model.config.aggregator_options == {"gated": False, "embed_size": 8}
        assert model.aggregator.gate is None and model.classifier.in_features == 8
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*command, "--out", str(tmp_path / "other"), "--aggregatr", "mean"])
        assert "aggregator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"num_folds": 1}, "num_folds is 1, expected at least 2"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    ],
)
def test_fields_that_cannot_be(options, message):
    with pytest.raises(MivpgError, match=message):
        ClassifierConfig(**options)


def test_coordinates_reach_the_model():
    bags = [
        dataclasses.replace(
            bag, coords=torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))[: len(bag.instances)]
        )
        for bag in bags_of(3)
    ]
    model = make_classifier(config_of("mivpg", position_encoding="ppeg"), width=WIDTH, num_labels=2).eval()
    for layer in model.qformer.encoder.layer:
        torch.nn.init.normal_(layer.position_encoding.convolutions[0].weight)
    moved = [dataclasses.replace(bag, coords=bag.coords.flip(0)) for bag in bags]
    assert predict(model, bags) != predict(model, moved)


def test_coordinates_of_some_bags_alone():
    bags = bags_of(3)
    bags[1] = dataclasses.replace(bags[1], coords=torch.zeros(len(bags[1].instances), 2))
    with pytest.raises(BagError, match="bag 'b1' has coordinates and bag 'b0' has none, expected all bags alike"):
        collate(bags, torch.device("cpu"))


def test_sizes_that_are_not_given_keep_their_defaults():
    model = make_classifier(ClassifierConfig(qformer={"hidden_size": 64}), width=WIDTH, num_labels=2)
    config = model.config.qformer_config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 4, 6)
    assert (config.intermediate_size, config.initializer_range) == (256, 0.05)
    assert DEFAULT_QFORMER["hidden_size"] == 128
    assert {**DEFAULT_QFORMER, **DIGITS_QFORMER} == DIGITS_QFORMER  # which gives all, so it is what it was


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregator": "abmill"}, "'aggregator' expected one of .*'abmil', .* got abmill"),
        ({"patch_pooling": "median"}, "'patch_pooling' expected one of .*, got median"),
        ({"instance_correlation": "cca"}, "'instance_correlation' expected one of .*, got cca"),
    ],
)
def test_choices_that_there_are_not(options, message):
    with pytest.raises(MivpgError, match=message) as error:
        make_classifier(ClassifierConfig(**options), width=WIDTH, num_labels=2)
    assert "\n" not in str(error.value)


def test_a_q_former_with_ppeg_needs_a_grid():
    model = make_classifier(config_of("mivpg", position_encoding="ppeg"), width=WIDTH, num_labels=2).eval()
    with pytest.raises(MivpgError, match="position_encoding is 'ppeg', so pass grid"):
        model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=torch.zeros(1, 2, WIDTH))


def test_options_that_an_aggregator_does_not_have():
    with pytest.raises(MivpgError, match="aggregator_options: ds_mil has no 'num_labels'"):
        make_classifier(config_of("ds_mil", aggregator_options={"num_labels": 3}), width=WIDTH, num_labels=2)
    with pytest.raises(MivpgError, match=r"embed_size is 2\.5, expected an integer"):
        make_classifier(config_of("abmil", aggregator_options={"embed_size": 2.5}), width=WIDTH, num_labels=2)
    with pytest.raises(MivpgError, match="aggregator_options: abmil has no 'depth'"):
        make_classifier(config_of("abmil", aggregator_options={"depth": 3}), width=WIDTH, num_labels=2)
    with pytest.raises(MivpgError, match="aggregator_options are for"):
        make_classifier(config_of("mivpg", aggregator_options={"depth": 3}), width=WIDTH, num_labels=2)
    with pytest.raises(MivpgError, match="there is no bag"):
        train_classifier(make_classifier(config_of("mean"), width=WIDTH, num_labels=2), [], config_of("mean"))


@torch.no_grad()
def test_attention_is_the_share_of_each_instance():
    """The logits are what the classifier says of the instances' sum in these shares; padding has none."""
    bags = bags_of(3)
    model = make_classifier(config_of("abmil"), width=WIDTH, num_labels=2).eval()
    randomize_weights(model, 0.5)
    batch = collate(bags, model.device)
    output = model(**batch)
    assert output.attention.shape == batch["image_mask"].shape
    for bag, shares, logits in zip(bags, output.attention, output.logits, strict=True):
        of_bag, padding = shares.split([len(bag.instances), len(shares) - len(bag.instances)])
        assert of_bag.sum().item() == pytest.approx(1, abs=1e-6) and of_bag.std() > 1e-3 and not padding.any()
        torch.testing.assert_close(model.classifier(of_bag @ model.aggregator.embed(bag.instances)), logits)
