"""The base model that comes with the package, and the recipe that made it, at a small size."""

import dataclasses
import hashlib
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from mivpg import MivpgForConditionalGeneration, MivpgProcessor
from mivpg.errors import MivpgError
from mivpg.miniature import BASE_MODEL, base, scenes
from mivpg.miniature.base import CLASSES, MINIATURES, PROMPT, Recipe, judge, make_base, make_picture, make_text
from mivpg.miniature.product_lessons import picture_lesson, text_lesson
from mivpg.miniature.products import FAMILIES, draw_product
from mivpg.miniature.wording import keywords, said

TINY = Recipe(
    num_texts=300,
    text_steps=3,
    text_batch=6,
    num_pictures=12,
    vision_steps=2,
    language_steps=3,
    picture_batch=4,
    save_every=2,
)


@pytest.fixture(autouse=True)
def few_held_out_pictures(monkeypatch):
    """Judging takes a thousand pictures; here a dozen have to do."""
    monkeypatch.setattr(base, "NUM_HELD_OUT", 16)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class TestCommitted:
    def test_is_small_and_what_its_recipe_gave(self):
        assert sum(file.stat().st_size for file in BASE_MODEL.iterdir()) < 10_000_000
        recipe = json.loads((BASE_MODEL / "recipe.json").read_text())
        assert recipe["sha256"]["model.safetensors"] == digest(BASE_MODEL / "model.safetensors")
        assert recipe["recipe"] == dataclasses.asdict(Recipe())
        log = [json.loads(line) for line in (BASE_MODEL / "training_log.jsonl").read_text().splitlines()]
        assert log[-1]["step"] == Recipe().steps
        assert log[-1]["seconds"] < 2 * 3600

    def test_is_an_ordinary_blip2_folder(self):
        model, info = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        looking = [i for i, layer in enumerate(model.qformer.encoder.layer) if layer.has_cross_attention]
        assert len(looking) >= 3
        assert type(AutoProcessor.from_pretrained(BASE_MODEL, backend="pil")).__name__ == "Blip2Processor"

    def test_its_tokenizer_knows_every_byte(self):
        tokenizer = MivpgProcessor.from_pretrained(BASE_MODEL).tokenizer
        text = "Stühle für 3 €, 椅子 \x01 🪑."
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    @torch.no_grad()
    def test_its_language_model_puts_together_what_no_picture_shows(self):
        """A pattern in front, another behind and a colour beneath, from keywords in any order."""
        model = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL).eval()
        tokenizer = MivpgProcessor.from_pretrained(BASE_MODEL).tokenizer
        embed = model.get_input_embeddings()
        right, num_said = 0, 0
        for index in range(20):
            generator = random.Random(f"together {index}")
            product = draw_product(generator, ("chair", "sofa", "bottle")[index % 3])
            words = base.keyword_embeds(model, tokenizer, keywords(product, product.traits | {"family": ""}, generator))
            prompt = torch.cat([words, embed(torch.tensor(tokenizer(PROMPT)["input_ids"]))])[None]
            ids = model.language_model.generate(
                inputs_embeds=prompt, max_new_tokens=48, eos_token_id=tokenizer.eos_token_id, do_sample=False
            )
            caption = tokenizer.decode(ids[0], skip_special_tokens=True)
            for trait in ("front", "back", "beneath"):
                spoken = said(caption, trait, FAMILIES[product.family].traits[trait])
                right, num_said = right + (spoken == product.traits[trait]), num_said + (spoken is not None)
        assert num_said > 40
        assert right > 0.95 * num_said

    def test_mivpg_starts_from_it_as_its_qformer(self):
        blip2 = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL).eval()
        model = MivpgForConditionalGeneration.from_pretrained(BASE_MODEL).eval()
        processor = MivpgProcessor.from_pretrained(BASE_MODEL)
        picture = make_picture("test", 0)
        from PIL import Image

        inputs = processor(images=[[Image.fromarray(picture.pixels)]], text="")
        ours = model(**inputs).logits
        theirs = blip2(
            pixel_values=inputs["pixel_values"][:, 0],
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
        ).logits
        assert torch.equal(ours, theirs)

    def test_it_knows_its_prompt(self):
        """Without one it would write the prompt itself, as a part of each caption."""
        assert MivpgProcessor.from_pretrained(BASE_MODEL).prompt == PROMPT

    @torch.no_grad()
    def test_its_visual_prompts_differ(self):
        """Queries that end as one vector leave one visual prompt, and nothing for CSA to choose from."""
        model = MivpgForConditionalGeneration.from_pretrained(
            BASE_MODEL, instance_correlation="none", patch_pooling="none"
        ).eval()
        processor = AutoProcessor.from_pretrained(BASE_MODEL, backend="pil")
        pictures = [make_picture("never seen", index) for index in range(20)]
        image_embeds = model.get_image_embeds(base.pixel_values(processor, pictures)[:, None])
        prompts = model.get_visual_prompts(image_embeds).embeds  # (B, R, H)
        assert (prompts - prompts.mean(dim=1, keepdim=True)).std() > 0.2 * prompts.std()

    def test_describes_pictures_it_has_not_seen(self, record_property):
        """Its own figures hold on other pictures: it was trained on none of these."""
        model = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL)
        processor = AutoProcessor.from_pretrained(BASE_MODEL, backend="pil")
        pictures = [make_picture("never seen", index) for index in range(100)]
        figures = judge(model, processor, [picture for picture in pictures if not picture.keywords])
        committed = json.loads((BASE_MODEL / "recipe.json").read_text())["figures"]
        record_property("loss of the base on pictures not seen", figures["loss"])
        assert figures["loss"] < committed["loss"] + 0.1
        for miniature, trait in (("product_lessons", "color"), ("scenes", "object"), ("biopsies", "type")):
            right, expected = (f["right_of_said"][miniature][trait] for f in (figures, committed))
            deviation = math.sqrt(expected * (1 - expected) / figures["num_said"][miniature][trait])
            assert right > expected - 3 * deviation - 0.01, (miniature, trait)

    def test_without_its_picture_it_is_wrong(self):
        """The control: pictures and texts that do not belong together."""
        model = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL)
        processor = AutoProcessor.from_pretrained(BASE_MODEL, backend="pil")
        pictures = [make_picture("never seen", index) for index in range(40)]
        others = [
            dataclasses.replace(picture, pixels=pictures[index - 1].pixels) for index, picture in enumerate(pictures)
        ]
        assert judge(model, processor, others)["loss"] > judge(model, processor, pictures)["loss"] + 1


