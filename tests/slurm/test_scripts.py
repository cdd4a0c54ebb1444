"""The batch scripts without a Slurm: their headers, what `submit` makes of them, and what `status` reads."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esvit_scale import cli, launch, slurm_status
from tests import launcher, tiny

SLURM = launcher.REPOSITORY / "slurm"
BATCH = sorted(SLURM.glob("*.sbatch"))
SHELL = [*BATCH, *sorted(SLURM.glob("*.sh"))]


def late_directives(text: str) -> list[str]:
    """#SBATCH lines after the first command, which Slurm leaves out without a word."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return [line for line in lines[first:] if re.match(r"\s*#\s*SBATCH", line)]


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, list[str]]:
    """The script and the command that `slurm submit … --dry-run` prints."""
    assert cli.main(["slurm", "submit", *arguments, "--dry-run"]) == 0
    script, _, command = capsys.readouterr().out.rstrip().rpartition("\n# ")
    return script.rstrip(), shlex.split(command)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_passes(path: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (make slurm-tools)")
    done = subprocess.run(["shellcheck", "-x", str(path)], capture_output=True, text=True, cwd=SLURM)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_sbatch_headers_come_before_the_first_command(path: Path) -> None:
    text = path.read_text()
    assert late_directives(text) == []
    given = directives(text)
    assert given["signal"].startswith("B:USR1@")
    assert {"requeue", "time", "open-mode", "output"} <= given.keys()
    assert late_directives("#!/bin/bash\nset -e\n#SBATCH --time=1\n") == ["#SBATCH --time=1"]


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
@pytest.mark.parametrize("folder", ["plain", "with spaces  in it"])
def test_script_finds_its_folder(tmp_path: Path, path: Path, folder: str) -> None:
    """As Slurm 22.05 shows a job: the path and the arguments in one field, without quotes."""
    (tmp_path / folder).mkdir()
    script = shutil.copy(path, tmp_path / folder)
    (tmp_path / folder / "job.sh").write_text('echo "found $scripts"; exit 0\n')
    shown = f"JobId=77 JobName=x Command={script} demo {tmp_path} WorkDir=/tmp StdErr=/tmp/o"
    commands = _commands(tmp_path, {"scontrol": f"echo {shlex.quote(shown)}"})
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    done = subprocess.run(["bash", str(script), "demo"], capture_output=True, text=True, env=environment)
    assert done.stdout == f"found {tmp_path / folder}\n", done.stderr


def test_paths_with_spaces_are_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / 'a "run" 100%'
    common = ["swin_t", "data.train=x", "train.global_batch=384", f"run_dir={run}", "--gpus-per-node=1"]
    script, _ = dry_run(capsys, "pretrain", *common)
    assert directives(script)["output"] == f'"{tmp_path}/a \\"run\\" 100%%/slurm/pretrain-%j.out"'


@pytest.mark.parametrize(
    ("asked", "lead"),
    [
        ((), "300"),
        (("--time=2-00:00:00",), "300"),
        (("--time=4",), "120"),  # the script's own lead would be longer than the limit: half of that
        (("--time=10:00", "--signal-lead=500"), "500"),
        (("--time=UNLIMITED", "--signal-lead=5000"), "5000"),
        (("--sbatch=--time=4",), "120"),
        (("--time=4", "--sbatch=-t 1-0"), "300"),
    ],
)
def test_signal_lead_time_fits_the_time_limit(capsys: pytest.CaptureFixture[str], asked: tuple, lead: str) -> None:
    common = ["swin_t", "data.train=x", "--gpus-per-node=1"]
    assert directives(dry_run(capsys, "pretrain", *common, *asked)[0])["signal"] == f"B:USR1@{lead}"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--time=10", "--signal-lead=600"], "--signal-lead 600: as long as the time limit (600 s)"),
        (["--time=soon"], "--time soon: not a time limit"),
        (["--nodes=5"], "train.global_batch: 12 does not divide over 5 ranks"),
        (["--nodes=2", "--sbatch=--nodes=5"], "train.global_batch: 12 does not divide over 5 ranks"),
        (["--sbatch=-N5"], "train.global_batch: 12 does not divide over 5 ranks"),
        (["--sbatch=--ntasks-per-node=7"], "train.global_batch: 12 does not divide over 7 ranks"),
        (["--sbatch=-n5"], "train.global_batch: 12 does not divide over 5 ranks"),
        (["--sbatch=--nodes=2-4"], "--sbatch=--nodes=2-4: give one number"),
        (["--sbatch=--time=5", "--sbatch=--signal=B:USR1@300"], "as long as the time limit (300 s)"),
        (["data.train=/nowhere/shards"], "/nowhere/shards"),
    ],
)
def test_submit_checks_the_config_before_calling_sbatch(
    tmp_path: Path, monkeypatch, capsys, asked: list[str], said: str
) -> None:
    monkeypatch.setenv("PATH", f"{_commands(tmp_path, {'sbatch': f'touch {tmp_path}/called; echo 1'})}:/bin")
    values = (
        f"data.train={tiny.shards(tmp_path / 'shards', 12)}",
        "train.global_batch=12",
        f"run_dir={tmp_path}/new/run",
    )
    assert cli.main(["slurm", "submit", "pretrain", "swin_t", *values, "--gpus-per-node=1", *asked]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "called").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_submit_prints_only_the_job_id_on_stdout(tmp_path: Path) -> None:
    """In a process of its own: DeepSpeed binds its log to whatever stdout is when it is first imported."""
    commands = _commands(tmp_path, {"sbatch": "echo 4711"})
    values = (f"data.train={tiny.shards(tmp_path / 'shards', 12)}", "train.global_batch=12", f"run_dir={tmp_path}/run")
    command = ["slurm", "submit", "pretrain", "swin_t", *values, "--gpus-per-node=1", "--nodes=1"]
    environment = {**launcher.environment(), "PATH": f"{commands}:{os.environ['PATH']}"}
    environment.pop("DS_ACCELERATOR", None)  # which makes DeepSpeed choose, and warn
    done = subprocess.run(
        [sys.executable, "-m", "esvit_scale", *command], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "4711\n"), done.stderr


