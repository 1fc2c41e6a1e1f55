"""Stored features are what the model makes of the pixels, and features of two kinds are never mixed."""

import copy
import functools
import hashlib
import io
import json
import os
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

import mivpg.features
from families import save_blip2, save_language_model, save_vision_model
from mivpg import (
    BagCollator,
    BagDataset,
    BagError,
    MivpgError,
    MivpgForConditionalGeneration,
    MivpgProcessor,
    Sample,
    caption_bags,
    extract_features,
)
from mivpg.bags import one_pair_a_reference
from mivpg.datasets.bag_file import load_bag_file
from mivpg.feature_files import name_in_store, read_features
from mivpg.features import _open_batches, _share_of, place_tiles
from tiny import randomize_added_weights
from warm import Program

NUM_IMAGES = (2, 1, 5, 3)
"""Images of each bag, 11 together: in batches of 4 one bag ends with a batch, one is larger than a batch."""


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory) -> Path:
    return save_blip2(tmp_path_factory.mktemp("base") / "blip2")


@pytest.fixture(scope="module")
def one_model(blip2_folder) -> MivpgForConditionalGeneration:
    model = MivpgForConditionalGeneration.from_pretrained(
        blip2_folder, patch_pooling="abmil", instance_correlation="csa"
    )
    randomize_added_weights(model, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def model(one_model) -> MivpgForConditionalGeneration:
    """One that a test may change."""
    return copy.deepcopy(one_model)


@pytest.fixture
def processor(blip2_folder) -> MivpgProcessor:
    return MivpgProcessor.from_pretrained(blip2_folder)


@pytest.fixture
def samples(tmp_path) -> list[Sample]:
    """Bags of photos of several sizes and kinds."""
    generator = np.random.default_rng(0)
    bags = []
    for i, num_images in enumerate(NUM_IMAGES):
        paths = tuple(tmp_path / f"{i}-{k}.{'png' if k % 2 else 'jpg'}" for k in range(num_images))
        for k, path in enumerate(paths):
            Image.fromarray(generator.integers(0, 256, (30 + 7 * k, 40 + i, 3), dtype=np.uint8)).save(path)
        bags.append(Sample(id=f"bag {i}", images=paths, captions=(f"caption {i}.",)))
    return bags


def batches_seen(model) -> list[int]:
    """How many images the vision model sees at each call from now on."""
    sizes: list[int] = []
    model.vision_model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


@torch.no_grad()
def from_pixels(model, processor, samples, batch_size) -> Tensor:
    """What the vision model says of all images, so many at a time: (n, P, D)."""
    pixels = processor.pixels([path for sample in samples for path in sample.images])
    return torch.cat([model.get_image_embeds(batch[None])[0] for batch in pixels.split(batch_size)])


def stored(samples) -> Tensor:
    return torch.cat([read_features(sample.features)[0] for sample in samples])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def batch_of(processor, samples):
    dataset = BagDataset(samples, prompt="a photo of", training=True)
    return BagCollator(processor, training=True)([dataset[i] for i in range(len(dataset))])


class TestExtracting:
    @pytest.mark.parametrize("batch_size", [1, 4, 64])
    def test_features_are_what_the_model_makes_of_the_pixels(self, tmp_path, model, processor, samples, batch_size):
        sizes = batches_seen(model)
        extracted = extract_features(model, processor, samples, tmp_path / "store", batch_size=batch_size)
        assert sizes == {1: [1] * 11, 4: [4, 4, 3], 64: [11]}[batch_size]
        assert extracted == [replace(s, images=(), features=tmp_path / "store" / name_in_store(s.id)) for s in samples]
        assert [len(read_features(sample.features)[0]) for sample in extracted] == [*NUM_IMAGES]
        expected = from_pixels(model, processor, samples, batch_size)
        assert torch.equal(stored(extracted), expected)
        assert (expected.flatten(1)[:, None] - expected.flatten(1)).abs().amax(-1)[~torch.eye(11).bool()].min() > 0.1

    @pytest.mark.parametrize(("batch_size", "tolerance"), [(11, 0.0), (4, 1e-5)])
    def test_loss_and_captions_are_those_from_the_pixels(
        self, tmp_path, model, processor, samples, batch_size, tolerance
    ):
        extracted = extract_features(model, processor, samples, tmp_path / "store", batch_size=batch_size)
        pixels, features = batch_of(processor, samples), batch_of(processor, extracted)
        assert "pixel_values" in pixels and "pixel_values" not in features
        expected, result = model(**pixels), model(**features)
        torch.testing.assert_close(result.loss, expected.loss, atol=tolerance, rtol=0)
        torch.testing.assert_close(result.logits, expected.logits, atol=tolerance, rtol=0)
        captions = [
            caption_bags(model, processor, [BagDataset(bags)[i] for i in range(4)], num_beams=2, max_new_tokens=12)
            for bags in (samples, extracted)
        ]
        assert captions[0] == captions[1]
        assert len(set(captions[0])) > 1  # the control: they do depend on the bag

    @pytest.mark.parametrize("kind", ["siglip_vision_model", "resnet"])
    def test_other_vision_models(self, tmp_path, samples, kind):
        vision, language = save_vision_model(tmp_path / kind, kind), save_language_model(tmp_path / "gpt2", "gpt2")
        model = MivpgForConditionalGeneration.from_vision_language_pretrained(
            vision, language, qformer_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        )
        processor = MivpgProcessor.from_vision_language_pretrained(vision, language, model.config)
        extracted = extract_features(model, processor, samples, tmp_path / "store", batch_size=4)
        assert torch.equal(stored(extracted), from_pixels(model, processor, samples, 4))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_features_in_16_bits(self, tmp_path, model, processor, samples, dtype):
        extracted = extract_features(model, processor, samples, tmp_path / "store", dtype=dtype, batch_size=4)
        assert torch.equal(stored(extracted), from_pixels(model, processor, samples, 4).to(dtype).float())
        with safe_open(extracted[0].features, framework="pt") as file:
            assert file.get_tensor("image_embeds").dtype == dtype

    def test_features_that_the_dtype_cannot_hold(self, tmp_path, model, processor, samples):
        with torch.no_grad():
            model.vision_model.post_layernorm.weight *= 1e6
        with pytest.raises(BagError, match=r"bag 'bag 0': features hold NaN or infinity as torch\.float16; bfloat16"):
            extract_features(model, processor, samples, tmp_path / "store", dtype=torch.float16)
        assert [*contents(tmp_path / "store")] == ["features.json"]

    def test_coordinates_are_stored(self, tmp_path, model, processor, samples):
        bag = replace(samples[0], image_coords=((0.5, 256.0), (1e6, 3.0)))
        extracted = extract_features(model, processor, [bag, samples[1]], tmp_path / "store")
        assert torch.equal(read_features(extracted[0].features)[1], torch.tensor(bag.image_coords))
        assert read_features(extracted[1].features)[1] is None
        BagDataset(extracted)[0]

    def test_a_bag_with_several_captions_is_done_once(self, tmp_path, model, processor, samples):
        pairs = one_pair_a_reference([replace(sample, captions=("a", "b")) for sample in samples])
        sizes = batches_seen(model)
        extracted = extract_features(model, processor, pairs, tmp_path / "store")
        assert sizes == [11]
        assert [sample.captions for sample in extracted] == [("a",), ("b",)] * 4
        assert len({sample.features for sample in extracted}) == 4

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    def test_the_model_sees_in_eval_mode_and_is_left_as_it_was(
        self, tmp_path, model, processor, samples, training, fails
    ):
        model.config.trainable = ["vision_model"]  # so that train() puts it into train mode
        model.freeze()
        model.train(training)
        modes = [module.training for module in model.modules()]
        assert model.vision_model.training == training
        seen = []
        model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
        if fails:
            samples[3].images[0].unlink()
            with pytest.raises(BagError):
                extract_features(model, processor, samples, tmp_path / "store", batch_size=4)
        else:
            extract_features(model, processor, samples, tmp_path / "store", batch_size=4)
        assert seen and not any(seen)
        assert [module.training for module in model.modules()] == modes

    def test_images_are_opened_one_batch_ahead(self, processor, samples, monkeypatch):
        opened = []
        pixels = processor.pixels
        monkeypatch.setattr(processor, "pixels", lambda bag: (opened.append(bag[0]), pixels(bag))[1])
        paths = [path for sample in samples for path in sample.images]
        with closing(_open_batches(processor, samples, {sample.id: sample.images for sample in samples}, 3)) as batches:
            for number, batch in enumerate(batches, start=1):
                assert [image.pixel_values.shape for image in batch] == [(1, 3, 28, 28)] * len(batch)
                deadline = time.monotonic() + 10
                while len(opened) < min(3 * number + 3, 11) and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert sorted(opened) == sorted(paths[: 3 * number + 3])

    def test_the_bar_counts_images(self, tmp_path, model, processor, samples, monkeypatch):
        terminal = io.StringIO()
        bar = functools.partial(tqdm, file=terminal, mininterval=0)
        monkeypatch.setattr(mivpg.features, "tqdm", lambda *args, **kw: bar(*args, **kw | {"disable": False}))
        extract_features(model, processor, samples[:2], tmp_path / "store", batch_size=4)
        extract_features(model, processor, samples, tmp_path / "store", batch_size=4)
        assert "3/3 [" in terminal.getvalue() and "11/11 [" in terminal.getvalue()
        assert "3/11 [" in terminal.getvalue()  # where the second began
        assert "image/s]" in terminal.getvalue()

    def test_first_tokens_alone(self, tmp_path, model, processor, samples):
        of_all = extract_features(model, processor, samples, tmp_path / "all", batch_size=4)
        of_cls = extract_features(model, processor, samples, tmp_path / "cls", batch_size=4, tokens="cls")
        assert torch.equal(stored(of_cls), stored(of_all)[:, :1])

    def test_it_says_how_much_there_is_to_do(self, tmp_path, model, processor, samples, caplog):
        caplog.set_level("INFO", "mivpg.features")
        extract_features(model, processor, samples[:2], tmp_path / "store", batch_size=2)
        extract_features(model, processor, samples, tmp_path / "store", batch_size=2)
        extract_features(model, processor, samples, tmp_path / "store", batch_size=2)
        size = 8 * stored(extract_features(model, processor, samples, tmp_path / "store"))[0].nbytes / 1e6
        assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
            f"3 images of 2 bags to see, 0 bags there already; {3 * size / 8:.1f} MB, about 1 minutes.",
            f"8 images of 2 bags to see, 2 bags there already; {size:.1f} MB, about 1 minutes.",
        ]

    @pytest.mark.parametrize(
        ("num_bytes", "seconds", "said"),
        [
            (999e6, 20, "999.0 MB, about 1 minutes"),
            (1e9, 5399, "1.0 GB, about 90 minutes"),
            (2.5e9, 5400, "2.5 GB, about 1.5 hours"),
        ],
    )
    def test_sizes_and_spans_are_said_in_fitting_units(self, tmp_path, caplog, num_bytes, seconds, said):
        caplog.set_level("INFO", "mivpg.features")
        mivpg.features._announce(tmp_path, 3, 2, 0, num_bytes, seconds)
        assert caplog.records[0].message.endswith(f"3 images of 2 bags to see, 0 bags there already; {said}.")


