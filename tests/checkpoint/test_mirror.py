"""Checkpoints in an object store; fsspec's local file system stands for the store, beside one run with a real server."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esvit_scale import config as configs
from esvit_scale.checkpoint import mirror, mirror_sender, step_folders
from esvit_scale.config import Config
from esvit_scale.data.remote.store import Missing, Store, StoreUnreachable
from esvit_scale.errors import UserError
from esvit_scale.train import pretraining, row_file, run_dir
from tests import object_store, tiny

# What a run dir has beside checkpoints/ and the mirrored records, and a restored run makes anew or can do without.
NOT_MIRRORED = {"lock.json", "mirror.json", "requeue", "checkpoints", "tensorboard", "ranks", "shards", "slurm"}


def config(tmp_path: Path, **overrides: object) -> Config:
    data = tmp_path / "set"
    return tiny.config(tmp_path / "run", data, **{"train__mirror": f"file://{tmp_path}/store", **overrides})


def step_folder(c: Config, step: int) -> Path:
    folder = c.run_path / "checkpoints" / f"step-{step:08d}"
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "rank0").write_bytes(b"%d" % step * 1000)
    (folder / "state.json").write_text("{}")
    (c.run_path / "config.yaml").write_text(configs.dump(c))
    return folder


def sent(tmp_path: Path) -> set[str]:
    store = tmp_path / "store" / "run"
    return {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()}


def in_mirror(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "store/run/checkpoints").iterdir() if path.is_dir())


def send(c: Config, *steps: int) -> None:
    """Claim the mirror and send these checkpoints, one after the other, as a start that writes and sends them."""
    c.run_path.mkdir(exist_ok=True)
    for step in steps:
        folder = step_folder(c, step)
        with mirror_sender.sending(c, True, mirror.claim(c)) as sender:
            assert sender
            sender.send(folder)


def until(is_so: Callable[[], bool]) -> None:
    for _ in range(2000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


@contextmanager
def slow_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, Callable[[], None]]]:
    """Let transfers of tensors wait; yield an event, set when one waits, and a function that lets it go on."""
    waits, may_go_on, put = threading.Event(), threading.Event(), Store.put

    def slow_put(self: Store, path: Path, name: str | None = None) -> None:
        if path.name == "rank0":
            waits.set()
            may_go_on.wait(20)
        put(self, path, name)

    monkeypatch.setattr(Store, "put", slow_put)
    yield waits, may_go_on.set
    may_go_on.set()


def test_newest_checkpoint_is_sent_and_restored(tmp_path: Path) -> None:
    c = config(tmp_path)
    send(c, 10, 20)
    assert (tmp_path / "store/run/latest").read_text() == "step-00000020\n"
    shutil.rmtree(tmp_path / "run")
    mirror.restore(c)
    folder = tmp_path / "run/checkpoints/step-00000020"
    assert (folder / "student/rank0").read_bytes() == b"20" * 1000
    assert (tmp_path / "run/config.yaml").read_text() == configs.dump(c)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000020\n"
    (folder / "student/rank0").write_bytes(b"mine")
    mirror.restore(c)  # what is there stays
    assert (folder / "student/rank0").read_bytes() == b"mine"


def test_records_are_sent_once_more_at_the_end_and_restored(tmp_path: Path) -> None:
    c = config(tmp_path)
    folder, records = step_folder(c, 10), [name for name in mirror.RECORDS if name != "config.yaml"]
    assert {"attention.json", "quarantine.jsonl", "summary.json", "metrics.jsonl"} <= set(records)
    with mirror_sender.sending(c, True, mirror.claim(c)) as sender:
        assert sender
        sender.send(folder)
        until(lambda: sender.mirrored_step() == 10)
        for name in records:
            (tmp_path / "run" / name).write_text(f"last {name}")
    shutil.rmtree(tmp_path / "run")
    mirror.restore(c)
    assert {name: (tmp_path / "run" / name).read_text() for name in records} == {
        name: f"last {name}" for name in records
    }


def test_only_what_this_run_dir_had_is_removed_from_the_mirror(tmp_path: Path) -> None:
    c = config(tmp_path)
    send(c, 10, 20)
    with mirror_sender.sending(c, True) as sender:
        assert sender
        shutil.rmtree(tmp_path / "run/checkpoints/step-00000010")  # pruned
        sender.send(step_folder(c, 30))
    assert in_mirror(tmp_path) == ["step-00000020", "step-00000030"]
    shutil.rmtree(tmp_path / "run")
    mirror.restore(c)
    send(c, 40)  # the restored run dir never had step 20
    assert in_mirror(tmp_path) == ["step-00000020", "step-00000030", "step-00000040"]
    assert not any("step-00000010" in name for name in sent(tmp_path))


def test_best_checkpoint_is_sent_and_restored(tmp_path: Path) -> None:
    c = config(tmp_path)
    best = step_folder(c, 10)
    step_folders.write_best(best)
    send(c, 20)
    assert in_mirror(tmp_path) == [best.name, "step-00000020"]
    shutil.rmtree(tmp_path / "run")
    mirror.restore(c)
    assert step_folders.best(tmp_path / "run") == best
    assert [folder.name for folder in step_folders.candidates(tmp_path / "run")] == ["step-00000020", best.name]


def test_mirror_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(tmp_path)
    send(c, 10)
    (tmp_path / "run").rename(tmp_path / "first")
    before = {path: (tmp_path / "store/run" / path).read_bytes() for path in sent(tmp_path)}
    with pytest.raises(UserError, match=r"holds a run of another config \(optim\.lr: "):
        mirror.restore(config(tmp_path, optim__lr=0.5))
    assert not (tmp_path / "run").exists()
    step_folder(c, 20)  # a run that began without train.mirror
    with pytest.raises(UserError, match=r"checkpoints of another run \(of .*remove file://.*/owner.json"):
        mirror.claim(c)
    with mirror_sender.sending(c, True) as sender:
        assert sender
        sender.send(tmp_path / "run/checkpoints/step-00000020")
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(mirror, "_user", lambda: "somebody else")
        with pytest.raises(UserError, match="another run"):
            mirror.restore(c)
    assert {path: (tmp_path / "store/run" / path).read_bytes() for path in sent(tmp_path)} == before
    (tmp_path / "store/run/owner.json").unlink()  # as the message says
    mirror.restore(c)
    send(c, 20)
    assert in_mirror(tmp_path) == ["step-00000010", "step-00000020"]
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "first").rename(tmp_path / "run")
    with pytest.raises(UserError, match="another run"):
        mirror.claim(c)


def test_run_lost_before_its_first_checkpoint_claims_its_mirror_again(tmp_path: Path) -> None:
    c = config(tmp_path)
    for _ in range(2):
        (tmp_path / "run").mkdir()
        mirror.restore(c)
        assert mirror.claim(c) == 0
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    "damage",
    [("state.json", None), ("files.json", None), ("files.json", "{"), ("files.json", "{}"), ("state.json", "[]")],
)
def test_older_checkpoint_is_restored_where_the_newest_is_damaged(
    tmp_path: Path, damage: tuple[str, str | None], caplog: pytest.LogCaptureFixture
) -> None:
    c, (name, content) = config(tmp_path), damage
    send(c, 10, 20)
    shutil.rmtree(tmp_path / "run")
    for step, left in ((20, ["step-00000010"]), (10, [])):
        path = tmp_path / f"store/run/checkpoints/step-{step:08d}" / name
        path.unlink() if content is None else path.write_text(content)
        if left:
            mirror.restore(c)
            assert [folder.name for folder in step_folders.list_step_folders(tmp_path / "run")] == left
            assert f"{name}: is no" in caplog.text or f"{name}: no such object" in caplog.text
            shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"no checkpoint there can be used .* tried; file://.*json: "):
        mirror.restore(c)
    assert not (tmp_path / "run").exists()


def test_mirror_without_a_complete_checkpoint_is_a_new_run(tmp_path: Path) -> None:
    c = config(tmp_path)
    mirror.restore(c)  # an empty mirror
    assert not (tmp_path / "run").exists()
    send(c, 10)
    for name in ("latest", "checkpoints/step-00000010/files.json"):
        (tmp_path / "store/run" / name).unlink()
    shutil.rmtree(tmp_path / "run")
    mirror.restore(c)
    assert not (tmp_path / "run").exists()


def test_damaged_transfer_is_repeated_and_each_is_granted_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(tmp_path)
    send(c, 10)
    shutil.rmtree(tmp_path / "run")
    fetch, damaged, granted = Store.fetch, list[str](), list[float]()

    def damaging(self: Store, name: str, target: Path, *, urgent: bool, most: int | None = None) -> None:
        fetch(self, name, target, urgent=urgent, most=most)
        if damaged.count(name) < mirror.ATTEMPTS - 1:
            damaged.append(name)
            target.write_bytes(b"x")

    monkeypatch.setattr(Store, "fetch", damaging)
    mirror.restore(c, granted.append)
    assert (tmp_path / "run/checkpoints/step-00000010/student/rank0").read_bytes() == b"10" * 1000
    assert len(granted) == 2 * mirror.ATTEMPTS
    assert max(granted) == 2000 / mirror.SLOWEST


def test_config_is_restored_after_the_checkpoint_and_the_other_records_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/attention.json").write_text("{}")
    send(c, 10)
    shutil.rmtree(tmp_path / "run")

    def killed(*_: object) -> None:
        assert (tmp_path / "run/attention.json").is_file()
        assert not (tmp_path / "run/config.yaml").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mirror.files, "commit_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            mirror.restore(c)
    assert not (tmp_path / "run/config.yaml").exists()
    mirror.restore(c)  # the next start begins anew
    assert (tmp_path / "run/config.yaml").is_file()
    assert step_folders.has_checkpoints(tmp_path / "run")


def test_slow_mirror_gets_whole_checkpoints_and_skips_to_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    c = config(tmp_path, train__keep_checkpoints=1)
    (tmp_path / "run").mkdir()
    mirror.claim(c)
    with slow_store(monkeypatch) as (waits, go_on), mirror_sender.sending(c, True) as sender:
        assert sender
        for step in (10, 20, 30, 40, 50):
            folder = step_folder(c, step)
            step_folders.prune(folder, c)
            sender.send(folder)
            assert waits.wait(20)
            assert sender.mirrored_step() == 0
        assert [each.name for each in step_folders.list_step_folders(c.run_path)] == ["step-00000010", folder.name]
        assert not sender.close(0.01)
        go_on()
        assert sender.close(20)
    assert sender.mirrored_step() == 50
    assert in_mirror(tmp_path) == ["step-00000010", "step-00000050"]  # those in between were left out
    assert "train.mirror: 4 checkpoints were written since step 0" in caplog.text
    step_folders.prune(folder, c)
    assert step_folders.list_step_folders(c.run_path) == [folder]  # no longer held


@pytest.mark.parametrize(
    "error", [StoreUnreachable("gone"), NotImplementedError("read only"), Missing("no such bucket"), ValueError("")]
)
def test_failing_mirror_is_a_warning_and_the_next_checkpoint_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    c, put, failed = config(tmp_path), Store.put, list[str]()

    def fail_once(self: Store, path: Path, name: str | None = None) -> None:
        if not failed:
            failed.append(str(name))
            raise error
        put(self, path, name)

    monkeypatch.setattr(Store, "put", fail_once)
    (tmp_path / "run").mkdir()
    with mirror_sender.sending(c, True, mirror.claim(c)) as sender:
        assert sender
        sender.send(step_folder(c, 10))
        until(lambda: any("the run goes on" in record.message for record in caplog.records))
        assert str(error) in caplog.records[-1].message
        assert caplog.records[-1].levelname == "WARNING"
        sender.send(step_folder(c, 20))
    assert in_mirror(tmp_path)[-1] == "step-00000020"
    assert sender.mirrored_step() == 20


def test_mirror_that_cannot_be_written_ends_a_new_run_and_warns_a_resumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(self: Store, name: str, data: bytes) -> None:
        raise Missing(f"{self.url}/{name}: no such object")

    monkeypatch.setattr(Store, "write", missing)
    c = config(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"cannot be written: .*owner\.json: no such object; correct the address"):
        mirror.claim(c)
    step_folder(c, 10)
    mirror.claim(c)
    assert "cannot be written" in caplog.text
    assert "the run goes on" in caplog.text


def test_mirror_must_be_an_address_without_secrets(tmp_path: Path) -> None:
    for place, why in (("/data/mirror", "no address"), ("https://u:hush@h/x", "password")):
        with pytest.raises(UserError, match=rf"train\.mirror: .*{why}"):
            configs.require_training_data(config(tmp_path, train__mirror=place))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "s3"])
def test_run_whose_disk_is_lost_resumes_from_the_mirror(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.shards(tmp_path / "set")
    with mirror_address(tmp_path, place, monkeypatch) as (address, point_latest_at):
        c = config(tmp_path, train__steps=4, train__checkpoint_every=2, train__mirror=address)
        assert pretraining.pretrain(c) == 0
        rows = row_file.read_rows(tmp_path / "run/metrics.jsonl")
        assert len(rows) == 4
        assert all(0 <= row["mirror_lag_steps"] <= row["step"] for row in rows)
        assert {path.name for path in (tmp_path / "run").iterdir()} <= {*mirror.RECORDS, *NOT_MIRRORED}
        shutil.rmtree(tmp_path / "run")
        mirror.restore(c)
        assert run_dir.open_run(c) == (tmp_path / "run", True)  # its summary.json says that it is finished
        shutil.rmtree(tmp_path / "run")
        point_latest_at("step-00000002")  # as if the run had ended there
        assert pretraining.pretrain(c) == 0
        again = row_file.read_rows(tmp_path / "run/metrics.jsonl")
        assert [row["loss"] for row in again] == [row["loss"] for row in rows]


@contextmanager
def mirror_address(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Callable[[str], None]]]:
    """Yield the address of a mirror, and a function that writes another name into its `latest`."""
    if place == "file":
        yield f"file://{tmp_path}/store", lambda name: (tmp_path / "store/run/latest").write_text(name) and None
        return
    object_store.requires_s3()
    (tmp_path / "server").mkdir()
    with object_store.s3_server(tmp_path / "server") as port:
        object_store.upload(port, tmp_path / "set", "bucket")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        with pytest.raises(UserError, match=r"train\.mirror: s3://no-such-bucket/run cannot be written"):
            mirror.claim(config(tmp_path, train__mirror="s3://no-such-bucket"))
        with mirror.opened(config(tmp_path, train__mirror="s3://bucket/runs")) as store:
            yield "s3://bucket/runs", lambda name: store.write("latest", name.encode())
