"""`data.stage`: every node of a run reads its own copy of the shards."""

import socket

from esvit_scale.data import staging
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.stream import Source
from esvit_scale.errors import UserError
from esvit_scale.parallel import collectives
from esvit_scale.train.watchdog import Watchdog

WAIT_S = 24 * 3600.0  # for other processes and nodes, which copy; the process that copies shows progress by itself


def on_every_node(data: Source, folder: str, watchdog: Watchdog) -> Source:
    """Return the set, or the sets of a mix, on this node's own disk. All ranks call it, and what goes wrong on one node is
    every rank's error.

    Raises:
        UserError: the data is not a shard set; one line for each node that could not copy.
    """
    if not isinstance(data, Manifest | MixedSets):
        raise UserError("data.stage: copies shard sets (with manifest.json); leave it out for other data")

    def staged(manifest: Manifest) -> Manifest:
        watchdog.grant(WAIT_S)
        return staging.staged(manifest, folder, watchdog.progress)

    problem = None
    try:
        data = staged(data) if isinstance(data, Manifest) else data.moved(staged)
    except UserError as error:
        problem = f"{socket.gethostname()}: {error}"
    watchdog.grant(WAIT_S)
    if problems := sorted({text for text in collectives.gather_objects(problem) if text}):
        raise UserError("\n".join(problems))
    watchdog.progress()
    return data
