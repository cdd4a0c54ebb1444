"""The shards of a set in columns, and manifests that are read piece by piece."""

import gc
import hashlib
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esvit_scale.data import identity as identities
from esvit_scale.data import manifest as manifests
from esvit_scale.data.manifest import MANIFEST, Manifest
from esvit_scale.data.shard_table import BLOCK, Shard, ShardTable, Texts
from esvit_scale.errors import UserError


def digest(i: object) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def rows(count: int, **changes: Any) -> list[Shard]:
    found = [Shard(f"shard-{i:06d}.tar", i % 7, 10_000 + i, digest(i), digest(-i)) for i in range(count)]
    return [shard._replace(**changes) for shard in found]


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["", "ä", "b" * 64],
        [digest(0), digest(1)],
        [digest(0), digest(1).upper()],  # not what `hex` gives back
        [digest(0), "", "short"],
        ["x", digest(3)],
        ["\udcff.tar", " " * 64, "0" * 62 + "  "],
    ],
)
def test_a_column_gives_its_texts_back(texts: list[str]) -> None:
    for cut in range(len(texts) + 1):
        column = Texts(texts[:cut])
        column.extend(texts[cut:])
        assert list(column) == texts
        assert list(pickle.loads(pickle.dumps(column))) == texts  # noqa: S301 (as ranks get it from rank 0)
        assert column.has_empty == ("" in texts)
        assert list(column[1:]) == texts[1:]
    with pytest.raises(IndexError):
        Texts(texts)[len(texts)]


def test_a_table_equals_the_tuple_of_its_shards() -> None:
    shards = [*rows(BLOCK + 3), Shard("odd.tar", 5, 6, "00")]
    table = ShardTable(shards)
    assert list(table) == shards
    assert (table[-1], table[BLOCK]) == (shards[-1], shards[BLOCK])
    assert list(table[2:5]) == shards[2:5]
    assert table.samples.tolist() == [shard.samples for shard in shards]
    assert table.bytes.tolist() == [shard.bytes for shard in shards]
    assert table == ShardTable(shards)
    assert hash(table) == hash(ShardTable(shards))
    assert table != ShardTable(shards[:-1])
    with pytest.raises(IndexError):
        table[len(table)]


@pytest.mark.parametrize("piece", [1, 7, 300, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_manifests_are_the_same_in_pieces_and_at_once(
    tmp_path: Path, piece: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the layout is, and wherever a piece ends; a line end in a string is written as two characters."""
    monkeypatch.setattr(manifests, "PIECE", piece)
    classes = ["a", '\\n "shards": [\\n  {\\n', "\n  },\n  {\n"]
    options = {"shards": [{}], "recipe": {}}
    content = manifests.dump(rows(count), classes, "source", "test", options)
    expected = Manifest(tmp_path, ShardTable(rows(count)), tuple(classes), "source")
    for layout in (
        content,
        content.rstrip(b"\n"),
        json.dumps(json.loads(content)).encode(),
        json.dumps(json.loads(content), indent=1, sort_keys=True).encode() + b"\n",  # shards before source
    ):
        (tmp_path / MANIFEST).write_bytes(layout)
        assert manifests.load(tmp_path) == expected
        assert manifests.load(tmp_path).has_checksums


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("shard-000004.tar", "shard-000002.tar", "listed twice"),
        ("shard-000004.tar", "../4.tar", "not the name of a tar"),
        ('"bytes": 10004', '"bytes": 9223372036854775808', "not a well-formed manifest"),
        ('"bytes": 10004', '"bytes": -1', "not a count"),
        ('"bytes": 10004,', "", "not a well-formed manifest"),
        ('"bytes": 10004,', '"bytes" 10004,', "not valid JSON"),
        ("\n ]\n}\n", "\n ]\n", "not valid JSON"),
    ],
)
def test_damage_behind_the_first_piece_is_found(
    tmp_path: Path, old: str, new: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "PIECE", 500)
    text = manifests.dump(rows(9), (), "", "test").decode()
    assert old in text
    (tmp_path / MANIFEST).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=says):
        manifests.load(tmp_path)


def test_the_identity_of_a_set_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """Checkpoints hold it: the digest of the JSON list of all shards."""
    for count in (0, 1, BLOCK, BLOCK + 2):
        shards = rows(count)
        expected = hashlib.sha256(json.dumps([[s.samples, s.bytes, s.sha256] for s in shards]).encode()).hexdigest()
        found = identities.identity(Manifest(tmp_path, ShardTable(shards)))
        assert found["sha256"] == expected
        assert found["what"] == f"{count} shards, {sum(s.samples for s in shards)} samples"


def test_large_manifests_take_little_memory(tmp_path: Path) -> None:
    """130 bytes a shard, with a margin, and some MB for the pieces: as objects they took 670."""
    count = 20_000
    (tmp_path / MANIFEST).write_bytes(manifests.dump(rows(count), (), "", "test"))
    gc.collect()
    tracemalloc.start()
    loaded = manifests.load(tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.samples == int(np.sum(loaded.shards.samples))
    assert kept < 150 * count
    assert peak < 150 * count + 6e6
