"""What every test process needs set before torch is imported."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# A test run inside a Slurm allocation or under a launcher is still one process of its own.
for _name in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[_name]
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needs_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    """Give every test the project's logger as a new process has it.

    A run in this process sends it to a file in its run dir and to nobody else, `caplog` included. Fixtures of a module
    run before this one, so what it finds may be such a run's.
    """
    log = logging.getLogger("esvit_scale")

    def reset() -> None:
        log.handlers, log.propagate = [], True
        log.setLevel(logging.NOTSET)

    reset()
    yield
    reset()


@pytest.fixture(scope="module", autouse=True)
def _free_engines() -> Iterator[None]:
    """Let go of the DeepSpeed engines that a module's tests built in this process.

    Nothing else frees them, and each at ZeRO 3 holds a buffer of 5·10⁸ gradients. Unused memory costs nothing, but when
    a dozen lie side by side, Linux refuses to fork the process (ENOMEM), which later tests do.
    """
    from esvit_scale.parallel import engine

    built: list[engine.Engines] = []
    build = engine.build

    def remember(*arguments: Any, **named: Any) -> engine.Engines:
        built.append(build(*arguments, **named))
        return built[-1]

    engine.build = remember
    yield
    engine.build = build
    for engines in built:
        engines.student.destroy()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the one that playwright installed, else one of the system's."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `browser`)")
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        if not own.exists() and system is None:
            pytest.skip("no browser: `playwright install chromium`, or a chromium of the system")
        path = {} if own.exists() else {"executable_path": system}
        opened = playwright.chromium.launch(args=["--no-sandbox"], **path)
        yield opened
        opened.close()