@pytest.mark.parametrize("name", ["pretrain", "finetune", "evaluate", "sweep"])
def test_shipped_header_requests_one_task_per_gpu(name: str) -> None:
    given = directives((SLURM / f"{name}.sbatch").read_text())
    assert given["ntasks-per-node"] == given["gpus-per-node"]


def test_submit_fills_in_the_shipped_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    arguments = ["swin_t", "data.train=/data/shards", "train.global_batch=480", f"run_dir={run}"]
    asked = ["--nodes", "4", "--gpus-per-node", "6", "--time", "2-00:00:00", "--partition", "big"]
    script, command = dry_run(  # options may stand between CONFIG and its overrides
        capsys,
        "pretrain",
        arguments[0],
        *asked,
        *arguments[1:],
        "--signal-lead=600",
        "--sbatch=--account=lab",
        "--after=17",
    )
    given, shipped = directives(script), directives((SLURM / "pretrain.sbatch").read_text())
    changed = {"nodes": "4", "gpus-per-node": "6", "ntasks-per-node": "6", "time": "2-00:00:00", "partition": "big"}
    changed |= {"signal": "B:USR1@600", "dependency": "afterok:17", "kill-on-invalid-dep": "yes"}
    changed |= {"output": f"{run}/slurm/pretrain-%j.out"}
    assert given == shipped | changed
    assert late_directives(script) == []
    assert command == ["sbatch", "--parsable", "--account=lab", f"{run}/slurm/pretrain.sbatch", *arguments]
    body = (SLURM / "pretrain.sbatch").read_text().partition("set -euo")[2]
    assert script.endswith(body.rstrip())
    assert f"export ESVIT_PYTHON=${{ESVIT_PYTHON:-{sys.executable}}}" in script
    assert not run.exists()  # nothing was written


def test_submit_supports_cpu_jobs_and_a_site_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "my site.sh"
    site.write_text("")
    common = ["swin_t", "data.train=x", "train.global_batch=384", f"run_dir={tmp_path / 'run'}", "--gpus-per-node=0"]
    script, _ = dry_run(capsys, "pretrain", *common, "--tasks-per-node=3", f"--env={site}")
    assert directives(script)["ntasks-per-node"] == "3"
    assert "gpus-per-node" not in directives(script)
    assert f"export ESVIT_ENV='{site}'" in script
    assert cli.main(["slurm", "submit", "pretrain", *common, "--env=nowhere.sh", "--dry-run"]) == 2
    assert "nowhere.sh: no such file; the one to copy is" in capsys.readouterr().err


