"""The model against BLIP-2, over every family of vision and language models, and through saving and loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    BitsAndBytesConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
)

from families import (
    EOS,
    LANGUAGE,
    NUM_PREFIX_TOKENS,
    VISION,
    byte_tokenizer,
    save_blip2,
    save_language_model,
    save_vision_model,
)
from mivpg import MivpgConfig, MivpgError, MivpgForConditionalGeneration, MivpgProcessor, MivpgQFormerModel
from mivpg.modeling_mivpg import MivpgForBagClassification, class_probabilities
from parameters import LANGUAGE_MODELS, real_size
from tiny import (
    IMAGE_TOKEN_ID,
    NUM_QUERIES,
    random_bags,
    randomize_added_weights,
    tiny_config,
    tiny_model,
    tiny_vit_config,
)

QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    pixels = torch.randint(0, 256, (count, 40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return [Image.fromarray(p.numpy()) for p in pixels]


def drawn(model: MivpgForConditionalGeneration) -> MivpgForConditionalGeneration:
    """With its added parts drawn at random, since they start as the identity."""
    randomize_added_weights(model, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder of each family."""
    root = tmp_path_factory.mktemp("families")
    for kind in VISION:
        save_vision_model(root / kind, kind)
    for kind in LANGUAGE:
        save_language_model(root / kind, kind)
    return root


@pytest.fixture(scope="module", params=["opt", "t5"])
def blip2_folder(request, tmp_path_factory) -> Path:
    return save_blip2(tmp_path_factory.mktemp("blip2") / request.param, request.param)


def assert_says_what_blip2_says(mivpg, blip2, as_bags, inputs, labels):
    """Logits, loss and tokens, bit for bit; `as_bags` are `inputs` as bags of one image. MIVPG's output is returned."""
    with torch.no_grad():
        expected, result = blip2(**inputs, labels=labels), mivpg(**as_bags, labels=labels)
    assert torch.equal(result.logits, expected.logits)
    assert torch.equal(result.loss, expected.loss)
    for options in ({}, {"num_beams": 3}):
        expected_ids = blip2.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
        assert torch.equal(mivpg.generate(**as_bags, max_new_tokens=12, do_sample=False, **options), expected_ids)
    return result


