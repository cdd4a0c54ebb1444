"""doctor: the decision about drivers over many pairs, apex told apart, and a real run."""

import importlib.machinery
import sys

import pytest

from esvit_scale import doctor

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
def test_driver_fits(driver, build):
    assert doctor.driver_problem(driver, build) is None


@pytest.mark.parametrize(("driver", "build", "instead"), TOO_OLD)
def test_driver_too_old_is_named_with_what_to_do(driver, build, instead):
    problem = doctor.driver_problem(driver, build)
    assert f"driver {driver} is too old for this torch, built for CUDA {build}" in problem
    assert "update the driver" in problem
    assert ("make demo TORCH_INDEX=" in problem) is (instead is not None)
    assert instead is None or f"install torch for CUDA {instead}:" in problem


def test_a_cpu_build_beside_a_driver():
    assert "TORCH_INDEX" in doctor.driver_problem("580.95.05", None)


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: x", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs@x)\n", "580.95.05"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54  Tue\n", "550.54"),
        ("something else", None),
    ],
)  # fmt: skip
def test_the_kernels_word_for_the_driver(text, driver):
    assert doctor.parse_driver(text) == driver


def test_nvidia_smi_is_read_and_its_absence_survived(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_output", lambda *command: "NVIDIA H100, 80GB, 535.183.01\nNVIDIA A10, 535.183.01")
    assert doctor.nvidia_machine() == (["NVIDIA H100, 80GB", "NVIDIA A10"], "535.183.01")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver'\nexit 9\n"
    )
    smi.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._output("nvidia-smi") is None
    assert doctor._output("no-such-command-anywhere") is None


def rows_of_a_machine(monkeypatch, machine, cuda):
    import torch

    monkeypatch.setattr(doctor, "nvidia_machine", lambda: machine)
    monkeypatch.setattr(doctor, "_torch_sees_gpu", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return list(doctor._gpu())


def test_a_machine_whose_driver_is_too_old_for_its_torch(monkeypatch):
    [row] = rows_of_a_machine(monkeypatch, doctor.NvidiaMachine(["NVIDIA V100"], "470.256.02"), "13.2")
    assert row.state == "problem"
    assert not row.required, "without its GPU the machine still trains, on the CPU"
    assert "V100" in row.detail
    assert "470.256.02 is too old" in row.advice
    assert "TORCH_INDEX" in row.advice


def test_a_machine_without_a_gpu_or_without_a_driver(monkeypatch):
    [row] = rows_of_a_machine(monkeypatch, doctor.NvidiaMachine([], None), "13.2")
    assert (row.state, row.advice) == ("absent", "")
    [row] = rows_of_a_machine(monkeypatch, doctor.NvidiaMachine(["NVIDIA device 0000:01:00.0"], None), "13.2")
    assert row.state == "problem"
    assert "driver" in row.advice


def test_a_hidden_gpu_is_not_a_problem(monkeypatch):
    rows_of_a_machine(monkeypatch, doctor.NvidiaMachine(["NVIDIA A10"], "580.95.05"), "13.2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    [row] = doctor._gpu()
    assert (row.state, "CUDA_VISIBLE_DEVICES" in row.detail) == ("absent", True)


def test_apex_is_nvidias_only_with_its_optimizers(tmp_path):
    assert doctor.apex(None).state == "absent"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('never imported')")
    spec = importlib.machinery.PathFinder.find_spec("apex", [str(tmp_path)])
    assert "unrelated package" in doctor.apex(spec).detail
    (tmp_path / "apex" / "optimizers").mkdir()
    assert doctor.apex(spec).state == "ok"


def test_a_broken_required_package_is_a_row_and_exit_code_1(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "webdataset", None)  # importing it raises
    assert doctor.run() == 1
    shown = capsys.readouterr().out
    assert "webdataset      problem" in shown
    assert "does not work" in shown


def test_doctor_passes_here_and_names_every_part(capsys):
    assert doctor.run() == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    for name in ("Python", "torch", "bf16", "gloo", "deepspeed", "DeepSpeed", "fairscale", "timm", "webdataset",
                 "apex", "Slurm", "compiler", "cores", "memory", "open", "disk"):  # fmt: skip
        assert name in rows
