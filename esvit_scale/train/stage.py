"""Copying of the shards to every node's own disk before a run (`data.stage`)."""

import socket

from esvit_scale.data import staging
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.stream import TrainingData
from esvit_scale.errors import UserError
from esvit_scale.parallel import collectives
from esvit_scale.train.watchdog import Watchdog

WAIT_S = 24 * 3600.0  # a rank may wait so long for others that copy; the one that copies reports progress


def on_every_node(data: TrainingData, folder: str, watchdog: Watchdog) -> TrainingData:
    """Copy the shard set, or the sets of a mix, to this node's `folder`, and return the copy. All ranks call it.

    Raises:
        UserError: the data is not a shard set, or a node could not copy it (on all ranks; one line per such node).
    """
    if not isinstance(data, Manifest | MixedSets):
        raise UserError(
            "data.stage: only shard sets (folders with a manifest.json) can be copied; remove data.stage for other data"
        )

    def staged(manifest: Manifest) -> Manifest:
        if manifest.remote:
            raise UserError(
                f"data.stage: {manifest.remote.url} is fetched into data.cache_dir already; remove data.stage"
            )
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
