"""What the processor makes of bags in every form they may have, and what it says of those that do not fit."""

import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from mivpg import MivpgConfig, MivpgProcessor, bags
from mivpg.bags import BagCollator, BagDataset, Sample
from mivpg.configuration_mivpg import IMAGE_TOKEN
from mivpg.errors import BagError, MivpgError
from mivpg.loading import load_config
from mivpg.miniature import BASE_MODEL


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


ONE, OTHER = picture(0), picture(1)
EMBEDS = [torch.zeros(2, 5, 7), torch.zeros(3, 5, 7)]


@pytest.fixture(scope="module")
def processor() -> MivpgProcessor:
    return MivpgProcessor.from_pretrained(BASE_MODEL)


def test_a_picture_is_a_bag_and_a_list_of_pictures_is_one(processor, tmp_path):
    ONE.save(tmp_path / "one.png")
    alone = processor(images=ONE)["pixel_values"]
    assert alone.shape[:2] == (1, 1)
    for same in (tmp_path / "one.png", str(tmp_path / "one.png"), [ONE], [[ONE]], (ONE,)):
        assert torch.equal(processor(images=same)["pixel_values"], alone)
    pair = processor(images=[ONE, OTHER])
    assert pair["pixel_values"].shape[:2] == (1, 2) and torch.equal(pair["pixel_values"][:, :1], alone)
    ragged = processor(images=[[ONE, OTHER], [ONE]])
    assert ragged["image_mask"].tolist() == [[1, 1], [1, 0]]
    assert torch.equal(ragged["pixel_values"][1, :1], alone[0]) and not ragged["pixel_values"][1, 1].any()
    assert set(ragged) <= set(processor.model_input_names)


@pytest.mark.parametrize("augmented", [False, True])
def test_images_made_ready_as_they_are_opened_are_the_same(processor, tmp_path, monkeypatch, augmented):
    """And one at a time is in memory as large as it is, which is what that is for."""
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    samples = [Sample(id="a", images=tuple(paths[:3])), Sample(id="b", images=tuple(paths[3:]))]
    later = BagDataset(samples, prompt="a", augmented=augmented)
    at_once = BagDataset(samples, prompt="a", augmented=augmented, processor=processor)
    expected = BagCollator(processor, training=False)([later[1, number] for number in range(2)])

    opened: list[weakref.ref] = []

    def open_image(path, open_image=bags.open_image):
        assert sum(image() is not None for image in opened) <= 1
        image = open_image(path)
        opened.append(weakref.ref(image))
        return image

    monkeypatch.setattr(bags, "open_image", open_image)
    batch = BagCollator(processor, training=False)([at_once[1, number] for number in range(2)])
    assert len(opened) == 4
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_images_that_are_made_of_unlike_sizes_cost_their_bag(processor, tmp_path, monkeypatch):
    picture(0).save(tmp_path / "wide.png")
    picture(0).rotate(90, expand=True).save(tmp_path / "high.png")
    monkeypatch.setattr(processor.image_processor, "size", {"shortest_edge": 8})
    sample = Sample(id="a", images=(tmp_path / "wide.png", tmp_path / "high.png"))
    with pytest.raises(BagError, match=r"bag 'a': the image processor makes images of \(8, 12\) and \(12, 8\) pixels"):
        BagDataset([sample], processor=processor)[0]


def test_pictures_of_other_modes_are_seen_in_rgb(processor):
    see_through = picture(0, "RGBA")
    assert torch.equal(
        processor(images=see_through)["pixel_values"], processor(images=see_through.convert("RGB"))["pixel_values"]
    )


def test_coordinates_stand_beside_their_images(processor):
    coords = [[(0, 0), (1, 0)], np.array([(5, 6), (7, 8), (9, 10)])]
    batch = processor(image_embeds=EMBEDS, image_coords=coords)
    assert batch["image_coords"].tolist() == [[[0, 0], [1, 0], [0, 0]], [[5, 6], [7, 8], [9, 10]]]


