"""The benchmarks of captions, epochs and extraction measure what they say, at tiny sizes."""

import time
from types import SimpleNamespace

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

import captions
import epochs
from measuring import Seconds
from mivpg import MivpgForConditionalGeneration
from mivpg.bags import BagCollator, Sample, bag_size
from mivpg.processing_mivpg import MivpgProcessor
from tiny import (
    HIDDEN_SIZE,
    IMAGE_TOKEN_ID,
    NUM_HEADS,
    NUM_QUERIES,
    VISION_WIDTH,
    randomize_weights,
    tiny_opt_config,
    tiny_vit_config,
)
from training_script import make_world, tiny_train_config

NUM_TOKENS = 10
"""P of the tiny vision model."""
NUM_TRAIN_STEPS = 3
"""Of an epoch of the tiny world: 21 bags in batches of 8."""


# Captions


@pytest.fixture
def blip2() -> Blip2ForConditionalGeneration:
    torch.manual_seed(0)
    qformer = {
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 3,
        "num_attention_heads": NUM_HEADS,
        "intermediate_size": 20,
        "encoder_hidden_size": VISION_WIDTH,
        "initializer_range": 0.2,
    }
    config = Blip2Config(
        vision_config=tiny_vit_config().to_dict(),
        qformer_config=qformer,
        text_config=tiny_opt_config(max_position_embeddings=128).to_dict(),
        num_query_tokens=NUM_QUERIES,
        image_token_index=IMAGE_TOKEN_ID,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    randomize_weights(model)  # else what it reads hardly depends on the images
    return model


def test_the_rival_blip2_is_blip2(blip2, monkeypatch):
    """What the language model reads: of one image what transformers hands it, of several what the package does."""
    read = record_what_is_read(blip2.language_model, monkeypatch)
    plain = captions.around(blip2, patch_pooling="none", instance_correlation="none").eval()
    vision_model, rivals = captions.make_rivals(blip2)
    pixels = torch.randn(6, 3, 12, 12)
    with torch.no_grad():
        bags = vision_model(pixels).last_hidden_state.unflatten(0, (2, 3))  # (B, N, P, D)
    ids = torch.tensor([[IMAGE_TOKEN_ID] * NUM_QUERIES + [10, 11, 12, 13]] * 2)

    rivals[captions.BLIP2].write(bags[:, :1])
    rivals[captions.BLIP2].write(bags)
    blip2.vision_model = vision_model
    blip2.generate(pixel_values=pixels[::3], input_ids=ids, max_new_tokens=1)
    plain.load_state_dict(blip2.state_dict())
    plain.generate(image_embeds=bags, input_ids=ids, max_new_tokens=1)
    rival_of_one, rival_of_three, of_one, of_three = read
    torch.testing.assert_close(rival_of_one, of_one, rtol=0, atol=1e-5)  # other images in the vision model's batch
    assert torch.equal(rival_of_three, of_three)
    assert (of_three[0] - of_three[1]).abs().max() > 0.01
    assert (of_three - of_one).abs().max() > 0.01


def test_the_rival_llava_reads_every_token_of_every_image(blip2, monkeypatch):
    read = record_what_is_read(blip2.language_model, monkeypatch)
    _, rivals = captions.make_rivals(blip2)
    bags = torch.randn(2, 3, NUM_TOKENS, VISION_WIDTH)
    rivals[captions.LLAVA].write(bags)
    model = rivals[captions.LLAVA].generate.__closure__[0].cell_contents
    (linear,) = model.aggregator.projection
    words = blip2.get_input_embeddings()(torch.tensor([[10, 11, 12, 13]] * 2))
    expected = torch.cat([linear(bags).flatten(1, 2), words], dim=1)
    torch.testing.assert_close(read[0], expected, rtol=0, atol=1e-6)


def record_what_is_read(language_model, monkeypatch) -> list[torch.Tensor]:
    """The embeddings that the language model is given from now on."""
    read: list[torch.Tensor] = []
    generate = language_model.generate

    def recording(**inputs):
        read.append(inputs["inputs_embeds"])
        return generate(**inputs)

    monkeypatch.setattr(language_model, "generate", recording)
    return read


def test_captions_from_pixels_take_the_vision_model_and_then_those_from_features(blip2, monkeypatch):
    vision_model, rivals = captions.make_rivals(blip2)
    taken = {"vision model": [1.0], captions.MIVPG: [1.0], captions.BLIP2: [2.0], captions.LLAVA: [7.0]}

    def in_turn(runs, *, rounds):
        assert list(runs) == list(taken)
        for run in runs.values():
            run()
        return Seconds(taken)

    monkeypatch.setattr(captions, "in_turn", in_turn)
    rows = captions.captions_a_second("tiny", vision_model, rivals, 3, num_bags=2, rounds=1)
    found = [[str(cell) for cell in row] for row in rows]
    assert found == [
        ["tiny", "3", captions.MIVPG, "5", "2", "", "1", ""],
        ["tiny", "3", captions.BLIP2, "5", "1", "2 (2 to 2)", "0.667", "1.5 (1.5 to 1.5)"],
        ["tiny", "3", captions.LLAVA, "30", "0.286", "7 (7 to 7)", "0.25", "4 (4 to 4)"],
    ]


# Epochs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, num_val=0)
    return folder


def test_an_epoch_is_divided_between_the_model_and_what_is_outside(world, tmp_path, monkeypatch, capsys):
    """Time that a batch, or the forward pass, takes longer is found where it was spent."""
    plain = epochs.timed_epochs(tiny_train_config(world, output_dir=tmp_path / "plain", num_train_epochs=3))
    assert len(plain) == 2
    assert all(epoch.model > 0 and epoch.gradients > 0 for epoch in plain)
    assert all(epoch.model + epoch.waiting + epoch.gradients < epoch.whole for epoch in plain)
    assert capsys.readouterr().out == ""

    def slowly(run):
        return lambda *args, **kwargs: (time.sleep(0.1), run(*args, **kwargs))[1]

    with monkeypatch.context() as patch:
        patch.setattr(BagCollator, "__call__", slowly(BagCollator.__call__))
        (slow_batches,) = epochs.timed_epochs(tiny_train_config(world, output_dir=tmp_path / "batches"))
    assert slow_batches.waiting > 0.1 * NUM_TRAIN_STEPS > slow_batches.model
    with monkeypatch.context() as patch:
        forward = MivpgForConditionalGeneration.forward
        patch.setattr(
            MivpgForConditionalGeneration,
            "forward",
            lambda self, input_ids, **inputs: slowly(forward)(self, input_ids, **inputs),
        )
        (slow_model,) = epochs.timed_epochs(tiny_train_config(world, output_dir=tmp_path / "model"))
    assert slow_model.model > 0.1 * NUM_TRAIN_STEPS > slow_model.whole - slow_model.model


@pytest.mark.parametrize("owner", [torch.Tensor, torch.optim.AdamW])
def test_the_backward_pass_and_the_step_count_as_the_model(world, tmp_path, monkeypatch, owner):
    name = "backward" if owner is torch.Tensor else "step"
    run = getattr(owner, name)
    if hasattr(run, "hooked"):  # by an optimizer before; another will hook it again
        run = run.__wrapped__

    def slowly(self, *args, **kwargs):
        time.sleep(0.1)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, slowly)
    (epoch,) = epochs.timed_epochs(tiny_train_config(world, output_dir=tmp_path / "run"))
    assert epoch.model > 0.1 * NUM_TRAIN_STEPS > epoch.whole - epoch.model


