"""A rank that hangs ends the job, and the log says which rank stands where."""

import subprocess
import sys
from pathlib import Path

from tests import tiny

SCRIPT = """
import sys, time
from pathlib import Path
from esvit_scale import cli
from esvit_scale.parallel import collectives
from esvit_scale.train import loop

real = loop.train_step
def stuck_in_step_4(session, batch, step, **options):
    if step == 4 and collectives.rank() == 1:
        time.sleep(1000)
    return real(session, batch, step, **options)
loop.train_step = stuck_in_step_4
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


def test_a_hung_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(SCRIPT)
    config = tiny.config(
        tmp_path / "run", tiny.shards(tmp_path / "shards"), train__hang_minutes=0.1, train__checkpoint_every=2
    )
    path = tiny.write_config(tmp_path / "c.yaml", config)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "stuck.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=tiny.environment(), timeout=120)
    assert done.returncode != 0
    said = {
        line[:6]: line
        for line in done.stderr.splitlines()
        if ": no progress for 6 s after step 4; it stands at" in line
    }
    assert "rank 0" in said or "rank 1" in said, done.stderr[-3000:]
    if "rank 1" in said:
        assert "in stuck_in_step_4" in said["rank 1"]
    if "rank 0" in said:
        assert "train/step.py" in said["rank 0"] or "parallel/" in said["rank 0"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-00000004"
    # From outside, the same command goes on.
    again = tiny.start_cli("pretrain", str(path))
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert len(tiny.rows(tmp_path / "run")) == 20
