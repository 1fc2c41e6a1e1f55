"""The weights of the images against the softmax of the queries and keys that the model computed, one by one."""

from math import exp, sqrt

import pytest
import torch
from torch import Tensor

from mivpg import MivpgError, MivpgForConditionalGeneration, image_weights
from tiny import NUM_HEADS, NUM_QUERIES, random_bags, random_coords, tiny_config, tiny_model, tiny_vit_config

LENGTHS = (3, 1, 4)

SETTINGS = [
    ("none", "csa", "none"),
    ("none", "csa", "ppeg"),
    ("none", "self_attention", "none"),
    ("abmil", "csa", "none"),
    ("abmil", "csa", "ppeg"),
    ("cls", "nystrom", "none"),
    ("mean", "none", "none"),
]


def drawn_model(setting=("none", "csa", "none"), **options) -> MivpgForConditionalGeneration:
    """With cross-attention sharp enough that blocks, heads and prompts look at other images."""
    model = tiny_model(tiny_config(*setting, vision_config=tiny_vit_config(), **options))
    for name, parameter in model.qformer.named_parameters():
        if name.endswith(".crossattention.attention.query.weight"):
            parameter.data *= 10
    return model


def batch_of_embeds() -> dict[str, Tensor]:
    image_embeds, image_mask = random_bags(LENGTHS)
    return {"image_embeds": image_embeds, "image_mask": image_mask, "image_coords": random_coords(LENGTHS, side=3)}


def batch_of_pixels() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = batch_of_embeds()
    del batch["image_embeds"]
    return batch | {"pixel_values": torch.randn(*batch["image_mask"].shape, 3, 12, 12, generator=generator)}


@torch.no_grad()
def loop_by_loop(model: MivpgForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """The same from the outputs of the query and key layers, with the model's own attention implementation."""
    queries, keys, hooks = [], [], []
    for name, module in model.qformer.named_modules():
        if name.endswith(".crossattention.attention"):
            hooks.append(module.query.register_forward_hook(lambda module, args, output: queries.append(output)))
            hooks.append(module.key.register_forward_hook(lambda module, args, output: keys.append(output)))
    image_mask = batch["image_mask"]
    image_embeds = batch.get("image_embeds")
    if image_embeds is None:
        image_embeds = model.get_image_embeds(batch["pixel_values"], image_mask)
    model.get_visual_prompts(image_embeds, image_mask, batch["image_coords"])
    for hook in hooks:
        hook.remove()
    assert len(queries) == len(keys) == 3

    weights = torch.zeros(image_mask.shape)
    for bag, length in enumerate(image_mask.sum(dim=1).tolist()):
        for block_queries, block_keys in zip(queries, keys, strict=True):  # (B, R, H), (B, M, H)
            per_image = block_keys.shape[1] // image_mask.shape[1]
            width = block_keys.shape[2] // NUM_HEADS
            for head in range(NUM_HEADS):
                part = slice(head * width, (head + 1) * width)
                for query in block_queries[bag]:
                    real = block_keys[bag, : length * per_image]
                    powers = [exp(float(query[part] @ key[part]) / sqrt(width)) for key in real]
                    for i, power in enumerate(powers):
                        weights[bag, i // per_image] += power / sum(powers) / (3 * NUM_HEADS * NUM_QUERIES)
    return weights


@pytest.mark.parametrize("make_batch", [batch_of_embeds, batch_of_pixels])
@pytest.mark.parametrize("setting", SETTINGS)
def test_weights_are_those_of_a_plain_softmax(setting, make_batch):
    model, batch = drawn_model(setting), make_batch()
    weights = image_weights(model, batch)
    torch.testing.assert_close(weights, loop_by_loop(model, batch), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3), atol=1e-6, rtol=0)
    assert (weights[batch["image_mask"] == 0] == 0).all()
    assert weights[1, 0] == pytest.approx(1)
    assert weights[2].max() - weights[2].min() > 0.05  # the control: it does not look at all images alike


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[1] != "nystrom"])
def test_permuting_the_images_permutes_the_weights(setting):
    model, batch = drawn_model(setting), batch_of_embeds()
    batch = {name: value[2:] for name, value in batch.items()}
    order = torch.tensor([2, 0, 3, 1])
    expected = image_weights(model, batch)[:, order]
    permuted = image_weights(model, {name: value[:, order] for name, value in batch.items()})
    torch.testing.assert_close(permuted, expected, atol=1e-6, rtol=0)
    assert (permuted - permuted[:, order]).abs().max() > 0.05  # the control


@pytest.mark.parametrize("setting", SETTINGS)
def test_padding_is_inert(setting):
    model, batch = drawn_model(setting), batch_of_embeds()
    garbage = batch["image_embeds"].masked_fill(batch["image_mask"][:, :, None, None] == 0, 99.0)
    assert torch.equal(image_weights(model, batch | {"image_embeds": garbage}), image_weights(model, batch))


def test_the_weights_of_a_bag_do_not_depend_on_the_batch():
    model, batch = drawn_model(), batch_of_embeds()
    alone = {name: value[:1, :3] for name, value in batch.items()}
    torch.testing.assert_close(image_weights(model, alone), image_weights(model, batch)[:1, :3], atol=1e-6, rtol=0)


def implementations(model: MivpgForConditionalGeneration) -> list[str]:
    configs = (model.config, model.config.qformer_config, model.qformer.config)
    models = (model.vision_model, model.language_model)
    return [config._attn_implementation for config in (*configs, *(part.config for part in models))]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(implementation, training, fails):
    model = drawn_model(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.5)
    model.set_attn_implementation(implementation)
    batch = batch_of_embeds()
    expected = image_weights(model.eval(), batch)
    model.train(training)
    modes = [module.training for module in model.modules()]
    before = implementations(model)
    assert before == [implementation] * 5
    if fails:
        with pytest.raises(MivpgError, match="image_mask is"):
            image_weights(model, batch | {"image_mask": batch["image_mask"][:, :2]})
    else:
        torch.testing.assert_close(image_weights(model, batch), expected, atol=0, rtol=0)  # without dropout
    assert implementations(model) == before
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
