"""The benchmarks of blocks and of aggregation measure what they say.

The rivals are alike where they have to be, what is counted is what the equations give, and a wrong model would show.
"""

import numpy as np
import pytest
import torch
from transformers import Blip2VisionConfig, OPTConfig

import aggregation
import blocks
from measuring import Seconds, kept_bytes
from mivpg import folded_attention

BLOCK = blocks.Sizes(instance_size=12, hidden_size=16, num_heads=2, num_queries=5)
D, H, R, AR, LAYERS, READING, INNER, L = 12, 16, 5, 10, 4, 2, 20, 128
QFORMER = {
    "hidden_size": H,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": INNER,
    "encoder_hidden_size": D,
}


@pytest.fixture
def folded_from_8(monkeypatch) -> None:
    """These bags are small."""
    monkeypatch.setattr(folded_attention, "FOLD_FROM", 8)
    monkeypatch.setattr(folded_attention, "CHUNK", 4)


def test_forms_of_a_block_agree_and_other_weights_would_not(folded_from_8, monkeypatch) -> None:
    taken = []
    folding = folded_attention.instances_ask
    monkeypatch.setattr(folded_attention, "instances_ask", lambda *a, **k: taken.append(1) or folding(*a, **k))
    work = blocks.Work.draw(BLOCK, 9)
    chosen = work.run("chosen")
    assert taken == [1]
    for form in blocks.STRAIGHTFORWARD:
        other = work.run(form)
        assert taken == [1] and other.keys() == chosen.keys()
        assert blocks.largest_difference(chosen, other)[0] < 1e-5
    with torch.no_grad():
        work.block.correlation.output.weight *= 1.01
    assert blocks.largest_difference(chosen, work.run("eager"))[0] > 1e-4


@pytest.mark.slow
def test_small_bags_are_measured_unfolded(folded_from_8) -> None:
    times, kept = blocks.block_rows(BLOCK, 7, rounds=2)
    assert times[0] == kept[0] == "7, straightforward (sdpa)"
    assert kept[1] == kept[2]  # MB, MB of sdpa
    assert kept[4:7] == ["1.000"] * 3
    assert blocks.block_rows(BLOCK, 8, rounds=1)[0][0] == "8, folded"


@pytest.mark.slow
def test_what_an_instance_makes_the_folded_form_keep(folded_from_8) -> None:
    """Two weights for each query of each head, and of two blocks the first one's update; else at least Q, K and V."""
    few, many = blocks.Work.draw(BLOCK, 100), blocks.Work.draw(BLOCK, 300)
    assert many.kept("chosen") - few.kept("chosen") == 200 * 4 * 2 * AR
    assert many.kept("chosen", 2) - few.kept("chosen", 2) == 200 * 4 * (D + 4 * AR)
    for form in blocks.STRAIGHTFORWARD:
        assert many.kept(form) - few.kept(form) >= 200 * 4 * (D + 3 * H)


def test_kept_is_what_autograd_saves() -> None:
    weight = torch.ones(1000, requires_grad=True)
    assert kept_bytes(lambda: weight.exp()) == 4000  # its result
    assert kept_bytes(lambda: weight.exp().sum()) == 4000
    assert kept_bytes(lambda: weight * weight.detach()) == 0
    assert kept_bytes(lambda: weight.sin().sin().sin()) == 8000  # each its input, of which one is the weight


def test_slopes_are_those_of_a_power() -> None:
    sizes = (10, 20, 50, 100)
    seconds = Seconds({str(size): [3e-3 * size**1.5, 1e-3 * size] for size in sizes})
    for slope in blocks.growth(seconds):
        assert (slope.least, slope.most) == pytest.approx((1.0, 1.5))
    measured = blocks.time_over_size(BLOCK, [20, 10], rounds=2)
    assert list(measured.rounds) == ["10", "20"]


def test_peers_that_are_missing_are_left_out(folded_from_8, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "NUM_LANDMARKS", 4)
    rows = blocks.correlation_rows(BLOCK, 9, rounds=1)
    assert rows[0][0] == "CSA" and rows[0][-1].startswith("1 (")
    assert "torchmil, TransMIL's attention" in [row[0] for row in rows]  # a development dependency
    monkeypatch.setattr(blocks, "find_spec", lambda _: None)
    assert [row[0] for row in blocks.correlation_rows(BLOCK, 9, rounds=1)] == ["CSA"]


