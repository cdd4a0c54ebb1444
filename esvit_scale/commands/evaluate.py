"""The `evaluate` commands, which score the features of a frozen trunk, and `embed`, which writes them to a file."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.option_types import local_path, set_or_folder
from esvit_scale.commands.parser import (
    add_checkpoint,
    add_loading,
    add_workers,
    command,
    count,
    group,
    on_all_ranks,
    positive,
    rank,
)
from esvit_scale.errors import UserError


def add(commands: Any) -> None:
    """Declare `evaluate knn`, `linear`, `transfer`, `retrieval`, `modalities`, `copies`, `segmentation`, `depth`, `video`, `attention` and `correspondence`, and `embed`."""
    evaluate = group(commands, "evaluate", "evaluate frozen features")
    _add_knn(evaluate)
    _add_linear(evaluate)
    _add_transfer(evaluate)
    _add_retrieval(evaluate)
    _add_modalities(evaluate)
    _add_copies(evaluate)
    _add_segmentation(evaluate)
    _add_depth(evaluate)
    _add_video(evaluate)
    _add_attention(evaluate)
    _add_correspondence(evaluate)
    _add_embed(commands)


def _add_knn(evaluate: Any) -> None:
    knn = command(evaluate, "knn", _knn, "k-nearest-neighbour accuracy")
    add_checkpoint(knn)
    _add_sets(knn)
    knn.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write knn.json to")
    ks = "numbers of neighbours that vote (default: 10 20 100 200)"
    knn.add_argument("--k", type=positive, nargs="+", metavar="K", help=ks)
    shots = (
        "for each N, also report the accuracy with only N training samples of each class (default: all samples only)"
    )
    knn.add_argument("--shots", type=positive, nargs="+", default=[], metavar="N", help=shots)
    tries = "random draws of the --shots samples to average over (default: 5)"
    knn.add_argument("--tries", type=positive, default=5, metavar="T", help=tries)
    _add_whole(knn)
    _add_stage(knn)
    _add_features(knn)


def _add_linear(evaluate: Any) -> None:
    linear = command(evaluate, "linear", _linear, "accuracy of linear classifiers, by three protocols")
    add_checkpoint(linear)
    _add_sets(linear)
    linear.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write linear.json to")
    protocols = ("official", "grid", "logistic")
    linear.add_argument(
        "--protocol", nargs="+", choices=protocols, default=protocols, help="protocols to run (default: all three)"
    )
    linear.add_argument(
        "--epochs", type=positive, default=100, metavar="E", help="epochs of SGD, for official and grid (default: 100)"
    )
    linear.add_argument(
        "--sgd-batch", type=positive, default=256, metavar="N", help="samples in a batch of SGD (default: 256)"
    )
    augment = (
        "official and grid: train on random crops of the images instead of on stored features; runs the trunk on every "
        "image in every epoch"
    )
    linear.add_argument("--augment", action="store_true", help=augment)
    fraction = (
        "fraction of each class's training samples to learn from, in (0, 1]; 0.01 and 0.1 are the semi-supervised "
        "protocols (default: 1)"
    )
    linear.add_argument("--fraction", type=float, default=1.0, metavar="F", help=fraction)
    seed = "random seed of the held-out split, the order of samples and the initial weights (default: 0)"
    linear.add_argument("--seed", type=count, default=0, metavar="S", help=seed)
    _add_whole(linear)
    _add_features(linear)


def _add_transfer(evaluate: Any) -> None:
    transfer = command(evaluate, "transfer", _transfer, "a linear classifier on each of many data sets")
    transfer.add_argument(
        "list",
        type=Path,
        metavar="LIST.yaml",
        help="YAML list of data sets with their metrics, or `elevater`, the shipped list of 20",
    )
    add_checkpoint(transfer)
    transfer.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write transfer.json to")
    transfer.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that the list's relative paths start at (default: the list's)"
    )
    transfer.add_argument(
        "--baseline",
        type=Path,
        metavar="F.json",
        help="transfer.json of another checkpoint to compare with (default: none)",
    )
    backbone = (
        "other weights to evaluate in the same way and compare with: timm:NAME@FILE (a network of timm and its file), "
        "timm:NAME (from the Hugging Face cache), hf:FOLDER (of timm, or a CLIP of transformers), a .safetensors file or "
        "anything else that --checkpoint takes; nothing is downloaded (default: none)"
    )
    transfer.add_argument("--backbone", nargs="+", default=[], metavar="B", help=backbone)
    scores = "CSV file of published scores to show beside ours: model,dataset,setting,score,source (default: none)"
    transfer.add_argument("--published", type=Path, metavar="F.csv", help=scores)
    shots = "also learn from only N training images of each class, N at least 2, for each N (default: none)"
    transfer.add_argument("--shots", type=positive, nargs="+", default=[], metavar="N", help=shots)
    seeds = "random seeds that draw the --shots images and the held-out part, for a spread (default: 1)"
    transfer.add_argument("--seeds", type=positive, default=1, metavar="S", help=seeds)
    _add_features(transfer)


def _add_retrieval(evaluate: Any) -> None:
    retrieval = command(evaluate, "retrieval", _retrieval, "how well similar features find images of the same class")
    add_checkpoint(retrieval)
    retrieval.add_argument(
        "--data",
        type=set_or_folder,
        required=True,
        metavar="D",
        help="images to search: labelled shards (folder or URL), a folder with one subfolder for each class, or a folder of the "
        "revisited Oxford or Paris set (jpg/ and gnd_*.json)",
    )
    retrieval.add_argument(
        "--queries",
        type=set_or_folder,
        metavar="Q",
        help="labelled set whose images are the queries (default: every image of --data queries all others)",
    )
    retrieval.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write retrieval.json and a picture to"
    )
    ks = "numbers of nearest images for R@k of labelled sets (default: 1 2 4 8)"
    retrieval.add_argument("--k", type=positive, nargs="+", metavar="K", help=ks)
    size = "revisited sets: pixels to which a longer side above it is reduced (default: the size of the run's crops)"
    retrieval.add_argument("--size", type=positive, metavar="N", help=size)
    _add_features(retrieval)


def _add_modalities(evaluate: Any) -> None:
    summary = "how well the modalities of a sample find each other, and accuracies of each"
    modalities = command(evaluate, "modalities", _modalities, summary)
    weights = "run dir or step folder to evaluate (its teacher, with its heads), or untrained:CONFIG, as it is before training"
    modalities.add_argument("--checkpoint", type=Path, required=True, metavar="C", help=weights)
    shards = "folder of a shard set whose samples are ranked, and classified if there is a --train"
    modalities.add_argument("--data", type=local_path, required=True, metavar="D", help=shards)
    labelled = "folder of a labelled shard set to classify from, by k-NN and logistic regression (default: none)"
    modalities.add_argument("--train", type=local_path, metavar="T", help=labelled)
    modalities.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write modalities.json to")
    ks = "numbers of nearest samples for R@k (default: 1 5 10)"
    modalities.add_argument("--k", type=positive, nargs="+", metavar="K", help=ks)
    batch = "samples in a forward pass (default: 64)"
    modalities.add_argument("--batch", type=positive, default=64, metavar="N", help=batch)


def _add_copies(evaluate: Any) -> None:
    copies = command(evaluate, "copies", _copies, "copy detection: finding the originals of distorted images, µAP")
    add_checkpoint(copies)
    copies.add_argument(
        "--data",
        type=set_or_folder,
        required=True,
        metavar="D",
        help="images to search and to distort: shards (folder or URL), a folder of images, or a folder of Copydays "
        "(original/ beside strong/, jpegqual/N/ or crops/N/)",
    )
    copies.add_argument(
        "--distractors", type=set_or_folder, metavar="D", help="set of further images to search (default: none)"
    )
    copies.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write copies.json and a picture to"
    )
    attacks = ("crop", "jpeg", "strong")
    copies.add_argument(
        "--attack", nargs="+", choices=attacks, help="distortions of generated copies (default: all three)"
    )
    queries = "largest number of images to distort, evenly spaced (default: 1000)"
    copies.add_argument("--queries", type=positive, default=1000, metavar="N", help=queries)
    size = "side in pixels of the square to which whole images are resized (default: the size of the run's crops)"
    copies.add_argument("--size", type=positive, metavar="N", help=size)
    seed = "random seed of distortions and bootstrap (default: 0)"
    copies.add_argument("--seed", type=count, default=0, metavar="S", help=seed)
    _add_features(copies)


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
    _add_windows(segmentation)
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
    _add_features(segmentation)


def _add_windows(parser: argparse.ArgumentParser) -> None:
    size = "pixels to resize an image's short side to (default: the size of the run's global crops)"
    parser.add_argument("--size", type=positive, metavar="N", help=size)
    crop = "side in pixels of the windows that cover an image (default: --size)"
    parser.add_argument("--crop", type=positive, metavar="N", help=crop)
    stride = "pixels between windows (default: two thirds of --crop)"
    parser.add_argument("--stride", type=positive, metavar="N", help=stride)


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
    _add_windows(depth)
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
    _add_features(depth)


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
    _add_precision(video)


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


def _add_embed(commands: Any) -> None:
    embed = command(commands, "embed", _embed, "write the features of images as arrays")
    add_checkpoint(embed)
    embed.add_argument(
        "--data", type=set_or_folder, required=True, metavar="D", help="shards (folder or URL), or a folder of images"
    )
    embed.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="F.npz",
        help="file to write; its arrays are features, keys, labels and classes",
    )
    _add_whole(embed)
    _add_stage(embed)
    _add_features(embed, "none")


def _add_sets(parser: argparse.ArgumentParser) -> None:
    for name, metavar, use in (("--train", "T", "learn from"), ("--test", "V", "classify")):
        parser.add_argument(
            name,
            type=set_or_folder,
            required=True,
            metavar=metavar,
            help=f"labelled shards (folder or URL), or a folder with one subfolder for each class, to {use}",
        )


def _add_whole(parser: argparse.ArgumentParser) -> None:
    whole = (
        "resize the whole image to the crop's square, for small pictures that fill their frame; others are distorted "
        "(default: resize the short side to 256/224 of the crop and cut out the centre)"
    )
    parser.add_argument("--whole", action="store_true", help=whole)


def _add_stage(parser: argparse.ArgumentParser) -> None:
    stage = (
        "take all cells of the map of this stage, from 1, instead of their mean over the last stage, for pictures whose "
        "parts keep their place (default: the mean)"
    )
    parser.add_argument("--stage", type=positive, metavar="N", help=stage)


def _add_features(parser: argparse.ArgumentParser, cache: str = "features/ beside the output") -> None:
    add_loading(parser)
    _add_precision(parser)
    parser.add_argument(
        "--stored", choices=("fp32", "fp16"), default="fp32", help="number format of stored features (default: fp32)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help=f"folder that keeps features for the next evaluation (default: {cache})",
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="precision that the trunk runs in (default: fp32)"
    )


def _extraction_options(o: argparse.Namespace, folder: Path | None) -> Any:
    """Return the values of the options that `_add_features` adds.

    Without --cache, features are kept in `folder`/features, or nowhere if `folder` is None.
    """
    from esvit_scale.evaluate.features import ExtractionOptions

    cache = o.cache or (folder / "features" if folder else None)
    whole, stage = getattr(o, "whole", False), getattr(o, "stage", None)  # not every evaluation has these two
    return ExtractionOptions(o.batch, o.workers, None, o.precision, o.stored, cache, whole, stage)


def _knn(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import knn

    ks, options = o.k or knn.KS, _extraction_options(o, o.out)
    on_all_ranks(lambda: knn.run_knn(o.checkpoint, o.train, o.test, o.out, options, ks, o.shots, o.tries))
    return 0


def _linear(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import linear

    settings = linear.ProbeSettings(o.protocol, o.epochs, o.sgd_batch, o.augment, o.fraction, o.seed)
    options = _extraction_options(o, o.out)
    on_all_ranks(lambda: linear.run_linear(o.checkpoint, o.train, o.test, o.out, settings, options))
    return 0


def _transfer(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import transfer

    if 1 in o.shots:
        raise UserError("--shots 1: one image of each class must be held out to select the penalty; nearest: --shots 2")
    protocol, options = transfer.Protocol(o.seeds, tuple(sorted(set(o.shots)))), _extraction_options(o, o.out)
    others = {"backbones": o.backbone, "published_scores": o.published, "protocol": protocol}
    on_all_ranks(lambda: transfer.run_transfer(o.list, o.checkpoint, o.out, options, o.root, o.baseline, **others))
    return 0


def _retrieval(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import retrieval
    from esvit_scale.report import retrieval_figure

    ks, options = sorted(set(o.k or retrieval.KS)), _extraction_options(o, o.out)

    def run() -> None:
        result = retrieval.run_retrieval(o.checkpoint, o.data, o.out, options, ks, o.queries, o.size)
        if rank() == "0":
            print(retrieval_figure.write(result, o.data, o.queries, o.out))

    on_all_ranks(run)
    return 0


def _modalities(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import modalities

    ks = sorted(set(o.k or modalities.KS))
    modalities.run_modalities(o.checkpoint, o.data, o.out, ks, o.train, o.batch)
    return 0


def _copies(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import copies
    from esvit_scale.report import copies_figure

    settings = copies.CopySettings(o.attack, o.queries, o.size, o.seed)
    options = _extraction_options(o, o.out)

    def run() -> None:
        result = copies.run_copies(o.checkpoint, o.data, o.out, settings, options, o.distractors)
        if rank() == "0":
            print(copies_figure.write(result, o.out))

    on_all_ranks(run)
    return 0


def _segmentation(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import segmentation
    from esvit_scale.report import segmentation_figure

    sizes = (o.size, o.crop, o.stride, o.ignore, o.pixels, o.iterations, o.sgd_batch, o.k, o.bank, o.seed)
    settings = segmentation.SegmentationSettings(o.head, *sizes)
    options = _extraction_options(o, o.out)

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
    options = _extraction_options(o, o.out)

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


def _embed(o: argparse.Namespace) -> int:
    if o.out.suffix not in (".npz", "") and not o.out.is_dir():
        raise UserError(
            f"--out {o.out}: must end in .npz; the file holds several arrays: features, keys, labels, classes"
        )
    from esvit_scale.evaluate import features

    on_all_ranks(lambda: features.run_embed(o.checkpoint, o.data, o.out, _extraction_options(o, None)))
    return 0
