"""The aggregators by the names that `MivpgConfig.aggregator` has for them."""

import inspect
from typing import Any

from mivpg.aggregators.base import Aggregator, ScoringAggregator
from mivpg.aggregators.perceiver import PerceiverResampler
from mivpg.aggregators.pooling import AttentionMil, DeepSets, EmbeddingPooling, MaxPooling, MeanPooling
from mivpg.aggregators.projections import LinearProjection, PooledProjection
from mivpg.aggregators.scoring import DsMil, DtfdMil, InstanceNet
from mivpg.aggregators.set_transformer import SetTransformer
from mivpg.aggregators.transmil import TransMil
from mivpg.configuration_mivpg import MivpgConfig
from mivpg.errors import MivpgError

AGGREGATORS: dict[str, type[Aggregator]] = {
    "linear_projection": LinearProjection,
    "pooled_projection": PooledProjection,
    "perceiver": PerceiverResampler,
    "mean": MeanPooling,
    "max": MaxPooling,
    "mi_net": EmbeddingPooling,
    "abmil": AttentionMil,
    "deep_sets": DeepSets,
    "set_transformer": SetTransformer,
    "transmil": TransMil,
}


SCORING_AGGREGATORS: dict[str, type[ScoringAggregator]] = {
    "mi_net_instances": InstanceNet,
    "ds_mil": DsMil,
    "dtfd_mil": DtfdMil,
}


def make_aggregator(config: MivpgConfig, prompt_size: int | None) -> Aggregator | ScoringAggregator:
    """The aggregator that a configuration names.

    Args:
        config: `aggregator`, its `aggregator_options`, and how wide the image embeddings are.
        prompt_size: How wide the prompts are; None where there is a classifier.

    Raises:
        MivpgError: It makes no prompts and should, or has no such option, or not with this value.
    """
    name, options = config.aggregator, dict(config.aggregator_options or {})
    aggregator_class = (AGGREGATORS | SCORING_AGGREGATORS)[name]
    given = ("image_embeds_size", "num_prompts", "hidden_size", "num_labels")  # which the model gives
    known = [parameter for parameter in inspect.signature(aggregator_class).parameters if parameter not in given]
    if unknown := sorted(options.keys() - set(known)):
        raise MivpgError(f"aggregator_options: {name} has no {unknown[0]!r}; it has {', '.join(known) or 'none'}.")
    if name in SCORING_AGGREGATORS:
        if prompt_size is not None:
            raise MivpgError(
                f"aggregator {name!r} is defined by class scores, so it makes no visual prompts; it classifies bags "
                "(MivpgForBagClassification)."
            )
        return SCORING_AGGREGATORS[name](config.image_embeds_size, num_labels=config.num_logits, **options)
    if prompt_size is None and inspect.signature(aggregator_class).parameters["hidden_size"].default is not None:
        prompt_size = config.qformer_config.hidden_size  # one that has no width of its own
    sizes: dict[str, Any] = {"num_prompts": config.num_query_tokens, "hidden_size": prompt_size}
    return AGGREGATORS[name](config.image_embeds_size, **sizes, **options)