@pytest.mark.parametrize(
    ("bags", "message"),
    [
        ({}, "Pass images, pixel_values or image_embeds"),
        ({"images": ONE, "image_embeds": EMBEDS}, "Pass images, pixel_values or image_embeds"),
        ({"images": ONE, "return_tensors": "np"}, "return_tensors is 'np'; MivpgProcessor makes PyTorch tensors, 'pt'"),
        ({"images": 3}, "images are lists of PIL images or paths; this is a int"),
        ({"images": [[ONE], OTHER]}, r"images hold bags \(lists\) beside single pictures"),
        ({"images": [ONE, 3]}, "An image is a PIL image or a path; this is a int"),
        ({"images": []}, "A bag without images"),
        ({"images": [[ONE], []]}, "A bag without images"),
        ({"image_embeds": []}, "The images of a batch have to be alike"),
        ({"image_embeds": [torch.zeros(0, 5, 7)]}, "A bag without images"),
        ({"image_embeds": [torch.zeros(2, 5, 7), torch.zeros(2, 4, 7)]}, r"per image these are \[\(4, 7\), \(5, 7\)\]"),
        (
            {"image_embeds": EMBEDS, "image_coords": [[(0, 0)], [(0, 0)] * 3]},
            r"The bags have \[1, 3\] coordinates and \[2, 3\] images; one x, y an image is needed",
        ),
        ({"image_embeds": EMBEDS, "text": ["a"]}, "2 bags and 1 texts; one of each a bag is needed"),
        ({"image_embeds": EMBEDS, "text": []}, "2 bags and 0 texts"),
        ({"image_embeds": EMBEDS, "captions": "a"}, "2 bags and 2 texts and 1 captions"),
        ({"image_embeds": EMBEDS, "text": f"{IMAGE_TOKEN} and {IMAGE_TOKEN}"}, "A text with 2 <image> marks"),
    ],
)
def test_what_does_not_fit_is_named(processor, bags, message):
    with pytest.raises(MivpgError, match=message):
        processor(**bags)


def test_without_a_vision_model_there_are_no_images(processor):
    of_features = MivpgProcessor(None, processor.tokenizer)
    with pytest.raises(MivpgError, match="no vision model, so its processor takes image_embeds, not images"):
        of_features(images=ONE)
    with pytest.raises(BagError, match="A bag without images"):
        of_features(images=[[]])
    assert of_features(image_embeds=EMBEDS)["image_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_chat_needs_a_template(processor):
    assert processor.tokenizer.chat_template is None
    with pytest.raises(MivpgError, match="but this tokenizer has none"):
        MivpgProcessor(processor.image_processor, processor.tokenizer, chat=True)
    with pytest.raises(MivpgError, match="apply_chat_template gives a text"):
        processor.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True)


def test_a_processor_knows_its_model(processor):
    config, _ = load_config(BASE_MODEL, {})
    processor.check_model(config)
    other = MivpgConfig.from_dict(config.to_dict() | {"num_query_tokens": config.num_query_tokens + 1})
    message = f"The processor has num_query_tokens = {config.num_query_tokens}, the model {other.num_query_tokens}"
    with pytest.raises(MivpgError, match=message):
        processor.check_model(other)


@pytest.mark.parametrize("text", ["", "a red", "a red ", "a photo of\n"])
def test_a_caption_follows_its_prompt(processor, text):
    """Labels are the caption's tokens, whatever the prompt ends with; together they read as prompt and caption."""
    batch = processor(images=ONE, text=text, captions="chair with arms")
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    is_caption = labels != -100
    assert torch.equal(labels[is_caption], ids[is_caption])
    assert processor.tokenizer.decode(ids[is_caption], skip_special_tokens=True).strip() == "chair with arms"
    assert labels[-1] == processor.caption_end_token_id
    whole = processor.tokenizer.decode(ids, skip_special_tokens=True).split()
    assert whole == [*text.split(), "chair", "with", "arms"]
