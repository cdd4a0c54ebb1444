"""The rules by which a run goes back to its last good checkpoint after too many skipped steps, or gives up."""

from pathlib import Path

from esvit_scale import config as configs
from esvit_scale.checkpoint import step_folders
from esvit_scale.errors import Diverged


class Rollbacks:
    """The count of a run's skipped steps and roll-backs.

    Attributes:
        skipped: steps in a row whose update was not applied.
        done: roll-backs since the process started.
    """

    def __init__(self, run: Path, config: configs.Train) -> None:
        self._run, self._config = run, config
        self.skipped = self.done = 0

    def note_applied(self) -> None:
        """Note a step whose update was applied: the next skipped step is the first in a row."""
        self.skipped = 0

    def note_skipped(self) -> bool:
        """Count a step whose update was not applied; return whether the run must go back now."""
        self.skipped += 1
        return self.skipped == self._config.skips_before_rollback

    def note_done(self) -> None:
        """Count a roll-back that was made."""
        self.done, self.skipped = self.done + 1, 0

    def target(self, reason: str, step: int) -> Path:
        """Return the folder of the checkpoint to go back to.

        Args:
            reason: why the run goes back, for the message of Diverged.
            step: the step at which this was found, for the same message.

        Raises:
            Diverged: there is none, or `train.rollbacks` roll-backs were made already.
        """
        folder = step_folders.newest_valid(self._run)
        if folder is not None and self.done < self._config.rollbacks:
            return folder
        when = "before the first checkpoint" if folder is None else f"after going back {self.done} times"
        raise Diverged(
            f"{self._run}: {reason}, up to step {step}, {when}; "
            "their samples are in quarantine.jsonl, the norms before them in metrics.jsonl. Try a lower optim.lr, a "
            "longer optim.warmup_epochs, model.freeze_patch_embed=true, or train.precision=fp32"
        )
