"""The caption baselines: backbones and their stores, the recurrent decoder, its runs, and pretraining."""

import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from generated import contents
from mivpg.bags import Sample
from mivpg.baselines import backbones, pretraining, training
from mivpg.baselines.backbones import backbone_features, load_backbone, make_network, pool_p3x3, slide_features
from mivpg.baselines.pretraining import PretrainingConfig, pretrain_backbone
from mivpg.baselines.recurrent import END, PAD, START, RecurrentCaptioner, WordVocabulary, choose_rows, pad_rows
from mivpg.baselines.training import BaselineConfig, caption_with_baseline, stored_features, train_baseline
from mivpg.datasets.patch_gastric import PatchGastricConfig
from mivpg.errors import MivpgError
from mivpg.feature_files import read_features
from mivpg.images import open_image
from mivpg.miniature.patch_gastric import make_patch_gastric

CAPTIONS = {
    "a": "Tumor cells form glands, consistent with well-differentiated adenocarcinoma.",
    "b": "Tumor cells grow in solid sheets.",
    "c": "Signet ring cells lie one by one and infiltrate the muscle layer.",
}
CONFIG = BaselineConfig(features_from="a test", embedding_dim=8, hidden_dim=16, num_epochs=4, batch_size=2, max_rows=5)


@pytest.fixture(autouse=True)
def one_thread():
    """Bit for bit is promised for as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def densenet():
    return load_backbone("densenet121")


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Generated slides of the miniature, two patches of each, since a CNN is slow."""
    root = make_patch_gastric(tmp_path_factory.mktemp("slides"), num_slides=3, mean_patches=5)
    return [
        Sample(id=sample.id, images=sample.images[:2], captions=sample.captions)
        for sample in PatchGastricConfig(root=root, split="all").load()
    ]


def make_samples(captions=CAPTIONS):
    return [Sample(id=name, captions=(caption,)) for name, caption in captions.items()]


def make_features(names=CAPTIONS, width=6, num_copies=1):
    generator = torch.Generator().manual_seed(0)
    sizes = random.Random(0)
    return {
        name: [torch.randn(sizes.randint(3, 8), width, generator=generator) for _ in range(num_copies)]
        for name in names
    }


def make_model(vocabulary_size=12, width=6):
    torch.manual_seed(0)
    return RecurrentCaptioner(width, vocabulary_size, embedding_dim=8, hidden_dim=16)


class ScriptedScorer:
    """Gives these scores, an epoch after the other."""

    scores: tuple = ()

    def __init__(self, references, metrics):
        (self.metric,) = metrics
        self.left = list(self.scores)

    def score(self, predictions):
        return {self.metric: self.left.pop(0)}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def scripted(monkeypatch, *scores):
    monkeypatch.setattr(training, "CaptionScorer", type("Scorer", (ScriptedScorer,), {"scores": scores}))


# ── Backbones ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(9, 9), (10, 11), (3, 8)])
def test_p3x3_is_the_mean_of_each_block_of_3_x_3_cells(shape):
    maps = torch.randn(2, 4, *shape)
    pooled = pool_p3x3(maps)
    blocks = [(y, x) for y in range(shape[0] // 3) for x in range(shape[1] // 3)]
    assert pooled.shape == (2, len(blocks), 4)
    for place, (y, x) in enumerate(blocks):
        expected = sum(maps[:, :, 3 * y + i, 3 * x + j] for i in range(3) for j in range(3)) / 9
        assert torch.allclose(pooled[:, place], expected, atol=1e-6)


def test_a_map_that_is_too_small(densenet):
    with pytest.raises(MivpgError, match=r"map has 2 x 2 cells, expected at least 3 x 3 .*image_size of at least 96"):
        backbone_features(densenet, [Image.new("RGB", (64, 64))], image_size=64)


@pytest.mark.parametrize(("name", "channels", "cells"), [("densenet121", 1024, 9), ("efficientnet_b3", 1536, 10)])
def test_the_last_map_is_what_the_network_tells_classes_from(name, channels, cells):
    torch.manual_seed(0)
    network = make_network(name, num_classes=7)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 1.0
        network(torch.randn(4, 3, 96, 96))  # in training mode: the normalization layers have seen something
        network.eval()
        pixels = torch.randn(1, 3, 300, 300)
        maps = backbones.Backbone(name, network, "")(pixels)
        assert maps.shape == (1, channels, cells, cells)
        head = network.class_layers.out if name == "densenet121" else network._fc
        assert torch.allclose(head(maps.mean(dim=(2, 3))), network(pixels), atol=1e-5)
    assert maps.abs().max() > 0.1 and not any(p.requires_grad for p in network.parameters())


def test_nine_vectors_of_a_patch_as_imagenet_networks_expect_it(densenet):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), dtype=np.uint8)
    images = [Image.fromarray(p) for p in pixels]
    rows = backbone_features(densenet, images, batch_size=2)
    assert rows.shape == (5, 9, 1024)
    large = np.asarray(images[4].resize((300, 300), Image.Resampling.BICUBIC)) / 255
    values = (large - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    maps = F.relu(densenet.network.features(torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None]))
    assert torch.allclose(rows[4], pool_p3x3(maps)[0], rtol=1e-3, atol=1e-4)


