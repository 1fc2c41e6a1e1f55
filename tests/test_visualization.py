"""The weights of images and patches against the softmax of what the model computed, one by one; and where the picture
puts them."""

import io
from math import exp, sqrt

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from families import image_processor, save_blip2
from mivpg import (
    MivpgError,
    MivpgForConditionalGeneration,
    MivpgProcessor,
    as_seen,
    attention_maps,
    draw_attention,
    image_weights,
)
from mivpg.visualization import AttentionMaps
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


# ── Maps ────────────────────────────────────────────────────────────────────────────────────────────────────────────

MAP_SETTINGS = [*SETTINGS, ("gated_abmil", "csa", "none"), ("max", "csa", "none"), ("cls", "csa", "ppeg")]


@torch.no_grad()
def cross_attention_by_hand(model: MivpgForConditionalGeneration, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of each block, softmax(q k / sqrt(width)) over the real instances: (B, A, R, M), from the weights themselves."""
    blocks, hooks = [], []
    for name, module in model.qformer.named_modules():
        if name.endswith(".crossattention.attention"):
            seen = {}
            blocks.append((module, seen))
            hooks += [
                part.register_forward_pre_hook(lambda _, args, seen=seen, of=of: seen.update({of: args[0]}))
                for of, part in (("queries", module.query), ("instances", module.key))
            ]
    model.get_visual_prompts(batch["image_embeds"], batch["image_mask"], batch["image_coords"])
    for hook in hooks:
        hook.remove()
    found = []
    for module, seen in blocks:
        queries = seen["queries"] @ module.query.weight.T + module.query.bias  # (B, R, H)
        keys = seen["instances"] @ module.key.weight.T + module.key.bias  # (B, M, H)
        width = queries.shape[2] // NUM_HEADS
        per_image = keys.shape[1] // batch["image_mask"].shape[1]
        weights = torch.zeros(len(keys), NUM_HEADS, queries.shape[1], keys.shape[1])
        for bag, length in enumerate(LENGTHS):
            real = length * per_image
            for head in range(NUM_HEADS):
                part = slice(head * width, (head + 1) * width)
                scores = queries[bag, :, part] @ keys[bag, :real, part].T / sqrt(width)
                weights[bag, head, :, :real] = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        found.append(weights)
    return found


@pytest.mark.parametrize("setting", MAP_SETTINGS)
def test_maps_are_a_plain_softmax(setting):
    model, batch = drawn_model(setting), batch_of_embeds()
    maps = attention_maps(model, batch)
    expected = cross_attention_by_hand(model, batch)
    assert len(maps.images) == len(expected) == 3
    for block, weights in zip(maps.images, expected, strict=True):
        torch.testing.assert_close(block, weights, atol=1e-5, rtol=0)
    instance_mask = batch["image_mask"]
    if setting[0] == "none":
        instance_mask = instance_mask.repeat_interleave(10, dim=1)
    of_padding = maps.images * (1 - instance_mask)[:, None, None]  # (L, B, A, R, M)
    assert (of_padding == 0).all()
    torch.testing.assert_close(maps.images.sum(dim=4), torch.ones(maps.images.shape[:4]), atol=1e-5, rtol=0)
    for first, second in ((0, 1), (1, 2)):  # the control: no two blocks, heads or queries look alike
        assert (maps.images[first] - maps.images[second]).abs().max() > 0.05
    assert (maps.images[:, :, 0] - maps.images[:, :, 1]).abs().max() > 0.05
    assert (maps.images[:, :, :, 0] - maps.images[:, :, :, 1]).abs().max() > 0.05


@pytest.mark.parametrize("setting", MAP_SETTINGS)
def test_combined_weights_of_an_image_are_its_weight(setting):
    model, batch = drawn_model(setting), batch_of_embeds()
    combined = attention_maps(model, batch).combined
    assert combined.shape == batch["image_embeds"].shape[:3]
    torch.testing.assert_close(combined.sum(dim=2), image_weights(model, batch), atol=1e-6, rtol=0)
    torch.testing.assert_close(combined.sum(dim=(1, 2)), torch.ones(3), atol=1e-5, rtol=0)
    assert (combined[batch["image_mask"] == 0] == 0).all()


@pytest.mark.parametrize("pooling", ["abmil", "gated_abmil"])
def test_patches_are_abmils_weights(pooling):
    model, batch = drawn_model((pooling, "csa", "none")), batch_of_embeds()
    weights = {name: parameter.detach() for name, parameter in model.patch_pooling.named_parameters()}
    maps = attention_maps(model, batch)
    for bag, length in enumerate(LENGTHS):
        assert (maps.patches[bag, length:] == 0).all()
        for image in range(length):
            scores = []
            for token in batch["image_embeds"][bag, image]:
                hidden = torch.tanh(weights["projection.weight"] @ token)
                if pooling == "gated_abmil":
                    hidden = hidden * torch.sigmoid(weights["gate.weight"] @ token)
                scores.append(float(weights["score.weight"][0] @ hidden))
            expected = torch.tensor([exp(score) for score in scores])
            expected /= expected.sum()
            torch.testing.assert_close(maps.patches[bag, image], expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                maps.combined[bag, image], expected * maps.combined[bag, image].sum(), atol=1e-5, rtol=0
            )
    assert maps.patches[0].std(dim=1).max() > 0.01  # the control: it does not weigh all patches alike


def test_other_poolings_share_an_image_out_as_they_make_it():
    batch = batch_of_embeds()
    real = batch["image_mask"] == 1
    for pooling in ("cls", "mean", "max"):
        model = drawn_model((pooling, "csa", "none"))
        maps = attention_maps(model, batch)
        assert maps.patches is None
        shares = (maps.combined / maps.combined.sum(dim=2, keepdim=True))[real]  # (n, P)
        if pooling == "cls":
            expected = F.one_hot(torch.zeros(len(shares), dtype=torch.long), 10).float()
        elif pooling == "mean":
            expected = torch.full((len(shares), 10), 0.1)
        else:
            tokens = batch["image_embeds"][real]
            expected = (tokens == tokens.amax(dim=1, keepdim=True)).float().mean(dim=2)
        torch.testing.assert_close(shares, expected, atol=1e-5, rtol=0)


def test_every_patch_an_instance_is_the_mean_of_its_looks():
    model, batch = drawn_model(("none", "csa", "none")), batch_of_embeds()
    maps = attention_maps(model, batch)
    assert maps.patches is None
    expected = maps.images.mean(dim=0).mean(dim=1).mean(dim=1).reshape(3, 4, 10)
    torch.testing.assert_close(maps.combined, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("setting", MAP_SETTINGS)
def test_what_stands_in_padding_is_in_no_map(setting):
    model, batch = drawn_model(setting), batch_of_embeds()
    garbage = batch["image_embeds"].masked_fill(batch["image_mask"][:, :, None, None] == 0, torch.nan)
    maps, expected = attention_maps(model, batch | {"image_embeds": garbage}), attention_maps(model, batch)
    assert torch.equal(maps.combined, expected.combined)
    assert torch.equal(maps.images, expected.images)
    if expected.patches is not None:
        assert torch.equal(maps.patches, expected.patches)


def test_maps_from_pixels_are_those_of_their_features():
    model, batch = drawn_model(("abmil", "csa", "none")), batch_of_pixels()
    embeds = model.get_image_embeds(batch.pop("pixel_values"), batch["image_mask"]).detach()
    stored = attention_maps(model, batch | {"image_embeds": embeds})
    pixels = attention_maps(model, batch_of_pixels())
    assert torch.equal(pixels.combined, stored.combined)


def test_another_aggregator_has_no_maps():
    model = tiny_model(tiny_config())
    model.config.aggregator = "qformer_per_image"
    with pytest.raises(MivpgError, match="qformer_per_image"):
        attention_maps(model, batch_of_embeds())


# ── The picture ─────────────────────────────────────────────────────────────────────────────────────────────────────


def maps_of(heads: list[list[list[float]]], patches: Tensor | None = None) -> AttentionMaps:
    """One block, heads (A, R, N) as they are given, and AB-MIL's weights (N, P), by default of 4 tokens alike."""
    images = torch.tensor(heads)[None, None]
    if patches is None:
        patches = torch.full((images.shape[4], 4), 0.25)
    weights = images.mean(dim=(0, 2, 3))  # (1, N)
    return AttentionMaps(patches=patches[None], images=images, combined=weights[:, :, None] * patches)


def draw(maps: AttentionMaps, *, color: str = "white", num_prefix_tokens: int = 0, **options) -> np.ndarray:
    """The picture's pixels (h, w, 3), of photos of one colour."""
    photos = [Image.new("RGB", (30, 30), color)] * maps.combined.shape[1]
    options = {"title": "a chair", "caption": "a red chair"} | options
    png = draw_attention(maps, photos, num_prefix_tokens=num_prefix_tokens, **options)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def middle(mask: np.ndarray) -> tuple[float, float]:
    """The mean row and column of the pixels that are chosen."""
    assert mask.sum() > 20
    rows, columns = np.nonzero(mask)
    return rows.mean(), columns.mean()


def close_to(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(pixels - color).max(axis=2) < 25


def test_a_patch_is_drawn_where_it_is():
    """The heaviest is in the top right corner of a 3 x 3 grid, after one prefix token that is heavier still."""
    patches = torch.full((1, 10), 0.01)
    patches[0, 0], patches[0, 3] = 0.6, 0.32
    pixels = draw(maps_of([[[1.0]]], patches), num_prefix_tokens=1)
    photo = pixels[:, : pixels.shape[1] // 4]  # without the colour bar; heads are drawn in other colours
    red, green, blue = photo[..., 0], photo[..., 1], photo[..., 2]
    red_row, red_column = middle((red > green + 60) & (red > blue + 60))
    blue_row, blue_column = middle((blue > red + 60) & (blue > green + 60))
    assert red_row < blue_row - 20
    assert red_column > blue_column + 20


def test_a_head_is_drawn_with_queries_as_rows_and_images_as_columns():
    """Of two heads the first reads both images alike, the second's first query the second image alone."""
    even = [[0.5, 0.5]] * 4
    pixels = draw(maps_of([even, [[0.0, 1.0], *even[1:]]]))
    pixels = pixels[:, : int(0.88 * pixels.shape[1])]  # without the colour bar
    yellow, purple, teal = (close_to(pixels, color) for color in ((253, 231, 37), (68, 1, 84), (33, 145, 140)))
    yellow_row, yellow_column = middle(yellow)
    purple_row, purple_column = middle(purple)
    assert abs(yellow_row - purple_row) < 2
    assert yellow_column > purple_column + 50
    assert yellow_row < middle(teal)[0] - 20
    assert middle(teal)[1] < purple_column  # most of it is the first head


def test_patches_that_were_not_told_apart_have_no_row():
    told = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)
    heads = [[[0.5, 0.5]] * 3]
    with_row, without = draw(maps_of(heads, told)), draw(maps_of(heads))
    assert len(with_row) > len(without) + 200
    of_cls = draw(maps_of(heads, torch.eye(5)[[0, 0]]), num_prefix_tokens=1)
    assert of_cls.shape == without.shape


def test_any_text_is_drawn_the_same_again():
    words = {"title": "a $1 chair $x$", "caption": "it costs $5 _a_ {b} " * 30, "references": ["", "a chair"]}
    maps = maps_of([[[1.0]]])  # and of a lone photo
    pixels = draw(maps, **words)
    assert np.array_equal(draw(maps, **words), pixels)
    assert len(pixels) > len(draw(maps)) + 50  # the control: there are more lines


def test_of_a_large_bag_the_most_attended_photos_are_shown():
    weights = torch.arange(1.0, 13.0)
    maps = maps_of([[(weights / weights.sum()).tolist()]])
    photos = [Image.new("RGB", (30, 30), (20 * i, 255 - 20 * i, 255)) for i in range(12)]
    png = draw_attention(maps, photos, num_prefix_tokens=0, title="", caption="")
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    assert pixels.shape[1] == 1440
    shown = [i for i in range(12) if (np.abs(pixels - photos[i].getpixel((0, 0))).max(axis=2) == 0).sum() > 1000]
    assert shown == list(range(4, 12))


def test_what_does_not_fit_together_is_refused():
    maps = maps_of([[[0.5, 0.5]]], torch.rand(2, 4))
    photo = Image.new("RGB", (30, 30))
    words = {"title": "", "caption": ""}
    with pytest.raises(MivpgError, match="1 bags of 2 images, expected one bag of 3"):
        draw_attention(maps, [photo] * 3, num_prefix_tokens=0, **words)
    with pytest.raises(MivpgError, match="4 tokens an image less 1"):
        draw_attention(maps, [photo] * 2, num_prefix_tokens=1, **words)


@pytest.mark.parametrize("kind", ["blip_2_vision_model", "clip_vision_model"])
def test_photos_as_seen_are_the_pixels_of_the_batch(kind, tmp_path):
    processor = MivpgProcessor.from_pretrained(save_blip2(tmp_path))
    processor.image_processor = image_processor(kind)
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((90, 60))
    (seen,) = as_seen(processor, [photo])
    pixels = processor(images=[[photo]], text="a")["pixel_values"][0, 0]  # (3, h, w)
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    expected = ((pixels.permute(1, 2, 0) * std + mean) * 255).numpy()
    assert seen.size == (28, 28)
    assert np.abs(np.asarray(seen) - expected).max() < 1
