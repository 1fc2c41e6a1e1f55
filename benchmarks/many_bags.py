"""100,000 bags through `mivpg caption` or `mivpg extract`: memory on the way, speed, and what several kills leave.

python benchmarks/many_bags.py {caption,extract} --folder DIR [--bags 100000] [--kills 9]

Both run as a user runs them, once unbroken and once killed with SIGKILL at even distances and started again. The model
is random and tiny, so that what is measured is everything around it: bags of 1 to 3 of 300 shared photos, of which one
in a thousand is bad (no picture, no such file, no image). Memory is the resident set of the process, looked at five
times a second. The killed run has to end with the bytes of the unbroken one, every bag once and in the file's order.
Takes about 2 GB of disk and, of 100,000 bags, half an hour; DIR must not exist. Prints Markdown.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from transformers import Blip2Config, Blip2ForConditionalGeneration

from measuring import machine, markdown
from mivpg import MivpgProcessor
from mivpg.cli import quiet_transformers
from mivpg.datasets.bag_file import load_bag_file
from mivpg.feature_files import name_in_store
from mivpg.miniature import BASE_MODEL

NUM_PHOTOS = 300
BAD_ONE_IN = 1000
MARKS = (0.1, 0.5, 0.9, 1.0)
"""Shares of the bags at which memory is noted."""


def make_model(folder: Path) -> None:
    """The miniature's tokenizer around a random model of two layers, which sees pictures of 32 x 32 pixels."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config.from_pretrained(BASE_MODEL)
    config = Blip2Config(
        vision_config=config.vision_config.to_dict() | size | {"image_size": 32, "patch_size": 16},
        qformer_config=config.qformer_config.to_dict() | size | {"encoder_hidden_size": 32},
        text_config=config.text_config.to_dict() | size | {"num_key_value_heads": 2, "head_dim": 16},
        num_query_tokens=4,
        image_token_index=config.image_token_index,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    model.query_tokens.data.normal_()
    model.save_pretrained(folder)
    processor = MivpgProcessor.from_pretrained(BASE_MODEL)
    processor.num_query_tokens = 4
    processor.image_processor.size = {"height": 32, "width": 32}
    processor.save_pretrained(folder)


def is_bad(index: int) -> bool:
    """Of the bag with this number."""
    return index % BAD_ONE_IN == 7


def make_bags(folder: Path, num_bags: int) -> Path:
    """A bag file; bad bags are of three kinds in turn."""
    pixels = np.random.default_rng(0)
    photos = [f"{number}.jpg" for number in range(NUM_PHOTOS)]
    for name in photos:
        blocks = pixels.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / photos[0]).read_bytes()[:200])
    choice = random.Random(0)
    with (folder / "bags.jsonl").open("w") as file:
        for index in range(num_bags):
            images = choice.choices(photos, k=1 + index % 3)
            if is_bad(index):
                images = ([*images, "broken.jpg"], [*images, "missing.jpg"], [])[index // BAD_ONE_IN % 3]
            file.write(json.dumps({"id": f"product {index}", "images": images}) + "\n")
    return folder / "bags.jsonl"


@dataclass
class Job:
    """A command over the bags, and how far it has come."""

    command: list[str]
    num_done: Callable[[], int]


def caption_job(model: Path, bags: Path, out: Path) -> Job:
    """Into `out`, a folder."""
    out.mkdir(exist_ok=True)
    file = out / "captions.jsonl"
    options = ["--batch-size", "64", "--num-beams", "1", "--max-new-tokens", "4"]
    command = ["caption", "--model", str(model), "--bags", str(bags), "--out", str(file), *options]
    partial = file.with_name("captions.jsonl.partial")
    return Job(command, lambda: count_lines(partial) if partial.exists() else 0)


def count_lines(file: Path) -> int:
    """Without holding the file in memory."""
    with file.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def extract_job(model: Path, bags: Path, out: Path, num_bags: int) -> Job:
    """Into `out`, a folder."""
    options = ["--dataset.bag-file.path", str(bags), "--tokens", "cls"]
    store = out / "model_32px_cls_float16"
    reached = 0

    def num_done() -> int:
        """Bags are written in order, nearly; a bag in fifty is looked for, none of them a bad one."""
        nonlocal reached
        while reached < num_bags and (store / name_in_store(f"product {reached}")).exists():
            reached += 50
        return min(reached, num_bags)

    return Job(["extract", "--model", str(model), "--out", str(out), *options], num_done)


@dataclass
class Run:
    """What one process did."""

    seconds: float
    first_seconds: float | None
    """Until more was done than before it."""
    megabytes: dict[float, float]
    """At each mark that it passed."""
    peak: float
    """Megabytes, of the whole run."""
    status: int


def run(job: Job, num_bags: int, *, kill_at: int | None = None) -> Run:
    """Runs a job to its end, or until so many bags are done."""
    before = job.num_done()
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "mivpg.cli", *job.command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    watched = psutil.Process(process.pid)
    found = Run(0.0, None, {}, 0.0, 0)
    while process.poll() is None:
        try:
            megabytes = watched.memory_info().rss / 1e6
        except psutil.NoSuchProcess:
            break
        if megabytes == 0:  # it has ended, and nobody has asked yet how
            break
        done = job.num_done()
        found.peak = max(found.peak, megabytes)
        if found.first_seconds is None and done > before:
            found.first_seconds = time.monotonic() - start
        for mark in MARKS[:-1]:
            if done >= mark * num_bags > before:
                found.megabytes.setdefault(mark, megabytes)
        found.megabytes[1.0] = megabytes  # the last that was seen
        if kill_at is not None and done >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.2)
    found.status = process.wait()
    found.seconds = time.monotonic() - start
    return found