def test_a_random_backbone_is_labelled_so_wherever_it_is_used(densenet, slides, tmp_path):
    assert densenet.description == "densenet121, random weights of seed 0, never trained"
    assert "seed 3" in load_backbone("densenet121", seed=3).description
    slide_features(densenet, slides[:1], tmp_path / "features", image_size=96)
    assert "random" in json.loads((tmp_path / "features" / "features.json").read_text())["backbone"]
    config = BaselineConfig(features_from=densenet.description, embedding_dim=4, hidden_dim=4, num_epochs=1)
    samples = make_samples()
    out = train_baseline(make_features(), samples, samples, tmp_path / "run", config)
    assert "random" in json.loads((out / "baseline.json").read_text())["config"]["features_from"]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_come_from_a_file_with_any_head(tmp_path, suffix):
    torch.manual_seed(9)
    network = make_network("densenet121", num_classes=5)
    file = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(network.state_dict(), file)
    backbone = load_backbone("densenet121", file)
    assert f"weights of weights.{suffix} (sha256 " in backbone.description and "random" not in backbone.description
    pixels = torch.randn(1, 3, 96, 96)
    assert torch.equal(backbone(pixels), F.relu(network.eval().features(pixels)))


def test_wrong_weights(tmp_path):
    state = make_network("densenet121", num_classes=5).state_dict()
    wrong = {
        "lacks": {name: value for name, value in state.items() if name != "features.norm5.weight"},
        "shape": state | {"features.norm5.weight": torch.zeros(3)},
        "other": make_network("efficientnet_b3", num_classes=5).state_dict(),
    }
    for name, tensors in wrong.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    expectations = {
        "lacks": r"lacks.safetensors lacks features.norm5.weight, expected the state dict of MONAI's densenet121",
        "shape": r"shape.safetensors: features.norm5.weight is \(3,\), expected \(1024,\)",
        "other": r"other.safetensors lacks features.conv0.weight",
        "none": r"none.safetensors does not exist",
    }
    for name, message in expectations.items():
        with pytest.raises(MivpgError, match=message):
            load_backbone("densenet121", tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "text.pth").write_text("no tensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name in ("text.safetensors", "text.pth", "list.pth"):
        with pytest.raises(MivpgError, match=rf"{name} .*expected a safetensors or torch file of a state dict"):
            load_backbone("densenet121", tmp_path / name)


def test_without_monai(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(MivpgError, match=r'backbone densenet121 takes MONAI: pip install "mivpg\[baselines\]"'):
        load_backbone("densenet121")


def test_the_signal_of_an_untrained_efficientnet_survives_all_layers():
    maps = load_backbone("efficientnet_b3")(torch.randn(2, 3, 96, 96))
    assert maps.std() > 1e-6  # with MONAI's own start of depthwise convolutions 2e-14


def test_an_unknown_backbone():
    with pytest.raises(MivpgError, match=r"backbone is 'resnet', expected one of densenet121, efficientnet_b3"):
        load_backbone("resnet")


# ── Stores ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_store_holds_each_copy_and_skips_what_is_there(densenet, slides, tmp_path, monkeypatch):
    options = {"image_size": 96, "augment": True, "num_copies": 2}
    files = slide_features(densenet, slides[:2], tmp_path / "a", **options)
    assert [len(copies) for copies in files.values()] == [2, 2]
    rows = [read_features(file)[0] for file in files[slides[0].id]]
    assert rows[0].shape == (2, 1, 1024) and not torch.allclose(rows[0], rows[1], atol=1e-2)

    before = contents(tmp_path / "a")
    files[slides[0].id][1].unlink()  # as if it had been ended there
    looked = []
    monkeypatch.setattr(backbones, "open_image", lambda path: (looked.append(path), open_image(path))[1])
    assert slide_features(densenet, slides[:2], tmp_path / "a", **options) == files
    assert looked == list(slides[0].images) and contents(tmp_path / "a") == before


def test_a_file_is_there_whole_or_not_at_all(densenet, slides, tmp_path, monkeypatch):
    opened = []

    def open_one(path):
        opened.append(path)
        if len(opened) == 2:
            raise KeyboardInterrupt
        return open_image(path)

    monkeypatch.setattr(backbones, "open_image", open_one)
    with pytest.raises(KeyboardInterrupt):
        slide_features(densenet, slides[:1], tmp_path, image_size=96)
    assert [path.name for path in tmp_path.iterdir()] == ["features.json"]


def test_without_augmentation_rows_are_those_of_the_pictures(densenet, slides, tmp_path):
    files = slide_features(densenet, slides[:1], tmp_path, image_size=96)
    expected = backbone_features(densenet, [open_image(path) for path in slides[0].images], image_size=96)
    assert torch.equal(read_features(files[slides[0].id][0])[0], expected)


def test_stores_that_cannot_be(densenet, slides, tmp_path):
    with pytest.raises(MivpgError, match=r"num_copies is 4 and augment False"):
        slide_features(densenet, slides, tmp_path, num_copies=4)
    with pytest.raises(MivpgError, match=r"bag 'x': no image"):
        slide_features(densenet, [Sample(id="x")], tmp_path, image_size=96)
    with pytest.raises(MivpgError, match=r"features.json: .* 'image_size': 96.* 'image_size': 128.*another folder"):
        slide_features(densenet, slides, tmp_path, image_size=128)
    (tmp_path / "features.json").unlink()
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(MivpgError, match=r"holds features, but no features.json"):
        slide_features(densenet, slides, tmp_path)


# ── The decoder ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_attention_and_gru_are_their_formulas():
    model = make_model().double()
    rows, mask = pad_rows([torch.randn(5, 6).double(), torch.randn(3, 6).double()])
    words = torch.tensor([[START, 7, 5, 9, END], [START, 4, END, PAD, PAD]])
    _, logits = model(rows, mask, words)

    weights = {name: value.numpy() for name, value in model.state_dict().items()}

    def dense(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for slide, num_rows, num_words in ((0, 5, 4), (1, 3, 2)):
        encoded = np.maximum(dense("encoder", rows[slide, :num_rows].numpy()), 0)
        state = np.zeros(16)
        for step in range(num_words):
            scores = dense(
                "attention.score", np.tanh(dense("attention.of_row", encoded) + dense("attention.of_state", state))
            )[:, 0]
            attention = np.exp(scores) / np.exp(scores).sum()
            x = np.concatenate([attention @ encoded, weights["embedding.weight"][words[slide, step]]])
            of_input = np.split(weights["gru.weight_ih"] @ x + weights["gru.bias_ih"], 3)
            of_state = np.split(weights["gru.weight_hh"] @ state + weights["gru.bias_hh"], 3)
            reset, update = (sigmoid(of_input[i] + of_state[i]) for i in (0, 1))
            state = (1 - update) * np.tanh(of_input[2] + reset * of_state[2]) + update * state
            expected = dense("output", dense("hidden", state))
            np.testing.assert_allclose(logits[slide, step].detach().numpy(), expected, atol=1e-12)


def test_the_loss_is_that_of_the_words_summed_over_a_caption():
    model = make_model()
    rows, mask = pad_rows([torch.randn(5, 6), torch.randn(3, 6)])
    loss, logits = model(rows, mask, torch.tensor([[START, 7, END], [START, END, PAD]]))
    log = logits.log_softmax(dim=-1)
    expected = -(log[0, 0, 7] + log[0, 1, END] + log[1, 0, END]) / 2
    assert torch.allclose(loss, expected)


def test_padding_is_inert_and_a_batch_equals_its_slides():
    model = make_model()
    slides = [torch.randn(size, 6) for size in (7, 2, 4)]
    words = torch.tensor([[START, 7, 5, END], [START, 4, END, PAD], [START, 9, 8, END]])
    rows, mask = pad_rows(slides)
    garbage = torch.where(mask[..., None] == 1, rows, 99.0)
    loss, logits = model(rows, mask, words)
    assert torch.equal(model(garbage, mask, words)[1], logits)
    assert torch.equal(model.generate(garbage, mask, 6), model.generate(rows, mask, 6))

    alone = [model(*pad_rows([slide]), row[None]) for slide, row in zip(slides, words, strict=True)]
    assert torch.allclose(loss, sum(each for each, _ in alone) / 3, atol=1e-5)
    for index, slide in enumerate(slides):
        assert torch.allclose(logits[index], alone[index][1][0], atol=1e-5)
        (caption,) = model.generate(*pad_rows([slide]), 6).tolist()
        assert (caption + [PAD] * 6)[:6] == (model.generate(rows, mask, 6)[index].tolist() + [PAD] * 6)[:6]


def test_training_falls_until_captions_come_back_verbatim():
    vocabulary = WordVocabulary.of(CAPTIONS.values())
    model = make_model(len(vocabulary))
    rows, mask = pad_rows([copies[0] for copies in make_features().values()])
    words, _ = pad_rows([torch.tensor(vocabulary.encode(caption)) for caption in CAPTIONS.values()])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        loss, _ = model(rows, mask, words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[40] < losses[0] / 2 and losses[-1] < losses[40] / 2
    assert [vocabulary.decode(row) for row in model.generate(rows, mask, 20).tolist()] == list(CAPTIONS.values())


def test_generation_ends_and_never_writes_what_no_caption_has():
    model = make_model()
    model.output.bias.data[:4] = torch.tensor([9.0, 9.0, 0.0, 9.0])  # <pad>, <start> and <unk> would be likeliest
    rows, mask = pad_rows([torch.randn(4, 6)])
    assert model.generate(rows, mask, 3).shape == (1, 3) and (model.generate(rows, mask, 3) > 3).all()
    model.output.bias.data[END] = 99.0
    assert model.generate(rows, mask, 3).tolist() == [[END]]


def test_rows_of_a_large_slide_are_drawn_anew_by_seed():
    rows = torch.arange(50.0)[:, None]
    chosen = [choose_rows(rows, max_rows=20, noise=0.0, seed=seed) for seed in ("0 0 1", "0 0 1", "0 1 1")]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    assert len(set(chosen[0].flatten().tolist())) == 20
    noisy = choose_rows(rows, max_rows=50, noise=0.001, seed="0")
    assert 0.0005 < (noisy - noisy.round()).std() < 0.002


def test_words_are_the_captions_own():
    vocabulary = WordVocabulary.of(["Poorly-differentiated cells,  cells."])
    assert vocabulary.words == ("Poorly-differentiated", "cells,", "cells.")
    assert vocabulary.decode(vocabulary.encode("Poorly-differentiated cells,  cells.")) == (
        "Poorly-differentiated cells, cells."
    )
    assert vocabulary.encode("cells. <end> glands") == [START, 6, 3, 3, END]


# ── Runs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_vocabulary_is_of_training_captions_alone(tmp_path, monkeypatch):
    scripted(monkeypatch, *[0.5] * 4)
    samples = make_samples()
    out = train_baseline(make_features(), samples[:1], samples[1:], tmp_path, CONFIG)
    record = json.loads((out / "baseline.json").read_text())
    assert record["vocabulary"] == sorted(CAPTIONS["a"].split()) and record["max_words"] == 9


@pytest.mark.parametrize("at", ["after the best", pytest.param("after the checkpoint", marks=pytest.mark.slow)])
def test_a_resumed_run_is_an_unbroken_one_bit_for_bit(tmp_path, monkeypatch, at):
    features, samples = make_features(num_copies=2), make_samples()
    whole = train_baseline(features, samples, samples, tmp_path / "whole", CONFIG)
    save = training._save
    epochs = []

    def save_and_end(file, model, optimizer, log):
        epochs.append(len(log))
        if len(log) == 2 and at == "after the best":
            raise KeyboardInterrupt
        save(file, model, optimizer, log)
        if len(log) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "_save", save_and_end)
        with pytest.raises(KeyboardInterrupt):
            train_baseline(features, samples, samples, tmp_path / "broken", CONFIG)
    assert epochs == [1, 2]
    broken = train_baseline(features, samples, samples, tmp_path / "broken", CONFIG)
    assert contents(broken) == contents(whole)
    log = json.loads((whole / "training.json").read_text())
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4] and log[3]["loss"] < log[0]["loss"]
    assert (load_file(whole / "checkpoint.safetensors")["optimizer.0.step"]) == 4 * 3  # 6 copies in batches of 2

    before = contents(whole)
    train_baseline(features, samples, samples, whole, CONFIG)  # has ended
    assert contents(whole) == before


@pytest.mark.parametrize("metric", ["BLEU@4", "CIDEr"])
def test_early_stopping_keeps_the_best_epoch(tmp_path, monkeypatch, metric):
    scripted(monkeypatch, 0.1, 0.4, 0.3, 0.4, 0.2, 0.9)
    config = BaselineConfig(
        features_from="a test", embedding_dim=8, hidden_dim=16, num_epochs=20, patience=3, metric=metric
    )
    features, samples = make_features(), make_samples()
    best = {}
    write = training.write_whole

    def note(file, content):
        if file.name == "best.safetensors":
            best[len(best)] = content
        write(file, content)

    monkeypatch.setattr(training, "write_whole", note)
    out = train_baseline(features, samples, samples, tmp_path, config)
    assert [entry[metric] for entry in json.loads((out / "training.json").read_text())] == [0.1, 0.4, 0.3, 0.4, 0.2]
    assert (out / "best.safetensors").read_bytes() == best[1] and len(best) == 2
    last = load_file(out / "checkpoint.safetensors")
    assert not torch.equal(load_file(out / "best.safetensors")["output.bias"], last["model.output.bias"])


def test_the_learning_rate_falls_by_epochs(tmp_path, monkeypatch):
    scripted(monkeypatch, *[0.5] * 4)
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    samples = make_samples()
    train_baseline(make_features(), samples, samples, tmp_path, CONFIG)
    assert rates == pytest.approx([1e-3 * 0.98**epoch for epoch in range(4) for _ in range(2)])


@pytest.mark.slow  # `test_reproduce.py` has a baseline from slides to captions
def test_from_generated_slides_to_captions(densenet, slides, tmp_path, monkeypatch):
    """Two kinds of features through the same calls: those of a backbone, and those of a store."""
    files = slide_features(densenet, slides, tmp_path / "features", image_size=96)
    store = []
    for sample in slides:
        file = tmp_path / f"{sample.id}.safetensors"
        save_file({"image_embeds": torch.randn(2, 3, 5)}, file)
        store.append(Sample(id=sample.id, features=file, captions=sample.captions))
    config = BaselineConfig(features_from="two", embedding_dim=8, hidden_dim=32, num_epochs=40, learning_rate=1e-2)
    scripted(monkeypatch, *np.linspace(0, 1, 40))
    runs = {
        "cnn": train_baseline(files, slides, slides, tmp_path / "cnn", replace(config, num_epochs=2)),
        "store": train_baseline(stored_features(store), store, store, tmp_path / "store", config),
    }
    blind = [Sample(id=sample.id) for sample in slides]  # captions are not looked at
    assert caption_with_baseline(runs["cnn"], files, blind).keys() == files.keys()
    captions = caption_with_baseline(runs["store"], stored_features(store), blind)
    assert captions == {sample.id: " ".join(sample.captions[0].split()) for sample in slides}


def test_runs_that_cannot_be(tmp_path, monkeypatch):
    scripted(monkeypatch, *[0.5] * 4)
    features, samples = make_features(), make_samples()
    with pytest.raises(MivpgError, match=r"bag 'b' has no features"):
        train_baseline({"a": features["a"]}, samples, samples, tmp_path / "x", CONFIG)
    with pytest.raises(MivpgError, match=r"bag 'b': .*shape \(4, 5\), expected vectors of 6"):
        train_baseline(features | {"b": [torch.zeros(4, 5)]}, samples, samples, tmp_path / "x", CONFIG)
    with pytest.raises(MivpgError, match=r"bag 'z' has no caption"):
        train_baseline(features, [Sample(id="z")], samples, tmp_path / "x", CONFIG)
    with pytest.raises(MivpgError, match=r"bag 'z' has no features file, .*extract_features"):
        stored_features([Sample(id="z")])
    with pytest.raises(MivpgError, match=r"patience is 0, expected at least 1"):
        BaselineConfig(features_from="", patience=0)
    with pytest.raises(MivpgError, match=r"x has no best.safetensors"):
        caption_with_baseline(tmp_path / "x", features, samples)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(MivpgError, match=r"used is in use"):
        train_baseline(features, samples, samples, tmp_path / "used", CONFIG)

    out = train_baseline(features, samples, samples, tmp_path / "run", CONFIG)
    other = BaselineConfig(features_from="another", embedding_dim=8, hidden_dim=16, num_epochs=4)
    with pytest.raises(MivpgError, match=r"baseline.json: features_from is 'a test', and 'another' is asked for"):
        train_baseline(features, samples, samples, out, other)
    with pytest.raises(MivpgError, match=r"other slides or captions"):
        train_baseline(features, samples, samples[:2], out, CONFIG)
    with pytest.raises(MivpgError, match=r"bag 'a': .*expected vectors of 6"):
        caption_with_baseline(out, make_features(width=4), samples)


# ── Pretraining ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pretraining_gives_weights_that_load(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "NUM_HELD_OUT", 8)
    config = PretrainingConfig(name="densenet121", num_pictures=40, num_epochs=1, image_size=64, crop_size=32)
    weights = pretrain_backbone(tmp_path, config)
    record = json.loads((tmp_path / "pretraining.json").read_text())
    assert record["accuracy"].keys() == {"whole", "crops"} and record["config"]["crop_size"] == 32
    backbone = load_backbone("densenet121", weights)
    assert "weights of weights.safetensors" in backbone.description
    start = load_backbone("densenet121").network.state_dict()
    moved = [name for name, value in backbone.network.state_dict().items() if not torch.equal(value, start[name])]
    assert "features.conv0.weight" in moved and "features.norm5.running_mean" in moved

    before = contents(tmp_path)
    assert pretrain_backbone(tmp_path, config) == weights and contents(tmp_path) == before
    with pytest.raises(MivpgError, match=r"pretraining.json: made with .*name another folder"):
        pretrain_backbone(tmp_path, PretrainingConfig(name="densenet121", num_pictures=41))


def test_accuracy_is_the_share_of_types_that_are_told(monkeypatch):
    monkeypatch.setattr(pretraining, "NUM_HELD_OUT", 40)
    kinds = [pretraining.draw_picture("held out", index)[1] for index in range(40)]
    always = F.one_hot(torch.tensor(3), 10).float()
    accuracy = pretraining.held_out_accuracy(lambda pixels: always.expand(len(pixels), -1), 32)
    assert accuracy == pytest.approx(kinds.count(3) / 40) and len(set(kinds)) > 5


def test_pretraining_that_cannot_be():
    with pytest.raises(MivpgError, match=r"crop_size is 301, expected 32 to image_size, 300"):
        PretrainingConfig(name="densenet121", crop_size=301)
    with pytest.raises(MivpgError, match=r"num_pictures is 0"):
        PretrainingConfig(name="densenet121", num_pictures=0)