class TestGoingOn:
    @pytest.mark.parametrize("there", [(0,), (1, 2), (0, 3), (2,)])
    def test_the_bytes_do_not_depend_on_what_was_there(self, tmp_path, model, processor, samples, there):
        extract_features(model, processor, samples, tmp_path / "one go", batch_size=4)
        extract_features(model, processor, samples, tmp_path / "store", batch_size=4)
        for index in {0, 1, 2, 3} - set(there):
            (tmp_path / "store" / name_in_store(samples[index].id)).unlink()
        extract_features(model, processor, samples, tmp_path / "store", batch_size=4)
        assert contents(tmp_path / "store") == contents(tmp_path / "one go")

    @pytest.mark.parametrize("number", [1, 2, 3, 7])
    def test_processes_share_the_bags(self, samples, number):
        shares = [_share_of(samples, index, number) for index in range(number)]
        assert [bag for share in shares for bag in share] == samples

    @pytest.mark.parametrize(
        ("num_processes", "num_kills"),
        [(2, ()), pytest.param(1, ("10",), marks=pytest.mark.slow)],
        ids=["two processes", "killed ten times"],
    )
    def test_it_ends_with_the_bytes_of_a_run_in_one_go(self, tmp_path, blip2_folder, samples, num_processes, num_kills):
        table = tmp_path / "bags.jsonl"
        lines = (json.dumps({"id": s.id, "images": [str(path) for path in s.images]}) + "\n" for s in samples)
        table.write_text("".join(lines))
        model = MivpgForConditionalGeneration.from_pretrained(blip2_folder)
        processor = MivpgProcessor.from_pretrained(blip2_folder)
        extract_features(model, processor, load_bag_file(table), tmp_path / "one go", batch_size=4)
        script = Path(__file__).with_name("extraction_script.py")
        code, out, err = Program(
            script, blip2_folder, table, tmp_path / "other", *num_kills, num_processes=num_processes
        ).wait()
        assert code == 0, err
        assert not num_kills or out == "10\n"
        assert len(contents(tmp_path / "one go")) == 5
        assert contents(tmp_path / "other") == contents(tmp_path / "one go")

    def test_what_is_there_is_not_done_again(self, tmp_path, model, processor, samples):
        first = extract_features(model, processor, samples[:2], tmp_path / "store")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
        sizes = batches_seen(model)
        assert extract_features(model, processor, samples[:2], tmp_path / "store") == first
        assert sizes == []
        extracted = extract_features(model, processor, samples, tmp_path / "store")
        assert sizes == [11]  # the batch as it would have been, of which three images are there already
        assert all(path.stat().st_mtime_ns == modified for path, modified in before.items())
        torch.testing.assert_close(stored(extracted), from_pixels(model, processor, samples, 11), atol=1e-5, rtol=0)

    def test_an_interrupted_run_goes_on(self, tmp_path, model, processor, samples):
        sizes = batches_seen(model)

        def die(module, args):
            if len(sizes) == 3:
                raise KeyboardInterrupt

        hook = model.vision_model.register_forward_pre_hook(die)
        with pytest.raises(KeyboardInterrupt):
            extract_features(model, processor, samples, tmp_path / "store", batch_size=4)
        hook.remove()
        names = [name_in_store(sample.id) for sample in samples]
        assert sorted(contents(tmp_path / "store")) == sorted(["features.json", *names[:3]])  # eight images, whole
        extract_features(model, processor, samples, tmp_path / "store", batch_size=4)
        assert sizes[3:] == [3]

    def test_a_file_is_written_whole_or_not_at_all(self, tmp_path, model, processor, samples, monkeypatch):
        extract_features(model, processor, samples[:1], tmp_path / "store")

        def full_disk(descriptor):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, "fsync", full_disk)
            extract_features(model, processor, samples, tmp_path / "store")
        assert not (tmp_path / "store" / name_in_store("bag 1")).exists()
        extracted = extract_features(model, processor, samples, tmp_path / "store")
        assert sorted(contents(tmp_path / "store")) == sorted(["features.json", *(s.features.name for s in extracted)])

    def test_an_unreadable_bag_is_named_and_those_before_it_are_kept(self, tmp_path, model, processor, samples):
        samples[3].images[1].write_bytes(b"no picture")
        with pytest.raises(BagError, match=r"bag 'bag 3': .*3-1\.png is not a picture"):
            extract_features(model, processor, samples, tmp_path / "store", batch_size=4)
        names = {name_in_store(f"bag {i}") for i in range(3)}
        assert contents(tmp_path / "store").keys() - {"features.json"} <= names
        Image.new("RGB", (9, 9)).save(samples[3].images[1])
        extract_features(model, processor, samples, tmp_path / "store", batch_size=4)


