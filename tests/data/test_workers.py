"""Loader processes that die or lag, and their memory."""

import gc
import os
import signal
import time
from pathlib import Path

import pytest

from esvit_scale.data.loader import translate_worker_errors
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.shard_writer import Sample, write_samples
from esvit_scale.data.stream import batches
from esvit_scale.data.worker_rates import WorkerRates
from esvit_scale.errors import RestartCanHelp
from tests import launcher
from tests.data.conftest import config_with, encoded, picture


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def resident_mb(pid: int) -> float:
    """Proportional, so that what is shared with the parent counts once."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("Private_Dirty")) / 1024


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_worker_ends_with_one_line_and_exit_75(shard_set: Manifest, sign: signal.Signals) -> None:
    before = set(children())
    stream = batches(config_with(workers=2), shard_set, 0, 1, 0, 10**5)
    next(stream)
    worker = next(pid for pid in children() if pid not in before)
    began = time.monotonic()

    def kill_and_read_on() -> None:
        with (
            translate_worker_errors()
        ):  # as the training loop: the signal may arrive before the next batch is asked for
            os.kill(worker, sign)
            list(stream)

    with pytest.raises(RestartCanHelp, match="a loader process died") as error:
        kill_and_read_on()
    assert time.monotonic() - began < 20
    assert error.value.exit_code == 75
    assert "\n" not in str(error.value)
    error.value.__context__ = None  # its traceback keeps the loader, and torch would raise again in the next test
    gc.collect()


def test_batches_report_each_workers_rate(shard_set: Manifest) -> None:
    for workers in (0, 2):
        batch = next(batches(config_with(workers=workers), shard_set, 0, 1, 0, 1))
        assert len(batch.worker_rates) == max(workers, 1)
        assert all(1 < rate < 1e6 for rate in batch.worker_rates.values())


def test_slow_worker_is_named() -> None:
    rates = WorkerRates()
    assert rates.take() == ({}, "")
    for _ in range(3):
        rates.add({0: 100.0, 1: 110.0})  # workers may take turns
        rates.add({2: 10.0, 3: 90.0})
    fields, sentence = rates.take()
    assert fields["worker_images_per_s_min"] == pytest.approx(10)
    assert "loader process 2 makes 10 images/s, the others about 95" in sentence
    rates.add({0: 100.0, 1: 50.0, 2: 60.0})
    assert rates.take()[1] == ""


def test_worker_memory_does_not_grow(tmp_path: Path) -> None:
    """Private memory after 3 and after 15 epochs of pictures of many sizes and formats, some of them bad."""
    kinds = ["JPEG", "PNG", "WEBP"]
    samples = [
        Sample(f"{i:03d}", None, kinds[i % 3].lower(), encoded(picture(i, 200 + 7 * i, 150 + 5 * i), kinds[i % 3]))
        for i in range(48)
    ]
    manifest = write_samples([*samples, Sample("bad", None, "jpg", samples[0].data[:500])], tmp_path / "set", (), 10)
    before = set(children())
    stream = batches(config_with(workers=1), manifest, 0, 1, 0, 6 * 16)
    for _ in range(18):
        next(stream)
    (worker,) = (pid for pid in children() if pid not in before)
    early = resident_mb(worker)
    for _ in range(6 * 12):
        next(stream)
    assert resident_mb(worker) < early + 12, (early, resident_mb(worker))
    stream.close()  # type: ignore[attr-defined]


MANY_PROCESSES = """
from esvit_scale.data.loader import run_stages
from esvit_scale.machine import usable_cpus

workers = usable_cpus() + 1
assert sum(run_stages([lambda: iter([1])], workers)) == workers
"""


def test_more_processes_than_cores_print_no_advice() -> None:
    """In a process of its own, because pytest has filters of its own for warnings."""
    child = launcher.fork("-c", MANY_PROCESSES)
    assert child.communicate(timeout=60) == ("", "")
    assert child.returncode == 0
