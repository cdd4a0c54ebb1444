"""Plain tars: everything comes, exact resume at the same world size, mixes, pipes, bad samples and tars."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale.config import Config, validate
from esvit_scale.data import left_out, tar_stream, url_stream
from esvit_scale.data.manifest import is_shard_set
from esvit_scale.data.stream import Batch, batches, open_data, steps_per_epoch
from esvit_scale.data.url_stream import UrlSets
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.train import header
from tests.data.conftest import encoded, picture
from tests.data.source_helpers import tar_of

PER_TAR = 10


def write_tar(path: Path, images: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> None:
    with tarfile.open(path, "w") as tar:
        for member in extra:
            tar.addfile(member)
        for key, data in images.items():
            for name, content in ((f"{key}.png", data), (f"{key}.cls", key[-1:].encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 tars of 10 samples, a-0 to a-7, and 4 of another set, b-0 to b-3. Read them only."""
    root = tmp_path_factory.mktemp("tars")
    for name, count in (("a", 8), ("b", 4)):
        for t in range(count):
            images = {f"{name}{t}_{i}": encoded(picture(100 * t + i)) for i in range(PER_TAR)}
            write_tar(root / f"{name}-{t}.tar", images)
    return root


def config_of(workers: int = 0, **data: Any) -> Config:
    crops = {"global_crops": {"size": 8}, "local_crops": [{"size": 6, "count": 1}]}
    values = {"data": {"workers": workers, "epoch_samples": 80, **crops, **data}, "train": {"global_batch": 8}}
    return validate(values, "test")


def stream(config: Config, start: int, stop: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(batches(config, open_data(config), rank, world, start, stop))


def same(a: Batch, b: Batch) -> bool:
    pixels = all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))
    return pixels and (a.keys, a.batch_index) == (b.keys, b.batch_index) and torch.equal(a.positions, b.positions)