class TestRecipe:
    @pytest.mark.slow
    def test_same_seed_same_model(self, tmp_path):
        first, second = make_base(tmp_path / "a", TINY), make_base(tmp_path / "b", TINY)
        assert {f.name: digest(f) for f in first.iterdir() if f.name not in ("training_log.jsonl",)} == {
            f.name: digest(f) for f in second.iterdir() if f.name not in ("training_log.jsonl",)
        }
        assert MivpgProcessor.from_pretrained(first).prompt == PROMPT
        other = make_base(tmp_path / "c", dataclasses.replace(TINY, seed=1))
        assert digest(other / "model.safetensors") != digest(first / "model.safetensors")

    @pytest.mark.slow  # test_miniature_encoder_decoder.py interrupts a recipe made of the same parts
    @pytest.mark.parametrize("stop", [2, 5])
    def test_interrupted_it_ends_as_an_unbroken_one(self, tmp_path, monkeypatch, stop):
        unbroken = make_base(tmp_path / "unbroken", TINY)
        text_loss = base.text_loss
        calls = iter(range(100))

        def interrupt(*args):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return text_loss(*args)

        monkeypatch.setattr(base, "text_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_base(tmp_path / "broken", TINY)
        monkeypatch.setattr(base, "text_loss", text_loss)
        assert digest(make_base(tmp_path / "broken", TINY) / "model.safetensors") == digest(
            unbroken / "model.safetensors"
        )

    def test_a_folder_in_use_is_refused(self, tmp_path):
        (tmp_path / "letter.txt").write_text("mine")
        with pytest.raises(MivpgError, match=r"is not empty, expected a new folder"):
            make_base(tmp_path, TINY)

    def test_another_recipe_is_not_mixed_in(self, tmp_path, monkeypatch):
        monkeypatch.setattr(base, "judge", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_base(tmp_path / "base", TINY)
        with pytest.raises(MivpgError, match=r"was begun with"):
            make_base(tmp_path / "base", dataclasses.replace(TINY, seed=3))


class TestData:
    def test_a_text_beside_a_picture_says_what_that_picture_and_its_keywords_say(self):
        """The base has never seen a text that says what another photo shows, as references do."""
        num_seen = num_told = num_alone = 0
        for index in range(60):
            picture = picture_lesson(random.Random(index))
            told = " ".join(picture.keywords).split()
            num_alone += not told
            for trait, values in FAMILIES[picture.facts["family"]].traits.items():
                value, spoken = picture.facts[trait], said(picture.text, trait, values)
                if f"product {trait} {value}" in picture.classes:
                    assert spoken in (None, value), (picture.text, trait)
                    num_seen += spoken is not None
                elif spoken is not None:
                    assert spoken == value and all(word in told for word in value.split()), (picture, trait)
                    num_told += 1
        assert num_seen > 120
        assert num_told > 15
        assert 25 < num_alone < 50  # half, and those that show everything, or of which nothing is told

    def test_every_text_is_written_after_the_prompt(self):
        model = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL)
        tokenizer = MivpgProcessor.from_pretrained(BASE_MODEL).tokenizer
        lessons = [*(make_text(0, index) for index in range(100)), *(make_picture("test", index) for index in range(5))]
        for lesson, ids in zip(lessons, base.written_ids(model, tokenizer, lessons), strict=True):
            assert tokenizer.decode(ids) == f"{PROMPT} {lesson.text}{tokenizer.eos_token}"
            assert PROMPT not in lesson.text

    def test_every_miniature_gives_its_share(self):
        pictures = [make_picture("test", index) for index in range(60)]
        for miniature, share in MINIATURES.items():
            those = [picture for picture in pictures if not picture.classes.isdisjoint(miniature.CLASSES)]
            assert 0.4 * share < len(those) / len(pictures) < 2 * share
            assert all(picture.classes <= set(miniature.CLASSES) for picture in those)
        assert len(CLASSES) == len(set(CLASSES))
        assert all(base.classes_of(picture).sum() == len(picture.classes) for picture in pictures)

    def test_a_text_speaks_of_its_keywords_alone(self):
        num_said = 0
        for text in (text_lesson(random.Random(index)) for index in range(200)):
            if not text.keywords:
                continue
            words = " ".join(text.keywords).split()
            (family,) = FAMILIES.keys() & set(words)
            for trait, values in FAMILIES[family].traits.items():
                spoken = said(text.text, trait, values)
                if spoken is not None:
                    assert all(word in words for word in spoken.split()), (text, trait)
                    num_said += 1
        assert num_said > 500

    def test_a_keyword_is_the_sum_of_its_tokens(self):
        model = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL)
        tokenizer = MivpgProcessor.from_pretrained(BASE_MODEL).tokenizer
        words = ["banded back", "sofa", "four thin legs"]
        embed = model.get_input_embeddings()
        expected = [sum(embed(torch.tensor(token)) for token in tokenizer(f" {w}")["input_ids"]) for w in words]
        assert torch.allclose(base.keyword_embeds(model, tokenizer, words), torch.stack(expected), atol=1e-6)
        assert base.keyword_embeds(model, tokenizer, []).shape == (0, embed.weight.shape[1])

    def test_a_scene_is_not_mirrored(self):
        """Left would be right; products and patches are, about half of them."""
        pictures = [make_picture("test", index) for index in range(80)]
        is_scene = torch.tensor([not picture.classes.isdisjoint(scenes.CLASSES) for picture in pictures])
        pixels = torch.arange(80 * 3 * 2 * 5.0).reshape(80, 3, 2, 5)
        mirrored = base.mirror_half(pixels, pictures, random.Random(0))
        changed = (mirrored != pixels).flatten(1).any(dim=1)
        assert torch.equal(mirrored[changed], pixels[changed].flip(-1))
        assert is_scene.sum() > 8 and not changed[is_scene].any()
        assert 0.35 < changed[~is_scene].double().mean() < 0.65

    def test_pictures_depend_on_stream_and_index_alone(self):
        random.seed(0)
        first = make_picture("test", 3)
        np.random.default_rng(1)
        again = make_picture("test", 3)
        assert np.array_equal(first.pixels, again.pixels) and first.text == again.text
        assert not np.array_equal(first.pixels, make_picture("test", 4).pixels)

    def test_its_products_are_not_the_catalogues(self, tmp_path):
        from mivpg.miniature.catalogue import make_catalogue

        catalogue = make_catalogue(tmp_path, num_products=12, seed=0)
        seen = [picture.facts for index in range(30) if "family" in (picture := make_picture("base 0", index)).facts]
        assert len(seen) > 10
        assert [p.traits for p in catalogue] != [{t: v for t, v in f.items() if t != "family"} for f in seen[:12]]