class TestBlip2:
    """MIVPG with everything off is BLIP-2."""

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_everything_off_is_blip2(self, blip2_folder, attention):
        blip2 = Blip2ForConditionalGeneration.from_pretrained(blip2_folder, attn_implementation=attention).eval()
        mivpg = MivpgForConditionalGeneration.from_pretrained(
            blip2_folder, instance_correlation="none", attn_implementation=attention
        )
        inputs = Blip2Processor.from_pretrained(blip2_folder)(
            images=pictures(3), text=["a photo of", "a photo of", "it shows it"], return_tensors="pt", padding=True
        )
        labels = torch.randint(3, 250, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0))
        labels[1, :4] = -100
        as_bags = inputs | {"pixel_values": inputs["pixel_values"][:, None]}
        result = assert_says_what_blip2_says(mivpg, blip2, as_bags, inputs, labels)
        # The control: these logits do depend on the picture and on the Q-Former.
        with torch.no_grad():
            other = mivpg(**as_bags | {"pixel_values": as_bags["pixel_values"].flip(0)}, labels=labels)
        assert (other.logits - result.logits).abs().max() > 1e-2

    def test_only_our_parameters_are_missing(self, blip2_folder):
        _, info = MivpgForConditionalGeneration.from_pretrained(
            blip2_folder, patch_pooling="gated_abmil", position_encoding="ppeg", output_loading_info=True
        )
        assert not info["unexpected_keys"]
        parts = {"instance_correlation", "position_encoding", "patch_pooling"}
        assert all(parts & set(name.split(".")) for name in info["missing_keys"])
        assert {part for name in info["missing_keys"] for part in parts & set(name.split("."))} == parts

    @pytest.mark.parametrize(
        ("pooling", "correlation"),
        [
            pytest.param(
                pooling,
                correlation,
                marks=()
                if (pooling == "gated_abmil") == (correlation == "csa") or pooling == "mean"
                else pytest.mark.slow,
            )
            for pooling in ("none", "cls", "mean", "max", "abmil", "gated_abmil")
            for correlation in ("csa", "csa_constant", "self_attention", "induced", "nystrom")
        ],
    )
    @pytest.mark.parametrize("blip2_folder", ["opt"], indirect=True)  # no language model is asked
    def test_untrained_is_the_qformer_on_the_pooled_instances(self, blip2_folder, pooling, correlation):
        mivpg = MivpgForConditionalGeneration.from_pretrained(
            blip2_folder, patch_pooling=pooling, instance_correlation=correlation, position_encoding="ppeg"
        )
        qformer = Blip2ForConditionalGeneration.from_pretrained(blip2_folder).qformer.eval()
        image_embeds = torch.randn(2, 3, 17, 24, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        with torch.no_grad():
            instances, instance_mask = mivpg.get_instances(image_embeds, mask)
            expected = qformer(
                query_embeds=mivpg.query_tokens.expand(2, -1, -1),
                encoder_hidden_states=instances,
                encoder_attention_mask=instance_mask,
            ).last_hidden_state
            assert torch.equal(mivpg.get_visual_prompts(image_embeds, mask).embeds, expected)
            drawn(mivpg)
            assert (mivpg.get_visual_prompts(image_embeds, mask).embeds - expected).abs().max() > 1e-2

    def test_attention_pooling_starts_as_the_mean(self, blip2_folder):
        mivpg = MivpgForConditionalGeneration.from_pretrained(blip2_folder, patch_pooling="abmil")
        image_embeds = torch.randn(2, 3, 17, 24)
        torch.testing.assert_close(mivpg.get_instances(image_embeds)[0], image_embeds.mean(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_real_sizes_have_blip2s_names_and_shapes_and_ours(name):
    with torch.device("meta"):
        blip2 = Blip2ForConditionalGeneration(Blip2Config(text_config=LANGUAGE_MODELS[name].to_dict()))
    mivpg = real_size(LANGUAGE_MODELS[name])
    expected = {name: tuple(weight.shape) for name, weight in blip2.named_parameters()}
    result = {name: tuple(weight.shape) for name, weight in mivpg.named_parameters()}
    ours = {"patch_pooling.projection.weight": (128, 1408), "patch_pooling.score.weight": (1, 128)}
    for layer in range(0, 12, 2):
        prefix = f"qformer.encoder.layer.{layer}"
        for part, shape in {
            "query": (768, 1408),
            "key": (768, 768),
            "value": (768, 768),
            "output": (1408, 768),
        }.items():
            ours[f"{prefix}.instance_correlation.{part}.weight"] = shape
            ours[f"{prefix}.instance_correlation.{part}.bias"] = shape[:1]
        for i, size in enumerate((7, 5, 3)):
            ours[f"{prefix}.position_encoding.convolutions.{i}.weight"] = (1408, 1, size, size)
            ours[f"{prefix}.position_encoding.convolutions.{i}.bias"] = (1408,)
    assert result == expected | ours


class TestFamilies:
    """Any vision model, any language model."""

    def joined(self, folders, vision, language, **options):
        sizes = {"num_query_tokens": 5, "qformer_config": QFORMER}
        model = MivpgForConditionalGeneration.from_vision_language_pretrained(
            folders / vision, folders / language, **sizes | options
        )
        processor = MivpgProcessor.from_vision_language_pretrained(folders / vision, folders / language, model.config)
        processor.check_model(model.config)
        return drawn(model), processor

    @pytest.mark.parametrize(
        ("vision", "language"),
        [
            pytest.param(
                vision, language, marks=() if vision == "blip_2_vision_model" or language == "opt" else pytest.mark.slow
            )
            for vision in VISION
            for language in LANGUAGE
        ],
    )
    def test_trains_and_generates(self, folders, vision, language):
        pooling = "abmil" if language in ("opt", "t5") else "none"
        model, processor = self.joined(
            folders, vision, language, patch_pooling=pooling, position_encoding="ppeg" if pooling == "none" else "none"
        )
        assert model.config.num_prefix_tokens == NUM_PREFIX_TOKENS[vision]
        bags, prompts = [pictures(2), pictures(3, seed=1)], ["a photo of", "it is"]
        batch = processor(images=bags, text=prompts, captions=["a chair", "two longer chairs"])
        loss = model(**batch).loss
        loss.backward()
        assert loss.isfinite() and model.query_tokens.grad.abs().sum() > 0
        inputs = processor(images=bags, text=prompts)
        ids = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        assert ids.shape == (2, start + 5)
        assert len(processor.decode_captions(ids if start == 1 else ids[:, start:])) == 2

    @pytest.mark.parametrize("vision", VISION)
    def test_frozen_models_are_the_folders_own(self, folders, vision):
        model, _ = self.joined(folders, vision, "bart")
        vision_model = AutoModel.from_pretrained(folders / vision).eval()
        language_model = AutoModelForSeq2SeqLM.from_pretrained(folders / "bart")
        for part, own in ((model.vision_model, vision_model), (model.language_model, language_model)):
            own_weights = own.state_dict()
            assert all(torch.equal(weight, own_weights[name]) for name, weight in part.state_dict().items())
        pixel_values = torch.randn(2, 3, 3, 28, 28)
        expected = vision_model(pixel_values.flatten(0, 1)).last_hidden_state
        if expected.ndim == 4:
            expected = torch.stack(
                [torch.stack([m[:, r, c] for r in range(m.shape[1]) for c in range(m.shape[2])]) for m in expected]
            )
        assert torch.equal(model.get_image_embeds(pixel_values).flatten(0, 1), expected)

    def test_a_tower_of_a_model_with_several(self, folders, tmp_path):
        clip = AutoConfig.for_model(
            "clip", vision_config={**VISION["clip_vision_model"], "image_size": 28, "patch_size": 7}
        )
        clip.text_config.num_hidden_layers, clip.text_config.vocab_size = 1, 50
        whole = AutoModel.from_config(clip)
        whole.save_pretrained(tmp_path)
        model = MivpgForConditionalGeneration.from_vision_language_pretrained(
            tmp_path, folders / "gpt2", qformer_config=QFORMER
        )
        for name, weight in model.vision_model.state_dict().items():
            assert torch.equal(weight, whole.vision_model.state_dict()[name.removeprefix("vision_model.")])

    def test_the_image_mark_may_lie_outside_the_vocabulary(self, folders):
        model, processor = self.joined(folders, "clip_vision_model", "llama")
        assert processor.image_token_id == model.config.image_token_index == model.get_input_embeddings().num_embeddings
        inputs = processor(images=[pictures(2)], text="a photo of")
        ids = model.generate(**inputs, max_new_tokens=4, repetition_penalty=1.3, num_beams=2)
        assert ids.max() < model.get_input_embeddings().num_embeddings

    def test_generate_takes_what_transformers_takes(self, folders):
        model, processor = self.joined(folders, "siglip_vision_model", "opt")
        inputs = processor(images=[pictures(2), pictures(1)], text=["a", "a longer prompt"])
        output = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=True,
            num_return_sequences=3,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert output.sequences.shape[0] == 6 and len(output.scores) <= 4

    def test_captions_end_at_the_token_asked_for(self, folders):
        newline = EOS + 1 + 10
        model, processor = self.joined(folders, "siglip_vision_model", "opt", caption_end_token_id=newline)
        assert processor.caption_end_token_id == newline
        labels = processor(images=[pictures(1)], captions=["a chair"])["labels"]
        assert labels[0, -1] == newline
        inputs = processor(images=[pictures(1)], text="a")
        model.config.caption_end_token_id = int(model(**inputs).logits[0, -1].argmax())  # what it would write first
        assert model.generate(**inputs, max_new_tokens=9, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 1

    def test_batches_of_prompts_equal_single_ones(self, folders):
        model, processor = self.joined(folders, "clip_vision_model", "llama")
        bags, prompts = [pictures(3), pictures(1, seed=2)], ["a photo of", "a much longer prompt it is"]
        together = model.generate(**processor(images=bags, text=prompts), max_new_tokens=6, do_sample=False)
        for row, bag, prompt in zip(together, bags, prompts, strict=True):
            alone = model.generate(**processor(images=[bag], text=prompt), max_new_tokens=6, do_sample=False)
            assert torch.equal(row[-6:], alone[0, -6:])

    @pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True}])
    @pytest.mark.parametrize("base", ["pair", "blip2"])
    def test_quantization_leaves_what_trains_alone(self, folders, bits, base, tmp_path, monkeypatch):
        modules = pytest.importorskip("bitsandbytes.nn.modules")
        # Its fast way on some processors takes only widths that are multiples of 32, unlike these.
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: False, raising=False)  # older ones have none
        options = {"quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": "cpu"}}
        if base == "pair":
            model, processor = self.joined(folders, "clip_vision_model", "opt", **options)
        else:
            folder = save_blip2(tmp_path / "blip2")
            model = drawn(MivpgForConditionalGeneration.from_pretrained(folder, **options))
            processor = MivpgProcessor.from_pretrained(folder)
        quantized = {name.split(".")[0] for name, weight in model.named_parameters() if not weight.is_floating_point()}
        assert quantized == {"vision_model", "language_model"}
        batch = processor(images=[pictures(2)], text="a", captions=["a chair"])
        model(**batch).loss.backward()
        assert model.query_tokens.grad.abs().sum() > 0
        model.save_trained(tmp_path / "checkpoint")
        again = MivpgForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", **options)
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, model(**batch).logits)

    def test_weights_that_a_folder_lacks_are_an_error(self, folders, tmp_path):
        for kind, part in (("llama", "layers.1."), ("clip_vision_model", "layers.1.")):
            shutil.copytree(folders / kind, tmp_path / kind)
            weights = load_file(tmp_path / kind / "model.safetensors")
            kept = {name: weight for name, weight in weights.items() if part not in name}
            save_file(kept, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MivpgError, match=r"weights of the LlamaForCausalLM are missing"):
            MivpgForConditionalGeneration.from_vision_language_pretrained(
                None, tmp_path / "llama", image_embeds_size=8, qformer_config=QFORMER
            )
        with pytest.raises(MivpgError, match=r"weights of the CLIPVisionModel are missing"):
            MivpgForConditionalGeneration.from_vision_language_pretrained(
                tmp_path / "clip_vision_model", folders / "llama", qformer_config=QFORMER
            )

    def test_the_tower_of_a_blip2(self, folders, blip2_folder):
        model = MivpgForConditionalGeneration.from_vision_language_pretrained(
            blip2_folder, folders / "gpt2", qformer_config=QFORMER
        )
        own = Blip2ForConditionalGeneration.from_pretrained(blip2_folder).vision_model.state_dict()
        assert all(torch.equal(weight, own[name]) for name, weight in model.vision_model.state_dict().items())

    def test_embeddings_narrower_than_the_model(self, tmp_path):
        """As OPT-350m's."""
        folder = save_language_model(tmp_path / "opt", "opt", word_embed_proj_dim=16)
        model = MivpgForConditionalGeneration.from_vision_language_pretrained(
            None, folder, image_embeds_size=8, num_query_tokens=5, qformer_config=QFORMER
        )
        assert model.language_projection.weight.shape == (16, 32)
        processor = MivpgProcessor.from_vision_language_pretrained(None, folder, model.config)
        output = model(**processor(image_embeds=[torch.randn(2, 1, 8)], text="a", captions=["b"]))
        assert output.visual_prompts.shape == (1, 5, 16)

    def test_statistics_of_a_trained_part_are_in_the_checkpoint(self, folders, tmp_path):
        model, processor = self.joined(folders, "resnet", "opt", trainable=["vision_model", "qformer", "query_tokens"])
        batch = processor(images=[pictures(2)], text="a", captions=["b"])
        model.train()(**batch)  # a BatchNorm learns by looking
        model.eval().save_trained(tmp_path)
        again = MivpgForConditionalGeneration.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, model(**batch).logits)

    def test_settings_of_generation_survive(self, folders, tmp_path):
        model, _ = self.joined(folders, "clip_vision_model", "opt")
        model.language_model.generation_config.num_beams = 3
        model.language_model.generation_config.eos_token_id = [2, 7]
        model.save_pretrained(tmp_path)
        again = MivpgForConditionalGeneration.from_pretrained(tmp_path)
        assert again.language_model.generation_config.num_beams == 3
        assert again.language_model.generation_config.eos_token_id == [2, 7]

    def test_a_conversation_is_a_prompt(self, folders):
        _, processor = self.joined(folders, "clip_vision_model", "llama")
        template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
        processor.tokenizer.chat_template = template
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        processor.chat = True
        expected = processor(images=[pictures(2)], text="<image>What is it?")["input_ids"]
        assert torch.equal(processor(images=[pictures(2)], text=[turn])["input_ids"], expected)
        assert torch.equal(processor(images=[pictures(2)], text=[[turn]])["input_ids"], expected)
        rendered = processor.tokenizer.decode(expected[0]).replace("<image>", "")
        assert rendered == "<s>[user] What is it?\n[assistant] "
        assert (expected == processor.image_token_id).sum() == 5
        batch = processor(images=[pictures(2)], text=[turn], captions=["a chair"])
        assert torch.equal(batch["input_ids"][:, : expected.shape[1]], expected)
        assert processor.decode_captions(batch["labels"][:, expected.shape[1] :]) == ["a chair"]

    def test_a_tokenizer_that_ends_every_text(self, folders):
        """Its end belongs after the caption, not between prompt and caption."""
        _, plain = self.joined(folders, "clip_vision_model", "llama")
        ending = MivpgProcessor(plain.image_processor, byte_tokenizer("bart"), num_query_tokens=5)
        for captions in (None, ["a chair"]):
            inputs = {"images": [pictures(1)], "text": "it is", "captions": captions}
            assert torch.equal(ending(**inputs)["input_ids"], plain(**inputs)["input_ids"])

    @pytest.mark.parametrize("text", ["", "it is"])
    def test_a_tokenizer_whose_texts_begin_with_the_token_that_ends_them(self, folders, text):
        """OPT's: an empty prompt still begins, and no caption begins with its end."""
        _, plain = self.joined(folders, "clip_vision_model", "llama")
        tokenizer = byte_tokenizer("llama")
        tokenizer.eos_token = tokenizer.bos_token
        same = MivpgProcessor(plain.image_processor, tokenizer, num_query_tokens=5)
        inputs = {"images": [pictures(1)], "text": text}
        assert torch.equal(same(**inputs)["input_ids"], plain(**inputs)["input_ids"])
        batch = same(**inputs, captions=["a chair"])
        labels = batch["labels"][batch["labels"] != -100].tolist()
        assert labels.count(tokenizer.eos_token_id) == 1 and labels[-1] == tokenizer.eos_token_id

    def test_sixteen_bits_are_for_what_is_frozen(self, folders):
        model, processor = self.joined(folders, "clip_vision_model", "opt", dtype=torch.bfloat16)
        dtypes = {name.split(".")[0]: weight.dtype for name, weight in model.named_parameters()}
        assert dtypes["vision_model"] == dtypes["language_model"] == torch.bfloat16
        assert dtypes["qformer"] == dtypes["query_tokens"] == dtypes["language_projection"] == torch.float32
        batch = processor(images=[pictures(2)], text="a", captions=["a chair"])
        model(**batch).loss.backward()
        assert model.generate(**processor(images=[pictures(2)], text="a"), max_new_tokens=3).shape[0] == 1


