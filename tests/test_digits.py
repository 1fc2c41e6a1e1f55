"""Bags of digits: what makes them positive, that no digit is in training and test, and the experiment, small."""

import csv
import json
import multiprocessing.dummy

import numpy as np
import pytest

from mivpg.errors import MivpgError
from mivpg.experiments import digits
from mivpg.experiments.digits import ARMS, TARGET, DigitsConfig, encode_digits, make_bags, run_digits, split_digits

SMALL = DigitsConfig(num_train_bags=(8, 16), num_test_bags=20, num_seeds=1, num_steps={"contains": 4, "repeats": 4})


def shown(bag, of_train) -> list[int]:
    """Which digit each row of a bag is, found by its pixels."""
    pixels, labels = of_train
    return [int(labels[np.abs(pixels - row.numpy()).sum(axis=1).argmin()]) for row in bag.instances]


@pytest.mark.parametrize("task", ["contains", "repeats"])
def test_labels_are_what_the_digits_say(task):
    train, _ = split_digits(0)
    bags = make_bags(task, *train, 60, seed=0)
    assert sum(bag.label for bag in bags) == 30
    for bag in bags:
        seen = shown(bag, train)
        if task == "contains":
            assert bag.label == (TARGET in seen)
            assert bag.instance_labels.tolist() == [int(digit == TARGET) for digit in seen]
        else:
            assert bag.label == (len(set(seen)) < len(seen))
            assert bag.instance_labels.tolist() == [int(seen.count(digit) > 1) for digit in seen]


def test_sizes_do_not_tell_the_label():
    train, _ = split_digits(0)
    for task, mean in (("contains", 10), ("repeats", 5)):
        bags = make_bags(task, *train, 2000, seed=1)
        sizes = [np.mean([len(bag.instances) for bag in bags if bag.label == label]) for label in (0, 1)]
        assert abs(sizes[0] - sizes[1]) < 0.25 and abs(np.mean(sizes) - mean) < 0.2


def test_no_digit_is_in_training_and_test():
    for seed in (0, 1):
        train, test = split_digits(seed)
        assert len(train[0]) + len(test[0]) == 1797
        assert len(np.unique(np.concatenate([train[0], test[0]]), axis=0)) == len(np.unique(train[0], axis=0)) + len(
            np.unique(test[0], axis=0)
        )
    assert not np.array_equal(split_digits(0)[1][1], split_digits(1)[1][1])


def test_the_encoder_tells_digits_that_it_has_not_seen():
    """The nearest of the training digits' means is the right digit; nothing else of an image is in its 64 numbers."""
    (_, labels), (_, test_labels) = split_digits(0)
    train, test = encode_digits(0)
    assert train.shape[1] == test.shape[1] == 64 and np.linalg.matrix_rank(test) == 9  # ten that sum to one
    assert train.mean() == pytest.approx(0, abs=0.01) and train.var() == pytest.approx(1, abs=0.05)
    means = np.stack([train[labels == digit].mean(axis=0) for digit in range(10)])
    nearest = np.square(test[:, None] - means).sum(axis=-1).argmin(axis=1)
    assert 0.95 < (nearest == test_labels).mean() < 1


def test_the_experiment(tmp_path, monkeypatch, capsys):
    # In this process, which has imported what each of a pool's would.
    monkeypatch.setattr(digits, "clean_processes", lambda: multiprocessing.dummy)
    monkeypatch.setattr(digits, "num_cores", lambda: 1)
    monkeypatch.setattr(digits, "ARMS", tuple(arm for arm in ARMS if arm.name in ("mean", "csa")))
    results = run_digits(tmp_path / "out", SMALL)
    for task in ("contains", "repeats"):
        for arm in ("mean", "csa"):
            for number in ("8", "16"):
                assert len(results[task][arm][number]) == 1
                assert all(0 <= scores["auc"] <= 1 for scores in results[task][arm][number])
    assert json.loads((tmp_path / "out" / "digits.json").read_text()) == results
    rows = list(csv.DictReader((tmp_path / "out" / "digits.csv").open()))
    assert len(rows) == 2 * 2 * 2
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "MIVPG" in page and "data:image/png" in page
    files = sorted((tmp_path / "out" / "classifiers").iterdir())
    times = [file.stat().st_mtime_ns for file in files[1:]]
    files[0].unlink()
    assert run_digits(tmp_path / "out", SMALL) == results
    assert [file.stat().st_mtime_ns for file in files[1:]] == times
    with pytest.raises(MivpgError, match="another size"):
        run_digits(tmp_path / "out", DigitsConfig(num_seeds=2))
