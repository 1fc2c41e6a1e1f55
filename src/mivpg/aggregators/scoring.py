"""What classifies a bag by class scores of its instances: mi-Net, DS-MIL and DTFD-MIL.

B bags, N images a bag, P tokens an image, M = N P instances, D their width, C labels (1 = binary, one logit),
G pseudo-bags, F width of the features. Every mean and softmax over instances is over the real ones.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mivpg.aggregators.base import (
    BagScores,
    ScoringAggregator,
    check_choice,
    check_counts,
    check_dropout,
    flat_instances,
    masked_softmax,
)
from mivpg.errors import MivpgError
from mivpg.layers import scatter_real

ATTENTION_SIZE = 128
"""Width of DS-MIL's queries and of the attention in DTFD-MIL."""

FEATURE_SIZE = 512
"""F of DTFD-MIL."""

POOLINGS = ("max", "mean", "lse")
DISTILLATIONS = ("afs", "max_s", "max_min_s")


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of one logit, cross-entropy of more: (n, C) and (n,) to the mean.

    Raises:
        MivpgError: A label is none of 0 to C - 1, or for one logit of 0 and 1.
    """
    num_classes = max(2, logits.shape[-1])
    if ((labels < 0) | (labels >= num_classes)).any():
        raise MivpgError(f"labels hold {sorted(set(labels.tolist()))}, expected integers from 0 to {num_classes - 1}.")
    if logits.shape[-1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels.long())


class InstanceNet(ScoringAggregator):
    """mi-Net (Wang et al. 2018): a network scores every instance, the bag's probability is pooled from theirs.

        s_n = w^T FC_64(FC_128(FC_256(h_n)))      (B, M, C), ReLU after each layer, dropout before the last
        p_n = sigmoid(s_n)
        p   = max_n p_n  |  mean_n p_n  |  log mean_n exp p_n

    The paper is binary; its code puts dropout after FC_64 alone and takes 1 for the sharpness of the log-sum-exp, and
    so do we. For more classes p_n is the softmax, each class is pooled in the same way and the result normalised,
    which is ours. `logits` are those of the pooled p: `sigmoid(logits)` or `softmax(logits)` gives it back.

    Args:
        image_embeds_size: D.
        num_labels: C; 1 = binary.
        pooling: "max", "mean" or "lse" (log-sum-exp).
        dropout: Probability of it.

    Raises:
        MivpgError: An option has another value; in `forward`, a label.
    """

    def __init__(self, image_embeds_size: int, *, num_labels: int = 1, pooling: str = "max", dropout: float = 0.5):
        check_choice("pooling", pooling, POOLINGS)
        check_dropout(dropout)
        super().__init__(image_embeds_size, num_labels)
        self.pooling = pooling
        self.score = nn.Sequential(
            nn.Linear(image_embeds_size, 256),
            nn.ReLU(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(64, num_labels),
        )

    def forward(
        self,
        image_embeds: Tensor,
        image_mask: Tensor | None = None,
        image_coords: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> BagScores:
        """Bags (B, N, P, D) and labels (B,) to scores; coordinates are not read."""
        instances, mask = flat_instances(image_embeds, image_mask)
        scores = self.score(instances)  # (B, M, C)
        logits = pool_scores(scores, mask, self.pooling)  # (B, C)
        loss = None if labels is None else classification_loss(logits, labels)
        return BagScores(logits, scores.masked_fill(~mask[..., None], 0.0), loss)


def pool_scores(scores: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Logits (B, C) of the pooled probability of instances with logits (B, M, C), without leaving the logarithm."""
    mask = mask[..., None]
    if scores.shape[-1] > 1:
        return _log_pooled(scores.log_softmax(dim=-1), mask, pooling)
    if pooling == "max":
        return scores.masked_fill(~mask, -torch.inf).amax(dim=1)  # the largest sigmoid is the sigmoid of the largest
    log_p = _log_pooled(F.logsigmoid(scores), mask, pooling)
    if pooling == "mean":
        return log_p - _log_mean_exp(F.logsigmoid(-scores), mask)
    return log_p - _log_log_mean_exp(F.logsigmoid(-scores), mask, sign=-1)


