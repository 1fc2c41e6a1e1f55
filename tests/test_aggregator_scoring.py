"""mi-Net, DS-MIL and DTFD-MIL compute what their papers say: torchmil's numbers, or those of a plain loop."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmil.models import DSMIL, DTFDMIL
from torchmil.nn import AttentionPool

from mivpg.aggregators.base import ScoringAggregator
from mivpg.aggregators.scoring import DsMil, DtfdMil, InstanceNet
from mivpg.errors import MivpgError
from tiny import random_bags, randomize_weights

WIDTH, NUM_TOKENS = 7, 2
LENGTHS = (5, 1, 3)

KINDS = {
    "mi-Net max": InstanceNet,
    "mi-Net mean": partial(InstanceNet, pooling="mean"),
    "mi-Net lse": partial(InstanceNet, pooling="lse"),
    "DS-MIL": DsMil,
    "DS-MIL with values": partial(DsMil, project_values=True),
    "DTFD-MIL afs": DtfdMil,
    "DTFD-MIL max_s": partial(DtfdMil, distill="max_s"),
    "DTFD-MIL max_min_s": partial(DtfdMil, distill="max_min_s", num_groups=3, instances_per_group=2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_num_labels = pytest.mark.parametrize("num_labels", [1, 2, 3])


def make(kind: str, num_labels: int = 1, width: int = WIDTH, seed: int = 0) -> ScoringAggregator:
    """In eval mode, with weights large enough for all of them to be seen."""
    torch.manual_seed(seed)
    model = KINDS[kind](width, num_labels=num_labels).eval()
    randomize_weights(model, 0.1, generator=torch.Generator().manual_seed(seed))
    return model


def make_bags(lengths: tuple[int, ...] = LENGTHS, num_tokens: int = NUM_TOKENS, seed: int = 0) -> tuple[Tensor, Tensor]:
    return random_bags(lengths, num_tokens, WIDTH, seed)


def make_labels(num_labels: int) -> Tensor:
    return torch.tensor([1, 0, max(num_labels, 2) - 1])


def loss_of(logits: Tensor, label: int) -> float:
    """Of one bag (C,), written out."""
    if len(logits) == 1:
        p = 1 / (1 + math.exp(-logits.item()))
        return -math.log(p if label == 1 else 1 - p)
    exponents = [math.exp(logit) for logit in logits.tolist()]
    return -math.log(exponents[label] / sum(exponents))


# ── What holds for all ──────────────────────────────────────────────────────────────────────────────────────────────


@every_kind
@every_num_labels
def test_shapes_and_a_loss_if_there_are_labels(kind, num_labels):
    model, (embeds, mask) = make(kind, num_labels), make_bags()
    scores = model(embeds, mask)
    assert scores.logits.shape == (3, num_labels)
    assert scores.instance_scores.shape == (3, 5 * NUM_TOKENS, num_labels)
    assert scores.loss is None
    with_loss = model(embeds, mask, labels=make_labels(num_labels))
    assert with_loss.loss.shape == ()
    assert torch.equal(with_loss.logits, scores.logits)


@every_kind
@every_num_labels
def test_padding_is_inert(kind, num_labels):
    """NaN there changes nothing, neither scores nor gradients."""
    model, (embeds, mask) = make(kind, num_labels), make_bags()
    garbage = embeds.masked_fill(~mask.bool()[:, :, None, None], torch.nan)
    results = []
    for inputs in (embeds.requires_grad_(), garbage.requires_grad_()):
        model.zero_grad()
        scores = model(inputs, mask, labels=make_labels(num_labels))
        scores.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([scores.logits, scores.instance_scores, scores.loss, inputs.grad, *gradients])
    for clean, dirty in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)
    padding = ~mask.bool().repeat_interleave(NUM_TOKENS, 1)
    assert (scores.instance_scores[padding] == 0).all()
    assert (scores.instance_scores[~padding] != 0).any(dim=-1).all()


@every_kind
@every_num_labels
def test_a_ragged_batch_equals_its_bags_one_by_one(kind, num_labels):
    """With enough bags that in some of them every instance has a lower score than padding, a zero vector, would."""
    lengths = (5, 1, 3, *[2] * 12)
    model, (embeds, mask) = make(kind, num_labels), make_bags(lengths, num_tokens=1)
    labels = torch.arange(len(lengths)) % max(num_labels, 2)
    together = model(embeds, mask, labels=labels)
    losses = []
    for index, length in enumerate(lengths):
        alone = model(embeds[index : index + 1, :length], labels=labels[index : index + 1])
        losses.append(alone.loss)
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            together.instance_scores[index, :length], alone.instance_scores[0], atol=1e-5, rtol=0
        )
    torch.testing.assert_close(together.loss, torch.stack(losses).mean(), atol=1e-5, rtol=0)


@every_kind
@every_num_labels
def test_the_order_of_instances_does_not_matter(kind, num_labels):
    """For DTFD-MIL it does, whose pseudo-bags are made by it: there, only that inside a pseudo-bag does not."""
    model, (embeds, _) = make(kind, num_labels), make_bags((24,), num_tokens=1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = model(embeds[:, order])
    scores = model(embeds)
    if isinstance(model, DtfdMil):
        assert (shuffled.logits - scores.logits).abs().max() > 1e-4
        order = torch.arange(24).roll(model.num_groups)
        shuffled = model(embeds[:, order])
    torch.testing.assert_close(shuffled.logits, scores.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(shuffled.instance_scores, scores.instance_scores[:, order], atol=1e-5, rtol=0)


@every_kind
@every_num_labels
def test_every_parameter_gets_a_gradient(kind, num_labels):
    model, (embeds, mask) = make(kind, num_labels).train(), make_bags()
    torch.manual_seed(0)
    model(embeds, mask, labels=make_labels(num_labels)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if "max_" in kind else ()) for kind in KINDS]
)
def test_a_toy_problem_is_learnt(kind):
    """A bag is positive if one of its instances carries the signal; that instance is found.

    A pooled mean of one certain instance among eight is 1/8, so that the loss stays near that of guessing, 0.69.
    """
    torch.manual_seed(0)
    model = make(kind).train()
    generator = torch.Generator().manual_seed(1)

    def draw(num_bags: int) -> tuple[Tensor, Tensor, Tensor]:
        embeds = torch.randn(num_bags, 8, 1, WIDTH, generator=generator) * 0.5
        labels = torch.arange(num_bags) % 2
        signal = torch.randint(8, (num_bags,), generator=generator)
        embeds[torch.arange(num_bags), signal, 0, 0] += 4.0 * labels
        return embeds, labels, signal

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100 if kind.startswith("mi-Net") else 50):
        embeds, labels, _ = draw(16)
        optimizer.zero_grad()
        model(embeds, labels=labels).loss.backward()
        optimizer.step()
    embeds, labels, signal = draw(100)
    with torch.no_grad():
        scores = model.eval()(embeds)
    loss = F.binary_cross_entropy_with_logits(scores.logits[:, 0], labels.float())
    found = scores.instance_scores[:, :, 0].argmax(dim=1) == signal
    print(f"{kind}: loss {loss:.4f}, found {found[labels == 1].float().mean():.2f}")
    assert loss < (0.65 if kind in ("mi-Net mean", "mi-Net lse") else 0.25)
    positive, negative = scores.logits[labels == 1], scores.logits[labels == 0]
    assert (positive > negative.T).float().mean() > 0.99  # the area under the ROC curve
    assert found[labels == 1].all()


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: InstanceNet(4, num_labels=0), "num_labels is 0, expected an integer of at least 1"),
        (lambda: DsMil(4, num_labels=0), "num_labels is 0, expected"),
        (lambda: DtfdMil(4, num_labels=0), "num_labels is 0, expected"),
        (lambda: InstanceNet(4, pooling="sum"), "pooling is 'sum', expected one of max, mean, lse"),
        (lambda: InstanceNet(4, dropout=1.0), r"dropout is 1\.0, expected a number from 0 to below 1"),
        (lambda: DtfdMil(4, distill="max"), "distill is 'max', expected one of afs, max_s, max_min_s"),
        (lambda: DtfdMil(4, num_groups=0), "num_groups is 0, expected"),
        (lambda: DtfdMil(4, instances_per_group=0), "instances_per_group is 0, expected"),
    ],
)
def test_wrong_options(make_wrong, message):
    with pytest.raises(MivpgError, match=message):
        make_wrong()


@every_kind
@pytest.mark.parametrize(("num_labels", "label"), [(1, 2), (1, -1), (3, 3), (3, -100)])
def test_wrong_labels(kind, num_labels, label):
    embeds, mask = make_bags((2,))
    with pytest.raises(MivpgError, match=rf"labels hold \[{label}\], expected integers from 0 to"):
        make(kind, num_labels)(embeds, mask, labels=torch.tensor([label]))


# ── mi-Net ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pooling", ["max", "mean", "lse"])
@every_num_labels
def test_mi_net_is_its_formula(pooling, num_labels):
    model, (embeds, mask) = make(f"mi-Net {pooling}", num_labels).double(), make_bags()
    embeds, labels = embeds.double() * 3, make_labels(num_labels)
    scores = model(embeds, mask, labels=labels)
    layers = [layer for layer in model.score if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in layers] == [256, 128, 64, num_labels]
    losses = []
    for index, length in enumerate(LENGTHS):
        probabilities = []
        for place, instance in enumerate(embeds[index, :length].flatten(0, 1)):
            for layer in layers[:-1]:
                instance = (layer.weight @ instance + layer.bias).clamp(min=0)
            score = layers[-1].weight @ instance + layers[-1].bias
            torch.testing.assert_close(scores.instance_scores[index, place], score)
            probabilities.append(1 / (1 + (-score).exp()) if num_labels == 1 else score.exp() / score.exp().sum())
        p = torch.stack(probabilities)
        pooled = {"max": p.max(dim=0).values, "mean": p.sum(dim=0) / len(p), "lse": (p.exp().sum(dim=0) / len(p)).log()}
        p = pooled[pooling]
        if num_labels == 1:
            torch.testing.assert_close(scores.logits[index].sigmoid(), p)
            losses.append(-math.log((p if labels[index] == 1 else 1 - p).item()))
        else:
            torch.testing.assert_close(scores.logits[index].softmax(dim=0), p / p.sum())
            losses.append(-math.log((p[labels[index]] / p.sum()).item()))
    assert scores.loss.item() == pytest.approx(sum(losses) / 3, rel=1e-9)


@pytest.mark.parametrize("pooling", ["max", "mean", "lse"])
@pytest.mark.parametrize("score", [-200.0, 200.0])
def test_mi_net_of_large_scores_stays_finite(pooling, score):
    """A probability that float32 cannot tell from 0 or 1 keeps its logit and its gradient."""
    model = make(f"mi-Net {pooling}")
    with torch.no_grad():
        model.score[-1].weight.zero_()
        model.score[-1].bias.fill_(score)
    embeds, _ = make_bags((3,))
    scores = model(embeds, labels=torch.tensor([int(score < 0)]))
    scores.loss.backward()
    assert scores.logits.item() == pytest.approx(score, rel=1e-6)
    assert model.score[-1].bias.grad.item() == pytest.approx(math.copysign(1, score), rel=1e-5)


def test_mi_net_drops_out_in_training_only():
    model, (embeds, mask) = make("mi-Net mean"), make_bags()
    assert torch.equal(model(embeds, mask).logits, model(embeds, mask).logits)
    model.train()
    assert not torch.equal(model(embeds, mask).logits, model(embeds, mask).logits)


# ── DS-MIL ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["DS-MIL", "DS-MIL with values"])
def test_ds_mil_is_torchmils(kind):
    """Whose loss has two terms, of which ours is the mean; and whose padding may be critical, so that there is none."""
    model, (embeds, _) = make(kind), make_bags((5, 5, 5))
    other = DSMIL((WIDTH,), att_dim=128).eval()
    other.q_nn, other.inst_classifier, other.bag_classifier = (
        model.query,
        model.instance_classifier,
        model.bag_classifier,
    )
    other.v_nn = model.value
    labels = torch.tensor([1, 0, 1])
    scores = model(embeds, labels=labels)
    logits, instance_logits = other(embeds.flatten(1, 2), return_inst_pred=True)
    _, losses = other.compute_loss(labels, embeds.flatten(1, 2))
    torch.testing.assert_close(scores.logits[:, 0], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.instance_scores[..., 0], instance_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.loss, sum(losses.values()) / 2, atol=1e-5, rtol=0)
    print(f"{kind}: logits differ by {(scores.logits[:, 0] - logits).abs().max():.1e}")


@every_num_labels
def test_ds_mil_is_its_formula(num_labels):
    model, (embeds, mask) = make("DS-MIL", num_labels).double(), make_bags()
    embeds, labels = embeds.double(), make_labels(num_labels)
    scores = model(embeds, mask, labels=labels)
    convolution = model.bag_classifier.weight.unflatten(1, (num_labels, WIDTH))  # of a Conv1d over (C, C, D)
    losses = []
    for index, length in enumerate(LENGTHS):
        bag = list(embeds[index, :length].flatten(0, 1))
        c = [model.instance_classifier.weight @ h + model.instance_classifier.bias for h in bag]
        best, vectors = [], []
        for label in range(num_labels):
            m = max(range(len(bag)), key=lambda n: c[n][label].item())
            best.append(c[m][label])
            exponents = [(model.query(h) @ model.query(bag[m]) / math.sqrt(128)).exp() for h in bag]
            vectors.append(sum(e * h for e, h in zip(exponents, bag, strict=True)) / sum(exponents))
        logits = F.conv1d(torch.stack(vectors)[None], convolution, model.bag_classifier.bias)[0, :, 0]
        torch.testing.assert_close(scores.logits[index], logits)
        torch.testing.assert_close(scores.instance_scores[index, : len(bag)], torch.stack(c))
        losses.append(loss_of(logits, labels[index]) / 2 + loss_of(torch.stack(best), labels[index]) / 2)
    assert scores.loss.item() == pytest.approx(sum(losses) / 3, rel=1e-9)


# ── DTFD-MIL ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_instances", [11, 3])
def test_dtfd_mil_is_torchmils(monkeypatch, num_instances):
    """Its "afs", given gated attention and our split; its instance scores are not weighted by attention."""
    model, (embeds, _) = make("DTFD-MIL afs"), make_bags((num_instances,), num_tokens=1)
    other = DTFDMIL((WIDTH,), n_groups=4, distill_mode="afs", feat_ext=nn.Sequential(model.reduction, nn.ReLU()))
    for name, ours in (("attention_pool", model.attention), ("u_attention_pool", model.bag_attention)):
        pool = AttentionPool(512, 128, gated=True)
        pool.fc1, pool.fc_gated, pool.fc2 = ours.projection, ours.gate, ours.score
        setattr(other, name, pool)
    other.classifier, other.u_classifier = model.classifier, model.bag_classifier

    def group_by_group(order: np.ndarray) -> None:
        order[:] = np.concatenate([np.arange(first, len(order), 4) for first in range(4)])

    monkeypatch.setattr(np.random, "shuffle", group_by_group)
    labels = torch.tensor([1])
    scores = model(embeds, labels=labels)
    logits, losses = other.compute_loss(labels, embeds[:, :, 0])
    torch.testing.assert_close(scores.logits[:, 0], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.loss, sum(losses.values()), atol=1e-5, rtol=0)
    print(f"{num_instances} instances: logits differ by {(scores.logits[:, 0] - logits).abs().max():.1e}")


def gated_pooling(attention: nn.Module, features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Weights of a bag's instances (F,) and their weighted sum, one by one."""
    exponents = []
    for h in features:
        v = torch.tanh(attention.projection.weight @ h + attention.projection.bias)
        u = torch.sigmoid(attention.gate.weight @ h + attention.gate.bias)
        exponents.append((attention.score.weight[0] @ (v * u)).exp())
    weights = [exponent / sum(exponents) for exponent in exponents]
    return weights, sum(a * h for a, h in zip(weights, features, strict=True))


