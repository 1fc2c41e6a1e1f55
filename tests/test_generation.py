"""Captions are what the language model's own `generate` makes of the visual prompts, which are read once a bag."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, Lfm2Config, MistralConfig, XGLMConfig

from families import LANGUAGE, language_config
from mivpg import MivpgForConditionalGeneration
from mivpg.errors import BagError
from tiny import IMAGE_TOKEN_ID, NUM_QUERIES, random_bags, tiny_config, tiny_model

DECODERS = [name for name in LANGUAGE if name not in ("t5", "bart")]
PAD = 0
NEW = 6


CONFIGS = {name: language_config(name) for name in DECODERS}
CONFIGS |= {
    "a window": MistralConfig(**LANGUAGE["llama"], sliding_window=5, vocab_size=259, pad_token_id=PAD),
    "convolutions between": Lfm2Config(
        **LANGUAGE["llama"],
        layer_types=["conv", "full_attention"],
        vocab_size=259,
        pad_token_id=PAD,
        block_multiple_of=16,
    ),
    "positions by their number": language_config(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}, max_position_embeddings=8
    ),
    "hidden": language_config("llama"),
}


class Hidden(nn.Module):
    """A language model in a wrapper, as adapters and compilers make them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **options):
        return self.inner(*args, **options)

    def __getattr__(self, name: str):
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)


@pytest.fixture(params=CONFIGS)
def model(request) -> MivpgForConditionalGeneration:
    """Over a decoder of each kind."""
    model = tiny_model(tiny_config(text_config=CONFIGS[request.param]))
    for weight in model.language_model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    if request.param == "hidden":
        model.language_model = Hidden(model.language_model)
    return model


def inputs_of_two_bags() -> dict[str, torch.Tensor]:
    """Texts of two lengths, padded on the left."""
    embeds, mask = random_bags((3, 2))
    marks = [IMAGE_TOKEN_ID] * NUM_QUERIES
    ids = torch.tensor([[*marks, 5, 6, 7, 8], [PAD, PAD, PAD, *marks, 9]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "image_embeds": embeds, "image_mask": mask}


@torch.no_grad()
def plainly(model: MivpgForConditionalGeneration, inputs: dict[str, torch.Tensor], **options):
    embeds, _ = model.prepare_inputs_embeds(inputs["input_ids"], None, inputs["image_embeds"], inputs["image_mask"])
    return model.language_model.generate(
        input_ids=inputs["input_ids"], inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options
    )


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}])
def test_beams_find_what_they_would_find_alone(model, options) -> None:
    inputs = inputs_of_two_bags()
    options |= {"max_new_tokens": NEW, "min_new_tokens": NEW, "output_scores": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    expected = plainly(deepcopy(model), inputs, **options)  # a copy, since some frequencies grow with what was read
    torch.manual_seed(0)
    found = model.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.sequences.unique(dim=0)) > 1
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "num_first"),
    [
        ({"num_beams": 4}, 2 * 8),
        ({"generation_config": GenerationConfig(num_beams=4)}, 2 * 8),
        ({"num_beams": 1}, 2 * 9),
        ({"num_beams": 4, "cache_implementation": "static"}, 4 * 2 * 9),
        ({"num_beams": 4, "past_key_values": DynamicCache()}, 4 * 2 * 9),
        ({"num_beams": 4, "output_attentions": True, "return_dict_in_generate": True}, 4 * 2 * 9),
    ],
)
def test_positions_that_are_read_first(options, num_first) -> None:
    torch.manual_seed(0)
    model = tiny_model()
    seen = []
    model.language_model.get_decoder().layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].shape[:-1].numel()), with_kwargs=True
    )
    model.generate(**inputs_of_two_bags(), max_new_tokens=2, **options)
    assert seen[0] == num_first
    assert seen[1] == (2 if options == {"num_beams": 1} else 4 * 2)  # no position is read again


