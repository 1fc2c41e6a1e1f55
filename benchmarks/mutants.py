"""How many small mistakes the tests notice: each is put into a copy of the package, and the tests that reach it run.

python benchmarks/mutants.py coverage.db tests.xml --out mutants.jsonl [--part 0/2] [--minutes 110] [--number 300]
python benchmarks/mutants.py --report mutants.jsonl

`make coverage` writes the first two files: which test ran which line, and how long it took; `make mutants` runs it all.
Mutants come from mutmut's operators (another number, another operator, an argument left out or None, a value None, one
branch of a conditional expression), over the files of `FILES`, and a seeded sample of them is drawn. Left out are
strings, defaults of arguments and of fields, annotations, decorators, and what only words an error or a log line.
mutmut's own runner leaves decorated functions alone, which `forward` and `generate` are, and wraps all others.

A mutant dies when a test fails, crashes or does not end. What failed is run on the unchanged package once, too: a test
that fails there is no witness. Tests that run the changed line come first, then others that run the file, up to
`SECONDS` of them; what lives then counts as alive, whatever else would have found it. Starting costs most, so one
process imports torch, transformers and pytest's plugins, and each mutant is a fork of it.

Results are JSON lines; what stands there is not run again. Processes that share the work write to one file.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import libcst
import pytest
from coverage import CoverageData
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOT = Path(__file__).parents[1]

FILES = ("modeling_mivpg", "layers", "folded_attention", "bags", "features", "evaluation")

CRITICAL = r"mask|padding|softmax|is_kept|\+ self\.output|\+ added|\+ states|torch\.add\(|amax|\.mean\("
"""Masks, softmax axes, means and maxima over instances, residuals."""

LEAST = 0.85
"""Share of mutants that has to die."""

SECONDS = 30
"""Of tests, as long as they took under coverage, for one mutant."""

WHOLE_RUNS = ("test_reproduce", "test_demo", "test_app_browser", "test_app", "test_docs", "test_readme")
"""Files of tests that first run the whole program for minutes, whichever of them is asked for; they are left out."""

GRACE = 60
"""Seconds that a test may take beside four times what it took under coverage; the machine may be busier."""

IMPORTED_ONCE = (
    "torch",
    "torch.utils.checkpoint",
    "transformers.models.blip_2.modeling_blip_2",
    "transformers.models.llama.modeling_llama",
    "transformers.masking_utils",
    "transformers.trainer",
    "accelerate",
    "hypothesis",
    "matplotlib.pyplot",
    "pycocoevalcap.cider.cider",
    "scipy.stats",
    "sklearn.metrics",
)
"""What tests import and is not ours."""

NOT_COPIED = (".git", ".venv", ".hypothesis", ".*_cache", "__pycache__", "build", "dist", "runs")
"""Of the project, since no test reads it."""


# ── Which mistakes ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one file."""

    key: str
    """A digest of the changed source."""
    file: str
    """A name of `FILES`."""
    line: int
    operator: str
    """mutmut's."""
    before: str
    after: str
    lines: range
    """Of the statement, where coverage looks for tests."""
    source: str
    """The file with the change."""


class _Candidates(libcst.CSTVisitor):
    """Collects (node, what stands in its place, operator), in the order of the source."""

    def __init__(self) -> None:
        self.found: list[tuple[libcst.CSTNode, libcst.CSTNode, str]] = []
        self.num_functions = 0

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if self._is_left_out(node):
            return False
        self.num_functions += isinstance(node, libcst.FunctionDef)
        for kind, operator in mutation_operators:
            if isinstance(node, kind) and operator is not operator_string:
                self.found += [(node, changed, operator.__name__) for changed in operator(node)]
        return True

    def on_leave(self, original_node: libcst.CSTNode) -> None:
        self.num_functions -= isinstance(original_node, libcst.FunctionDef)

    def _is_left_out(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, libcst.AnnAssign) and not self.num_functions:  # a field's default
            return True
        if isinstance(node, libcst.Call):  # mutmut leaves the first two alone, too: what they cause is a crash
            called = libcst.Module([]).code_for_node(node.func)
            return called in ("len", "isinstance") or called.startswith("logger.")
        words = (libcst.BaseString, libcst.Raise)
        return isinstance(node, (libcst.Annotation, libcst.Decorator, libcst.Parameters, *words))