def _log_pooled(log_p: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """log p (B, C) of log p_n (B, M, C)."""
    if pooling == "max":
        return log_p.masked_fill(~mask, -torch.inf).amax(dim=1)
    if pooling == "mean":
        return _log_mean_exp(log_p, mask)
    return _log_log_mean_exp(log_p, mask, sign=1)


def _log_mean_exp(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, -torch.inf).logsumexp(dim=1) - mask.sum(dim=1).to(values.dtype).log()


def _log_log_mean_exp(log_x: Tensor, mask: Tensor, sign: int) -> Tensor:
    """log(± log mean_n exp(± x_n)), exact for x near 0.

    With + and x = p_n it is log p. With - and x = 1 - p_n it is log(1 - p), since
    1 - log mean exp p_n = -log mean exp(p_n - 1).
    """
    log_x = log_x + _log_ratio(lambda x: sign * torch.expm1(sign * x), log_x)
    log_mean = _log_mean_exp(log_x, mask)  # of ±(exp(± x_n) - 1)
    return log_mean + _log_ratio(lambda x: sign * torch.log1p(sign * x), log_mean)


def _log_ratio(function: Callable[[Tensor], Tensor], log_x: Tensor) -> Tensor:
    """log(f(x) / x) of an f with f(0) = 0 and f'(0) = 1; below the precision of numbers the ratio is 1."""
    x = log_x.exp().clamp_min(torch.finfo(log_x.dtype).eps)
    return (function(x) / x).log()


class DsMil(ScoringAggregator):
    """DS-MIL (Li et al. 2021): one stream scores instances, the other asks them all with the best one of each class.

        c   = W h                                    (B, M, C), the instance scores
        m_c = argmax_n c_nc                          (B, C), the critical instance of each class
        q   = tanh(W_2 relu(W_1 h))                  (B, M, 128)
        A   = softmax_n(q(h_n) · q(h_m) / sqrt(128)) (B, C, M)
        b   = A V                                    (B, C, D), V = h, or relu(W_v h) where `project_values`
        logits = U b                                 (B, C), from the whole of b (C D numbers)

    The loss is half that of `max_n c_n` and half that of `logits`. `logits` are the second stream's, which is what the
    authors' code tests by default (their `--average` adds the probabilities of both). Their loss is binary
    cross-entropy for each class; for more than one label ours is cross-entropy.

    Args:
        image_embeds_size: D.
        num_labels: C; 1 = binary.
        project_values: Whether V is a layer of its own.

    Raises:
        MivpgError: `num_labels` is below 1; in `forward`, a label is wrong.
    """

    def __init__(self, image_embeds_size: int, *, num_labels: int = 1, project_values: bool = False):
        super().__init__(image_embeds_size, num_labels)
        self.instance_classifier = nn.Linear(image_embeds_size, num_labels)  # W
        self.query = nn.Sequential(
            nn.Linear(image_embeds_size, ATTENTION_SIZE),
            nn.ReLU(),
            nn.Linear(ATTENTION_SIZE, ATTENTION_SIZE),
            nn.Tanh(),
        )
        self.value: nn.Module = nn.Identity()
        if project_values:
            self.value = nn.Sequential(nn.Linear(image_embeds_size, image_embeds_size), nn.ReLU())
        self.bag_classifier = nn.Linear(num_labels * image_embeds_size, num_labels)  # U, their Conv1d

    def forward(
        self,
        image_embeds: Tensor,
        image_mask: Tensor | None = None,
        image_coords: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> BagScores:
        """Bags (B, N, P, D) and labels (B,) to scores; coordinates are not read."""
        instances, mask = flat_instances(image_embeds, image_mask)
        padding = ~mask[..., None]
        scores = self.instance_classifier(instances)  # (B, M, C)
        best, critical = scores.masked_fill(padding, -torch.inf).max(dim=1)  # (B, C)
        queries = self.query(instances)  # (B, M, 128)
        critical_queries = queries.gather(1, critical[..., None].expand(-1, -1, ATTENTION_SIZE))  # (B, C, 128)
        similarities = critical_queries @ queries.mT / math.sqrt(ATTENTION_SIZE)  # (B, C, M)
        bags = masked_softmax(similarities, mask[:, None]) @ self.value(instances)  # (B, C, D)
        logits = self.bag_classifier(bags.flatten(1))  # (B, C)
        loss = None
        if labels is not None:
            loss = (classification_loss(best, labels) + classification_loss(logits, labels)) / 2
        return BagScores(logits, scores.masked_fill(padding, 0.0), loss)


class GatedAttention(nn.Module):
    """Scores of gated AB-MIL (Ilse et al. 2018): `w^T (tanh(V h) * sigmoid(U h))`, (n, F) -> (n,).

    `w` has no bias, of which the softmax that follows would take no notice.
    """

    def __init__(self, size: int):
        super().__init__()
        self.projection = nn.Linear(size, ATTENTION_SIZE)  # V
        self.gate = nn.Linear(size, ATTENTION_SIZE)  # U
        self.score = nn.Linear(ATTENTION_SIZE, 1, bias=False)  # w

    def forward(self, features: Tensor) -> Tensor:
        """(n, F) -> (n,)."""
        return self.score(torch.tanh(self.projection(features)) * torch.sigmoid(self.gate(features))).squeeze(-1)


class DtfdMil(ScoringAggregator):
    """DTFD-MIL (Zhang et al. 2022): tier 1 learns from parts of the bag, tier 2 from what tier 1 distils of them.

        h = relu(W h)                                       (n, F), the n instances of one bag, F = 512
        a = softmax over the pseudo-bag of gated AB-MIL     (n,)
        z_g = sum of a_n h_n over pseudo-bag g              (G, F), logits of tier 1 = classifier(z_g)
        L_n = w · (a_n h_n)                                 (n, C), w the weights of that classifier: instance scores
        logits = classifier_2(gated AB-MIL_2 (distilled))   (C,)

    A bag is split at random into G pseudo-bags that differ by at most one instance, each with the bag's label. In
    training the split is drawn from torch's global generator. In eval mode instance i is in pseudo-bag i mod G, so
    that the same bag gets the same scores; the authors draw there, too. Either way the order of the instances counts.
    A bag of fewer instances than `num_groups` has as many pseudo-bags as instances.

    Tier 2 reads of each pseudo-bag: "afs", z_g; "max_s", the instances of the highest probability; "max_min_s", those
    and the ones of the lowest. The probability is the softmax (or sigmoid) of L_n for the last class, which is the
    positive one. With more than two classes it is that of the class that tier 1 gives the pseudo-bag, which is ours.

    The loss is the mean of tier 1 over pseudo-bags plus that of tier 2. As in the authors' code, which steps one
    optimiser for each tier, tier 2 sends no gradient into tier 1.

    Args:
        image_embeds_size: D.
        num_labels: C; 1 = binary.
        num_groups: G.
        distill: "afs", "max_s" or "max_min_s".
        instances_per_group: How many instances "max_s" takes of a pseudo-bag, and "max_min_s" from either end.

    Raises:
        MivpgError: An option has another value; in `forward`, a label.
    """

    def __init__(
        self,
        image_embeds_size: int,
        *,
        num_labels: int = 1,
        num_groups: int = 4,
        distill: str = "afs",
        instances_per_group: int = 1,
    ):
        check_counts(num_groups=num_groups, instances_per_group=instances_per_group)
        check_choice("distill", distill, DISTILLATIONS)
        super().__init__(image_embeds_size, num_labels)
        self.num_groups = num_groups
        self.distill = distill
        self.instances_per_group = instances_per_group
        self.reduction = nn.Linear(image_embeds_size, FEATURE_SIZE, bias=False)  # W
        self.attention = GatedAttention(FEATURE_SIZE)
        self.classifier = nn.Linear(FEATURE_SIZE, num_labels)
        self.bag_attention = GatedAttention(FEATURE_SIZE)
        self.bag_classifier = nn.Linear(FEATURE_SIZE, num_labels)

    def forward(
        self,
        image_embeds: Tensor,
        image_mask: Tensor | None = None,
        image_coords: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> BagScores:
        """Bags (B, N, P, D) and labels (B,) to scores, bag by bag; coordinates are not read."""
        instances, mask = flat_instances(image_embeds, image_mask)
        bag_logits, instance_scores, losses = [], [], []
        for index, (bag, real) in enumerate(zip(instances, mask, strict=True)):
            features = F.relu(self.reduction(bag[real]))  # (n, F)
            groups = self.split(len(features)).to(features.device)  # (G, n)
            weights = masked_softmax(self.attention(features), groups)  # (G, n)
            pseudo_bags = weights @ features  # (G, F)
            pseudo_logits = self.classifier(pseudo_bags)  # (G, C)
            scores = (weights.sum(dim=0)[:, None] * features) @ self.classifier.weight.mT  # (n, C)
            if self.distill == "afs":
                distilled = pseudo_bags.detach()
            else:
                distilled = self.select(features, scores, groups, pseudo_logits).detach()
            logits = self.bag_classifier(self.bag_attention(distilled).softmax(dim=0) @ distilled)  # (C,)
            bag_logits.append(logits)
            instance_scores.append(scores)
            if labels is not None:
                tier_1 = classification_loss(pseudo_logits, labels[index].expand(len(groups)))
                losses.append(tier_1 + classification_loss(logits[None], labels[index, None]))
        return BagScores(
            logits=torch.stack(bag_logits),
            instance_scores=scatter_real(torch.cat(instance_scores), mask),
            loss=torch.stack(losses).mean() if losses else None,
        )

    def split(self, num_instances: int) -> Tensor:
        """Which instances are in which pseudo-bag, (G, n) bool."""
        num_groups = min(self.num_groups, num_instances)
        order = torch.randperm(num_instances) if self.training else torch.arange(num_instances)
        return order % num_groups == torch.arange(num_groups)[:, None]

    def select(self, features: Tensor, scores: Tensor, groups: Tensor, pseudo_logits: Tensor) -> Tensor:
        """The instances of (n, F) that "max_s" or "max_min_s" hands to tier 2, pseudo-bag by pseudo-bag."""
        if self.num_labels > 1:
            scores = scores.log_softmax(dim=-1)
        if self.num_labels > 2:
            classes = pseudo_logits.argmax(dim=-1).tolist()
        else:
            classes = [self.num_labels - 1] * len(groups)
        chosen = []
        for group, label in zip(groups, classes, strict=True):
            members = group.nonzero()[:, 0]
            ranked = members[scores[members, label].argsort(descending=True, stable=True)]
            chosen.append(ranked[: self.instances_per_group])
            if self.distill == "max_min_s":
                chosen.append(ranked[-self.instances_per_group :])
        return features[torch.cat(chosen)]
