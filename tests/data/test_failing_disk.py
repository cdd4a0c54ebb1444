"""A disk that answers every read with EIO, injected below Python: the machine's fault, said within a round of delays."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esvit_scale.train.row_file import read_rows
from tests import launcher, tiny

SHORT = (
    "import sys; from esvit_scale.data import reader, tar_stream; reader.RETRY_DELAYS = tar_stream.RETRY_DELAYS = (0.1, 0.2, 0.3); "
    "from esvit_scale import cli; sys.exit(cli.main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler here")
    made = tmp_path_factory.mktemp("library") / "failing_reads.so"
    source = Path(__file__).with_name("failing_reads.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(made), str(source), "-ldl"], check=True)
    return made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("kind", ["shard set", "plain tars"])
def test_eio_on_every_read_exits_75_after_one_round_of_delays(
    library: Path, shards: Path, tmp_path: Path, kind: str
) -> None:
    run = tmp_path / "run"
    options: dict[str, object] = {"train__steps": 2000, "data__workers": 1, "train__checkpoint_every": 5}
    if kind == "plain tars":
        stems = ",".join(sorted(path.stem for path in shards.glob("*.tar")))
        options |= {"data__train": f"{shards}/{{{stems}}}.tar", "data__epoch_samples": 36}
    config = tiny.config(run, shards, **options)
    path = tiny.write_config(tmp_path / "c.yaml", config)
    fail = {"LD_PRELOAD": str(library), "FAIL_UNDER": str(shards), "FAIL_WHEN": str(tmp_path / "now")}
    process = subprocess.Popen(
        [sys.executable, "-c", SHORT, "pretrain", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=launcher.environment() | fail,
        cwd=launcher.REPOSITORY,
    )
    deadline = time.monotonic() + 120
    # The checkpoint of step 5 is written beside training, on a busy machine for longer than two steps take.
    while len(read_rows(run / "metrics.jsonl")) < 7 or not (run / "checkpoints" / "latest").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "now").touch()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert re.search(r"esvit-scale: error: rank 0: .*Input/output error", errors), errors
    assert [errors.count(f"({i} of 3)") for i in (1, 2, 3)] == [1, 1, 1], errors
    assert (run / "checkpoints" / "latest").exists()
    assert not (run / "lock.json").exists()


@pytest.mark.slow
@pytest.mark.alone
def test_start_on_failing_disk_ends_with_one_line(library: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "now").touch()
    path = tiny.write_config(tmp_path / "c.yaml", tiny.config(tmp_path / "run", shards))
    fail = {"LD_PRELOAD": str(library), "FAIL_UNDER": str(shards), "FAIL_WHEN": str(tmp_path / "now")}
    done = subprocess.run(
        [sys.executable, "-m", "esvit_scale", "pretrain", str(path)],
        capture_output=True,
        text=True,
        env=launcher.environment() | fail,
        cwd=launcher.REPOSITORY,
    )
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("esvit-scale: ")]
    assert (done.returncode, "Input/output error" in error) == (75, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.alone
def test_one_damaged_shard_among_good_ones_is_replaced(library: Path, shards: Path, tmp_path: Path) -> None:
    """A disk's bad sector stays; the run waits for it once and goes on with other samples, until an epoch shows that
    it is half of the images: such a run is stopped with the reason."""
    bad = sorted(shards.glob("*.tar"))[1]
    (tmp_path / "now").touch()
    config = tiny.config(tmp_path / "run", shards, train__steps=8, data__workers=1)
    fail = {"LD_PRELOAD": str(library), "FAIL_UNDER": str(bad), "FAIL_WHEN": str(tmp_path / "now")}
    done = subprocess.run(
        [sys.executable, "-c", SHORT, "pretrain", str(tiny.write_config(tmp_path / "c.yaml", config))],
        capture_output=True,
        text=True,
        env=launcher.environment() | fail,
        cwd=launcher.REPOSITORY,
    )
    assert (done.returncode, "over 5 %" in done.stderr) == (2, True), done.stderr
    assert done.stderr.count("of 3)") == 3, done.stderr
    rows = read_rows(tmp_path / "run" / "quarantine.jsonl")
    assert {row["shard"] for row in rows} == {bad.name}
    assert {row["reason"] for row in rows} == {os.strerror(5)}
