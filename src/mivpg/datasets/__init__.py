"""The data sets that can be read, one small file each: files -> list of `Sample`."""

from dataclasses import dataclass, fields

from mivpg.bags import Sample
from mivpg.datasets.abo import AboConfig
from mivpg.datasets.bag_file import BagFileConfig
from mivpg.datasets.coco import CocoConfig
from mivpg.datasets.patch_gastric import PatchGastricConfig
from mivpg.errors import MivpgError


@dataclass(kw_only=True)
class DatasetConfig:
    """Which data set; exactly one field is given."""

    bag_file: BagFileConfig | None = None
    """The user's own data, a line a bag."""
    abo: AboConfig | None = None
    """Amazon Berkeley Objects."""
    patch_gastric: PatchGastricConfig | None = None
    """PatchGastricADC22."""
    coco: CocoConfig | None = None
    """MSCOCO captions in Karpathy's split."""

    def load(self) -> list[Sample]:
        """Reads the records of the data set; pictures and features stay closed.

        Raises:
            MivpgError: Not exactly one data set is given, or its files are not as they have to be.
        """
        names = [field.name for field in fields(self)]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise MivpgError(f"dataset names {' and '.join(given) or 'nothing'}, expected one of {', '.join(names)}.")
        samples: list[Sample] = getattr(self, given[0]).load()
        return samples
