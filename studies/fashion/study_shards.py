"""Write the study's shard sets from the four files of Debian's package dataset-fashion-mnist, and check these files first.

    python studies/fashion/study_shards.py SOURCE OUT

SOURCE is a folder that holds them, at any depth: /usr/share/datasets after `apt install dataset-fashion-mnist`, or where
`dpkg -x` unpacked the package. OUT gets three sets: train (60,000 images), bank (the first 5,000 of them, with which k-NN
and probe compare) and test (10,000). Sets that are there already are not written again.
"""

import gzip
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import learning_sets

from esvit_scale.data import shard_writer

BANK = 5000  # images
SHA256 = {  # of the unpacked content, which does not depend on how it was compressed
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    check(source)
    halves = learning_sets.read("fashion-all", "test", source)
    sets = {"train": halves.train, "bank": halves.train[:BANK], "test": halves.held_out}
    for name, found in sets.items():
        if not (out / name / "manifest.json").is_file():
            shard_writer.write_samples(found, out / name, halves.classes, learning_sets.SAMPLES_PER_SHARD, name)
        print(f"{out / name}: {len(found)} images")


def check(source: Path) -> None:
    """End the program with one line if a file is missing below `source` or is another than the study's."""
    for name, expected in SHA256.items():
        found = sorted(source.rglob(name))
        if not found:
            raise SystemExit(
                f"study_shards.py: {source} holds no {name}; install dataset-fashion-mnist, or unpack it there"
            )
        digest = hashlib.sha256(gzip.decompress(found[0].read_bytes())).hexdigest()
        if digest != expected:
            raise SystemExit(f"study_shards.py: {found[0]}: sha256 {digest}, expected {expected}")


if __name__ == "__main__":
    main()
