"""Trains small multimodal runs on the stamps of benchmarks/modal_sets.py and prints how well the modalities find each other.

    python benchmarks/modalities.py --source UNPACKED --out DIR [--seeds 0 1 2] [--backbones shared separate]
                                    [--override key=value …]

UNPACKED is where the Debian package tuxpaint-stamps-default lies (benchmarks/modal_sets.py); its two sets share no subject.
The speech is stored at 16 kHz, so that a run does not spend half of its time on resampling. A run is the preset vatt_small
with the given overrides; a finished one is not trained again. For each direction the table has R@5 on the held-out set: the
mean over seeds and each seed's, chance, and what a ranking by length alone reaches.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import modal_sets

from esvit_scale.data import media, shard_writer
from esvit_scale.data.shard_file import Sample

K = "5"
RATE = 16_000  # Hz
LONGEST = 10 * RATE  # samples of a recording that are kept


def main() -> None:
    """Train and evaluate every run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="folder in which the package was unpacked")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--preset", default="vatt_small", help="preset (default: vatt_small)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--backbones", nargs="+", default=["shared", "separate"], help="default: shared separate")
    parser.add_argument("--override", nargs="+", default=[], help="key=value of the preset")
    o = parser.parse_args()
    sets = shards(o.source, o.out / "shards")
    results: dict[str, list[dict[str, Any]]] = {}
    for backbone in o.backbones:
        for seed in o.seeds:
            results.setdefault(backbone, []).append(result_of(o, sets, backbone, seed))
            print(f"{backbone}, seed {seed}: {results[backbone][-1]['seconds']:.0f} s of processor time", flush=True)
    print(retrieval_table(results))
    print(accuracy_table(results))


def shards(source: Path, folder: Path) -> tuple[Path, Path]:
    """Write the stamps' two halves as shard sets with speech at RATE, unless they are there, and return their folders."""
    sets = (folder / "train", folder / "held_out")
    if not all((path / "manifest.json").is_file() for path in sets):
        halves = modal_sets.read("stamps", source)
        for path, found in zip(sets, halves[:2], strict=True):
            shard_writer.write_samples([resampled(s) for s in found], path, halves.classes, 200, path.name)
    return sets


def resampled(sample: Sample) -> Sample:
    """Return a sample whose Ogg recording is a FLAC file of one channel at RATE."""
    if "ogg" not in sample.extras:
        return sample
    values, length = media.Recording(sample.extras["ogg"]).cut(0.0, RATE, LONGEST)
    flac = io.BytesIO()
    media.sound_library().write(flac, values[:length], RATE, format="FLAC")
    others = {name: data for name, data in sample.extras.items() if name != "ogg"}
    return sample._replace(extras={**others, "flac": flac.getvalue()})


def result_of(o: argparse.Namespace, sets: tuple[Path, Path], backbone: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one run, unless it was done before, and return its modalities.json and processor time."""
    run = o.out / f"{backbone}-{seed}"
    if not (run / "modalities.json").exists():
        train, test = sets
        overrides = [f"data.train={train}", f"run_dir={run}", f"seed={seed}", *o.override]
        before = children_seconds()
        command("pretrain", o.preset, *overrides, f"model.modalities.backbone={backbone}")
        (run / "seconds.json").write_text(json.dumps(children_seconds() - before))
        where = ["--data", str(test), "--train", str(train), "--out", str(run)]
        command("evaluate", "modalities", "--checkpoint", str(run), *where)
    found: dict[str, Any] = json.loads((run / "modalities.json").read_text())
    return found | {"seconds": json.loads((run / "seconds.json").read_text())}


def command(*words: str) -> None:
    """Run esvit-scale with these words; leave the script if it fails."""
    if code := subprocess.run([sys.executable, "-m", "esvit_scale", *words], check=False).returncode:
        sys.exit(code)


def children_seconds() -> float:
    """Return the processor time of this process's finished children, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def retrieval_table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return R@5 of every direction and backbone as a Markdown table."""
    first = next(iter(results.values()))[0]["retrieval"]
    lines = ["| direction | n | chance | lengths | " + " | ".join(f"{b}: mean (seeds)" for b in results) + " |"]
    lines.append("|---" * (4 + len(results)) + "|")
    for i, row in enumerate(first):
        lengths = f"{row['lengths'][K]['value']:.1f}" if row["lengths"] else "–"
        cells = []
        for of_backbone in results.values():
            values = [r["retrieval"][i]["recall"][K]["value"] for r in of_backbone]
            cells.append(f"{sum(values) / len(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})")
        head = f"| {row['query']} → {row['found']} | {row['samples']} | {row['chance'][K]:.1f} | {lengths} | "
        lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy_table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the accuracies of every modality and backbone, means over seeds, as a Markdown table."""
    first = next(iter(results.values()))[0].get("classification", [])
    lines = ["| modality | n | largest class | " + " | ".join(f"{b}: k-NN, linear" for b in results) + " |"]
    lines.append("|---" * (3 + len(results)) + "|")
    for i, row in enumerate(first):
        cells = []
        for of_backbone in results.values():
            means = [
                sum(r["classification"][i][p]["top1"] for r in of_backbone) / len(of_backbone)
                for p in ("knn", "linear")
            ]
            cells.append(", ".join(f"{mean:.1f}" for mean in means))
        lines.append(
            f"| {row['modality']} | {row['n_test']} | {row['largest_class']:.1f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s")