@pytest.mark.parametrize("distill", ["afs", "max_s", "max_min_s"])
@every_num_labels
def test_dtfd_mil_is_its_formula(distill, num_labels):
    torch.manual_seed(0)
    model = DtfdMil(WIDTH, num_labels=num_labels, distill=distill, num_groups=3, instances_per_group=2).double().eval()
    randomize_weights(model, 0.1, generator=torch.Generator().manual_seed(0))
    embeds, mask = make_bags((7, 1, 2))
    embeds, labels = embeds.double(), make_labels(num_labels)
    scores = model(embeds, mask, labels=labels)
    losses = []
    for index, length in enumerate((7, 1, 2)):
        features = [(model.reduction.weight @ x).clamp(min=0) for x in embeds[index, :length].flatten(0, 1)]
        num_groups = min(3, len(features))
        distilled, tier_1 = [], []
        for group in range(num_groups):
            members = list(range(group, len(features), num_groups))
            weights, pooled = gated_pooling(model.attention, [features[n] for n in members])
            logits = model.classifier.weight @ pooled + model.classifier.bias
            tier_1.append(loss_of(logits, labels[index]))
            wanted = num_labels - 1 if num_labels < 3 else max(range(3), key=lambda c: logits[c].item())
            probability = {}
            for n, a in zip(members, weights, strict=True):
                cam = model.classifier.weight @ (a * features[n])
                torch.testing.assert_close(scores.instance_scores[index, n], cam)
                probability[n] = (cam.sigmoid() if num_labels == 1 else cam.softmax(dim=0))[wanted].item()
            ranked = sorted(members, key=lambda n: -probability[n])
            chosen = {"afs": [], "max_s": ranked[:2], "max_min_s": ranked[:2] + ranked[-2:]}[distill]
            distilled += [pooled] if distill == "afs" else [features[n] for n in chosen]
        _, bag = gated_pooling(model.bag_attention, distilled)
        logits = model.bag_classifier.weight @ bag + model.bag_classifier.bias
        torch.testing.assert_close(scores.logits[index], logits)
        losses.append(sum(tier_1) / num_groups + loss_of(logits, labels[index]))
    assert scores.loss.item() == pytest.approx(sum(losses) / 3, rel=1e-9)


def test_dtfd_mil_splits_at_random_in_training():
    """From torch's generator, into groups whose sizes differ by one at most; in eval mode always alike."""
    model = DtfdMil(WIDTH)
    torch.manual_seed(0)
    first, second = model.split(10), model.split(10)
    assert not torch.equal(first, second)
    for split in (first, second):
        assert (split.sum(dim=0) == 1).all()
        assert split.sum(dim=1).tolist() == [3, 3, 2, 2]
    torch.manual_seed(0)
    assert torch.equal(model.split(10), first)
    assert model.split(3).sum(dim=1).tolist() == [1, 1, 1]
    in_order = model.eval().split(10)
    assert [group.nonzero()[:, 0].tolist() for group in in_order] == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]


@pytest.mark.parametrize("kind", ["DTFD-MIL afs", "DTFD-MIL max_s", "DTFD-MIL max_min_s"])
def test_dtfd_mils_second_tier_does_not_train_the_first(kind):
    model, (embeds, mask) = make(kind), make_bags()
    scores = model(embeds, mask)
    scores.logits.sum().backward()
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"bag_attention", "bag_classifier"}
