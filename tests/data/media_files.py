"""Real files of sound and video for tests, written by the real libraries."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from esvit_scale.config import Config, validate
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.shard_writer import Sample, write_samples
from tests.data.conftest import encoded, picture


def soundfile() -> Any:
    return pytest.importorskip("soundfile", reason="needs the extra modalities")


def tone(seed: int, samples: int, channels: int = 1) -> NDArray[np.float64]:
    """A smooth random waveform [samples, channels] within ±0.9."""
    x = np.random.default_rng(seed).standard_normal((samples + 64, channels)).cumsum(0)
    x = x[64:] - x[:-64]
    return 0.9 * x / max(np.abs(x).max(initial=0), 1e-9)


def sound(x: NDArray[Any], rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile().write(out, x, rate, format=kind, subtype=subtype)
    return out.getvalue()


def video(
    frames: NDArray[np.uint8], kind: str = "mp4", codec: str = "mpeg4", key_every: int = 12, b_frames: int = 0
) -> bytes:
    """A file of frames [T, H, W, 3] at 25 frames a second, `b_frames` of which are stored after the next one."""
    av = pytest.importorskip("av", reason="needs the extra modalities")
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.gop_size = key_every
        if b_frames:
            stream.codec_context.options = {"bf": str(b_frames)}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def steps(count: int, width: int = 48, height: int = 32) -> NDArray[np.uint8]:
    """Frames that tell their number by six stripes from left to right, white for a bit that is set, the lowest first."""
    bits = np.arange(count)[:, None] >> np.arange(6) & 1
    out = np.zeros((count, height, width, 3), np.uint8)
    out[:] = 255 * bits.repeat(width // 6, 1)[:, None, :, None]
    return out


def number_of(frame: NDArray[np.uint8]) -> int:
    """Return the number that a frame [H, W, 3] of `steps` tells."""
    stripes = frame.reshape(frame.shape[0], 6, -1).mean((0, 2)) > 128
    return int(stripes @ (1 << np.arange(6)))


def modal_config(workers: int = 0, **more: Any) -> Config:
    data = {
        "workers": workers,
        "slots": 4,
        "shuffle_window": 2,
        "global_crops": {"size": 12},
        "local_crops": [{"size": 8, "count": 1}],
        "audio": {"views": 2, "rate": 8000, "seconds": 0.05},
        "video": {"views": 1, "frames": 4, "step": 2, "size": 8},
        "text": {"views": 2, "length": 12, "fields": ["fr", "en"]},
    }
    return validate({"seed": 3, "data": data | more, "train": {"global_batch": 8, "grad_accum": 2}}, "test")


def modal_samples(count: int = 26) -> list[Sample]:
    """Samples with every combination of members: mono and stereo at three rates, clips and frames, long and empty texts."""
    found = []
    for i in range(count):
        kinds = (("WAV", 8000, 1), ("FLAC", 22050, 2), ("OGG", 44100, 1))
        kind, rate, channels = kinds[i % 3]
        extras: dict[str, bytes] = {}
        if i % 4:
            extras[kind.lower()] = sound(tone(i, rate // (4 if i % 5 else 50), channels), rate, kind)
        if i % 3:
            extras["json"] = json.dumps({"fr": f"été numéro {i} " * 3, "en": f"summer {i}" if i % 2 else ""}).encode()
        if i % 6 == 1:
            extras["mp4"] = video(steps(20 + i))
        if i % 6 == 2:
            extras |= {f"frame-{n:04d}.png": encoded(picture(100 * i + n)) for n in range(3 + i % 5)}
        has_image = i % 5 != 2 or not extras
        image = ("png", encoded(picture(i))) if has_image else ("", b"")
        found.append(Sample(f"s{i:03d}", None, *image, extras))
    return found


def modal_set(root: Path, samples: list[Sample] | None = None) -> Manifest:
    return write_samples(modal_samples() if samples is None else samples, root, samples_per_shard=5)
