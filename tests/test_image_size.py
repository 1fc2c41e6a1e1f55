"""Images of another size than the vision model's own: BLIP-2 is fine-tuned at 364 pixels, with positions stretched."""

import pytest
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration

from mivpg import MivpgForConditionalGeneration, MivpgProcessor
from mivpg.errors import MivpgError
from mivpg.miniature import BASE_MODEL
from mivpg.training import ModelConfig

LARGER = 156  # 13 x 13 patches


@pytest.fixture(scope="module")
def resized():
    config = ModelConfig(
        base=str(BASE_MODEL), image_size=LARGER, patch_pooling="none", instance_correlation="none", dtype="float32"
    )
    return config.load()


def photo(width: int = 300, height: int = 200) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def test_the_vision_model_sees_what_blip2_sees_at_that_size(resized):
    model, processor = resized
    batch = processor(images=[[photo(), photo()]], text="a photo of")
    assert batch["pixel_values"].shape == (1, 2, 3, LARGER, LARGER)
    blip2 = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL).eval()
    with torch.no_grad():
        expected = blip2.vision_model(batch["pixel_values"][0], interpolate_pos_encoding=True).last_hidden_state
        found = model.eval().get_image_embeds(batch["pixel_values"])
    assert found.shape == (1, 2, 1 + 13 * 13, 128)
    assert torch.equal(found[0], expected)


def test_it_can_be_asked_for_one_batch_alone(resized):
    """As of BLIP-2, with a model that has no size of its own."""
    fixed, processor = resized
    model = MivpgForConditionalGeneration.from_pretrained(
        BASE_MODEL, patch_pooling="none", instance_correlation="none", dtype="float32"
    )
    batch = processor(images=[[photo(), photo()]], text="a photo of")
    with torch.no_grad():
        assert torch.equal(model(**batch, interpolate_pos_encoding=True).logits, fixed.eval()(**batch).logits)
    found = model.generate(**batch, max_new_tokens=4, interpolate_pos_encoding=True)
    assert torch.equal(found, fixed.generate(**batch, max_new_tokens=4))


def test_it_is_saved(resized, tmp_path):
    model, processor = resized
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = MivpgForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = MivpgProcessor.from_pretrained(tmp_path)(images=[[photo()]], text="a photo of")
    assert again.config.image_size == batch["pixel_values"].shape[-1] == LARGER
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_a_model_without_vision_model_has_no_images(tmp_path):
    base = Blip2ForConditionalGeneration.from_pretrained(BASE_MODEL)
    base.language_model.save_pretrained(tmp_path)
    MivpgProcessor.from_pretrained(BASE_MODEL).tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(
        language=str(tmp_path), image_embeds_size=8, image_size=LARGER, qformer={"num_hidden_layers": 1}
    )
    with pytest.raises(MivpgError, match="image_size is given, but there is no vision model"):
        config.load()
