"""Warning when saving a checkpoint takes longer than the time between Slurm's signal and the end of the job.

A run saves when it gets the signal, so the save must fit into this lead time. The batch script sets the environment
variable ESVIT_SIGNAL_LEAD to it, in seconds.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from esvit_scale.parallel import collectives

log = logging.getLogger("esvit_scale")


@contextmanager
def warn_if_longer() -> Iterator[None]:
    """Log a warning on rank 0 if the save inside took longer than the lead time (context manager or decorator)."""
    began = time.monotonic()
    yield
    seconds, lead = time.monotonic() - began, os.environ.get("ESVIT_SIGNAL_LEAD", "")
    if collectives.rank() == 0 and lead.isdecimal() and seconds > int(lead):
        enough = round(2 * seconds + 60)
        log.warning(
            "saving took %.0f s, but Slurm signals the time limit only %s s ahead, so the last steps would be lost; submit with "
            "--signal-lead %d (#SBATCH --signal=B:USR1@%d)",
            *(seconds, lead, enough, enough),
        )
