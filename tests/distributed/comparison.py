"""Compare the metrics of two runs that differ in nothing but their numbers of ranks."""

from typing import Any

SAME = {"loss", "loss_view", "loss_region", "grad_norm", "teacher_entropy_view", "teacher_entropy_region"}
# Statistics of each rank's own images, averaged over ranks.
OF_OWN_IMAGES = {"rank_me", "feature_std", "prototypes_used_view", "prototypes_used_region"}


def assert_same_up_to_order_of_sums(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Assert that rows of metrics.jsonl differ by no more than fp32 sums over ranks do; print the largest differences."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    differences = [
        {key: abs(row[key] - value) / abs(value) for key, value in want.items() if isinstance(value, float) and value}
        for row, want in zip(rows, expected, strict=True)
    ]
    largest = {key: max(row.get(key, 0.0) for row in differences) for key in expected[-1]}
    print({key: f"{value:.1e}" for key, value in largest.items() if value})
    assert max(largest[key] for key in SAME) < 1e-6
    # A change of a parameter is divided by its size, and where its true gradient is zero it is made of rounding alone.
    others = largest.keys() - SAME - OF_OWN_IMAGES
    assert max(largest[key] for key in others) < 1e-4
