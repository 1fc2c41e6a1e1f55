"""The pages are true: links lead somewhere, what is generated is as the code has it, code and commands run."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from cyclopts import Parameter
from PIL import Image

from families import save_blip2, save_language_model, save_vision_model
from mivpg import load_bag_file
from mivpg.classification import ClassifierConfig
from mivpg.cli import main, parse
from mivpg.slides import TileOptions
from mivpg.training import TrainConfig
from test_readme import HUB_ID, blocks, commands_of, shop

__all__ = ["shop"]  # the README's folder, a fixture here, too

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
FEW_TOKENS = ["--max-new-tokens", "3", "--num-beams", "1"]
QUICK = {"num_train_epochs": 1, "num_workers": 0, "validation": {"num_beams": 1, "max_new_tokens": 3}}
"""Beside a page's own fields, so that a run takes seconds."""


@pytest.fixture
def refresh(monkeypatch):
    """docs/refresh.py."""
    monkeypatch.syspath_prepend(DOCS)
    import refresh

    return refresh


# --- Links -----------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda match: match[0].replace("]", "").replace("[", ""), text)


def anchors(page: Path) -> set[str]:
    """Those that a code host makes of the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()).replace(
            " ", "-"
        )
        same = [slug, *(f"{slug}-{number}" for number in range(1, 100))]
        found.add(next(name for name in same if name not in found))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            broken.append(f"{target}: there is no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            broken.append(f"{target}: there is no such heading")
    assert not broken


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n[here](#one) [gone](#two) [nowhere](other.md)\n```\n[code](is.left.alone)\n```\n")
    with pytest.raises(AssertionError, match=r"(?s)#two.*other\.md"):
        test_links_lead_somewhere(page)


def test_every_page_stands_in_the_navigation_and_on_the_first_page():
    listed = re.findall(r"(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))
    first = (DOCS / "README.md").read_text(encoding="utf-8")
    assert {name for name in listed if name != "README.md"} <= set(re.findall(r"\((\w+\.md)\)", first))


def test_every_picture_is_shown_and_has_its_command():
    pictures = {file.name for file in (DOCS / "images").iterdir()}
    shown = {Path(file).name for page in PAGES for file in re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", prose(page))}
    assert pictures <= shown
    figures = (DOCS / "figures.md").read_text(encoding="utf-8")
    assert pictures <= set(re.findall(r"`(\w+\.(?:png|svg))`", figures))
    assert not [page.name for page in PAGES if "![](" in page.read_text(encoding="utf-8")], "a picture without words"


def test_drawings_can_be_read_on_a_phone(refresh):
    """Whose column of text is 358 pixels wide; and words stay inside, also in a font wider than Helvetica."""
    from mivpg.report import load_font

    for file, text in refresh.refreshed().items():
        if file.suffix != ".svg":
            continue
        svg = ElementTree.fromstring(text)
        width, height = float(svg.get("width")), float(svg.get("height"))
        words = [element for element in svg.iter() if element.tag.endswith("}text")]
        assert len(words) > 8
        for element in words:
            size, x = float(element.get("font-size")), float(element.get("x"))
            assert size * min(1, 358 / width) >= 11, f"{file.name}: {element.text}"
            length = load_font(round(10 * size), bold=element.get("font-weight") == "bold").getlength(element.text) / 10
            left = x - length * {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor")]
            assert left >= 0 and left + length <= width and float(element.get("y")) <= height - 4, (
                f"{file.name}: {element.text}"
            )


def test_every_experiment_stands_among_the_figures():
    from mivpg.experiments.data import SCALES
    from mivpg.experiments.paper import experiments

    figures = (DOCS / "figures.md").read_text(encoding="utf-8")
    named = set(re.findall(r"mivpg reproduce (\w+)", figures)) - {"NAME", "all", "digits"}
    known = experiments(SCALES["miniature"])
    assert named == {name for name, experiment in known.items() if not experiment.apart}


# --- What the pages take from the code -------------------------------------------------------------------------------


def test_pages_are_as_the_code_has_it(refresh):
    stale = [str(file) for file, text in refresh.refreshed().items() if file.read_text(encoding="utf-8") != text]
    assert not stale, "run: make docs (or python docs/refresh.py)"


def test_a_link_to_a_line_follows_its_class(refresh):
    link = (
        "[`AttentionPooling`](../src/mivpg/layers.py#L3) and [`MivpgLayer.forward`](../src/mivpg/modeling_mivpg.py#L3)"
    )
    lines = re.findall(r"/(\w+\.py)#L(\d+)", refresh.refresh_lines(link))
    found = [(ROOT / "src" / "mivpg" / name).read_text(encoding="utf-8").splitlines()[int(n) - 1] for name, n in lines]
    assert found == ["class AttentionPooling(nn.Module):", "    def forward("]
    with pytest.raises(KeyError):
        refresh.refresh_lines("[`NoSuchClass`](../src/mivpg/layers.py#L3)")


def fields_of(config: type, prefix: str = "--") -> set[str]:
    """Options of a dataclass and of the dataclasses in it."""
    found = set()
    for field in dataclasses.fields(config):
        kinds = field.type if isinstance(field.type, type) else None
        inner = next((kind for kind in (kinds, *get_args(field.type)) if dataclasses.is_dataclass(kind)), None)
        name = prefix + field.name.replace("_", "-")
        found |= {name} if inner is None else fields_of(inner, f"{name}.")
    return found


def test_every_option_has_a_line(refresh, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## mivpg ([\w -]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    listed = {name: set(re.findall(r"^\| `(--[\w.-]+)` \|", text, re.MULTILINE)) for name, text in sections.items()}
    assert fields_of(TrainConfig) - {"--model.qformer"} <= listed["train"]
    assert fields_of(ClassifierConfig) - {"--qformer"} <= listed["classify"]
    assert fields_of(TileOptions, "--tiling.") <= listed["extract"]
    shared = {name for name in listed["train"] if name.startswith(("--dataset.", "--validation."))}
    for command, options in listed.items():
        helped = io.StringIO()
        with redirect_stdout(helped):
            main([*command.split(), "--help"])
        panel = "\n".join(line for line in helped.getvalue().splitlines() if line.startswith("│"))
        named = set(re.findall(r"(?<![\w.-])--[a-z](?:[\w.-]*\w)?", panel))
        named = {name for name in named if not re.search(r"(--|\.)(no|empty)-|--help|--version", name)}
        assert named <= options | shared, command
        assert options <= named, command


def test_defaults_are_those_that_count(refresh):
    """Training validates greedily, though captions are written with five beams elsewhere."""
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    assert re.search(r"^\| `--validation.num-beams` \| integer \| `1` \|", page, re.MULTILINE)
    assert re.search(r"^\| `--num-beams` \| integer \| `5` \|", page, re.MULTILINE)
    assert re.search(r"^\| `--output-dir` \| path \| \*\*needed\*\* \|", page, re.MULTILINE)


def test_commands_in_prose_have_their_options():
    """Of a line that is not run it is at least known that the command line would take it."""
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## mivpg ([\w -]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    known = {name: set(re.findall(r"^\| `(--[\w.-]+)` \|", text, re.MULTILINE)) for name, text in sections.items()}
    shared = {name for name in known["train"] if name.startswith(("--dataset.", "--validation."))}
    num_options, wrong = 0, []
    for page in PAGES:
        for code in re.findall(r"`(mivpg [a-z][^`]*)`", page.read_text(encoding="utf-8")):
            command, *words = re.split(r" (?=--)", " ".join(code.split()))
            name = command.removeprefix("mivpg ")
            name = next((of for of in sorted(known, key=len, reverse=True) if f"{name} ".startswith(f"{of} ")), name)
            options = {word.split()[0] for word in words} - {"--help"}
            num_options += len(options)
            if not options <= known.get(name, set()) | shared:
                wrong.append(f"{page.name}: {code}")
    assert num_options > 30
    assert not wrong


def yaml_blocks() -> list:
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks("yaml", page))
        if "folders:" not in block and "log_sum_exp" not in block  # those are tried with what the pages add
    ]


@pytest.mark.parametrize("block", yaml_blocks())
def test_yaml_is_understood(block, tmp_path):
    """Every field is known and of the right type, as `mivpg train` reads it."""
    values = {"model": {"base": "a"}, "dataset": {"bag_file": {"path": "b"}}, "output_dir": "c"} | yaml.safe_load(block)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    configs = []

    def start(config: Annotated[TrainConfig, Parameter(name="*")]) -> None:
        configs.append(config)

    parse("mivpg train", start, (str(file),))
    assert configs[0].output_dir == Path(values["output_dir"])


# --- Their code and commands run -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_meteor")
def test_quick_start(tmp_path, monkeypatch, capsys):
    page = DOCS / "quick_start.md"
    monkeypatch.chdir(tmp_path)
    save_blip2(Path("blip2"))
    (csv_block,) = blocks("csv", page)
    for photo in re.findall(r"photos/[\w/-]+\.jpg", csv_block):
        Path(photo).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (len(photo) * 8, 90, 60)).save(photo)
    (code,) = blocks("python", page)
    exec(code, {})
    assert [sample.id for sample in load_bag_file(Path("products.csv"))] == ["chair-7", "lamp-1"]
    assert {len(sample.images) for sample in load_bag_file(Path("products.csv"))} == {2, 3}

    header, *rows = csv.reader(csv_block.splitlines())
    with Path("products.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *([f"{row[0]}-{n}", *row[1:]] for n in range(10) for row in rows)])
    (run,) = blocks("yaml", page)
    Path("run.yaml").write_text(yaml.safe_dump(yaml.safe_load(run.replace(HUB_ID, "blip2")) | QUICK))
    commands = commands_of(page)
    first_words = [command.split()[1] for command in commands]
    assert first_words == ["--version", "caption", "caption", "train", "evaluate", "caption", "caption"]
    for command in commands:
        arguments = command.split()[1:]
        main(arguments + (FEW_TOKENS if arguments[0] in ("caption", "evaluate") else []))
    for name in ("untrained.jsonl", "captions.jsonl"):
        lines = [json.loads(line) for line in Path(name).read_text().splitlines()]
        assert len(lines) == 20 and all("caption" in line for line in lines)
    assert "random_train" in capsys.readouterr().out  # a floor
    main(["train", "run.yaml", "--resume"])  # in a line of prose


def test_slides(tmp_path, monkeypatch):
    pytest.importorskip("openslide", reason="OpenSlide is not installed")
    from test_slides import pixels_with, write_slide

    page = DOCS / "slides.md"
    monkeypatch.chdir(tmp_path)
    save_blip2(Path("blip2-opt-2.7b"))
    for name in ("a.svs", "b.ndpi"):
        write_slide(Path(name), pixels_with((0, 0, 768, 512), size=(1024, 768)))
    case, _ = (json.loads(block) for block in blocks("json", page))
    cases = [case | {"id": f"case {n}", "group": f"patient {n}"} for n in range(10)]
    Path("slides.jsonl").write_text("\n".join(map(json.dumps, cases)))
    first, from_store, _ = (block.replace(HUB_ID, "blip2-opt-2.7b") for block in blocks("yaml", page))
    Path("slides.yaml").write_text(first)
    extract, train, caption = (command.replace(HUB_ID, "blip2-opt-2.7b") for command in commands_of(page))
    main(extract.split()[1:])
    (store,) = Path("features").iterdir()
    assert store.name.startswith("blip2-opt-2.7b_28px_cls_float16")
    assert len(list((store / "tiles").iterdir())) >= 1
    Path("slides.yaml").write_text(yaml.safe_dump(yaml.safe_load(from_store.replace("STORE", store.name)) | QUICK))
    main(train.split()[1:])
    main(caption.replace("STORE", store.name).split()[1:] + FEW_TOKENS)
    assert len(Path("slide-captions.jsonl").read_text().splitlines()) == 10


def test_any_two_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_vision_model(Path("google/siglip-base-patch16-224"), "siglip_vision_model")
    save_language_model(Path("HuggingFaceTB/SmolLM2-135M"), "llama")
    (code,) = blocks("py", DOCS / "any_model.md")
    found: dict = {}
    exec(code, found)
    assert found["model"].config.patch_pooling == "abmil" and found["processor"].image_token_id is not None


def test_what_the_qformer_page_shows():
    page = DOCS / "qformer_as_mil.md"
    (code,), (output,) = blocks("python", page), blocks("text", page)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == output


def test_readmes_other_code(shop):
    """Looking at a model and moving it; `test_readme.py` runs the ten lines and the commands."""
    (ten_lines,), (look, move) = blocks("python"), blocks("py")
    main(["train", "run.yaml"])
    shutil.move("blip2", "models/blip2-opt-2.7b")
    found: dict = {}
    with redirect_stdout(io.StringIO()):
        exec(ten_lines.replace(HUB_ID, "models/blip2-opt-2.7b"), found)
        exec(look, found)
    assert Image.open("attention.png").width > 100
    exec(move, found)
    shutil.rmtree("models")
    main(["caption", "--model", "whole", "photos/front.jpg", *FEW_TOKENS])


@pytest.mark.parametrize(("page", "run_file"), [(ROOT / "README.md", "slides.yaml"), (DOCS / "slides.md", "uni.yaml")])
def test_features_of_other_tools(page, run_file, tmp_path, monkeypatch):
    """Features that another tool made, with a new Q-Former, here a small one."""
    h5py = pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    save_language_model(Path("HuggingFaceTB/SmolLM2-135M"), "llama")
    text = page.read_text(encoding="utf-8")
    (block,) = (block for block in blocks("yaml", page) if "language:" in block and "slides.jsonl" in block)
    above = text.split(block)[0].removesuffix("```yaml\n").rpartition("```")[2]
    assert f"`{run_file}`" in above  # what the file is called
    slide = json.loads(re.search(r'\{"id": "slide 1".*\}', text)[0])
    Path(slide["features"]).parent.mkdir()
    slides = []
    for number in range(10):
        slides.append(
            slide | {"id": f"slide {number}", "features": slide["features"].replace("slide-1", f"slide-{number}")}
        )
        with h5py.File(slides[-1]["features"], "w") as file:
            file["features"] = np.random.default_rng(number).normal(size=(3, 1024)).astype("float32")
    Path("slides.jsonl").write_text("\n".join(map(json.dumps, slides)))
    run = yaml.safe_load(block) | QUICK
    run["model"]["qformer"] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    Path(run_file).write_text(yaml.safe_dump(run))
    commands = [command for command in commands_of(page, "sh") if command.startswith("mivpg ")]
    assert commands[0] == f"mivpg train {run_file}"
    for command in commands:
        main(command.split()[1:] + (FEW_TOKENS if " caption " in command else []))
    assert (Path(run["output_dir"]) / "best" / "model.safetensors").is_file()
    if len(commands) > 1:  # the README's second captions the slides
        assert len(Path("slide-captions.jsonl").read_text().splitlines()) == 10


@pytest.fixture
def package_with_additions(tmp_path) -> Path:
    """A copy of the package with the files and the changes that two pages tell to make."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for page in (DOCS / "add_a_data_set.md", DOCS / "add_an_aggregator.md"):
        text = page.read_text(encoding="utf-8")
        for name, content in re.findall(r"^`(src/[\w/]+\.py)`:\n\n```python\n(.*?)^```$", text, re.M | re.S):
            (tmp_path / name).write_text(content)
        for before, changes in re.findall(r"((?:(?!^```).)*?)^```diff\n(.*?)^```$", text, re.M | re.S):
            name = (re.findall(r"[Ii]n `(src/[\w/]+\.py)`", before) or [name])[-1]
            lines = changes.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            source = (tmp_path / name).read_text(encoding="utf-8")
            assert source.count(old) == 1, f"{name} has no such place:\n{old}"
            (tmp_path / name).write_text(source.replace(old, new))
    return tmp_path


