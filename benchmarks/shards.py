"""Images/s of the shard writer by worker processes, and what a long list costs before the first image is read.

    python benchmarks/shards.py [--images 400] [--workers 1 2] [--repeats 3] [--lines 1000000] [--json]

The images are made here: 500x375 JPEGs of about 60 KB from photographs that scikit-image brings. Beside the writer
stands decoding alone, in one process, which every image is put through once. Rounds alternate between the cells, and
the fastest counts. The list has `--lines` lines; one shard of it is written, in a fresh process.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WIDTH, HEIGHT = 500, 375
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def main() -> None:
    from esvit_scale.machine import usable_cpus

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--lines", type=int, default=1_000_000, help="of the list; 0 leaves it out")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    parser.add_argument("--plan", nargs=2, metavar=("LIST", "DST"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(plan_list(Path(options.plan[0]), Path(options.plan[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="esvit-scale-") as folder:
        make_images(Path(folder) / "images", options.images)
        result: dict[str, Any] = {"machine": f"{platform.machine()}, {usable_cpus()} cores", "images": options.images}
        result["rates"] = rates(Path(folder), options)
        if options.lines:
            result["list"] = in_fresh_process(Path(folder), options.lines)
    print(json.dumps(result) if options.json else table(result))


def make_images(folder: Path, count: int) -> None:
    import numpy as np
    import skimage.data
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        width, height = (int(side * rng.uniform(0.5, 1)) for side in photograph.size)
        left, top = int(rng.uniform(0, photograph.width - width)), int(rng.uniform(0, photograph.height - height))
        image = photograph.crop((left, top, left + width, top + height)).resize(
            (WIDTH, HEIGHT), Image.Resampling.LANCZOS
        )
        noisy = np.clip(np.asarray(image) + rng.normal(0, 6, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:06d}.jpg", quality=87)


def rates(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    from esvit_scale.data.decode import decode
    from esvit_scale.data.reencode import Reencode
    from esvit_scale.data.shard_plan import Recipe
    from esvit_scale.data.shard_verify import verify
    from esvit_scale.data.shard_writer import write_source
    from esvit_scale.data.sources import SourceOptions

    images, number = folder / "images", iter(range(1_000_000))

    def decode_only() -> None:
        for path in images.iterdir():
            decode(path.read_bytes())

    def write(workers: int, reencode: Reencode) -> Callable[[], None]:
        recipe = Recipe(samples_per_shard=100, reencode=reencode)
        return lambda: void(write_source(str(images), folder / f"set{next(number)}", SourceOptions(), recipe, workers))

    cells: dict[str, Callable[[], None]] = {"decode only, 1 process": decode_only}
    for workers in options.workers:
        cells[f"create, {workers} workers"] = write(workers, Reencode())
        cells[f"create --short-side 256, {workers} workers"] = write(workers, Reencode(short_side=256))
    write(1, Reencode())()
    for workers in options.workers:
        cells[f"verify, {workers} workers"] = lambda w=workers: void(verify(folder / "set0", w))  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in cells}
    for _ in range(options.repeats):
        for name, run in cells.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: options.images / min(times) for name, times in seconds.items()}


def void(_: object) -> None:
    return None


def in_fresh_process(folder: Path, lines: int) -> dict[str, float]:
    """A list whose lines all differ, of few files: `./x.jpg`, `.//x.jpg`, … are the same file to the system."""
    names = [path.name for path in sorted((folder / "images").iterdir())]
    with (folder / "list.txt").open("w") as file:
        for i in range(lines):
            copy, which = divmod(i, len(names))
            steps = "".join("./" if copy >> bit & 1 else "/" for bit in range(copy.bit_length()))
            file.write(f"./{steps}{names[which]}\n")
    command = [sys.executable, __file__, "--plan", str(folder / "list.txt"), str(folder / "from-list")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the list failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"lines": lines, **found}


def plan_list(path: Path, destination: Path) -> dict[str, float]:
    """Seconds, and peak memory above that of the imports, of writing one shard of a list."""
    from esvit_scale.data.shard_plan import Recipe
    from esvit_scale.data.shard_writer import Part, write_source
    from esvit_scale.data.sources import SourceOptions

    before, start = peak_mb(), time.perf_counter()
    options = SourceOptions(root=path.parent / "images")
    write_source(str(path), destination, options, Recipe(samples_per_shard=100), 1, Part(1, 1_000))
    return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb() - before}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['images']} JPEGs of {WIDTH}x{HEIGHT}; {result['machine']}", "", f"{'':<40}{'images/s':>10}"]
    lines += [f"{name:<40}{rate:>10.0f}" for name, rate in result["rates"].items()]
    if "list" in result:
        found = result["list"]
        lines += [
            "",
            f"a list of {found['lines']:,} lines and one shard in a thousand: {found['seconds']:.1f} s, "
            f"{found['peak_mb']:.0f} MB above the imports",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
