"""doctor: the decision about drivers over many pairs, tested versions, optional extras, limits, and a real run."""

import importlib.machinery
import re
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from packaging.version import Version

from esvit_scale import doctor, doctor_gpu, doctor_machine, doctor_packages
from esvit_scale.data import limits

FIT = [
    ("580.65.06", "13.0"), ("580.65.06", "13.2"), ("580.95.05", "13.2"), ("595.12", "13.2"), ("575.57.08", "12.9"),
    ("525.60.13", "12.1"), ("525.60.13", "12.8"), ("535.183.01", "12.4"), ("550.54", "12.6"), ("580.95.05", "12.8"),
    ("450.80.02", "11.8"), ("470.256.02", "11.8"), ("525.60.13", "11.8"), ("580.95.05", "11.8"), ("600.1", "14.0"),
]  # fmt: skip
TOO_OLD = [
    ("580.65.05", "13.0", 12), ("575.57.08", "13.0", 12), ("535.183.01", "13.2", 12), ("525.60.13", "13.2", 12),
    ("525.60.12", "12.1", 11), ("470.256.02", "12.6", 11), ("450.80.02", "12.4", 11), ("470.256.02", "13.0", 11),
    ("450.80.01", "11.8", None), ("390.157", "12.1", None), ("418.226.00", "13.2", None), ("535.183.01", "14.0", 12),
]  # fmt: skip


@pytest.mark.parametrize(("driver", "build"), FIT)
def test_new_enough_driver_is_accepted(driver, build):
    assert doctor_gpu.driver_problem(driver, build) is None


@pytest.mark.parametrize(("driver", "build", "instead"), TOO_OLD)
def test_old_driver_error_says_what_to_install(driver, build, instead):
    problem = doctor_gpu.driver_problem(driver, build)
    assert f"driver {driver} is too old for this torch, built for CUDA {build}" in problem
    assert "update the driver" in problem
    assert ("make demo TORCH_INDEX=" in problem) is (instead is not None)
    assert instead is None or f"install torch for CUDA {instead}:" in problem


def test_cpu_build_beside_a_driver_suggests_torch_index():
    assert "TORCH_INDEX" in doctor_gpu.driver_problem("580.95.05", None)


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: x", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs@x)\n", "580.95.05"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54  Tue\n", "550.54"),
        ("something else", None),
    ],
)  # fmt: skip
def test_driver_version_is_parsed_from_proc(text, driver):
    assert doctor_gpu.parse_driver(text) == driver


def test_nvidia_smi_output_is_parsed_and_failures_are_tolerated(monkeypatch, tmp_path):
    monkeypatch.setattr(
        doctor_machine, "command_output", lambda *command: "NVIDIA H100, 80GB, 535.183.01\nNVIDIA A10, 535.183.01"
    )
    assert doctor_gpu.nvidia_machine() == (["NVIDIA H100, 80GB", "NVIDIA A10"], "535.183.01")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver'\nexit 9\n"
    )
    smi.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor_machine.command_output("nvidia-smi") is None
    assert doctor_machine.command_output("no-such-command-anywhere") is None


