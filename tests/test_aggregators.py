"""Every aggregator in MIVPG's place: marks in the text, ragged batches, loading, training, checkpoints, captions."""

import json

import pytest
import torch

from mivpg import MivpgForConditionalGeneration, MivpgProcessor
from mivpg.aggregators.named import AGGREGATORS, SCORING_AGGREGATORS
from mivpg.bags import Bag
from mivpg.captioning import GenerationOptions, caption_bags
from mivpg.configuration_mivpg import AggregatorName, MivpgConfig
from mivpg.datasets import DatasetConfig
from mivpg.datasets.bag_file import BagFileConfig
from mivpg.errors import MivpgError
from mivpg.miniature import BASE_MODEL
from mivpg.training import ModelConfig, TrainConfig, train
from mivpg.visualization import image_weights

WIDTH, TOKENS, NUM_MARKS = 128, 3, 4
LENGTHS = (3, 1, 2)
QUICK = {
    "perceiver": {"depth": 1, "num_heads": 2, "head_size": 16},
    "transmil": {"size": 32, "num_heads": 2, "num_landmarks": 8},
}
IN_PLACE = ["qformer_per_image", *AGGREGATORS]
PER_IMAGE = {"qformer_per_image": 16, "linear_projection": TOKENS, "pooled_projection": NUM_MARKS}


def options_of(aggregator: str) -> dict:
    options = {"aggregator": aggregator}
    if aggregator != "qformer_per_image":
        options |= {
            "num_query_tokens": PER_IMAGE.get(aggregator, NUM_MARKS),
            "aggregator_options": QUICK.get(aggregator),
        }
    return options


@pytest.fixture(scope="module")
def loaded():
    """Model and processor, by aggregator, around the base model."""
    models = {}

    def load(aggregator: str):
        if aggregator not in models:
            torch.manual_seed(0)
            models[aggregator] = ModelConfig(base=str(BASE_MODEL), **options_of(aggregator)).load()
        return models[aggregator]

    return load


def make_bags(lengths=LENGTHS, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, TOKENS, WIDTH, generator=generator) for length in lengths]


def test_names_are_those_of_the_configuration():
    names = set(AggregatorName.__args__)
    assert names == {"mivpg", "qformer_per_image"} | AGGREGATORS.keys() | SCORING_AGGREGATORS.keys()
    for name, aggregator in AGGREGATORS.items():
        config = MivpgConfig(vision_config=None, aggregator=name)
        assert config.prompts_per_image == aggregator.per_image, name


@pytest.mark.parametrize("aggregator", IN_PLACE)
def test_marks_prompts_and_loss(loaded, aggregator):
    model, processor = loaded(aggregator)
    batch = processor(image_embeds=make_bags(), text="a photo of", captions=["a chair", "a table", "a lamp"])
    marks = (batch["input_ids"] == model.config.image_token_index).sum(dim=1)
    each = PER_IMAGE.get(aggregator)
    assert marks.tolist() == [each * n for n in LENGTHS] if each else [NUM_MARKS] * 3
    output = model(**batch)
    assert output.loss.isfinite()
    assert output.visual_prompts.shape[::2] == (3, 128)
    with pytest.raises(MivpgError, match="image marks"):
        model(**batch | {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 3, 4)})


@pytest.mark.parametrize("aggregator", IN_PLACE)
def test_a_ragged_batch_is_its_bags_alone(loaded, aggregator):
    model, processor = loaded(aggregator)
    model.eval()
    bags = make_bags()
    generation = {"num_beams": 1, "max_new_tokens": 5}

    def as_bags(those):
        return [
            Bag(id=str(i), images=None, image_embeds=bag, image_coords=None, prompt="a photo of", caption=None)
            for i, bag in enumerate(those)
        ]

    together = caption_bags(model, processor, as_bags(bags), **generation)
    assert together == [caption_bags(model, processor, as_bags([bag]), **generation)[0] for bag in bags]


