"""The likelihood of a caption token by token, what removing images does to it, and what is said of the outcome."""

import random
from copy import copy
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from families import save_blip2
from mivpg import (
    Bag,
    BagCollator,
    GenerationOptions,
    MivpgError,
    MivpgForConditionalGeneration,
    MivpgProcessor,
)
from mivpg.bags import Sample
from mivpg.layers import PyramidPositionEncoding
from mivpg.likelihood import (
    NUM_DRAWS,
    _choices,
    caption_log_likelihoods,
    check_table,
    check_weights,
    finding,
    remove_images,
    without,
)

CAPTIONS = ["a red chair", "", "two stools"]


@pytest.fixture(scope="module", params=["opt", "llama", "t5"])
def captioner(request, tmp_path_factory) -> tuple[MivpgForConditionalGeneration, MivpgProcessor]:
    return load(save_blip2(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> tuple[MivpgForConditionalGeneration, MivpgProcessor]:
    return load(save_blip2(tmp_path_factory.mktemp("opt")))


def load(folder) -> tuple[MivpgForConditionalGeneration, MivpgProcessor]:
    model = MivpgForConditionalGeneration.from_pretrained(folder, patch_pooling="abmil").eval()
    return model, MivpgProcessor.from_pretrained(folder)


def random_bag(num_images: int, name: str = "bag", prompt: str = "see") -> Bag:
    """Of features as wide as the tiny ViT's."""
    generator = torch.Generator().manual_seed(num_images)
    embeds = 3 * torch.randn(num_images, 17, 24, generator=generator)
    return Bag(id=name, images=None, image_embeds=embeds, image_coords=None, prompt=prompt, caption=None)


@torch.no_grad()
def token_by_token(model, processor, bag: Bag, caption: str) -> float:
    """Each token is asked for by itself, after those before it, of the language model alone."""
    batch = BagCollator(processor, training=False)([bag])
    ids = processor.caption_ids(bag.prompt, caption)
    embeds, _ = model.prepare_inputs_embeds(
        batch["input_ids"], image_embeds=batch["image_embeds"], image_mask=batch["image_mask"]
    )
    total = 0.0
    for position, token in enumerate(ids):
        before = torch.tensor([ids[:position]], dtype=torch.long)
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.text_config.decoder_start_token_id]])
            logits = model.language_model(inputs_embeds=embeds, decoder_input_ids=torch.cat([start, before], 1)).logits
        else:
            written = model.get_input_embeddings()(before)
            logits = model.language_model(inputs_embeds=torch.cat([embeds, written], 1)).logits
        total += float(logits[0, -1].log_softmax(-1)[token])
    return total


