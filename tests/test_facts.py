"""Facts hold, and a model that breaks one is told from one that does not."""

from functools import cache

import torch

from mivpg.experiments.facts import Fact, fact_table, measure_facts
from mivpg.layers import CorrelatedSelfAttention
from mivpg.miniature import BASE_MODEL
from mivpg.modeling_mivpg import MivpgVisualPromptModel


@cache
def measured() -> list[Fact]:
    return measure_facts(str(BASE_MODEL))


def failing(facts: list[Fact]) -> set[str]:
    return {fact.says for fact in facts if not fact.holds}


def test_facts_hold() -> None:
    assert not failing(measured())
    assert len({fact.says for fact in measured()}) == len(measured()) == 18
    assert [row[-1] for row in fact_table(measured()).rows] == ["yes"] * 18


def test_a_csa_that_counts_instances_breaks_its_facts(monkeypatch) -> None:
    forward = CorrelatedSelfAttention.forward

    def counting(self, instances, *inputs):
        return forward(self, instances, *inputs) + 0.01 * torch.arange(instances.shape[1])[:, None]

    monkeypatch.setattr(CorrelatedSelfAttention, "forward", counting)
    assert failing(measure_facts(str(BASE_MODEL))) == {
        "Shuffling the images of a bag leaves MIVPG's prompts alone, with CSA (Proposition 2).",
        "Shuffling the images of a bag leaves MIVPG's prompts alone, with CSA's control.",
        "CSA of shuffled instances is CSA's result, shuffled (Eq. 10).",
    }


def test_padding_that_is_read_breaks_its_facts(monkeypatch) -> None:
    prompts_of = MivpgVisualPromptModel.get_visual_prompts
    monkeypatch.setattr(
        MivpgVisualPromptModel,
        "get_visual_prompts",
        lambda self, image_embeds, *_: prompts_of(self, image_embeds),
    )
    assert {says.split()[0] for says in failing(measure_facts(str(BASE_MODEL)))} >= {"Padding", "Bags"}
