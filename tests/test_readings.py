"""What the paper leaves open, read the other way: each option does what it says, and left alone it changes nothing."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from families import save_blip2
from mivpg import MivpgConfig, MivpgError, MivpgForConditionalGeneration
from mivpg.configuration_mivpg import MivpgQFormerConfig
from mivpg.experiments.data import SCALES
from mivpg.experiments.paper import experiments
from mivpg.layers import AttentionPooling
from mivpg.training import ModelConfig
from mivpg.visualization import image_weights
from tiny import random_bags, randomize_weights, tiny_config, tiny_model

EFFECT = 1e-2
LENGTHS = (5, 1, 2)
DEFAULTS = {"instances_carry_over": True, "zero_init_residual": True, "pool_include_prefix": True}
OTHERS = dict.fromkeys(DEFAULTS, False)


def model_of(pooling="none", correlation="csa", encoding="none", **options) -> MivpgForConditionalGeneration:
    """In float64, with every weight of its own; the same weights whatever the options."""
    model = tiny_model(tiny_config(pooling, correlation, encoding, **options)).double()
    randomize_weights(model, generator=torch.Generator().manual_seed(1))
    return model


def bags(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    image_embeds, image_mask = random_bags(lengths)
    return image_embeds.double(), image_mask


@torch.no_grad()
def prompts_of(model, *inputs) -> Tensor:
    return model.get_visual_prompts(*inputs).embeds


class TestCarryingOver:
    @pytest.mark.parametrize("encoding", ["none", "ppeg"])
    @pytest.mark.parametrize("correlation", ["csa", "csa_constant", "self_attention", "induced", "nystrom"])
    def test_restarted_is_a_loop_over_raw_instances(self, correlation, encoding):
        """Block by block, each on the instances that the bag came with."""
        model = model_of("none", correlation, encoding, instances_carry_over=False)
        image_embeds, _ = bags((3, 3))
        with torch.no_grad():
            raw, _ = model.get_instances(image_embeds)
            grid = model.get_instance_grid(image_embeds, None, None)
            learned = queries = model.qformer.layernorm(model.query_tokens).expand(2, -1, -1)
            for index, block in enumerate(model.qformer.encoder.layer):
                instances = raw
                if index % 2 == 0:
                    if encoding == "ppeg":
                        instances = block.position_encoding(raw, grid)
                    instances = block.instance_correlation(instances, None, queries, learned)
                queries = block.attention(queries)
                if index % 2 == 0:
                    queries = block.crossattention(queries, encoder_hidden_states=instances)
                queries = block.output_query(block.intermediate_query(queries), queries)
        prompts = prompts_of(model, image_embeds)
        torch.testing.assert_close(prompts, queries, atol=1e-12, rtol=0)
        assert (prompts - prompts_of(model_of("none", correlation, encoding), image_embeds)).abs().max() > EFFECT

    def test_one_block_knows_no_difference(self):
        """And from the second block with cross-attention on there is one."""
        for num_layers, differs in ((2, False), (3, True)):
            one, other = (
                model_of(num_hidden_layers=num_layers, instances_carry_over=carry_over) for carry_over in (True, False)
            )
            assert torch.equal(prompts_of(one, *bags()), prompts_of(other, *bags())) is not differs

    def test_padding_is_inert(self):
        model = model_of("abmil", "csa", "none", instances_carry_over=False)
        image_embeds, image_mask = bags()
        prompts = prompts_of(model, image_embeds, image_mask)
        for bag, length in enumerate(LENGTHS):
            alone = prompts_of(model, image_embeds[bag : bag + 1, :length])
            torch.testing.assert_close(prompts[bag : bag + 1], alone, atol=1e-10, rtol=0)

    def test_large_bags_and_recomputed_blocks_have_the_same_gradients(self, monkeypatch):
        model = model_of("cls", "csa", "none", instances_carry_over=False).train()

        def gradients() -> dict[str, Tensor]:
            model.zero_grad()
            image_embeds, image_mask = bags()
            image_embeds.requires_grad_()
            model.get_visual_prompts(image_embeds, image_mask).embeds.square().sum().backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            return found | {"image_embeds": image_embeds.grad}

        expected = gradients()
        assert expected["image_embeds"].abs().max() > EFFECT
        model.gradient_checkpointing_enable()
        recomputed = gradients()
        monkeypatch.setattr("mivpg.folded_attention.pays", lambda *_: True)
        monkeypatch.setattr("mivpg.folded_attention.CHUNK", 2)
        folded = gradients()
        assert recomputed.keys() == folded.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(recomputed[name], gradient), name
            torch.testing.assert_close(folded[name], gradient, atol=1e-10, rtol=0)


class TestZeroInit:
    @pytest.mark.parametrize("correlation", ["csa", "csa_constant", "self_attention", "induced", "nystrom"])
    def test_without_it_an_untrained_model_is_not_the_qformer(self, correlation):
        image_embeds, image_mask = random_bags(LENGTHS)
        plain, at_zero, at_random = (
            untrained("none", *options)
            for options in (("none", "none", True), (correlation, "ppeg", True), (correlation, "ppeg", False))
        )
        for model in (at_zero, at_random):
            model.load_state_dict(plain.state_dict(), strict=False)
        expected = prompts_of(plain, image_embeds, image_mask)
        assert torch.equal(prompts_of(at_zero, image_embeds, image_mask), expected)
        assert (prompts_of(at_random, image_embeds, image_mask) - expected).abs().max() > EFFECT

    def test_weights_start_as_the_qformers_do(self):
        """Normal with the standard deviation of `initializer_range`, biases zero; AB-MIL still starts as the mean."""
        sizes = {"hidden_size": 96, "encoder_hidden_size": 120, "initializer_range": 0.05}
        model = untrained("abmil", "csa", "ppeg", False, image_embeds_size=120, **sizes)
        for name, weight in model.qformer.named_parameters():
            if "instance_correlation.output" in name or "position_encoding" in name:
                if name.endswith("bias"):
                    assert not weight.any(), name
                else:
                    error = weight.numel() ** -0.5  # of the mean, in standard deviations
                    assert weight.mean().item() == pytest.approx(0, abs=4 * 0.05 * error), name
                    assert weight.std().item() == pytest.approx(0.05, rel=4 * error), name
        assert not model.patch_pooling.score.weight.any()


def untrained(pooling, correlation, encoding, zero_init, **options) -> MivpgForConditionalGeneration:
    torch.manual_seed(0)
    config = tiny_config(pooling, correlation, encoding, zero_init_residual=zero_init, **options)
    return MivpgForConditionalGeneration(config).eval()


class TestPrefix:
    @pytest.mark.parametrize("pooling", ["abmil", "gated_abmil"])
    @pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
    def test_without_it_only_patches_are_pooled(self, pooling, num_prefix_tokens):
        whole = model_of(pooling, num_prefix_tokens=num_prefix_tokens)
        model = without_prefix(whole)
        image_embeds, image_mask = bags()
        expected, _ = whole.get_instances(image_embeds[:, :, num_prefix_tokens:], image_mask)
        instances, mask = model.get_instances(image_embeds, image_mask)
        assert torch.equal(mask, image_mask)
        torch.testing.assert_close(instances, expected, atol=1e-12, rtol=0)
        moved = (instances - whole.get_instances(image_embeds, image_mask)[0]).abs().max()
        assert moved == 0 if num_prefix_tokens == 0 else moved > EFFECT

    def test_weights_keep_their_shape(self):
        """Whoever draws them finds each token in its place."""
        pooling = AttentionPooling(12, gated=True, num_left_out=2)
        torch.nn.init.normal_(pooling.score.weight)
        tokens = torch.randn(3, 11, 12)
        weights = pooling.attention_weights(tokens)
        assert weights.shape == (3, 11) and not weights[:, :2].any() and (weights[:, 2:] > 0).all()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
        pooling.num_left_out = 0
        torch.testing.assert_close(weights[:, 2:], pooling.attention_weights(tokens[:, 2:]))
        image_embeds, image_mask = bags()
        batch = {"image_embeds": image_embeds, "image_mask": image_mask}
        looked = image_weights(without_prefix(model_of("abmil")), batch)
        torch.testing.assert_close(looked.sum(dim=1), torch.ones(3).double())

    def test_no_gradient_reaches_what_is_left_out(self):
        image_embeds, image_mask = bags()
        image_embeds.requires_grad_()
        without_prefix(model_of("abmil")).get_visual_prompts(image_embeds, image_mask).embeds.square().sum().backward()
        assert not image_embeds.grad[:, :, 0].any() and image_embeds.grad[0, :, 1:].abs().max() > 0

    @pytest.mark.parametrize("num_tokens", [1, 5])
    def test_an_image_keeps_a_patch(self, num_tokens):
        model = without_prefix(model_of("abmil", num_prefix_tokens=5))
        with pytest.raises(MivpgError, match=rf"have {num_tokens} tokens.* first 5 .*pool_include_prefix=True"):
            model.get_instances(random_bags(LENGTHS, num_patches=num_tokens)[0])

    @pytest.mark.parametrize("pooling", ["none", "cls", "mean", "max"])
    def test_what_does_not_read_it_refuses_it(self, pooling):
        with pytest.raises(MivpgError, match=f"patch_pooling='{pooling}' does not read it: abmil and gated_abmil do"):
            MivpgConfig(patch_pooling=pooling, pool_include_prefix=False)


def without_prefix(whole: MivpgForConditionalGeneration) -> MivpgForConditionalGeneration:
    """The same weights without prefix tokens in AB-MIL."""
    config = MivpgConfig(**whole.config.to_dict() | {"pool_include_prefix": False})
    model = MivpgForConditionalGeneration(config).double().eval()
    model.load_state_dict(whole.state_dict())
    return model


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory):
    return save_blip2(tmp_path_factory.mktemp("blip2"))


class TestCheckpoints:
    def test_options_are_kept(self, blip2_folder, tmp_path):
        """In a checkpoint and in a whole model, through the fields that a run's arms set."""
        config = ModelConfig(
            base=str(blip2_folder),
            patch_pooling="abmil",
            instance_correlation="csa",
            position_encoding="ppeg",
            **OTHERS,
        )
        torch.manual_seed(0)
        model, _ = config.load()
        image_embeds = torch.randn(2, 3, 17, 24)
        expected = prompts_of(model, image_embeds)
        model.save_trained(tmp_path / "trained")
        model.save_pretrained(tmp_path / "whole")
        for folder in ("trained", "whole"):
            again = MivpgForConditionalGeneration.from_pretrained(tmp_path / folder)
            assert options_of(again.config) == OTHERS
            assert torch.equal(prompts_of(again, image_embeds), expected)
        # The control: each of the three makes a difference.
        for name in OTHERS:
            torch.manual_seed(0)
            other = MivpgForConditionalGeneration.from_pretrained(
                tmp_path / "trained" if name != "zero_init_residual" else blip2_folder,
                **{"patch_pooling": "abmil", "position_encoding": "ppeg"} | OTHERS | {name: True},
            )
            assert (prompts_of(other, image_embeds) - expected).abs().max() > 1e-3, name

    def test_a_checkpoint_from_before_the_options_loads(self, blip2_folder, tmp_path):
        model = MivpgForConditionalGeneration.from_pretrained(blip2_folder, patch_pooling="abmil")
        randomize_weights(model.qformer)
        model.save_trained(tmp_path)
        file = tmp_path / "config.json"
        config = json.loads(file.read_text())
        for name in DEFAULTS:
            config.pop(name, None)
            config["qformer_config"].pop(name, None)
        file.write_text(json.dumps(config))
        again = MivpgForConditionalGeneration.from_pretrained(tmp_path)
        assert options_of(again.config) == DEFAULTS
        image_embeds = torch.randn(2, 3, 17, 24)
        assert torch.equal(prompts_of(again, image_embeds), prompts_of(model, image_embeds))


