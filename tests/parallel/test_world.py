"""Ranks as launchers start them, the process group, and the translation of communication errors."""

import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.parallel import collectives
from esvit_scale.parallel import world as worlds
from tests import launcher, tiny

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41234\n more"


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_sruns_variables_become_torchruns(clean: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "123456"}
    for name, value in {**slurm, "SLURM_STEP_NODELIST": "node[1-2]"}.items():
        clean.setenv(name, value)
    clean.setattr(worlds, "first_host", lambda nodes: f"first of {nodes}")
    worlds.adopt_slurm_variables()
    import os

    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("5", "8", "1")
    assert os.environ["MASTER_ADDR"] == "first of node[1-2]"
    assert os.environ["MASTER_PORT"] == str(20000 + 123456 % 12000)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)


def test_ports_of_jobs_are_below_those_of_outgoing_connections(clean: pytest.MonkeyPatch) -> None:
    """Linux' own ports begin at 32768. A requeued job takes another port: the first may still be in use."""
    for variable in ("SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        clean.delenv(variable, raising=False)
    ports = set()
    for job in range(0, 40_000, 37):
        clean.setenv("SLURM_JOB_ID", str(job))
        ports.add(worlds.port_of_job())
    assert (min(ports) >= 20000, max(ports) < 32768, len(ports) > 1000) == (True, True, True)
    first = worlds.port_of_job()
    clean.setenv("SLURM_RESTART_COUNT", "1")
    assert worlds.port_of_job() != first


def test_port_in_use_prints_one_line_and_exits_75(tmp_path: Path) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards")))
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        place = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = launcher.fork(*launcher.CLI, "pretrain", path, **place)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    (line,) = [line for line in errors.splitlines() if "error" in line]  # the header stands before it
    assert f"MASTER_PORT={port} on 127.0.0.1 is in use by another program" in line


def test_batch_shell_is_a_single_process(clean: pytest.MonkeyPatch) -> None:
    """A batch shell has SLURM_PROCID and SLURM_NTASKS as well, but no other process was started."""
    import os

    clean.setenv("SLURM_PROCID", "0")
    clean.setenv("SLURM_NTASKS", "4")
    worlds.adopt_slurm_variables()
    assert "RANK" not in os.environ


def test_incomplete_launcher_variables_raise_user_error(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("WORLD_SIZE", "2")
    clean.setattr(worlds.dist, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="without MASTER_ADDR and MASTER_PORT"):
        worlds.start()


def test_single_process_starts_without_launcher(clean: pytest.MonkeyPatch) -> None:
    me = worlds.start()
    try:
        assert (me.rank, me.size) == (0, 1)
        assert collectives.gather_objects("x") == ["x"]
        assert collectives.all_reduce_flags(5) == 5
        with pytest.raises(UserError, match="for all ranks"):
            collectives.run_on_rank0_and_broadcast(lambda: (_ for _ in ()).throw(UserError("for all ranks")))
    finally:
        worlds.stop()
    assert worlds.start().size == 1  # a second time in the same process


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error: unhandled system error"),
        dist.DistNetworkError(
            "The client socket has timed out after 1800000ms while trying to connect to (node1, 20017)."
        ),
        dist.DistStoreError("wait timeout after 1800000ms, keys: /default_pg/0//cpu//0/0"),
        RuntimeError(GLOO),
        RuntimeError(
            "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"
        ),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Read error [10.0.0.2]:5123: Connection reset by peer"),
    ],
)
def test_errors_of_a_lost_peer_become_restart_can_help(error: RuntimeError) -> None:
    with pytest.raises(RestartCanHelp, match="another rank is gone") as caught, worlds.translate_comm_errors():
        raise error
    assert caught.value.exit_code == 75
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, name: "
        "EADDRINUSE, message: address already in use",
        "The server socket has failed to listen on any local network address. The server socket has failed to bind to "
        "[::]:29500 (errno: 98 - Address already in use).",
    ],
)
def test_errors_of_a_port_in_use_become_restart_can_help(text: str) -> None:
    with (
        pytest.raises(RestartCanHelp, match="is in use by another program; start again"),
        worlds.translate_comm_errors(),
    ):
        raise dist.DistNetworkError(text)


def test_other_errors_are_not_translated() -> None:
    with pytest.raises(RuntimeError, match="shape"), worlds.translate_comm_errors():
        raise RuntimeError("shape mismatch")


@pytest.mark.slow  # the fast tests above check the translation of every such error
def test_survivor_of_a_killed_rank_exits_75(tmp_path: Path) -> None:
    """The two processes run without torchrun, which would kill the survivor."""
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__steps=5000, train__log_every=1)
    path = tiny.write_config(tmp_path / "c.yaml", config)
    ranks = launcher.start_ranks(2, *launcher.CLI, "pretrain", path)
    deadline = time.monotonic() + 120
    while len(tiny.rows(config.run_path)) < 3:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in ranks)
        time.sleep(0.05)
    ranks[1].kill()
    _, said = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 75, said[-2000:]
    assert "rank 0: another rank is gone" in said
