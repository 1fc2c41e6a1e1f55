"""The paper's tables and figures as data: their arms, and the differences that the paper claims.

Of one data set all arms of MIVPG and of what stands in its place have the same pairs, steps, schedule, selection and
generation; they differ in what stands here. An arm that stands in two tables is run once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mivpg.bags import select
from mivpg.configuration_mivpg import DEFAULT_TRAINABLE
from mivpg.errors import MivpgError
from mivpg.experiments.attention import attention_tables, measure_attention
from mivpg.experiments.costs import cost_tables, draw_costs, measure_costs
from mivpg.experiments.data import PROMPT, BackboneName, BaseName, DataName, ExperimentData, Scale, View
from mivpg.experiments.facts import fact_table, measure_facts
from mivpg.experiments.figure6 import look_at_bags
from mivpg.report import Table


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row: a model on a data set."""

    name: str
    """Unique on its data set."""
    title: str
    data: DataName
    view: View = "all"
    base: BaseName = "main"
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig`."""
    trains: bool = True
    num_pairs: int | None = None
    """Training pairs of MSCOCO; None = all."""
    epoch: int | None = None
    """Captions are those after so many epochs of one longer training; None = those of the best epoch."""
    recurrent: bool = False
    """Whether the recurrent decoder of Table 1's baselines takes the place of MIVPG and the frozen language model."""
    backbone: BackboneName | None = None
    """What it reads features of; None = the features that MIVPG reads."""
    augmented: bool = False
    """Whether it trains on augmented copies of each slide."""

    @property
    def place(self) -> tuple[DataName, View, BaseName]:
        """What `ExperimentData.prepare` makes ready for it."""
        return self.data, self.view, self.base


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A difference to measure between two arms of one data set."""

    better: str
    worse: str
    says: str
    """What the paper, or we, expect, in words."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was measured on trained models beside the scores of their captions."""

    values: Mapping[str, Any]
    """For the JSON file."""
    tables: Sequence[Table] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """PNGs by title."""


Models = Mapping[tuple[DataName, str], Mapping[int, Path]]
"""Folders of trained models, by data set and arm, then by seed; those of runs that failed are not there."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or a figure."""

    name: str
    title: str
    arms: tuple[Arm, ...]
    note: str = ""
    """What is to be known before the table is read."""
    claims: tuple[Claim, ...] = ()
    apart: bool = False
    """Whether "all", the paper's own tables and figures, leaves it out."""
    with_costs: bool = False
    """Whether the table says what each arm costs."""
    curve: tuple[str, Mapping[str, str]] | None = None
    """Of a figure: the label of its axis, and its lines: what the names of a line's arms begin with, and its label."""
    measure: Callable[[ExperimentData, Models], Finding] | None = None
    """What looks into its trained models; of those whose runs failed nothing is there."""
    num_examples: int = 0
    """Test bags of which it shows what each arm writes."""


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
SLIDE_CONTROL = _slide("csa_constant", "MIVPG, control for CSA", "csa_constant")
SLIDE_CSA = _slide("csa", "MIVPG", "csa")


def _recurrent(backbone: BackboneName | None, title: str, *, augmented: bool = False) -> Arm:
    return Arm(
        name=f"recurrent_{backbone or 'vit'}{'_augmented' * augmented}",
        title=f"Recurrent decoder, {title}{', augmented' * augmented}",
        data="slides",
        view="all" if backbone is None else "pixels",
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
        Claim(better="csa", worse="without_csa", says="slides: better with CSA than without"),
        *(
            Claim(better="csa", worse=arm, says="MIVPG is better than each of the baselines")
            for arm in (
                "recurrent_densenet121",
                "recurrent_densenet121_augmented",
                "recurrent_efficientnet_b3",
                "recurrent_efficientnet_b3_augmented",
            )
        ),
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
        Claim(better="csa", worse="single_image", says="MIVPG on several images is better than one image"),
        Claim(better="patch_concatenation", worse="single_image", says="so are several images without MIVPG"),
        Claim(better="csa", worse="patch_concatenation", says="pooling each image is better than concatenation"),
        Claim(better="without_csa", worse="patch_concatenation", says="so it is without CSA"),
        Claim(better="csa", worse="without_csa", says="products: better with CSA than without"),
        Claim(better="csa", worse="csa_constant", says="what helps is that instances see each other"),
    ),
)

TABLE3 = Experiment(
    name="table3",
    title="Table 3: how instances see each other",
    arms=tuple(
        arm
        for without, make, control, csa in (
            (SLIDE_WITHOUT_CSA, _slide, SLIDE_CONTROL, SLIDE_CSA),
            (PRODUCT_WITHOUT_CSA, _product, PRODUCT_CONTROL, PRODUCT_CSA),
        )
        for arm in (
            without,
            make("self_attention", "MIVPG, full self-attention", "self_attention"),
            make("induced", "MIVPG, induced (Eq. 7 and 8)", "induced"),
            control,
            csa,
        )
    ),
    claims=(
        Claim(better="csa", worse="self_attention", says="CSA is better than full self-attention"),
        Claim(better="csa", worse="induced", says="CSA is better than induced attention"),
        Claim(better="csa", worse="csa_constant", says="what helps is that instances see each other"),
    ),
)


def table4(scale: Scale) -> Experiment:
    """Table 4, the case study: MIVPG under the other kind of language model; on products, too, and with the control."""
    suffixes: dict[BaseName, str] = {"main": "", "other": "_other"}
    arms = [
        replace(arm, name=f"{arm.name}{suffix}", title=f"{arm.title}, {scale.language_models[base]}", base=base)
        for of_data in (
            (SLIDE_WITHOUT_CSA, SLIDE_CONTROL, SLIDE_CSA),
            (PRODUCT_WITHOUT_CSA, PRODUCT_CONTROL, PRODUCT_CSA),
        )
        for base, suffix in suffixes.items()
        for arm in of_data
    ]
    return Experiment(
        name="table4",
        title="Table 4: another kind of language model",
        arms=tuple(arms),
        claims=(
            Claim(
                better="csa_other",
                worse="without_csa_other",
                says=f"better with CSA than without, under the {scale.language_models['other']}",
            ),
            Claim(
                better="csa_other",
                worse="csa_constant_other",
                says="what helps there is that instances see each other",
            ),
            Claim(better="csa", worse="csa_other", says=f"the {scale.language_models['main']} is better"),
        ),
    )


def _scenes(name: str, num_pairs: int) -> Arm:
    return Arm(
        name=f"{name}_{num_pairs}",
        title=f"{num_pairs:,} pairs, {'with' if name == 'ppeg' else 'without'} PPEG",
        data="scenes",
        model=Q_FORMER | {"position_encoding": name},
        num_pairs=num_pairs,
    )


def figure4(scale: Scale) -> Experiment:
    """Figure 4: PPEG on and off, over the number of training pairs."""
    arms, claims = [], []
    for num_pairs in scale.subset_sizes:
        arms += [_scenes("none", num_pairs), _scenes("ppeg", num_pairs)]
        says = f"PPEG helps with {num_pairs:,} training pairs"
        claims.append(Claim(better=f"ppeg_{num_pairs}", worse=f"none_{num_pairs}", says=says))
    return Experiment(
        name="figure4",
        title="Figure 4: PPEG on single pictures, over training pairs",
        note="As in the paper, epochs are fixed, so that fewer pairs are fewer steps, too; PPEG starts at zero.",
        arms=tuple(arms),
        claims=tuple(claims),
        curve=("training pairs", {"none": "without PPEG", "ppeg": "with PPEG"}),
    )


def figure5(scale: Scale) -> Experiment:
    """Figure 5: what captions of slides say as training goes on."""
    arms = tuple(
        Arm(
            name=f"epoch_{epoch}",
            title=f"after {epoch} epochs",
            data="slides",
            model=SLIDE_CSA.model,
            epoch=epoch,
        )
        for epoch in scale.epochs
    )
    return Experiment(
        name="figure5",
        title="Figure 5: captions of slides as training goes on",
        arms=arms,
        curve=("epochs", {"epoch": "MIVPG"}),
        num_examples=3,
    )


def _look_at_products(data: ExperimentData, models: Models) -> Finding:
    """What the MIVPG of the first seed that there is looked at, in bags that the seed alone chooses."""
    if not models:
        raise MivpgError("none of its models could be trained.")
    (by_seed,) = models.values()
    seed, folder = next(iter(by_seed.items()))
    samples = select(data.dataset("products", "pixels", seed).load(), "test")
    bags = look_at_bags(
        folder, samples, num_bags=3, seed=seed, prompt=PROMPT, generation=data.scale.settings["products"].generation
    )
    return Finding(
        values={"bags": [bag for _, bag in bags]},
        pictures={f"{bag['id']}: {bag['caption']}": png for png, bag in bags},
    )


FIGURE6 = Experiment(
    name="figure6",
    title="Figure 6: attention over patches and over images",
    arms=(PRODUCT_CSA,),
    measure=_look_at_products,
)


def _measure_claims(data: ExperimentData, models: Models) -> Finding:
    """What holds by construction, costs and, of generated products, what trained models look at."""
    facts, costs = measure_facts(data.scale.base), measure_costs()
    attention: dict[str, Any] = {}
    store = data.stores.get(("products", "all", "main"))
    if data.scale.name == "miniature" and store is not None:  # of real photos nobody knows what they show
        attention = measure_attention(
            {arm: by_seed for (_, arm), by_seed in models.items()},
            data.root("products"),
            store,
            prompt=PROMPT,
            generation=data.scale.settings["products"].generation,
        )
    return Finding(
        values={"facts": [asdict(fact) for fact in facts], "costs": costs, "attention": attention},
        tables=[fact_table(facts), *cost_tables(costs), *(attention_tables(attention) if attention else ())],
        pictures={"The cost of a bag over its images": draw_costs(costs)},
    )


CLAIMS = Experiment(
    name="claims",
    title="What the paper proves, counts and explains by",
    arms=(
        PRODUCT_WITHOUT_CSA,
        _product("self_attention", "MIVPG, full self-attention", "self_attention"),
        PRODUCT_CONTROL,
        PRODUCT_CSA,
    ),
    measure=_measure_claims,
)


def figure8(scale: Scale) -> Experiment:
    """Figure 8: the vision model frozen at its own size and unfrozen at a larger one, and each at the other's.

    All with PPEG, so that what is frozen at its own size is an arm of Figure 4.
    """
    arms, claims = [], []
    own, larger = scale.image_sizes
    lines: dict[str, tuple[str, dict[str, Any]]] = {
        "ppeg": (f"frozen, {own} pixels", {}),
        "frozen_larger": (f"frozen, {larger} pixels", {"image_size": larger}),
        "unfrozen": (f"unfrozen, {own} pixels", {"trainable": [*DEFAULT_TRAINABLE, "vision_model"]}),
        "unfrozen_larger": (
            f"unfrozen, {larger} pixels",
            {"trainable": [*DEFAULT_TRAINABLE, "vision_model"], "image_size": larger},
        ),
    }
    for num_pairs in scale.unfrozen_sizes:
        frozen = _scenes("ppeg", num_pairs)
        for name, (title, changes) in lines.items():
            arms.append(
                replace(
                    frozen,
                    name=f"{name}_{num_pairs}",
                    title=f"{num_pairs:,} pairs, {title}",
                    model={**frozen.model, **changes},
                    view="pixels" if changes else frozen.view,
                )
            )
            if changes:
                says = f"{title} is better than frozen, {own} pixels, with {num_pairs:,} training pairs"
                claims.append(Claim(better=f"{name}_{num_pairs}", worse=f"ppeg_{num_pairs}", says=says))
    return Experiment(
        name="figure8",
        title="Figure 8: the vision model frozen or not, over training pairs",
        arms=tuple(arms),
        claims=tuple(claims),
        curve=("training pairs", {name: title for name, (title, _) in lines.items()}),
    )


def aggregators(scale: Scale) -> Experiment:
    """What goes past the paper: every aggregator in MIVPG's place, on all three data sets.

    Of scenes they have as many pairs as Figure 4 has at most.
    """
    arms: list[Arm] = []
    num_scenes = max(scale.subset_sizes)
    of_mivpg: dict[DataName, tuple[Arm, ...]] = {
        "products": (
            Arm(name="patch_concatenation", title="Q-Former, concatenation", data="products", model=Q_FORMER),
            PRODUCT_WITHOUT_CSA,
            PRODUCT_CSA,
        ),
        "slides": (SLIDE_WITHOUT_CSA, SLIDE_CSA),
        "scenes": (
            replace(_scenes("none", num_scenes), title="Q-Former"),
            replace(_scenes("ppeg", num_scenes), title="MIVPG, PPEG"),
        ),
    }
    for data, own in of_mivpg.items():
        num_tokens = 1 if data == "slides" else scale.num_tokens
        # What pools a bag to a vector gets the instances of MIVPG; what reads tokens gets all of them.
        pooling = {"products": "abmil", "slides": "cls", "scenes": "none"}[data]
        tokens = "cls" if data == "slides" else "none"
        q_former = {"instance_correlation": "none", "patch_pooling": tokens}
        arms += own
        frozen = q_former | {"trainable": ["language_projection"]}
        arms.append(Arm(name="minigpt4", title="Frozen Q-Former, linear layer", data=data, model=frozen))
        if data == "products":  # on a slide, sixteen prompts a patch would be hundreds
            per_image = q_former | {"aggregator": "qformer_per_image"}
            arms.append(Arm(name="qformer_per_image", title="Q-Former per image", data=data, model=per_image))
            arms.append(
                Arm(
                    name="minigpt4_per_image",
                    title="Frozen Q-Former per image, linear layer",
                    data=data,
                    model=per_image | {"trainable": ["language_projection"]},
                )
            )
        for layers, title in ((1, "Linear projection"), (2, "Two-layer projection")):
            model = {
                "aggregator": "linear_projection",
                "aggregator_options": {"num_layers": layers},
                "num_query_tokens": num_tokens,
                "patch_pooling": tokens,
            }
            arms.append(Arm(name=f"linear_{layers}", title=title, data=data, model=model))
        if data != "slides":  # there it is the linear projection of one token
            model = {"aggregator": "pooled_projection", "num_query_tokens": 4, "patch_pooling": "none"}
            arms.append(Arm(name="fromage", title="FROMAGe, 4 prompts an image", data=data, model=model))
        for name, title, patch_pooling, options in (
            ("perceiver", "Perceiver Resampler", tokens, scale.perceiver),
            ("mean", "Mean", pooling, None),
            ("max", "Max", pooling, None),
            ("mi_net", "MI-Net", pooling, None),
            ("abmil", "AB-MIL", pooling, None),
            ("gated_abmil", "AB-MIL, gated", pooling, {"gated": True}),
            ("deep_sets", "DeepSets", pooling, None),
            ("set_transformer", "Set Transformer", tokens, None),
            ("transmil", "TransMIL", pooling, scale.transmil),
        ):
            model = {
                "aggregator": "abmil" if name == "gated_abmil" else name,
                "aggregator_options": options,
                "num_query_tokens": scale.num_query_tokens,
                "patch_pooling": patch_pooling,
            }
            arms.append(Arm(name=name, title=title, data=data, model=model))
    arms = [replace(arm, num_pairs=num_scenes) if arm.data == "scenes" else arm for arm in arms]
    return Experiment(
        name="aggregators",
        title="Every aggregator on every data set",
        note="Arms with a Q-Former start from the base's, which has learned with this vision and language model; all "
        "others start from random weights, and FROMAGe reads the first token, which the miniature vision model was not "
        "taught to make a summary. So the table says what one gets from a base, not which design is better.",
        arms=tuple(arms),
        claims=tuple(
            Claim(better=ours, worse=arm.name, says=f"MIVPG is better than {arm.title}")
            for ours, where in (("csa", ("products", "slides")), (f"ppeg_{num_scenes}", ("scenes",)))
            for arm in {arm.name: arm for arm in arms if arm.data in where and arm.name != ours}.values()
        ),
        apart=True,
        with_costs=True,
    )


def readings(scale: Scale) -> Experiment:
    """What the paper leaves open, read both ways; the tables have the first arm's reading."""

    def other(arm: Arm, name: str, title: str, **options: Any) -> Arm:
        return replace(arm, name=name, title=f"{arm.title}, {title}", model={**arm.model, **options})

    def restarted(csa: Arm) -> Arm:
        return other(csa, "csa_restarted", "each block from the raw instances", instances_carry_over=False)

    def from_random(csa: Arm) -> Arm:
        return other(csa, "csa_from_random", "CSA from random weights", zero_init_residual=False)

    num_pairs = max(scale.subset_sizes)
    qformer, ppeg = _scenes("none", num_pairs), _scenes("ppeg", num_pairs)
    csa, control, csa_ppeg = (f"{name}_{num_pairs}" for name in ("csa", "csa_constant", "csa_ppeg"))
    return Experiment(
        name="readings",
        title="What the paper leaves open, read both ways",
        arms=(
            PRODUCT_CSA,
            restarted(PRODUCT_CSA),
            from_random(PRODUCT_CSA),
            other(PRODUCT_CSA, "csa_without_prefix", "AB-MIL without CLS", pool_include_prefix=False),
            SLIDE_CSA,
            restarted(SLIDE_CSA),
            from_random(SLIDE_CSA),
            qformer,
            ppeg,
            other(qformer, csa, "with CSA", instance_correlation="csa"),
            other(qformer, control, "with the control for CSA", instance_correlation="csa_constant"),
            other(ppeg, csa_ppeg, "with CSA", instance_correlation="csa"),
        ),
        claims=(
            Claim(better="csa", worse="csa_restarted", says="instances that carry over are better than raw ones"),
            Claim(better="csa", worse="csa_from_random", says="a start at zero is better than a random one"),
            Claim(better="csa", worse="csa_without_prefix", says="AB-MIL with CLS is better than over patches alone"),
            Claim(better=csa, worse=qformer.name, says="single pictures: better with CSA than without"),
            Claim(better=csa, worse=control, says="what helps there is that instances see each other"),
            Claim(better=csa_ppeg, worse=ppeg.name, says="so it does beside PPEG"),
            Claim(better=ppeg.name, worse=qformer.name, says="PPEG helps on single pictures"),
        ),
        apart=True,
    )


def experiments(scale: Scale) -> dict[str, Experiment]:
    """All, by name."""
    those = (
        *(TABLE1, TABLE2, TABLE3, table4(scale)),
        *(figure4(scale), figure5(scale), FIGURE6, figure8(scale), CLAIMS),
        *(aggregators(scale), readings(scale)),
    )
    return {experiment.name: experiment for experiment in those}
