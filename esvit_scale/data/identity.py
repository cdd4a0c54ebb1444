"""The identity of a run's data, as far as it is known without reading it; stored in checkpoints and compared on resume.

The same content in another place has the same identity; other content, or the same content in another order, has a
different one.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from esvit_scale.data.manifest import MANIFEST, Manifest, stats
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.shard_table import BLOCK
from esvit_scale.data.stream import TrainingData
from esvit_scale.data.url_stream import UrlSets
from esvit_scale.errors import UserError
from esvit_scale.files import sha256

log = logging.getLogger("esvit_scale")

MOST_BYTES = 4 << 30  # bytes of changed shards that a resume reads at most; this takes some seconds
Identity = dict[str, str]  # "what": a description; "sha256": equal for the same data


def identity(data: TrainingData) -> Identity:
    """Return the identity of a run's data.

    For a shard set it covers the contents and order of the shards, as the manifest records them, but not their names or
    place; for a mix of sets also the weights and the length of an epoch. For plain tars, which record nothing, it covers the
    names and sizes of local files or the URLs, the weights of a mix, and the length of an epoch.
    """
    if isinstance(data, Manifest):
        return _shard_set(data)
    if isinstance(data, MixedSets):
        sets = [[str(one.weight), _shard_set(one.manifest)["sha256"]] for one in data.sets]
        what = " and ".join(_shard_set(one.manifest)["what"] for one in data.sets)
        return {"what": f"{what}, mixed, {data.samples} an epoch", "sha256": _digest([data.samples, sets])}
    assert isinstance(data, UrlSets)
    tars = sum(len(s.urls) for s in data.sets)
    content = [data.samples, [[s.weight, [_tar(url) for url in s.urls]] for s in data.sets]]
    return {"what": f"{tars} plain tars, {data.samples} samples an epoch", "sha256": _digest(content)}


def check_same(checkpoint: Path, recorded: Any, now: Identity, place: str) -> None:
    """Compare the identity of the data that a checkpoint records with `now`, the identity of the data in the config.

    A checkpoint that records no identity passes.

    Args:
        place: what names the data in the config, for the message.

    Raises:
        UserError: the checkpoint was trained on other data; the message describes both.
    """
    if not isinstance(recorded, dict) or recorded.get("sha256") == now["sha256"]:
        return
    raise UserError(
        f"{checkpoint}: was trained on {_in_words(recorded)}, but {place} holds {_in_words(now)}; put the run's data "
        f"back, or start another run (name=…, with model.init_from={checkpoint} for its weights)"
    )


def check_unchanged(data: TrainingData, checkpoint: Path, written_ns: int) -> None:
    """Compare the sha256 of shard files that changed after the checkpoint was written with the manifest's.

    At most about MOST_BYTES are read, spread over the set, since all files of a copied set count as changed.

    Args:
        written_ns: time at which the checkpoint was written, in ns since 1970.

    Raises:
        UserError: a shard is not the one that the manifest describes.
    """
    manifests = [data] if isinstance(data, Manifest) else []
    if isinstance(data, MixedSets):
        manifests = [one.manifest for one in data.sets]
    manifests = [manifest for manifest in manifests if not manifest.remote]  # whose shards are compared when fetched
    changed: list[tuple[Manifest, int]] = []
    for manifest in manifests:
        for number, status in stats(manifest):
            if isinstance(status, OSError):
                raise status
            if status.st_ctime_ns > written_ns:
                changed.append((manifest, number))
    if not changed:
        return
    every = max(1, -(-sum(int(manifest.shards.bytes[number]) for manifest, number in changed) // MOST_BYTES))
    read = sum(int(manifest.shards.bytes[number]) for manifest, number in changed[::every])
    log.info(
        "comparing %.1f GB of shard files with the manifest, because they are newer than %s …", read / 1e9, checkpoint
    )
    for manifest, number in changed[::every]:
        shard = manifest.shards[number]
        path = manifest.root / shard.name
        if (found := sha256(path)) != shard.sha256:
            raise UserError(
                f"{path}: changed after {checkpoint} was written, and is not what {MANIFEST} says (sha256 {found[:12]}… "
                f"instead of {shard.sha256[:12]}…); copy the shard again, or start another run (name=…)"
            )
    log.info(
        "%d shard files changed on disk since %s was written; compared the contents of %d: they are the same",
        len(changed),
        *(checkpoint, len(changed[::every])),
    )


def _shard_set(manifest: Manifest) -> Identity:
    """Return the identity of a set: the digest of a JSON list of its shards, which is not in memory as a whole."""
    shards, digest = manifest.shards, hashlib.sha256(b"[")
    for first in range(0, len(shards), BLOCK):
        block = range(first, min(first + BLOCK, len(shards)))
        numbers = (column[first : block.stop].tolist() for column in (shards.samples, shards.bytes))
        rows = json.dumps(list(zip(*numbers, map(shards.sha256.__getitem__, block), strict=True)))
        digest.update((", " * (first > 0) + rows[1:-1]).encode())
    digest.update(b"]")
    return {"what": f"{len(shards)} shards, {manifest.samples} samples", "sha256": digest.hexdigest()}


def _tar(url: str) -> list[Any]:
    """Return what identifies a plain tar: the name and size of a local file, or a URL or command as it is written."""
    if url.startswith("pipe:") or "://" in url:
        return [url]
    return [Path(url).name, Path(url).stat().st_size]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _in_words(identity: Identity) -> str:
    return f"{identity.get('what')} (sha256 {str(identity.get('sha256'))[:12]}…)"
