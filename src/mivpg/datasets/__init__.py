"""The data sets that can be read, one small file each: files -> list of `Sample`."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mivpg.bags import Sample
from mivpg.datasets.abo import AboConfig
from mivpg.datasets.bag_file import BagFileConfig
from mivpg.datasets.coco import CocoConfig
from mivpg.datasets.patch_gastric import PatchGastricConfig
from mivpg.errors import MivpgError
from mivpg.feature_files import ERRORS, name_in_store
from mivpg.files import check_is_file

logger = logging.getLogger(__name__)


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

        Bags that `mivpg extract` could not read are left out, with a warning.

        Raises:
            MivpgError: Not exactly one data set is given, its files are not as they have to be, or the store lacks a
                bag.
        """
        names = [field.name for field in fields(self) if field.name != "features"]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise MivpgError(f"dataset names {' and '.join(given) or 'nothing'}, expected one of {', '.join(names)}.")
        samples: list[Sample] = getattr(self, given[0]).load()
        return samples if self.features is None else _stored(samples, self.features)


def _stored(samples: Sequence[Sample], store: Path) -> list[Sample]:
    """The bags with their features in place of their images or slides, without those the store has noted as bad."""
    unreadable = _unreadable(store / ERRORS)
    found, left_out = [], {}
    for sample in samples:
        file = store / name_in_store(sample.id)
        if file.is_file():
            found.append(replace(sample, images=(), slides=(), features=file))
        elif sample.id in unreadable:
            left_out[sample.id] = unreadable[sample.id]
        else:
            raise MivpgError(f"{store} holds no features of bag {sample.id!r}; `mivpg extract` makes what is missing.")
    if left_out:
        # one line, whatever an error says
        first = " ".join(next(iter(left_out.values())).split())
        if not found:
            raise MivpgError(f"{store} holds no features, since no bag could be read ({ERRORS}: {first})")
        logger.warning(
            "%d bags are left out, since `mivpg extract` could not read them; the first of %s: %s",
            len(left_out),
            store / ERRORS,
            first,
        )
    return found


def _unreadable(file: Path) -> dict[str, str]:
    """What is wrong with each bag that `mivpg extract` passed over, by id."""
    if not file.exists():
        return {}
    check_is_file(file, "the errors of a store")
    errors = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line.decode(errors="surrogatepass"))
            errors[str(record["id"])] = str(record["error"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise MivpgError(
                f'{file}, line {number} is not {{"id", "error"}}; run `mivpg extract` again, which writes it anew.'
            ) from None
    return errors