def test_shares_are_those_of_each_epoch(monkeypatch):
    taken = [epochs.Epoch(10.0, model, waiting=0.5, gradients=0.2) for model in (9.0, 8.0)]
    monkeypatch.setattr(epochs, "timed_epochs", lambda config: taken)
    assert epochs.shares_of_epochs({"a run": None}).splitlines()[-1] == (
        "| a run | 10 (10 to 10) | 15 (10 to 20) | 5 (5 to 5) | 2 (2 to 2) |"
    )


@pytest.mark.slow
def test_what_is_trained_has_the_sizes_asked_for(tmp_path):
    qformer = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    runs = epochs.training_runs(tmp_path, num_products=4, num_slides=4, num_bags=3, num_instances=9, qformer=qformer)
    sizes = []
    for config in runs.values():
        samples = config.dataset.load()
        sizes.append([bag_size(sample) for sample in samples])
    assert [len(bags) for bags in sizes] == [4, 4, 3, 3]
    assert all(2 <= size <= 8 for size in sizes[2]) and all(1 <= size <= 9 for size in sizes[3])
    (found,) = epochs.timed_epochs(config_of_two_epochs(runs["1 to 9 tiles a bag, CLS stored"]))
    assert found.whole > found.model > 0


def config_of_two_epochs(config):
    config.num_train_epochs, config.num_workers = 2, 0
    return config


@pytest.mark.slow
def test_the_table_of_a_store_has_an_epoch_and_an_image(tmp_path):
    table = epochs.what_a_store_saves(tmp_path, num_slides=4, rounds=1, vision_config=tiny_vit_config())
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert rows[0][0].startswith("an epoch of the slides miniature, ")
    assert rows[1][0].startswith("an image, all 10 tokens of width 12 ")
    assert rows[2][0].startswith("an image, CLS alone of width 12 ")
    assert all(float(pixels) > 0 and float(store) > 0 for _, pixels, store, _ in rows)


# Extraction


@pytest.mark.slow
def test_extraction_counts_what_it_does_for_each_image(tmp_path, monkeypatch):
    """What it does once stands apart."""
    num_extracted = []

    def extract(model, processor, samples, folder, **options):
        assert options == {"batch_size": 2, "dtype": torch.float16}
        time.sleep(0.2)
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            (folder / "done").touch()
            time.sleep(0.1 * len(samples))
            num_extracted.append(len(samples))

    monkeypatch.setattr(epochs, "extract_features", extract)
    model = SimpleNamespace(eval=lambda: None, vision_model=lambda pixel_values: time.sleep(0.05 * len(pixel_values)))
    processor = SimpleNamespace(pixels=lambda paths: torch.zeros(len(paths), 3, 4, 4))
    samples = [Sample(id=str(i), images=(tmp_path / f"{i}.jpg",)) for i in range(3)]
    number, batch_size, alone, extracted, ratio, once = epochs.extraction(
        model, processor, samples, tmp_path, batch_size=2, rounds=2
    )
    assert (number, batch_size, num_extracted) == (3, 2, [3, 3, 3])
    assert float(alone) == pytest.approx(20, rel=0.2)
    assert float(extracted) == pytest.approx(10, rel=0.2)
    assert ratio.median == pytest.approx(0.5, rel=0.2)
    assert once.median == pytest.approx(0.2, rel=0.2)


def test_extraction_of_photos(tmp_path):
    samples = epochs.draw_photos(tmp_path / "photos", 3, size=(40, 30))
    model, processor = epochs.vision_model_of("miniature")
    assert isinstance(processor, MivpgProcessor)
    number, _, alone, extracted, *_ = epochs.extraction(model, processor, samples, tmp_path, batch_size=2, rounds=1)
    assert number == 3
    assert float(alone) > 0 and float(extracted) > 0
