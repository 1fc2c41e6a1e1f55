"""The paper's tables and figures as data: their arms, and the differences that the paper claims.

Of one data set all arms have the same pairs, steps, schedule, selection and generation; they differ in what stands
here. An arm that stands in two tables is run once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mivpg.experiments.data import BackboneName, DataName, Scale, View


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row: a model on a data set."""

    name: str
    """Unique on its data set."""
    title: str
    data: DataName
    view: View = "all"
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig`."""
    trains: bool = True
    num_pairs: int | None = None
    """Training pairs of MSCOCO; None = all."""
    recurrent: bool = False
    """Whether the recurrent decoder of Table 1's baselines takes the place of MIVPG and the frozen language model."""
    backbone: BackboneName | None = None
    """What it reads features of; None = the features that MIVPG reads."""
    augmented: bool = False
    """Whether it trains on augmented copies of each slide."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A difference to measure between two arms of one data set."""

    better: str
    worse: str
    says: str
    """What the paper, or we, expect, in words."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or a figure."""

    name: str
    title: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...] = ()
    curve: tuple[str, tuple[str, ...]] | None = None
    """Of a figure: the label of its axis, and a line's name for each prefix of arms, `<prefix>_<pairs>`."""


def _product(name: str, title: str, correlation: str) -> Arm:
    model = {"patch_pooling": "abmil", "instance_correlation": correlation}
    return Arm(name=name, title=title, data="products", model=model)


def _slide(name: str, title: str, correlation: str, position_encoding: str = "none") -> Arm:
    model = {
        "patch_pooling": "cls",
        "instance_correlation": correlation,
        "position_encoding": position_encoding,
    }
    return Arm(name=name, title=title, data="slides", model=model)


Q_FORMER = {"patch_pooling": "none", "instance_correlation": "none"}

PRODUCT_WITHOUT_CSA = _product("without_csa", "MIVPG without CSA", "none")
PRODUCT_CONTROL = _product("csa_constant", "MIVPG, control for CSA", "csa_constant")
PRODUCT_CSA = _product("csa", "MIVPG", "csa")
SLIDE_WITHOUT_CSA = _slide("without_csa", "MIVPG without CSA", "none")
SLIDE_CSA = _slide("csa", "MIVPG", "csa")


def _recurrent(backbone: BackboneName | None, title: str, *, augmented: bool = False) -> Arm:
    return Arm(
        name=f"recurrent_{backbone or 'vit'}{'_augmented' * augmented}",
        title=f"Recurrent decoder, {title}{', augmented' * augmented}",
        data="slides",
        recurrent=True,
        backbone=backbone,
        augmented=augmented,
    )


TABLE1 = Experiment(
    name="table1",
    title="Table 1: slides, the CLS token of each patch an instance",
    arms=(
        _recurrent("densenet121", "DenseNet121 p3x3"),
        _recurrent("densenet121", "DenseNet121 p3x3", augmented=True),
        _recurrent("efficientnet_b3", "EfficientNet-B3 p3x3"),
        _recurrent("efficientnet_b3", "EfficientNet-B3 p3x3", augmented=True),
        _recurrent(None, "CLS tokens of MIVPG's vision model"),
        SLIDE_WITHOUT_CSA,
        _slide("without_csa_ppeg", "MIVPG without CSA, PPEG", "none", "ppeg"),
        SLIDE_CSA,
        _slide("csa_ppeg", "MIVPG, PPEG", "csa", "ppeg"),
    ),
    claims=(
        Claim(better="csa", worse="without_csa", says="CSA helps on slides"),
        Claim(better="csa", worse="recurrent_densenet121", says="MIVPG is better than the baselines"),
        Claim(better="csa", worse="recurrent_vit", says="so it is on the same features"),
        Claim(better="csa_ppeg", worse="csa", says="PPEG helps on slides, whose patches have no known order"),
    ),
)

TABLE2 = Experiment(
    name="table2",
    title="Table 2: products with several photos",
    arms=(
        Arm(name="zero_shot", title="Zero-shot", data="products", view="main", model=Q_FORMER, trains=False),
        Arm(name="single_image", title="Single image", data="products", view="main", model=Q_FORMER),
        Arm(name="patch_concatenation", title="Patch concatenation", data="products", model=Q_FORMER),
        PRODUCT_WITHOUT_CSA,
        PRODUCT_CONTROL,
        PRODUCT_CSA,
    ),
    claims=(
        Claim(better="csa", worse="single_image", says="several images are better than one"),
        Claim(better="csa", worse="patch_concatenation", says="pooling each image is better than concatenation"),
        Claim(better="without_csa", worse="patch_concatenation", says="so it is without CSA"),
        Claim(better="csa", worse="without_csa", says="CSA helps on products"),
        Claim(better="csa", worse="csa_constant", says="what helps is that instances see each other"),
    ),
)

TABLE3 = Experiment(
    name="table3",
    title="Table 3: how instances see each other",
    arms=tuple(
        arm
        for without, make, csa in (
            (SLIDE_WITHOUT_CSA, _slide, SLIDE_CSA),
            (PRODUCT_WITHOUT_CSA, _product, PRODUCT_CSA),
        )
        for arm in (
            without,
            make("self_attention", "MIVPG, full self-attention", "self_attention"),
            make("induced", "MIVPG, induced (Eq. 7 and 8)", "induced"),
            make("csa_constant", "MIVPG, control for CSA", "csa_constant"),
            csa,
        )
    ),
    claims=(
        Claim(better="csa", worse="self_attention", says="CSA is at least as good as full self-attention"),
        Claim(better="csa", worse="induced", says="CSA is better than induced attention"),
        Claim(better="csa", worse="csa_constant", says="what helps is that instances see each other"),
    ),
)


def figure4(scale: Scale) -> Experiment:
    """Figure 4: PPEG on and off, over the number of training pairs."""
    arms, claims = [], []
    for num_pairs in scale.subset_sizes:
        for name, title in (("none", "without PPEG"), ("ppeg", "with PPEG")):
            arms.append(
                Arm(
                    name=f"{name}_{num_pairs}",
                    title=f"{num_pairs:,} pairs, {title}",
                    data="scenes",
                    model=Q_FORMER | {"position_encoding": name},
                    num_pairs=num_pairs,
                )
            )
        says = f"PPEG helps with {num_pairs:,} training pairs"
        claims.append(Claim(better=f"ppeg_{num_pairs}", worse=f"none_{num_pairs}", says=says))
    return Experiment(
        name="figure4",
        title="Figure 4: PPEG on single pictures, over training pairs",
        arms=tuple(arms),
        claims=tuple(claims),
        curve=("training pairs", ("none", "ppeg")),
    )


def experiments(scale: Scale) -> dict[str, Experiment]:
    """All, by name."""
    return {experiment.name: experiment for experiment in (TABLE1, TABLE2, TABLE3, figure4(scale))}
