"""Generated stand-ins for the paper's data sets, in their own files, and the base model that comes with the package."""

from pathlib import Path

BASE_MODEL = Path(__file__).parent / "base_model"
"""A BLIP-2 folder, made by `mivpg miniature-base`."""
