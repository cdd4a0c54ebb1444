"""`esvit-scale evaluate copies`: finding the originals of distorted images by frozen features, without training.

The images to search are those of a set and of an optional set of distractors; the queries are distorted copies of some
of the set's images (data/copies.py), or the copies of a Copydays folder. Images are resized as a whole to a square, and
view features are compared by their cosine. Measures are those of micro_precision.py, for every attack by itself.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from esvit_scale.data import copies, photometric
from esvit_scale.data import manifest as manifests
from esvit_scale.data.copies import Attack
from esvit_scale.data.evaluation import items_of
from esvit_scale.data.pixel_format import RGB8
from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.evaluate import feature_cache
from esvit_scale.evaluate.attention import require_pictures
from esvit_scale.evaluate.feature_cache import FeatureBatch, FeatureSet
from esvit_scale.evaluate.features import (
    ExtractionOptions,
    FrozenTrunk,
    cached_or_temporary,
    default_device,
    encode_batch,
    load_frozen_trunk,
)
from esvit_scale.evaluate.knn import write_result
from esvit_scale.evaluate.labels import check_finite
from esvit_scale.evaluate.micro_precision import copy_measures
from esvit_scale.evaluate.neighbours import nearest_neighbours
from esvit_scale.evaluate.progress import progress
from esvit_scale.parallel import collectives

ATTACKS = tuple(copies.DISTORTIONS)
QUERIES = 1000  # most images of a set that are copied
EXAMPLES, EXAMPLE_NEIGHBOURS = 6, 5  # copies that the figure shows, and the nearest images of each

Json = dict[str, Any]


class CopySettings(NamedTuple):
    """The options of `esvit-scale evaluate copies` that make its protocol."""

    attacks: Sequence[str] | None = None  # of copies.DISTORTIONS; None: all, or those that a Copydays folder has
    queries: int = QUERIES
    size: int | None = None  # side in pixels of the square that the trunk sees; None: that of the run's crops
    seed: int = 0


class Example(NamedTuple):
    """A copy and the images that are nearest to it, as the trunk sees them."""

    key: str
    picture: Image.Image
    nearest: list[tuple[str, Image.Image, bool]]  # key, picture, and whether it is the original


class CopyResult(NamedTuple):
    """The content of copies.json, and examples to draw (on rank 0; none on other ranks)."""

    summary: Json
    examples: list[Example]


def run_copies(
    checkpoint: Path,
    data: Path,
    out: Path,
    settings: CopySettings,
    options: ExtractionOptions,
    distractors: Path | None = None,
) -> CopyResult:
    """Run `esvit-scale evaluate copies`: write `out`/copies.json and return the result.

    All ranks call it.

    Args:
        data: a set whose images are copied and searched, labels or not, or a Copydays folder.
        distractors: a set of further images to search.

    Raises:
        UserError: a set is missing or empty, a Copydays folder lacks an original or the attacks that were asked for, an
            original cannot be read, or features are not finite.
    """
    attacks, originals = collectives.run_on_rank0_and_broadcast(lambda: _open(data, settings))
    teacher = load_frozen_trunk(checkpoint)
    require_pictures(teacher)
    settings = settings._replace(size=settings.size or teacher.size)
    sources = [originals, *([distractors] if distractors is not None else [])]
    banks = [_features(teacher, source, range(_count(source)), None, settings, options) for source in sources]
    for bank in banks:
        check_finite("searched", bank.features)
    device = torch.device(options.device) if options.device else default_device()
    results, examples = {}, []
    for attack in attacks:
        found = _features(teacher, attack.source, attack.numbers, attack.distort, settings, options)
        check_finite("copied", found.features)
        rows = _rows_of_originals(attack, found, banks[0])
        results[attack.name] = copy_measures([b.features for b in banks], found.features, rows, device, settings.seed)
        if attack is _shown(attacks) and collectives.rank() == 0:
            examples = _examples(attack, found, banks, sources, rows, settings)
        collectives.barrier()
    row = teacher.origin(checkpoint) | {"data": manifests.address(data)}
    if distractors is not None:
        row["distractors"] = manifests.address(distractors)
    summary = row | {
        "n_bank": sum(len(bank.keys) for bank in banks),
        "n_distractors": len(banks[1].keys) if distractors is not None else 0,
        "feature_dim": banks[0].features.shape[1],
        "protocol": {
            "layout": "Copydays" if attacks[0].distort is None else "generated",
            "size": settings.size,
            "resize": "whole image to a square, bicubic",
            "feature": "view feature, cosine similarity, no whitening and no normalisation of scores",
            "precision": options.precision,
            "seed": settings.seed,
        },
        "results": results,
    }
    if collectives.rank() == 0:
        write_result(summary, out / "copies.json")
        print(table(summary))
    return CopyResult(summary, examples)


def table(summary: Json) -> str:
    """Format the content of copies.json as a text table, with a line for each attack."""
    head = f"{'µAP':>8}{'95 %':>14}{'R@P90':>8}{'mAP':>8}{'95 %':>14}{'first':>8}{'copies':>8}"
    lines = [f"{'copy detection, %':<20}{head}"]
    for name, r in summary["results"].items():
        spans = ["{:.1f}–{:.1f}".format(*r[key]) for key in ("interval", "map_interval")]
        cells = f"{r['uap']:8.1f}{spans[0]:>14}{r['recall_at_p90']:8.1f}{r['map']:8.1f}{spans[1]:>14}{r['first']:8.1f}"
        lines.append(f"{name:<20}{cells}{r['queries']:8,d}")
    return "\n".join([*lines, protocol_in_words(summary)])


def protocol_in_words(summary: Json) -> str:
    """Return the protocol of a copies.json as a sentence, without which its figures cannot be compared."""
    p, n = summary["protocol"], summary["n_distractors"]
    more = f", of which {n:,} are distractors" if n else ""
    made = "copies of Copydays" if p["layout"] == "Copydays" else f"generated copies (seed {p['seed']})"
    return (
        f"{made}, searched in {summary['n_bank']:,} images{more}; whole images at {p['size']}×{p['size']} pixels, cosine "
        "similarity of view features, no whitening."
    )


def _open(data: Path, settings: CopySettings) -> tuple[list[Attack], Path]:
    """Return the attacks, and the set that holds the originals."""
    if not copies.is_copydays(data):
        return copies.generated_attacks(data, settings.attacks or ATTACKS, settings.queries), data
    attacks = copies.copydays_attacks(data)
    if settings.attacks is not None:
        raise UserError(
            f"--attack {' '.join(settings.attacks)}: {data} holds copies of its own ({attacks[0].name}, …); leave it out"
        )
    return attacks, data / "original"


def _count(source: Path) -> int:
    return len(items_of(source, notes=False))


def _rows_of_originals(attack: Attack, found: FeatureSet, bank: FeatureSet) -> Tensor:
    """Return the row of each copy's original in the bank, int64 [Q]: images that cannot be read have no row."""
    assert found.numbers is not None
    assert bank.numbers is not None
    original = dict(zip(attack.numbers, attack.originals, strict=True))
    needed = set(attack.originals)
    row = {number: i for i, number in enumerate(bank.numbers.tolist()) if number in needed}
    lost = [key for key, n in zip(found.keys, found.numbers.tolist(), strict=True) if original[n] not in row]
    if lost:
        raise UserError(f"{attack.source}: the original of {lost[0]} cannot be read (see the warnings above)")
    return torch.tensor([row[original[n]] for n in found.numbers.tolist()])


