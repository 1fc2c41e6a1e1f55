"""The data sets that can be read, one small file each: files -> list of `Sample`."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from mivpg.bags import Sample
from mivpg.datasets.abo import AboConfig
from mivpg.datasets.bag_file import BagFileConfig
from mivpg.datasets.coco import CocoConfig
from mivpg.datasets.patch_gastric import PatchGastricConfig
from mivpg.errors import MivpgError
from mivpg.feature_files import name_in_store


@dataclass(kw_only=True)
class DatasetConfig:
    """Which data set, one of `bag_file`, `abo`, `patch_gastric` and `coco`; and its features, where they are stored."""

    bag_file: BagFileConfig | None = None
    """The user's own data, a line a bag."""
    abo: AboConfig | None = None
    """Amazon Berkeley Objects."""
    patch_gastric: PatchGastricConfig | None = None
    """PatchGastricADC22."""
    coco: CocoConfig | None = None
    """MSCOCO captions in Karpathy's split."""
    features: Path | None = None
    """The store that `mivpg extract` made of its images or slides, which then stay closed; None = its own images."""

    def load(self) -> list[Sample]:
        """Reads the records of the data set; pictures and features stay closed.

        Raises:
            MivpgError: Not exactly one data set is given, its files are not as they have to be, or the store lacks a
                bag.
        """
        names = [field.name for field in fields(self) if field.name != "features"]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise MivpgError(f"dataset names {' and '.join(given) or 'nothing'}, expected one of {', '.join(names)}.")
        samples: list[Sample] = getattr(self, given[0]).load()
        return samples if self.features is None else [_stored(sample, self.features) for sample in samples]


def _stored(sample: Sample, store: Path) -> Sample:
    """The bag with its features in place of its images or slides."""
    file = store / name_in_store(sample.id)
    if not file.is_file():
        raise MivpgError(f"{store} holds no features of bag {sample.id!r}; `mivpg extract` makes what is missing.")
    return replace(sample, images=(), slides=(), features=file)
