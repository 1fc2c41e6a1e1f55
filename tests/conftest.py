"""What stands in METEOR's place; and a last word: the figures that tests measured and held to a bound."""

import gc
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest

LONG = ("test_reproduce", "test_demo", "test_training", "test_app_browser", "test_docs", "test_features")
"""Files that take a minute and more. They begin first, so that no process is left alone with one at the end."""


class QuickMeteor:
    """Which words are the same, in METEOR's place: that takes eleven seconds to start."""

    def __init__(self, java: Path) -> None:
        pass

    def mean(self, references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]) -> float:
        """Of the words of a bag's caption and of the nearest reference, the share that is in both."""
        return fmean(
            max(len(said & words) / len(said | words) for words in (set(text.split()) for text in references[bag]))
            for bag, said in ((bag, set(caption.split())) for bag, (caption,) in hypotheses.items())
        )

    def end(self) -> None:
        pass


@pytest.fixture(scope="module")
def quick_meteor():
    """For tests of all but METEOR itself, which `test_evaluation.py` runs."""
    from mivpg import evaluation
    from mivpg.experiments import results

    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluation, results):
            patch.setattr(module, "Meteor", QuickMeteor)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """Where tests run: what deals them out to processes need not import torch."""
    import torch
    from accelerate.utils import memory

    torch.set_num_threads(1)  # models of a few numbers run slower on two, and many times so where others run beside
    memory.gc = SimpleNamespace(collect=lambda: None)  # accelerate looks for garbage in each run, a third of a second
    gc.freeze()  # what torch and transformers consist of is never garbage, and need not be looked at each time


def pytest_terminal_summary(terminalreporter) -> None:
    """One line a figure that was given to `record_property`: the largest of all tests, and how many recorded it."""
    measured: dict[str, list[float]] = defaultdict(list)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if getattr(report, "when", None) == "call":
                    measured[name].append(value)
    if measured:
        terminalreporter.section("measured (the largest of each)")
        for name, values in sorted(measured.items()):
            terminalreporter.write_line(f"{name}: {max(values):.3g} ({len(values)} cases)")
