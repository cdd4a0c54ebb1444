"""Landmark retrieval on the revisited Oxford and Paris sets (Radenović et al., CVPR 2018): mAP easy, medium, hard.

Layout of the folder: `jpg/NAME.jpg` for every image, and the ground truth `gnd_roxford5k.json` or `gnd_rparis6k.json`
with the fields of the published pickle: `imlist` and `qimlist` (names of the images to search and of the queries) and
`gnd`, a list with `bbx` (x0, y0, x1, y1 in pixels) and `easy`, `hard`, `junk` (indices into imlist) for each query.

Queries are cropped to their box. Images whose longer side is above a given size are reduced to it. A setting says which
images are relevant and which are taken out of the ranking; queries without relevant images do not count:

    easy     relevant: easy          ignored: hard, junk
    medium   relevant: easy, hard    ignored: junk
    hard     relevant: hard          ignored: easy, junk
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import files
from esvit_scale.data import image_folder, photometric
from esvit_scale.data.decode import BadImage, decode
from esvit_scale.data.pixel_format import RGB8
from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.evaluate import feature_cache
from esvit_scale.evaluate.attention import require_pictures
from esvit_scale.evaluate.feature_cache import FeatureBatch, FeatureSet
from esvit_scale.evaluate.features import ExtractionOptions, FrozenTrunk, cached_or_temporary, default_device
from esvit_scale.evaluate.labels import check_finite
from esvit_scale.evaluate.progress import progress
from esvit_scale.evaluate.ranking import mean_with_interval, trapezoid_average_precision
from esvit_scale.parallel import collectives

SETTINGS = {  # name → fields of the ground truth that are relevant, and those that are ignored
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
KAPPAS = (1, 5, 10)  # mP@κ, the precision among the first κ images
EXAMPLES, EXAMPLE_NEIGHBOURS = 6, 6

Json = dict[str, Any]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class GroundTruth(NamedTuple):
    """The ground truth of a revisited set."""

    path: Path  # the JSON file
    images: list[str]
    queries: list[str]
    boxes: list[Box]  # of every query
    judged: list[dict[str, list[int]]]  # of every query: indices of the images that are "easy", "hard" and "junk"


def is_revisited(folder: Path) -> bool:
    """Return whether a folder holds the ground truth of a revisited set.

    Raises:
        UserError: it holds only the published pickle, which is not read.
    """
    if not folder.is_dir():
        return False
    if any(folder.glob("gnd_*.json")):
        return True
    if found := sorted(folder.glob("gnd_*.pkl")):
        raise UserError(
            f"{found[0]}: pickles are not read, as they can run any code; docs/evaluation.md has the line that "
            f"writes it as {found[0].with_suffix('.json').name}"
        )
    return False


def read_ground_truth(folder: Path) -> GroundTruth:
    """Read the ground truth in a folder.

    Raises:
        UserError: there are several, it is damaged, an index or box is out of range, or an image file is missing.
    """
    paths = sorted(folder.glob("gnd_*.json"))
    if len(paths) > 1:
        raise UserError(f"{folder}: holds {len(paths)} ground truths ({paths[0].name}, {paths[1].name}); keep one")
    try:
        held = json.loads(paths[0].read_text())
        images, queries = ([str(name) for name in held[field]] for field in ("imlist", "qimlist"))
        boxes = [tuple(float(x) for x in row["bbx"]) for row in held["gnd"]]
        judged = [{field: [int(i) for i in row[field]] for field in ("easy", "hard", "junk")} for row in held["gnd"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths[0]}: not the ground truth of a revisited set: {error!r}") from None
    if len(judged) != len(queries):
        raise UserError(f"{paths[0]}: {len(queries)} queries in qimlist, but {len(judged)} entries in gnd")
    for name, box, row in zip(queries, boxes, judged, strict=True):
        if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"{paths[0]}: query {name}: bbx must be x0, y0, x1, y1 with x0 < x1 and y0 < y1")
        wrong = [i for indices in row.values() for i in indices if not 0 <= i < len(images)]
        if wrong:
            raise UserError(f"{paths[0]}: query {name}: index {wrong[0]} is not of one of the {len(images)} images")
    missing = [name for name in [*images, *queries] if not (folder / file_of(name)).is_file()]
    if missing:
        raise UserError(
            f"{folder / file_of(missing[0])}: no such image ({len(missing)} of {paths[0].name} are missing)"
        )
    return GroundTruth(paths[0], images, queries, boxes, judged)  # type: ignore[arg-type]


def file_of(name: str) -> str:
    """Return the path of an image below the set's folder."""
    return f"jpg/{name}.jpg"


def evaluate(teacher: FrozenTrunk, folder: Path, size: int, options: ExtractionOptions) -> Json:
    """Evaluate a trunk on a revisited set and return the fields of retrieval.json that depend on the set.

    All ranks call it.

    Args:
        size: longer side in pixels to which larger images are reduced.

    Raises:
        UserError: as `read_ground_truth`; an image cannot be read; features are not finite; or no query has a relevant
            image.
    """
    require_pictures(teacher)
    truth = collectives.run_on_rank0_and_broadcast(lambda: read_ground_truth(folder))
    bank = _features(teacher, truth, folder, False, size, options)
    queries = _features(teacher, truth, folder, True, size, options)
    check_finite("image", bank.features)
    check_finite("query", queries.features)
    ranks = _rankings(bank.features, queries.features)
    results = {name: score(ranks, truth.judged, name) for name in SETTINGS}
    if not any(row["queries"] for row in results.values()):
        raise UserError(f"{truth.path}: no query has a relevant image")
    protocol = {
        "largest_side": size,
        "scales": [1],
        "queries": "cropped to their boxes",
        "feature": "view feature, cosine similarity",
    }
    return {
        "kind": "revisited",
        "ground_truth": truth.path.name,
        "n_bank": len(truth.images),
        "n_queries": len(truth.queries),
        "feature_dim": bank.features.shape[1],
        "protocol": protocol,
        "results": results,
        "examples": _examples(truth, ranks),
    }


