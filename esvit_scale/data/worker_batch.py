"""From an image file to the crops of a batch: `decode_for_crops` places and decodes, `make_worker_batch` cuts the crops.

Both run in a loader process; stream.py shows an example.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from esvit_scale.config import Config
from esvit_scale.data import photometric, photometric_8bit, signals
from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.crops import Box, ImagePyramid, choose_reductions, crop_box, crop_groups, keyed_generator
from esvit_scale.data.loader import pixel_dtype, pixel_memory
from esvit_scale.data.photometric import AugmentationParams
from esvit_scale.data.picture import open_picture
from esvit_scale.data.pixel_format import pixel_format
from esvit_scale.data.signal_members import plain_image
from esvit_scale.data.signals import Views

SLOW_SECONDS = 20.0  # a sample that takes at least this long to read and decode is reported


def crop_shapes(config: Config, images: int) -> list[tuple[int, ...]]:
    """Return the shapes of a batch's crops before they are augmented, per resolution group: [V_g, B, S_g, S_g, channels]."""
    return [(g.views, images, g.size, g.size, config.data.channels) for g in crop_groups(config.data)]


class PlacedCrop(NamedTuple):
    """The random choices for one crop of one sample: its box, whether it is mirrored, and its augmentation."""

    box: Box
    flip: bool  # left to right
    flip_vertical: bool  # top to bottom
    params: AugmentationParams


class DecodedSample(NamedTuple):
    """One decoded image whose crops are placed but not yet cut."""

    batch_position: int  # in the global batch, 0..global_batch-1
    key: str
    label: int  # class number, -1 without a class
    crops: list[PlacedCrop]
    reductions: list[int]  # of every crop, which is cut from the image at 1/reduction of its size
    pyramid: ImagePyramid | None  # None: the sample has no image, only signals
    bad: list[dict[str, Any]]  # quarantine rows of the samples that were tried before this one and failed
    signals: Mapping[str, Views] = {}  # by modality (signals.py)


class WorkerBatch(NamedTuple):
    """The part of one batch that one loader process makes.

    Small arrays are sent between processes as NumPy arrays, since each tensor would need a shared-memory file.
    """

    crops: list[Tensor]  # per resolution group: uint8 or uint16 [V_g, B, S_g, S_g, channels]; empty: in the BatchMemory
    photometric: tuple[NDArray[Any], ...]  # the fields of BatchAugmentationParams, leading shape [V, B]
    positions: NDArray[np.int64]  # [B], in the global batch
    keys: list[str]
    labels: NDArray[np.int64]  # [B]
    bad: list[dict[str, Any]]  # quarantine rows
    batch_index: int
    seconds: float  # that the loader process took to make it
    worker: int  # number of the loader process
    signals: Mapping[str, tuple[Tensor, NDArray[np.int64]]] = {}  # by modality: values [V, B, …], lengths [V, B]
    has_image: NDArray[np.bool_] | None = None  # [B]; None where no signals are read: all samples have one


def place_crops(config: Config, epoch: int, key: str, width: int, height: int) -> list[PlacedCrop]:
    """Draw the crops of a sample whose image has width × height pixels: a pure function of seed, epoch and key."""
    placed: list[PlacedCrop] = []
    for group in crop_groups(config.data):
        for strength in group.augment:
            rng = keyed_generator(config.seed, epoch, key, len(placed))
            box = crop_box(rng, width, height, group.scale)
            flip = rng.random() < config.data.flip
            params = photometric.draw_params(rng, strength)
            # Drawn last: the numbers of the others are those of versions that had no vertical flip.
            placed.append(PlacedCrop(box, flip, rng.random() < config.data.flip_vertical, params))
    return placed


def decode_for_crops(
    config: Config, epoch: int, key: str, data: bytes
) -> tuple[list[PlacedCrop], list[int], ImagePyramid]:
    """Place a sample's crops, then decode its image file no larger than they need.

    Returns:
        The crops, the reduction at which each of them is cut, and the decoded image.

    Raises:
        BadImage: the file holds no usable image.
    """
    picture = open_picture(data, pixel_format(config.data))
    placed = place_crops(config, epoch, key, picture.width, picture.height)
    reductions = choose_reductions([crop.box for crop in placed], config.crop_sizes, picture.width, picture.height)
    return placed, reductions, ImagePyramid(*picture.pixels(min(reductions)))