@pytest.mark.parametrize(
    ("own", "passed"),
    [
        ({"num_beams": 4}, {"do_sample": True, "num_return_sequences": 2}),
        ({"cache_implementation": "static"}, {"num_beams": 4}),
        ({"output_attentions": True}, {"num_beams": 2}),
    ],
)
def test_what_a_generation_config_leaves_open_is_the_language_model_s(own, passed) -> None:
    model, inputs = tiny_model(), inputs_of_two_bags()
    model.language_model.set_attn_implementation("eager")  # no other gives attentions
    for name, value in own.items():
        setattr(model.language_model.generation_config, name, value)
    options = {"generation_config": GenerationConfig(**passed), "max_new_tokens": 3, "return_dict_in_generate": True}
    torch.manual_seed(0)
    expected = plainly(model, inputs, **options)
    torch.manual_seed(0)
    found = model.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert (found.attentions is None) == ("output_attentions" not in own)
    if found.attentions is not None:
        assert found.attentions[0][0].shape == expected.attentions[0][0].shape


def test_what_is_written_depends_on_where_the_images_stand() -> None:
    """As the forward pass does."""
    torch.manual_seed(0)
    model = tiny_model(tiny_config("mean", position_encoding="ppeg"))
    for weight in model.language_model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    inputs = inputs_of_two_bags() | {
        "image_coords": torch.tensor([[[0.0, 0], [2, 0], [1, 3]], [[0, 0], [0, 1], [0, 0]]])
    }
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(**inputs, **options).logits[0]
    torch.testing.assert_close(found, model(**inputs).logits[:, -1], atol=1e-5, rtol=0)
    without = model.generate(**inputs | {"image_coords": None}, **options).logits[0]
    assert (found - without).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "most"), [("opt", 16 - 8 + 1), ("gpt2", 16 - 8 + 1), ("bart", 16)])
def test_where_places_are_learned_a_text_and_its_caption_have_to_have_one_each(kind, most) -> None:
    """Of 16, for a text of 8 tokens; one more is refused, and fails where it is not."""
    places = {"n_positions" if kind == "gpt2" else "max_position_embeddings": 16}
    model = tiny_model(tiny_config(text_config=language_config(kind, **places)))
    assert model.num_positions == 16
    embeds, mask = random_bags((3,))
    ids = torch.tensor([[*[IMAGE_TOKEN_ID] * NUM_QUERIES, *range(5, 13 - NUM_QUERIES)]])
    inputs = {"input_ids": ids, "image_embeds": embeds, "image_mask": mask}
    caption = model.generate(**inputs, max_new_tokens=most, min_new_tokens=most)
    assert caption.shape[1] == (most + 1 if kind == "bart" else 8 + most)
    with pytest.raises(BagError, match=f"8 tokens, .* and {most + 1} for a caption, but .* has places for 16; "):
        model.generate(**inputs, max_new_tokens=most + 1)
    if kind == "bart":
        with pytest.raises(BagError, match=r"8 tokens, .* and 17 for a caption"):
            model(**inputs, labels=torch.full((1, 17), 5))
    else:
        with pytest.raises(BagError, match=r"17 tokens, .* but the language model has places for 16"):
            model(**inputs | {"input_ids": torch.cat([ids, torch.full((1, 9), 5)], dim=1)})
    model.num_positions = None
    with pytest.raises(IndexError):
        model.generate(**inputs, max_new_tokens=most + 1, min_new_tokens=most + 1)


@pytest.mark.parametrize("kind", ["t5", "llama", "xglm"])
def test_other_language_models_go_on(kind) -> None:
    """XGLM's sinusoids grow with the text, whatever its configuration says."""
    if kind == "xglm":
        config = XGLMConfig(vocab_size=259, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4, pad_token_id=PAD)
    else:
        config = language_config(kind)
    assert tiny_model(tiny_config(text_config=config)).num_positions is None