def draw_mutants(folder: Path, number: int, seed: int) -> list[Mutant]:
    """A sample of the mutants of all `FILES`, in random order."""
    makers = list(_mutants(folder))
    random.Random(seed).shuffle(makers)
    return _made(makers, number)


def critical_mutants(folder: Path) -> list[Mutant]:
    """All that change a number, an operator or a condition in statements that `CRITICAL` matches."""
    makers = [
        maker
        for maker in _mutants(folder)
        if maker.operator not in ("arg_removal", "assignment") and re.search(CRITICAL, maker.statement)
    ]
    return _made(makers, len(makers))


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """A change that is not made yet."""

    file: str
    line: int
    operator: str
    lines: range
    statement: str
    module: libcst.Module
    node: libcst.CSTNode
    changed: libcst.CSTNode


def _mutants(folder: Path) -> Iterator[_Maker]:
    """In the order of the source."""
    for name in FILES:
        source = (folder / f"{name}.py").read_text()
        wrapper, source_lines = MetadataWrapper(libcst.parse_module(source)), source.splitlines()
        candidates = _Candidates()
        wrapper.module.visit(candidates)
        positions, parents = wrapper.resolve(PositionProvider), wrapper.resolve(ParentNodeProvider)
        for node, changed, operator in candidates.found:
            lines = _lines_of_statement(node, positions, parents)
            yield _Maker(
                file=name,
                line=positions[node].start.line,
                operator=operator.removeprefix("operator_"),
                lines=lines,
                statement="\n".join(source_lines[line - 1] for line in lines),
                module=wrapper.module,
                node=node,
                changed=changed,
            )


def _made(makers: Iterable[_Maker], number: int) -> list[Mutant]:
    """The first so many that compile and are not the same."""
    made: dict[str, Mutant] = {}
    for maker in makers:
        if len(made) == number:
            break
        source = maker.module.deep_replace(maker.node, maker.changed).code
        with contextlib.suppress(SyntaxError):
            compile(source, maker.file, "exec")
            key = hashlib.sha256(source.encode()).hexdigest()[:16]
            before, after = (" ".join(maker.module.code_for_node(node).split()) for node in (maker.node, maker.changed))
            made[key] = Mutant(
                key=key,
                file=maker.file,
                line=maker.line,
                operator=maker.operator,
                before=before,
                after=after,
                lines=maker.lines,
                source=source,
            )
    return list(made.values())


def _lines_of_statement(node: libcst.CSTNode, positions, parents) -> range:
    """Those of the simple statement that the node stands in; in the head of a compound one, down to the node's end."""
    end = positions[node].end.line
    while not isinstance(node, (libcst.SimpleStatementLine, libcst.BaseCompoundStatement)):
        node = parents[node]
    if isinstance(node, libcst.SimpleStatementLine):
        end = positions[node].end.line
    return range(positions[node].start.line, end + 1)


# ── Which tests ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Tests:
    """Which test runs which line, and how long it takes.

    Args:
        coverage: coverage.py's data with pytest-cov's contexts.
        results: pytest's JUnit file of the same run.
    """

    def __init__(self, coverage: Path, results: Path) -> None:
        self.data = CoverageData(coverage)
        self.data.read()
        self.seconds: dict[str, float] = {}
        for case in ElementTree.parse(results).iter("testcase"):
            if case.find("failure") is None and case.find("error") is None and case.find("skipped") is None:
                folder, file, *classes = case.attrib["classname"].split(".")
                name = "::".join([f"{folder}/{file}.py", *classes, case.attrib["name"]])
                if file not in WHOLE_RUNS:
                    self.seconds[name] = float(case.attrib["time"])
        self.tests_of: defaultdict[str, list[str]] = defaultdict(list)
        for test in self.seconds:
            self.tests_of[_file_of(test)].append(test)

    def for_mutant(self, mutant: Mutant) -> list[list[str]]:
        """Tests by file, `SECONDS` of them: the quickest case of every test function, then the second, and so on."""
        wanted = ROOT / f"src/mivpg/{mutant.file}.py"
        path = next(path for path in self.data.measured_files() if ROOT / path == wanted)
        contexts = self.data.contexts_by_lineno(path)
        on_line = self._named(context for line in mutant.lines for context in contexts.get(line, ()))
        on_file = self._named(context for of_line in contexts.values() for context in of_line)
        chosen, left = [], float(SECONDS)
        for tests in (on_line, on_file - on_line):
            by_file: defaultdict[str, list[str]] = defaultdict(list)
            for test in self._in_turn(tests):
                if self.seconds[test] <= left:
                    by_file[_file_of(test)].append(test)
                    left -= self.seconds[test]
            chosen += sorted(by_file.values(), key=lambda those: (self._mean_seconds(those), those))
        return chosen

    def _named(self, contexts: Iterable[str]) -> set[str]:
        """Tests of coverage's contexts `test|when`; what a fixture runs counts for each test of the file."""
        tests: set[str] = set()
        for context in contexts:
            test, _, when = context.rpartition("|")
            tests.update([test] if when == "run" else self.tests_of[_file_of(test)])
        return tests & self.seconds.keys()

    def _mean_seconds(self, tests: Sequence[str]) -> float:
        return sum(self.seconds[test] for test in tests) / len(tests)

    def _in_turn(self, tests: Iterable[str]) -> list[str]:
        """The quickest case of each test function, then the second of each, and so on."""
        turn: Counter[str] = Counter()
        ranked = []
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            function = test.partition("[")[0]
            ranked.append((turn[function], self.seconds[test], test))
            turn[function] += 1
        return [test for _, _, test in sorted(ranked)]


