"""Captions are what the language model's own `generate` makes of the visual prompts, which are read once a bag."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, Lfm2Config, MistralConfig

from families import LANGUAGE, language_config
from mivpg import MivpgForConditionalGeneration
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
