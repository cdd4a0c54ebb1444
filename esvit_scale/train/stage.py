"""`data.stage`: every node of a run reads its own copy of the shards."""

import socket

from esvit_scale.data import staging
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.stream import Source
from esvit_scale.errors import UserError
from esvit_scale.parallel import collectives


def on_every_node(data: Source, folder: str) -> Source:
    """The set, or the sets of a mix, on this node's own disk; all ranks call it, and what goes wrong on one node is every rank's error.

    Raises:
        UserError: the data is not a shard set; one line for each node that could not copy.
    """
    if not isinstance(data, Manifest | MixedSets):
        raise UserError("data.stage: copies shard sets (with manifest.json); leave it out for other data")
    problem = None
    try:
        if isinstance(data, Manifest):
            data = staging.staged(data, folder)
        else:
            data = data.moved(lambda manifest: staging.staged(manifest, folder))
    except UserError as error:
        problem = f"{socket.gethostname()}: {error}"
    if problems := sorted({text for text in collectives.gather_objects(problem) if text}):
        raise UserError("\n".join(problems))
    return data