def _file_of(test: str) -> str:
    return test.partition("::")[0]


# ── Running them ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Result:
    """What became of a mutant."""

    key: str
    file: str
    line: int
    operator: str
    before: str
    after: str
    outcome: str
    """killed, timeout or survived."""
    by: str
    """The test that found it."""
    num_tests: int
    """That would have been run."""
    seconds: float


class Bench:
    """A copy of the project, in which one file at a time is changed, and forks of this process that test it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.output, self.verdict = folder / "output.txt", folder / "verdict.txt"
        shutil.copytree(ROOT, self.folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        self.package = self.folder / "src/mivpg"
        self.witnesses: dict[str, bool] = {}
        """Whether what failed passes without a change."""
        os.environ |= {"PYTHONPATH": str(self.folder / "src"), "TOKENIZERS_PARALLELISM": "false"}
        sys.path.insert(0, str(self.folder / "src"))
        for name in IMPORTED_ONCE:
            importlib.import_module(name)
        nothing = folder / "nothing"
        nothing.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            pytest.main(["--collect-only", str(nothing)])  # imports pytest's plugins
        assert "mivpg" not in sys.modules, "a fork has to import the changed package anew"

    def test(self, mutant: Mutant, tests: Tests) -> Result:
        """Runs a mutant's tests until one fails."""
        start = time.monotonic()
        selected = tests.for_mutant(mutant)
        num_tests = sum(map(len, selected))
        while True:
            with self._changed(mutant):
                outcome, by = self._run(selected, tests)
            if outcome == "survived" or self._is_witness(by, selected, tests):
                break
            print(f"{by} fails without a change, too, and is left out.", flush=True)
            selected = [[test for test in those if by not in (test, _file_of(test))] for those in selected]
            selected = [those for those in selected if those]
        what = {name: getattr(mutant, name) for name in ("key", "file", "line", "operator", "before", "after")}
        seconds = round(time.monotonic() - start, 1)
        return Result(**what, outcome=outcome, by=by, num_tests=num_tests, seconds=seconds)

    def _is_witness(self, by: str, selected: list[list[str]], tests: Tests) -> bool:
        """Whether the test that failed, or the file whose tests could not begin, passes without a change."""
        if by not in self.witnesses:
            again = [[test for test in those if by in (test, _file_of(test))] for those in selected]
            self.witnesses[by] = self._run([those for those in again if those], tests)[0] == "survived"
        return self.witnesses[by]

    @contextlib.contextmanager
    def _changed(self, mutant: Mutant) -> Iterator[None]:
        file = self.package / f"{mutant.file}.py"
        original = file.read_text()
        for compiled in (self.package / "__pycache__").glob(f"{mutant.file}.*"):
            compiled.unlink()  # it is chosen by size and second of the source, which may be the same
        file.write_text(mutant.source)
        try:
            yield
        finally:
            file.write_text(original)
            for compiled in (self.package / "__pycache__").glob(f"{mutant.file}.*"):
                compiled.unlink()

    def _run(self, selected: list[list[str]], tests: Tests) -> tuple[str, str]:
        """In a fork; killed, timeout or survived, and by which test, or file where none had begun."""
        self.verdict.write_text("")
        child = os.fork()
        if child == 0:
            os.setsid()
            try:
                failed = self._test_in_child(selected)
            except BaseException:
                failed = True
            os._exit(failed)
        running, since = "", time.monotonic()
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if (now := self.verdict.read_text()) != running:
                running, since = now, time.monotonic()
            if time.monotonic() - since > GRACE + 4 * tests.seconds.get(running, 0.0):
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what it has started, such as Java
        if ended[0] == 0:
            os.waitpid(child, 0)
            return "timeout", self.verdict.read_text()
        return ("killed", self.verdict.read_text()) if ended[1] else ("survived", "")

    def _test_in_child(self, selected: list[list[str]]) -> bool:
        """Whether a test fails. The name of the one that runs stands in the verdict."""
        with self.output.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(self.folder)
        shutil.rmtree(self.folder / ".hypothesis", ignore_errors=True)  # what failed with other changes
        temporary = f"--basetemp={self.folder.parent / 'tmp'}"
        options = ["-x", "-q", "--tb=line", "-p", "no:cov", "-p", "no:xdist", "-p", "no:faulthandler", temporary]
        for those in selected:
            self.verdict.write_text(_file_of(those[0]))
            if pytest.main([*options, *those], plugins=[_Verdict(self.verdict)]) != 0:
                return True
            imported = sys.modules.get("mivpg")
            assert imported is None or Path(str(imported.__file__)).is_relative_to(self.package), imported
        return False


