import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from mivpg import MivpgForConditionalGeneration, MivpgProcessor
from mivpg.miniature import BASE_MODEL, base
from mivpg.miniature.base import NUM_QUERIES, PROMPT, Recipe, make_picture, make_text
from mivpg.miniature.encoder_decoder import make_encoder_decoder_base

TINY = Recipe(
    num_texts=40,
    text_steps=2,
    text_batch=6,
    num_pictures=8,
    vision_steps=0,
    language_steps=3,
    picture_batch=4,
    save_every=2,
)


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    """Judging takes a thousand, drawn by processes that first have to start; here a dozen have to do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "NUM_HELD_OUT", 12)
        patch.setattr(base, "make_pictures", lambda stream, number: [make_picture(stream, i) for i in range(number)])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_encoder_decoder_base(tmp_path_factory.mktemp("bases") / "t5", TINY)


@pytest.fixture(scope="module", params=["encoder-decoder", "decoder-only"])
def either(request, folder) -> tuple[Path, Blip2ForConditionalGeneration]:
    """The new base and the embedded one: what is said of lessons holds for both."""
    path = folder if request.param == "encoder-decoder" else BASE_MODEL
    return path, Blip2ForConditionalGeneration.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def pictures() -> list:
    """Those without keywords among the first few."""
    return [picture for index in range(12) if not (picture := make_picture("test", index)).keywords][:5]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_it_takes_over_and_what_it_learns(folder):
    new, info = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    old = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL)
    assert new.config.text_config.model_type == "t5" and not new.config.use_decoder_only_language_model
    assert new.config.vision_config.to_dict() == old.config.vision_config.to_dict()
    assert new.config.qformer_config.to_dict() == old.config.qformer_config.to_dict()
    assert digest(folder / "tokenizer.json") == digest(BASE_MODEL / "tokenizer.json")
    weights = old.vision_model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in new.vision_model.state_dict().items())
    for name in ("qformer", "language_projection"):
        weights = getattr(old, name).state_dict()
        moved = {n: (w - weights[n]).abs().max().item() for n, w in getattr(new, name).state_dict().items()}
        assert all(0 < distance < 0.1 for distance in moved.values()), moved
    assert 0.8e6 < new.language_model.num_parameters() < 1.1e6


def test_its_recipe_says_what_the_first_ones_does(folder):
    recipe, first = (json.loads((path / "recipe.json").read_text()) for path in (folder, BASE_MODEL))
    assert recipe.keys() == first.keys() and recipe["figures"].keys() == first["figures"].keys()
    assert recipe["sha256"]["model.safetensors"] == digest(folder / "model.safetensors")
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert (log[-1]["step"], log[-1]["stage"]) == (TINY.steps, "language")


@torch.no_grad()
def test_lessons_are_laid_out_as_captions_are(either, pictures):
    """The loss in training, the loss that is judged by, and that of MIVPG's fine-tuning: one number."""
    path, blip2 = either
    tokenizer = AutoProcessor.from_pretrained(path, backend="pil").tokenizer
    pixels = base.pixel_values(AutoProcessor.from_pretrained(path, backend="pil"), pictures)
    queries = blip2.qformer(
        query_embeds=blip2.query_tokens.expand(len(pictures), -1, -1),
        encoder_hidden_states=blip2.vision_model(pixels).last_hidden_state,
    ).last_hidden_state
    in_training = base.text_loss(blip2, tokenizer, pictures, blip2.language_projection(queries))
    judged = base.description_loss(blip2, AutoProcessor.from_pretrained(path, backend="pil"), pictures)
    assert in_training.item() == pytest.approx(judged, abs=1e-5)

    processor, mivpg = MivpgProcessor.from_pretrained(path), MivpgForConditionalGeneration.from_pretrained(path).eval()
    images = [[Image.fromarray(picture.pixels)] for picture in pictures]
    texts = [picture.text for picture in pictures]
    if processor.is_encoder_decoder:
        inputs = processor(images=images, text=PROMPT, captions=texts)
    else:  # the prompt is a part of what it learned to write
        inputs = processor(images=images, text="", captions=[f"{PROMPT} {text}" for text in texts])
    assert mivpg(**inputs).loss.item() == pytest.approx(judged, abs=1e-5)


def test_describes_as_mivpg_captions(either, pictures):
    path, blip2 = either
    processor, mivpg = MivpgProcessor.from_pretrained(path), MivpgForConditionalGeneration.from_pretrained(path).eval()
    said = list(base.describe(blip2, AutoProcessor.from_pretrained(path, backend="pil"), pictures))
    inputs = processor(
        images=[[Image.fromarray(picture.pixels)] for picture in pictures],
        text=PROMPT if processor.is_encoder_decoder else "",
    )
    ids = mivpg.generate(**inputs, max_new_tokens=48, do_sample=False)
    assert [text.strip() for text in said] == processor.decode_captions(ids, inputs["input_ids"])


@torch.no_grad()
def test_padding_of_texts_is_inert(either):
    """The loss of a batch is that of its texts one by one, each written out by hand."""
    path, model = either
    tokenizer = MivpgProcessor.from_pretrained(path).tokenizer
    embed, is_t5 = model.get_input_embeddings(), not model.config.use_decoder_only_language_model
    lessons = [make_text(0, index) for index in range(8)]
    assert len({len(lesson.keywords) for lesson in lessons}) > 2
    total = num_tokens = 0
    for lesson in lessons:
        words = [embed(torch.tensor(tokenizer(f" {word}")["input_ids"])).sum(0)[None] for word in lesson.keywords]
        text = lesson.text if is_t5 else f"{PROMPT} {lesson.text}"
        written = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        read = tokenizer(PROMPT)["input_ids"] if is_t5 else written
        labels = written if is_t5 else [-100] * len(words) + written
        loss = model.language_model(
            inputs_embeds=torch.cat([*words, embed(torch.tensor(read))])[None], labels=torch.tensor([labels])
        ).loss
        num_told = (
            len(written) if is_t5 or words else len(written) - 1
        )  # without keywords nothing tells the first token
        total, num_tokens = total + num_told * loss.item(), num_tokens + num_told
    assert base.text_loss(model, tokenizer, lessons).item() == pytest.approx(total / num_tokens, abs=1e-5)


def test_an_encoder_reads_the_prompt_after_the_visual_prompts(either):
    path, model = either
    tokenizer = MivpgProcessor.from_pretrained(path).tokenizer
    prompt = tokenizer(PROMPT)["input_ids"]
    read, (written,) = base.read_ids(model, tokenizer), base.written_ids(model, tokenizer, [make_text(0, 1)])
    marks = [tokenizer.convert_tokens_to_ids("<image>")] * NUM_QUERIES
    if model.config.use_decoder_only_language_model:
        assert read == marks and written[: len(prompt)] == prompt
    else:
        assert read == marks + prompt
        assert tokenizer.decode(written) == make_text(0, 1).text + tokenizer.eos_token


@pytest.mark.parametrize("stop", [pytest.param("picture_losses", marks=pytest.mark.slow), "_describe"])
def test_interrupted_it_ends_as_an_unbroken_one(folder, tmp_path, monkeypatch, stop):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(base, stop, interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_encoder_decoder_base(tmp_path / "broken", TINY)
    assert not (tmp_path / "broken" / "recipe.json").exists()
    again = make_encoder_decoder_base(tmp_path / "broken", TINY)
    assert digest(again / "model.safetensors") == digest(folder / "model.safetensors")
    assert (again / "recipe.json").read_bytes() == (folder / "recipe.json").read_bytes()
    assert {file.name for file in again.iterdir()} == {file.name for file in folder.iterdir()}
