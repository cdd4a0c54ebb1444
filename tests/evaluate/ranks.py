"""Evaluations in one process group: importing torch and starting a group costs seconds, they do not."""

import sys
from pathlib import Path

from esvit_scale.commands.parser import on_all_ranks
from esvit_scale.evaluate import copies, depth, knn, linear, retrieval, segmentation, video
from esvit_scale.evaluate.features import ExtractionOptions
from esvit_scale.evaluate.linear import ProbeSettings


def main(checkpoint: Path, photos: Path, out: Path) -> None:
    train, test, loading = (
        photos / "train",
        photos / "test",
        ExtractionOptions(batch=7, workers=0, cache=out / "features"),
    )
    recipe = ProbeSettings(epochs=3, batch=15)
    over_images = ProbeSettings(("official",), epochs=2, batch=15, augment=True)
    knn.run_knn(checkpoint, train, test, out, loading, ks=(5,), shots=(3,))
    linear.run_linear(checkpoint, train, test, out, recipe, loading)
    retrieval.run_retrieval(checkpoint, test, out, loading)
    copies.run_copies(
        checkpoint, test, out, copies.CopySettings(queries=11), loading._replace(cache=out / "copied"), train
    )
    settings = segmentation.SegmentationSettings(iterations=10, batch=4, pixels=16, k=5)
    masked = photos.parent / "masked"
    segmentation.run_segmentation(checkpoint, masked, masked, out, settings, loading._replace(cache=out / "pixels"))
    head, far = depth.DepthSettings(iterations=10, batch=4, pixels=16, bins=8), photos.parent / "far"
    depth.run_depth(checkpoint, far, far, out, head, loading._replace(cache=out / "depths"))
    video.run_video(checkpoint, photos.parent / "videos", out, video.VideoSettings(64, 1, radius=3), loading)
    linear.run_linear(checkpoint, train, test, out / "images", over_images, loading)


if __name__ == "__main__":
    on_all_ranks(lambda: main(*map(Path, sys.argv[1:])))
