"""What a bag costs MIVPG, O(NP + RN), and the Q-Former on all patches of all images, O(RNP): counted, at the real size.

    costs = measure_costs()
    cost_tables(costs), draw_costs(costs)

From image embeddings to visual prompts: the vision model and the language model have the same to do for all.
"""

# N images a bag, P patch tokens an image, D vision width, R queries, H Q-Former width, L hidden size of AB-MIL

import io
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mivpg.configuration_mivpg import MivpgConfig
from mivpg.folded_attention import FOLD_FROM
from mivpg.modeling_mivpg import MivpgVisualPromptModel
from mivpg.report import Table

NUM_IMAGES = (1, 2, 5, 10, 21)
"""N; a product of Amazon Berkeley Objects has up to 21."""
NUM_TOKENS = 257
"""P of BLIP-2's vision model."""

COST_ARMS: dict[str, tuple[str, dict[str, str]]] = {
    "csa": ("MIVPG: AB-MIL and CSA", {"patch_pooling": "abmil", "instance_correlation": "csa"}),
    "without_csa": ("MIVPG without CSA", {"patch_pooling": "abmil", "instance_correlation": "none"}),
    "concatenation": ("Q-Former, concatenated patches", {"patch_pooling": "none", "instance_correlation": "none"}),
}
COST_PARTS = {
    "AttentionPooling": "AB-MIL",
    "instance_correlation": "CSA",
    "crossattention": "cross-attention",
}
"""What an image passes, by its name in the model, of the outermost its class."""


def measure_costs() -> dict[str, Any]:
    """Counts the multiply-adds of matrix products that turn a bag into visual prompts, at BLIP-2's real size.

    Nothing is computed: the model's tensors have shapes alone. The vision model and the language model do not count.

    Returns:
        `num_images`; `arms`, each with `title`, `multiply_adds` (one a number of images), `an_image` (what the second
        image adds), `fixed` (the rest of one image's), `parts` (what it adds by part) and `by_queries` (how much of it
        grows with R); and how many times as much concatenation takes: `factor` of the largest bag as it runs,
        `factor_unfolded` without the folded form of large bags, `factor_an_image` of an image more.
    """
    arms: dict[str, dict[str, Any]] = {}
    for name, (title, options) in COST_ARMS.items():
        counts = _multiply_adds(**options)
        first, second = counts[NUM_IMAGES.index(1)], counts[NUM_IMAGES.index(2)]
        added = {part: second[part] - first[part] for part in second}
        arms[name] = {
            "title": title,
            "multiply_adds": [count["all"] for count in counts],
            "an_image": added["all"],
            "fixed": first["all"] - added["all"],
            "parts": {part: added[part] for part in COST_PARTS.values()},
            "by_queries": added["by queries"],
        }
    ours, theirs = arms["csa"], arms["concatenation"]
    return {
        "num_images": list(NUM_IMAGES),
        "arms": arms,
        "factor": theirs["multiply_adds"][-1] / ours["multiply_adds"][-1],
        "factor_unfolded": on_the_line(theirs, NUM_IMAGES[-1]) / ours["multiply_adds"][-1],
        "factor_an_image": theirs["an_image"] / ours["an_image"],
    }


def on_the_line(arm: Mapping[str, Any], num_images: int) -> int:
    """Multiply-adds of a bag if each image costs what the second one does."""
    return arm["fixed"] + num_images * arm["an_image"]


def _multiply_adds(**options: str) -> list[dict[str, int]]:
    """For each of `NUM_IMAGES`, by part."""
    config = MivpgConfig(
        patch_pooling=options["patch_pooling"],
        qformer_config={"instance_correlation": options["instance_correlation"]},
    )
    with FakeTensorMode():
        model = MivpgVisualPromptModel(config).eval().requires_grad_(False)
        model.set_attn_implementation("eager")  # whose products the counter sees
        counts = []
        for num_images in NUM_IMAGES:
            image_embeds = torch.empty(1, num_images, NUM_TOKENS, config.image_embeds_size)
            with FlopCounterMode(display=False) as counter:
                model.get_visual_prompts(image_embeds)
            counts.append(_by_part(counter))
    return counts