class TestNames:
    def test_every_id_has_a_file_of_its_own_in_the_folder(self, tmp_path, model, processor, samples):
        ids = ["a/b", "a-b", "a b", "A/B", "../../x", "/x", "", ".", "half \ud800", "é", "e", "n\n", "-", "x" * 999]
        ids += ["x" * 1000, "CON", "new\x00"]
        bags = [Sample(id=bag_id, images=samples[1].images) for bag_id in ids]
        extracted = extract_features(model, processor, bags, tmp_path / "store")
        assert len({sample.features.name.lower() for sample in extracted}) == len(ids)  # on a Mac, too
        assert all(sample.features.parent == tmp_path / "store" for sample in extracted)
        assert len(contents(tmp_path / "store")) == len(ids) + 1
        for sample in extracted:
            assert sample.features.name[0] not in "-."
            assert len(sample.features.name) < 100
            with safe_open(sample.features, framework="pt") as file:
                assert json.loads(file.metadata()["made_of"])["id"] == sample.id

    def test_names_are_readable_and_stay(self):
        assert name_in_store("TCGA-02/slide 1.svs") == (
            f"TCGA-02-slide-1-svs-{hashlib.sha256(b'TCGA-02/slide 1.svs').hexdigest()[:16]}.safetensors"
        )