@pytest.mark.parametrize("spec", ["{root}/a-{{0..7}}.tar", "pipe:cat {root}/a-{{0..7}}.tar"])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2)])
def test_every_sample_comes_once_per_epoch(tars: Path, spec: str, world: int, workers: int) -> None:
    config = config_of(workers, train=spec.format(root=tars))
    assert steps_per_epoch(config, open_data(config)) == 10
    ranks = [stream(config, 0, 20, rank, world) for rank in range(world)]
    for epoch in (0, 1):
        keys = [key for rank in ranks for batch in rank[10 * epoch : 10 * epoch + 10] for key in batch.keys]
        assert sorted(keys) == sorted(f"a{t}_{i}" for t in range(8) for i in range(PER_TAR))
    assert ranks[0][0].keys != ranks[0][10].keys
    assert [int(p) for rank in ranks for p in rank[3].positions] == list(range(8))
    assert all(int(label) == int(key[-1]) for b in ranks[0] for key, label in zip(b.keys, b.labels, strict=True))
    assert all(not b.bad for rank in ranks for b in rank)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_resumed_stream_equals_uninterrupted_at_the_same_world_size(
    tars: Path, world: int, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(workers, train=f"{tars}/a-{{0..7}}.tar")
    uninterrupted = stream(config, 0, 24, world - 1, world)
    for start in (1, 7, 10, 13) if not workers else (13,):
        resumed = stream(config, start, 24, world - 1, world)
        assert len(resumed) == 24 - start
        assert all(map(same, resumed, uninterrupted[start:]))
    if (world, workers) == (1, 0):
        assert "the resume is exact if the run had 1 ranks × 1 workers" in caplog.text


def test_sets_are_mixed_by_weight(tars: Path) -> None:
    mix = [{"urls": f"{tars}/a-{{0..7}}.tar", "weight": 3}, {"urls": f"{tars}/b-{{0..3}}.tar"}]
    config = config_of(mix=mix, epoch_samples=800)
    run = stream(config, 0, 100)
    names = Counter(key[0] for batch in run for key in batch.keys)
    assert abs(names["a"] - 600) < 4.5 * (800 * 0.75 * 0.25) ** 0.5
    twice = [(b, i) for b in run for i, key in enumerate(b.keys) if key == "b1_3"]  # the sets come by again
    assert len(twice) > 2
    assert not torch.equal(*(b.crops[0][:, i] for b, i in twice[:2]))
    assert all(map(same, stream(config, 60, 64), run[60:64]))


def test_bad_samples_and_tars_are_replaced_and_named(tars: Path, tmp_path: Path) -> None:
    link = tarfile.TarInfo("linked.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    climb = tarfile.TarInfo("../../climbed.png")
    climb.type = tarfile.LNKTYPE
    device = tarfile.TarInfo("device.png")
    device.type = tarfile.CHRTYPE
    images = {f"x{i}": encoded(picture(i)) for i in range(12)} | {"broken": b"\x89PNG nothing", "empty": b""}
    write_tar(tmp_path / "0.tar", images, (link, climb, device))
    whole = (tars / "a-0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "2.tar").write_bytes(b"this is no tar" * 100)
    config = config_of(train=f"{tmp_path}/{{0..2}}.tar", epoch_samples=16)
    run = stream(config, 0, 8)
    bad = [row for batch in run for row in batch.bad]
    keys = {key for batch in run for key in batch.keys}
    assert all(len(batch.keys) == 8 for batch in run)
    assert keys <= {f"x{i}" for i in range(12)} | {f"a0_{i}" for i in range(PER_TAR)}
    assert {row["key"] for row in bad} == {"broken", "empty", ""}
    reasons = {Path(row["shard"]).name: row["reason"] for row in bad if not row["key"] and "left_out" not in row}
    assert set(reasons) == {"1.tar", "2.tar"}
    (others,) = (row["left_out"] for row in bad if "left_out" in row)
    assert {row["why"]: row["count"] for row in others} == {left_out.LINK: 2, left_out.SPECIAL: 1}
    for start in range(1, 8):  # which samples come depends on nothing that was decoded before
        assert all(map(same, stream(config, start, 8), run[start:]))


def test_missing_tars_are_one_error_line(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_stream, "RETRY_DELAYS", (0.01,))
    config = config_of(train="pipe:cat /no/such/{0..3}.tar 2>&-")
    with pytest.raises((RestartCanHelp, UserError), match="none of this worker's 4 tars gave a sample"):
        stream(config, 0, 1)
    source = open_data(config_of(train=f"{tars}/a-{{0..1}}.tar"))
    moved = url_stream.UrlSets((source.sets[0]._replace(urls=("/no/such/0.tar", "/no/such/1.tar")),), 80)  # type: ignore[union-attr, call-arg]
    with pytest.raises(RestartCanHelp, match="No such file"):
        next(batches(config, moved, 0, 1, 0, 1))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle that would create a file when it is loaded, under every name that webdataset would decode."""
    witness = tmp_path / "witness"
    payload = f"cposix\nsystem\n(S'touch {witness}'\ntR.".encode()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(20):
            for ext, data in (("png", encoded(picture(i))), ("pyd", payload), ("pth", payload), ("pickle", payload)):
                info = tarfile.TarInfo(f"s{i}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    stream(config_of(train=f"{tmp_path}/0.tar", epoch_samples=16), 0, 4)
    assert not witness.exists()


def refusals(tars: Path) -> Iterator[tuple[dict[str, Any], str]]:
    a = f"{tars}/a-{{0..7}}.tar"
    yield {"train": a, "epoch_samples": None}, r"data\.epoch_samples: not set"
    yield {"train": a, "mix": [{"urls": a}]}, r"data\.mix: data\.train is set too"
    yield {"train": f"{tars}/a-{{0..9}}.tar"}, r"a-8\.tar: no such tar \(and 1 more\)"
    yield {"train": f"{tars}/nothing.tar"}, r"nothing\.tar: no such tar"


def test_invalid_tar_configs_are_errors_that_name_the_remedy(tars: Path) -> None:
    for data, says in refusals(tars):
        with pytest.raises(UserError, match=says):
            stream(config_of(**data), 0, 1)
    with pytest.raises(UserError, match=r"data\.workers: 4 loader processes .* has 1 tars"):
        stream(config_of(2, train=f"{tars}/a-0.tar"), 0, 1, 0, 2)


def test_header_of_a_run_names_what_tars_lack(tars: Path) -> None:
    for train in (f"{tars}/a-0.tar", f"{tars}/a-{{0..7}}.tar"):
        with pytest.raises(UserError, match=r"data\.epoch_samples: not set; plain tars do not say"):
            header.show(validate({"data": {"train": train}}, "test"), "tars")


def test_patterns_in_data_train_expand_or_are_errors(tmp_path: Path) -> None:
    for name in ("x-0.tar", "x-1.tar", "y.tar"):
        tar_of(tmp_path / name, {"a.png": encoded(picture(0))})

    def opened(train: str) -> tuple[str, ...]:
        config = validate({"data": {"train": train, "epoch_samples": 8}}, "test")
        assert UrlSets.wanted(config.data)
        return UrlSets.open(config.data).sets[0].urls

    assert [Path(url).name for url in opened(f"{tmp_path}/x-*.tar")] == ["x-0.tar", "x-1.tar"]
    assert [Path(url).name for url in opened(f"{tmp_path}/{{x-?,y}}.tar")] == ["x-0.tar", "x-1.tar", "y.tar"]
    names = ["x-0", "x-1", "y"]
    several = f"{tmp_path}/{{{','.join(names * 40)}}}.tar"  # longer than the name of a file may be
    assert [Path(url).stem for url in opened(several)] == names * 40
    assert not is_shard_set(Path(several))
    with pytest.raises(UserError, match="no file matches this pattern"):
        opened(f"{tmp_path}/z*.tar")
    with pytest.raises(UserError, match="a pattern can name tars"):
        open_data(validate({"data": {"train": f"{tmp_path}/*"}}, "test"))
