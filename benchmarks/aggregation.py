"""What a bag costs between the vision model and the language model, and what share of a training step that is.

python benchmarks/aggregation.py [--rounds 5] [--num-images 1 2 5 10 15 21] [--no-shares] [--picture cost.png]

From image embeddings to the Q-Former's output, forward and backward, at the real size (12 blocks, H = 768, 12 heads,
D = 1408, R = 32, cross-attention in every second block), float32, bags of two, P = 257: MIVPG with AB-MIL and CSA
against transformers' `Blip2QFormerModel` on the concatenated patches. Embeddings need no gradient, every weight does;
dropout is BLIP-2's (0.1) or off. Beside what was measured stand the multiply-adds of all matrix products, counted, and
how far it is from a fixed part + a part an image; the picture shows both over N.

Before that, the whole training step by share: vision model, aggregation, language model. On a CPU the vision model is
measured on one image and the language model by one block, and multiplied; the aggregation is measured whole. Prints
Markdown.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    OPTConfig,
    OPTModel,
    PreTrainedConfig,
)
from transformers.initialization import no_init_weights

from measuring import DEVICE, Seconds, in_turn, machine, markdown, peak_bytes, seconds
from mivpg import MivpgConfig
from mivpg.modeling_mivpg import MivpgVisualPromptModel
from parameters import LANGUAGE_MODELS, draw_zeros

# B bags, N images a bag, P patch tokens an image, D vision width, R queries, H Q-Former width, E language-model width

BATCH_SIZE, NUM_TOKENS, NUM_QUERIES = 2, 257, 32
NUM_PROMPT_TOKENS, NUM_CAPTION_TOKENS = 4, 30
OURS, THEIRS = "MIVPG", "Q-Former on concatenated patches"


class MivpgAggregation(nn.Module):
    """MIVPG with AB-MIL and CSA, nothing at its zero start."""

    def __init__(self, qformer: dict[str, Any], num_queries: int):
        super().__init__()
        config = MivpgConfig(
            patch_pooling="abmil",
            qformer_config=qformer | {"instance_correlation": "csa"},
            num_query_tokens=num_queries,
        )
        self.model = MivpgVisualPromptModel(config)
        self.model.post_init()

    def forward(self, image_embeds: Tensor) -> Tensor:
        """(B, N, P, D) -> (B, R, H)."""
        return self.model.get_visual_prompts(image_embeds).embeds


class ConcatenatedPatches(nn.Module):
    """BLIP-2's Q-Former, as transformers has it, on all patches of all images."""

    def __init__(self, qformer: dict[str, Any], num_queries: int):
        super().__init__()
        config = Blip2QFormerConfig(**qformer)
        self.qformer = Blip2QFormerModel(config)
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, config.hidden_size) * config.initializer_range)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """(B, N, P, D) -> (B, R, H)."""
        queries = self.query_tokens.expand(len(image_embeds), -1, -1)
        found = self.qformer(query_embeds=queries, encoder_hidden_states=image_embeds.flatten(1, 2))
        return found.last_hidden_state


RIVALS: dict[str, Callable[[dict[str, Any], int], nn.Module]] = {OURS: MivpgAggregation, THEIRS: ConcatenatedPatches}


def make_rivals(qformer: dict[str, Any], *, num_queries: int = NUM_QUERIES) -> dict[str, nn.Module]:
    """Both, with what they have in common the same."""
    rivals = {name: make(qformer, num_queries).to(DEVICE) for name, make in RIVALS.items()}
    for rival in rivals.values():
        draw_zeros(rival)
    ours, theirs = rivals.values()
    ours.model.qformer.load_state_dict(theirs.qformer.state_dict(), strict=False)
    ours.model.query_tokens.data.copy_(theirs.query_tokens)
    return rivals


def training_pass(rival: nn.Module, image_embeds: Tensor) -> Callable[[], None]:
    """Forward and backward of one aggregation; gradients of weights add up, as over accumulated steps."""
    gradient = torch.randn_like(rival(image_embeds).detach())  # LayerNorm has no use for one that is even
    return lambda: rival(image_embeds).backward(gradient)