class _Verdict:
    """Writes down which test runs, so that it is known also of one that never ends."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.file.write_text(nodeid)


def run_part(tests: Tests, out: Path, mutants: Sequence[Mutant], minutes: float) -> None:
    """Tests those mutants that have no result yet, for so many minutes."""
    end = time.monotonic() + 60 * minutes
    done = {result.key for result in read_results(out)}
    left = [mutant for mutant in mutants if mutant.key not in done]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        bench = Bench(Path(folder))
        for mutant in left:
            if time.monotonic() > end:
                break
            result = bench.test(mutant, tests)
            with out.open("a") as stream:
                stream.write(json.dumps(asdict(result)) + "\n")
            print(f"{result.outcome:8} {result.seconds:5.1f} s  {_change(result)}  {result.by}", flush=True)


# ── What became of them ─────────────────────────────────────────────────────────────────────────────────────────────


def read_results(file: Path) -> list[Result]:
    """Of all processes that wrote to the file."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [Result(**json.loads(line)) for line in lines]


def report(results: Sequence[Result]) -> str:
    """Markdown: a row a file, and the survivors."""
    rows = ["| File | Mutants | Killed | Share |", "|---|---:|---:|---:|"]
    for name in (*FILES, "all"):
        those = [result for result in results if name in (result.file, "all")]
        if those:
            share = _share_killed(those)
            rows.append(f"| {name} | {len(those)} | {round(share * len(those))} | {share:.1%} |")
    survivors = [result for result in results if result.outcome == "survived"]
    lines = [f"- {_change(result)}" for result in sorted(survivors, key=lambda result: (result.file, result.line))]
    return "\n".join([*rows, "", f"{len(survivors)} survived:", "", *lines])


def _share_killed(results: Sequence[Result]) -> float:
    return sum(result.outcome != "survived" for result in results) / len(results)


def _change(result: Result) -> str:
    return f"{result.file}.py:{result.line} {result.operator}: `{result.before}` -> `{result.after}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coverage", type=Path, nargs="?", help="coverage.py's data, with contexts")
    parser.add_argument("tests", type=Path, nargs="?", help="pytest's JUnit file of the same run")
    parser.add_argument("--out", type=Path, help="results, a line a mutant")
    parser.add_argument("--part", default="0/1", help="which share of the mutants, 0/2 and 1/2 for two processes")
    parser.add_argument("--critical", action="store_true", help="instead of a sample: all of `critical_mutants`")
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=110, help="after which no mutant is begun")
    parser.add_argument("--report", type=Path, help="instead: what stands in this file of results")
    arguments = parser.parse_args()
    if arguments.report is not None:
        results = read_results(arguments.report)
        print(report(results))
        sys.exit(_share_killed(results) < LEAST)
    package = ROOT / "src/mivpg"
    if arguments.critical:
        mutants = critical_mutants(package)
    else:
        mutants = draw_mutants(package, arguments.number, arguments.seed)
    index, num_parts = map(int, arguments.part.split("/"))
    run_part(Tests(arguments.coverage, arguments.tests), arguments.out, mutants[index::num_parts], arguments.minutes)


if __name__ == "__main__":
    main()
