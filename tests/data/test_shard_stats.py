import json
from pathlib import Path

import numpy as np

from esvit_scale.data.manifest import Manifest
from esvit_scale.data.shard_stats import as_json, gather, table
from esvit_scale.data.shard_writer import create
from tests.data.conftest import encoded, picture


def test_statistics_agree_with_the_files(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    sizes, sides, classes = [], [], {"a": 0, "b": 0}
    for i in range(17):
        kind = "ab"[int(rng.integers(2))] if i > 1 else "ab"[i]
        width, height = rng.integers(8, 60, 2).tolist()
        data = encoded(picture(i, width, height), "PNG" if i % 3 else "JPEG")
        path = tmp_path / "images" / kind / f"{i}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        sizes.append(len(data))
        sides.append((width, height))
        classes[kind] += 1
    (tmp_path / "images" / "a" / "bad.png").write_bytes(b"x")
    create(tmp_path / "images", tmp_path / "set", 4)
    for workers in (1, 2):
        stats = gather(tmp_path / "set", workers)
        assert sorted(stats.image_bytes.tolist()) == sorted(sizes)
        assert sorted(map(tuple, stats.sides.tolist())) == sorted(sides)
        assert dict(zip(stats.classes, stats.class_counts.tolist(), strict=True)) == classes
        assert stats.members == {"png": 11, "jpg": 6, "cls": 17}
        assert stats.quarantined == 1
    summary = json.loads(as_json(stats))
    assert summary["samples"] == 17
    assert summary["bytes_per_image"] == [min(sizes), int(np.median(sizes)), max(sizes)]
    assert summary["class_counts"] == classes
    text = table(stats)
    assert "17 in 5 shards" in text
    assert "left out    1 files" in text


def test_statistics_of_a_set_without_classes(shard_set: Manifest, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.png").write_bytes(encoded(picture(0)))
    create(tmp_path / "flat", tmp_path / "set")
    assert "classes" not in table(gather(tmp_path / "set"))
    assert gather(shard_set.root).class_counts.tolist() == [18, 18, 17]
