"""The warning about a slow node, at every ZeRO stage, although all ranks' steps take equally long."""

import json
from pathlib import Path

import pytest

from esvit_scale.parallel import collectives
from esvit_scale.train.slow_nodes import SlowNodes
from tests import launcher, tiny

# Rank 1 sleeps in the first attention of each forward: where a slow processor would lose time, in the midst of a layer.
SLOW_RUN = """
import os, sys, time
os.environ["SLURMD_NODENAME"] = "node" + os.environ["RANK"]
from esvit_scale import cli
from esvit_scale.models import swin
real = swin.WindowAttention.forward
def slow(self, *arguments, **options):
    if os.environ["RANK"] == "1" and self.heads == 1:
        time.sleep(0.15)
    return real(self, *arguments, **options)
swin.WindowAttention.forward = slow
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_rows_name_the_slowest_node(tmp_path: Path, stage: str) -> None:
    (tmp_path / "slow.py").write_text(SLOW_RUN)
    shards = tiny.shards(tmp_path / "shards")
    config = tiny.config(tmp_path / "run", shards, train__ds_config=stage, train__steps=8, train__global_batch=4)
    path = tiny.write_config(tmp_path / "c.yaml", config)
    launcher.run(tmp_path / "slow.py", path, ranks=2)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][1:]
    assert [row["slowest_node"] for row in rows].count("node1") >= 6
    # Teacher and student sleep 0.15 s each; what the other rank waits for them is not its own time.
    differences = sorted(row["compute_s_max"] - row["compute_s_median"] for row in rows)
    assert 0.2 < differences[len(differences) // 2] < 0.6


def observe(monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, list[float]]]) -> list[str]:
    """Return the warnings after these (step, seconds of each rank); rank r is on node r."""
    nodes, said = SlowNodes(), []
    for step, seconds in rows:
        given = [[f"node{rank}" for rank in range(len(seconds))], seconds]
        monkeypatch.setattr(
            collectives, "gather_objects", lambda own, given=given: given[0] if isinstance(own, str) else given[1]
        )
        said.append(nodes.observe(step, seconds[0])[1])
    return [sentence for sentence in said if sentence]


@pytest.mark.parametrize("every", [1, 10, 50])
def test_hundred_slow_steps_give_one_warning(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    slow = [(step, [1.0, 1.0, 1.3, 1.0]) for step in range(every, 601, every)]
    (sentence,) = observe(monkeypatch, slow)
    assert "node2 has been the slowest for" in sentence
    assert "30% above the median" in sentence
    assert len(observe(monkeypatch, [(step, [1.0, 1.3]) for step, _ in slow])) == 1  # two ranks: against each other


def test_short_slowness_gives_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    a_little = [(step, [1.0, 1.0, 1.15, 1.0]) for step in range(1, 400)]
    in_turn = [(step, [1.5 if step // 90 % 3 == rank else 1.0 for rank in range(3)]) for step in range(1, 600)]
    one_stall = [(step, [600.0 if step == 50 else 1.0, 1.0, 1.0]) for step in range(1, 400)]
    alone = [(step, [1.0 + step % 2]) for step in range(1, 400)]
    for rows in (a_little, in_turn, one_stall, alone):
        assert observe(monkeypatch, rows) == []