def multiply_adds(make: Callable[[], Callable[[], Any]]) -> int:
    """Of the matrix products of a run; nothing is computed, since tensors have shapes alone.

    Args:
        make: Makes what is run, whose attention has to be eager: the counter does not see into fused kernels.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        run = make()
        with FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops() // 2  # each is two operations


def count_aggregation(
    name: str, qformer: dict[str, Any], num_images: int, *, num_queries: int = NUM_QUERIES, num_tokens: int = NUM_TOKENS
) -> int:
    """Multiply-adds of one bag, forward and backward."""

    def make() -> Callable[[], None]:
        rival = RIVALS[name](qformer, num_queries)
        for module in rival.modules():
            if hasattr(module, "set_attn_implementation"):
                module.set_attn_implementation("eager")
        width = Blip2QFormerConfig(**qformer).encoder_hidden_size
        return training_pass(rival, torch.randn(1, num_images, num_tokens, width))

    return multiply_adds(make)


def compare(
    rivals: dict[str, nn.Module], image_embeds: Tensor, *, rounds: int, dropout: bool
) -> tuple[Seconds, dict[str, int]]:
    """Seconds in turn, and the peak of bytes above weights and gradients."""
    for rival in rivals.values():
        rival.train(dropout)
    passes = {name: training_pass(rival, image_embeds) for name, rival in rivals.items()}
    measured = in_turn(passes, rounds=rounds)  # gradients exist from here on
    return measured, {name: peak_bytes(run) for name, run in passes.items()}


def measured_cells(measured: Seconds, peaks: Mapping[str, int]) -> list[str]:
    """What `compare` found, under `MEASURED_COLUMNS`."""
    return [
        str(measured.of(OURS)),
        str(measured.of(THEIRS)),
        str(measured.times_as_fast(OURS, THEIRS)),
        f"{peaks[OURS] / 1e6:.1f}",
        f"{peaks[THEIRS] / 1e6:.1f}",
        f"{peaks[OURS] / peaks[THEIRS]:.3f}",
    ]


@dataclass(frozen=True)
class Costs:
    """Of one pass over a batch, rival by rival."""

    seconds: Seconds
    peaks: Mapping[str, int]
    """Bytes, above weights and gradients."""
    multiply_adds: Mapping[str, int]

    def of(self, rival: str) -> dict[str, float]:
        """By unit; seconds are the median."""
        return {
            "s": self.seconds.of(rival).median,
            "peak MB": self.peaks[rival] / 1e6,
            "10^9 multiply-adds": self.multiply_adds[rival] / 1e9,
        }


def aggregation_row(name: str, costs: Costs) -> list[str]:
    """A row: seconds, ratio, peaks, and what was counted."""
    in_billions = {rival: count / 1e9 for rival, count in costs.multiply_adds.items()}
    rates = {rival: count / costs.seconds.of(rival).median for rival, count in in_billions.items()}
    return [
        name,
        *measured_cells(costs.seconds, costs.peaks),
        f"{in_billions[OURS]:.2f}",
        f"{in_billions[THEIRS]:.2f}",
        f"{in_billions[THEIRS] / in_billions[OURS]:.2f}",
        f"{rates[OURS]:.0f}, {rates[THEIRS]:.0f}",
    ]


MEASURED_COLUMNS = [
    "images a bag",
    "s, MIVPG",
    "s, concatenated",
    "times as fast",
    "peak MB, MIVPG",
    "peak MB, concatenated",
    "share of its peak",
]
AGGREGATION_COLUMNS = [
    *MEASURED_COLUMNS,
    "10^9 multiply-adds, MIVPG",
    "10^9, concatenated",
    "times as few",
    "10^9 a second",
]


# ── Over the number of images ───────────────────────────────────────────────────────────────────────────────────────

GROWTH = {OURS: "(NP + RN)", THEIRS: "RNP"}
"""What each rival's cost grows with. At one P and one R both are straight lines over N, and so are the counts."""


