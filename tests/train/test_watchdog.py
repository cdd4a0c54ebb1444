"""A rank that hangs or is stopped ends the job, and the log says where each rank is."""

import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from esvit_scale.parallel import hang_reports
from esvit_scale.parallel.world import World
from esvit_scale.train import watchdog
from tests import launcher, tiny

HUNG_RUN = """
import sys, time
import torch, torch.distributed as dist
from esvit_scale import cli
from esvit_scale.parallel import collectives
from esvit_scale.train.trainer import Trainer

real = Trainer.train_step
def stuck_in_step_4(trainer, *arguments, **options):
    if trainer.step == 3:
        for group in dist.distributed_c10d._world.pg_map:
            print("timeout", group._get_backend(torch.device("cpu")).options._timeout.total_seconds(), flush=True)
    if trainer.step == 4 and collectives.rank() == 1:
        time.sleep(1000)
    return real(trainer, *arguments, **options)
Trainer.train_step = stuck_in_step_4
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.alone
def test_hanging_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(HUNG_RUN)
    shards = tiny.shards(tmp_path / "shards")
    config = tiny.config(
        tmp_path / "run", shards, train__hang_minutes=0.1, train__checkpoint_every=2, train__ds_config="zero3"
    )
    path = tiny.write_config(tmp_path / "c.yaml", config)
    done = launcher.wait(launcher.start(tmp_path / "stuck.py", path, ranks=2), timeout=120)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hang: ")]
    assert re.search(
        r"rank 1 on \S+ is in no collective but at .* < stuck.py:\d+ in stuck_in_step_4; rank 0 waits in \w+", line
    )
    for rank, place in enumerate(("in train_step", "in stuck_in_step_4")):
        assert place in (tmp_path / f"run/ranks/rank-{rank}.stacks.txt").read_text()
    # The default group, DeepSpeed's and the saver's, on both ranks: no collective gives up before the watchdog speaks.
    timeouts = [float(row.split()[1]) for row in done.stdout.splitlines() if row.startswith("timeout ")]
    assert len(timeouts) >= 6
    assert min(timeouts) > 86400 + 60 * config.train.hang_minutes
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-00000004"
    # From outside, the same command goes on.
    again = launcher.fork(*launcher.CLI, "pretrain", path)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert len(tiny.rows(tmp_path / "run")) == 20


# Ranks that only exchange a number at every step: which rank stops, and how, are the arguments.
RANKS = """
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from esvit_scale.parallel.world import World
from esvit_scale.train.watchdog import Watchdog

folder, stopped, asleep = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
with Watchdog(World(rank, size, rank, torch.device("cpu")), 3.0, folder) as watchdog:
    for step in range(1000):
        watchdog.beat(step)
        if step == 3 and rank == stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        if step == 3 and rank == asleep:
            (folder / "asleep").touch()
            time.sleep(1000)
        dist.all_reduce(torch.ones(1))
"""


def start_ranks(folder: Path, size: int, *arguments: object) -> "list[subprocess.Popen[str]]":
    (folder / "ranks.py").write_text(RANKS)
    return launcher.start_ranks(size, folder / "ranks.py", folder, *arguments)


@pytest.mark.parametrize(
    ("size", "stopped", "asleep"), [(2, 0, -1), pytest.param(4, 2, 3, marks=[pytest.mark.slow, pytest.mark.alone])]
)
def test_stopped_rank_is_named(tmp_path: Path, size: int, stopped: int, asleep: int) -> None:
    """The stopped rank may hold the store; the others must report it all the same."""
    ranks = start_ranks(tmp_path, size, stopped, asleep)
    said = {rank: process.communicate(timeout=60)[1] for rank, process in enumerate(ranks) if rank != stopped}
    ranks[stopped].kill()
    ranks[stopped].communicate()
    assert {process.returncode for rank, process in enumerate(ranks) if rank != stopped} == {75}
    (line,) = [line for text in said.values() for line in text.splitlines() if line.startswith("hang: ")]
    if stopped == 0:  # its process keeps the store; under torchrun another does, so nobody is accused
        assert "; the store on 127.0.0.1 could not be asked where the other ranks are; " in line
    else:
        assert f"rank {stopped} on {socket.gethostname()} does not answer" in line
    assert ("ranks 0-1 wait in " if size == 4 else "rank 1 waits in ") in line
    assert ("rank 3 on" in line and "is in no collective but at ranks.py:18" in line) is (asleep == 3)


@pytest.mark.slow
@pytest.mark.alone
def test_suspended_time_does_not_count(tmp_path: Path) -> None:
    (process,) = start_ranks(tmp_path, 1, -1, 0)
    end = time.monotonic() + 60
    while not (tmp_path / "asleep").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    time.sleep(1)
    assert process.poll() is None  # 5 s stopped, of 3 s that it may stand still
    assert "no progress for 3 s after step 3; it is at ranks.py:18" in process.communicate(timeout=30)[1]
    assert process.returncode == 75


def test_summary_names_every_rank_once() -> None:
    waiting = {"node": "n", "step": 7, "waits": "all_gather no. 3", "place": "train/trainer.py:9 in f"}
    found = dict.fromkeys((0, 1, 2, 5), waiting) | {3: {**waiting, "waits": None, "place": "data/x.py:1 in read"}}
    assert watchdog.summary(found, {4: "node2", 6: "node2"}) == (
        "hang: rank 3 on n is in no collective but at data/x.py:1 in read; ranks 4,6 on node2 do not answer: stopped, or the "
        "node is gone; ranks 0-2,5 wait in all_gather no. 3 (train/trainer.py:9 in f)"
    )


def test_thousand_ranks_make_few_store_requests() -> None:
    """One thread of the store answers all requests, so that only a few ranks may read the reports of all."""
    size, store, calls = 1000, dist.HashStore(), [0]

    class Counted:
        def __getattr__(self, name: str) -> Any:
            calls[0] += 1
            return getattr(store, name)

    boards = [hang_reports.HangReports(rank, size) for rank in range(size)]
    for board in boards:
        board._board = Counted()
    order = [rank for rank in range(size - 1, -1, -1) if rank not in (0, 1, 700)]  # these three are stopped
    collectors = [rank for rank in order if boards[rank].give({"step": rank})]
    assert collectors == [999, 998, 997, 996, 3, 2]
    assert calls[0] == 2 * 997
    found, silent, writer = boards[998].collect(0.2)
    assert (sorted(found), writer) == (sorted(order), 2)
    assert found[5] == {"step": 5}
    assert silent == dict.fromkeys((0, 1, 700), "an unknown node")
    before = calls[0]
    store.set("written", "1")
    boards[500].close(1.0)
    assert calls[0] - before == 2
    assert before < 10_000


def test_start_and_grant_have_their_own_deadlines(tmp_path: Path) -> None:
    dog = watchdog.Watchdog(World(0, 1, 0, torch.device("cpu")), 3.0, tmp_path)
    assert dog.deadline() == watchdog.START_S
    dog.beat(40)  # the run resumes here; its first step compiles
    assert dog.deadline() == watchdog.START_S
    dog.grant(5000)
    assert dog.deadline() == 5000
    dog.progress()
    assert dog.deadline() == watchdog.START_S
    dog.beat(41)
    assert dog.deadline() == 3.0
    dog.beat(40)  # after a roll-back
    assert dog.deadline() == 3.0
