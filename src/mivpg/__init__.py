"""MIVPG: a bag of images becomes a fixed number of visual prompts for a frozen language model."""

__version__ = "0.1.0.dev0"
