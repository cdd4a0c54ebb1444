"""`esvit-scale evaluate video`: following objects through videos by frozen features, without training.

The mask of a video's first frame is given; labels are propagated from frame to frame (propagation.py) by the map of one
of the trunk's stages. Measures are J and F (object_measures.py) of every object at its mask's own resolution, averaged
over the frames between the first and the last one, then over all objects of all videos, as for DAVIS 2017.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.data import photometric, videos
from esvit_scale.data.pixel_format import RGB8
from esvit_scale.data.videos import VOID, Frame, Mask, Video
from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.evaluate import feature_cache
from esvit_scale.evaluate.attention import require_pictures
from esvit_scale.evaluate.features import ExtractionOptions, default_device, load_frozen_trunk
from esvit_scale.evaluate.knn import write_result
from esvit_scale.evaluate.metrics import RESAMPLES, Interval
from esvit_scale.evaluate.object_measures import boundary_accuracy, region_similarity
from esvit_scale.evaluate.progress import progress
from esvit_scale.evaluate.propagation import TEMPERATURE, Propagator, objects_of
from esvit_scale.evaluate.stage_features import require_grid, stage_maps
from esvit_scale.models.trunk import Trunk
from esvit_scale.parallel import collectives

METHODS = ("propagated", "static")  # static: the first frame's mask for all frames
CELL = 16  # pixels: the default stage is the last one whose cells are not larger
EXAMPLES, EXAMPLE_SIDE = 4, 240  # videos of the figure, and pixels of a frame's longer side

Json = dict[str, Any]


class VideoSettings(NamedTuple):
    """The options of `esvit-scale evaluate video` that make its protocol."""

    size: int = 480  # pixels of the short side
    stage: int | None = None  # from 1; None: the last one with cells of at most CELL pixels
    last: int = 7  # frames before the current one that labels are taken from, besides the first
    k: int = 5  # most similar cells that count
    radius: int = 12  # cells along each axis within which they are searched
    seed: int = 0  # of the bootstrap


class Example(NamedTuple):
    """A video with its masks and predictions, reduced for a figure: its first, middle and last counted frame."""

    name: str
    pictures: list[NDArray[np.uint8]]  # [h, w, 3]
    truths: list[Mask]  # [h, w]
    predictions: list[Mask]


class VideoResult(NamedTuple):
    """The content of video.json, and examples to draw."""

    summary: Json
    examples: list[Example]


class Scores:
    """Sums of J and F of every object of one video, over the frames that count."""

    def __init__(self, objects: Sequence[int]) -> None:
        self.objects, self.frames = objects, 0
        self.sums = {name: np.zeros((len(objects), 2)) for name in METHODS}

    def add(self, truth: Mask, predictions: dict[str, Mask]) -> None:
        """Count one frame; void pixels belong to no object in either mask."""
        counts = truth != VOID
        self.frames += 1
        for name, predicted in predictions.items():
            for i, number in enumerate(self.objects):
                pair = (truth == number) & counts, (predicted == number) & counts
                self.sums[name][i] += region_similarity(*pair), boundary_accuracy(*pair)

    def means(self) -> dict[str, list[list[float]]]:
        """Return J and F of every object, as fractions."""
        return {name: (sums / self.frames).tolist() for name, sums in self.sums.items()}


def run_video(
    checkpoint: Path, data: Path, out: Path, settings: VideoSettings, options: ExtractionOptions
) -> VideoResult:
    """Run `esvit-scale evaluate video`: write `out`/video.json and return the result.

    All ranks call it: each takes its part of the videos. The features of `settings.last` + 1 frames and the frames that
    the loaders prepare are in memory, whatever the length of the videos.

    Args:
        data: a set in a layout of data/videos.py.

    Raises:
        UserError: the set is in no known layout, frames or masks are missing or do not fit, a first frame has no object,
            k is larger than the cells that a corner sees, or the trunk gives no tokens on a grid.
    """
    teacher = load_frozen_trunk(checkpoint)
    require_pictures(teacher)
    trunk = require_grid(teacher.trunk)
    sequences = collectives.run_on_rank0_and_broadcast(lambda: videos.open_set(data))
    stage = _stage(trunk, settings.stage)
    device = torch.device(options.device) if options.device else default_device()
    found: dict[int, tuple[list[int], dict[str, list[list[float]]]]] = {}
    examples: list[Example] = []
    feature_cache.run_on_all_ranks(
        lambda: _follow_all(trunk, sequences, stage, settings, options, device, found, examples), str(data)
    )
    parts = collectives.gather_objects((found, examples))
    merged = {number: row for part, _ in parts for number, row in part.items()}
    examples = sorted((e for _, some in parts for e in some), key=lambda e: e.name)
    rows = [
        {
            "video": sequences[number].name,
            "frames": len(sequences[number].frames),
            "objects": [
                {"object": label, **{name: dict(zip("jf", means[name][i], strict=True)) for name in METHODS}}
                for i, label in enumerate(objects)
            ],
        }
        for number, (objects, means) in sorted(merged.items())
    ]
    scores = [{name: np.array(means[name]) for name in METHODS} for _, (_, means) in sorted(merged.items())]
    summary = teacher.origin(checkpoint) | {
        "data": str(data),
        "n_videos": len(rows),
        "n_objects": sum(len(row["objects"]) for row in rows),
        "protocol": {
            "size": settings.size,
            "stage": stage + 1,
            "cell": _cell(trunk, stage),
            "last_frames": settings.last,
            "k": settings.k,
            "radius": settings.radius,
            "temperature": TEMPERATURE,
            "mask_resolution": "original",
            "counted": "frames between the first and the last",
            "precision": options.precision,
        },
        "results": {name: _summarised([s[name] for s in scores], settings.seed) for name in METHODS},
        "per_video": rows,
    }
    if collectives.rank() == 0:
        write_result(summary, out / "video.json")
        print(table(summary))
    return VideoResult(summary, examples)


def table(summary: Json) -> str:
    """Format the content of video.json as text."""
    lines = [f"{'label propagation, %':<24}{'J&F':>8}{'95 %':>14}{'J':>8}{'F':>8}"]
    titles = {"propagated": "propagated", "static": "first mask kept"}
    for name, row in summary["results"].items():
        span = "{:.1f}–{:.1f}".format(*row["interval"]) if row["interval"] else "–"
        lines.append(f"{titles[name]:<24}{row['jf']:8.1f}{span:>14}{row['j']:8.1f}{row['f']:8.1f}")
    return "\n".join([*lines, "", protocol_in_words(summary)])


def protocol_in_words(summary: Json) -> str:
    """Return the protocol of a video.json as a sentence, without which its figures cannot be compared."""
    p = summary["protocol"]
    return (
        f"{summary['n_objects']:,} objects of {summary['n_videos']:,} videos, short side {p['size']} pixels, stage "
        f"{p['stage']} (cells of {p['cell']:g} pixels), labels of the {p['k']} most similar cells within {p['radius']} cells "
        f"in the first frame and the last {p['last_frames']}, masks at their own resolution."
    )


def _summarised(scores: Sequence[NDArray[np.float64]], seed: int) -> Json:
    """Return the means over all objects in percent, and J&F's interval over resamples of the videos, None for one video.

    Args:
        scores: J and F of the objects of every video, [objects, 2].
    """
    j, f = (100 * float(x) for x in np.concatenate(scores).mean(0))
    interval: Interval | None = None
    if len(scores) > 1:
        totals = np.array([[s.mean(1).sum(), len(s)] for s in scores])
        drawn = np.random.default_rng(seed).integers(len(scores), size=(RESAMPLES, len(scores)))
        sums = totals[drawn].sum(1)
        low, high = np.percentile(100 * sums[:, 0] / sums[:, 1], [2.5, 97.5])
        interval = [float(low), float(high)]
    return {"jf": (j + f) / 2, "interval": interval, "j": j, "f": f}


def _follow_all(
    trunk: Trunk,
    sequences: Sequence[Video],
    stage: int,
    settings: VideoSettings,
    options: ExtractionOptions,
    device: torch.device,
    found: dict[int, tuple[list[int], dict[str, list[list[float]]]]],
    examples: list[Example],
) -> None:
    """Follow the objects of this rank's videos; put the scores of every video into `found`, and examples to draw."""
    trunk = trunk.to(device).eval()
    numbers = range(len(sequences))[share(len(sequences), collectives.rank(), collectives.world_size())]
    shown = set(np.linspace(0, len(sequences) - 1, min(EXAMPLES, len(sequences))).round().astype(int).tolist())
    unit = int(trunk.reductions[-1]) if trunk.reductions else CELL
    frames = videos.frames_of(sequences, numbers, settings.size, unit, options.workers)
    total = sum(len(sequences[number].frames) for number in numbers)
    follower: Follower | None = None
    for frame in progress(frames, "label propagation", total, "frames"):
        features = _features(trunk, frame.pixels, stage, device, options.precision == "bf16")
        if follower is None:
            follower = Follower(sequences[frame.sequence], frame, features, settings)
        else:
            follower.step(frame, features)
        if frame.number == len(sequences[frame.sequence].frames) - 1:
            found[frame.sequence] = (list(follower.scores.objects), follower.scores.means())
            if frame.sequence in shown:
                examples.append(follower.example)
            follower = None