def _features(
    teacher: FrozenTrunk,
    source: Path,
    numbers: Sequence[int],
    distort: str | None,
    settings: CopySettings,
    options: ExtractionOptions,
) -> FeatureSet:
    """Return the view features of some images of a set, distorted if asked for."""
    device = torch.device(options.device) if options.device else default_device()
    size = settings.size or teacher.size

    def compute() -> Iterator[FeatureBatch]:
        trunk = teacher.trunk.to(device).eval()
        part = numbers[share(len(numbers), collectives.rank(), collectives.world_size())]
        images = copies.square_images(source, part, distort, size, settings.seed, options.workers)
        some = []
        for image in progress(images, distort or f"features of {source.name}", len(part), "images"):
            some.append(image)
            if len(some) == options.batch:
                yield _encoded(trunk, some, device, options)
                some = []
        if some:
            yield _encoded(trunk, some, device, options)

    key: Json = {"kind": "copies", "trunk": feature_cache.trunk_digest(teacher.trunk), "size": size}
    key |= {"data": feature_cache.source_digest(source), "precision": options.precision, "stored": options.stored}
    if distort is not None:
        key |= {"distort": distort, "seed": settings.seed, "queries": len(numbers)}
    return cached_or_temporary(options.cache, key, source, len(numbers), compute)


def _encoded(
    trunk: torch.nn.Module, some: list[copies.SquareImage], device: torch.device, options: ExtractionOptions
) -> FeatureBatch:
    pixels = torch.from_numpy(np.stack([image.pixels for image in some])).permute(0, 3, 1, 2).float() / 255
    images = photometric.normalize_(pixels.contiguous(), RGB8)
    with torch.no_grad():
        view = encode_batch(lambda x: trunk([x]).view, images, device, options.precision).cpu()
    stored = view.half() if options.stored == "fp16" else view
    numbers = torch.tensor([image.number for image in some])
    return FeatureBatch(stored, [image.key for image in some], torch.full_like(numbers, -1), numbers)


def _shown(attacks: Sequence[Attack]) -> Attack:
    return next((attack for attack in attacks if attack.name == "strong"), attacks[0])


def _examples(
    attack: Attack,
    found: FeatureSet,
    banks: Sequence[FeatureSet],
    sources: Sequence[Path],
    originals: Tensor,
    settings: CopySettings,
) -> list[Example]:
    """Return evenly spaced copies of an attack with the images that are nearest to them."""
    size, n = settings.size or 0, len(found.keys)
    picked = torch.linspace(0, n - 1, min(EXAMPLES, n)).round().long().unique()
    near: list[list[tuple[float, int, int]]] = [[] for _ in picked]  # of each: (−similarity, bank, row)
    for b, bank in enumerate(banks):
        k = min(EXAMPLE_NEIGHBOURS, len(bank.keys))
        similarity, rows = nearest_neighbours(bank.features, found.features[picked], k)
        for of_query, values, index in zip(near, similarity.tolist(), rows.tolist(), strict=True):
            of_query += [(-value, b, row) for value, row in zip(values, index, strict=True)]
    assert found.numbers is not None
    pictures = _pictures(attack.source, found.numbers[picked].tolist(), attack.distort, settings, size)
    shown = []
    for i, q in enumerate(picked.tolist()):
        neighbours = []
        for _, b, row in sorted(near[i])[:EXAMPLE_NEIGHBOURS]:
            numbers = banks[b].numbers
            assert numbers is not None
            (picture,) = _pictures(sources[b], [int(numbers[row])], None, settings, size)
            neighbours.append((banks[b].keys[row], picture, b == 0 and row == int(originals[q])))
        shown.append(Example(found.keys[q], pictures[i], neighbours))
    return shown


def _pictures(
    source: Path, numbers: Sequence[int], distort: str | None, settings: CopySettings, size: int
) -> list[Image.Image]:
    images = copies.square_images(source, numbers, distort, size, settings.seed, 0)
    return [Image.fromarray(image.pixels) for image in images]
