"""benchmarks/mutants.py: which mistakes it makes, which tests it asks, and what it says of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from coverage import CoverageData

import mutants

SOURCE = '''"""A word."""
LIMIT = 3


def clip(value: int, limit: int = 5, name: str = "value") -> int:
    """Not above the limit."""
    if value < 0:
        raise ValueError(f"{name} is {value - 1}, below {0}.")
    clipped = min(
        value,
        limit,
    )
    return clipped if len(name) else limit
'''

TESTS = """import time

from mivpg.clip import clip


def test_that_fails():
    assert not clip(7, 5)


def test_that_waits():
    time.sleep(600 if clip(7, 5) is None else 0)


class TestBelow:
    def test_below(self):
        assert clip(2, 5) == 2


def test_above():
    assert clip(7, 5) == 5


def test_nothing():
    pass
"""

FAILS, WAITS, BELOW, ABOVE, NOTHING = (
    f"tests/test_clip.py::{name}"
    for name in ("test_that_fails", "test_that_waits", "TestBelow::test_below", "test_above", "test_nothing")
)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A package of one function and its tests, with what a run of them left; one fails since."""
    package = tmp_path / "src/mivpg"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "clip.py").write_text(SOURCE)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_clip.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "-p no:cacheprovider"\n')
    data = CoverageData(str(tmp_path / "coverage"))
    for test in (FAILS, WAITS, BELOW, ABOVE):
        data.set_context(f"{test}|run")
        data.add_lines({str(package / "clip.py"): [7, 10]})  # line 10 is in the middle of a statement
    data.set_context(f"{NOTHING}|run")
    data.add_lines({str(tmp_path / "copy/src/mivpg/clip.py"): [7, 10]})
    data.write()
    seconds = {FAILS: 0.01, WAITS: 0.02, BELOW: 0.03, ABOVE: 0.04, NOTHING: 0.0}
    cases = []
    for test in seconds:
        classname, _, name = test.replace("/", ".").replace(".py", "").replace("::", ".").rpartition(".")
        cases.append(f'<testcase classname="{classname}" name="{name}" time="{seconds[test]}"/>')
    (tmp_path / "tests.xml").write_text(f"<testsuites>{''.join(cases)}</testsuites>")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "FILES", ("clip",))
    return tmp_path


def drawn(project: Path, number: int = 100, seed: int = 0) -> list[mutants.Mutant]:
    return mutants.draw_mutants(project / "src/mivpg", number, seed)


def run(project: Path, *arguments: str) -> str:
    """The benchmark in a process of its own, since it wants one that has not imported mivpg."""
    setting = f"mutants.ROOT, mutants.FILES = mutants.Path({str(project)!r}), ['clip']"
    code = f"import mutants; {setting}; mutants.IMPORTED_ONCE, mutants.GRACE = [], 5; mutants.main()"
    files = ["coverage", "tests.xml", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(Path(mutants.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, *files, *arguments], cwd=project, env=environment, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_strings_defaults_and_texts_of_errors_are_left_alone(project):
    assert {(mutant.line, mutant.before, mutant.after) for mutant in drawn(project)} == {
        (2, "LIMIT = 3", "LIMIT = None"),
        (2, "3", "4"),
        (7, "< 0", "<= 0"),
        (7, "0", "1"),
        (9, "clipped = min( value, limit, )", "clipped = None"),
        (9, "min( value, limit, )", "min( None, limit, )"),
        (9, "min( value, limit, )", "min( value, None, )"),
        (9, "min( value, limit, )", "min( limit, )"),
        (9, "min( value, limit, )", "min( value, )"),
        (13, "clipped if len(name) else limit", "clipped if (len(name)) and False else limit"),
        (13, "clipped if len(name) else limit", "clipped if (len(name)) or True else limit"),
    }


def test_a_mutant_is_its_file_with_one_change(project):
    (mutant,) = (mutant for mutant in drawn(project) if mutant.after == "<= 0")
    assert mutant.source == SOURCE.replace("value < 0", "value <= 0")


def test_a_sample_is_a_function_of_the_seed(project):
    keys = [mutant.key for mutant in drawn(project, 5)]
    assert keys == [mutant.key for mutant in drawn(project)][:5]
    assert keys != [mutant.key for mutant in drawn(project, 5, seed=1)]


def test_of_what_is_critical_all_numbers_operators_and_conditions_change(project, monkeypatch):
    monkeypatch.setattr(mutants, "CRITICAL", r"value < 0|limit,")
    found = {(mutant.line, mutant.after) for mutant in mutants.critical_mutants(project / "src/mivpg")}
    assert found == {(7, "<= 0"), (7, "1")}


def test_tests_of_the_line_come_first_and_quick_ones_before_slow_ones(project, monkeypatch):
    tests = mutants.Tests(project / "coverage", project / "tests.xml")
    of_line = {mutant.line: tests.for_mutant(mutant) for mutant in drawn(project)}
    assert of_line[7] == of_line[9] == [[FAILS, WAITS, BELOW, ABOVE]]
    assert of_line[13] == of_line[2] == of_line[7]  # no test runs these lines, so all that run the file
    monkeypatch.setattr(mutants, "SECONDS", 0.05)
    assert tests.for_mutant(drawn(project)[0]) == [[FAILS, WAITS]]


@pytest.mark.slow
def test_what_dies_and_what_lives(project):
    run(project, "--number", "3", "--part", "0/2")
    first = {result.key for result in mutants.read_results(project / "out")}
    assert first == {mutant.key for mutant in drawn(project, 3)[::2]}
    log = run(project)  # what has a result is not run again
    results = {(result.line, result.after): result for result in mutants.read_results(project / "out")}
    assert len(results) == len(mutants.read_results(project / "out")) == 11, log
    alive = {
        (2, "LIMIT = None"),  # nothing reads it
        (2, "4"),
        (7, "<= 0"),  # no test clips 0, or has an empty name
        (7, "1"),
        (13, "clipped if (len(name)) or True else limit"),
    }
    assert {change for change, result in results.items() if result.outcome == "survived"} == alive
    assert (results[9, "clipped = None"].outcome, results[9, "clipped = None"].by) == ("timeout", WAITS)
    always_limit = results[13, "clipped if (len(name)) and False else limit"]
    assert (always_limit.outcome, always_limit.by, always_limit.num_tests) == ("killed", BELOW, 4)
    assert f"{FAILS} fails without a change, too, and is left out." in log
    assert (project / "src/mivpg/clip.py").read_text() == SOURCE  # the project itself is as it was

    table = mutants.report(list(results.values()))
    assert "| clip | 11 | 6 | 54.5% |" in table
    assert "- clip.py:7 number: `0` -> `1`" in table