class Follower:
    """The objects of one video, followed from frame to frame.

    Args:
        frame, features: the first frame, whose mask is given, and its map [h, w, C].

    Raises:
        UserError: the first frame has no object, or k is larger than the cells that a corner of it sees.
    """

    def __init__(self, video: Video, frame: Frame, features: Tensor, settings: VideoSettings) -> None:
        self.video, self.first = video, frame.mask
        objects = _objects(video, frame.mask)
        _check_k(settings, features)
        labels = _reduced_labels(frame.mask, objects, (features.shape[0], features.shape[1])).to(features.device)
        self.propagator = Propagator(features, labels, settings.last, settings.k, settings.radius)
        self.scores = Scores(objects)
        self.example = Example(video.name, [], [], [])
        _show(self.example, frame, frame.mask)

    def step(self, frame: Frame, features: Tensor) -> None:
        """Propagate the labels to the next frame, and compare them with its mask; the last frame does not count.

        Raises:
            UserError: the mask has an object that the first frame lacks.
        """
        _check_objects(self.video, frame, self.scores.objects)
        numbers = np.array([0, *self.scores.objects], np.uint8)
        shape = (frame.mask.shape[0], frame.mask.shape[1])
        predicted = numbers[objects_of(self.propagator.step(features), shape).cpu().numpy()]
        last = len(self.video.frames) - 1
        if frame.number < last:
            self.scores.add(frame.mask, {"propagated": predicted, "static": self.first})
        if frame.number in (last // 2, last - 1):
            _show(self.example, frame, predicted)


@torch.no_grad()
def _features(trunk: nn.Module, pixels: NDArray[np.uint8], stage: int, device: torch.device, bf16: bool) -> Tensor:
    """Return the map of a stage of one frame: float32 [h, w, C]."""
    image = photometric.normalize_(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, RGB8)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        (maps,) = stage_maps(trunk, image.to(device))
    return maps[stage].values


def _stage(trunk: Trunk, asked: int | None) -> int:
    """Return the number, from 0, of the stage whose map is used."""
    cells = trunk.reductions or (CELL,)
    if asked is None:
        return max([s for s, cell in enumerate(cells) if cell <= CELL], default=0)
    if asked > len(cells):
        raise UserError(f"--stage {asked}: the trunk has {len(cells)} stages")
    return asked - 1


def _cell(trunk: Trunk, stage: int) -> float:
    return float(trunk.reductions[stage]) if trunk.reductions else float(CELL)


def _objects(video: Video, mask: Mask) -> list[int]:
    """Return the numbers of the objects in a first frame's mask."""
    objects = [int(number) for number in np.unique(mask) if number not in (0, VOID)]
    if not objects:
        raise UserError(f"{video.masks[0]}: the first frame has no object to follow")
    return objects


def _check_objects(video: Video, frame: Frame, objects: Sequence[int]) -> None:
    unknown = set(np.unique(frame.mask).tolist()) - {0, VOID, *objects}
    if unknown:
        raise UserError(f"{video.masks[frame.number]}: holds object {min(unknown)}, which the first frame lacks")


def _check_k(settings: VideoSettings, features: Tensor) -> None:
    height, width = features.shape[:2]
    cells = min(settings.radius + 1, height) * min(settings.radius + 1, width)
    if settings.k > cells:
        raise UserError(f"--k {settings.k}: larger than the {cells} cells that a corner of the first frame sees")


def _reduced_labels(mask: Mask, objects: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Return the labels of a frame's cells, one-hot [h, w, 1 + objects]: each cell has that of the pixel at its centre."""
    height, width = grid
    small = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    index = np.zeros(256, np.int64)  # void counts as background
    index[list(objects)] = np.arange(1, len(objects) + 1)
    return F.one_hot(torch.from_numpy(index[small]), len(objects) + 1).float()


def _show(example: Example, frame: Frame, predicted: Mask) -> None:
    height, width = frame.mask.shape
    scale = min(1.0, EXAMPLE_SIDE / max(height, width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    rows, columns = np.arange(h) * height // h, np.arange(w) * width // w
    example.pictures.append(np.asarray(Image.fromarray(frame.pixels).resize((w, h), Image.Resampling.BICUBIC)))
    example.truths.append(frame.mask[rows][:, columns])
    example.predictions.append(predicted[rows][:, columns])