@dataclass(frozen=True)
class Curve:
    """A fixed part, and the same for every image."""

    fixed: float
    an_image: float

    @classmethod
    def through(cls, values: Mapping[int, float]) -> "Curve":
        """The one nearest to values over N, by least squares."""
        an_image, fixed = statistics.linear_regression(list(values), list(values.values()))
        return cls(fixed, an_image)

    def at(self, num_images: int) -> float:
        """What it says of a bag."""
        return self.fixed + num_images * self.an_image

    def largest_deviation(self, values: Mapping[int, float]) -> float:
        """Of values over N from it, as a share of what it says."""
        return max(abs(value / self.at(number) - 1) for number, value in values.items())


def over_images(costs: Mapping[int, Costs], rival: str, unit: str) -> dict[int, float]:
    """One unit of `Costs.of` over N."""
    return {number: cost.of(rival)[unit] for number, cost in costs.items()}


def curve_rows(costs: Mapping[int, Costs]) -> list[list[str]]:
    """A row a unit: each rival's curve and how far values are from it, and how much steeper the concatenation's is."""
    rows = []
    for unit in next(iter(costs.values())).of(OURS):
        values = {rival: over_images(costs, rival, unit) for rival in RIVALS}
        curves = {rival: Curve.through(values[rival]) for rival in RIVALS}
        cells = [
            cell
            for rival, curve in curves.items()
            for cell in (
                f"{curve.fixed:.3g}",
                f"{curve.an_image:.3g}",
                f"{100 * curve.largest_deviation(values[rival]):.1f} %",
            )
        ]
        rows.append([unit, *cells, f"{curves[THEIRS].an_image / curves[OURS].an_image:.1f}"])
    return rows


CURVE_COLUMNS = [
    "",
    "MIVPG, fixed",
    "an image more",
    "largest deviation",
    "concatenated, fixed",
    "an image more",
    "largest deviation",
    "times as much an image",
]

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#d5d9de",
    "grid.linewidth": 0.5,
}
LOOKS = {OURS: ("#2f6690", "o"), THEIRS: ("#d55e00", "s")}
"""Colour and mark; blue and vermilion differ to every eye."""


def draw_curves(costs: Mapping[int, Costs]) -> Figure:
    """Seconds and peak memory over N, both rivals: points as measured, and their curves."""
    ends = [min(costs), max(costs)]
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure((7, 3.5), layout="constrained")
        times, memory = figure.subplots(1, 2)
        handles = {}
        for rival, (colour, mark) in LOOKS.items():
            spreads = [cost.seconds.of(rival) for cost in costs.values()]
            below = [spread.median - spread.least for spread in spreads]
            above = [spread.most - spread.median for spread in spreads]
            for axes, unit, bars in ((times, "s", (below, above)), (memory, "peak MB", None)):  # measured once
                values = over_images(costs, rival, unit)
                curve = Curve.through(values)
                (line,) = axes.plot(ends, [curve.at(number) for number in ends], color=colour, linewidth=1)
                points = axes.errorbar(
                    list(values), list(values.values()), bars, fmt=mark, markersize=3, capsize=4, color=colour
                )
                handles[f"{rival}; line: a + b {GROWTH[rival]}"] = (line, points)
        for axes in (times, memory):
            axes.set_ylim(bottom=0)
            axes.set_xticks(list(costs))
            axes.set_xlabel("N, images a bag")
        times.set(title="Time, forward and backward", ylabel="seconds: median, least to most")
        memory.set(title="Peak memory", ylabel="MB beyond weights and gradients")
        figure.legend(handles.values(), handles, loc="outside upper center", frameon=False)
    return figure


# ── The whole step by share ─────────────────────────────────────────────────────────────────────────────────────────


def vision_seconds(config: Blip2VisionConfig, *, rounds: int) -> float:
    """Of one image, forward, without a graph."""
    model = Blip2VisionModel(config).eval().to(DEVICE)
    pixels = torch.randn(1, 3, config.image_size, config.image_size, device=DEVICE)

    @torch.no_grad()
    def see() -> None:
        model(pixel_values=pixels)

    return in_turn({"vision": see}, rounds=rounds).of("vision").median