def test_the_likelihood_is_that_of_each_token_after_those_before_it(captioner):
    bags = [random_bag(3), random_bag(1), random_bag(5)]
    found = caption_log_likelihoods(*captioner, bags, CAPTIONS, batch_size=2)
    expected = [token_by_token(*captioner, bag, caption) for bag, caption in zip(bags, CAPTIONS, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=2e-4)
    assert expected[0] < -10  # the control: eleven letters of a random model
    assert expected[0] != pytest.approx(token_by_token(*captioner, random_bag(5), CAPTIONS[0]), abs=1e-2)


def test_the_model_is_left_in_its_mode(captioner):
    model, processor = captioner
    model.train()
    modes = [module.training for module in model.modules()]
    caption_log_likelihoods(model, processor, [random_bag(2)], ["a"])
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_changes_are_those_of_the_smaller_bags(opt):
    bag, weights = random_bag(4), [0.1, 0.5, 0.15, 0.25]
    removal = remove_images(*opt, bag, "a chair", weights, batch_size=3)
    whole = token_by_token(*opt, bag, "a chair")
    changes = [
        token_by_token(*opt, replace(bag, image_embeds=bag.image_embeds[torch.arange(4) != i]), "a chair") - whole
        for i in range(4)
    ]
    assert (removal.num_images, removal.num_removed) == (4, 1)
    assert removal.log_likelihood == pytest.approx(whole, abs=1e-4)
    assert removal.most == pytest.approx(changes[1], abs=2e-4)
    assert removal.least == pytest.approx(changes[0], abs=2e-4)
    assert removal.random == pytest.approx(np.mean(changes), abs=2e-4)
    assert np.ptp(changes) > 1e-2  # the control: images differ


def test_weights_that_mean_something_come_out_so(opt):
    """Where the weights are what each image's absence costs, the order is most, random, least."""
    bag = random_bag(4)
    changes = [remove_images(*opt, bag, "a chair", np.eye(4)[i]).most for i in range(4)]
    removal = remove_images(*opt, bag, "a chair", [-change for change in changes])
    assert removal.most < removal.random < removal.least
    mistaken = remove_images(*opt, bag, "a chair", changes)
    assert (mistaken.most, mistaken.least) == pytest.approx((removal.least, removal.most), abs=1e-5)


def test_of_many_choices_some_are_drawn_and_always_the_same(opt, monkeypatch):
    seen: list[int] = []

    def likelihoods(model, processor, bags, captions, **_):
        assert len(bags) <= 8
        seen.extend(len(bag.image_embeds) for bag in bags)
        return torch.tensor([float(bag.image_embeds.sum()) for bag in bags])

    monkeypatch.setattr("mivpg.likelihood.caption_log_likelihoods", likelihoods)
    weights = np.arange(12.0)
    first, again = (remove_images(*opt, random_bag(12), "a", weights) for _ in range(2))
    assert first == again
    assert first.num_removed == 3 and seen == ([12] + [9] * (2 + NUM_DRAWS)) * 2
    assert remove_images(*opt, random_bag(12), "a", weights, seed=1).random != first.random
    seen.clear()
    exact = remove_images(*opt, random_bag(5), "a", weights[:5])  # ten choices of two
    sums = [float(without(random_bag(5), pair).image_embeds.sum()) for pair in combinations(range(5), 2)]
    assert seen == [5] + [3] * 12
    assert exact.random == pytest.approx(np.mean(sums) - exact.log_likelihood, rel=1e-4)


@pytest.mark.parametrize("name", ["bag", "Ä\U0001f600", "\ud83d"])
def test_what_is_drawn_is_seeded_by_the_id(opt, monkeypatch, name):
    """Ordinary ids as text, from which `random` makes its own seed; half a surrogate pair is no text that encodes."""
    seen: list[int] = []

    def likelihoods(model, processor, bags, captions, **_):
        seen.extend(int(bag.image_embeds.sum()) for bag in bags)
        return torch.zeros(len(bags))

    monkeypatch.setattr("mivpg.likelihood.caption_log_likelihoods", likelihoods)
    bag = replace(random_bag(12), id=name, image_embeds=2.0 ** torch.arange(12)[:, None, None])
    remove_images(*opt, bag, "a", np.arange(12.0), seed=3)
    if name != "\ud83d":
        generator = random.Random(f"removal 3 {name}")
        expected = [4095 - sum(2**i for i in generator.sample(range(12), 3)) for _ in range(NUM_DRAWS)]
        assert seen[3:] == expected
    assert len(seen) == 3 + NUM_DRAWS


def test_of_two_images_a_random_one_is_the_most_or_the_least_attended(opt):
    removal = remove_images(*opt, random_bag(2), "a chair", [0.3, 0.7])
    assert removal.random == pytest.approx((removal.most + removal.least) / 2, abs=1e-5)
    assert abs(removal.most - removal.least) > 1e-2  # the control


def test_what_is_left_of_a_slide_stays_in_its_cells(opt, monkeypatch):
    """PPEG cell by cell: of five columns, on two rows and one far below, every second is taken away, and others."""
    model = MivpgForConditionalGeneration.from_pretrained(
        opt[0].name_or_path, patch_pooling="mean", position_encoding="ppeg"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, PyramidPositionEncoding):
            for parameter in part.parameters():
                parameter.data.normal_(0.0, 0.2, generator=generator)
    cells = [(row, column) for column in range(5) for row in (0, 1, 13)]
    bag = random_bag(15)
    bag.image_coords = torch.tensor([[column * 64.5, row * 64.5] for row, column in cells]).round()
    weights = [1.0 if column in (1, 3) else 0.1 * column for row, column in cells]  # what is left: columns 0, 2 and 4
    by_weight = np.argsort(-np.asarray(weights), kind="stable").tolist()
    removed = [(), by_weight[:6], by_weight[-6:], *_choices(15, 6, random.Random("removal 0 bag"))]
    kept = [[index for index in range(15) if index not in those] for those in removed]

    monkeypatch.setattr("mivpg.likelihood.SHARE_REMOVED", 0.4)
    seen = []
    parts = [part for part in model.modules() if isinstance(part, PyramidPositionEncoding)]
    hook = parts[0].register_forward_hook(lambda part, args, output: seen.extend(zip(args[0], output, strict=True)))
    remove_images(model, opt[1], bag, "a chair", weights, batch_size=4)
    hook.remove()
    assert len(seen) == len(kept) == 3 + NUM_DRAWS
    for (instances, encoded), those in zip(seen, kept, strict=True):
        at = {cells[index]: instances[number] for number, index in enumerate(those)}
        for number, index in enumerate(those):
            row, column = cells[index]
            expected = instances[number].clone()
            for convolution in parts[0].convolutions:
                reach = convolution.kernel_size[0] // 2
                expected += convolution.bias
                for down in range(-reach, reach + 1):
                    for right in range(-reach, reach + 1):
                        neighbour = at.get((row + down, column + right))
                        if neighbour is not None:
                            expected += convolution.weight[:, 0, down + reach, right + reach] * neighbour
            torch.testing.assert_close(encoded[number], expected, atol=1e-4, rtol=0)


def test_a_bag_of_one_image_has_nothing_to_remove(opt):
    with pytest.raises(MivpgError, match="bag 'lone' has one image"):
        remove_images(*opt, random_bag(1, "lone"), "a", [1.0])


def test_coordinates_go_with_their_images():
    bag = random_bag(4)
    bag.image_coords = torch.arange(8.0).reshape(4, 2)
    rest = without(bag, [0, 2])
    assert torch.equal(rest.image_embeds, bag.image_embeds[[1, 3]])
    assert rest.image_coords.tolist() == [[2, 3], [6, 7]]


def test_over_a_data_set(opt, tmp_path):
    samples = []
    for number in (1, 2, 5, 3):
        file = tmp_path / f"{number}.safetensors"
        save_file({"image_embeds": random_bag(number).image_embeds}, file)
        samples.append(Sample(id=f"bag {number}", features=file))
    options = {"generation": GenerationOptions(num_beams=1, max_new_tokens=5), "prompt": "see"}
    checked = check_weights(*opt, samples, batch_size=2, **options)
    assert [bag["id"] for bag in checked["bags"]] == ["bag 2", "bag 5", "bag 3"]
    assert [bag["num_removed"] for bag in checked["bags"]] == [1, 2, 1]
    for name in ("most", "least", "random"):
        assert checked[name]["mean"] == pytest.approx(np.mean([bag[name] for bag in checked["bags"]]))
    differences = [bag["most"] - bag["random"] for bag in checked["bags"]]
    assert checked["most - random"]["mean"] == pytest.approx(np.mean(differences))
    assert checked["most - random"]["low"] <= np.mean(differences) <= checked["most - random"]["high"]
    assert checked["most_matters_more"]["mean"] == pytest.approx(np.mean(np.array(differences) < 0))
    alone = check_weights(*opt, samples[2:3], batch_size=8, **options)["bags"][0]
    for name, value in alone.items():
        assert checked["bags"][1][name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-4))
    assert len(check_table(checked)) == 6
    with pytest.raises(MivpgError, match="of none of 1 bags could images be taken away"):
        check_weights(*opt, samples[:1], **options)


