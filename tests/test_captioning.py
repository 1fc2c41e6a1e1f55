"""Captions come in order, once each, and an interrupted run ends as an unbroken one would."""

import json
import logging
import multiprocessing
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from families import save_blip2
from mivpg import MivpgForConditionalGeneration, MivpgProcessor
from mivpg.bags import BagDataset, Sample
from mivpg.captioning import (
    MODEL_OPTIONS,
    CaptionCounts,
    GenerationOptions,
    _read_ahead,
    caption_bags,
    caption_file,
    caption_samples,
    read_captions,
)
from mivpg.configuration_mivpg import MivpgConfig, MivpgQFormerConfig
from mivpg.errors import BagError, MivpgError

GREEDY = GenerationOptions(num_beams=1, max_new_tokens=7)


class FakeProcessor:
    """Reads of a bag its first value and its number of images; a prompt is its length in ones, padded on the left."""

    def pixels(self, bag):
        return torch.stack([torch.full((3, 1, 1), int(np.asarray(image).ravel()[0])) for image in bag])

    def __call__(self, *, images, pixel_values, image_embeds, image_coords, text, captions, return_tensors):
        assert captions is None
        bags = image_embeds or pixel_values or [self.pixels(bag) for bag in images]
        longest = max(map(len, text))
        return {
            "pixel_values": torch.tensor([[int(bag[0].ravel()[0]), len(bag)] for bag in bags]),  # (B, 2)
            "input_ids": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in text]).long(),
        }

    def decode_captions(self, ids):
        return [" ".join(map(str, row)) for row in ids.tolist()]