def digests(folder: Path) -> dict[str, str]:
    """Of every file below a folder but a bag file, which names the folder it lies in."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check(out: Path, num_bags: int, *, captions: bool) -> str:
    """Whether every bag is there once, in order, and the bad ones are recorded; says so in words."""
    expected = [f"product {index}" for index in range(num_bags)]
    bad = [bag_id for index, bag_id in enumerate(expected) if is_bad(index)]
    good = [bag_id for index, bag_id in enumerate(expected) if not is_bad(index)]
    if captions:
        lines = [json.loads(line) for line in (out / "captions.jsonl").read_bytes().splitlines()]
        assert [line["id"] for line in lines] == expected
        assert [line["id"] for line in lines if "error" in line] == bad
        return f"{len(lines):,} lines in the order of the bag file, {len(bad)} of them errors"
    store = out / "model_32px_cls_float16"
    stored = [json.loads(line) for line in (store / "bags.jsonl").read_text().splitlines()]
    errors = [json.loads(line) for line in (store / "errors.jsonl").read_text().splitlines()]
    assert [line["id"] for line in stored] == good
    assert [line["id"] for line in errors] == bad
    assert {path.name for path in store.glob("*.safetensors")} == {name_in_store(bag_id) for bag_id in good}
    return f"{len(stored):,} bags of features in the order of the bag file, {len(errors)} errors recorded"


def cost_of_a_bag(bags: Path, num_bags: int) -> float:
    """Kilobytes that one record of the bag file takes in memory."""
    before = psutil.Process().memory_info().rss
    samples = load_bag_file(bags)
    kilobytes = (psutil.Process().memory_info().rss - before) / 1e3 / num_bags
    assert len(samples) == num_bags
    return kilobytes


def main() -> None:
    """Makes model and bags, runs unbroken and killed, checks, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["caption", "extract"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bags", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=9)
    arguments = parser.parse_args()
    folder, num_bags, captions = arguments.folder, arguments.bags, arguments.what == "caption"
    quiet_transformers()
    folder.mkdir(parents=True)
    make_model(folder / "model")
    bags = make_bags(folder, num_bags)
    kilobytes = cost_of_a_bag(bags, num_bags)

    def job(name: str) -> Job:
        if captions:
            return caption_job(folder / "model", bags, folder / name)
        return extract_job(folder / "model", bags, folder / name, num_bags)

    print(f"{arguments.what}, {num_bags:,} bags; {machine()}\n", flush=True)
    unbroken = run(job("unbroken"), num_bags)
    said = check(folder / "unbroken", num_bags, captions=captions)
    rows = [[f"{mark:.0%}", f"{megabytes:.0f}"] for mark, megabytes in sorted(unbroken.megabytes.items())]
    print(markdown(["bags done", "memory, MB"], [*rows, ["peak", f"{unbroken.peak:.0f}"]]))
    growth = unbroken.megabytes[1.0] / unbroken.megabytes[0.1] - 1
    print(
        f"\nUnbroken: {unbroken.seconds:.0f} s, {num_bags / unbroken.seconds:.0f} bags/s, "
        f"exit status {unbroken.status}; {said}. Memory grew by {growth:.1%} from 10 % of the bags to all. "
        f"A record of the bag file takes {kilobytes:.2f} kB.\n",
        flush=True,
    )

    rows = []
    killed = job("killed")
    for number in range(arguments.kills + 1):
        before = killed.num_done()
        last = number == arguments.kills
        part = run(killed, num_bags, kill_at=None if last else num_bags * (number + 1) // (arguments.kills + 1))
        first = "" if part.first_seconds is None else f"{part.first_seconds:.1f}"
        rows.append([f"{before:,}", first, f"{part.seconds:.0f}", f"{part.status}"])
    print(markdown(["done at the start", "seconds to the next bag", "seconds", "exit status"], rows))
    assert check(folder / "killed", num_bags, captions=captions) == said
    one, other = digests(folder / "unbroken"), digests(folder / "killed")
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    print(
        f"\nKilled {arguments.kills} times: {said}; "
        f"{len(differing)} of {len(one):,} files differ from the unbroken run's."
    )
    assert not differing, differing[:3]


if __name__ == "__main__":
    main()
