"""Decoding of sound, video and text: exact cuts, limits, and every kind of damaged file."""

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.signal import resample_poly

from esvit_scale.data import media
from esvit_scale.data.bad_image import BadMember
from tests.data.media_files import number_of, sound, soundfile, steps, tone, video

SOUNDS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")]


@pytest.mark.parametrize(("kind", "subtype"), SOUNDS)
@pytest.mark.parametrize("place", [0.0, 0.37, 0.999])
def test_cut_is_that_stretch_of_the_recording(kind: str, subtype: str, place: float) -> None:
    rate = 48000
    data = sound(tone(1, 40_000, 2), rate, kind, subtype)
    whole = soundfile().read(io.BytesIO(data), dtype="float64")[0].mean(1)  # decoded from its start
    cut, length = media.Recording(data).cut(place, rate, 5000)
    start = media.start_of(place, len(whole), 5000)
    assert length == 5000
    np.testing.assert_array_equal(cut, np.clip(whole[start : start + 5000], -1, 1).astype(np.float32))


@pytest.mark.parametrize(("rate", "to"), [(44100, 16000), (8000, 16000), (22050, 8000), (11025, 16000), (8001, 8000)])
def test_cut_at_another_rate_is_cut_from_the_whole_recording_resampled(rate: int, to: int) -> None:
    data = sound(tone(2, rate), rate, "WAV", "FLOAT")
    whole = soundfile().read(io.BytesIO(data), dtype="float64")[0]
    up, down = to // math.gcd(rate, to), rate // math.gcd(rate, to)
    for place in (0.0, 0.5, 0.99):
        cut, _ = media.Recording(data).cut(place, to, to // 4)
        start = media.start_of(place, rate, -(-(to // 4) * down // up))
        lead = -start % down  # zeros in front, so that an output sample lies on `start`
        resampled = resample_poly(np.concatenate([np.zeros(lead), whole]), up, down)
        first = (start + lead) * up // down
        # The same sums in another order: a few units in the last place of float64, and one rounding to float32.
        np.testing.assert_allclose(cut, resampled[first : first + to // 4], rtol=0, atol=1e-7)


def test_short_and_empty_recordings() -> None:
    cut, length = media.Recording(sound(tone(3, 100), 8000)).cut(0.7, 16000, 1000)
    assert (length, cut.shape, cut.dtype) == (200, (1000,), np.float32)
    assert cut[:200].any()
    assert not cut[200:].any()
    assert media.Recording(sound(np.zeros((0, 1)), 8000)).samples == 0


def damaged_sounds() -> dict[str, bytes]:
    wav, flac, ogg = (sound(tone(4, 30_000), 16000, kind) for kind in ("WAV", "FLAC", "OGG"))
    infinite = tone(4, 100)
    infinite[50] = np.nan
    return {
        "nothing": b"",
        "no sound": b"GIF89a" + bytes(100),
        "another format": sound(tone(4, 100), 16000, "AIFF"),
        "flac cut short": flac[: len(flac) // 2],
        "flac damaged": flac[:20_000] + bytes(2000) + flac[22_000:],
        "ogg header": ogg[:60],
        "not finite": sound(infinite, 16000, "WAV", "FLOAT"),
        "too slow": wav[:24] + (100).to_bytes(4, "little") + wav[28:],
    }


@pytest.mark.parametrize("name", damaged_sounds() if soundfile() else [])
def test_damaged_sound_is_named(name: str) -> None:
    with pytest.raises(BadMember) as error:
        media.Recording(damaged_sounds()[name]).check()
    assert 0 < len(str(error.value)) < 250
    assert "\n" not in str(error.value)
    assert "BytesIO" not in str(error.value)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "ULAW", "IMA_ADPCM", "GSM610"])
def test_other_kinds_of_wav(subtype: str) -> None:
    """Among them GSM, which cannot seek; IMA and GSM come in blocks, so that the file is a little longer."""
    whole, _ = soundfile().read(io.BytesIO(data := sound(tone(6, 3000), 8000, "WAV", subtype)), dtype="float64")
    recording = media.Recording(data)
    recording.check()
    assert recording.samples == len(whole)
    cut, length = recording.cut(0.5, 8000, 700)
    start = int(0.5 * (len(whole) - 700 + 1))
    assert length == 700
    np.testing.assert_allclose(cut, whole[start : start + 700], rtol=0, atol=1e-7)


def test_a_long_recording_is_refused_by_its_header() -> None:
    wav, count = sound(tone(5, 100), 1000), 2 * 1_801_000
    long = wav[:4] + (36 + count).to_bytes(4, "little") + wav[8:40] + count.to_bytes(4, "little") + bytes(count)
    with pytest.raises(BadMember, match="longer than 1800 s"):
        media.Recording(long)


CLIPS = [("mp4", "mpeg4", 0), ("mp4", "mpeg4", 2), ("mp4", "libx264", 0), ("webm", "libvpx", 0), ("avi", "mpeg4", 0)]


@pytest.mark.parametrize(("kind", "codec", "b_frames"), [*CLIPS, ("avi", "mpeg4", 2)])
def test_any_frames_are_those_of_the_whole_clip(kind: str, codec: str, b_frames: int) -> None:
    clip = media.Clip(video(steps(50), kind, codec, b_frames=b_frames), kind)
    clip.check()
    assert clip.count == 50
    whole = [np.asarray(frame) for frame in clip.at(range(50))]
    assert [number_of(frame) for frame in whole] == list(range(50))
    for numbers in ([0], [5, 6], [13, 20, 27], [30, 49], [49]):
        found = [np.asarray(frame) for frame in clip.at(numbers)]
        assert len(found) == len(numbers)
        assert all(np.array_equal(frame, whole[n]) for frame, n in zip(found, numbers, strict=True))
    untimed = media.Clip(clip._data, kind)
    untimed._times = None  # as of files whose packets have no times
    assert [number_of(np.asarray(frame)) for frame in untimed.at([7, 30])] == [7, 30]
    frames, length = media.cut_frames(clip, 0.5, 4, 3, 8)
    assert (frames.shape, length) == ((4, 8, 8, 3), 4)
    expected = [media.square(Image.fromarray(whole[n]), 8) for n in (20, 23, 26, 29)]  # the centre: (50 - 10 + 1) / 2
    assert np.array_equal(frames, expected)


def test_frame_is_the_centre_square_of_a_picture() -> None:
    image = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8))
    expected = image.crop((10, 0, 50, 40)).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(media.square(image, 16), np.asarray(expected))


def test_a_turned_video_is_upright() -> None:
    data = video(steps(3, 48, 32))
    upright = next(iter(media.Clip(data, "mp4").at([0])))
    matrix = b"".join(n.to_bytes(4, "big") for n in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000))
    turned = b"".join(n.to_bytes(4, "big") for n in (0, 0x10000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000))
    at = data.rindex(matrix)  # of the track, after that of the film
    found = next(iter(media.Clip(data[:at] + turned + data[at + 36 :], "mp4").at([0])))
    assert np.array_equal(np.asarray(found), np.asarray(upright.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("kind", ["mp4", "webm", "avi"])
def test_damaged_video_is_named(kind: str) -> None:
    whole = video(steps(40), kind, "libvpx" if kind == "webm" else "mpeg4")
    for data in (b"", b"no video", whole[:100], b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n"):
        with pytest.raises(BadMember) as error:
            media.Clip(data, kind).check()
        assert "\n" not in str(error.value)
        assert "<none>" not in str(error.value)
    rng = np.random.default_rng(0)
    for _ in range(20):  # any result is right but a crash, a hang or another error
        some = bytearray(whole)
        for at in rng.integers(0, len(some), 20):
            some[at] = rng.integers(256)
        try:
            clip = media.Clip(bytes(some[: rng.integers(len(some) // 2, len(some))]), kind)
            media.cut_frames(clip, 0.9, 4, 1, 8)
        except BadMember:
            pass


def test_limits_of_video(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(np.zeros((40, 48, 66, 3), np.uint8), key_every=100)
    monkeypatch.setattr(media, "MAX_DECODED", 20)
    assert len(list(media.Clip(data, "mp4").at([10]))) == 1
    with pytest.raises(BadMember, match="more than 20 frames from a key frame"):
        list(media.Clip(data, "mp4").at([30]))
    monkeypatch.setattr(media, "MAX_FRAMES", 39)
    with pytest.raises(BadMember, match="more than 39 frames"):
        media.Clip(data, "mp4")
    monkeypatch.setattr(media, "MAX_FRAME_PIXELS", 66 * 48 - 1)
    with pytest.raises(BadMember, match="66x48 pixels: over the limit"):
        media.Clip(data, "mp4")


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("", 4, []),
        ("abc", 4, [98, 99, 100]),
        ("abcdef", 4, [98, 99, 100, 101]),
        ("aé", 3, [98, 0xC3 + 1, 0xA9 + 1]),
        ("abé", 3, [98, 99]),  # not half a character
        ("\ud800a", 4, [ord("?") + 1, 98]),  # JSON may hold half a character
    ],
)
def test_tokens_are_bytes_plus_one(text: str, length: int, expected: list[int]) -> None:
    values, count = media.tokens(text, length)
    assert (values.tolist(), count) == (expected + [0] * (length - len(expected)), len(expected))


def test_texts_of_a_json() -> None:
    data = '{"fr": " été ", "en": "", "n": 3, "es": "verano"}'.encode()
    assert media.texts_of(data, ["es", "fr", "en", "n", "de"]) == ["verano", "été"]
    bad: list[tuple[bytes, Any]] = [(b"[1]", "no JSON object"), (b"{", "no JSON"), (b"[" * 200_000, "no JSON")]
    for content, says in bad:
        with pytest.raises(BadMember, match=says):
            media.texts_of(content, ["fr"])
    with pytest.raises(BadMember, match="not UTF-8 at byte 1"):
        media.text_of(b"a\xff")
    with pytest.raises(BadMember, match="over the limit"):
        media.text_of(bytes(media.MAX_TEXT + 1))
