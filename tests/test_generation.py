"""Captions are what the language model's own `generate` makes of the visual prompts, which are read once a bag."""

import pytest
import torch
from transformers import GenerationConfig, MistralConfig

from families import LANGUAGE, language_config
from mivpg import MivpgForConditionalGeneration
from tiny import IMAGE_TOKEN_ID, NUM_QUERIES, random_bags, tiny_config, tiny_model

DECODERS = [name for name in LANGUAGE if name not in ("t5", "bart")]
PAD = 0
NEW = 6


@pytest.fixture(params=[*DECODERS, "mistral"])
def model(request) -> MivpgForConditionalGeneration:
    """Over a decoder of each family; Mistral's attends to the last five positions alone."""
    if request.param == "mistral":
        config = MistralConfig(**LANGUAGE["llama"], sliding_window=5, vocab_size=259, pad_token_id=PAD)
    else:
        config = language_config(request.param)
    model = tiny_model(tiny_config(text_config=config))
    for weight in model.language_model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
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
    expected = plainly(model, inputs, **options)
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
        ({"num_beams": 4, "use_cache": False}, 4 * 2 * 9),
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