class TestFreezing:
    """One list says what trains."""

    def test_frozen_parts_stay_in_eval_mode(self, blip2_folder):
        model = MivpgForConditionalGeneration.from_pretrained(blip2_folder, patch_pooling="abmil").train()
        for name, module in model.named_modules():
            frozen = name.split(".")[0] in ("vision_model", "language_model")
            assert module.training == (not frozen), name
        assert not any(m.training for m in model.eval().modules())

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_also_when_it_is_asked_again_and_something_was_frozen_meanwhile(self, data):
        model = tiny_model(tiny_config()).train()
        modules = list(model.modules())
        for module in data.draw(st.lists(st.sampled_from(modules), max_size=6)):
            module.requires_grad_(data.draw(st.booleans()))
        data.draw(st.sampled_from(modules)).train(data.draw(st.booleans()))
        model.train()
        told = dict.fromkeys(modules, True)
        for module in modules[1:]:  # a parent comes before what it holds
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                told |= dict.fromkeys(module.modules(), False)
        assert {module: module.training for module in modules} == told

    @pytest.mark.parametrize("trainable", [["language_projection"], ["vision_model", "qformer"], ["query_tokens"]])
    def test_the_list_is_what_has_gradients(self, blip2_folder, trainable):
        model = drawn(MivpgForConditionalGeneration.from_pretrained(blip2_folder, trainable=trainable))
        processor = MivpgProcessor.from_pretrained(blip2_folder)
        model.train()(**processor(images=[pictures(2)], text="a", captions=["a chair"])).loss.backward()
        assert {n.split(".")[0] for n, weight in model.named_parameters() if weight.grad is not None} == set(trainable)
        assert {n.split(".")[0] for n in model.saved_names()} == {*trainable, "qformer"}  # CSA is new, so it is saved

    def test_an_unknown_name_is_refused(self, blip2_folder):
        with pytest.raises(ValueError, match="'qformers'"):
            MivpgForConditionalGeneration.from_pretrained(blip2_folder, trainable=["qformers"])

    def test_recomputed_activations_change_nothing(self, blip2_folder):
        model = drawn(MivpgForConditionalGeneration.from_pretrained(blip2_folder, position_encoding="ppeg")).train()
        batch = MivpgProcessor.from_pretrained(blip2_folder)(images=[pictures(2)], text="a", captions=["a chair"])

        def gradients() -> dict[str, torch.Tensor]:
            model.zero_grad()
            torch.manual_seed(0)
            model(**batch).loss.backward()
            return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

        forwards = count_forwards(model)
        expected, calls_before = gradients(), dict(forwards)
        model.gradient_checkpointing_enable()
        result = gradients()
        for name, calls in forwards.items():  # every block ran twice, the frozen language model's too
            assert calls == 3 * calls_before[name], name
        assert result.keys() == expected.keys() and all(torch.equal(result[name], expected[name]) for name in result)
        model.gradient_checkpointing_disable()
        assert not any("forward" in vars(module) for module in model.language_model.modules())

    def test_where_no_gradient_is_asked_for_each_block_runs_once(self, blip2_folder):
        model = drawn(MivpgForConditionalGeneration.from_pretrained(blip2_folder)).eval()
        processor = MivpgProcessor.from_pretrained(blip2_folder)
        batch = processor(images=[pictures(2), pictures(1)], text=["a", "a red"], captions=["a chair", "a"])
        with torch.no_grad():
            expected = model(**batch).logits
            model.gradient_checkpointing_enable()
            forwards = count_forwards(model)
            assert torch.equal(model(**batch).logits, expected)
        assert set(forwards.values()) == {1}