def test_submit_shards_makes_an_array_job_and_a_dependent_merge(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    assert (
        cli.main(["slurm", "submit", "shards", "SRC", str(out), "--parts=5", "--option=--quality=90", "--dry-run"]) == 0
    )
    shown = capsys.readouterr().out
    array, merge = shown.split(f"# {tmp_path}/set-slurm/merge.sbatch\n")
    assert (directives(array)["array"], directives(merge).get("array")) == ("1-5", None)
    assert directives(merge)["dependency"] == "afterok:JOB"
    assert array.rstrip().endswith(f"shards.sbatch 5 SRC {out} --quality=90")
    assert merge.rstrip().endswith(f"merge.sbatch merge {out}")


def test_user_error_is_found_before_submission(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["slurm", "submit", "pretrain", "swin_tt", "data.train=x"]) == 2
    assert "did you mean 'swin_t'" in capsys.readouterr().err
    assert cli.main(["slurm", "submit", "pretrain", "swin_t"]) == 2
    assert "data.train: not set" in capsys.readouterr().err


def test_sbatch_refusal_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for sbatch: this is about what is made of its answers."""
    answers = {"sbatch": "echo '17;cluster'"}
    monkeypatch.setenv("PATH", f"{_commands(tmp_path, answers)}:{os.environ['PATH']}")
    job = launch.prepare("pretrain", ["swin_t"], tmp_path / "run/slurm", launch.Resources())
    assert launch.submit(job) == "17"
    assert job.script.read_text() == job.text
    _commands(tmp_path, {"sbatch": "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1"})
    with pytest.raises(launch.UserError, match="sbatch: error: invalid partition specified: x"):
        launch.submit(job)
    assert job.script.read_text() == job.text  # of the job before
    job = launch.prepare("pretrain", ["swin_t"], tmp_path / "other/run/slurm", launch.Resources())
    with pytest.raises(launch.UserError):
        launch.submit(job)
    assert not (tmp_path / "other").exists()


def test_status_combines_run_dir_and_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    tiny.write_config(run / "config.yaml", tiny.config(run, tmp_path / "shards", train__steps=50))
    (run / "slurm/starts.tsv").write_text("t\t7\t0\tnode1\nt\t7\t1\tnode2\nt\t8\t0\tnode3\n")
    (run / "slurm/failures.tsv").write_text("t\t7\t75\tstep-00000010\n")
    rows = [{"step": step, "images_per_s": 40.0 * step, "step_s": 3.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "lock.json").write_text(json.dumps({"pid": 1, "heartbeat": time.time()}))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.main(["slurm", "status", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["state", "RUNNING"], ["job", "8"], ["step", "2 of 50"], ["images/s", "80.0"],
        ["ETA", "0:02:24 of training"], ["restarts", "2, 1 after a failure"],
    ]  # fmt: skip
    shown = "JobId=8 JobName=x JobState=PENDING Reason=BeginTime Dependency=(null) StdOut=/logs/8.out"
    monkeypatch.setenv("PATH", f"{_commands(tmp_path, {'scontrol': f'echo {shlex.quote(shown)}'})}:/bin")
    assert cli.main(["slurm", "status", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["state"], said["reason"], said["console"]) == ("PENDING", "BeginTime", "/logs/8.out")


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({"summary.json": '{"finished": true}'}, "FINISHED"),
        ({"summary.json": '{"finished": false}', "requeue": "5\n"}, "SAVED, WAITING TO GO ON"),
        ({"lock.json": '{"heartbeat": 1.0}'}, "STOPPED"),
        ({}, "STOPPED"),
    ],
)
def test_status_of_a_job_unknown_to_slurm(tmp_path: Path, monkeypatch, files, state) -> None:
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm/starts.tsv").write_text("t\t7\t0\tnode1\n")
    for name, text in files.items():
        (run / name).write_text(text)
    monkeypatch.setenv(
        "PATH", str(_commands(tmp_path, {"scontrol": "echo 'Invalid job id specified' >&2; exit 1"})) + ":/bin"
    )
    assert slurm_status.status(run).state == state


def test_status_ignores_a_refused_second_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm/starts.tsv").write_text("t\t7\t0\tnode1\nt\t8\t0\tnode1\n")
    (run / "slurm/ended.tsv").write_text("t\t8\t2\nt\t7\t0\n")
    script = 'case $4 in 7) echo "JobId=7 JobState=$(cat {0}) StdOut=/a b/7.out Power=";; *) echo "JobId=8 JobState=FAILED";; esac'
    commands = _commands(tmp_path, {"scontrol": script.format(tmp_path / "state")})
    monkeypatch.setenv("PATH", f"{commands}:/bin")
    for state, summary in (("RUNNING", False), ("COMPLETED", True)):
        (tmp_path / "state").write_text(state)
        (run / "summary.json").write_text(json.dumps({"finished": summary}))
        found = slurm_status.status(run)
        assert (found.state, found.job, found.starts, found.console) == (state, "7", 1, "/a b/7.out")
    (tmp_path / "state").write_text("FAILED")  # of what followed the training
    assert slurm_status.status(run).state == "FINISHED"


def test_status_of_a_run_without_jobs_suggests_the_nearest_run(tmp_path: Path) -> None:
    (tmp_path / "photos/slurm").mkdir(parents=True)
    (tmp_path / "photos/slurm/starts.tsv").write_text("t\t7\t0\tnode1\n")
    with pytest.raises(launch.UserError, match="no job has started here; did you mean 'photos'"):
        slurm_status.status(tmp_path / "photo")


def _commands(folder: Path, scripts: dict[str, str]) -> Path:
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (bin_folder / name).chmod(0o755)
    return bin_folder


@pytest.mark.parametrize(
    ("codes", "blamed"),
    [
        ([(1, 1), (2, 137)], "137 rank 1"),  # a peer's broken connection came before the killed rank's own record
        ([(1, 137), (2, 1), (3, 143)], "137 rank 0"),
        ([(2, 3), (1, 143), (3, 137)], "3 rank 0"),  # it diverged; the others were ended
        ([(2, 1), (1, 1)], "1 rank 1"),
        ([(1, 143), (2, 143)], "143 rank 0"),
        ([(2, 75), (1, 1)], "75 rank 0"),
        ([], "143\n"),  # no rank got as far as that: srun's own code stays
    ],
)
def test_status_names_the_rank_that_failed_first(tmp_path: Path, codes: list[tuple[int, int]], blamed: str) -> None:
    """`codes`: (when, exit code) of each rank."""
    for rank, (when, code) in enumerate(codes):
        (tmp_path / f"exit-{rank}").write_text(f"{when}000 {code} rank {rank} on node{rank}\n")
    function = re.search(r"^blame\(\) \{.*?^\}", (SLURM / "job.sh").read_text(), re.MULTILINE | re.DOTALL)
    assert function is not None
    script = f'say() {{ echo "$*"; }}\nESVIT_RANK_LOGS={tmp_path}\n{function[0]}\nrc=143\nblame\necho "$rc"'
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=True)
    said = re.sub(r"(rank \d+) on node\d+ failed \(exit code (\d+)\)\n\2\n", r"\2 \1", done.stdout)
    assert said == blamed
    assert list(tmp_path.glob("exit-*")) == []


@pytest.mark.parametrize(("began", "ends", "shortened"), [(-1, 9, True), (-1, 9000, False), (-600, 250, False)])
def test_signal_at_the_start_of_a_short_job_is_delayed(tmp_path: Path, began: int, ends: int, shortened: bool) -> None:
    """Seconds from now at which the job began and ends; the lead is 300 s. What is far from the limit was sent by hand."""
    now = int(time.time())
    times = {"StartTime": now + began, "EndTime": now + ends}
    shown = " ".join(f"{name}={time.strftime('%FT%T', time.localtime(at))}" for name, at in times.items())
    commands = _commands(tmp_path, {"scontrol": f"echo 'JobId=1 {shown} Deadline=N/A'"})
    functions = re.search(
        r"^near_the_limit\(\) \{.*?(?=^step\(\))", (SLURM / "job.sh").read_text(), re.MULTILINE | re.DOTALL
    )
    assert functions is not None
    script = f"""
        say() {{ echo "$*"; }}; job=1 ESVIT_SIGNAL_LEAD=300 pid= usr1=0 term=0
        trap near_the_limit USR1
        {functions[0]}
        on_usr1() {{ kill "$pid"; }}
        sleep 20 & pid=$!
        {{ sleep 0.3; kill -USR1 $$; }} &
        while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
        echo "usr1=$usr1"
    """
    environment = {"PATH": f"{commands}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=30, env=environment
    )
    assert ("saving only in " in done.stdout) is shortened, done.stderr
    assert done.stdout.endswith("the time limit is near\nusr1=1\n")
