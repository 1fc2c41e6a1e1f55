"""The folded form for large bags is the same attention: equations, gradients, maps, dropout; and when it is taken."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mivpg import folded_attention
from mivpg.layers import CorrelatedSelfAttention
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from reference import Setting
from test_equations import compare, model_of
from tiny import random_bags, random_coords, tiny_config, tiny_model

LENGTHS = (5, 1, 2)
CORRELATIONS = ("none", "csa", "csa_constant")


@pytest.fixture
def always_folded(monkeypatch):
    """Whatever the size of a bag; counts how often it is asked."""
    asked = []
    monkeypatch.setattr(folded_attention, "pays", lambda *_: asked.append(1) or True)
    monkeypatch.setattr(folded_attention, "CHUNK", 2)  # these bags are small
    return asked


@pytest.mark.parametrize("position_encoding", ["none", "ppeg"])
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_it_computes_the_equations(always_folded, correlation, position_encoding, record_property):
    """Against the loop-by-loop transcription, in float64, padding included."""
    image_embeds, image_mask = random_bags(LENGTHS, num_patches=1)
    coords = random_coords(LENGTHS, side=4).double() if position_encoding == "ppeg" else None
    setting = Setting("cls", correlation, position_encoding)
    difference = compare(setting, image_embeds.double(), image_mask, coords)
    record_property("folded attention against the transcription", difference)
    assert len(always_folded) >= 3


def gradients(model: MivpgForConditionalGeneration, *inputs: Tensor) -> dict[str, Tensor]:
    """Of every parameter and of the instances."""
    image_embeds = inputs[0].clone().requires_grad_()
    model.zero_grad()
    model.get_visual_prompts(image_embeds, *inputs[1:]).embeds.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"image_embeds": image_embeds.grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_gradients_are_those_of_straightforward_attention(monkeypatch, correlation, checkpointing, record_property):
    model = model_of(Setting("cls", correlation, "none")).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    image_embeds, image_mask = random_bags(LENGTHS, num_patches=1)
    expected = gradients(model, image_embeds.double(), image_mask)
    monkeypatch.setattr(folded_attention, "pays", lambda *_: True)
    monkeypatch.setattr(folded_attention, "CHUNK", 2)
    folded = gradients(model, image_embeds.double(), image_mask)
    assert folded.keys() == expected.keys()  # the key's bias among them, whose gradient is zero
    largest = max((folded[name] - expected[name]).abs().max().item() for name in expected)
    record_property("gradients of folded attention", largest)
    assert largest < 1e-10


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_maps_are_the_same(monkeypatch, implementation):
    model = tiny_model(tiny_config("cls"))
    model.qformer.set_attn_implementation(implementation)
    image_embeds, image_mask = random_bags(LENGTHS, num_patches=1)

    def maps() -> tuple[Tensor, ...]:
        instances, mask = model.get_instances(image_embeds, image_mask)
        queries = model.query_tokens.expand(len(instances), -1, -1)
        return model.qformer(
            query_embeds=queries,
            encoder_hidden_states=instances,
            encoder_attention_mask=mask,
            output_attentions=True,
        ).cross_attentions

    with torch.no_grad():
        model.qformer.set_attn_implementation("eager")  # sdpa keeps no maps
        expected = maps()
        monkeypatch.setattr(folded_attention, "pays", lambda *_: True)
        model.qformer.set_attn_implementation(implementation)
        folded = maps()
    assert len(folded) == len(expected) == 3
    for one, other in zip(folded, expected, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() < 1e-6
        assert (one * (1 - image_mask[:, None, None])).abs().max() < 1e-6  # padding is not looked at


def test_attention_maps_have_the_gradients_of_straightforward_ones(monkeypatch):
    """Alone, and beside what was read."""
    attention = model_of(Setting("cls", "csa", "none")).qformer.encoder.layer[2].crossattention.attention
    attention.config._attn_implementation = "eager"
    queries, instances = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 12).double().requires_grad_()
    mask = torch.zeros(2, 1, 1, 7).double()
    mask[1, ..., 4:] = -torch.inf

    def run(part: slice) -> Tensor:
        outputs = attention(queries, encoder_hidden_states=instances, encoder_attention_mask=mask)[part]
        return torch.autograd.grad(sum(output.square().sum() for output in outputs), instances)[0]

    parts = (slice(1, 2), slice(0, 2))
    expected = [run(part) for part in parts]
    monkeypatch.setattr(folded_attention, "pays", lambda *_: True)
    for part, gradient in zip(parts, expected, strict=True):
        assert gradient.any() and (run(part) - gradient).abs().max() < 1e-10


@pytest.mark.parametrize("part", ["csa", "cross-attention"])
def test_dropped_weights_leave_the_mean_where_it_was(always_folded, part):
    """The mean over many draws is what comes without dropout, biases included; each draw is another."""
    torch.manual_seed(0)
    model = model_of(Setting("cls", "csa", "none")).qformer.encoder.layer[2].float()
    correlation, attention = model.instance_correlation, model.crossattention.attention
    queries, instances = torch.randn(1, 5, 16), torch.randn(1, 7, attention.key.in_features)

    def run(number: int) -> Tensor:
        """Of that many bags which are the same."""
        queries_of_each, of_each = queries.repeat(number, 1, 1), instances.repeat(number, 1, 1)
        if part == "csa":
            return correlation(of_each, None, queries_of_each, queries_of_each) - of_each
        return attention(queries_of_each, encoder_hidden_states=of_each)[0]

    with torch.no_grad():
        exact = run(1)
        correlation.attention_dropout = attention.attention_dropout = 0.3
        assert torch.equal(run(1), exact)
        model.train()
        draws = run(4000)
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(dim=0) - exact).abs()
    assert (error < 5 * draws.std(dim=0) / len(draws) ** 0.5 + 1e-5).all()


def test_under_bf16_autocast_it_differs_as_little_as_straightforward_attention_does(monkeypatch, record_property):
    model = model_of(Setting("cls", "csa", "none")).float().train()
    image_embeds, image_mask = random_bags(LENGTHS, num_patches=1)
    exact = gradients(model, image_embeds, image_mask)

    def in_bf16() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, image_embeds, image_mask)
        assert all(found[name].dtype == exact[name].dtype for name in exact)
        return sum((found[name] - exact[name]).square().sum().item() for name in exact) ** 0.5

    straightforward = in_bf16()
    monkeypatch.setattr(folded_attention, "pays", lambda *_: True)
    monkeypatch.setattr(folded_attention, "CHUNK", 2)
    folded = in_bf16()
    record_property("bf16: error of folded gradients over that of straightforward ones", folded / straightforward)
    assert folded < 1.5 * straightforward


@pytest.mark.slow
def test_compiled_it_computes_the_same(monkeypatch):
    """A block as one graph, whatever the size of the bag; `aot_eager` needs no C++ compiler."""
    batch_size = 2
    monkeypatch.setattr(folded_attention, "pays", lambda *_: True)
    monkeypatch.setattr(folded_attention, "CHUNK", 2)
    layer = model_of(Setting("cls", "csa", "none")).qformer.encoder.layer[2].train()

    def run(block, num_instances: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(num_instances)
        queries = torch.randn(batch_size, 5, 16, dtype=torch.float64, generator=generator).requires_grad_()
        instances = torch.randn(
            batch_size, num_instances, 12, dtype=torch.float64, generator=generator
        ).requires_grad_()
        layer.zero_grad()
        outputs = block(queries, instances, queries)
        sum(output.square().sum() for output in outputs).backward()
        return [*outputs, queries.grad, instances.grad, *(parameter.grad.clone() for parameter in layer.parameters())]

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    try:
        for num_instances in (3, 5):
            for one, other in zip(run(compiled, num_instances), run(layer, num_instances), strict=True):
                assert (one - other).abs().max() < 1e-10
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("part", ["csa", "cross-attention"])
def test_gradients_under_dropout_are_those_of_finite_differences(always_folded, part):
    """The same weights are dropped in each call."""
    torch.manual_seed(0)
    model = model_of(Setting("cls", "csa", "none")).qformer.encoder.layer[2].double().train()
    correlation, attention = model.instance_correlation, model.crossattention.attention
    correlation.attention_dropout = attention.attention_dropout = 0.4
    queries = torch.randn(1, 2, 16, dtype=torch.float64, requires_grad=True)
    instances = torch.randn(1, 3, correlation.query.in_features, dtype=torch.float64, requires_grad=True)

    def run(instances: Tensor, queries: Tensor) -> Tensor:
        torch.manual_seed(1)
        if part == "csa":
            return correlation(instances, None, queries, queries)
        return attention(queries, encoder_hidden_states=instances)[0]

    assert torch.autograd.gradcheck(run, (instances, queries))


def test_dropout_under_bf16_autocast_has_the_gradients_of_float32(always_folded):
    torch.manual_seed(0)
    correlation = model_of(Setting("cls", "csa", "none")).qformer.encoder.layer[2].instance_correlation.float().train()
    correlation.attention_dropout = 0.5
    queries, instances = torch.randn(1, 5, 16), torch.randn(1, 7, correlation.query.in_features)
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        leaf = instances.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            correlation(leaf, None, queries, queries).float().square().sum().backward()
        found.append(leaf.grad)
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()


def test_it_is_taken_for_large_bags_alone(monkeypatch):
    """And only where the queries of all heads are fewer than the width that is folded away."""
    taken = []
    folding = folded_attention.instances_ask
    monkeypatch.setattr(
        folded_attention, "instances_ask", lambda *a, **k: taken.append(a[0].shape[1]) or folding(*a, **k)
    )
    config = tiny_config("cls", num_attention_heads=2).qformer_config
    correlation = CorrelatedSelfAttention(config).eval()
    for length, num_queries in ((2047, 5), (2048, 5), (2048, 8)):
        instances, queries = torch.randn(1, length, config.encoder_hidden_size), torch.randn(1, num_queries, 16)
        correlation(instances, None, queries, queries)
    assert taken == [2048]  # 2 heads of 8 queries are as many as 16 columns


def test_a_large_bag_is_captioned_as_its_straightforward_form_captions_it(monkeypatch):
    model = tiny_model(tiny_config("cls"))
    monkeypatch.setattr(folded_attention, "FOLD_FROM", 10**9)
    image_embeds = torch.randn(1, 3000, 1, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.get_visual_prompts(image_embeds).embeds
        monkeypatch.setattr(folded_attention, "pays", lambda *_: True)
        folded = model.get_visual_prompts(image_embeds).embeds
    assert not torch.equal(folded, expected)
    assert (folded - expected).abs().max() < 1e-5 * expected.abs().max()


def test_instances_with_much_in_common_have_gradients_in_bf16(always_folded, monkeypatch):
    """What all instances share adds up to nothing behind a softmax, and has to do so when it is rounded."""
    monkeypatch.setattr(folded_attention, "CHUNK", 500)
    torch.manual_seed(0)
    attention = model_of(Setting("cls", "csa", "none")).float().qformer.encoder.layer[2].crossattention.attention
    width = attention.key.in_features
    instances = 3 * torch.randn(width) + torch.randn(1, 3000, width)
    queries = torch.randn(1, 5, 16, requires_grad=True)

    def gradient(dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            read = attention(queries, encoder_hidden_states=instances.requires_grad_())[0]
        return torch.autograd.grad((read.float() * torch.arange(16)).sum(), queries)[0]

    exact = gradient(torch.float32)
    folded_error = (gradient(torch.bfloat16) - exact).norm() / exact.norm()
    monkeypatch.setattr(folded_attention, "pays", lambda *_: False)
    straightforward_error = (gradient(torch.bfloat16) - exact).norm() / exact.norm()
    assert folded_error < 0.5 * straightforward_error


@pytest.mark.parametrize("correlation", ["none", "csa"])
def test_features_that_do_not_train_get_no_gradient(always_folded, correlation):
    model = model_of(Setting("cls", correlation, "none"))
    image_embeds, image_mask = random_bags(LENGTHS, num_patches=1)
    expected = gradients(model, image_embeds.double(), image_mask)
    model.zero_grad()
    model.get_visual_prompts(image_embeds.double(), image_mask).embeds.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name]), name


class TestRecomputing:
    """Three blocks update a bag: the first and the third time it is kept as what it was made of."""

    NUM_INSTANCES = 1000

    @pytest.fixture(autouse=True)
    def bags_are_large(self, monkeypatch):
        monkeypatch.setattr(folded_attention, "pays", lambda *_: True)
        monkeypatch.setattr(folded_attention, "FOLD_FROM", 8)
        monkeypatch.setattr(folded_attention, "CHUNK", 300)

    @pytest.fixture
    def makes(self, monkeypatch) -> list[Tensor]:
        """What has been made again."""
        made = []
        make = folded_attention._Update.make
        monkeypatch.setattr(folded_attention._Update, "make", lambda self: made.append(make(self)) or made[-1])
        return made

    def run(self, model: MivpgForConditionalGeneration) -> tuple[dict[str, Tensor], int]:
        """Gradients, and the bytes that are held between the passes."""
        torch.manual_seed(1)
        bag = torch.randn(1, self.NUM_INSTANCES, 1, 12, dtype=torch.float64, requires_grad=True)
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = model.get_visual_prompts(bag).embeds.square().sum()
        events = profiler.profiler.kineto_results.events()
        held = sum(event.nbytes() for event in events if event.name() == "[memory]")
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return found | {"bag": bag.grad}, held

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_gradients_are_the_same_and_less_is_held(self, monkeypatch, makes, dropout):
        model = model_of(Setting("cls", "csa", "none")).train()
        for layer in model.qformer.encoder.layer:
            if layer.has_cross_attention:
                layer.instance_correlation.attention_dropout = dropout
        found, held = self.run(model)
        assert len(makes) == 2
        monkeypatch.setattr(type(model.qformer), "_recomputing_instances", lambda *_: nullcontext())
        expected, all_held = self.run(model)
        assert len(makes) == 2
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
        bag_bytes = self.NUM_INSTANCES * 12 * 8
        assert all_held - held == pytest.approx(2 * bag_bytes, rel=0.05)

    @pytest.mark.parametrize(("num_instances", "num_made"), [(7, 0), (8, 2)])
    def test_bags_are_large_from_the_number_on(self, makes, num_instances, num_made):
        model = model_of(Setting("cls", "csa", "none")).train()
        bag = torch.randn(1, num_instances, 1, 12, dtype=torch.float64)
        model.get_visual_prompts(bag).embeds.square().sum().backward()
        assert len(makes) == num_made

    def test_what_was_made_again_goes_with_its_last_reader(self, monkeypatch, makes):
        updates = []
        note = folded_attention.RecomputingInstances.note
        remember = lambda self, updated, update: updates.append(update) or note(self, updated, update)  # noqa: E731
        monkeypatch.setattr(folded_attention.RecomputingInstances, "note", remember)
        bag = torch.randn(1, self.NUM_INSTANCES, 1, 12, dtype=torch.float64)
        model_of(Setting("cls", "csa", "none")).train().get_visual_prompts(bag).embeds.square().sum().backward()
        assert len(makes) == 2 and len(updates) == 3
        assert all(update.made is None for update in updates)

    def test_a_graph_can_be_gone_through_twice(self, makes):
        model = model_of(Setting("cls", "csa", "none"))
        bag = torch.randn(1, self.NUM_INSTANCES, 1, 12, dtype=torch.float64, requires_grad=True)
        loss = model.get_visual_prompts(bag).embeds.square().sum()
        (first,) = torch.autograd.grad(loss, bag, retain_graph=True)
        (second,) = torch.autograd.grad(loss, bag)
        assert torch.equal(first, second) and len(makes) == 4

    @pytest.mark.parametrize(
        ("position_encoding", "instances_carry_over"), [("ppeg", True), ("none", False), ("ppeg", False)]
    )
    def test_bags_that_are_placed_or_begin_anew(self, monkeypatch, makes, position_encoding, instances_carry_over):
        model = model_of(Setting("cls", "csa", position_encoding)).train()
        model.qformer.config.instances_carry_over = instances_carry_over
        found, _ = self.run(model)
        assert len(makes) == 3  # none is made of one that is made again
        monkeypatch.setattr(type(model.qformer), "_recomputing_instances", lambda *_: nullcontext())
        for name, gradient in self.run(model)[0].items():
            assert torch.equal(found[name], gradient), name

    def test_what_is_never_gone_back_through_goes(self):
        model = model_of(Setting("cls", "csa", "none")).train()
        bag = torch.randn(1, self.NUM_INSTANCES, 1, 12, dtype=torch.float64, requires_grad=True)
        alive = weakref.ref(bag)
        prompts = model.get_visual_prompts(bag).embeds
        del bag, prompts
        gc.collect()
        assert alive() is None

    @pytest.mark.slow
    def test_blocks_that_are_compiled_keep_all(self, monkeypatch, makes):
        monkeypatch.setattr(folded_attention, "CHUNK", 1000)  # the fewer, the sooner compiled
        model = model_of(Setting("cls", "csa", "none")).train()
        expected, _ = self.run(model)
        assert len(makes) == 2
        for layer in model.qformer.encoder.layer:
            layer.compile(backend="aot_eager", fullgraph=True)
        try:
            found, _ = self.run(model)
        finally:
            torch.compiler.reset()
        assert len(makes) == 2
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-9)

    def test_gradient_checkpointing_does_it_all_by_itself(self, makes):
        model = model_of(Setting("cls", "csa", "none")).train()
        model.gradient_checkpointing_enable()
        self.run(model)
        assert not makes and not folded_attention._recomputing.of_thread
