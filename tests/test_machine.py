"""CPU and memory limits from control group trees of both versions, written into temporary folders."""

from pathlib import Path

import pytest

from esvit_scale import machine

V2, V1 = "0::/job/step\n", "7:memory:/job\n4:cpu,cpuacct:/job/step\n1:name=systemd:/init.scope\n0::/init.scope\n"
HOST_PATH = V1.replace("/job", "/docker/0123abc/job")  # what a container without a namespace of its own is shown


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


CPU = {
    "no group": ("", {}, None),
    "v2 without a limit": (V2, {"job/step/cpu.max": "max 100000"}, None),
    "v2 at the root of a container": ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
    "v2, the group above is tighter": (V2, {"job/step/cpu.max": "400000 100000", "job/cpu.max": "200000 100000"}, 2.0),
    "v1 without a limit": (V1, {"cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1"}, None),
    "v1": (V1, {"cpu,cpuacct/job/cpu.cfs_quota_us": "50000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 0.5),
    "v1 under the controller's own name": (V1, {"cpu/job/cpu.cfs_quota_us": "9", "cpu/job/cpu.cfs_period_us": "3"}, 3),
    "v1 in a container": (HOST_PATH, {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
}


@pytest.mark.parametrize(("groups", "files", "quota"), CPU.values(), ids=CPU)
def test_cpu_quota_is_the_tightest_of_the_groups(groups, files, quota, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP_ROOT", tree(tmp_path / "root", files))
    monkeypatch.setattr(machine, "OWN_GROUPS", tree(tmp_path, {"cgroup": groups.strip()}) / "cgroup")
    monkeypatch.setattr(machine, "affinity_cpus", lambda: 2)
    assert machine.cpu_quota() == quota
    assert machine.usable_cpus() == (2 if quota is None else max(1, min(2, int(quota))))


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        (V2, {"job/memory.max": "max"}, None),
        (V2, {"job/step/memory.max": "max", "job/memory.max": "4096"}, 4096),
        (V1, {"memory/job/memory.limit_in_bytes": "9223372036854771712"}, None),  # version 1's way to say no limit
        (V1, {"memory/job/memory.limit_in_bytes": "8192", "memory/memory.limit_in_bytes": "4096"}, 4096),
    ],
)
def test_memory_limit_is_the_tightest_of_the_groups(groups, files, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP_ROOT", tree(tmp_path / "root", files))
    monkeypatch.setattr(machine, "OWN_GROUPS", tree(tmp_path, {"cgroup": groups.strip()}) / "cgroup")
    assert machine.memory_limit() == limit
