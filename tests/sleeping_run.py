"""A run that does not end by itself, for a parent that is killed; beside the tests, whose imports it has no need of."""

import os
import time
from dataclasses import dataclass

from mivpg.experiments.runner import Run


@dataclass(frozen=True, kw_only=True)
class Sleeping(Run):
    """Says which process it is, and goes on for ten minutes."""

    def execute(self) -> None:
        self.log.with_suffix(".pid").write_text(str(os.getpid()))
        time.sleep(600)
