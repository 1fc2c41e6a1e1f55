"""MIVPG: a bag of images becomes a fixed number of visual prompts for a frozen language model.

Names are imported when they are first used, so that `import mivpg` is quick; the first model, configuration or
processor registers MIVPG with transformers' Auto classes.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "configuration_mivpg": ("MivpgConfig", "MivpgQFormerConfig"),
    "modeling_mivpg": ("MivpgForBagClassification", "MivpgForConditionalGeneration", "MivpgQFormerModel"),
    "aggregators.base": ("BagScores", "VisualPrompts"),
    "processing_mivpg": ("MivpgProcessor",),
    "bags": ("Bag", "BagCollator", "BagDataset", "BagSampler", "Sample"),
    "datasets": ("DatasetConfig",),
    "datasets.bag_file": ("load_bag_file",),
    "features": ("extract_features",),
    "training": ("ModelConfig", "TrainConfig", "train"),
    "classification": ("ClassifierConfig", "cross_validate", "load_labelled_bags"),
    "captioning": ("GenerationOptions", "caption_bags", "caption_file"),
    "evaluation": ("evaluate_captions", "score_captions"),
    "visualization": ("as_seen", "attention_maps", "draw_attention", "image_weights"),
    "errors": ("BagError", "MivpgError"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Imports the module that a public name lives in (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mivpg' has no attribute {name!r}")
    if _HOMES[name].endswith("_mivpg"):
        for module in ("modeling_mivpg", "processing_mivpg"):  # together, so that every Auto class knows them
            importlib.import_module(f"mivpg.{module}")
    return getattr(importlib.import_module(f"mivpg.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