@pytest.mark.parametrize("num_images", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_counted_products_are_those_of_the_equations(num_images) -> None:
    """Forward and backward: thrice a product, twice where one of its factors needs no gradient."""
    num_tokens = 7
    fixed = LAYERS * (4 * R * H * H + 2 * R * R * H + 2 * R * H * INNER) + READING * 2 * R * H * H
    concatenated = 3 * fixed + num_images * num_tokens * READING * (2 * 2 * D * H + 3 * 2 * R * H)
    of_pooling = num_tokens * (2 * D * L + 3 * L + 2 * D)
    of_instance = 3 * READING * 2 * (2 * D * H + 2 * R * H)
    ours = 3 * (fixed + READING * 2 * R * H * H) + num_images * (of_pooling + of_instance)
    for name, expected in ((aggregation.OURS, ours), (aggregation.THEIRS, concatenated)):
        counted = aggregation.count_aggregation(name, QFORMER, num_images, num_queries=R, num_tokens=num_tokens)
        assert counted == expected


def test_a_frozen_model_s_products_are_counted_once_in_the_backward_pass() -> None:
    width, inner, words, num_layers = 8, 12, 40, 2
    opt = OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=inner,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        vocab_size=words,
    )
    tokens = aggregation.NUM_QUERIES + aggregation.NUM_PROMPT_TOKENS + aggregation.NUM_CAPTION_TOKENS
    linear = num_layers * (4 * width**2 + 2 * width * inner) + words * width
    assert aggregation.count_language(opt) == 2 * tokens * linear + 3 * num_layers * 2 * tokens**2 * width
    vision = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    block = 10 * (4 * width**2 + 2 * width * inner) + 2 * 10**2 * width
    assert aggregation.count_vision(vision) == 9 * 3 * 4**2 * width + num_layers * block


def test_rivals_are_what_they_say() -> None:
    """Weights in common are the same. Patches that change places within a bag: seen by MIVPG alone, bags by neither."""
    torch.manual_seed(0)
    rivals = aggregation.make_rivals(QFORMER, num_queries=R)
    ours, theirs = rivals[aggregation.OURS].eval(), rivals[aggregation.THEIRS].eval()
    trunk = dict(ours.model.qformer.named_parameters())
    assert all(torch.equal(trunk[name], weight) for name, weight in theirs.qformer.named_parameters())
    assert all(parameter.any() for parameter in ours.parameters())
    with torch.no_grad():
        for parameter in (*ours.parameters(), *theirs.parameters()):
            parameter.mul_(5)  # so that a small model sees well
        embeds = torch.randn(2, 3, 7, D)
        swapped = embeds.clone()
        swapped[:, 0, :3], swapped[:, 1, :3] = embeds[:, 1, :3], embeds[:, 0, :3]
        assert (theirs(swapped) - theirs(embeds)).abs().max() < 1e-5
        assert (ours(swapped) - ours(embeds)).abs().max() > 1e-3
        for rival in (ours, theirs):
            assert rival(embeds).shape == (2, R, H)
            assert (rival(embeds.flip(1)) - rival(embeds)).abs().max() < 1e-5


def test_rows_of_aggregation_hold_what_was_measured() -> None:
    rivals = aggregation.make_rivals(QFORMER | {"hidden_size": 2 * L}, num_queries=R)  # wider than AB-MIL
    counts = {aggregation.OURS: 1_000_000_000, aggregation.THEIRS: 4_000_000_000}
    embeds = torch.randn(2, 3, 7, D)
    measured, peaks = aggregation.compare(rivals, embeds, rounds=2, dropout=False)
    row = aggregation.aggregation_row("3", aggregation.Costs(measured, peaks, counts))
    assert len(row) == len(aggregation.AGGREGATION_COLUMNS)
    assert row[0] == "3" and row[7:10] == ["1.00", "4.00", "4.00"]
    _, peaks = aggregation.compare(rivals, embeds, rounds=1, dropout=True)
    assert all(rival.training for rival in rivals.values())
    more = aggregation.compare(rivals, embeds.repeat(1, 20, 1, 1), rounds=1, dropout=False)[1]
    assert more[aggregation.THEIRS] - peaks[aggregation.THEIRS] > more[aggregation.OURS] - peaks[aggregation.OURS]