def with_other_weights(model, processor):
    with torch.no_grad():
        model.vision_model.embeddings.class_embedding[0, 0, 0] += 1e-3


def with_a_smaller_crop(model, processor):
    processor.image_processor.size = {"height": 14, "width": 14}


def with_another_backend(model, processor):
    class BlipImageProcessor(type(processor.image_processor)):
        pass

    processor.image_processor = BlipImageProcessor(**processor.image_processor.to_dict())


class TestMixing:
    """A store holds features of one kind, of the images as they are now."""

    def test_features_json_says_what_made_the_store(self, tmp_path, model, processor, samples):
        extract_features(model, processor, samples[:1], tmp_path / "store", dtype=torch.bfloat16)
        made_by = json.loads((tmp_path / "store" / "features.json").read_bytes())
        assert len(made_by.pop("vision_model")) == 64
        assert made_by["dtype"] == "bfloat16"
        assert made_by["image_processor.image_processor_type"] == "BlipImageProcessorPil"
        assert made_by["image_processor.size"] == {"height": 28, "width": 28}
        mask = os.umask(0)
        os.umask(mask)
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "store").iterdir()} == {0o666 & ~mask}

    @pytest.mark.parametrize(
        ("change", "options", "message"),
        [
            (with_other_weights, {}, "vision_model = '[0-9a-f]{64}', and '[0-9a-f]{64}' is"),
            (with_a_smaller_crop, {}, "image_processor.size = {'height': 28, 'width': 28}, and {'height': 14, "),
            (with_another_backend, {}, r"image_processor_type = 'BlipImageProcessorPil', and 'BlipImageProcessor' is"),
            (lambda *_: None, {"dtype": torch.float16}, "dtype = 'float32', and 'float16' is"),
        ],
    )
    def test_a_store_made_by_something_else(self, tmp_path, model, processor, samples, change, options, message):
        extract_features(model, processor, samples[:2], tmp_path / "store")
        before = contents(tmp_path / "store")
        change(model, processor)
        with pytest.raises(MivpgError, match=message) as error:
            extract_features(model, processor, samples, tmp_path / "store", **options)
        assert str(error.value).startswith(f"{tmp_path / 'store' / 'features.json'}: these features were made with ")
        assert str(error.value).endswith("choose another folder, or delete this one to make its features anew.")
        assert contents(tmp_path / "store") == before

    def test_what_does_not_change_features_is_no_other_maker(self, tmp_path, blip2_folder, samples, processor, model):
        extract_features(model, processor, samples[:2], tmp_path / "store")
        processor.save_pretrained(tmp_path / "processor")
        other = MivpgForConditionalGeneration.from_pretrained(blip2_folder, attn_implementation="eager")
        sizes = batches_seen(other)
        extract_features(other, MivpgProcessor.from_pretrained(tmp_path / "processor"), samples[:2], tmp_path / "store")
        assert sizes == []

    @pytest.mark.parametrize("content", [None, b"", b'{"dtype": "flo', b"[]"])
    def test_a_store_that_does_not_say_what_made_it(self, tmp_path, model, processor, samples, content):
        extract_features(model, processor, samples[:1], tmp_path / "store")
        file = tmp_path / "store" / "features.json"
        file.unlink() if content is None else file.write_bytes(content)
        message = "store holds safetensors files, but no features.json" if content is None else "vision_model = None"
        with pytest.raises(MivpgError, match=message):
            extract_features(model, processor, samples, tmp_path / "store")
        assert len(contents(tmp_path / "store")) == (1 if content is None else 2)

    def test_a_changed_image_is_noticed(self, tmp_path, model, processor, samples):
        (extracted,) = extract_features(model, processor, samples[:1], tmp_path / "store")
        before = contents(tmp_path / "store")
        path = samples[0].images[1]
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # the size stays
        os.utime(path, ns=(0, 12345))
        with pytest.raises(MivpgError) as error:
            extract_features(model, processor, samples, tmp_path / "store")
        assert str(error.value) == (
            f"{extracted.features} was made of another image than {path} is now; "
            "delete the file to extract bag 'bag 0' anew."
        )
        assert contents(tmp_path / "store") == before
        extracted.features.unlink()  # as it says
        path.write_bytes(content)
        extract_features(model, processor, samples, tmp_path / "store")

    def test_a_moved_or_touched_image_is_the_same(self, tmp_path, model, processor, samples):
        extract_features(model, processor, samples[:1], tmp_path / "store")
        path = samples[0].images[0]
        moved = path.rename(tmp_path / "moved.jpg")
        os.utime(samples[0].images[1], ns=(0, 12345))
        sizes = batches_seen(model)
        bag = replace(samples[0], images=(moved, samples[0].images[1]))
        extract_features(model, processor, [bag], tmp_path / "store")
        assert sizes == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda bag: replace(bag, images=bag.images[:1]), "was made of 2 images, and the bag has 1; delete"),
            (lambda bag: replace(bag, images=bag.images[::-1]), r"another image than .*0-1\.png is now; delete"),
            (lambda bag: replace(bag, image_coords=((0, 0), (1, 2))), "with other coordinates of the images; delete"),
        ],
    )
    def test_a_changed_bag_is_noticed(self, tmp_path, model, processor, samples, change, message):
        extract_features(model, processor, samples[:1], tmp_path / "store")
        with pytest.raises(MivpgError, match=message):
            extract_features(model, processor, [change(samples[0])], tmp_path / "store")

    def test_a_changed_order_is_noticed_where_all_files_are_of_one_size_and_time(
        self, tmp_path, model, processor, samples
    ):
        paths = (tmp_path / "a.bmp", tmp_path / "b.bmp")
        for grey, path in enumerate(paths):
            Image.new("RGB", (9, 9), (grey, grey, grey)).save(path)
            os.utime(path, ns=(0, 0))
        extract_features(model, processor, [Sample(id="tiles", images=paths)], tmp_path / "store")
        with pytest.raises(MivpgError, match=r"another image than .*b\.bmp is now"):
            extract_features(model, processor, [Sample(id="tiles", images=paths[::-1])], tmp_path / "store")

    def test_changed_coordinates_are_noticed(self, tmp_path, model, processor, samples):
        bags = [replace(samples[0], image_coords=((0, 0), (1, y))) for y in (0.1, 0.2)]
        for _ in range(2):
            extract_features(model, processor, bags[:1], tmp_path / "store")
        with pytest.raises(MivpgError, match="other coordinates"):
            extract_features(model, processor, bags[1:], tmp_path / "store")

    @pytest.mark.parametrize("length", [0, 100, -1])
    def test_a_damaged_file_is_noticed(self, tmp_path, model, processor, samples, length):
        (extracted,) = extract_features(model, processor, samples[:1], tmp_path / "store")
        extracted.features.write_bytes(extracted.features.read_bytes()[:length])
        with pytest.raises(MivpgError, match=f"{name_in_store('bag 0')} is damaged .*; delete the file") as error:
            extract_features(model, processor, samples, tmp_path / "store")
        assert "\n" not in str(error.value)


