"""Waiting for storage that does not answer."""

import logging
import time
from collections.abc import Sequence

log = logging.getLogger("esvit_scale")


class Patience:
    """Growing delays between attempts, one log line each. They are used up once: until something was read again, later
    failures are not waited for, so that storage that is gone costs one round of delays and not one a sample."""

    def __init__(self, delays: Sequence[float]) -> None:
        self._delays = tuple(delays)  # seconds
        self._used = 0

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return sum(self._delays)

    def reset(self) -> None:
        """Something was read."""
        self._used = 0

    def wait(self, what: str, error: OSError) -> bool:
        """Wait for the next delay because `what` could not be read; False, at once, when all are used up."""
        if self._used == len(self._delays):
            return False
        delay = self._delays[self._used]
        self._used += 1
        reason = error.strerror or " ".join(str(error).split())[:200]
        log.warning("%s: %s; trying again in %g s (%d of %d)", what, reason, delay, self._used, len(self._delays))
        time.sleep(delay)
        return True