def language_seconds(config: OPTConfig, num_tokens: int, *, batch_size: int, rounds: int) -> float:
    """Of a decoder's training step with frozen weights: one block times their number, and the output layer."""
    one_block = OPTModel(OPTConfig(**config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 8})).eval()
    one_block.to(DEVICE).requires_grad_(False)
    output = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=DEVICE).requires_grad_(False)
    embeds = torch.randn(batch_size, num_tokens, config.hidden_size, device=DEVICE)

    def through(part: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            found = part(embeds.detach().requires_grad_())
            found.backward(torch.ones_like(found))

        return run

    measured = in_turn(
        {"block": through(lambda x: one_block(inputs_embeds=x).last_hidden_state), "output": through(output)},
        rounds=rounds,
    )
    return config.num_hidden_layers * measured.of("block").median + measured.of("output").median


def count_vision(config: Blip2VisionConfig) -> int:
    """Multiply-adds of one image."""

    def make() -> Callable[[], Any]:
        model = Blip2VisionModel._from_config(config, attn_implementation="eager").requires_grad_(False)
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
        return lambda: model(pixel_values=pixels)

    return multiply_adds(make)


def count_language(config: PreTrainedConfig) -> int:
    """Multiply-adds of one bag's training step: frozen weights, a gradient for the visual prompts.

    A decoder reads visual prompts, prompt and caption; of an encoder-decoder the decoder reads the caption.
    """
    num_read = NUM_QUERIES + NUM_PROMPT_TOKENS

    def make() -> Callable[[], Any]:
        if config.is_encoder_decoder:
            model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
            labels = torch.ones(1, NUM_CAPTION_TOKENS, dtype=torch.long)
            num_embeds = num_read
        else:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            num_embeds = num_read + NUM_CAPTION_TOKENS
            labels = torch.ones(1, num_embeds, dtype=torch.long)
        model.eval().requires_grad_(False)
        embeds = torch.empty(1, num_embeds, config.hidden_size, requires_grad=True)
        return lambda: model(inputs_embeds=embeds, labels=labels).loss.backward()

    return multiply_adds(make)


def share_rows(
    num_images: int,
    parts: dict[str, float],
    counts: dict[str, int],
) -> list[list[str]]:
    """Rows of one bag size: seconds and their share, billions of multiply-adds and their share.

    Args:
        num_images: N.
        parts: Seconds by part; a part that was only counted is missing.
        counts: Multiply-adds by part. What is in `parts` makes the whole.
    """
    whole, counted = sum(parts.values()), sum(counts[part] for part in parts)
    return [
        [
            f"N = {num_images}: {part}",
            f"{parts[part]:.3g}" if part in parts else "counted alone",
            f"{100 * parts[part] / whole:.1f} %" if part in parts else "",
            f"{count / 1e9:,.1f}",
            f"{100 * count / counted:.1f} %" if part in parts else "",
        ]
        for part, count in counts.items()
    ]


def shares(qformer: dict[str, Any], *, rounds: int, num_images: tuple[int, ...] = (1, 21)) -> list[list[str]]:
    """Of a training step at the real size."""
    vision, opt = Blip2VisionConfig(initializer_range=0.02), LANGUAGE_MODELS["blip2-opt-2.7b"]
    assert isinstance(opt, OPTConfig)
    num_tokens = NUM_QUERIES + NUM_PROMPT_TOKENS + NUM_CAPTION_TOKENS
    an_image, count_an_image = vision_seconds(vision, rounds=rounds), count_vision(vision)
    gc.collect()
    language = language_seconds(opt, num_tokens, batch_size=BATCH_SIZE, rounds=rounds)
    gc.collect()
    language_counts = {name: BATCH_SIZE * count_language(config) for name, config in LANGUAGE_MODELS.items()}
    ours = make_rivals(qformer)[OURS].train()
    rows = []
    for number in num_images:
        embeds = torch.randn(BATCH_SIZE, number, NUM_TOKENS, ours.model.config.image_embeds_size, device=DEVICE)
        aggregation = in_turn({OURS: training_pass(ours, embeds)}, rounds=rounds).of(OURS).median
        images = BATCH_SIZE * number
        rows += share_rows(
            number,
            {"vision model": images * an_image, "aggregation": aggregation, "language model, OPT-2.7b": language},
            {
                "vision model": images * count_an_image,
                "aggregation": BATCH_SIZE * count_aggregation(OURS, qformer, number),
                "language model, OPT-2.7b": language_counts["blip2-opt-2.7b"],
                "in its place FLAN-T5-XL": language_counts["blip2-flan-t5-xl"],
            },
        )
    return rows


def product_rate(size: int = 2048) -> float:
    """Multiply-adds a second of a square float32 product, the limit that everything here runs towards."""
    left, right = torch.randn(2, size, size, device=DEVICE)
    return size**3 / min(seconds(lambda: left @ right) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-images", type=int, nargs="*", default=[1, 2, 5, 10, 15, 21])
    parser.add_argument("--no-shares", action="store_true", help="leave out vision model and language model")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="an .svg or .png of seconds and memory over N")
    arguments = parser.parse_args()
    if arguments.picture and len(set(arguments.num_images)) < 2:
        parser.error("--picture takes two numbers of images or more.")
    torch.manual_seed(0)
    qformer: dict[str, Any] = {}  # BLIP-2's sizes
    print(f"{machine()}; a square product of 2,048 runs at {product_rate() / 1e9:.0f} 10^9 multiply-adds a second\n")
    if not arguments.no_shares:
        print(
            f"A training step on {BATCH_SIZE} bags by share, {NUM_TOKENS} tokens an image, {NUM_CAPTION_TOKENS} of a "
            "caption, frozen vision model and language model. Vision model: one image, times their number; language "
            "model: one block of 32, times 32, and its output layer; both float32\n"
        )
        rows = shares(qformer, rounds=3)
        columns = ["images a bag: part", "s", "share", "10^9 multiply-adds", "share of them"]
        print(markdown(columns, rows), flush=True)
    rivals = make_rivals(qformer)
    print("\nAggregation, forward and backward, in turn; median (least to most)\n")
    rows, costs = [], {}
    for number in arguments.num_images:
        embeds = torch.randn(BATCH_SIZE, number, NUM_TOKENS, rivals[OURS].model.config.image_embeds_size, device=DEVICE)
        counts = {name: BATCH_SIZE * count_aggregation(name, qformer, number) for name in rivals}
        costs[number] = Costs(*compare(rivals, embeds, rounds=arguments.rounds, dropout=True), counts)
        rows.append(aggregation_row(str(number), costs[number]))
        if number == max(arguments.num_images):
            without = Costs(*compare(rivals, embeds, rounds=arguments.rounds, dropout=False), counts)
            rows.append(aggregation_row(f"{number}, no dropout", without))
    print(markdown(AGGREGATION_COLUMNS, rows))
    if len(costs) > 1:
        steeper = NUM_QUERIES * NUM_TOKENS / (NUM_TOKENS + NUM_QUERIES)
        print(
            "\nCurves through medians and counts by least squares, a fixed part + a part an image: "
            f"a + b {GROWTH[OURS]} for {OURS}, a + b {GROWTH[THEIRS]} for the {THEIRS}. With P = {NUM_TOKENS} and "
            f"R = {NUM_QUERIES} both are straight over N; {GROWTH[THEIRS]} is {steeper:.1f} times {GROWTH[OURS]}\n"
        )
        print(markdown(CURVE_COLUMNS, curve_rows(costs)))
    if arguments.picture:
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(costs).savefig(arguments.picture, dpi=120)
        print(f"\n![Seconds and peak memory over the number of images]({arguments.picture.name})")


if __name__ == "__main__":
    main()
