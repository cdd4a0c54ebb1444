"""Repair of shard sets: damaged tars and indexes are written again, and nothing else is touched."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from esvit_scale import files
from esvit_scale.data import checksums, pool, set_folder
from esvit_scale.data import manifest as manifests
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.planned_sets import plan_of, planned_sets
from esvit_scale.data.planned_shard import write_planned
from esvit_scale.data.reencode import Reencode
from esvit_scale.data.shard_plan import Recipe, ShardPlan, fingerprint
from esvit_scale.data.shard_verify import check_shards
from esvit_scale.data.sources import SourceOptions
from esvit_scale.errors import UserError

PATHS = ("root", "classes", "keep")  # options that are paths


def repair(root: Path, where: str, workers: int = 1) -> list[str]:
    """Write the damaged tars and indexes of a shard set again.

    An index that does not agree with an undamaged tar is made from the tar. Tars that differ from the manifest are
    written again from the source, with the options that the manifest records, and replaced when they have the
    manifest's sha256.

    Args:
        where: the source; may be empty when only indexes are damaged.

    Returns:
        One line per repaired file.

    Raises:
        UserError: the source is needed but not given, or is not the one that the set was written from.
    """
    manifest = manifests.load(root)
    if manifest.remote:
        raise UserError(f"{manifest.remote.url}: a set in a store cannot be repaired in place; upload its shards again")
    with set_folder.held(root):
        checked = check_shards(manifest, workers)
        done = []
        for shard, state in zip(manifest.shards, checked, strict=True):
            if state.side_car and not state.tar:
                done.append(_index_again(root / shard.name, bool(shard.index_sha256)))
        bad = [number for number, state in enumerate(checked) if state.tar]
        if bad and not where:
            raise UserError(f"{checked[bad[0]].tar[0]}; give the source to write the tar again: --repair SRC")
        if bad:
            done += _tars_again(manifest, bad, where, workers)
    return done


def _index_again(tar: Path, with_checksums: bool) -> str:
    index, scan = manifests.index_path(tar), checksums.scan if with_checksums else manifests.scan
    files.write_bytes(index, manifests.dump_index(tar.name, scan(tar)))
    return f"{index}: made from its tar"


def _tars_again(manifest: Manifest, bad: list[int], where: str, workers: int) -> list[str]:
    plan = _plan(manifest, where, workers)
    tmp = manifest.root / set_folder.PARTIAL
    tmp.mkdir(exist_ok=True)
    try:
        numbers = [int(manifest.shards[number].name[6:12]) for number in bad]
        by_number = dict(zip(numbers, bad, strict=True))
        samples = sum(plan.count(range(number, number + 1)) for number in numbers)
        done = []
        for number, written in pool.each(partial(write_planned, plan, tmp), numbers, workers, samples, "images"):
            shard = manifest.shards[by_number[number]]
            if written.shard is None or written.shard.sha256 != shard.sha256:
                raise UserError(
                    f"{manifest.root / shard.name}: has another sha256 when written again: the images of {where} are not "
                    "those that the set was written from, or another version of Pillow re-encoded them; write the whole set "
                    "again"
                )
            for path in (tmp / shard.name, manifests.index_path(tmp / shard.name)):
                path.replace(manifest.root / path.name)
            done.append(f"{manifest.root / shard.name}: written again")
        files.sync_folder(manifest.root)
        return done
    finally:
        for path in tmp.iterdir():
            path.unlink()
        tmp.rmdir()


def _plan(manifest: Manifest, where: str, workers: int) -> ShardPlan:
    recorded = recorded_options(manifest.root)
    try:
        options = SourceOptions(**_with_paths(recorded["source"]))
        values = _with_paths(recorded["recipe"])
        recipe = Recipe(**values | {"reencode": Reencode(**values["reencode"])})
        split = str(recorded["split"])
    except (KeyError, TypeError):
        raise UserError(f"{manifest.root}: its manifest does not say how it was written; write the set again") from None
    planned = planned_sets(where, options, recipe).get(split)
    if planned is None or fingerprint(planned.source, recipe, planned.chosen) != manifest.source:
        raise UserError(f"{where}: not what {manifest.root} was written from (other files, sizes or lists)")
    return plan_of(planned, recipe, workers)[0]


def recorded_options(root: Path) -> dict[str, Any]:
    """Return the options that a set was written with, as its manifest records them; empty when it records none."""
    recorded = json.loads((root / manifests.MANIFEST).read_bytes()).get("options")
    return recorded if isinstance(recorded, dict) else {}


def _with_paths(values: dict[str, Any]) -> dict[str, Any]:
    return {name: Path(value) if name in PATHS and value else value for name, value in values.items()}