class TestRefusing:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda bag: replace(bag, images=()), "bag 'bag 0': no image, expected at least one"),
            (lambda bag: replace(bag, images=(Path("no.jpg"),)), r"bag 'bag 0': no\.jpg does not exist"),
            (lambda bag: replace(bag, image_coords=((0, 0),)), "bag 'bag 0': 2 images and 1 coordinates"),
            (lambda bag: replace(bag, id="bag 1"), "bag 'bag 1': two bags of this id, with other images"),
        ],
    )
    def test_bags_that_cannot_be_read(self, tmp_path, model, processor, samples, change, message):
        with pytest.raises(BagError, match=message):
            extract_features(model, processor, [change(samples[0]), *samples[1:]], tmp_path / "store")

    def test_features_of_features(self, tmp_path, model, processor, samples):
        extracted = extract_features(model, processor, samples[:1], tmp_path / "store")
        with pytest.raises(BagError, match=r"bag 'bag 0': features already .*, expected images"):
            extract_features(model, processor, extracted, tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_an_image_that_is_gone_and_was_another(self, tmp_path, model, processor, samples):
        extract_features(model, processor, samples[:1], tmp_path / "store")
        other = replace(samples[0], images=(samples[0].images[0], Path("other.png")))
        with pytest.raises(BagError, match=r"bag 'bag 0': other\.png does not exist"):
            extract_features(model, processor, [other], tmp_path / "store")

    def test_an_image_that_is_gone_beside_one_that_changed(self, tmp_path, model, processor, samples):
        extract_features(model, processor, samples[:1], tmp_path / "store")
        samples[0].images[0].unlink()
        Image.new("RGB", (9, 9)).save(samples[0].images[1])
        with pytest.raises(MivpgError, match=r"was made of another image than .*0-1\.png is now"):
            extract_features(model, processor, samples[:1], tmp_path / "store", strict=False)

    def test_a_slide_that_is_named_twice(self, tmp_path, model, processor, samples):
        case = Sample(id="case", slides=(Path("a.svs"), Path("b.svs"), Path("a.svs")))  # neither is there: unread
        message = r"slide a\.svs is named twice, expected each slide of a case once"
        with pytest.raises(BagError, match=f"bag 'case': {message}"):
            extract_features(model, processor, [case], tmp_path / "store")
        assert not (tmp_path / "store").exists()
        with pytest.raises(BagError, match=message):
            place_tiles(case.slides, [])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
            ({"dtype": torch.int8}, r"dtype is torch\.int8, expected one of torch\.float32, torch\.bfloat16"),
            ({"tokens": "patches"}, "tokens is 'patches', expected all or cls"),
        ],
    )
    def test_options_are_checked(self, tmp_path, model, processor, samples, options, message):
        with pytest.raises(MivpgError, match=message):
            extract_features(model, processor, samples, tmp_path / "store", **options)
        assert not (tmp_path / "store").exists()

    def test_a_model_that_takes_features_only(self, tmp_path, samples):
        language = save_language_model(tmp_path / "gpt2", "gpt2")
        model = MivpgForConditionalGeneration.from_vision_language_pretrained(None, language, image_embeds_size=12)
        processor = MivpgProcessor.from_vision_language_pretrained(None, language, model.config)
        with pytest.raises(MivpgError, match="this model has no vision model or no image processor"):
            extract_features(model, processor, samples, tmp_path / "store")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


