"""What the preflight concludes from what the ranks found; tests/slurm runs it on nodes."""

from esvit_scale.preflight import Report, bad, lines


def reports(nodes: int = 4, **of_node_2: object) -> list[Report]:
    healthy = {"problems": (), "clock": 1000.0, "inside": 100.0, "between": 40.0}
    return [
        Report(node=f"node{i}", **(healthy | (of_node_2 if i == 2 else {})))
        for i in range(1, nodes + 1)
        for _ in range(2)
    ]


def test_healthy_nodes_pass() -> None:
    assert bad(reports()) == {f"node{i}": [] for i in range(1, 5)}
    assert lines(reports())[0] == "preflight node1: ok, 2 ranks, 100.00 GB/s inside, 40.00 GB/s between"
    alone = [report._replace(inside=None, between=None) for report in reports(nodes=1)]
    assert lines(alone) == ["preflight node1: ok, 2 ranks"]


def test_bad_node_is_named_with_its_problem() -> None:
    cases: list[tuple[dict, str]] = [
        ({"problems": ("torch sees 7 of 8 GPUs",)}, "torch sees 7 of 8 GPUs"),
        ({"clock": 1060.0}, "its clock is +60 s off the others'"),
        ({"inside": 20.0}, "all-reduce inside the node: 20.00 GB/s, where 100.00 is usual"),
        ({"between": 3.0}, "all-reduce between nodes: 3.00 GB/s, where 40.00 is usual"),
    ]
    for found, sentence in cases:
        said = bad(reports(**found))
        assert said == {"node1": [], "node2": [sentence], "node3": [], "node4": []}
        assert lines(reports(**found))[-1] == "without it: sbatch --exclude=node2 …"


def test_small_differences_pass() -> None:
    assert not any(bad(reports(clock=1001.0, inside=70.0, between=25.0)).values())
