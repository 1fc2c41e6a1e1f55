"""Damaged files, by Hypothesis: each is read, or refused in one line of ours that names it; nothing else, and in time.

A quick sample here; `make fuzz` (10,000 cases or more) is for the night. `fuzz_coverage.py` does the same guided by
coverage.
"""

import csv
import gzip
import io
import json
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from safetensors.torch import save

from readers import (
    BAGS,
    CAPTIONS,
    COCO,
    CONFIG,
    DATASET,
    LISTINGS,
    READERS,
    hdf5,
    in_time,
    npz,
    problem_with,
    torch_file,
)

CASES = int(os.environ.get("MIVPG_FUZZ_CASES", "0"))
"""Of all tests here together; 0 = a quick sample, the same in every run."""
pytestmark = pytest.mark.filterwarnings("ignore")


def fuzzed(share: float, quick: int) -> Callable:
    """Settings of a test that gets this share of all cases, or so many in the quick sample."""
    return settings(
        max_examples=max(math.ceil(CASES * share), 1) if CASES else quick,
        derandomize=not CASES,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if CASES else [])],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder for each reader, with all that it reads beside the file."""
    folders = {name: tmp_path_factory.mktemp(name) for name in READERS}
    for name, reader in READERS.items():
        reader.write(folders[name] / name)
    return folders


def check(folders: dict[str, Path], name: str, content: bytes) -> None:
    file = folders[name] / name
    file.write_bytes(content)
    before = set(folders[name].rglob("*"))
    problem = in_time(lambda: problem_with(READERS[name], file))
    if problem is not None:
        raise problem
    assert set(folders[name].rglob("*")) == before, "reading wrote a file"


# ── Bytes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PIECES = [
    *(
        b"",
        b"\0",
        b"\0" * 64,
        b"\xff" * 8,
        b"\x80",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n\n",
        b"\x1a",
        b'"',
        b"'",
        b",",
        b";",
        b"\\",
    ),
    *(b"NaN", b"-Infinity", b"1e999", b"1" + b"0" * 400, b"1" * 5000, b"-1", b"null", b"true", b"{}", b"[]", b'""'),
    *(b"[" * 2000, b'{"a":' * 2000, b"\\ud800", b"\\u0000", b"../../", b"/dev/zero", b"&a [*a]", b"!!int x", b"? "),
    *(b"2001-99-99", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff\xff\xff\xff\x7f"),
]
Damage = Callable[[bytes], bytes]


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """One way to damage bytes, at a place that is a share of their length."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "replace", "remove", "repeat", "encode", "number"]))
    place, length = draw(st.floats(0, 1)), draw(st.integers(1, 40))
    value, piece = draw(st.integers(1, 255)), draw(st.sampled_from(PIECES) | st.binary(max_size=8))
    encoding = draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32-le", "cp037"]))

    def damage(content: bytes) -> bytes:
        at = round(place * max(len(content) - 1, 0))
        before, after = content[:at], content[at:]
        if kind == "cut":
            return before
        if kind == "flip":
            return before + bytes(byte ^ value for byte in after[:1]) + after[1:]
        if kind == "insert":
            return before + piece + after
        if kind == "replace":
            return before + piece + after[len(piece) :]
        if kind == "remove":
            return before + after[length:]
        if kind == "repeat":
            return before + after[:length] * 3 + after[length:]
        if kind == "encode":
            return content.decode("latin-1").encode(encoding, "replace")
        return re.sub(rb"\d+", lambda found: piece, content, count=length)

    return damage


@fuzzed(share=0.5, quick=150)
@given(name=st.sampled_from(sorted(READERS)), ways=st.lists(damages(), min_size=1, max_size=4), within=st.booleans())
def test_damaged_bytes(folders, name, ways, within):
    """Within the packing of a packed file, or of the file as it is."""
    content = READERS[name].valid()
    if not within:
        content = READERS[name].pack(content)
    for way in ways:
        content = way(content)
    check(folders, name, READERS[name].pack(content) if within else content)


# ── Values of other types in files that are whole ───────────────────────────────────────────────────────────────────