def rows_of_a_machine(monkeypatch, machine, cuda):
    import torch

    monkeypatch.setattr(doctor_gpu, "nvidia_machine", lambda: machine)
    monkeypatch.setattr(doctor_gpu, "torch_sees_gpu", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return list(doctor_gpu.gpu_rows())


def test_old_driver_is_a_problem_but_not_required(monkeypatch):
    [row] = rows_of_a_machine(monkeypatch, doctor_gpu.NvidiaMachine(["NVIDIA V100"], "470.256.02"), "13.2")
    assert row.state == "problem"
    assert not row.required, "without its GPU the machine still trains, on the CPU"
    assert "V100" in row.detail
    assert "470.256.02 is too old" in row.advice
    assert "TORCH_INDEX" in row.advice


def test_missing_gpu_is_absent_and_missing_driver_a_problem(monkeypatch):
    [row] = rows_of_a_machine(monkeypatch, doctor_gpu.NvidiaMachine([], None), "13.2")
    assert (row.state, row.advice) == ("absent", "")
    [row] = rows_of_a_machine(monkeypatch, doctor_gpu.NvidiaMachine(["NVIDIA device 0000:01:00.0"], None), "13.2")
    assert row.state == "problem"
    assert "driver" in row.advice


def test_gpu_hidden_by_cuda_visible_devices_is_absent(monkeypatch):
    rows_of_a_machine(monkeypatch, doctor_gpu.NvidiaMachine(["NVIDIA A10"], "580.95.05"), "13.2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    [row] = doctor_gpu.gpu_rows()
    assert (row.state, "CUDA_VISIBLE_DEVICES" in row.detail) == ("absent", True)


def test_apex_counts_only_with_its_optimizers(tmp_path):
    assert "optim.name=apex_adam" in doctor_packages.apex(None).detail
    assert doctor_packages.apex(None).state == "absent"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('never imported')")
    spec = importlib.machinery.PathFinder.find_spec("apex", [str(tmp_path)])
    assert "unrelated package" in doctor_packages.apex(spec).detail
    (tmp_path / "apex" / "optimizers").mkdir()
    assert doctor_packages.apex(spec).state == "ok"


# --- versions and extras -------------------------------------------------------------------------------------------

VERSIONS = [
    "2.6.0", "2.7.0a0+7c8ec84dab.nv25.03", "2.7.0rc1", "2.7", "2.7.0", "2.7.0+cpu", "2.9", "2.10.0", "2.14.1",
    "2.14.1+cu130", "2.14.1rc2", "2.14.1.post1", "2.14.1.post1.dev3", "2.14.1.dev20261101+cu130", "2.14.2.dev1",
    "2.14.1.0", "2.14.1a1.dev2", "2.15.0", "2.15.0.dev20261120+cu132", "3", "10.0",
]  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_version_comparison_matches_packaging(version, monkeypatch):
    monkeypatch.setitem(doctor_packages.TESTED, "torch", doctor_packages.Range("2.7.0", "2.14.1"))
    public = Version(Version(version).public)
    if public < Version("2.7.0"):
        expected = ("warning", f"{version} is older than the oldest tested 2.7.0", "tested with 2.7.0 to 2.14.1")
    elif public > Version("2.14.1"):
        expected = ("warning", f"{version} is newer than the newest tested 2.14.1", "tested with 2.7.0 to 2.14.1")
    else:
        expected = ("ok", version, "")
    assert doctor_packages.compared("torch", version) == expected


@pytest.mark.parametrize("version", ["of unknown version", "", "git-7c8ec84", "1.0.0-custom"])
def test_invalid_version_is_a_warning(version):
    state, detail, _ = doctor_packages.compared("timm", version)
    assert (state, "cannot be compared" in detail) == ("warning", True)


def install(folder, name, version):
    """Make what pip leaves of a package: its metadata."""
    info = folder / f"{name.replace('-', '_')}-{version or 0}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\n" + f"Version: {version}\n" * bool(version)
    )


@pytest.fixture
def only(monkeypatch, tmp_path):
    """Function that makes these packages, by their metadata, all that is installed."""

    def install_only(**versions):
        for name, version in versions.items():
            install(tmp_path, name.replace("_", "-"), version)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        return {row.name: row for row in doctor_packages.extras()}

    return install_only


def test_missing_extra_names_its_purpose_and_pip_command(only):
    rows = only()
    assert list(rows) == list(doctor_packages.EXTRAS)
    for name, row in rows.items():
        assert (row.state, row.required) == ("absent", False)
        assert row.detail.endswith(f"not installed: needed for {doctor_packages.EXTRAS[name].purpose}")
        assert row.advice == f"pip install 'esvit-scale[{name}]'"


def test_partly_installed_extras_list_what_is_missing(only):
    tested = {name: newest for name, (_, newest) in doctor_packages.TESTED.items()}
    rows = only(onnx=tested["onnx"], onnxscript=tested["onnxscript"], tifffile=tested["tifffile"], opencv_python="4.10.0.84",
                tensorboard="99.1", pyarrow=None)  # fmt: skip
    assert rows["export"].state == "ok", "the rest of this extra is for tests"
    assert rows["export"].detail.endswith("; onnxruntime, transformers not installed, which only tests need")
    assert rows["tiff"].state == "absent"
    assert rows["tiff"].detail.startswith(f"imagecodecs not installed (installed: tifffile {tested['tifffile']}): ")
    assert rows["opencv"].state == "ok", "any of the distributions that bring cv2 serves"
    assert (rows["tracking"].state, rows["tracking"].required) == ("warning", False)
    assert f"99.1 is newer than the newest tested {tested['tensorboard']}" in rows["tracking"].detail
    assert (
        rows["tracking"].advice
        == f"tensorboard: tested with {doctor_packages.TESTED['tensorboard'].oldest} to {tested['tensorboard']}"
    )
    assert rows["parquet"].state == "warning", "metadata without a version"


def test_required_packages_are_checked_for_version_and_presence(only):
    only(numpy="1.20", scipy=doctor_packages.TESTED["scipy"].oldest)
    rows = {row.name: row for row in doctor_packages.others()}
    assert (rows["numpy"].state, rows["numpy"].detail[:17]) == ("warning", "1.20 is older tha")
    assert rows["other packages"].detail == f"scipy {doctor_packages.TESTED['scipy'].oldest}"
    assert (rows["pillow"].state, rows["pillow"].required) == ("problem", True)
    assert not {"pyarrow", "torch", "onnx"} & set(rows)


# --- limits: what doctor calls a problem is what a run is refused ----------------------------------------------------


@pytest.mark.parametrize("files", [40, 56, 150, 223, 224, 1000])
def test_open_files_row_agrees_with_the_check_of_a_run(files):
    code = (
        "import resource; from esvit_scale import doctor_machine; from esvit_scale.data import limits; from esvit_scale.errors import RestartCanHelp\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({files} - 5, {files}))\n"
        "row = doctor_machine.open_files_row()\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == FILES - 5, 'doctor changes nothing'\n"
        "try: limits.check_node(limits.COMMON_WORKERS)\n"
        "except RestartCanHelp: print('refused', row.state, row.detail)\n"
        "else: print('runs', row.state, row.detail)"
    ).replace("FILES", str(files))  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    verdict, state, *_ = said.split()
    assert (verdict, state) == (("refused", "problem") if files < 224 else ("runs", "ok"))
    assert f"up to {max(0, (files - 32) // 12)}" in said


def test_low_soft_limit_alone_is_ok(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
    assert doctor_machine.open_files_row().state == "ok"
    assert limits.reachable_files() == limits.MOST_FILES


@pytest.mark.parametrize(
    ("total", "free", "state"),
    [(64 << 20, 64 << 20, "problem"), (1 << 30, 1 << 30, "ok"), (8 << 30, 4 << 30, "ok"), (8 << 30, 4096, "problem")],
)
def test_shared_memory_row_judges_size_and_free_space(total, free, state, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=total, free=free))
    assert [row.state for row in doctor_machine.shared_memory_rows()] == [state]


# --- real runs -----------------------------------------------------------------------------------------------------


def test_broken_required_package_exits_with_1(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "webdataset", None)  # importing it raises
    assert doctor.run() == 1
    shown = capsys.readouterr().out
    assert "webdataset      problem" in shown
    assert "does not work" in shown


def test_doctor_passes_here_with_a_row_for_every_check(capsys, monkeypatch):
    monkeypatch.setitem(doctor_packages.TESTED, "torch", doctor_packages.Range("1.0", "1.13.1"))
    assert doctor.run() == 0, "a version that is not tested is a warning"
    shown = capsys.readouterr().out
    rows = [line.split()[0] for line in shown.splitlines() if line]
    for name in ("Python", "torch", "bf16", "gloo", "torchvision", "deepspeed", "DeepSpeed", "fairscale", "timm",
                 "webdataset", "apex", "Slurm", "compiler", "cores", "memory", "open", "disk", *doctor_packages.EXTRAS):  # fmt: skip
        assert name in rows
    assert all(re.search(rf"\b{name}\b", shown) for name in doctor_packages.TESTED)
    assert re.search(r"^torch +warning +\S+ is newer than the newest tested 1\.13\.1, (CUDA|CPU) build", shown, re.M)
    assert re.search(r"^Outside the tested versions: .*\btorch\b", shown, re.M)


def test_gloo_check_keeps_an_existing_process_group():
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert doctor.collective_row("gloo", required=True).state == "ok"
        assert dist.is_initialized()
    finally:
        if ours:
            dist.destroy_process_group()