def count_forwards(model) -> dict[str, int]:
    """Calls of the Q-Former's and the language model's feed-forward layers, by name."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.endswith(("fc1", "intermediate_query", "DenseReluDense")) and not name.startswith("vision_model"):
            counts[name] = 0
            module.register_forward_pre_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
    return counts


class TestCheckpoints:
    """A checkpoint is what trained, and the name of the rest."""

    @pytest.fixture
    def batch(self, blip2_folder):
        return MivpgProcessor.from_pretrained(blip2_folder)(
            images=[pictures(2), pictures(3)], text="a", captions=["b", "cd"]
        )

    def checkpoint(self, blip2_folder, tmp_path) -> MivpgForConditionalGeneration:
        model = drawn(MivpgForConditionalGeneration.from_pretrained(blip2_folder, patch_pooling="abmil"))
        model.save_trained(tmp_path / "checkpoint")
        MivpgProcessor.from_pretrained(blip2_folder).save_pretrained(tmp_path / "checkpoint")
        return model

    def test_loads_to_the_same_logits_and_is_as_large_as_what_trained(self, blip2_folder, tmp_path, batch):
        model = self.checkpoint(blip2_folder, tmp_path)
        again = MivpgForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
        size = (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
        assert trained <= size < trained + 30_000  # the header
        processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint")
        assert isinstance(processor, MivpgProcessor)
        assert torch.equal(
            processor(images=[pictures(2), pictures(3)], text="a", captions=["b", "cd"])["labels"], batch["labels"]
        )

    def test_saving_whole_gives_a_model_without_a_base(self, blip2_folder, tmp_path, batch):
        model = self.checkpoint(blip2_folder, tmp_path)
        model.save_pretrained(tmp_path / "whole")
        assert json.loads((tmp_path / "whole" / "config.json").read_text())["base"] is None
        again = MivpgForConditionalGeneration.from_pretrained(tmp_path / "whole")
        assert torch.equal(again(**batch).logits, model(**batch).logits)

    def test_goes_by_the_umask(self, blip2_folder, tmp_path):
        self.checkpoint(blip2_folder, tmp_path)
        modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "checkpoint").iterdir()}
        assert modes["model.safetensors"] == modes["config.json"]

    def test_raises_without_its_base_and_names_the_path(self, blip2_folder, tmp_path, batch):
        moved = tmp_path / "base"
        save_blip2(moved, "opt" if "opt" in blip2_folder.name else "t5")
        model = MivpgForConditionalGeneration.from_pretrained(moved)
        model.save_trained(tmp_path / "checkpoint")
        moved.rename(tmp_path / "elsewhere")
        with pytest.raises(MivpgError, match=str(moved)):
            MivpgForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
        again = MivpgForConditionalGeneration.from_pretrained(
            tmp_path / "checkpoint", base={"model": tmp_path / "elsewhere"}
        )
        assert torch.equal(again(**batch).logits, model(**batch).logits)

    def test_raises_with_another_base_and_names_the_path(self, blip2_folder, tmp_path):
        base = save_blip2(tmp_path / "base", seed=1)
        model = MivpgForConditionalGeneration.from_pretrained(base)
        model.save_trained(tmp_path / "checkpoint")
        save_blip2(base, seed=2)
        with pytest.raises(MivpgError, match=rf"{base} .* another one: sha256 of model.safetensors"):
            MivpgForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")

    def test_raises_on_a_missing_trained_weight(self, blip2_folder, tmp_path):
        self.checkpoint(blip2_folder, tmp_path)
        file = tmp_path / "checkpoint" / "model.safetensors"
        weights = load_file(file)
        del weights["language_projection.bias"]
        save_file(weights, file)
        with pytest.raises(MivpgError, match=r"1 trained weights are missing, first language_projection\.bias"):
            MivpgForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")

    def test_features_only_survives_saving(self, tmp_path):
        language = save_language_model(tmp_path / "llama", "llama")
        model = drawn(
            MivpgForConditionalGeneration.from_vision_language_pretrained(
                None, language, image_embeds_size=20, num_query_tokens=5, qformer_config=QFORMER
            )
        )
        processor = MivpgProcessor.from_vision_language_pretrained(None, language, model.config)
        features = [torch.randn(3, 1, 20), torch.randn(7, 1, 20)]
        batch = processor(image_embeds=features, text="a", captions=["b", "cd"])
        model.save_trained(tmp_path / "checkpoint")
        processor.save_pretrained(tmp_path / "checkpoint")
        model.save_pretrained(tmp_path / "whole")
        for folder in ("checkpoint", "whole"):
            again = MivpgForConditionalGeneration.from_pretrained(tmp_path / folder)
            assert again.config.vision_config is None and again.vision_model is None
            assert torch.equal(again(**batch).logits, model(**batch).logits)
        processor = MivpgProcessor.from_pretrained(tmp_path / "checkpoint")
        assert processor.image_processor is None
        inputs = processor(image_embeds=features, text="a")
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), again.generate(**inputs, max_new_tokens=4))
        with pytest.raises(ValueError, match="no vision model"):
            model(
                **processor(image_embeds=features) | {"image_embeds": None, "pixel_values": torch.zeros(2, 1, 3, 8, 8)}
            )

    def test_features_of_another_width_pass_a_projection(self, blip2_folder, tmp_path, batch):
        config = MivpgConfig.from_blip2(Blip2Config.from_pretrained(blip2_folder))
        config.vision_config, config.image_embeds_size = None, 20
        model = MivpgForConditionalGeneration.from_pretrained(blip2_folder, config=config)
        whole = MivpgForConditionalGeneration.from_pretrained(blip2_folder)
        name = "qformer.encoder.layer.0.crossattention.attention.key.weight"
        assert torch.equal(model.state_dict()[name], whole.state_dict()[name])
        assert model.instance_projection[1].weight.shape == (24, 20)
        inputs = {"image_embeds": torch.randn(2, 4, 17, 20), "input_ids": batch["input_ids"], "labels": batch["labels"]}
        assert model(**inputs).logits.isfinite().all()
        model.save_trained(tmp_path)
        assert torch.equal(
            MivpgForConditionalGeneration.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits
        )

    def test_another_list_of_what_trains(self, blip2_folder, tmp_path, batch):
        """Wider than before or narrower, nothing that was learned is lost."""
        first = MivpgForConditionalGeneration.from_pretrained(blip2_folder, trainable=["language_projection"])
        first.language_projection.weight.data *= 2
        first.save_trained(tmp_path / "1")
        wider = MivpgForConditionalGeneration.from_pretrained(tmp_path / "1", trainable=["qformer", "query_tokens"])
        assert torch.equal(wider(**batch).logits, first(**batch).logits)
        wider.query_tokens.data += torch.randn_like(wider.query_tokens)
        wider.save_trained(tmp_path / "2")
        again = MivpgForConditionalGeneration.from_pretrained(tmp_path / "2", trainable=["language_projection"])
        assert torch.equal(again(**batch).logits, wider(**batch).logits)
        assert not torch.equal(again(**batch).logits, first(**batch).logits)

    def test_other_options_than_it_was_trained_with(self, blip2_folder, tmp_path):
        self.checkpoint(blip2_folder, tmp_path)
        with pytest.raises(MivpgError, match="trained with other options"):
            MivpgForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", instance_correlation="none")
        with pytest.raises(MivpgError, match=r"trained with other options|are missing"):
            MivpgForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", instance_correlation="induced")

    def test_an_option_that_does_not_exist(self, blip2_folder):
        with pytest.raises(MivpgError, match=r"patch_pooling.*abmil"):
            MivpgForConditionalGeneration.from_pretrained(blip2_folder, patch_pooling="average")

    @pytest.mark.parametrize("content", [None, "{}", '{"model_type": "bert"}', "not json"])
    def test_a_folder_that_is_no_model(self, tmp_path, content):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(MivpgError, match=str(tmp_path)):
            MivpgForConditionalGeneration.from_pretrained(tmp_path)

    def test_a_folder_without_weights(self, blip2_folder, tmp_path):
        (tmp_path / "config.json").write_text((blip2_folder / "config.json").read_text())
        with pytest.raises(MivpgError, match=str(tmp_path)):
            MivpgForConditionalGeneration.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MivpgForConditionalGeneration:
    return MivpgForConditionalGeneration.from_pretrained(save_blip2(tmp_path_factory.mktemp("blip2")))


class TestInputs:
    """What does not fit together is refused with both numbers."""

    def test_number_of_image_marks(self, model):
        with pytest.raises(ValueError, match=r"\[4\] image marks, the model makes \[5\] visual prompts"):
            model(image_embeds=torch.randn(1, 2, 17, 24), input_ids=torch.full((1, 4), model.config.image_token_index))

    def test_width(self, model):
        with pytest.raises(ValueError, match=r"D = 24; these are \(1, 2, 17, 23\)"):
            model.get_instances(torch.randn(1, 2, 17, 23))

    def test_a_bag_without_images(self, model):
        with pytest.raises(ValueError, match="without a real image"):
            model.get_instances(torch.randn(2, 2, 17, 24), torch.tensor([[1, 1], [0, 0]]))

    def test_padding_in_the_middle(self, model):
        with pytest.raises(ValueError, match="end of a bag"):
            model.get_visual_prompts(torch.randn(1, 3, 17, 24), torch.tensor([[1, 0, 1]]))

    def test_cls_of_a_model_without_one(self):
        with pytest.raises(ValueError, match="num_prefix_tokens is 0"):
            MivpgConfig(patch_pooling="cls", num_prefix_tokens=0)

    def test_both_pixels_and_features(self, model):
        with pytest.raises(ValueError, match="either pixel_values or image_embeds"):
            model(input_ids=torch.zeros(1, 5, dtype=torch.long))

    def test_shapes(self, model):
        embeds, ppeg = torch.randn(1, 2, 17, 24), tiny_model(tiny_config(position_encoding="ppeg"))
        with pytest.raises(MivpgError, match=r"bags of images \(B, N, 3, h, w\); these are \(2, 3, 28, 28\)"):
            model.get_image_embeds(torch.zeros(2, 3, 28, 28))
        for empty in ((1, 0, 17, 24), (1, 2, 0, 24)):
            with pytest.raises(MivpgError, match=rf"image_embeds are \({empty[0]}, {empty[1]}, {empty[2]}, 24\)"):
                model.get_instances(torch.zeros(empty))
        with pytest.raises(MivpgError, match=r"image_mask is \(1, 3\), image_embeds \(1, 2, 17, 24\)"):
            model.get_instances(embeds, torch.ones(1, 3))
        for num_tokens in (9, 11, 1 + 3):  # a square with CLS, ten patches, three
            with pytest.raises(MivpgError, match=rf"{num_tokens} tokens an image less 1 before the patches"):
                ppeg.get_visual_prompts(torch.randn(1, 2, num_tokens, 12))
        for wrong in ((1, 2, 4), (1, 3, 2)):
            message = rf"image_coords are \(1, {wrong[1]}, {wrong[2]}\); for these bags .* is \(1, 2, 2\)"
            with pytest.raises(MivpgError, match=message):
                ppeg.get_visual_prompts(torch.randn(1, 2, 1, 12), image_coords=torch.zeros(wrong))

    @pytest.mark.parametrize("mask", [[0, 1, 1], [1, 0, 1], [1, 1, 0, 1]])
    def test_padding_before_an_image(self, mask):
        with pytest.raises(MivpgError, match="Padding has to stand at the end of a bag"):
            tiny_model().get_visual_prompts(torch.randn(1, len(mask), 10, 12), torch.tensor([mask]))

    def test_a_captioner_without_a_language_model_or_an_image_mark(self):
        config = tiny_config()
        config.text_config = None
        with pytest.raises(MivpgError, match="text_config is None"):
            MivpgForConditionalGeneration(config)
        model = tiny_model()
        model.config.image_token_index = None
        with pytest.raises(MivpgError, match="image_token_index is None"):
            model(input_ids=torch.zeros(1, 5, dtype=torch.long), image_embeds=torch.randn(1, 1, 10, 12))


@torch.no_grad()
def test_a_text_without_a_mask_is_real_throughout():
    model, (embeds, mask) = tiny_model(), random_bags((3, 2))
    ids = torch.tensor([[IMAGE_TOKEN_ID] * NUM_QUERIES + [5, 6, 7]] * 2)
    inputs = {"input_ids": ids, "image_embeds": embeds, "image_mask": mask}
    with_mask = inputs | {"attention_mask": torch.ones_like(ids)}
    assert torch.equal(model(**inputs).logits, model(**with_mask).logits)
    cut = inputs | {"attention_mask": torch.tensor([[0, 0, *[1] * (ids.shape[1] - 2)]] * 2)}
    assert (model(**inputs).logits - model(**cut).logits)[:, -1].abs().max() > 1e-3
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    expected, found = model.generate(**with_mask, **options), model.generate(**inputs, **options)
    assert all(torch.equal(one, other) for one, other in zip(found.logits, expected.logits, strict=True))
    beams = options | {"num_beams": 3, "output_scores": True}  # where the prompts are read before, once a bag
    expected_beams, found_beams = model.generate(**with_mask, **beams), model.generate(**inputs, **beams)
    assert torch.equal(found_beams.sequences_scores, expected_beams.sequences_scores)
    shorter = model.generate(**cut, **options)
    assert (shorter.logits[0] - expected.logits[0]).abs().max() > 1e-3


def test_flash_attention_is_refused():
    """It has no float32, which the Q-Former is."""
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        MivpgQFormerModel._from_config(tiny_config().qformer_config, attn_implementation="flash_attention_2")


def test_the_embeddings_are_the_language_models():
    model, new = tiny_model(), torch.nn.Embedding(50, 16)
    language_model = model.language_model
    assert model.get_input_embeddings() is language_model.get_input_embeddings()
    assert model.get_output_embeddings() is language_model.get_output_embeddings()
    model.set_input_embeddings(new)
    assert language_model.get_input_embeddings() is new
    head = torch.nn.Linear(16, 50)
    model.set_output_embeddings(head)
    assert language_model.get_output_embeddings() is head


def test_bags_are_classified_from_pixels_as_from_features():
    config = tiny_config(vision_config=tiny_vit_config())
    config.text_config = None
    torch.manual_seed(0)
    model = MivpgForBagClassification(config).eval()
    pixel_values, image_mask = torch.randn(2, 3, 3, 12, 12), torch.tensor([[1, 1, 1], [1, 0, 0]])
    image_embeds = model.get_image_embeds(pixel_values, image_mask)
    expected = model(image_embeds=image_embeds, image_mask=image_mask).logits
    assert torch.equal(model(pixel_values=pixel_values, image_mask=image_mask).logits, expected)
    for inputs in ({}, {"pixel_values": pixel_values, "image_embeds": image_embeds}):
        with pytest.raises(MivpgError, match="either pixel_values or image_embeds"):
            model(**inputs)
    with_given = MivpgForBagClassification(config, vision_model=model.vision_model)
    assert with_given.vision_model is model.vision_model


def test_probabilities_are_of_the_last_axis():
    """Of instances (B, M, C) as of bags."""
    binary, many = torch.randn(2, 4, 1), torch.randn(2, 1, 3)
    one = 1 / (1 + (-binary).exp())
    torch.testing.assert_close(class_probabilities(binary), torch.cat([1 - one, one], dim=2))
    torch.testing.assert_close(class_probabilities(many), many.exp() / many.exp().sum(dim=2, keepdim=True))


def test_llm_decides_for_itself_what_it_is(tmp_path):
    """BLIP-2's rule takes BART for decoder-only, because BART has a causal class too."""
    folder = save_language_model(tmp_path / "bart", "bart")
    model = MivpgForConditionalGeneration.from_vision_language_pretrained(
        None, folder, image_embeds_size=8, qformer_config=QFORMER
    )
    assert model.config.is_encoder_decoder
    assert type(model.language_model) is not type(AutoModelForCausalLM.from_pretrained(folder))