@pytest.mark.parametrize("aggregator", ["perceiver", "qformer_per_image"])
def test_what_stands_in_padding_reaches_no_gradient(aggregator):
    """Also of what pools the patches before: 0 * NaN is NaN."""
    torch.manual_seed(0)
    model, _ = ModelConfig(base=str(BASE_MODEL), patch_pooling="abmil", **options_of(aggregator)).load()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    bags = torch.randn(3, 3, TOKENS, WIDTH)
    gradients = []
    for value in (0.0, torch.nan):
        model.zero_grad()
        prompts = model.get_visual_prompts(bags.masked_fill(mask[:, :, None, None] == 0, value), mask)
        prompts.embeds.pow(2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    clean, dirty = gradients
    assert any(name.startswith("patch_pooling.") and gradient.any() for name, gradient in clean.items())
    assert all(torch.equal(dirty[name], clean[name]) for name in clean)
    with pytest.raises(MivpgError, match=r"image_mask is \(3, 2\), image_embeds \(3, 3,"):
        model.get_visual_prompts(bags, mask[:, :2])


def test_qformer_per_image_says_of_each_image_what_the_qformer_says_of_it_alone(loaded):
    model, _ = loaded("qformer_per_image")
    plain = MivpgForConditionalGeneration.from_pretrained(BASE_MODEL, instance_correlation="none").eval()
    model.eval()
    bags = make_bags()
    padded = torch.zeros(3, 3, TOKENS, WIDTH)
    mask = torch.zeros(3, 3, dtype=torch.long)
    for row, bag in enumerate(bags):
        padded[row, : len(bag)], mask[row, : len(bag)] = bag, 1
    with torch.no_grad():
        found = model.get_visual_prompts(padded, mask)
        for row, bag in enumerate(bags):
            expected = plain.get_visual_prompts(bag[:, None]).embeds.flatten(0, 1)  # each image a bag of one
            assert (found.embeds[row, : len(expected)] - expected).abs().max() < 1e-5
            assert found.mask[row].sum() == len(expected)
            assert not found.embeds[row, len(expected) :].any()


def test_minigpt4_trains_the_linear_layer_alone():
    """A frozen Q-Former under a new linear layer (Zhu et al. 2023) is a value of `trainable`."""
    model = MivpgForConditionalGeneration.from_pretrained(
        BASE_MODEL, instance_correlation="none", trainable=["language_projection"]
    )
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "language_projection.weight",
        "language_projection.bias",
    ]


THREE_KINDS = {"qformer_per_image", "abmil", "perceiver"}


@pytest.mark.parametrize(
    "aggregator", [pytest.param(name, marks=() if name in THREE_KINDS else pytest.mark.slow) for name in IN_PLACE]
)
def test_it_trains_and_its_checkpoint_is_what_trained(tmp_path, aggregator):
    lines = []
    for index, bag in enumerate(make_bags((2, 1, 3, 2))):
        file = tmp_path / f"{index}.safetensors"
        from safetensors.torch import save_file

        save_file({"image_embeds": bag}, file)
        lines.append({"id": str(index), "features": file.name, "captions": [["a chair", "a red table"][index % 2]]})
        lines[-1]["split"] = "train" if index else "val"
    (tmp_path / "bags.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig(
        model=ModelConfig(base=str(BASE_MODEL), **options_of(aggregator)),
        dataset=DatasetConfig(bag_file=BagFileConfig(path=tmp_path / "bags.jsonl")),
        output_dir=tmp_path / "run",
        num_train_epochs=1,
        batch_size=2,
        learning_rate=1e-3,
        num_workers=0,
        best_metric="BLEU@4",
        validation=GenerationOptions(num_beams=1, max_new_tokens=5),
    )
    best = train(config)
    model = MivpgForConditionalGeneration.from_pretrained(best).eval()
    processor = MivpgProcessor.from_pretrained(best)
    processor.check_model(model.config)
    assert model.config.aggregator == aggregator
    parts = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    of_qformer = {"qformer", "query_tokens", "language_projection"}
    assert parts == (of_qformer if aggregator == "qformer_per_image" else {"aggregator"})
    with pytest.raises(MivpgError, match="base is a model with aggregator"):
        ModelConfig(base=str(best), aggregator="mivpg").load()
    batch = processor(image_embeds=make_bags(), text="a photo of")
    again = MivpgForConditionalGeneration.from_pretrained(best).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_an_option_that_it_does_not_read_is_refused():
    with pytest.raises(MivpgError, match="aggregator 'perceiver' does not read it"):
        ModelConfig(base=str(BASE_MODEL), **options_of("perceiver"), position_encoding="ppeg").load()


def test_a_scoring_aggregator_makes_no_prompts():
    with pytest.raises(MivpgError, match="'ds_mil' is defined by class scores"):
        MivpgForConditionalGeneration.from_pretrained(BASE_MODEL, aggregator="ds_mil")


def test_new_weights_of_an_aggregator_are_pytorchs(loaded):
    """And not transformers', which would draw them from N(0, 0.02) and set biases to zero."""
    model, _ = loaded("deep_sets")
    linear = model.aggregator.phi[0]
    bound = linear.in_features**-0.5
    assert linear.weight.abs().max() <= bound and linear.weight.std() > bound / 2
    assert linear.bias.abs().max() > 0
    perceiver, _ = loaded("perceiver")
    assert 0.8 < perceiver.aggregator.latents.std() < 1.2


def test_photos_have_weights_in_mivpg_alone(loaded):
    model, processor = loaded("abmil")
    with pytest.raises(MivpgError, match="'abmil'"):
        image_weights(model, processor(image_embeds=make_bags(), text="a photo of"))


def test_queries_of_the_base_are_not_to_be_counted_anew():
    with pytest.raises(MivpgError, match="base brings its own num_query_tokens"):
        ModelConfig(base=str(BASE_MODEL), aggregator="qformer_per_image", num_query_tokens=3).load()
    with pytest.raises(MivpgError, match="num_query_tokens"):
        model, processor = ModelConfig(base=str(BASE_MODEL), aggregator="linear_projection").load()
        model(**processor(image_embeds=make_bags(), text="a photo of"))
