"""Coverage-guided fuzzing of every reader with atheris: what leads to new lines of Python is damaged further.

    pip install atheris
    python tests/fuzz_coverage.py OUT [--seconds 100] [READER …]

Each reader of `readers.py` gets so many seconds. `OUT/corpus` keeps inputs for the next run; `OUT/findings` has an
input and the traceback of each place that raised what it should not, and what crashed, hung or ate the memory. Exit
code 1 where there is one.
"""

# ruff: noqa: E402 (what is imported when decides what is instrumented)

import argparse
import os
import sys
import traceback
from pathlib import Path

import atheris

PARSERS = ["PIL", "yaml", "json", "csv", "gzip", "zipfile", "pickle", "mivpg"]
"""Packages whose lines count; the rest of torch would take minutes to instrument."""
HANG_SECONDS, MEMORY_MB = 20, 3000

with atheris.instrument_imports(include=PARSERS):
    import PIL.Image
    import yaml  # noqa: F401

    PIL.Image.init()
import h5py  # noqa: F401
import torch
import transformers  # noqa: F401
from torch._weights_only_unpickler import Unpickler

Unpickler.load = atheris.instrument_func(Unpickler.load)  # type: ignore[method-assign]
torch.set_num_threads(1)
with atheris.instrument_imports(include=PARSERS):
    from readers import READERS, problem_with


def fuzz(name: str, out: Path, seconds: int) -> None:
    """Does not return: libFuzzer ends the process."""
    reader = READERS[name]
    file = reader.write(out / "files" / name / name)
    corpus, findings = out / "corpus" / name, out / "findings" / name
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    (corpus / "valid").write_bytes(reader.valid())

    def test_one(content: bytes) -> None:
        file.write_bytes(reader.pack(content))
        if (problem := problem_with(reader, file)) is not None:
            place = traceback.extract_tb(problem.__traceback__)[-1]
            known = findings / f"{type(problem).__name__}-{Path(place.filename).stem}-{place.lineno}"
            if not known.exists():
                known.write_bytes(content)
                known.with_name(known.name + ".txt").write_text("".join(traceback.format_exception(problem)))

    options = [f"-max_total_time={seconds}", f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={MEMORY_MB}", "-max_len=50000"]
    options += [f"-artifact_prefix={findings}/", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *options], test_one)
    atheris.Fuzz()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("readers", nargs="*", default=list(READERS))
    arguments.add_argument("--seconds", type=int, default=100)
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.readers:
        log = given.out / f"{name}.log"
        if (child := os.fork()) == 0:
            with log.open("wb") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            fuzz(name, given.out, given.seconds)
        os.waitpid(child, 0)
        lines = log.read_text(errors="replace").splitlines()
        done = [line.split()[-1] for line in lines if "number_of_executed_units" in line]
        print(f"{name}: {done[0] if done else 'ended early, after an unknown number of'} inputs", flush=True)
    found = [path for path in sorted(given.out.glob("findings/*/*")) if path.suffix != ".txt"]
    print("\n".join(map(str, found)) or "nothing found")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
