"""The `evaluate` commands, which score the features of a frozen trunk, and `embed`, which writes them to a file."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands import evaluate_dense, evaluate_images
from esvit_scale.commands.evaluate_options import add_features, add_stage, add_whole, extraction_options
from esvit_scale.commands.option_types import local_path, set_or_folder
from esvit_scale.commands.parser import add_checkpoint, command, group, on_all_ranks, positive
from esvit_scale.errors import UserError


def add(commands: Any) -> None:
    """Declare all `evaluate` commands, and `embed`."""
    evaluate = group(commands, "evaluate", "evaluate frozen features")
    evaluate_images.add(evaluate)
    evaluate_dense.add(evaluate)
    _add_modalities(evaluate)
    _add_embed(commands)


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
    add_whole(embed)
    add_stage(embed)
    add_features(embed, "none")


def _modalities(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import modalities

    ks = sorted(set(o.k or modalities.KS))
    modalities.run_modalities(o.checkpoint, o.data, o.out, ks, o.train, o.batch)
    return 0


def _embed(o: argparse.Namespace) -> int:
    if o.out.suffix not in (".npz", "") and not o.out.is_dir():
        raise UserError(
            f"--out {o.out}: must end in .npz; the file holds several arrays: features, keys, labels, classes"
        )
    from esvit_scale.evaluate import features

    on_all_ranks(lambda: features.run_embed(o.checkpoint, o.data, o.out, extraction_options(o, None)))
    return 0