def test_bags_with_and_without_coordinates_stand_in_one_file(opt, tmp_path):
    samples = []
    for number in (2, 3, 4):
        tensors = {"image_embeds": random_bag(number).image_embeds}
        if number == 3:
            tensors["coords"] = torch.tensor([[0.0, 0], [5, 0], [0, 5]])
        save_file(tensors, tmp_path / f"{number}.safetensors")
        samples.append(Sample(id=f"bag {number}", features=tmp_path / f"{number}.safetensors"))
    options = {"generation": GenerationOptions(num_beams=1, max_new_tokens=3)}
    checked = check_weights(*opt, samples, **options)
    assert [bag["id"] for bag in checked["bags"]] == ["bag 2", "bag 3", "bag 4"]
    for sample, together in zip(samples, checked["bags"], strict=True):
        (alone,) = check_weights(*opt, [sample], **options)["bags"]
        assert alone["caption"] == together["caption"]
        assert alone["most"] == pytest.approx(together["most"], abs=1e-4)


def test_another_aggregator_is_refused_before_anything_is_read(opt, monkeypatch):
    model, processor = opt
    monkeypatch.setattr(model.config, "aggregator", "qformer_per_image")
    nowhere = [Sample(id="x", images=(Path("nowhere.png"),))]
    with pytest.raises(MivpgError, match="'qformer_per_image': weights of images are MIVPG's"):
        check_weights(model, processor, nowhere, generation=GenerationOptions())


def interval(low: float, high: float) -> dict[str, float]:
    return {"mean": (low + high) / 2, "low": low, "high": high}


def test_the_finding_is_what_came_out():
    below, above, across = interval(-2, -1), interval(1, 2), interval(-1, 1)
    assert "loses more" in finding({"most": below, "most - random": below, "most - least": below})
    assert "mislead" in finding({"most": below, "most - random": above, "most - least": above})
    for other in (above, across):
        assert "cannot be told" in finding({"most": below, "most - random": below, "most - least": other})
        assert "cannot be told" in finding({"most": other, "most - random": below, "most - least": below})


def test_a_limit_of_training_cuts_nothing_that_is_read_back(opt):
    model, processor = opt
    short = copy(processor)
    short.max_caption_tokens = 3
    bag, caption = random_bag(3), "a chair with four legs"
    found = caption_log_likelihoods(model, short, [bag], [caption])
    assert torch.equal(found, caption_log_likelihoods(model, processor, [bag], [caption]))
    assert short.max_caption_tokens == 3