def decode_modalities(
    config: Config, epoch: int, key: str, extensions: Sequence[str], read: Callable[[str], bytes]
) -> tuple[tuple[list[PlacedCrop], list[int], ImagePyramid | None], dict[str, Views], list[str]]:
    """Decode what a sample has of an image and of the modalities that a config reads.

    Args:
        key: of the sample, from which crops and views are drawn.
        extensions: of the sample's members.
        read: returns the bytes of the member of an extension, or raises BadImage.

    Returns:
        The three results of `decode_for_crops`, without crops and image where there is no usable one; the views by
        modality; one line about each member that cannot be used.

    Raises:
        BadImage: no member can be used.
    """
    views, problems = signals.read_all(config, epoch, key, extensions, read)
    image: tuple[list[PlacedCrop], list[int], ImagePyramid | None] = [], [], None
    if chosen := plain_image(extensions):
        try:
            image = decode_for_crops(config, epoch, key, read(chosen))
        except BadImage as error:
            problems.insert(0, f"image: {error}")
    if image[2] is None and not views:
        held = ", ".join(extensions) or "none"
        raise BadImage("; ".join(problems) or f"nothing that the run reads among its members ({held})")
    return image, views, problems


def member_rows(where: Mapping[str, Any], problems: Iterable[str]) -> list[dict[str, Any]]:
    """Return the quarantine rows of members that cannot be used, of a sample that is used without them.

    Args:
        where: what the rows say of the sample: shard, key, epoch, position.
        problems: as `decode_modalities` returns them.
    """
    return [{**where, "reason": problem, "used": True, "member": problem.partition(":")[0]} for problem in problems]


def make_worker_batch(
    config: Config, batch_index: int, samples: Iterable[DecodedSample], size: int, memory: list[Tensor] | None = None
) -> WorkerBatch:
    """Cut the crops of `size` samples straight into the batch's arrays, with one decoded image in memory at a time.

    Args:
        memory: the process's rows of a BatchMemory to write the crops to; None: into new arrays, which are sent.
    """
    began = time.monotonic()
    in_worker = config.data.photometric == "workers"
    dtype, process = pixel_dtype(config.data.bits), get_worker_info()
    pixels = memory or [pixel_memory(dtype, *shape, shared=process is not None) for shape in crop_shapes(config, size)]
    arrays = [p.numpy() for p in pixels]
    params: list[list[AugmentationParams]] = [[] for _ in config.crop_sizes]  # [V][B]
    positions, labels = np.empty(size, np.int64), np.empty(size, np.int64)
    keys: list[str] = []
    bad: list[dict[str, Any]] = []
    sent, filled, has_image = _signal_arrays(config, size, process is not None)
    for b, sample in enumerate(samples):
        places = (array[v, b] for array in arrays for v in range(len(array)))
        if sample.pyramid is None:
            for of_view, out in zip(params, places, strict=True):
                out[:] = 0
                of_view.append(photometric_8bit.IDENTITY)
        placed = zip(sample.crops, sample.reductions, places, strict=True) if sample.pyramid else ()
        for number, (crop, reduction, out) in enumerate(placed):
            assert sample.pyramid is not None
            sample.pyramid.cut(crop.box, reduction, crop.flip, out)
            if crop.flip_vertical:
                out[:] = out[::-1].copy()
            if in_worker:
                photometric_8bit.apply(out, crop.params)
            params[number].append(photometric_8bit.IDENTITY if in_worker else crop.params)
        positions[b], labels[b] = sample.batch_position, sample.label
        keys.append(sample.key)
        bad.extend(sample.bad)
        signals.fill(sample.signals, filled, b)
        if has_image is not None:
            has_image[b] = sample.pyramid is not None
    fields = tuple(field.numpy() for field in photometric.stack(params))
    crops = [] if memory else pixels
    seconds, worker = time.monotonic() - began, process.id if process else 0
    return WorkerBatch(crops, fields, positions, keys, labels, bad, batch_index, seconds, worker, sent, has_image)


def _signal_arrays(
    config: Config, size: int, shared: bool
) -> tuple[
    dict[str, tuple[Tensor, NDArray[np.int64]]],
    dict[str, tuple[NDArray[Any], NDArray[np.int64]]],
    NDArray[np.bool_] | None,
]:
    """Return memory for the signals of `size` samples, as it is sent and as it is filled, and for `has_image`."""
    sent = {}
    for modality in signals.wanted(config.data):
        dtype, shape = signals.shape_of(config.data, modality)
        views = getattr(config.data, modality).views
        sent[modality] = pixel_memory(dtype, views, size, *shape, shared=shared), np.zeros((views, size), np.int64)
    filled = {modality: (values.numpy(), lengths) for modality, (values, lengths) in sent.items()}
    return sent, filled, np.ones(size, bool) if sent else None