class FakeModel(torch.nn.Module):
    """Its caption: what the processor read, the length of the prompt, the size of the batch, and `max_new_tokens`."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, is_encoder_decoder=False, seconds=0.0):
        super().__init__()
        options = {name: getattr(MivpgConfig, name) for name in MODEL_OPTIONS}
        self.config = SimpleNamespace(
            is_encoder_decoder=is_encoder_decoder,
            image_embeds_size=3,
            base=None,
            qformer_config=MivpgQFormerConfig(),
            **options,
        )
        self.weights = "those of the first model"
        self.seconds = seconds
        self.num_captioned = 0

    def fingerprint(self):
        return self.weights

    def generate(self, pixel_values, input_ids, num_beams, max_new_tokens, min_new_tokens=None):
        assert not self.training
        time.sleep(self.seconds)
        self.num_captioned += len(input_ids)
        prompt_lengths = input_ids.sum(1, keepdim=True)
        rest = torch.tensor([[len(input_ids), max_new_tokens]]).expand(len(input_ids), 2)
        ids = torch.cat([pixel_values, prompt_lengths, rest], dim=1)
        return ids if self.config.is_encoder_decoder else torch.cat([input_ids, ids], dim=1)


class DyingModel(FakeModel):
    def generate(self, **inputs):
        raise ZeroDivisionError


def write_samples(folder: Path, num_samples: int) -> list[Sample]:
    """Sample i has 1 to 3 grey pictures, the first of brightness i, and every third has a prompt of its own."""
    samples = []
    for i in range(num_samples):
        paths = tuple(folder / f"{i}-{k}.png" for k in range(1 + i % 3))
        for k, path in enumerate(paths):
            Image.new("L", (4, 4), i + 100 * k).save(path)
        samples.append(Sample(id=f"bag {i}", images=paths, prompt="own prompt" if i % 3 == 2 else None))
    return samples


def write_captions(samples, out, model=None, **options):
    options = {"generation": GREEDY, "prompt": "a photo of", "batch_size": 4} | options
    return caption_file(model or FakeModel(), FakeProcessor(), samples, out, **options)


class Killed(Exception):
    pass


def largest_first(samples: list[Sample]) -> list[int]:
    """The order in which bags are captioned; those of one size stay in theirs."""
    return sorted(range(len(samples)), key=lambda i: (-len(samples[i].images), i))


def interrupted(samples, out, num_lines: int, torn: bytes = b"", model: FakeModel | None = None, **options) -> None:
    """Leaves what a run that was killed leaves: so many of the lines that it would have written, and a piece of one."""
    unbroken = out.with_name("unbroken-" + out.name)
    write_captions(samples, unbroken, **options)
    lines = unbroken.read_bytes().splitlines(keepends=True)
    unbroken.unlink()
    lines = [lines[i] for i in largest_first(samples)]

    class KilledModel(FakeModel):
        def generate(self, **inputs):
            raise Killed

    killed = KilledModel()
    if model is not None:
        killed.config = model.config
    with pytest.raises(Killed):
        write_captions(samples, out, killed, **options)
    out.with_name(out.name + ".partial").write_bytes(b"".join(lines[:num_lines]) + torn)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def counts(num_bags, num_failed=0, num_resumed=0):
    return CaptionCounts(num_bags=num_bags, num_failed=num_failed, num_resumed=num_resumed)


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_caption_bags_cuts_the_prompt_and_keeps_the_mode(tmp_path, is_encoder_decoder, training):
    model = FakeModel(is_encoder_decoder).train(training)
    dataset = BagDataset(write_samples(tmp_path, 3), prompt="a photo of")
    captions = caption_bags(model, FakeProcessor(), [dataset[0], dataset[2]], num_beams=1, max_new_tokens=9)
    assert captions == ["0 1 10 2 9", "2 3 10 2 9"]
    assert model.training == training


def test_the_mode_is_kept_when_generating_fails(tmp_path):
    model = DyingModel().train()
    with pytest.raises(ZeroDivisionError):
        caption_bags(model, FakeProcessor(), [BagDataset(write_samples(tmp_path, 1))[0]])
    assert model.training


def test_file_holds_a_line_a_bag_in_order(tmp_path):
    samples = write_samples(tmp_path, 10)
    assert write_captions(samples, tmp_path / "new" / "captions.jsonl") == counts(10)
    last_batch = (6, 9)  # of the smallest bags
    assert lines_of(tmp_path / "new" / "captions.jsonl") == [
        {"id": f"bag {i}", "caption": f"{i} {1 + i % 3} 10 {2 if i in last_batch else 4} 7"} for i in range(10)
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["captions.jsonl"]


def test_little_of_a_batch_is_padding(tmp_path):
    """Of images in order a third would be; the largest bags come first."""
    samples = write_samples(tmp_path, 60)
    model = FakeModel()
    sizes: list[list[int]] = []

    def generate(pixel_values, **inputs):
        sizes.append(pixel_values[:, 1].tolist())
        return FakeModel.generate(model, pixel_values, **inputs)

    model.generate = generate
    write_captions(samples, tmp_path / "out.jsonl", model)
    assert [size for batch in sizes for size in batch] == [3] * 20 + [2] * 20 + [1] * 20
    assert sum(max(batch) * len(batch) for batch in sizes) == sum(len(sample.images) for sample in samples)


def test_bags_of_features_go_by_their_headers_and_one_without_comes_last(tmp_path):
    samples = []
    for i, num_images in enumerate([1, 5, 2, 3]):
        np.save(tmp_path / f"{i}.npy", np.full((num_images, 2, 3), i, dtype=np.float32))
        samples.append(Sample(id=str(i), features=tmp_path / f"{i}.npy"))
    (tmp_path / "2.npy").write_bytes(b"no features")
    interrupted(samples, tmp_path / "out.jsonl", num_lines=0, batch_size=1)
    with pytest.raises(BagError, match="bag '2'"):
        write_captions(samples, tmp_path / "out.jsonl", strict=True, batch_size=1)
    partial = lines_of(tmp_path / "out.jsonl.partial")
    assert [line["id"] for line in partial] == ["1", "3", "0"]

    np.save(tmp_path / "2.npy", np.full((4, 2, 3), 2, dtype=np.float32))  # mended, it would be the second
    assert write_captions(samples, tmp_path / "out.jsonl", strict=True, batch_size=1) == counts(4, num_resumed=3)
    assert [line["id"] for line in lines_of(tmp_path / "out.jsonl")] == ["0", "1", "2", "3"]


def test_two_bags_of_one_id_are_refused(tmp_path):
    samples = write_samples(tmp_path, 3)
    with pytest.raises(MivpgError, match=f"several bags have the id {samples[1].id!r}"):
        write_captions([*samples, samples[1]], tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out.jsonl*"))


def test_captions_are_utf8_and_one_line_each(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeProcessor, "decode_captions", lambda self, ids: ["très\nchic 😀"] * len(ids))
    samples = [Sample(id="half \ud800", images=sample.images) for sample in write_samples(tmp_path, 1)]
    out = tmp_path / "out.jsonl"
    interrupted(samples, out, num_lines=1, batch_size=1)  # read back as it is written
    assert write_captions(samples, out, batch_size=1) == counts(1, num_resumed=1)
    out.unlink()
    write_captions(samples, out)
    assert out.read_bytes() == b'{"id": "half \xed\xa0\x80", "caption": "tr\xc3\xa8s\\nchic \xf0\x9f\x98\x80"}\n'


def test_captions_are_read_back_as_they_were_written(tmp_path, monkeypatch):
    """With every character that Python takes for an end of line, and ids that are no text."""
    caption = "a\u2028chair\u2029 \x85 \x0b \x0c\r\n\x1e."
    monkeypatch.setattr(FakeProcessor, "decode_captions", lambda self, ids: [caption] * len(ids))
    good, missing = write_samples(tmp_path, 2)
    missing.images[0].unlink()
    samples = [Sample(id="half \ud800 \u2028", images=good.images), missing]
    write_captions(samples, tmp_path / "out.jsonl")
    assert read_captions(tmp_path / "out.jsonl") == {"half \ud800 \u2028": caption}


def test_a_second_run_leaves_the_file_to_the_first(tmp_path):
    """When that is done, nothing is left beside its file."""
    samples = write_samples(tmp_path, 3)

    class Model(FakeModel):
        def generate(self, **inputs):
            with pytest.raises(MivpgError, match=r"out\.jsonl is being written by another run; wait for it"):
                write_captions(samples, tmp_path / "out.jsonl")
            return super().generate(**inputs)

    before = set(tmp_path.iterdir())
    assert write_captions(samples, tmp_path / "out.jsonl", Model()) == counts(3)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out.jsonl"}


def caption_slowly(folder: Path) -> None:
    write_captions(write_samples(folder, 41), folder / "killed.jsonl", model=FakeModel(seconds=0.1))


def test_killed_run_ends_as_an_unbroken_one(tmp_path):
    samples = write_samples(tmp_path, 41)
    partial = tmp_path / "killed.jsonl.partial"
    run = multiprocessing.get_context("fork").Process(target=caption_slowly, args=(tmp_path,))
    run.start()
    try:
        while not partial.exists() or partial.read_bytes().count(b"\n") < 9:
            assert run.is_alive()
            time.sleep(0.01)
    finally:
        run.kill()
        run.join()
    assert not (tmp_path / "killed.jsonl").exists()

    model = FakeModel()
    resumed = write_captions(samples, tmp_path / "killed.jsonl", model)
    write_captions(samples, tmp_path / "unbroken.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert 8 <= resumed.num_resumed < 41
    assert model.num_captioned == 41 - resumed.num_resumed
    assert not partial.exists()


@pytest.mark.parametrize("num_lines", [0, 3, 4, 7, 10])
@pytest.mark.parametrize("torn", [b"", b'{"id": "bag', b'{"id": "x", "caption": "y"}'])
def test_partial_file_is_cut_to_whole_batches(tmp_path, num_lines, torn):
    samples = write_samples(tmp_path, 10)
    write_captions(samples, tmp_path / "unbroken.jsonl")
    interrupted(samples, tmp_path / "out.jsonl", num_lines, torn)
    model = FakeModel()
    num_kept = 10 if num_lines == 10 else num_lines // 4 * 4
    assert write_captions(samples, tmp_path / "out.jsonl", model).num_resumed == num_kept
    assert model.num_captioned == 10 - num_kept
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"id": "bag 0", "caption": ""}', '{"id": "bag 2"}'],
            r"line 2: found '\{\"id\": .* expected one of the 1 bags ",
        ),
        (['{"id": "bag 1"}', '{"id": "bag 1"}'], "line 2: found .* expected one of the 1 bags that have no line yet; "),
        (["no JSON"], "line 1: found 'no JSON', expected one of the 2 bags that have no line yet; "),
        (["[1]"], r"line 1: found '\[1\]', expected one of the 2 bags that have no line yet; "),
        (['{"id": ["bag 1"]}'], "line 1: found .*, expected one of the 2 bags that have no line yet; "),
        (
            [f'{{"id": "bag {i}"}}' for i in range(3)],
            "line 3: found .* expected one of the 0 bags that have no line yet; ",
        ),
    ],
)
def test_partial_file_of_another_run(tmp_path, lines, message):
    samples = write_samples(tmp_path, 2)
    interrupted(samples, tmp_path / "out.jsonl", num_lines=0)
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text("".join(line + "\n" for line in lines))
    before = partial.read_bytes()
    with pytest.raises(MivpgError, match=message) as error:
        write_captions(samples, tmp_path / "out.jsonl")
    assert str(error.value).startswith(str(partial))
    assert "delete it" in str(error.value)
    assert partial.read_bytes() == before


def with_other_weights() -> FakeModel:
    model = FakeModel()
    model.weights = "others"
    return model


def with_another_base() -> FakeModel:
    model = FakeModel()
    model.config.base = {"model": {"path": "elsewhere", "revision": None}}
    return model


def with_options(**options) -> FakeModel:
    model = FakeModel()
    for name, value in options.items():
        setattr(model.config if name in MODEL_OPTIONS else model.config.qformer_config, name, value)
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (FakeModel(), {"prompt": "a drawing of"}, "prompt = 'a photo of', and 'a drawing of' is asked for"),
        (FakeModel(), {"generation": GenerationOptions(num_beams=1)}, "max_new_tokens = 7, and 64 is asked for"),
        (with_other_weights(), {}, "trained_weights = 'those of the first model', and 'others' is asked for"),
        (with_another_base(), {}, "base = None, and "),
        (with_options(patch_pooling="mean"), {}, "patch_pooling = 'none', and 'mean' is asked for"),
        (with_options(aggregator="qformer_per_image"), {}, "aggregator = 'mivpg', and 'qformer_per_image' is asked"),
        (with_options(aggregator_options={"layer_sizes": (8, 4)}), {}, "aggregator_options = None, and {"),
        (with_options(pool_include_prefix=False), {}, "pool_include_prefix = True, and False is asked for"),
        (with_options(image_size=364), {}, "image_size = None, and 364 is asked for"),
        (with_options(instances_carry_over=False), {}, "instances_carry_over = True, and False is asked for"),
        (with_options(num_landmarks=8), {}, "num_landmarks = 256, and 8 is asked for"),
    ],
)
def test_partial_file_by_another_author(tmp_path, model, options, message):
    samples = write_samples(tmp_path, 10)
    interrupted(samples, tmp_path / "out.jsonl", num_lines=8)
    partial = tmp_path / "out.jsonl.partial"
    before = partial.read_bytes()
    with pytest.raises(MivpgError, match=message) as error:
        write_captions(samples, tmp_path / "out.jsonl", model, **options)
    assert str(error.value).startswith(f"{partial} was begun with ")
    assert "delete it" in str(error.value)
    assert "\n" not in str(error.value)
    assert partial.read_bytes() == before

    partial.unlink()  # as it says
    assert write_captions(samples, tmp_path / "out.jsonl", model, **options) == counts(10)


def test_partial_file_by_nobody_knows_whom(tmp_path):
    samples = write_samples(tmp_path, 10)
    interrupted(samples, tmp_path / "out.jsonl", num_lines=8)
    for content in (b"", b'{"prompt": "a pho', None):
        author = tmp_path / "out.jsonl.partial.json"
        author.unlink() if content is None else author.write_bytes(content)
        with pytest.raises(MivpgError, match="was begun with an unknown data, which "):
            write_captions(samples, tmp_path / "out.jsonl")


def test_partial_file_by_an_earlier_version(tmp_path):
    """It did not note the options of the model, so they may have been others."""
    samples = write_samples(tmp_path, 10)
    interrupted(samples, tmp_path / "out.jsonl", num_lines=8)
    author = tmp_path / "out.jsonl.partial.json"
    noted = json.loads(author.read_text())
    author.write_text(json.dumps({name: noted[name] for name in noted if name not in MODEL_OPTIONS}))
    with pytest.raises(MivpgError, match=r"an unknown aggregator, which .*partial\.json does not tell .*: delete it"):
        write_captions(samples, tmp_path / "out.jsonl")


def test_options_that_are_tuples_are_the_lists_that_are_read_back(tmp_path):
    samples, options = write_samples(tmp_path, 10), {"layer_sizes": (8, 4)}
    interrupted(samples, tmp_path / "out.jsonl", num_lines=8, model=with_options(aggregator_options=options))
    model = with_options(aggregator_options=options)
    assert write_captions(samples, tmp_path / "out.jsonl", model) == counts(10, num_resumed=8)


def test_a_kill_while_the_author_is_noted_leaves_the_old_note(tmp_path, monkeypatch):
    samples = write_samples(tmp_path, 10)
    interrupted(samples, tmp_path / "out.jsonl", num_lines=8)

    def killed(self, content):
        with self.open("wb") as file:
            file.write(b"{")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(Killed):
            write_captions(samples, tmp_path / "out.jsonl")
    assert write_captions(samples, tmp_path / "out.jsonl") == counts(10, num_resumed=8)


def test_a_kill_after_the_last_caption_leaves_nothing_to_caption(tmp_path, monkeypatch):
    """Neither before the lines are put in the order of the samples nor after it."""
    samples = write_samples(tmp_path, 10)
    write_captions(samples, tmp_path / "unbroken.jsonl")
    for number, method in enumerate(("replace", "rename")):
        out = tmp_path / f"{number}.jsonl"
        original = getattr(Path, method)

        def kill(path, target, original=original, out=out):
            if path.name.startswith(f"{out.name}.partial") and not path.name.endswith(".json.partial"):
                raise Killed
            return original(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, method, kill)
            with pytest.raises(Killed):
                write_captions(samples, out)
        model = FakeModel()
        assert write_captions(samples, out, model) == counts(10, num_resumed=10)
        assert model.num_captioned == 0
        assert out.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


def test_a_smaller_batch_goes_on(tmp_path):
    samples = write_samples(tmp_path, 10)
    interrupted(samples, tmp_path / "out.jsonl", num_lines=8)
    assert write_captions(samples, tmp_path / "out.jsonl", batch_size=3) == counts(10, num_resumed=6)


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(MivpgError, match=r"out\.jsonl exists already; delete it or choose another name"):
        write_captions(write_samples(tmp_path, 1), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "precious"


def spoil(samples: list[Sample], *indices: int) -> None:
    for index in indices:
        samples[index].images[-1].write_bytes(b"no picture")


def test_bad_bags_are_reported_and_passed_over(tmp_path, caplog):
    samples = write_samples(tmp_path, 10)
    spoil(samples, 1, 4, 5, 6, 7)
    samples[9].images[0].unlink()  # the last batch, bags 6 and 9, is bad as a whole
    with caplog.at_level(logging.WARNING, logger="mivpg.captioning"):
        assert write_captions(samples, tmp_path / "out.jsonl") == counts(10, num_failed=6)
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == [sample.id for sample in samples]
    assert [i for i, line in enumerate(lines) if "error" in line] == [1, 4, 5, 6, 7, 9]
    assert [line["caption"].split()[0] for line in lines if "caption" in line] == ["0", "2", "3", "8"]
    errors = [lines[i]["error"] for i in largest_first(samples) if "error" in lines[i]]
    assert [record.getMessage() for record in caplog.records] == errors
    assert all(f"'{line['id']}'" in line["error"] and "\n" not in line["error"] for line in lines if "error" in line)


def test_failed_bags_of_the_interrupted_run_are_counted(tmp_path):
    samples = write_samples(tmp_path, 10)
    spoil(samples, 1, 9)
    write_captions(samples, tmp_path / "unbroken.jsonl")
    interrupted(samples, tmp_path / "out.jsonl", num_lines=8)
    assert write_captions(samples, tmp_path / "out.jsonl") == counts(10, num_failed=2, num_resumed=8)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


def test_strict_stops_at_the_first_bad_bag_and_goes_on_when_it_is_good(tmp_path):
    samples = write_samples(tmp_path, 10)
    write_captions(samples, tmp_path / "good.jsonl")
    good_picture = samples[7].images[-1].read_bytes()
    spoil(samples, 7)  # in the second batch
    with pytest.raises(BagError, match="bag 7"):
        write_captions(samples, tmp_path / "out.jsonl", strict=True)
    assert not (tmp_path / "out.jsonl").exists()

    samples[7].images[-1].write_bytes(good_picture)
    assert write_captions(samples, tmp_path / "out.jsonl", strict=True) == counts(10, num_resumed=4)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "good.jsonl").read_bytes()


def test_strict_tries_again_what_failed_before(tmp_path):
    samples = write_samples(tmp_path, 10)
    lines = [{"id": sample.id, "caption": ""} for sample in samples[:9]]
    lines[6] = {"id": "bag 6", "error": "was bad"}
    interrupted(samples, tmp_path / "out.jsonl", num_lines=0)
    (tmp_path / "out.jsonl.partial").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_captions(samples, tmp_path / "out.jsonl", strict=True) == counts(10, num_resumed=4)


def test_bags_that_do_not_fit_together_are_captioned_alone(tmp_path):
    samples = []
    for i, shape in enumerate([(2, 3), (2, 4, 3), (2, 5), (1, 3)]):
        np.save(tmp_path / f"{i}.npy", np.full(shape, i, dtype=np.float32))
        samples.append(Sample(id=str(i), features=tmp_path / f"{i}.npy"))
    results = dict(caption_samples(FakeModel(), FakeProcessor(), samples, generation=GREEDY))
    assert str(results.pop("2")) == "bag '2': features are 5 wide, the model takes 3."
    assert results == {"0": "0 2 0 1 7", "1": "1 2 0 1 7", "3": "3 1 0 1 7"}


def test_bags_whose_places_are_no_lattice_are_named_and_passed_over(tmp_path):
    folder = save_blip2(tmp_path / "blip2")
    model = MivpgForConditionalGeneration.from_pretrained(folder, patch_pooling="cls", position_encoding="ppeg")
    places = {
        "good": ((0, 0), (1, 0), (3, 0)),
        "askew": ((0, 0), (1, 0), (2.5, 0)),
        "twice": ((0, 0), (1, 0), (1, 0)),
        "also good": ((5, 5), (5, 6), (6, 5)),
    }
    (photo,) = write_samples(tmp_path, 1)[0].images
    samples = [Sample(id=name, images=(photo,) * 3, image_coords=coords) for name, coords in places.items()]
    processor = MivpgProcessor.from_pretrained(folder)
    counted = caption_file(model, processor, samples, tmp_path / "out.jsonl", generation=GREEDY)
    assert counted == counts(4, num_failed=2)
    lines = {line["id"]: line for line in lines_of(tmp_path / "out.jsonl")}
    assert list(lines) == list(places)
    assert lines["askew"]["error"].startswith("bag 'askew': image_coords are no regular lattice on the x axis")
    assert lines["twice"]["error"].startswith("bag 'twice': Two images of a bag stand at the same image_coords")
    assert "caption" in lines["good"] and "caption" in lines["also good"]


def test_a_prompt_longer_than_the_language_model_takes_costs_its_bag(tmp_path):
    folder = save_blip2(tmp_path / "blip2")  # an OPT of 256 places
    model = MivpgForConditionalGeneration.from_pretrained(folder)
    samples = write_samples(tmp_path, 3)
    samples[1] = replace(samples[1], prompt="a photo " * 40)
    counted = caption_file(
        model, MivpgProcessor.from_pretrained(folder), samples, tmp_path / "out.jsonl", generation=GREEDY
    )
    assert counted == counts(3, num_failed=1)
    lines = lines_of(tmp_path / "out.jsonl")
    assert re.match(r"bag 'bag 1': \d+ tokens, .* but the language model has places for 256; ", lines[1]["error"])
    assert all("caption" in lines[number] for number in (0, 2))


def test_images_are_read_ahead_but_not_far(tmp_path):
    samples = write_samples(tmp_path, 30)
    opened = []

    class Recording(BagDataset):
        def __getitem__(self, index):
            opened.append(index)
            return super().__getitem__(index)

    bags = _read_ahead(Recording(samples), 3, 5)
    for number, (bag_id, bag) in enumerate(bags):
        assert bag_id == bag.id == f"bag {number + 3}"
        deadline = time.monotonic() + 10
        while len(opened) < min(number + 6, 27) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(opened) == min(number + 6, 27)  # those handed out and five more
    assert sorted(opened) == list(range(3, 30))


def test_the_next_batch_is_made_into_tensors_while_the_model_writes(tmp_path):
    collated = threading.Semaphore(0)

    class Processor(FakeProcessor):
        def __call__(self, **bags):
            collated.release()
            return super().__call__(**bags)

    class Model(FakeModel):
        def generate(self, **inputs):
            if self.num_captioned == 0:
                assert collated.acquire(timeout=10)  # its own batch
                assert collated.acquire(timeout=10)  # the next one
            return super().generate(**inputs)

    captioned = caption_samples(Model(), Processor(), write_samples(tmp_path, 8), generation=GREEDY, batch_size=4)
    assert len(dict(captioned)) == 8


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_is_checked(tmp_path, batch_size):
    with pytest.raises(MivpgError, match=f"batch_size is {batch_size}, expected at least 1"):
        write_captions([], tmp_path / "out.jsonl", batch_size=batch_size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["num_beams", "max_new_tokens"])
def test_generation_options_are_checked(field):
    with pytest.raises(MivpgError, match=f"{field} is 0, expected at least 1"):
        GenerationOptions(**{field: 0})


def test_a_caption_has_room_for_its_shortest():
    for shortest in (-1, 65):
        with pytest.raises(MivpgError, match=f"min_new_tokens is {shortest}, expected 0 to max_new_tokens \\(64\\)"):
            GenerationOptions(min_new_tokens=shortest)


def test_generation_options_are_arguments_of_generate():
    assert GenerationOptions().as_kwargs() == {"num_beams": 5, "max_new_tokens": 64, "min_new_tokens": None}
