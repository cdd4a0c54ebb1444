"""`esvit-scale slurm preflight`: checks every node of a job before they work together, and names the bad ones.

The batch scripts run it under srun, one process per rank. It checks GPUs, limits, clocks, renames in the shared folder,
and all-reduces inside each node and between neighbouring nodes. Every node first writes a file to DIR/preflight; when
the check fails, the batch scripts name the nodes whose file is missing.
"""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from esvit_scale import doctor_machine, files
from esvit_scale.doctor_packages import CheckRow
from esvit_scale.parallel import collectives, probe
from esvit_scale.parallel import world as worlds
from esvit_scale.parallel.world import World

# Largest clock difference in seconds: the run dir's lock relies on time stamps of heartbeats, and people compare logs.
CLOCK_S = 5.0
SLOW = 0.5  # a rate below this fraction of the median is reported
WHERE = {"inside": "inside the node", "between": "between nodes"}
NBYTES = {"cuda": 256 << 20, "cpu": 4 << 20}


class Report(NamedTuple):
    """The findings of one rank."""

    node: str
    problems: tuple[str, ...]
    clock: float  # time.time() right after a barrier of all ranks
    inside: float | None  # all-reduce rate in GB/s between the ranks of the node
    between: float | None  # the same with a neighbouring node, the better of two


def run(shared: Path) -> int:
    """Check the nodes and print the table on rank 0; return 1 when a node is bad, else 0."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    folder = shared / "preflight"
    token = f"{os.environ.get('SLURM_JOB_ID', '')} {os.environ.get('SLURM_RESTART_COUNT', '0')}\n"
    problems = [*_gpu_problems(), *(f"{row.name}: {row.detail}: {row.advice}" for row in _bad_limits())]
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(_answer(folder, node), token)  # replaces the previous start's file by a rename
    world = worlds.start()
    try:
        with worlds.translate_comm_errors():
            reports = collectives.gather_objects(_report(world, node, folder, token, problems))
    except BaseException:
        worlds.abandon()
        raise
    worlds.stop()
    if world.rank == 0:
        print("\n".join(lines(reports)), flush=True)
    return int(any(bad(reports).values()))


def _report(world: World, node: str, folder: Path, token: str, problems: list[str]) -> Report:
    nodes = collectives.gather_objects(node)
    clock = time.time()  # all ranks leave the gather above at about the same time, so their clocks can be compared
    members: dict[str, list[int]] = {}
    for rank, name in enumerate(nodes):
        members.setdefault(name, []).append(rank)
    unseen = [name for name in members if not _sees(_answer(folder, name), token)]
    if unseen:
        problems = [*problems, f"{folder}: the file just renamed by {', '.join(unseen)} is not seen here"]
    nbytes = NBYTES[world.device.type]
    inside = probe.all_reduce_rate(list(members.values()), world.device, nbytes)
    pairs = [probe.all_reduce_rate(groups, world.device, nbytes) for groups in _neighbours(list(members.values()))]
    return Report(node, tuple(problems), clock, inside, max((rate for rate in pairs if rate), default=None))


def _neighbours(nodes: list[list[int]]) -> Iterator[list[list[int]]]:
    """Yield two rounds of neighbouring node pairs, each pair as the list of both nodes' ranks.

    An inner node is so measured with two neighbours, and a bad node does not make a good neighbour look bad.
    """
    for first in (0, 1):
        pairs = [nodes[i] + nodes[i + 1] for i in range(first, len(nodes) - 1, 2)]
        if pairs:
            yield pairs


def bad(reports: list[Report]) -> dict[str, list[str]]:
    """Compare the ranks' reports; return node → its problems, an empty list for a good node."""
    found: dict[str, list[str]] = {report.node: [] for report in reports}
    clock = median(report.clock for report in reports)
    for kind in ("inside", "between"):
        rates = [rate for report in reports if (rate := getattr(report, kind)) is not None]
        for report in reports:
            rate = getattr(report, kind)
            if rate is not None and rate < SLOW * median(rates):
                found[report.node].append(
                    f"all-reduce {WHERE[kind]}: {rate:.2f} GB/s, where {median(rates):.2f} is usual"
                )
    for report in reports:
        found[report.node] += report.problems
        if abs(report.clock - clock) > CLOCK_S:
            found[report.node].append(f"its clock is {report.clock - clock:+.0f} s off the others'")
    return {node: list(dict.fromkeys(problems)) for node, problems in found.items()}


def lines(reports: list[Report]) -> list[str]:
    """Return the lines to print: one per node, its problems, and the sbatch option that excludes the bad nodes."""
    problems = bad(reports)
    said = []
    for node, found in problems.items():
        of_node = [report for report in reports if report.node == node]
        rates = [
            f"{min(rates):.2f} GB/s {kind}"
            for kind in ("inside", "between")
            if (rates := [rate for report in of_node if (rate := getattr(report, kind)) is not None])
        ]
        said.append(
            f"preflight {node}: {'BAD' if found else 'ok'}, {len(of_node)} ranks" + "".join(f", {r}" for r in rates)
        )
        said += [f"preflight {node}: {problem}" for problem in found]
    if any(problems.values()):
        said.append(f"without it: sbatch --exclude={','.join(node for node, found in problems.items() if found)} …")
    return said


def _gpu_problems() -> Iterator[str]:
    given, seen = os.environ.get("SLURM_GPUS_ON_NODE", ""), torch.cuda.device_count()
    if given.isdecimal() and seen < int(given):
        yield f"torch sees {seen} of {given} GPUs"
    for i in range(seen):
        try:
            torch.ones(1, device=f"cuda:{i}").item()
        except RuntimeError as error:
            yield f"GPU {i}: {str(error).splitlines()[0]}"


def _bad_limits() -> list[CheckRow]:
    return [row for row in doctor_machine.limit_rows() if row.state == "problem"]


def _answer(folder: Path, node: str) -> Path:
    return folder / f"{node}.txt"


def _sees(path: Path, token: str) -> bool:
    """Return whether a file's content becomes `token` within ten seconds; network file systems may lag that long."""
    for _ in range(20):
        try:
            if path.read_text() == token:
                return True
        except OSError:
            pass
        time.sleep(0.5)
    return False
