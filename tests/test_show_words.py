"""Which image a word looked at, against attention that is asked for one step at a time."""

import pytest
import torch

from families import save_blip2
from mivpg import Bag, BagCollator, MivpgForConditionalGeneration, MivpgProcessor, attention_maps
from mivpg.word_attention import split_words, word_weights
from test_show_likelihood import load, random_bag

CAPTION = "a red  chair"


@pytest.fixture(scope="module", params=["opt", "llama", "t5", "bart"])
def captioner(request, tmp_path_factory) -> tuple[MivpgForConditionalGeneration, MivpgProcessor]:
    model, processor = load(save_blip2(tmp_path_factory.mktemp(request.param), request.param))
    for name, parameter in model.qformer.named_parameters():
        if name.endswith(".crossattention.attention.query.weight"):
            parameter.data *= 5  # prompts that read alike would make all words alike
    return model, processor


@torch.no_grad()
def step_by_step(model, processor, bag: Bag, caption: str) -> tuple[list[int], torch.Tensor]:
    """Tokens of a caption, and of each the attention to the prompts (tokens, R) of the step that wrote it."""
    batch = BagCollator(processor, training=False)([bag])
    ids = processor.caption_ids(bag.prompt, caption)
    embeds, _ = model.prepare_inputs_embeds(
        batch["input_ids"], image_embeds=batch["image_embeds"], image_mask=batch["image_mask"]
    )
    marks = (batch["input_ids"][0] == model.config.image_token_index).nonzero()[:, 0].tolist()
    model.language_model.set_attn_implementation("eager")
    rows = []
    for position in range(len(ids)):
        before = torch.tensor([ids[:position]], dtype=torch.long)
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.text_config.decoder_start_token_id]])
            given = {"inputs_embeds": embeds, "decoder_input_ids": torch.cat([start, before], 1)}
            layers = model.language_model(**given, output_attentions=True).cross_attentions
        else:
            written = torch.cat([embeds, model.get_input_embeddings()(before)], 1)
            layers = model.language_model(inputs_embeds=written, output_attentions=True).attentions
        rows.append([sum(float(head[-1, mark]) for layer in layers for head in layer[0]) for mark in marks])
    num_weights = len(layers) * layers[0].shape[1]
    return ids, torch.tensor(rows) / num_weights


def test_words_looked_where_each_of_their_tokens_did(captioner):
    model, processor = captioner
    bag = random_bag(4)
    maps = attention_maps(model, BagCollator(processor, training=False)([bag]))
    before = model.language_model.config._attn_implementation
    looked = word_weights(model, processor, bag, CAPTION, maps.images[:, 0])
    assert model.language_model.config._attn_implementation == before
    assert looked.words == ("a", "red", "chair")
    assert looked.prompts.shape == (3, 5) and looked.images.shape == (3, 4)

    ids, rows = step_by_step(model, processor, bag, CAPTION)
    owners: list[list[int]] = []  # bytes: a space is of the word before it
    after_space = True
    for step, token in enumerate(ids):
        if token in processor.tokenizer.all_special_ids:
            continue
        is_space = processor.tokenizer.decode([token]) == " "
        if not is_space and after_space:
            owners.append([])
        if owners:
            owners[-1].append(step)
        after_space = is_space
    read = maps.images[:, 0].mean(dim=(0, 1))  # (R, N): one instance an image
    for number, steps in enumerate(owners):
        expected = rows[steps].mean(dim=0)
        torch.testing.assert_close(looked.prompts[number], expected, atol=1e-5, rtol=0)
        shares = torch.tensor([sum(float(expected[r] * read[r, n]) for r in range(5)) for n in range(4)])
        torch.testing.assert_close(looked.images[number], shares / shares.sum(), atol=1e-5, rtol=0)
    assert (looked.prompts[0] - looked.prompts[2]).abs().max() > 1e-3  # the control: words differ
    assert (looked.prompts.sum(dim=1) < 1).all()


def test_patches_are_summed_to_their_images(captioner):
    model, processor = captioner
    model.config.patch_pooling = "none"
    try:
        bag = random_bag(3)
        maps = attention_maps(model, BagCollator(processor, training=False)([bag]))
        looked = word_weights(model, processor, bag, CAPTION, maps.images[:, 0])
        read = maps.images[:, 0].mean(dim=(0, 1)).reshape(5, 3, 17).sum(dim=2)
        expected = looked.prompts @ read
        torch.testing.assert_close(looked.images, expected / expected.sum(dim=1, keepdim=True), atol=1e-6, rtol=0)
    finally:
        model.config.patch_pooling = "abmil"


def test_an_empty_caption_has_no_words(captioner):
    model, processor = captioner
    bag = random_bag(2)
    maps = attention_maps(model, BagCollator(processor, training=False)([bag]))
    looked = word_weights(model, processor, bag, "", maps.images[:, 0])
    assert looked.words == () and looked.prompts.shape == (0, 5) and looked.images.shape == (0, 2)


def test_tokens_are_told_to_words(captioner):
    _, processor = captioner
    ids = processor.tokenizer("two\n stools é", add_special_tokens=False)["input_ids"]
    words, word_of = split_words(processor, [*ids, processor.tokenizer.eos_token_id])
    assert words == ("two", "stools", "é")
    assert word_of == [0] * 3 + [0, 0] + [1] * 6 + [1] + [2, 2, None]  # bytes, of which é has two


def test_a_language_model_without_attention_says_so(captioner, monkeypatch):
    model, processor = captioner
    bag = random_bag(2)
    maps = attention_maps(model, BagCollator(processor, training=False)([bag]))
    forward = model.language_model.forward

    def without_attention(*args, output_attentions=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.language_model, "forward", without_attention)
    assert word_weights(model, processor, bag, "a chair", maps.images[:, 0]) is None
