"""The shipped scripts on a real Slurm: whatever happens to a job, its run ends with an undisturbed run's numbers."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.slurm.cluster import Cluster, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(reason := why_not()), reason=reason or ""),
]
SCRIPTS = tiny.REPOSITORY / "slurm"
STEPS, LONG = 80, 1500


class Site:
    """A cluster, its users' env.sh, tiny shards; `submit` gives the shipped scripts to sbatch."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.shards = tiny.shards(folder / "shards")

    def config(self, name: str, steps: int = STEPS, **overrides: object) -> Path:
        settings = {"train__steps": steps, "train__checkpoint_every": 1000, "train__ds_config": "zero2", **overrides}
        return tiny.write_config(
            self.folder / f"{name}.yaml", tiny.config(self.folder / name, self.shards, **settings)
        )

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        return self.cluster.submit(
            f"--output={self.folder}/console-%j.out", "--cpus-per-task=1", *options, str(SCRIPTS / script), *arguments
        )

    def pretrain(self, name: str, nodes: int = 2, ranks: int = 1, steps: int = STEPS, options: tuple[str, ...] = ()) -> str:
        layout = (f"--nodes={nodes}", f"--ntasks-per-node={ranks}", f"--gpus-per-node={ranks}")
        return self.submit("pretrain.sbatch", str(self.config(name, steps)), options=(*layout, *options))

    def console(self, job: str) -> str:
        path = self.folder / f"console-{job}.out"
        return path.read_text() if path.exists() else ""

    def until(self, ready: Callable[[], object], what: str, job: str, timeout: float = 90) -> None:
        end = time.monotonic() + timeout
        while not ready():
            assert time.monotonic() < end, f"{what}\n{self.console(job)}\n{self.cluster.logs()}"
            time.sleep(0.1)

    def until_training(self, name: str, job: str) -> None:
        self.until(lambda: tiny.rows(self.folder / name), f"{name} trains", job)

    def until_ended(self, job: str, state: str = "COMPLETED", timeout: float = 120) -> None:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert self.cluster.wait_state(job, *ends, timeout=timeout) == state, self.console(job) + self.cluster.logs()

    def rank_pids(self, name: str) -> list[int]:
        """Processes of a run's ranks, on all nodes, oldest first."""
        return sorted(int(pid) for pid in self.cluster.run("pgrep", "-f", f"esvit_scale pretrain .*{name}.yaml").split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    os.environ["ESVIT_ENV"] = str(_site_env(folder))
    with Cluster(folder / "cluster", nodes=3) as cluster:
        yield Site(cluster, folder)
    del os.environ["ESVIT_ENV"]


def _site_env(folder: Path) -> Path:
    """All that this "site" changes: where Python is, and CPU threads."""
    import sys

    path = folder / "env.sh"
    text = (SCRIPTS / "env.sh").read_text().replace("ESVIT_PREFLIGHT:-1", "ESVIT_PREFLIGHT:-0")
    exports = "export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE"
    path.write_text(f"{text}\nESVIT_PYTHON={sys.executable}\nexport PYTHONPATH={tiny.REPOSITORY}\n{exports}\n")
    return path


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> list[dict]:
    """The rows of a run on 2 nodes that nothing happened to."""
    job = site.pretrain("undisturbed")
    site.until_ended(job)
    rows = tiny.rows(site.folder / "undisturbed")
    assert len(rows) == STEPS
    return rows


def starts(site: Site, name: str) -> int:
    return len((site.folder / name / "slurm/starts.tsv").read_text().splitlines())


def test_a_killed_rank_ends_the_job_at_once_and_a_restart_goes_on(site: Site, undisturbed: list[dict]) -> None:
    job = site.pretrain("killed")
    site.until_training("killed", job)
    site.cluster.run("kill", "-9", str(site.rank_pids("killed")[-1]))
    began = time.monotonic()
    site.until(lambda: "failed (exit code 137)" in site.console(job), "the failure is seen", job)
    assert time.monotonic() - began < 8
    site.until_ended(job)
    assert starts(site, "killed") == 2
    assert tiny.rows(site.folder / "killed") == undisturbed
