"""A batch job hears of its end some seconds before it (ESVIT_SIGNAL_LEAD): a save must fit in them."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from esvit_scale.parallel import collectives

log = logging.getLogger("esvit_scale")


@contextmanager
def warn_if_longer() -> Iterator[None]:
    """Around a save, or as its decorator: warns once it took longer than the signal's lead."""
    began = time.monotonic()
    yield
    seconds, lead = time.monotonic() - began, os.environ.get("ESVIT_SIGNAL_LEAD", "")
    if collectives.rank() == 0 and lead.isdecimal() and seconds > int(lead):
        enough = round(2 * seconds + 60)
        log.warning(
            "saving took %.0f s, but the job hears of its time limit %s s before it: the last steps would be lost; submit with "
            "--signal-lead %d (#SBATCH --signal=B:USR1@%d)",
            *(seconds, lead, enough, enough),
        )