def options_of(config: MivpgConfig) -> dict[str, bool]:
    """Each from the config of the class that reads it."""
    of_qformer = {name: getattr(config.qformer_config, name) for name in MivpgQFormerConfig.options() if name in OTHERS}
    return {name: of_qformer[name] if name in of_qformer else getattr(config, name) for name in DEFAULTS}


@pytest.mark.parametrize("scale", SCALES)
def test_arms_differ_in_one_reading(scale):
    """The two arms of a claim differ in what it is about alone; what other tables have is the same arm, so run once."""
    known = experiments(SCALES[scale])
    arms = {(arm.data, arm.name): arm for arm in known["readings"].arms}
    assert len(arms) == len(known["readings"].arms) == 12
    compared = {}
    for claim in known["readings"].claims:
        for data in ("products", "slides", "scenes"):
            better, worse = arms.get((data, claim.better)), arms.get((data, claim.worse))
            if better and worse:
                fields = better.model.keys() | worse.model.keys()
                (field,) = (name for name in fields if better.model.get(name) != worse.model.get(name))
                compared.setdefault(field, []).append(data)
                assert better == replace(worse, name=better.name, title=better.title, model=better.model)
    assert compared == {
        "instances_carry_over": ["products", "slides"],
        "zero_init_residual": ["products", "slides"],
        "pool_include_prefix": ["products"],
        "instance_correlation": ["scenes", "scenes", "scenes"],
        "position_encoding": ["scenes"],
    }
    elsewhere = {(arm.data, arm.name): arm for name in ("table1", "table2", "figure4") for arm in known[name].arms}
    shared = elsewhere.keys() & arms.keys()
    assert len(shared) == 4 and all(arms[key] == elsewhere[key] for key in shared)