def test_models_of_the_hub_are_pinned_by_their_commit(tmp_path):
    """In a cache as huggingface_hub lays it out, without a network."""
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}

    def cached(repository: str, commit: str, revision: str) -> Path:
        folder = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        return folder / "snapshots" / commit

    save_blip2(cached("shop/blip2", "a" * 40, "main"))
    model = drawn(MivpgForConditionalGeneration.from_pretrained("shop/blip2", **hub))
    assert model.config.base == {"model": {"path": "shop/blip2", "revision": "a" * 40}}
    batch = MivpgProcessor.from_pretrained("shop/blip2", **hub)(images=[pictures(2)], text="a", captions=["b"])
    model.save_trained(tmp_path / "1")
    again = MivpgForConditionalGeneration.from_pretrained(tmp_path / "1", **hub)
    assert torch.equal(again(**batch).logits, model(**batch).logits)

    save_language_model(cached("shop/llama", "b" * 40, "main"), "llama", seed=1)
    save_language_model(cached("shop/llama", "c" * 40, "v2"), "llama", seed=2)
    pair = MivpgForConditionalGeneration.from_vision_language_pretrained(
        None, "shop/llama", image_embeds_size=8, qformer_config=QFORMER, language_revision="v2", **hub
    )
    assert pair.config.base["language_model"]["revision"] == "c" * 40
    pair.save_trained(tmp_path / "2")
    again = MivpgForConditionalGeneration.from_pretrained(tmp_path / "2", **hub)
    weights = again.language_model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in pair.language_model.state_dict().items())
    with pytest.raises(MivpgError, match="shop/llama"):
        MivpgForConditionalGeneration.from_pretrained(tmp_path / "2", cache_dir=tmp_path, local_files_only=True)
