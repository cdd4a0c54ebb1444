"""The `evaluate` commands about places in an image: masks, depth, videos, attention, correspondences."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.evaluate_options import add_features, add_precision, add_windows, extraction_options
from esvit_scale.commands.option_types import local_path, set_or_folder
from esvit_scale.commands.parser import add_checkpoint, add_workers, command, count, on_all_ranks, positive, rank
from esvit_scale.errors import UserError


def add(evaluate: Any) -> None:
    """Declare `evaluate segmentation`, `depth`, `video`, `attention` and `correspondence`."""
    _add_segmentation(evaluate)
    _add_depth(evaluate)
    _add_video(evaluate)
    _add_attention(evaluate)
    _add_correspondence(evaluate)


def _add_segmentation(evaluate: Any) -> None:
    summary = "mean IoU of linear and k-NN heads on frozen stage maps"
    segmentation = command(evaluate, "segmentation", _segmentation, summary)
    add_checkpoint(segmentation)
    for name, metavar, use in (("--train", "T", "learn from"), ("--test", "V", "segment")):
        segmentation.add_argument(
            name,
            type=local_path,
            required=True,
            metavar=metavar,
            help=f"images with masks to {use}: a folder with images/ and masks/, or a split of ADE20K, Cityscapes or VOC",
        )
    segmentation.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write segmentation.json and a picture to"
    )
    heads = ("linear", "knn")
    segmentation.add_argument("--head", nargs="+", choices=heads, default=heads, help="heads (default: both)")
    add_windows(segmentation)
    ignore = "number in masks that does not count (default: 255)"
    segmentation.add_argument("--ignore", type=count, default=255, metavar="N", help=ignore)
    pixels = "pixels of every training image to learn from (default: 64)"
    segmentation.add_argument("--pixels", type=positive, default=64, metavar="N", help=pixels)
    iterations = "iterations of SGD of the linear head (default: 2000)"
    segmentation.add_argument("--iterations", type=positive, default=2000, metavar="N", help=iterations)
    batch = "images in a batch of SGD (default: 16)"
    segmentation.add_argument("--sgd-batch", type=positive, default=16, metavar="N", help=batch)
    segmentation.add_argument("--k", type=positive, default=30, metavar="K", help="neighbours that vote (default: 30)")
    bank = "largest number of training pixels that neighbours are searched in (default: 32768)"
    segmentation.add_argument("--bank", type=positive, default=2**15, metavar="N", help=bank)
    seed = "random seed of pixels, held-out images, order and bootstrap (default: 0)"
    segmentation.add_argument("--seed", type=count, default=0, metavar="S", help=seed)
    add_features(segmentation)


def _add_depth(evaluate: Any) -> None:
    depth = command(evaluate, "depth", _depth, "error of depth that a linear head on frozen stage maps predicts")
    add_checkpoint(depth)
    for name, metavar, use in (("--train", "T", "learn from"), ("--test", "V", "predict")):
        depth.add_argument(
            name,
            type=local_path,
            required=True,
            metavar=metavar,
            help=f"images with depth maps to {use}: a folder with images/ and depth/, or of NYU (rgb_* and sync_depth_*)",
        )
    depth.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write depth.json and a picture to"
    )
    add_windows(depth)
    scale = "values of a depth PNG that make a metre (default: 1000; .npy files are in metres)"
    depth.add_argument("--depth-scale", type=float, default=1000.0, metavar="X", help=scale)
    least = "smallest depth that counts, in metres (default: 0.001)"
    depth.add_argument("--min-depth", type=float, default=1e-3, metavar="M", help=least)
    most = "largest depth that counts, in metres (default: 10)"
    depth.add_argument("--max-depth", type=float, default=10.0, metavar="M", help=most)
    bins = "depths, evenly spread over the range, of which a pixel's depth is a mean (default: 256)"
    depth.add_argument("--bins", type=positive, default=256, metavar="N", help=bins)
    pixels = "pixels of every training image to learn from (default: 64)"
    depth.add_argument("--pixels", type=positive, default=64, metavar="N", help=pixels)
    iterations = "iterations of AdamW (default: 2000)"
    depth.add_argument("--iterations", type=positive, default=2000, metavar="N", help=iterations)
    batch = "images in a batch of AdamW (default: 16)"
    depth.add_argument("--head-batch", type=positive, default=16, metavar="N", help=batch)
    seed = "random seed of pixels, initial values, held-out images, order and bootstrap (default: 0)"
    depth.add_argument("--seed", type=count, default=0, metavar="S", help=seed)
    add_features(depth)


def _add_video(evaluate: Any) -> None:
    video = command(evaluate, "video", _video, "how well object masks follow videos by frozen features, J&F")
    add_checkpoint(video)
    video.add_argument(
        "--data",
        type=local_path,
        required=True,
        metavar="D",
        help="videos as folders of frames with masks: a folder with JPEGImages/ and Annotations/, or a list of DAVIS "
        "(ImageSets/2017/val.txt)",
    )
    video.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write video.json and a picture to"
    )
    size = "pixels to resize a frame's short side to (default: 480)"
    video.add_argument("--size", type=positive, default=480, metavar="N", help=size)
    stage = "stage whose map is used, from 1 (default: the last one with cells of at most 16 pixels)"
    video.add_argument("--stage", type=positive, metavar="N", help=stage)
    last = "frames before the current one that labels are taken from, besides the first (default: 7)"
    video.add_argument("--last-frames", type=positive, default=7, metavar="N", help=last)
    k = "most similar cells whose labels count (default: 5)"
    video.add_argument("--k", type=positive, default=5, metavar="K", help=k)
    radius = "cells along each axis within which they are searched (default: 12)"
    video.add_argument("--radius", type=positive, default=12, metavar="N", help=radius)
    seed = "random seed of the bootstrap (default: 0)"
    video.add_argument("--seed", type=count, default=0, metavar="S", help=seed)
    add_workers(video)
    add_precision(video)


def _add_attention(evaluate: Any) -> None:
    summary = "attention maps and token components of one image, or attention of the modalities of some samples"
    attention = command(evaluate, "attention", _attention, summary)
    image = "image file; or the folder of a shard set, to see what each modality of its samples attends to"
    attention.add_argument("image", type=Path, metavar="IMAGE", help=image)
    add_checkpoint(attention)
    attention.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write the pictures and arrays to"
    )
    size = "pixels to resize the image's short side to (default: the size of the run's global crops)"
    attention.add_argument("--size", type=positive, metavar="N", help=size)
    keys = "shard set: keys of the samples to show (default: the first ones with the most modalities)"
    attention.add_argument("--keys", nargs="+", default=[], metavar="K", help=keys)
    samples = "shard set: number of samples to show without --keys (default: 3)"
    attention.add_argument("--samples", type=positive, metavar="N", help=samples)


def _add_correspondence(evaluate: Any) -> None:
    summary = "how often the tokens of two views of an image find each other"
    correspondence = command(evaluate, "correspondence", _correspondence, summary)
    add_checkpoint(correspondence)
    correspondence.add_argument(
        "--data",
        type=set_or_folder,
        required=True,
        metavar="D",
        help="shards (folder or URL), a folder of images, or one image",
    )
    correspondence.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write correspondence.json and pictures to"
    )
    correspondence.add_argument(
        "--images", type=positive, default=500, metavar="N", help="largest number of images to use (default: 500)"
    )
    add_workers(correspondence)


def _segmentation(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import segmentation
    from esvit_scale.report import segmentation_figure

    sizes = (o.size, o.crop, o.stride, o.ignore, o.pixels, o.iterations, o.sgd_batch, o.k, o.bank, o.seed)
    settings = segmentation.SegmentationSettings(o.head, *sizes)
    options = extraction_options(o, o.out)

    def run() -> None:
        result = segmentation.run_segmentation(o.checkpoint, o.train, o.test, o.out, settings, options)
        if rank() == "0":
            print(segmentation_figure.write(result, o.out))

    on_all_ranks(run)
    return 0


def _depth(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import depth
    from esvit_scale.report import depth_figure

    span = (o.depth_scale, o.min_depth, o.max_depth)
    head = (o.bins, o.pixels, o.iterations, o.head_batch, o.seed)
    settings = depth.DepthSettings(o.size, o.crop, o.stride, *span, *head)
    options = extraction_options(o, o.out)

    def run() -> None:
        result = depth.run_depth(o.checkpoint, o.train, o.test, o.out, settings, options)
        if rank() == "0":
            print(depth_figure.write(result, o.out))

    on_all_ranks(run)
    return 0


def _video(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import video
    from esvit_scale.evaluate.features import ExtractionOptions
    from esvit_scale.report import video_figure

    settings = video.VideoSettings(o.size, o.stage, o.last_frames, o.k, o.radius, o.seed)
    options = ExtractionOptions(workers=o.workers, precision=o.precision)

    def run() -> None:
        result = video.run_video(o.checkpoint, o.data, o.out, settings, options)
        if rank() == "0":
            print(video_figure.write(result, o.out))

    on_all_ranks(run)
    return 0


def _attention(o: argparse.Namespace) -> int:
    from esvit_scale.data.manifest import is_shard_set
    from esvit_scale.evaluate import attention, modal_attention
    from esvit_scale.report import evaluation_figures, modal_figure

    if is_shard_set(o.image):
        if o.size:
            raise UserError("--size: not with a shard set, of which the trunk sees what it sees in evaluations")
        found = modal_attention.run_modal_attention(
            o.checkpoint, o.image, o.out, o.keys, o.samples or modal_attention.SAMPLES
        )
        for path in (o.out / "attention.npz", modal_figure.write(found, o.out)):
            print(path)
        return 0
    if o.keys or o.samples:
        raise UserError(f"{'--keys' if o.keys else '--samples'}: only with a shard set; {o.image} is none")
    result = attention.run_attention(o.checkpoint, o.image, o.out, o.size)
    for path in [o.out / "attention.npz", *evaluation_figures.write_attention(result, o.out)]:
        print(path)
    return 0


def _correspondence(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import correspondence
    from esvit_scale.report import evaluation_figures

    result = correspondence.run_correspondence(o.checkpoint, o.data, o.out, o.images, o.workers)
    print(correspondence.table(result.summary))
    for path in [o.out / "correspondence.json", *evaluation_figures.write_correspondences(result, o.out)]:
        print(path)
    return 0