class TestPassingOver:
    """Where not strict, a bag that cannot be read costs itself alone."""

    @pytest.mark.parametrize("batch_size", [1, 4, 64])
    def test_bad_bags_are_noted_and_the_others_have_the_same_bytes(
        self, tmp_path, model, processor, samples, batch_size, caplog
    ):
        options = {"batch_size": batch_size, "strict": False}
        extract_features(model, processor, samples, tmp_path / "one go", batch_size=batch_size)
        pictures = {path: path.read_bytes() for path in (samples[1].images[0], samples[3].images[1])}
        samples[1].images[0].unlink()  # all of its bag, and, of the second batch of 4, one image of another
        samples[3].images[1].write_bytes(b"no picture")
        bags = [Sample(id="no image"), *samples]
        extracted = extract_features(model, processor, bags, tmp_path / "store", **options)
        assert [sample.id for sample in extracted] == ["bag 0", "bag 2"]
        errors = lines_of(tmp_path / "store" / "errors.jsonl")
        assert [error["id"] for error in errors] == ["no image", "bag 1", "bag 3"]
        assert [error["error"].split(", expected")[0] for error in errors] == [
            "bag 'no image': no image",
            f"bag 'bag 1': {samples[1].images[0]} does not exist",
            f"bag 'bag 3': {samples[3].images[1]} is not a picture",
        ]
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            error["error"] for error in errors
        ]
        whole = contents(tmp_path / "one go")
        found = contents(tmp_path / "store")
        assert {name: found[name] for name in found if name != "errors.jsonl"} == {
            name: whole[name] for name in ("features.json", *(name_in_store(f"bag {i}") for i in (0, 2)))
        }

        for path, content in pictures.items():  # mended
            path.write_bytes(content)
            os.utime(path, ns=(0, 0))
        extract_features(model, processor, samples, tmp_path / "store", **options)
        assert sorted(contents(tmp_path / "store")) == sorted(whole)  # without errors.jsonl
        assert torch.equal(
            read_features(tmp_path / "store" / name_in_store("bag 3"))[0],
            read_features(tmp_path / "one go" / name_in_store("bag 3"))[0],
        )

    def test_bags_that_the_dtype_cannot_hold_are_noted(self, tmp_path, model, processor, samples):
        with torch.no_grad():
            model.vision_model.post_layernorm.weight *= 1e6
        folder = tmp_path / "store"
        assert extract_features(model, processor, samples, folder, dtype=torch.float16, strict=False) == []
        assert [error["id"] for error in lines_of(folder / "errors.jsonl")] == [sample.id for sample in samples]

    def test_a_batch_without_a_readable_picture(self, tmp_path, model, processor, samples):
        for path in samples[2].images:
            path.unlink()
        extracted = extract_features(model, processor, samples, tmp_path / "store", batch_size=1, strict=False)
        assert [sample.id for sample in extracted] == ["bag 0", "bag 1", "bag 3"]

    @pytest.mark.parametrize("strict", [False, True])
    def test_stored_features_stay_when_their_images_are_gone(self, tmp_path, model, processor, samples, strict, caplog):
        extract_features(model, processor, samples, tmp_path / "one go")
        extract_features(model, processor, samples[:3], tmp_path / "store")
        samples[0].images[0].unlink()
        samples[2].images[1].unlink()
        extracted = extract_features(model, processor, samples, tmp_path / "store", strict=strict)  # one batch
        assert [sample.id for sample in extracted] == ["bag 0", "bag 1", "bag 2", "bag 3"]
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            f"{tmp_path / 'store'}: images or slides of 2 bags are gone; their stored features are kept."
        ]
        assert sorted(contents(tmp_path / "store")) == sorted(contents(tmp_path / "one go"))  # without errors.jsonl
        name = name_in_store("bag 3")
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "one go" / name).read_bytes()

    def test_the_announcement_waits_for_a_picture(self, tmp_path, model, processor, samples, monkeypatch):
        said = []
        monkeypatch.setattr(mivpg.features, "_announce", lambda *numbers: said.append(numbers[:-1]))
        samples[1].images[0].unlink()
        bags = [samples[1], samples[0]]
        (extracted,) = extract_features(model, processor, bags, tmp_path / "store", batch_size=1, strict=False)
        num_bytes = 3 * read_features(extracted.features)[0][0].nbytes
        assert said == [(tmp_path / "store", 3, 2, 0, num_bytes)] and num_bytes > 0

    def test_two_bags_of_one_id_are_no_bad_bag(self, tmp_path, model, processor, samples):
        with pytest.raises(BagError, match="two bags of this id"):
            extract_features(model, processor, [samples[0], replace(samples[1], id="bag 0")], tmp_path, strict=False)
