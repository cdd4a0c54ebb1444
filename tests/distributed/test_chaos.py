"""A run on 2 ranks under random kills and signals end with the numbers of an undisturbed run."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from esvit_scale.train import run_records
from tests import launcher, tiny

STEPS_BETWEEN = 10  # two disturbances, on average


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the launcher's own children."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def disturb(process: "subprocess.Popen[str]", generator: random.Random) -> str:
    """Kill or signal a rank, or the launcher; says what was done."""
    what = generator.choice(
        ["kill a rank", "TERM a rank", "USR1 a rank", "INT a rank", "kill the launcher and its ranks"]
    )
    ranks = ranks_of(process.pid)
    if not ranks:
        return "too late"
    if what == "kill the launcher and its ranks":
        process.kill()
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
    else:
        number = {"kill": signal.SIGKILL, "TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "INT": signal.SIGINT}
        os.kill(generator.choice(ranks), number[what.split()[0]])
    return what


def steps_done(run: Path) -> int:
    rows = tiny.rows(run)
    return rows[-1]["step"] if rows else 0


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("disturbances", [5, pytest.param(20, marks=pytest.mark.long)])
def test_run_under_random_kills_equals_undisturbed_run(disturbances: int, tmp_path: Path) -> None:
    generator, steps = random.Random(0), STEPS_BETWEEN * disturbances
    data = tiny.shards(tmp_path / "shards")
    settings = {"train__steps": steps, "train__checkpoint_every": 4, "train__ds_config": "zero2"}
    calm = tiny.write_config(tmp_path / "calm.yaml", tiny.config(tmp_path / "calm", data, **settings))
    launcher.run(*launcher.CLI, "pretrain", calm, ranks=2, timeout=400)
    run = tmp_path / "chaos"
    path = tiny.write_config(tmp_path / "chaos.yaml", tiny.config(run, data, **settings))
    done: list[str] = []
    for _ in range(3 * disturbances):
        process = launcher.start_cli("pretrain", str(path), ranks=2)
        before = steps_done(run)
        # The next disturbance comes after some progress, so that all of them fall within the run.
        target = min(steps, before + generator.randint(2, 2 * STEPS_BETWEEN - 4))
        deadline = time.monotonic() + 120
        while process.poll() is None and (len(done) >= disturbances or steps_done(run) < target):
            assert time.monotonic() < deadline, f"no progress after {done}"
            time.sleep(0.02)
        if process.poll() is None:
            done.append(disturb(process, generator))
        process.communicate(timeout=120)
        if run_records.read_summary(run).get("finished"):
            break
    print(f"{len(done)} disturbances: {done}")
    assert len(done) >= disturbances // 2
    assert run_records.read_summary(run)["finished"]
    assert tiny.rows(run) == tiny.rows(tmp_path / "calm")
    assert [row["step"] for row in tiny.rows(run)] == list(range(1, steps + 1))
