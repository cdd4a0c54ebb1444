import pytest

from esvit_scale.errors import UserError
from esvit_scale.parallel import collectives, world


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_srun_is_recognised(clean: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "123456"}
    for name, value in {**slurm, "SLURM_STEP_NODELIST": "node[1-2]"}.items():
        clean.setenv(name, value)
    clean.setattr(world, "_first_host", lambda nodes: f"first of {nodes}")
    world._adopt_slurm_variables()
    import os

    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("5", "8", "1")
    assert os.environ["MASTER_ADDR"] == "first of node[1-2]"
    assert os.environ["MASTER_PORT"] == str(20000 + 123456 % 20000)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)


def test_a_batch_shell_is_one_process(clean: pytest.MonkeyPatch) -> None:
    """SLURM_PROCID and SLURM_NTASKS are there in the batch shell too, where nobody else was started."""
    import os

    clean.setenv("SLURM_PROCID", "0")
    clean.setenv("SLURM_NTASKS", "4")
    world._adopt_slurm_variables()
    assert "RANK" not in os.environ


def test_half_a_launcher_is_an_error(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("WORLD_SIZE", "2")
    clean.setattr(world.dist, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="without MASTER_ADDR and MASTER_PORT"):
        world.start()


def test_one_process_needs_no_launcher(clean: pytest.MonkeyPatch) -> None:
    me = world.start()
    try:
        assert (me.rank, me.size) == (0, 1)
        assert collectives.gather_objects("x") == ["x"]
        assert collectives.bits_of_ranks(5) == 5
        with pytest.raises(UserError, match="told to all"):
            collectives.on_rank_0(lambda: (_ for _ in ()).throw(UserError("told to all")))
    finally:
        world.stop()
    assert world.start().size == 1  # again, in the same process
