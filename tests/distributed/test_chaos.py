"""Runs to which faults happen, one after the other, end with the numbers of a run to which nothing happened."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.errors import RestartCanHelp
from esvit_scale.train import run_records
from tests import launcher, tiny
from tests.distributed import comparison, machines
from tests.nursery import Process

Ranks = list[Process]
REQUEUE, INTERRUPTED, RESTART, KILLED = 0, 130, RestartCanHelp.exit_code, -signal.SIGKILL
HANG_S = 20.0  # train.hang_minutes: longer than a step and a save take on two busy cores
STEPS = 300
START_S = 300.0  # eight ranks import torch and DeepSpeed on two busy cores
HOUR_S = 3600.0
EVERY = 4  # train.checkpoint_every
PROCESS_FAULTS = ("kill_rank", "send_term", "send_usr1", "send_int", "kill_all")
MACHINE_FAULTS = (*PROCESS_FAULTS, "stop_rank", "slow_rank", "lose_network", "fill_disk", "jump_clock")


class Chaos:
    """What may happen to the ranks of a run: each method is a fault, and returns when it is over.

    A fault that ends the ranks sets `codes`, the exit codes that they may have then; until then it is None.
    """

    def __init__(self, generator: random.Random, hosts: machines.Machines | None) -> None:
        self._generator, self._hosts = generator, hosts
        self.ranks: Ranks = []
        self.codes: set[int] | None = None

    def ended(self, but: Process | None = None) -> bool:
        """Return whether all ranks have ended, except for the rank `but`."""
        return all(rank.poll() is not None for rank in self.ranks if rank is not but)

    def kill_rank(self) -> None:
        """One rank is gone: the others must notice it and end."""
        self._generator.choice(self.ranks).kill()
        self.codes = {KILLED, RESTART}

    def kill_all(self) -> None:
        """The power fails."""
        for rank in self.ranks:
            rank.kill()
        self.codes = {KILLED}

    def send_term(self) -> None:
        """Slurm preempts with grace."""
        self._generator.choice(self.ranks).send_signal(signal.SIGTERM)
        self.codes = {REQUEUE}

    def send_usr1(self) -> None:
        """The time limit is near."""
        self._generator.choice(self.ranks).send_signal(signal.SIGUSR1)
        self.codes = {REQUEUE}

    def send_int(self) -> None:
        """Somebody presses ctrl-C."""
        self._generator.choice(self.ranks).send_signal(signal.SIGINT)
        self.codes = {INTERRUPTED}

    def stop_rank(self) -> None:
        """One rank stands still for ever: the watchdogs of the others must end them."""
        stopped = self._generator.choice(self.ranks)
        stopped.send_signal(signal.SIGSTOP)
        wait_for(lambda: self.ended(but=stopped), 4 * HANG_S, "the end of the ranks beside the stopped one")
        stopped.kill()
        self.codes = {KILLED, RESTART}

    def slow_rank(self) -> None:
        """One rank gets a fifth of its time for five seconds, and the run goes on."""
        slow = self._generator.choice(self.ranks)
        for _ in range(20):
            slow.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            slow.send_signal(signal.SIGCONT)
            time.sleep(0.05)

    def lose_network(self) -> None:
        """One machine's network is gone: on both sides, the ranks' watchdogs must end them."""
        assert self._hosts is not None
        number = self._generator.choice([1, 2])
        self._hosts.unplug(number)
        wait_for(self.ended, 4 * HANG_S, "the end of the ranks on both sides")
        self._hosts.plug(number)
        self.codes = {RESTART}

    def fill_disk(self) -> None:
        """The disk is full while some saves are due, and the run goes on."""
        assert self._hosts is not None
        self._hosts.disk.fill()
        time.sleep(8)
        self._hosts.disk.free()

    def jump_clock(self) -> None:
        """One machine's clock jumps by up to an hour and stays wrong, and the run goes on."""
        assert self._hosts is not None
        self._hosts.set_clock(self._generator.choice([1, 2]), self._generator.uniform(-HOUR_S, HOUR_S))


