"""What comes from others stays what it is: a model brings no code, a caption no HTML, a package its licence."""

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoConfig, AutoTokenizer

import mivpg
from mivpg.bags import Sample
from mivpg.errors import MivpgError
from mivpg.evaluation_report import write_evaluation_report
from mivpg.loading import load_auto_config, load_language_model, load_tokenizer, load_vision_model
from mivpg.miniature import BASE_MODEL
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor
from test_cli import mivpg as command

# ── Models that bring code ──────────────────────────────────────────────────────────────────────────────────────────

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, BaseImageProcessor, ProcessorMixin
class Config(PretrainedConfig):
    model_type = "strange"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
class Pictures(BaseImageProcessor):
    pass
class Processor(ProcessorMixin):
    pass
def generate(model, **kwargs):
    raise SystemExit("custom generate")
"""
AUTO_MAP = {
    "AutoConfig": "strange.Config",
    **dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), "strange.Model"),
    "AutoTokenizer": ["strange.Tokenizer", "strange.Tokenizer"],
    "AutoImageProcessor": "strange.Pictures",
    "AutoProcessor": "strange.Processor",
}


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Iterator[Path]:
    """What the code would write; nobody is asked whether it may, which transformers would do on the terminal."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield tmp_path / "mark"
    assert not questions


def with_code(folder: Path, mark: Path, changes: dict) -> Path:
    """The miniature with a code of its own for each of its classes, and these changes of its configuration."""
    folder.mkdir()
    for file in BASE_MODEL.iterdir():
        if file.suffix == ".json" and file.name not in ("tokenizer.json", "recipe.json"):
            values = json.loads(file.read_text()) | {"auto_map": AUTO_MAP}
            (folder / file.name).write_text(json.dumps(values | (changes if file.name == "config.json" else {})))
        else:
            (folder / file.name).symlink_to(file)
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": AUTO_MAP}))
    code = CODE.format(mark=str(mark))
    (folder / "strange.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    return folder


def load_everything(folder: Path) -> list[Callable[[], object]]:
    return [
        lambda: load_auto_config(folder),
        lambda: load_language_model(folder),
        lambda: load_vision_model(folder),
        lambda: load_tokenizer(folder),
        lambda: MivpgProcessor.from_pretrained(folder),
        lambda: MivpgForConditionalGeneration.from_pretrained(folder),
        lambda: MivpgForConditionalGeneration.from_vision_language_pretrained(folder, BASE_MODEL),
        lambda: MivpgForConditionalGeneration.from_vision_language_pretrained(BASE_MODEL, folder),
    ]


def test_a_models_code_is_not_run_and_nobody_is_asked(tmp_path, mark):
    """Of a type that transformers does not know, so that only its code could load it."""
    folder = with_code(tmp_path / "strange", mark, {"model_type": "strange"})
    tokenizer_of_ours = 3
    for number, load in enumerate(load_everything(folder)):
        if number == tokenizer_of_ours:
            load()
            continue
        with pytest.raises(MivpgError, match="strange") as error:
            load()
        assert "\n" not in str(error.value)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    result = command("caption", "--model", folder, tmp_path / "a.png")
    assert result.code == 1
    assert result.err.startswith(f"mivpg: {folder}: the model's configuration cannot be loaded: ")
    assert not mark.exists()


def test_a_known_models_code_is_left_alone(tmp_path, mark):
    """Of a type that we know, with code for each class beside: our own classes load it, and caption."""
    folder = with_code(tmp_path / "known", mark, {})
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    result = command("caption", "--model", folder, "--max-new-tokens", 2, tmp_path / "a.png")
    assert (result.code, result.err) == (0, "")
    assert not mark.exists()


@pytest.mark.parametrize("load", [AutoConfig, AutoTokenizer])
def test_the_code_would_run_if_it_were_let(tmp_path, mark, load):
    """So the two tests above could fail."""
    folder = with_code(tmp_path / "strange", mark, {"model_type": "strange"})
    load.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists()


# ── Pages ───────────────────────────────────────────────────────────────────────────────────────────────────────────

HOSTILE = """</script></style></title>--><script>alert("1")</script><img src='http://x' onerror="2">{{ 3 }}<b>"""


class Elements(HTMLParser):
    """Which elements a page has, with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_everything_on_an_evaluations_page_is_text(tmp_path):
    """Captions, references, ids, labels, names of models and photos; the other pages have such tests of their own."""
    photo = tmp_path / f"{HOSTILE.replace('/', '')}.png"
    Image.new("RGB", (8, 8)).save(photo)
    samples = [
        Sample(id=f"{HOSTILE}{n}", images=(photo,), captions=(HOSTILE,), label=HOSTILE, group=HOSTILE) for n in range(9)
    ]
    scores = {"CIDEr": 1.0, HOSTILE: 0.5}
    results = {
        "metrics": scores,
        "floors": {"constant": scores, "random_train": scores, "label": scores},
        "cider_of_each": {sample.id: 0.1 * n for n, sample in enumerate(samples)},
        "num_bags": 9,
        "num_references": 9,
        "num_unreadable_bags": 1,
        "split": HOSTILE,
        "model": HOSTILE,
        "seed": 0,
    }
    predictions = {sample.id: HOSTILE for sample in samples}
    write_evaluation_report(
        tmp_path / "a.html", results, predictions, samples, settings={HOSTILE: [HOSTILE], "prompt": HOSTILE}
    )
    html = (tmp_path / "a.html").read_text()
    elements = Elements(html).found
    assert {"script", "b"}.isdisjoint(tag for tag, _ in elements)
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in elements)
    assert html.count("&lt;script&gt;") > 30


def test_no_template_is_filled_in_unescaped():
    """Every page is made by the one environment that escapes, and no template takes it back."""
    folder = Path(mivpg.__file__).parent
    for template in (folder / "templates").glob("*.html.jinja"):
        assert not re.search(r"\|\s*safe|autoescape", template.read_text()), template.name
    unescaped = [path.name for path in folder.rglob("*.py") if "is_html=False" in path.read_text()]
    assert unescaped == ["model_card.py"]  # Markdown


# ── What it stands on ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_licence_of_every_pinned_package_is_told():
    """`python docs/licences.py` makes the page anew."""
    root = Path(__file__).parents[1]
    pins = set(re.findall(r"^([\w.-]+)==([\w.+-]+)", (root / "constraints.txt").read_text(), re.M))
    rows = re.findall(r"^\| ([\w.-]+) \| ([\w.+-]+) \| (.+) \| .+ \|$", (root / "docs/licences.md").read_text(), re.M)
    assert {(name, version) for name, version, _ in rows} - {("package", "version")} == pins
    assert [name for name, _, licence in rows if licence.startswith("not ")] == ["pycocoevalcap"]