RUN_ADDITIONS = """
import json, sys
from pathlib import Path
import pytest, torch
from mivpg.cli import main

torch.set_num_threads(1)
commands, codes, tests = json.loads(sys.stdin.read())
for command in commands:
    main(command.split()[1:])
for code in codes:
    exec(code, {})
assert not pytest.main(["-q", "-k", "log_sum_exp", "--rootdir", str(Path(tests).parent), tests])
"""


@pytest.mark.slow
def test_what_the_pages_add_works(package_with_additions):
    """In one process: the pages' commands, the aggregator's own test, and the tests of all aggregators for it."""
    folder = package_with_additions
    for number in range(3):
        (folder / "data" / "folders" / f"bag {number}").mkdir(parents=True)
        for photo in ("a.jpg", "b.jpg"):
            Image.new("RGB", (40, 30), (80 * number, 90, 60)).save(folder / "data/folders" / f"bag {number}" / photo)
        (folder / "data/folders" / f"bag {number}" / "captions.txt").write_text("a chair.\na red chair.\n")
    (folder / "folders.yaml").write_text(blocks("yaml", DOCS / "add_a_data_set.md")[1])
    bags = np.repeat(np.arange(20), 3)
    np.savez(folder / "set.npz", x=np.random.default_rng(0).normal(size=(60, 4)), bag=bags, y=np.arange(20) % 2)
    outside, _ = blocks("python", DOCS / "add_a_data_set.md")
    _, aggregator_test = blocks("python", DOCS / "add_an_aggregator.md")
    commands = [*commands_of(DOCS / "add_a_data_set.md"), *commands_of(DOCS / "add_an_aggregator.md")]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ADDITIONS],
        input=json.dumps([commands, [outside, aggregator_test], str(ROOT / "tests" / "test_aggregators.py")]),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"3 passed", done.stdout), done.stdout[-1000:]
    (store,) = (folder / "features").iterdir()
    for file in (store / "bags.jsonl", folder / "folders.jsonl"):
        assert [sample.captions for sample in load_bag_file(file)] == [("a chair.", "a red chair.")] * 3
    assert {sample.split for sample in load_bag_file(store / "bags.jsonl")} == {"train", "test"}
    assert json.loads((folder / "runs/log_sum_exp/metrics.json").read_text())["mean"]["accuracy"] >= 0


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages as `make docs` builds them."""
    if find_spec("zensical") is None:
        pytest.skip("zensical is not installed (the extra docs)")
    tmp_path = tmp_path_factory.mktemp("site")
    (tmp_path / "src").symlink_to(ROOT / "src")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(DOCS), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return tmp_path / "build" / "site"


def test_the_site_holds_together(site):
    assert {page.stem for page in DOCS.glob("*.md")} - {"README"} <= {page.stem for page in site.glob("*.html")}
    api = (site / "api.html").read_text(encoding="utf-8")
    assert 'id="mivpg.modeling_mivpg.MivpgForConditionalGeneration.generate"' in api
    assert "<math" in (site / "method.html").read_text(encoding="utf-8")
    anchors_of = {page.name: set(re.findall(r'\bid="([^"]+)"', page.read_text())) for page in site.glob("*.html")}
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link rel="stylesheet"|img)[^>]+(?:src|href)="(https?://[^"]+)', text)
        assert not fetched, page.name  # from elsewhere
        for link in re.findall(r'(?:href|src)="([^":?]+)"', text) if page.name != "404.html" else ():
            name, _, anchor = link.partition("#")
            assert (site / name).exists(), f"{page.name}: {link}"
            known = anchors_of.get(name or page.name, {"__top", anchor})
            assert not anchor or anchor in known, f"{page.name}: {link}"


@pytest.mark.slow
def test_no_page_is_wider_than_a_phone(site):
    """What does not fit, a table, a line of code or an equation, scrolls by itself."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium: not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        widths = {}
        for file in sorted(site.glob("*.html")):
            page.goto(file.as_uri(), wait_until="load")
            widths[file.name] = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert len(widths) > 15
    assert {name: width for name, width in widths.items() if width > 390} == {}