@pytest.mark.slow
def test_curves_are_drawn_through_what_was_measured_and_say_how_far_it_is(monkeypatch, tmp_path, capsys) -> None:
    numbers = [1, 4, 6, 9]
    medians = {aggregation.OURS: [0.5, 0.58, 0.55, 0.63], aggregation.THEIRS: [0.6, 1.5, 2.0, 3.2]}
    peaks = {aggregation.OURS: [60e6, 66e6, 70e6, 76e6], aggregation.THEIRS: [90e6, 150e6, 230e6, 300e6]}
    make_rivals, count = aggregation.make_rivals, aggregation.count_aggregation

    def as_if(rivals, image_embeds, **_) -> tuple[Seconds, dict[str, float]]:
        place = numbers.index(image_embeds.shape[1])
        rounds = {
            name: [0.9 * medians[name][place], medians[name][place], 1.2 * medians[name][place]] for name in rivals
        }
        return Seconds(rounds), {name: peaks[name][place] for name in rivals}

    monkeypatch.setattr(aggregation, "compare", as_if)
    monkeypatch.setattr(aggregation, "product_rate", lambda: 1e9)
    monkeypatch.setattr(aggregation, "make_rivals", lambda _: make_rivals(QFORMER, num_queries=R))
    monkeypatch.setattr(aggregation, "count_aggregation", lambda name, _, number: count(name, QFORMER, number))
    picture, figures, draw = tmp_path / "new" / "cost.png", [], aggregation.draw_curves
    monkeypatch.setattr(aggregation, "draw_curves", lambda costs: figures.append(draw(costs)) or figures[0])
    options = ["--no-shares", "--num-images", *map(str, numbers), "--picture", str(picture)]
    monkeypatch.setattr("sys.argv", ["aggregation.py", *options])
    aggregation.main()

    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "![Seconds and peak memory over the number of images](cost.png)" in printed
    rows = {row.split(" | ")[0]: row.strip("| ").split(" | ") for row in printed.splitlines()}
    for axes, unit, expected in zip(figures[0].axes, ("s", "peak MB"), (medians, peaks), strict=True):
        cells, slopes = rows[f"| {unit}"], []
        for index, rival in enumerate((aggregation.OURS, aggregation.THEIRS)):
            values = np.array(expected[rival]) / (1 if unit == "s" else 1e6)
            slope, fixed = np.polyfit(numbers, values, 1)
            curve = fixed + slope * np.array(numbers)
            deviation = 100 * np.abs((values - curve) / curve).max()
            slopes.append(slope)
            assert cells[1 + 3 * index : 4 + 3 * index] == [f"{fixed:.3g}", f"{slope:.3g}", f"{deviation:.1f} %"]
            points, _, bars = axes.containers[index].lines
            assert points.get_xydata() == pytest.approx(np.column_stack([numbers, values]))
            drawn = [line for line in axes.lines if line.get_linestyle() == "-"][index]
            assert drawn.get_xydata() == pytest.approx(np.array([[1, curve[0]], [9, curve[-1]]]))
            if unit == "s":
                ends = [segment[:, 1] for segment in bars[0].get_segments()]
                assert ends == pytest.approx(np.column_stack([0.9 * values, 1.2 * values]))
            else:
                assert not bars
        assert cells[7] == f"{slopes[1] / slopes[0]:.1f}"
    assert [rows["| 10^9 multiply-adds"][place] for place in (3, 6)] == ["0.0 %"] * 2


def test_the_whole_step_is_put_together_from_its_parts(monkeypatch) -> None:
    def as_if(runs, **_) -> Seconds:
        for run in runs.values():
            run()
        return Seconds({name: [2.0] for name in runs})

    monkeypatch.setattr(aggregation, "in_turn", as_if)
    opt = OPTConfig(
        hidden_size=8, word_embed_proj_dim=8, ffn_dim=12, num_hidden_layers=32, num_attention_heads=2, vocab_size=40
    )
    assert aggregation.language_seconds(opt, 7, batch_size=2, rounds=1) == 32 * 2.0 + 2.0
    vision = Blip2VisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    assert aggregation.vision_seconds(vision, rounds=1) == 2.0
    rows = aggregation.share_rows(21, {"a": 1.0, "b": 3.0}, {"a": 10**9, "b": 10**9, "c": 10**9})
    assert rows[0] == ["N = 21: a", "1", "25.0 %", "1.0", "50.0 %"]
    assert rows[2] == ["N = 21: c", "counted alone", "", "1.0", ""]