def wait_for(ready: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def steps_done(run: Path) -> int:
    rows = tiny.rows(run)
    return rows[-1]["step"] if rows else 0


def planned(names: tuple[str, ...], number: int, steps: int, generator: random.Random) -> list[tuple[int, str]]:
    """Return `number` faults, each with the step after which it happens: all kinds equally often, in random order."""
    kinds = [names[i % len(names)] for i in range(number)]
    generator.shuffle(kinds)
    return [(int((i + generator.random()) * (steps - 10) / number), kind) for i, kind in enumerate(kinds)]


def live_through(
    faults: list[tuple[int, str]], chaos: Chaos, run: Path, start: Callable[[], Ranks]
) -> list[tuple[int, str]]:
    """Start a run again and again until it is finished, while the faults happen; return each with its step."""
    left, done = list(faults), []
    while not run_records.read_summary(run).get("finished"):
        before = steps_done(run)  # a resume cuts the rows after its checkpoint, so that the last step falls first
        chaos.ranks, chaos.codes = start(), None
        began = time.monotonic()
        while left and chaos.codes is None:
            target = max(left[0][0], before + 2)
            wait_for(lambda target=target: chaos.ended() or steps_done(run) >= target, START_S, f"step {target}")
            assert not chaos.ended(), said(chaos.ranks)
            done.append((steps_done(run), left.pop(0)[1]))
            getattr(chaos, done[-1][1])()
        # Every rank ends by itself, however another ended.
        wait_for(chaos.ended, START_S if not left else 4 * HANG_S, f"the end of all ranks after {done[-1:]}")
        codes = [rank.returncode for rank in chaos.ranks]
        print(f"{len(codes)} ranks, {time.monotonic() - began:.0f} s: {done[-3:]}, exit codes {codes}", flush=True)
        assert set(codes) <= (chaos.codes or {0}), said(chaos.ranks)
    return done


def said(ranks: Ranks) -> str:
    """Return the ends of what ended ranks printed, with their exit codes."""
    texts = []
    for number, rank in enumerate(ranks):
        if rank.poll() is not None:
            text = rank.communicate()[1]
            texts.append(f"--- rank {number}: {rank.returncode}\n{text[-1500:]}")
    return "\n".join(texts)


def settings(steps: int) -> dict[str, Any]:
    saves = {"train__checkpoint_every": EVERY, "train__hang_minutes": HANG_S / 60, "train__keep_checkpoints": 2}
    return {"train__steps": steps, "train__ds_config": "zero2", "optim__lr": 1e-3, **saves}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1500)
def test_run_of_two_ranks_survives_signals_and_kills(tmp_path: Path) -> None:
    generator, steps = random.Random(0), 60
    data = tiny.shards(tmp_path / "shards")
    calm, run = tmp_path / "calm", tmp_path / "chaos"
    paths = [
        tiny.write_config(path.with_suffix(".yaml"), tiny.config(path, data, **settings(steps))) for path in (calm, run)
    ]
    launcher.run(*launcher.CLI, "pretrain", paths[0], ranks=2, timeout=400)
    faults = planned(PROCESS_FAULTS, 5, steps, generator)
    start = lambda: launcher.start_ranks(2, *launcher.CLI, "pretrain", paths[1])  # noqa: E731
    assert len(live_through(faults, Chaos(generator, None), run, start)) == 5
    assert tiny.rows(run) == tiny.rows(calm)
    assert [row["step"] for row in tiny.rows(run)] == list(range(1, steps + 1))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a run of eight ranks to which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = tiny.config(folder / "run", tiny.shards(folder / "shards"), **settings(STEPS))
    path = tiny.write_config(folder / "run.yaml", config)
    launcher.run(*launcher.CLI, "pretrain", path, ranks=8, timeout=1800)
    return tiny.rows(folder / "run")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.skipif(bool(reason := machines.why_not()), reason=reason or "")
@pytest.mark.parametrize("worlds", [(8,), (8, 4, 2)], ids=["8 ranks", "8, 4 or 2 ranks"])
def test_run_survives_twenty_faults(undisturbed: list[dict[str, Any]], tmp_path: Path, worlds: tuple[int, ...]) -> None:
    """Bit for bit at one number of ranks; with another one at each start, up to the order of fp32 sums."""
    generator = random.Random(0)
    data = tiny.shards(tmp_path / "shards")
    with machines.machines(tmp_path / "machines", count=2, disk_mb=64) as hosts:
        run = hosts.disk.root / "run"
        path = tiny.write_config(tmp_path / "run.yaml", tiny.config(run, data, **settings(STEPS)))
        faults = planned(MACHINE_FAULTS, 20, STEPS, generator)
        start = lambda: hosts.start(generator.choice(worlds), *launcher.CLI, "pretrain", path)  # noqa: E731
        done = live_through(faults, Chaos(generator, hosts), run, start)
        assert len(done) == 20
        rows, expected = tiny.rows(run), undisturbed
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    if worlds == (8,):
        assert rows == expected
        return
    comparison.assert_same_up_to_order_of_sums(rows, expected)