def score(ranks: np.ndarray, judged: Sequence[dict[str, list[int]]], setting: str) -> Json:
    """Return mAP with its interval and mP@κ, in percent, of all queries in one setting; None where no query counts.

    Args:
        ranks: int64 [Q, N], the images in order of similarity, the most similar first.
    """
    relevant, ignored = SETTINGS[setting]
    precisions, at_kappa = [], []
    for order, row in zip(ranks, judged, strict=True):
        wanted = [i for field in relevant for i in row[field]]
        if not wanted:
            continue
        kept = order[~np.isin(order, [i for field in ignored for i in row[field]])]
        places = np.flatnonzero(np.isin(kept, wanted))
        precisions.append(trapezoid_average_precision(places.tolist(), len(wanted)))
        # as published: not more than the rank of the last relevant image
        within = [min(int(places[-1]) + 1, kappa) for kappa in KAPPAS]
        at_kappa.append([(places < k).sum() / k for k in within])
    if not precisions:
        return {"map": None, "interval": None, "precision": None, "queries": 0}
    mean, interval = mean_with_interval(np.array(precisions))
    precision = {str(k): 100 * float(v) for k, v in zip(KAPPAS, np.mean(at_kappa, 0), strict=True)}
    return {"map": mean, "interval": interval, "precision": precision, "queries": len(precisions)}


def table(result: Json) -> str:
    """Format the content of retrieval.json as a text table, with a line for each setting."""
    head = "".join(f"{f'mP@{k}':>9}" for k in KAPPAS)
    lines = [f"{'revisited retrieval, %':<24}{'mAP':>8}{'95 %':>16}{head}{'queries':>9}"]
    for name, row in result["results"].items():
        if row["map"] is None:
            lines.append(f"{name:<24}{'–':>8}{'–':>16}{'–':>9}{'–':>9}{'–':>9}{0:9d}")
            continue
        low, high = row["interval"]
        cells = "".join(f"{value:9.1f}" for value in row["precision"].values())
        lines.append(f"{name:<24}{row['map']:8.1f}{f'{low:.1f}–{high:.1f}':>16}{cells}{row['queries']:9d}")
    side = result["protocol"]["largest_side"]
    return "\n".join([*lines, f"{result['n_bank']} images at most {side} pixels long, one scale, queries cropped"])


def _rankings(bank: Tensor, queries: Tensor) -> np.ndarray:
    """Return the images in order of similarity for each query: int64 [Q, N]."""
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T
    return similarity.argsort(dim=1, descending=True, stable=True).numpy()


def _features(
    teacher: FrozenTrunk, truth: GroundTruth, folder: Path, of_queries: bool, size: int, options: ExtractionOptions
) -> FeatureSet:
    """Return the view features of the queries, or of the images to search, in the order of the ground truth."""
    names = truth.queries if of_queries else truth.images
    device = torch.device(options.device) if options.device else default_device()

    def compute() -> Iterator[FeatureBatch]:
        trunk = teacher.trunk.to(device).eval()
        part = range(len(names))[share(len(names), collectives.rank(), collectives.world_size())]
        for i in progress(part, "queries" if of_queries else "images", len(part), "images"):
            pixels = _read(folder / file_of(names[i]), truth.boxes[i] if of_queries else None, size)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                view = trunk([pixels[None].to(device)]).view.float().cpu()
            stored = view.half() if options.stored == "fp16" else view
            yield FeatureBatch(stored, [file_of(names[i])], torch.tensor([-1]), torch.tensor([i]))

    key: Json = {"trunk": feature_cache.trunk_digest(teacher.trunk), "data": feature_cache.source_digest(folder)}
    key |= {"ground_truth": files.sha256(truth.path), "queries": of_queries, "size": size, "kind": "revisited"}
    key |= {"precision": options.precision, "stored": options.stored}
    return cached_or_temporary(options.cache, key, folder, len(names), compute)


def _read(path: Path, box: Box | None, size: int) -> Tensor:
    """Return an image, cropped to the box and reduced to `size` pixels, as the trunk's input: float32 [3, H, W].

    Raises:
        UserError: it cannot be read.
    """
    try:
        image = decode(image_folder.read_file(path))
    except (BadImage, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    if box is not None:
        image = image.crop(box)  # type: ignore[arg-type]  # the published boxes have fractions, which Pillow rounds
    image.thumbnail((size, size), Image.Resampling.LANCZOS)  # never enlarges
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    return photometric.normalize_(pixels, RGB8)[0]


def _examples(truth: GroundTruth, ranks: np.ndarray) -> list[Json]:
    """Return some queries with their nearest images, to draw: right are the relevant ones of the medium setting."""
    picked = np.unique(np.linspace(0, len(ranks) - 1, min(EXAMPLES, len(ranks))).round().astype(int)).tolist()
    rows = []
    for q in picked:
        kinds = {i: kind for kind, indices in truth.judged[q].items() for i in indices}
        nearest = [i for i in ranks[q].tolist() if kinds.get(i) != "junk"][:EXAMPLE_NEIGHBOURS]
        neighbours = [
            {"key": file_of(truth.images[i]), "class": kinds.get(i, "other"), "right": i in kinds} for i in nearest
        ]
        rows.append({"key": file_of(truth.queries[q]), "class": truth.queries[q], "neighbours": neighbours})
    return rows
