"""`esvit-scale evaluate retrieval`: ranking images by the cosine similarity of frozen features, without training.

Two kinds of data:

- *Labelled set.* The images of a query's class are relevant. Every image queries all others, or the images of another
  set query this one. The figures are R@k (percentage of queries with a relevant image among the k nearest) and mAP
  (mean average precision over the whole ranking).
- *Revisited Oxford or Paris* (revisited.py), if the folder holds their ground truth.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.data import manifest as manifests
from esvit_scale.data.evaluation import items_of
from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.evaluate import revisited
from esvit_scale.evaluate.features import ExtractionOptions, default_device, extract, load_frozen_trunk
from esvit_scale.evaluate.knn import write_result
from esvit_scale.evaluate.labels import LabelledSet, check_finite, require_classes, with_class_names
from esvit_scale.evaluate.neighbours import BANK_ROWS_PER_BLOCK, nearest_neighbours
from esvit_scale.evaluate.ranking import Ranked, mean_with_interval, rank_relevant
from esvit_scale.parallel import collectives

KS: tuple[int, ...] = (1, 2, 4, 8)
RANKED_AT_ONCE = 2**22  # similarities that are sorted at a time, about 200 MB with everything that is made of them
EXAMPLES, EXAMPLE_NEIGHBOURS = 6, 6  # queries that the figure shows, and the nearest images of each

Json = dict[str, Any]


def run_retrieval(
    checkpoint: Path,
    data: Path,
    out: Path,
    options: ExtractionOptions,
    ks: Sequence[int] = KS,
    queries: Path | None = None,
    size: int | None = None,
) -> Json:
    """Run `esvit-scale evaluate retrieval`: write `out`/retrieval.json and return its content.

    Args:
        data: labelled image folder or shard set to search, or a folder of the revisited sets.
        ks: numbers of nearest images for R@k of a labelled set.
        queries: labelled set whose images are the queries; None: every image of `data` queries all others.
        size: largest side in pixels of the images of a revisited set; None takes the size of the run's crops.

    Raises:
        UserError: a set has no labels or only one class, no query has a relevant image, a k is larger than the set to
            search, or the ground truth of a revisited set does not fit its images.
    """
    is_revisited = collectives.run_on_rank0_and_broadcast(lambda: revisited.is_revisited(data))
    if is_revisited and queries is not None:
        raise UserError(f"--queries {queries}: {data} holds the ground truth of its own queries; leave --queries out")
    if not is_revisited:
        if size is not None:
            raise UserError(f"--size {size}: only for the revisited sets; {data} holds no gnd_*.json")
        collectives.run_on_rank0_and_broadcast(lambda: _check(data, queries, ks))
    teacher = load_frozen_trunk(checkpoint)
    row = teacher.origin(checkpoint) | {"data": manifests.address(data)}
    if is_revisited:
        result = row | revisited.evaluate(teacher, data, size or teacher.size, options)
    else:
        sets = [
            with_class_names(extract(teacher.trunk, s, teacher.size, **options._asdict(), pixels=teacher.pixels), s)
            for s in (data, queries)
            if s is not None
        ]
        if queries is not None:
            row["queries"] = manifests.address(queries)
        result = row | evaluate(sets[0], sets[1] if queries is not None else None, ks)
    if collectives.rank() == 0:
        write_result(result, out / "retrieval.json")
        print(table(result))
    return result


def evaluate(bank: LabelledSet, queries: LabelledSet | None = None, ks: Sequence[int] = KS) -> Json:
    """Evaluate retrieval in labelled feature sets: return the fields of retrieval.json that depend on them alone.

    All ranks call it: each ranks its part of the queries.

    Args:
        bank: the set to search.
        queries: None: every image of `bank` queries all others.

    Raises:
        UserError: features are not finite, only one class has images, no query has a relevant image, or a k is larger
            than the number of images that a query searches.
    """
    asked = queries or bank
    check_finite("bank", bank.samples.features)
    check_finite("query", asked.samples.features)
    of_bank, names = bank.samples.labels, bank.classes
    if len(of_bank[of_bank >= 0].unique()) < 2:
        raise UserError("retrieval: all images are of one class, so that every ranking is right; it needs at least two")
    number = {name: i for i, name in enumerate(names)}
    renumbered = torch.tensor([number.get(name, -1) for name in asked.classes] + [-1])
    labels = renumbered[asked.samples.labels]  # int64 [Q], in the numbering of the bank
    searched = len(of_bank) - (queries is None)
    _check_ks(ks, searched)
    ranked = rank_queries(bank.samples.features, of_bank, asked.samples.features, labels, queries is None)
    counted = ~ranked.precision.isnan()
    if not counted.any():
        raise UserError(
            "retrieval: no query has a relevant image"
            + (": every class has only one image" if queries is None else " in the set to search")
        )
    precision, first, own = ranked.precision[counted].numpy(), ranked.first[counted].numpy(), labels[counted].numpy()

    def scored(values: Any) -> Json:
        mean, interval = mean_with_interval(values.astype("float64"))
        return {"value": mean, "interval": interval}

    per_class = [
        {
            "class": names[label],
            "queries": int((own == label).sum()),
            "map": 100 * float(precision[own == label].mean()),
            "recall": {str(k): 100 * float((first[own == label] <= k).mean()) for k in ks},
        }
        for label in sorted(set(own.tolist()))
    ]
    return {
        "kind": "labelled",
        "n_bank": len(of_bank),
        "n_queries": int(counted.sum()),
        "queries_left_out": int((~counted).sum()),
        "feature_dim": bank.samples.features.shape[1],
        "results": {"recall": {str(k): scored(first <= k) for k in ks}, "map": scored(precision)},
        "mean_per_class": {
            "recall": {str(k): sum(c["recall"][str(k)] for c in per_class) / len(per_class) for k in ks},
            "map": sum(c["map"] for c in per_class) / len(per_class),
        },
        "per_class": per_class,
        "examples": _examples(bank, asked, queries is None),
    }


def rank_queries(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, same: bool, device: torch.device | None = None
) -> Ranked:
    """Rank the bank for every query by cosine similarity; images of the query's class are relevant.

    All ranks call it: each ranks its part of the queries, and all get the whole result. A block of at most
    RANKED_AT_ONCE similarities (at least one query's) is in memory at a time, besides one number for each query.

    Args:
        bank: features [N, C] of any floating-point type, possibly memory-mapped.
        bank_labels: int64 [N].
        queries: features [Q, C].
        labels: int64 [Q]; −1 for a query without relevant images.
        same: whether the queries are the bank, so that query i must not find image i.
    """
    device, n = device or default_device(), len(bank)
    precision = torch.zeros(len(queries), dtype=torch.float64)
    first = torch.zeros(len(queries), dtype=torch.int64)
    mine = share(len(queries), collectives.rank(), collectives.world_size())
    step = max(1, RANKED_AT_ONCE // n)
    for start in range(mine.start, mine.stop, step):
        rows = slice(start, min(start + step, mine.stop))
        q = F.normalize(queries[rows].float(), dim=1).to(device)
        blocks = (bank[i : i + BANK_ROWS_PER_BLOCK] for i in range(0, n, BANK_ROWS_PER_BLOCK))
        similarity = torch.cat([q @ F.normalize(b.to(device).float(), dim=1).T for b in blocks], 1)  # [q, N]
        relevant = (labels[rows, None] == bank_labels) & (labels[rows, None] >= 0)
        if same:
            own = torch.arange(len(q)), torch.arange(rows.start, rows.stop)
            similarity[own], relevant[own] = -torch.inf, False
        found = rank_relevant(similarity, relevant.to(device))
        precision[rows], first[rows] = found
    parts = [collectives.all_reduce_sum_(x.to(device)).cpu() for x in (precision, first)]
    return Ranked(parts[0], parts[1])


def table(result: Json) -> str:
    """Format the content of retrieval.json as a text table."""
    if result["kind"] == "revisited":
        return revisited.table(result)
    columns = [(f"R@{k}", row) for k, row in result["results"]["recall"].items()] + [("mAP", result["results"]["map"])]
    per_class = [*result["mean_per_class"]["recall"].values(), result["mean_per_class"]["map"]]
    lines = [
        f"{'retrieval, %':<24}" + "".join(f"{name:>14}" for name, _ in columns),
        f"{'mean over queries':<24}" + "".join(f"{row['value']:14.1f}" for _, row in columns),
        f"{'95 % interval':<24}" + "".join("{:>14}".format("{:.1f}–{:.1f}".format(*r["interval"])) for _, r in columns),
        f"{'mean over classes':<24}" + "".join(f"{value:14.1f}" for value in per_class),
        f"{result['n_queries']} queries in {result['n_bank']} images of {len(result['per_class'])} classes",
    ]
    if result["queries_left_out"]:
        lines.append(f"{result['queries_left_out']} queries have no relevant image and do not count")
    return "\n".join(lines)


def _check(data: Path, queries: Path | None, ks: Sequence[int]) -> None:
    """Check labels and sizes before features are computed."""
    sources = [data, *([queries] if queries is not None else [])]
    require_classes(sources, "retrieval")
    for source in sources:
        items = items_of(source, notes=False)
        if (loose := items.labels().get(-1)) is not None:
            raise UserError(
                f"{source}/{items.name(loose)}: has no label, and retrieval needs one for every image; move it to the "
                "folder of its class, or out of the set"
            )
        if source is data:
            if len(items.labels()) < 2:
                raise UserError(f"{data}: all images are of one class; retrieval needs at least two")
            _check_ks(ks, len(items) - (queries is None))


def _check_ks(ks: Sequence[int], searched: int) -> None:
    if max(ks) > searched:
        raise UserError(f"--k {max(ks)}: larger than the {searched} images that a query searches")


def _examples(bank: LabelledSet, queries: LabelledSet, same: bool) -> list[Json]:
    """Return up to EXAMPLES evenly spaced queries with their nearest images, to draw."""
    n = len(queries.samples.keys)
    picked = torch.linspace(0, n - 1, min(EXAMPLES, n)).round().long()
    k = min(EXAMPLE_NEIGHBOURS + same, len(bank.samples.keys))
    similarity, index = nearest_neighbours(bank.samples.features, queries.samples.features[picked], k)
    rows = []
    for i, values, found in zip(picked.tolist(), similarity.tolist(), index.tolist(), strict=True):
        label = queries.classes[int(queries.samples.labels[i])]
        near = [(j, s) for j, s in zip(found, values, strict=True) if not (same and j == i)][:EXAMPLE_NEIGHBOURS]
        names = [bank.classes[int(bank.samples.labels[j])] for j, _ in near]
        neighbours = [
            {"key": bank.samples.keys[j], "class": name, "right": name == label, "similarity": s}
            for (j, s), name in zip(near, names, strict=True)
        ]
        rows.append({"key": queries.samples.keys[i], "class": label, "neighbours": neighbours})
    return rows