def _by_part(counter: FlopCounterMode) -> dict[str, int]:
    """Multiply-adds of `all`, of each of the `COST_PARTS`, and `by queries`: the products of instances with queries."""
    counts = dict.fromkeys(("all", "by queries", *COST_PARTS.values()), 0)
    for module, operations in counter.get_flop_counts().items():
        name = module.rpartition(".")[2]
        multiply_adds = sum(operations.values()) // 2  # each is two operations
        if module == "Global":
            counts["all"] = multiply_adds
        elif name in COST_PARTS:
            counts[COST_PARTS[name]] += multiply_adds
            if name != "AttentionPooling":
                counts["by queries"] += operations.get(torch.ops.aten.bmm, 0) // 2
    return counts


def draw_costs(costs: Mapping[str, Any]) -> bytes:
    """Multiply-adds over the number of images, and what one image more adds, by part.

    Args:
        costs: What `measure_costs` returns.

    Returns:
        A PNG.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    totals, added = figure.subplots(1, 2)
    arms = costs["arms"].values()
    for arm in arms:
        straight = [on_the_line(arm, number) / 1e9 for number in costs["num_images"]]
        (line,) = totals.plot(costs["num_images"], straight, label=arm["title"])
        counted = [count / 1e9 for count in arm["multiply_adds"]]
        totals.plot(costs["num_images"], counted, "o", color=line.get_color())
    totals.set(
        xlabel="images a bag",
        ylabel="multiply-adds, in billions",
        title="A bag: counted (dots); fixed + N times an image (lines)",
    )
    totals.set_xticks(costs["num_images"])
    totals.legend(fontsize="small")
    for number, part in enumerate(COST_PARTS.values()):
        places = [place + 0.25 * (number - 1) for place in range(len(arms))]
        widths = [arm["parts"][part] / 1e6 for arm in arms]
        bars = added.barh(places, widths, height=0.23, label=part)
        added.bar_label(bars, [f"{width:,.0f}" if width else "" for width in widths], padding=3, fontsize="small")
    added.set_yticks(range(len(arms)), [arm["title"] for arm in arms])
    added.set(xscale="log", xlabel="multiply-adds, in millions", title="An image more")
    added.set_xlim(1, 4 * max(max(arm["parts"].values()) for arm in arms) / 1e6)  # with room for the number
    added.invert_yaxis()
    added.legend(fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, dpi=130, metadata={"Software": None})
    return png.getvalue()


COST_NOTE = (
    "Matrix products from image embeddings to visual prompts, counted at BLIP-2's size (12 blocks of which 6 read the "
    "images, H = 768, R = 32, D = 1408, P = 257), forward, one bag; softmax and the like are not counted."
)


def cost_tables(costs: Mapping[str, Any]) -> list[Table]:
    """Multiply-adds of a bag, and of an image more.

    Args:
        costs: What `measure_costs` returns.
    """
    largest = costs["num_images"][-1]
    arms = costs["arms"].values()
    return [
        Table(
            title="Billions of multiply-adds a bag, over the number of images",
            note=f"{COST_NOTE} Every row is linear in N: fixed + N times an image, to the last operation, but for "
            f"bags of {FOLD_FROM:,} instances and more, which take the folded form of attention. MIVPG's is "
            f"O(NP + RN) (the paper drops the N of NP), the concatenation's O(RNP): they differ in the slope. An image "
            f"more costs the concatenation {costs['factor_an_image']:.0f} times as much; a bag of {largest} images "
            f"{costs['factor']:.1f} times as much as it runs, {costs['factor_unfolded']:.1f} times without the folded "
            "form. The vision model, which has the same to do in all rows, is not counted.",
            columns=["", "fixed", "an image", *(f"N = {number}" for number in costs["num_images"])],
            rows=[
                [
                    arm["title"],
                    *(f"{count / 1e9:.3f}" for count in (arm["fixed"], arm["an_image"], *arm["multiply_adds"])),
                ]
                for arm in arms
            ],
        ),
        Table(
            title="Millions of multiply-adds of an image more",
            note="AB-MIL's are P D L and the weighted mean; of cross-attention and CSA most are projections of "
            "instances, which do not depend on R: what does are the products with R queries, the last column.",
            columns=["", *COST_PARTS.values(), "all", "of which by R queries"],
            rows=[
                [
                    arm["title"],
                    *(f"{count / 1e6:.1f}" for count in (*arm["parts"].values(), arm["an_image"], arm["by_queries"])),
                ]
                for arm in arms
            ],
        ),
    ]
