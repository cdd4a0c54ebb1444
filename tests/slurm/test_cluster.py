"""The shipped scripts on a real Slurm: whatever happens to a job, its run ends with an undisturbed run's numbers."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from esvit_scale.data import manifest as manifests
from esvit_scale.train.run_records import read_summary
from tests import launcher, tiny
from tests.distributed import comparison
from tests.slurm.cluster import Cluster, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(reason := why_not()), reason=reason or ""),
]
SCRIPTS = launcher.REPOSITORY / "slurm"
STEPS, LONG = 80, 1100


class Site:
    """A cluster, its users' env.sh, tiny shards; `submit` gives the shipped scripts to sbatch."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.shards = tiny.shards(folder / "shards")

    def config(self, name: str, steps: int = STEPS, **overrides: object) -> Path:
        settings = {"train__steps": steps, "train__checkpoint_every": 1000, "train__ds_config": "zero2", **overrides}
        return tiny.write_config(self.folder / f"{name}.yaml", tiny.config(self.folder / name, self.shards, **settings))

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        return self.cluster.submit(
            f"--output={self.folder}/console-%j.out", "--cpus-per-task=1", *options, str(SCRIPTS / script), *arguments
        )

    def pretrain(
        self, name: str, nodes: int = 2, ranks: int = 1, steps: int = STEPS, options: tuple[str, ...] = ()
    ) -> str:
        layout = (f"--nodes={nodes}", f"--ntasks-per-node={ranks}", f"--gpus-per-node={ranks}")
        return self.submit("pretrain.sbatch", str(self.config(name, steps)), options=(*layout, *options))

    def evaluate(self, name: str, options: tuple[str, ...]) -> str:
        sets = ("--train", str(self.shards), "--test", str(self.shards))
        out = ("--out", str(self.folder / "evaluation"), "--batch=8", "--workers=0")
        layout = ("--ntasks-per-node=1", "--gpus-per-node=1", *options)
        return self.submit("evaluate.sbatch", "--checkpoint", str(self.folder / name), *sets, *out, options=layout)

    def sweep(self, name: str, largest: float = 8e9) -> Path:
        """Write a sweep of four cells, whose budgets are 4 GFLOPs and `largest`."""
        values = {
            "out": str(self.folder / name),
            "base": str(self.config("base")),
            "sizes": [{"embed_dim": 32, "depths": [1, 1, 1]}, {"embed_dim": 32, "depths": [1, 1, 4]}],
            "budgets": [4e9, largest],
            "machine": {"gpu_memory": 8, "tflops": 1.0},
            "limits": {"min_steps": 2},
        }
        path = self.folder / f"{name}-sweep.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def cell_names(self, sweep: Path) -> list[str]:
        shown = self.cluster.run(sys.executable, "-m", "esvit_scale", "sweep", "status", str(sweep), "--json")
        return [cell["name"] for cell in json.loads(shown)]

    def images(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        generator = np.random.default_rng(0)
        for i in range(30):
            pixels = generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        return folder

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

    def until_ended(self, job: str, state: str = "COMPLETED", timeout: float = 240) -> None:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert self.cluster.wait_state(job, *ends, timeout=timeout) == state, self.console(job) + self.cluster.logs()

    def rank_pids(self, name: str) -> list[int]:
        """Processes of a run's ranks, on all nodes, oldest first."""
        found = self.cluster.run(
            "pgrep", "-f", f"^[^ ]*python[^ ]* -u -m esvit_scale pretrain .*/{name}.yaml", check=False
        )
        return sorted(int(pid) for pid in found.split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    os.environ["ESVIT_ENV"] = str(_site_env(folder))
    with Cluster(folder / "cluster", nodes=3) as cluster:
        yield Site(cluster, folder)
    del os.environ["ESVIT_ENV"]


# Like a container: the command runs behind it, and does not see the GPUs (which are fakes).
SITE = """
ESVIT_PYTHON=${{ESVIT_PYTHON:-{python}}}
ESVIT_CONTAINER=(bash -c 'echo "visible GPUs: ${{CUDA_VISIBLE_DEVICES:-none}}" >&2; CUDA_VISIBLE_DEVICES= exec "$@"' container)
export PYTHONPATH={repository} OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
"""


def _site_env(folder: Path) -> Path:
    """All that this "site" changes: where Python is, and CPU threads."""
    path = folder / "env.sh"
    text = (SCRIPTS / "env.sh").read_text().replace("ESVIT_PREFLIGHT:-1", "ESVIT_PREFLIGHT:-0")
    path.write_text(text + SITE.format(python=sys.executable, repository=launcher.REPOSITORY))
    return path


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> list[dict]:
    """The rows of a run on 2 nodes that nothing happened to."""
    job = site.pretrain("undisturbed")
    site.until_ended(job)
    rows = tiny.rows(site.folder / "undisturbed")
    assert len(rows) == STEPS
    return rows


def sums(shards: Path) -> list[tuple[str, str]]:
    return [(shard.name, shard.sha256) for shard in manifests.load(shards).shards]


def starts(site: Site, name: str) -> int:
    path = site.folder / name / "slurm/starts.tsv"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_killed_rank_ends_the_job_and_restart_resumes(site: Site, undisturbed: list[dict]) -> None:
    job = site.pretrain("killed")
    site.until_training("killed", job)
    site.cluster.run("kill", "-9", str(site.rank_pids("killed")[-1]))
    began = time.monotonic()
    site.until(
        lambda: re.search(r"rank [01] on node\d failed \(exit code 137\)", site.console(job)),
        "the failure is seen",
        job,
    )
    assert time.monotonic() - began < 8
    site.until_ended(job)
    assert starts(site, "killed") == 2
    assert tiny.rows(site.folder / "killed") == undisturbed


def test_suspended_job_in_a_folder_with_spaces_resumes(site: Site, undisturbed: list[dict]) -> None:
    """By hand, with --export=NONE, from a copy of the scripts; suspended for longer than train.hang_minutes."""
    scripts = site.folder / "my own scripts"
    shutil.copytree(SCRIPTS, scripts)
    shutil.copy(os.environ["ESVIT_ENV"], scripts / "env.sh")
    config = site.config("sus pended", train__hang_minutes=0.1)
    layout = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--export=NONE")
    output = f"--output={site.folder}/console-%j.out"
    job = site.cluster.submit(output, *layout, str(scripts / "pretrain.sbatch"), str(config))
    site.until_training("sus pended", job)
    site.cluster.run("scontrol", "suspend", job)
    time.sleep(9)
    site.cluster.run("scontrol", "resume", job)
    site.until_ended(job)
    assert starts(site, "sus pended") == 1
    assert tiny.rows(site.folder / "sus pended") == undisturbed


def test_four_ranks_match_two_ranks(site: Site, undisturbed: list[dict]) -> None:
    config = site.config("four")
    asked = ["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=10", "--partition=main"]
    command = [sys.executable, "-m", "esvit_scale", "slurm", "submit", "pretrain", str(config), *asked]
    job = site.cluster.run(*command).split()[-1]
    site.until_ended(job)
    run = site.folder / "four"
    assert site.cluster.field(job, "TresPerNode") == "gres:gpu:2"
    assert json.loads((run / "environment.json").read_text())["world_size"] == 4
    losses = [row["loss"] for row in tiny.rows(run)]
    assert losses == pytest.approx([row["loss"] for row in undisturbed], rel=1e-3)
    assert sorted(path.name for path in run.glob(f"slurm/{job}/*")) == ["rank-1.log", "rank-2.log", "rank-3.log"]
    console = (run / f"slurm/pretrain-{job}.out").read_text()
    assert sorted(re.findall(r"visible GPUs: (\S+)", console)) == ["0,1"] * 2  # the batch shell's and rank 0's
    shown = site.cluster.run(sys.executable, "-m", "esvit_scale", "slurm", "status", str(run))
    assert re.search(rf"state +COMPLETED\njob +{job}\nstep +{STEPS} of {STEPS}\nimages/s +\d", shown), shown
    assert "restarts  0" in shown


def test_time_limit_requeues_until_the_run_is_finished(site: Site, undisturbed: list[dict]) -> None:
    """The limit is a minute, and Slurm looks at limits every 30 s; until then the ranks stand still."""
    job = site.pretrain("limited", options=("--time=1", "--signal=B:USR1@60"))
    after = site.evaluate("limited", options=(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"))
    site.until_training("limited", job)
    ranks = [str(pid) for pid in site.rank_pids("limited")]
    site.cluster.run("kill", "-STOP", *ranks)
    site.until(lambda: "the time limit is near" in site.console(job), "the signal", job)
    site.cluster.run("kill", "-CONT", *ranks)
    site.until(lambda: starts(site, "limited") == 2, "the requeue", job)
    assert site.cluster.state(after) == "PENDING"
    site.until_ended(job)
    assert "saved at step" in site.console(job)
    assert tiny.rows(site.folder / "limited") == undisturbed
    site.until_ended(after)
    results = [json.loads((site.folder / f"evaluation/{name}.json").read_text()) for name in ("knn", "linear")]
    assert [result["step"] for result in results] == [STEPS, STEPS]


def test_preempted_jobs_resume(site: Site, undisturbed: list[dict]) -> None:
    """With grace a job saves and requeues itself; without, Slurm requeues it and it goes back to its last checkpoint."""
    jobs = {name: site.pretrain(name, options=(f"--partition={name}",)) for name in ("main", "strict")}
    for name, job in jobs.items():
        site.until_training(name, job)
    urgent = site.cluster.submit("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    site.until_ended(urgent)
    for name, job in jobs.items():
        site.until_ended(job)
        assert starts(site, name) == 2
        assert ("saved at step" in site.console(job)) is (name == "main")
        assert tiny.rows(site.folder / name) == undisturbed


def test_run_resumes_with_fewer_nodes(site: Site, undisturbed: list[dict]) -> None:
    """Saved and requeued on two nodes, taken off the queue, and submitted again for one: the losses go on."""
    job = site.pretrain("fewer", options=("--time=10",))
    site.until_training("fewer", job)
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    site.until(lambda: starts(site, "fewer") == 1 and "saved at step" in site.console(job), "the save", job)
    site.cluster.run("scancel", job)
    site.until(lambda: site.rank_pids("fewer") == [], "no rank is left", job, timeout=20)
    saved = tiny.rows(site.folder / "fewer")[-1]["step"]
    assert 0 < saved < STEPS
    alone = site.pretrain("fewer", nodes=1)
    site.until_ended(alone)
    assert json.loads((site.folder / "fewer/environment.json").read_text())["world_size"] == 1
    losses = [row["loss"] for row in tiny.rows(site.folder / "fewer")]
    assert losses == pytest.approx([row["loss"] for row in undisturbed], rel=1e-3)


def test_sbatch_accepts_every_shipped_script(site: Site) -> None:
    """Its header is read by the scheduler, with the sizes of this small cluster; nothing runs."""
    small = "--ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1 --time=10"
    for script in sorted(SCRIPTS.glob("*.sbatch")):
        said = site.cluster.run("bash", "-c", f"sbatch --test-only {small} {script} 2>&1", check=False)
        assert re.search(r"Job \d+ to start at", said), f"{script.name}: {said}"


def test_cancelled_job_is_not_requeued(site: Site) -> None:
    job = site.pretrain("cancelled", steps=LONG)
    site.until_training("cancelled", job)
    site.cluster.run("scancel", job)
    site.until_ended(job, "CANCELLED")
    site.until(lambda: site.rank_pids("cancelled") == [], "no rank is left", job, timeout=20)
    time.sleep(7)  # longer than Slurm holds a requeued job
    assert site.cluster.state(job) == "CANCELLED"
    assert starts(site, "cancelled") == 1


def test_job_of_a_dead_node_resumes_elsewhere(site: Site, undisturbed: list[dict]) -> None:
    job = site.pretrain("orphan")
    site.until_training("orphan", job)
    site.cluster.kill_node(2)
    site.until_ended(job)
    first, *_, last = (site.folder / "orphan/slurm/starts.tsv").read_text().splitlines()
    assert (first.split("\t")[3], last.split("\t")[3]) == ("node[1-2]", "node[1,3]")
    assert tiny.rows(site.folder / "orphan") == undisturbed
    site.cluster.start_node(2)
    site.cluster.wait_idle()


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_run_of_eight_ranks_survives_every_fault(site: Site) -> None:
    """Of a process, a node, the network and Slurm's controller; at last the run goes on with four ranks."""
    steps, layout = 72, ("--nodes=2", "--time=300")
    options = {"train__checkpoint_every": 4, "train__hang_minutes": 1 / 3, "optim__lr": 1e-3}
    calm, chaos = (site.config(name, steps, **options) for name in ("calm", "chaos"))
    eight, four = (("--ntasks-per-node=4", "--gpus-per-node=4"), ("--ntasks-per-node=2", "--gpus-per-node=2"))
    run, began = site.folder / "chaos", time.monotonic()
    job = site.submit("pretrain.sbatch", str(chaos), options=(*layout, *eight))

    def until_step(step: int) -> None:
        site.until(lambda: (rows := tiny.rows(run)) and rows[-1]["step"] >= step, f"step {step}", job, timeout=300)
        print(f"{time.monotonic() - began:.0f} s: step {step}, {starts(site, 'chaos')} starts", flush=True)

    def until_started(number: int) -> None:
        site.until(lambda: starts(site, "chaos") == number, f"start {number}", job, timeout=120)
        print(f"{time.monotonic() - began:.0f} s: start {number} on {hosts()}", flush=True)

    def hosts() -> list[int]:
        """Return the numbers of the nodes on which the run's last start is."""
        last = (run / "slurm/starts.tsv").read_text().splitlines()[-1].split("\t")[3]
        return [int(name[4:]) for name in site.cluster.run("scontrol", "show", "hostnames", last).split()]

    until_step(6)
    site.cluster.run("kill", "-9", str(site.rank_pids("chaos")[5]))
    until_started(2)
    until_step(14)
    site.cluster.kill_controller()
    time.sleep(10)
    site.cluster.start_controller()
    until_step(22)
    site.cluster.run("scontrol", "suspend", job)
    time.sleep(5)
    site.cluster.run("scontrol", "resume", job)
    until_step(30)
    assert starts(site, "chaos") == 2  # the ranks noticed neither
    lost = hosts()[1]
    site.cluster.kill_node(lost)
    until_started(3)
    assert lost not in hosts()
    site.cluster.start_node(lost)
    until_step(38)
    site.cluster.run("kill", "-STOP", str(site.rank_pids("chaos")[2]))
    until_started(4)
    until_step(46)
    lost = hosts()[1]
    site.cluster.unplug_node(lost)
    until_started(5)
    assert lost not in hosts()
    site.cluster.plug_node(lost)
    until_step(54)
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    site.until(lambda: (run / "requeue").exists(), "the save", job)
    site.until(lambda: site.rank_pids("chaos") == [], "the ranks' end", job)
    site.cluster.run("scancel", job)
    saved = tiny.rows(run)[-1]["step"]
    assert saved < steps
    assert starts(site, "chaos") == 5
    job = site.submit("pretrain.sbatch", str(chaos), options=(*layout, *four))
    site.until_ended(job, timeout=400)
    assert json.loads((run / "environment.json").read_text())["world_size"] == 4
    print(f"{time.monotonic() - began:.0f} s: finished; {saved} steps on eight ranks", flush=True)
    launcher.run(*launcher.CLI, "pretrain", calm, ranks=8, timeout=600)
    rows, expected = tiny.rows(run), tiny.rows(site.folder / "calm")
    assert rows[:saved] == expected[:saved]
    comparison.assert_same_up_to_order_of_sums(rows, expected)
    site.cluster.wait_idle()


def test_array_job_requeues_only_its_own_task(site: Site) -> None:
    sweep = site.sweep("array", largest=2e11)  # some seconds, so that the last cell still trains when its signal comes
    command = [sys.executable, "-m", "esvit_scale", "slurm", "submit", "sweep", str(sweep), "--cpus-per-task=1"]
    array = site.cluster.run(*command).split()[-1]
    cells = [site.folder / f"array/cells/{name}" for name in site.cell_names(sweep)]
    assert len(cells) == 4
    site.until(lambda: tiny.rows(cells[3]), "the last cell trains", array)
    site.cluster.run("scancel", "--signal=USR1", "--batch", f"{array}_3")  # what a near time limit sends
    for cell in cells:
        site.until(lambda cell=cell: read_summary(cell).get("finished"), f"{cell} is finished", array)
    assert [len((cell / "slurm/starts.tsv").read_text().splitlines()) for cell in cells] == [1, 1, 1, 2]


def test_array_job_writes_the_same_shards_as_one_process(site: Site) -> None:
    images = site.images("images")
    whole, parts = site.folder / "whole", site.folder / "parts"
    create = [sys.executable, "-m", "esvit_scale", "shards", "create", str(images)]
    site.cluster.run(*create, str(whole), "--samples-per-shard=4", "--workers=1")
    submit = [sys.executable, "-m", "esvit_scale", "slurm", "submit", "shards", str(images), str(parts), "--parts=3"]
    _, merge = site.cluster.run(*submit, "--cpus-per-task=1", "--option=--samples-per-shard=4").split()
    site.until_ended(merge)
    assert sums(parts) == sums(whole)
    # A part that fails: the merge is taken away and does not wait for ever.
    (site.folder / "empty").mkdir()
    submit[6:8] = [str(site.folder / "empty"), str(site.folder / "nothing")]
    _, merge = site.cluster.run(*submit, "--cpus-per-task=1").split()
    site.until_ended(merge, "CANCELLED")


@pytest.mark.parametrize(("code", "ran"), [(75, 3), (2, 1), (3, 1)])
def test_restarts_happen_only_where_they_help_and_are_limited(site: Site, code: int, ran: int) -> None:
    name = f"code{code}"
    fake = site.folder / f"{name}.sh"
    fake.write_text(f'#!/bin/bash\n[[ " $* " != *" run-dir "* ]] || exec {sys.executable} "$@"\nexit {code}\n')
    fake.chmod(0o755)
    job = site.pretrain(name, nodes=1, options=(f"--export=ALL,ESVIT_PYTHON={fake}",))
    site.until_ended(job, "FAILED")
    assert starts(site, name) == ran
    assert ("giving up" in site.console(job)) is (ran == 3)


def test_preflight_names_the_bad_node(site: Site) -> None:
    layout = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--export=ALL,ESVIT_PREFLIGHT=1")
    site.cluster.on_node(2, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/dev/shm")
    try:
        job = site.submit("pretrain.sbatch", str(site.config("checked")), options=layout)
        site.until_ended(job, "FAILED")
    finally:
        site.cluster.on_node(2, "umount", "/dev/shm")
    assert re.search(r"preflight node1: ok, 2 ranks, .* GB/s inside, .* GB/s between", site.console(job))
    assert "preflight node2: /dev/shm: 0.0 GiB" in site.console(job)
    assert "sbatch --exclude=node2" in site.console(job)
    assert not (site.folder / "checked/metrics.jsonl").exists()
