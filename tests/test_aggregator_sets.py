"""Set Transformer and TransMIL in MIVPG's place start as PyTorch has it, although they share layers with MIVPG.

MIVPG's `_init_weights` sets the marked ones of those layers to zero. The arithmetic is tested in
`test_aggregators_mil.py`, on modules that no model has initialised.
"""

import pytest
import torch
from torch import nn

from mivpg.miniature import BASE_MODEL
from mivpg.training import ModelConfig

OPTIONS = {
    "set_transformer": {"size": 32, "num_heads": 2, "num_points": 8},
    "transmil": {"size": 32, "num_heads": 2, "num_landmarks": 8},
}


@pytest.mark.parametrize("aggregator", OPTIONS)
def test_a_loaded_models_layers_start_as_pytorch_has_them(aggregator: str) -> None:
    """U(-b, b) with b = 1 / sqrt(fan in), biases too: none is zero, and none is N(0, 0.02)."""
    torch.manual_seed(0)
    config = ModelConfig(
        base=str(BASE_MODEL), aggregator=aggregator, num_query_tokens=4, aggregator_options=OPTIONS[aggregator]
    )
    model, _ = config.load()
    layers = {
        name: layer for name, layer in model.aggregator.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    if aggregator == "transmil":
        assert {"layers.0.attention.output", "layers.1.attention.output"} <= layers.keys()
        assert {f"position_encoding.convolutions.{i}" for i in range(3)} <= layers.keys()
    for name, layer in layers.items():
        bound = layer.weight[0].numel() ** -0.5
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                assert parameter.abs().max() <= bound, name
                assert 0.7 < parameter.std() / (bound / 3**0.5) < 1.3, name
