"""Write the measured figures of whole steps into README.md and benchmarks/README.md, from benchmarks/results/step-*.json.

    python benchmarks/readme.py [--check]

The files are those of `benchmarks/step.py --save step-NAME`. A table stands between two comments, and nothing else of a
page is changed. --check writes nothing and ends with 1 if a page is out of date, as a test does.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- step figures, written by benchmarks/readme.py -->\n", "<!-- end of step figures -->\n"
PAGES = {
    HERE.parent / "README.md": False,
    HERE / "README.md": True,
}  # page → whether its table has the columns steps, load and commit

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is out of date")
    options = parser.parse_args()
    stale = [page for page in PAGES if written(page) != page.read_text()]
    for page in stale:
        print(f"{page}: {'out of date; run python benchmarks/readme.py' if options.check else 'written'}")
        if not options.check:
            page.write_text(written(page))
    return int(options.check and bool(stale))


def written(page: Path) -> str:
    """Return the page's text with its table written again from the results."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text(results(), PAGES[page])}\n{END}{after}"


def results() -> list[Row]:
    """Return the saved rows in which two implementations were compared, each with its machine under "where"."""
    files = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("step-*.json"))]
    rows = [row | {"where": found["where"]} for found in files for row in found["rows"] if row["official"]]
    order = ["fp32", "bf16"]
    key = lambda r: (r["preset"], r["where"]["allocator"], order.index(r["precision"]), r["batch"], r["checkpointing"])  # noqa: E731
    return sorted(rows, key=key)


def text(rows: list[Row], full: bool) -> str:
    """Return the table and the line below it; `full` adds the columns steps, load and commit."""
    head = ["step", "images/s", "compared with", "its images/s", "× as fast", "fastest steps", "of its memory"]
    head += ["steps", "load", "commit"] if full else []
    lines = [head, ["---"] * len(head), *(line(row, full) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{places(rows)}\n"


def line(row: Row, full: bool) -> list[str]:
    """Return the cells of one row of the table as text."""
    rates = row["ours_images_per_s"], row["official_images_per_s"]
    step = f"`{row['preset']}`, {row['precision']}, {row['batch']} images"
    if row["checkpointing"] != "none":
        step += f", checkpointing {row['checkpointing']}"
    if row["where"]["allocator"] != "glibc":
        step += f", {row['where']['allocator'].removeprefix('lib').partition('.')[0]} for both"
    other = "timm's modules" if row["official"] == "timm" else "official modules"
    ratios = rates[0] / rates[1], min(row["official_seconds"]) / min(row["ours_seconds"])
    memory = row["ours_peak_mb"] / row["official_peak_mb"]
    cells = [step, f"{rates[0]:.2f}", other, f"{rates[1]:.2f}", *(f"{x:.2f}" for x in (*ratios, memory))]
    steps, where = len(row["ours_seconds"]), row["where"]
    return cells + ([str(steps), str(where["load"]), where["commit"]] if full else [])


def places(rows: list[Row]) -> str:
    """Return a sentence that names every machine and version of torch on which the rows were measured."""
    seen: dict[str, None] = {}
    for row in rows:
        where = row["where"]
        flags = f" ({', '.join(where['flags'])})" if where["flags"] else ""
        cores = "one core" if where["threads"] == 1 else f"{where['threads']} cores"
        clock = "processor" if row.get("clock") == "processor" else "wall"
        place = (
            f"in {clock} time on {cores} of an {where['processor']}{flags}, torch {where['torch'].partition('+')[0]}"
        )
        seen[f"{place}, bf16 products computed in {where['products_of_bf16']}"] = None
    return f"Measured by `benchmarks/step.py` {'; '.join(seen)}; both sides in turns, medians; *fastest steps* is the ratio of the fastest step of each side."


if __name__ == "__main__":
    sys.exit(main())
