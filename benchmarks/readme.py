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
    """Return the table and the line below it; `full` adds the columns steps, load and commit, and several machines a column
    with their numbers."""
    numbers = {place: i for i, place in enumerate(dict.fromkeys(map(place_of, rows)), 1)}
    head = ["step", "images/s", "compared with", "its images/s", "× as fast", "fastest steps", "of its memory"]
    head += ["machine"] if len(numbers) > 1 else []
    head += ["steps", "load", "commit"] if full else []
    lines = [head, ["---"] * len(head)]
    for row in rows:
        machine = [str(numbers[place_of(row)])] if len(numbers) > 1 else []
        where = row["where"]
        facts = [str(len(row["ours_seconds"])), str(where["load"]), where["commit"]] if full else []
        lines.append([*cells(row), *machine, *facts])
    marked = [f"({i}) {place}" if len(numbers) > 1 else place for place, i in numbers.items()]
    measured = f"Measured by `benchmarks/step.py` {'; '.join(marked)}; both sides in turns, medians; *fastest steps* is the ratio of the fastest step of each side."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{measured}\n"


def cells(row: Row) -> list[str]:
    """Return the cells of one row of the table that say what was measured and found."""
    rates = row["ours_images_per_s"], row["official_images_per_s"]
    step = f"`{row['preset']}`, {row['precision']}, {row['batch']} images"
    if row["checkpointing"] != "none":
        step += f", checkpointing {row['checkpointing']}"
    if row["where"]["allocator"] != "glibc":
        step += f", {row['where']['allocator'].removeprefix('lib').partition('.')[0]} for both"
    if row.get("warm_up", 1) > 1:
        step += f", after {row['warm_up']} steps"
    other = "timm's modules" if row["official"] == "timm" else "official modules"
    ratios = rates[0] / rates[1], min(row["official_seconds"]) / min(row["ours_seconds"])
    memory = row["ours_peak_mb"] / row["official_peak_mb"]
    return [step, f"{rates[0]:.2f}", other, f"{rates[1]:.2f}", *(f"{x:.2f}" for x in (*ratios, memory))]


def place_of(row: Row) -> str:
    """Return the words for the machine, clock and version of torch with which a row was measured."""
    where = row["where"]
    flags = f" ({', '.join(where['flags'])})" if where["flags"] else ""
    cores = "one core" if where["threads"] == 1 else f"{where['threads']} cores"
    clock = "processor" if row.get("clock") == "processor" else "wall"
    torch = where["torch"].partition("+")[0]
    return f"in {clock} time on {cores} of an {where['processor']}{flags}, torch {torch}, bf16 products computed in {where['products_of_bf16']}"


if __name__ == "__main__":
    sys.exit(main())
