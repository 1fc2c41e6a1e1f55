"""Counted costs are those that the equations give."""

from mivpg.configuration_mivpg import MivpgConfig
from mivpg.experiments import costs

P, D, H, R, L, BLOCKS, READING, INNER = 257, 1408, 768, 32, 128, 4, 2, 3072


def smaller(*, qformer_config: dict, **options) -> MivpgConfig:
    """BLIP-2's widths, and a third of its blocks."""
    return MivpgConfig(qformer_config=qformer_config | {"num_hidden_layers": BLOCKS}, **options)


def test_costs_are_those_of_the_equations(monkeypatch) -> None:
    monkeypatch.setattr(costs, "NUM_IMAGES", (1, 2, 21))
    monkeypatch.setattr(costs, "MivpgConfig", smaller)
    counted = costs.measure_costs()
    of_instance = READING * (2 * D * H + 2 * R * H)  # key and value; scores and the weighted sum
    of_pooling = P * D * L + P * L + P * D
    fixed = BLOCKS * (4 * R * H * H + 2 * R * R * H + 2 * R * H * INNER) + READING * 2 * R * H * H
    expected = {
        "csa": (fixed + READING * 2 * R * H * H, of_pooling + 2 * of_instance),  # CSA: query, output, and the same
        "without_csa": (fixed, of_pooling + of_instance),
        "concatenation": (fixed, P * of_instance),
    }
    for name, (start, an_image) in expected.items():
        arm = counted["arms"][name]
        assert (arm["fixed"], arm["an_image"]) == (start, an_image)
        assert sum(arm["parts"].values()) == an_image
        for number, count in zip(counted["num_images"], arm["multiply_adds"], strict=True):
            line = start + number * an_image
            assert costs.on_the_line(arm, number) == line
            assert count == line if name != "concatenation" or number * P < 2048 else count < 0.8 * line
    assert counted["arms"]["concatenation"]["by_queries"] == P * READING * 2 * R * H
    assert counted["arms"]["csa"]["by_queries"] == 2 * READING * 2 * R * H
    assert counted["factor_an_image"] == P * of_instance / (of_pooling + 2 * of_instance)
    assert counted["factor_unfolded"] > counted["factor"] > 5
    assert costs.draw_costs(counted).startswith(b"\x89PNG")
    bags, images = costs.cost_tables(counted)
    assert [row[0] for row in bags.rows] == [row[0] for row in images.rows]
