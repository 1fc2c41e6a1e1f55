"""Real photos and a real language model, from the reader to the caption."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from families import save_language_model, save_vision_model
from mivpg import BagCollator, BagDataset, MivpgForConditionalGeneration, MivpgProcessor, TrainConfig, train
from mivpg.bags import Sample, one_pair_a_reference
from mivpg.captioning import GenerationOptions, caption_samples
from mivpg.datasets import DatasetConfig
from mivpg.datasets.abo import AboConfig
from mivpg.datasets.bag_file import BagFileConfig
from mivpg.training import ModelConfig

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ABO, STORIES = DATA / "abo", DATA / "stories260k"
needs_abo = pytest.mark.skipif(not ABO.is_dir(), reason=f"the sample of Amazon Berkeley Objects is not at {ABO}")
TCGA = DATA / "slide_features" / "TCGA-AD-6964-01Z-00-DX1.h5"
needs_slide_features = pytest.mark.skipif(not TCGA.is_file(), reason=f"the features of a TCGA slide are not at {TCGA}")
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"the language model stories260k is not at {STORIES}")

QFORMER: dict[str, int | float | str] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
END_OF_STORY = 1
"""stories260k never writes its declared end of sequence; its stories end with the token that begins them."""


def token_accuracy(model: MivpgForConditionalGeneration, processor: MivpgProcessor, samples: list[Sample]) -> float:
    """Share of the caption tokens of all pairs that the model finds likeliest, each after the true ones before it."""
    dataset = BagDataset(one_pair_a_reference(samples), training=True)
    batch = BagCollator(processor, training=True)([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        predicted = model(**batch).logits[:, :-1].argmax(-1)
    labels = batch["labels"][:, 1:]
    return float((predicted == labels)[labels != -100].double().mean())


def captions(model, processor, samples, max_new_tokens: int = 40) -> dict[str, str]:
    generation = GenerationOptions(num_beams=1, max_new_tokens=max_new_tokens)
    return dict(caption_samples(model, processor, samples, generation=generation))


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@needs_abo
@pytest.mark.slow
@pytest.mark.parametrize("photos", ["original", "small"])
def test_three_products_are_learned_by_heart(tmp_path, photos, record_property):
    save_vision_model(tmp_path / "clip", "clip_vision_model")
    language = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "init_std": 0.05}
    save_language_model(tmp_path / "bytes", "opt", **language)
    dataset = DatasetConfig(abo=AboConfig(root=ABO, photos=photos, split="all"))
    train(
        TrainConfig(
            model=ModelConfig(
                vision=str(tmp_path / "clip"),
                language=str(tmp_path / "bytes"),
                num_query_tokens=16,
                qformer=QFORMER,
                patch_pooling="abmil",
                # The language model is small and random, so it trains along: it has to learn to write first.
                trainable=["qformer", "query_tokens", "language_projection", "patch_pooling", "language_model"],
            ),
            dataset=dataset,
            output_dir=tmp_path / "run",
            prompt="",
            num_train_epochs=60,
            learning_rate=3e-3,
            weight_decay=0.0,
            batch_size=2,
            num_workers=0,
            validation=GenerationOptions(num_beams=1, max_new_tokens=1),  # what is looked at is the last checkpoint
        )
    )
    last = tmp_path / "run" / "checkpoint-240"
    model, processor = MivpgForConditionalGeneration.from_pretrained(last), MivpgProcessor.from_pretrained(last)
    samples = dataset.load()
    assert len(samples) == 3 and {len(sample.images) for sample in samples} == {3, 4, 5}
    # Where two references of a product part, only one goes on as the model says: 486 of 490 tokens can be right.
    accuracy = token_accuracy(model, processor, samples)
    assert accuracy >= 0.99
    record_property(f"token accuracy on the three products of ABO, images/{photos}", accuracy)
    written = captions(model, processor, samples, max_new_tokens=100)
    for sample in samples:
        assert written[sample.id].lower().strip() in [caption.lower().strip() for caption in sample.captions]
    # The control: the captions come from the photos. With another product's photos they are the other product's.
    mixed = [
        Sample(id=sample.id, images=other.images, captions=sample.captions)
        for sample, other in zip(samples, samples[1:] + samples[:1], strict=True)
    ]
    other_ids = [sample.id for sample in samples[1:] + samples[:1]]
    assert list(captions(model, processor, mixed, max_new_tokens=100).values()) == [
        written[other] for other in other_ids
    ]


@needs_abo
@needs_stories
def test_a_real_frozen_language_model_over_real_photos(tmp_path, record_property):
    save_vision_model(tmp_path / "clip", "clip_vision_model")
    dataset = DatasetConfig(abo=AboConfig(root=ABO, photos="small", split="all"))
    best = train(stories_config(tmp_path, dataset, vision=str(tmp_path / "clip")))
    check_stories(tmp_path / "run", best, dataset.load())
    record_property(
        "stories260k over photos: last loss / first", losses(tmp_path / "run")[-1] / losses(tmp_path / "run")[0]
    )


@needs_abo
@needs_stories
@pytest.mark.slow
def test_features_alone_over_a_real_language_model(tmp_path, record_property):
    """The vision model is asked once, its answers are stored, and from then on there is none."""
    save_vision_model(tmp_path / "clip", "clip_vision_model")
    seeing = MivpgForConditionalGeneration.from_vision_language_pretrained(
        tmp_path / "clip", STORIES, qformer_config=QFORMER, num_query_tokens=16
    )
    processor = MivpgProcessor.from_vision_language_pretrained(tmp_path / "clip", STORIES, seeing.config)
    with (tmp_path / "bags.jsonl").open("w") as file:
        for sample in AboConfig(root=ABO, split="all").load():
            pixel_values = processor(images=[[*map(str, sample.images)]])["pixel_values"]
            save_file({"image_embeds": seeing.get_image_embeds(pixel_values)[0]}, tmp_path / f"{sample.id}.safetensors")
            record = {"id": sample.id, "features": f"{sample.id}.safetensors", "captions": sample.captions}
            file.write(json.dumps(record) + "\n")
    dataset = DatasetConfig(bag_file=BagFileConfig(path=tmp_path / "bags.jsonl"))
    best = train(stories_config(tmp_path, dataset, image_embeds_size=24))
    check_stories(tmp_path / "run", best, dataset.load())
    record_property(
        "stories260k, features: last loss / first", losses(tmp_path / "run")[-1] / losses(tmp_path / "run")[0]
    )


@needs_slide_features
@needs_stories
@pytest.mark.slow
def test_a_slide_that_another_tool_has_extracted(tmp_path, record_property):
    """777 tiles in one .h5 file, 512 wide, their positions in it: a bag as it is."""
    record = {"id": "TCGA-AD-6964", "features": str(TCGA), "captions": ["the tiles of one slide"]}
    (tmp_path / "bags.jsonl").write_text(json.dumps(record) + "\n")
    dataset = DatasetConfig(bag_file=BagFileConfig(path=tmp_path / "bags.jsonl", root=Path("/")))
    slide = {"instance_correlation": "csa", "position_encoding": "ppeg", "image_embeds_size": 512}
    config = stories_config(tmp_path, dataset, **slide | {"patch_pooling": "cls"})
    best = train(config)
    (sample,) = dataset.load()
    bag = BagDataset([sample])[0]
    assert bag.image_embeds.shape == (777, 1, 512) and bag.image_coords.shape == (777, 2)
    record_property(
        "stories260k, one slide of 777 tiles: last loss / first",
        losses(tmp_path / "run")[-1] / losses(tmp_path / "run")[0],
    )
    assert losses(tmp_path / "run")[-1] < 0.8 * losses(tmp_path / "run")[0]
    model, processor = MivpgForConditionalGeneration.from_pretrained(best), MivpgProcessor.from_pretrained(best)
    assert captions(model, processor, [sample])[sample.id]
    # PPEG reads where the tiles lie, and the rest does not care for their order.
    batch = BagCollator(processor, training=False)([bag])
    order = torch.randperm(777, generator=torch.Generator().manual_seed(0))
    shuffled = batch | {name: batch[name][:, order] for name in ("image_embeds", "image_coords")}
    elsewhere = batch | {"image_coords": batch["image_coords"][:, order]}
    with torch.no_grad():
        prompts, same, other = (
            model.get_visual_prompts(b["image_embeds"], image_coords=b["image_coords"]).embeds
            for b in (batch, shuffled, elsewhere)
        )
    assert (prompts - same).abs().max() < 1e-4 < (prompts - other).abs().max()


def stories_config(tmp_path: Path, dataset: DatasetConfig, **model) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            language=str(STORIES),
            num_query_tokens=16,
            qformer=QFORMER,
            caption_end_token_id=END_OF_STORY,
            **{"patch_pooling": "abmil"} | model,
        ),
        dataset=dataset,
        output_dir=tmp_path / "run",
        prompt="",
        num_train_epochs=12,
        learning_rate=3e-3,
        batch_size=4,
        num_workers=0,
        validation=GenerationOptions(num_beams=1, max_new_tokens=10),
    )


def check_stories(run: Path, best: Path, samples: list[Sample]) -> None:
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    model, processor = MivpgForConditionalGeneration.from_pretrained(best), MivpgProcessor.from_pretrained(best)
    frozen = MivpgForConditionalGeneration.from_vision_language_pretrained(
        None, STORIES, image_embeds_size=24, qformer_config=QFORMER
    )
    own = frozen.language_model.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in model.language_model.state_dict().items())
    written = captions(model, processor, samples)
    assert all(written.values())
    model.save_pretrained(run / "whole")
    processor.save_pretrained(run / "whole")
    whole = MivpgForConditionalGeneration.from_pretrained(run / "whole")
    assert captions(whole, MivpgProcessor.from_pretrained(run / "whole"), samples) == written