TEXTS = st.text(max_size=6) | st.sampled_from(
    [
        "",
        " ",
        "\0",
        "\ud800",
        "a\nb",
        "/etc/passwd",
        "../..",
        "a/../../../b.png",
        "n" * 300,
        "\u2028",
        "1e999",
        "<script>",
    ]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63, math.inf, math.nan])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=6,
)


@st.composite
def altered(draw: st.DrawFn, valid: Any) -> Any:
    """A value of JSON's types with other values in one or two places."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 2))):
        other = draw(VALUES)
        holder, key = None, None
        at = value
        while isinstance(at, dict | list) and at and (holder is None or draw(st.booleans())):
            holder, key = at, draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
            at = at[key]
        if holder is None:
            return other
        how = draw(st.sampled_from(["replace", "replace", "add", "delete"]))
        if how == "delete":
            del holder[key]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(TEXTS)] = other
        else:
            holder[key] = other
    return value


def lines_of(records: Any) -> bytes:
    return b"".join(
        json.dumps(record).encode() + b"\n" for record in (records if isinstance(records, list) else [records])
    )


def as_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")


STRUCTURED: dict[str, tuple[Any, Callable[[Any], bytes]]] = {
    "bags.jsonl": (BAGS, lines_of),
    "opened.jsonl": (BAGS, lines_of),
    "listings_0.json.gz": (LISTINGS, lambda value: gzip.compress(lines_of(value), 1)),
    "written.json": (CAPTIONS, lambda value: json.dumps(value).encode()),
    "written.pkl": (CAPTIONS, lambda value: pickle.dumps(value, 2)),
    "coco_karpathy_train.json": (COCO, lambda value: json.dumps(value).encode()),
    "train.yaml": (yaml.safe_load(CONFIG), as_yaml),
    "evaluate.yaml": (yaml.safe_load(DATASET), as_yaml),
}


@fuzzed(share=0.25, quick=40)
@given(st.data())
def test_other_values(folders, data):
    name = data.draw(st.sampled_from(sorted(STRUCTURED)))
    valid, write = STRUCTURED[name]
    check(folders, name, write(data.draw(altered(valid))))


@fuzzed(share=0.1, quick=40)
@given(
    name=st.sampled_from(["bags.csv", "written.csv", "captions.csv", "images.csv.gz"]),
    cells=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), TEXTS), min_size=1, max_size=3),
    lacking=st.booleans(),
)
def test_other_cells(folders, name, cells, lacking):
    rows = list(csv.reader(io.StringIO(READERS[name].valid().decode())))
    for row, column, text in cells:
        chosen = rows[round(row * (len(rows) - 1))]
        chosen[round(column * (len(chosen) - 1))] = text
    if lacking:
        rows[-1].pop()
    stream = io.StringIO()
    csv.writer(stream).writerows(rows)
    check(folders, name, READERS[name].pack(stream.getvalue().encode(errors="surrogatepass")))


# ── Arrays of other types and shapes ────────────────────────────────────────────────────────────────────────────────

ARRAYS = st_numpy.arrays(
    st_numpy.scalar_dtypes() | st.sampled_from([np.dtype("f4"), np.dtype("f8"), np.dtype("i8")]),
    st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
PLAIN = st_numpy.arrays(
    st.sampled_from([np.dtype(kind) for kind in ("f2", "f4", "f8", "i1", "i8", "u1", "?", "c8")]),
    st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@fuzzed(share=0.15, quick=50)
@given(st.data())
def test_other_arrays(folders, data):
    name = data.draw(st.sampled_from(["set.npz", "features.npy", "features.h5", "features.pt", "features.safetensors"]))
    if name == "set.npz":
        names = st.sampled_from(["x", "bag", "y", "fold", "instance_y", "z"])
        content = npz(data.draw(st.dictionaries(names, ARRAYS, max_size=6)))
    elif name == "features.npy":
        stream = io.BytesIO()
        np.save(stream, data.draw(ARRAYS))
        content = stream.getvalue()
    else:
        names = st.sampled_from(["image_embeds", "features", "feats", "coords"])
        arrays = data.draw(st.dictionaries(names, PLAIN, min_size=1, max_size=3))
        if name == "features.h5":
            content = hdf5(**arrays)
        else:
            tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
            content = save(tensors) if name == "features.safetensors" else torch_file(tensors)
    check(folders, name, content)
