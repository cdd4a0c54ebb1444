"""Tars as people really have them, in `shards create` and in streams: every member is used, or counted by kind."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.config import validate
from esvit_scale.data import left_out
from esvit_scale.data import manifest as manifests
from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.manifest import Entry
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_writer import write_source
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.data.sources.joined import joined
from esvit_scale.data.sources.tars import TarSource
from esvit_scale.data.stream import batches, open_data
from esvit_scale.data.tar_names import MACOS, PAX, SYSTEM, no_sample, split_name
from esvit_scale.data.tar_reader import Forward, TarReader
from esvit_scale.data.tar_stream import Raw, TarSamples
from esvit_scale.errors import UserError
from tests.data.conftest import encoded, picture

IMAGES = [encoded(picture(i, 12, 9)) for i in range(16)]
TWIN = b"\0\5\x16\7" + bytes(100)

Members = list[tuple[str, bytes]]
Wanted = dict[int, int | None]  # number of an image → its label

STRANGERS: Members = [
    *((name, IMAGES[5]) for name in (".x.png", ".git/y.png")),
    *((name, b"30 mtime=1") for name in ("README", "dot.", "a/Thumbs.db", "PaxHeaders.77/0.png")),
]


def tar_of(members: Members, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def label(i: int) -> bytes:
    return b"%d" % (i % 3)


def simple(prefix: str, numbers: range) -> Members:
    return [m for i in numbers for m in ((f"{prefix}{i}.png", IMAGES[i]), (f"{prefix}{i}.cls", label(i)))]


def joined_tars(padding: int = 0) -> bytes:
    parts = [tar_of(simple("", range(4 * k, 4 * k + 4)), form) for k, form in enumerate((0, 1, 2))]
    return (b"\0" * 512 * padding).join(parts)


def macos() -> Members:
    twins: Members = [("./._.DS_Store", TWIN), ("./.DS_Store", b"x"), ("__MACOSX/p/._0.png", TWIN)]
    pairs = [[(f"./p/._{name}", TWIN), (f"./p/{name}", data)] for name, data in simple("", range(6))]
    return twins + [member for pair in pairs for member in pair]


def two_parts() -> Members:
    return [m for i in range(5) for m in ((f"s{i}.input.png", IMAGES[i]), (f"s{i}.output.cls", label(i)))]


def stereo() -> Members:
    sides = [((f"p/{i}.left.png", IMAGES[2 * i]), (f"p/{i}.right.png", IMAGES[2 * i + 1])) for i in range(4)]
    return [m for i, (a, b) in enumerate(sides) for m in (a, b, (f"p/{i}.json", b"{}"), (f"p/{i}.cls", label(i)))]


def masks() -> Members:
    """The mask stands before its photo, as in a tar sorted by name it may."""
    of = [
        ((f"m{i}.depth.map.png", IMAGES[15]), (f"m{i}.mask.png", IMAGES[14]), (f"m{i}.png", IMAGES[i]))
        for i in range(4)
    ]
    return [m for i, three in enumerate(of) for m in (*three, (f"m{i}.cls", label(i)))]


def frames() -> Members:
    """Several frames with one label for all."""
    numbered = [[(f"v{v}.{f}.png", IMAGES[4 * v + f]) for f in range(4)] for v in range(3)]
    return [m for v, frames in enumerate(numbered) for m in (*frames, (f"v{v}.cls", label(v)))]


def dots() -> Members:
    numbered = [m for i in range(6) for m in ((f"22.{i:02d}.png", IMAGES[i]), (f"22.{i:02d}.cls", label(i)))]
    titled = [(f"b/track 2.{i} (clean version).png", i) for i in range(6, 9)]
    return numbered + [m for name, i in titled for m in ((name, IMAGES[i]), (name[:-3] + "cls", label(i)))]


def equal_names(numbers: range, missing: int | None) -> Members:
    """Images first, then their labels, but that of the image `missing`; named 0, 1, 2 whatever the numbers."""
    images: Members = [(f"{k}.png", IMAGES[i]) for k, i in enumerate(numbers)]
    return images + [(f"{k}.cls", label(i)) for k, i in enumerate(numbers) if k != missing]


def all_of(numbers: range) -> Wanted:
    return {i: i % 3 for i in numbers}


# name → bytes of the tar, the images and labels that are samples, what is left out by kind in `create` and in streams
KINDS: dict[str, tuple[Callable[[], bytes], Wanted, dict[str, int]]] = {
    "joined": (joined_tars, all_of(range(12)), {}),
    "joined with padding": (lambda: joined_tars(37), all_of(range(12)), {}),
    "one zero block in between": (
        lambda: tar_of(simple("", range(3)))[: 2 * 3 * 1024].ljust(6656, b"\0") + tar_of(simple("x", range(3, 6))),
        all_of(range(6)),
        {},
    ),
    "macos": (
        lambda: tar_of(macos()),
        all_of(range(6)),
        {MACOS: 14, SYSTEM: 1},
    ),
    "two-part extensions": (lambda: tar_of(two_parts()), all_of(range(5)), {}),
    "stereo": (lambda: tar_of(stereo()), {i: i // 2 % 3 for i in range(8)}, {}),
    "masks": (
        lambda: tar_of(masks()),
        all_of(range(4)),
        {"image beside the one of its key (.mask.png)": 4, "image beside the one of its key (.depth.map.png)": 4},
    ),
    "dots": (lambda: tar_of(dots()), all_of(range(9)), {}),
    "absolute and climbing": (
        lambda: tar_of(simple("/a/", range(3)) + simple("../../a/../b/", range(3, 6)) + simple(".//c/./", range(6, 8))),
        all_of(range(8)),
        {},
    ),
    "upper case": (
        lambda: tar_of([(name.upper(), data) for name, data in simple("img_", range(4))]),
        all_of(range(4)),
        {},
    ),
    "hidden, system and nameless": (
        lambda: tar_of(simple("", range(4)) + STRANGERS),
        all_of(range(4)),
        {left_out.HIDDEN: 2, left_out.not_an_image(""): 2, SYSTEM: 1, PAX: 1},
    ),
    "members without an image": (
        lambda: tar_of([*simple("", range(4)), ("z0.cls", b"1"), ("z1.json", b"{}"), ("z1.cls", b"2")]),
        all_of(range(4)),
        {left_out.NO_IMAGE: 3},
    ),
}
KINDS |= {
    "labels named after the whole image": (
        lambda: tar_of(
            [("a.png", IMAGES[0]), ("a.left.png", IMAGES[9]), ("a.png.cls", b"0")]
            + [m for k, i in (("l", 1), ("r", 2)) for m in ((f"b.{k}.png", IMAGES[i]), (f"b.{k}.png.cls", label(i)))]
        ),
        all_of(range(3)),
        {"image beside the one of its key (.left.png)": 1},
    ),
}
ONLY_CREATED = {  # what only a second look at the tar can put together
    "labels behind all images": (
        lambda: tar_of([m for k in (0, 1) for m in simple("s", range(8))[k::2]]),
        all_of(range(8)),
        {},
    ),
    "labels before all images": (
        lambda: tar_of([m for k in (1, 0) for m in simple("s", range(8))[k::2]]),
        all_of(range(8)),
        {},
    ),
    "in any order": (lambda: tar_of(random.Random(1).sample(stereo(), 16)), {i: i // 2 % 3 for i in range(8)}, {}),
    "joined tars of unsorted ones": (
        lambda: (
            tar_of([m for k in (0, 1) for m in simple("s", range(4))[k::2]])
            + tar_of([m for k in (0, 1) for m in simple("t", range(4, 8))[k::2]])
        ),
        all_of(range(8)),
        {},
    ),
    "joined tars of equal names": (
        lambda: tar_of(equal_names(range(3), 1)) + tar_of(equal_names(range(3, 6), None)),
        {0: 0, 2: 2, 3: 0, 4: 1, 5: 2},
        {left_out.UNLABELLED: 1},
    ),
    "a label behind its image in the next tar": (
        lambda: tar_of([("a.png", IMAGES[0]), ("0.png", IMAGES[6])]) + tar_of(simple("", range(1))[::-1]),
        {0: 0},
        {left_out.UNLABELLED: 2},
    ),
    "labels in a tar of their own": (
        lambda: tar_of(simple("", range(4))[::2]) + tar_of(simple("", range(4))[1::2]),
        all_of(range(4)),
        {},
    ),
    "a member twice": (
        lambda: tar_of([("b.png", IMAGES[1]), ("b.txt", b"x"), ("b.txt", b"y"), ("b.cls", b"1")]),
        {1: 1},
        {left_out.NO_IMAGE: 1},
    ),
    "frames of one label": (lambda: tar_of(frames()), {i: i // 4 for i in range(12)}, {}),
}


@pytest.mark.parametrize("name", [*KINDS, *ONLY_CREATED])
def test_create_uses_or_counts_every_member(name: str, tmp_path: Path) -> None:
    make, wanted, others = (KINDS | ONLY_CREATED)[name]
    (tmp_path / "x.tar").write_bytes(make())
    (manifest,) = write_source(str(tmp_path / "x.tar"), tmp_path / "set", SourceOptions(), Recipe()).values()
    assert images_of(manifest) == wanted
    assert {row["why"]: row["count"] for row in manifest.left_out} == others
    keys = [e.key for shard in manifest.shards for e in manifests.read_index(manifest.root / shard.name)]
    assert len(set(keys)) == len(keys) == len(wanted)
    assert not any(key.startswith("_/") or ".." in key for key in keys)


def images_of(manifest: manifests.Manifest) -> Wanted:
    found: Wanted = {}
    for shard in manifest.shards:
        data = (manifest.root / shard.name).read_bytes()
        for _, members, _ in manifests.read_index(manifest.root / shard.name):
            read = {ext: data[at : at + size] for ext, (at, size) in members.items()}
            found[IMAGES.index(read["png"])] = int(read["cls"]) if "cls" in read else None
    return found


def counts(row: dict[str, Any]) -> dict[str, int]:
    return {kind["why"]: kind["count"] for kind in row["left_out"]}


def streamed(path: Path) -> tuple[list[Raw], list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    return list(TarSamples().of([str(path)], 0, told)), told


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("squeeze", [bytes, gzip.compress, bz2.compress, lzma.compress], ids=["tar", "gz", "bz2", "xz"])
def test_streams_use_or_count_every_member(name: str, squeeze: Callable[[bytes], bytes], tmp_path: Path) -> None:
    make, wanted, others = KINDS[name]
    (tmp_path / "x.tar").write_bytes(squeeze(make()))
    came, told = streamed(tmp_path / "x.tar")
    assert {IMAGES.index(raw.image): int(raw.label) for raw in came} == wanted
    assert [counts(row) for row in told] == ([others] if others else [])
    assert len({raw.key for raw in came}) == len(came)


def test_label_stays_with_its_image(tmp_path: Path) -> None:
    members = [("s.left.png", IMAGES[1]), ("s.right.png", IMAGES[2]), ("s.left.cls", b"1"), ("t.png", IMAGES[3])]
    (tmp_path / "x.tar").write_bytes(tar_of([*members, ("t.mask.png", IMAGES[4]), ("t.mask.cls", b"2")]))
    source = TarSource([tmp_path / "x.tar"], tmp_path)
    assert source.read(0).label == 1
    for i in (1, 2):
        with pytest.raises(BadImage, match="has no label"):
            source.read(i)
    assert (left_out.MEMBERS, left_out.WENT_WITH) in source.left_out
    labels = {IMAGES.index(raw.image): raw.label for raw in streamed(tmp_path / "x.tar")[0]}
    assert labels == {1: b"1", 2: b"", 3: b""}


def test_hard_links_are_read_and_other_links_are_lost_images(tmp_path: Path) -> None:
    out = io.BytesIO(tar_of([("./p/0.png", IMAGES[0]), (".store", b"1")]))
    with tarfile.open(fileobj=out, mode="a") as tar:
        links = [("1.png", "p/0.png", tarfile.LNKTYPE), ("1.cls", ".store", tarfile.LNKTYPE)]
        links += [("2.png", "1.png", tarfile.LNKTYPE), ("3.png", "gone.png", tarfile.LNKTYPE)]
        for name, target, kind in [*links, ("4.PNG", "p/0.png", tarfile.SYMTYPE), ("5", "p", tarfile.SYMTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    (tmp_path / "x.tar").write_bytes(out.getvalue())
    source = TarSource([tmp_path / "x.tar"], tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["x.tar/p/0.png", "x.tar/1.png", "x.tar/2.png"]
    assert source.read(1).data == IMAGES[0]
    assert source.read(1).label == 1
    lost = {(row["what"], row["why"], row["first"]): row["count"] for row in source.left_out.rows()}
    assert lost[left_out.IMAGES, left_out.LINK, "x.tar/3.png"] == 2
    assert lost[left_out.MEMBERS, left_out.LINK, "x.tar/5"] == 1
    assert "2 of 5 images" in source.left_out.warning(3)
    (row,) = streamed(tmp_path / "x.tar")[1]
    assert {kind["what"]: kind["count"] for kind in row["left_out"] if kind["why"] == left_out.LINK} == {
        left_out.IMAGES: 4,
        left_out.MEMBERS: 2,
    }


def test_photos_merged_by_a_dot_are_counted_as_lost(tmp_path: Path) -> None:
    names = ["Smith.jpg", "Smith.John.jpg", "Lee.jpg"]
    (tmp_path / "x.tar").write_bytes(tar_of([(name, IMAGES[i]) for i, name in enumerate(names)]))
    left = TarSource([tmp_path / "x.tar"], tmp_path).left_out
    assert "1 of 3 images (33.3 %) are not in the set" in left.warning(2)
    assert "(x.tar/Smith.John.jpg)" in left.warning(2)
    (row,) = streamed(tmp_path / "x.tar")[1][0]["left_out"]
    assert (row["what"], row["first"]) == (left_out.IMAGES, "Smith.John.jpg")


def test_compressed_tars_are_detected_by_ending(tmp_path: Path) -> None:
    for name in ("x.tar", "x.tar.md5", "x.tar.json"):
        (tmp_path / name).write_bytes(tar_of(simple("", range(2))))
    assert len(open_source(str(tmp_path), SourceOptions())[""]) == 2
    for name in ("only/x.TGZ", "below/y.tar", "below/a/x.tar.zst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("only", "below"):
        with pytest.raises(UserError, match=r"x\.(TGZ|tar\.zst): compressed tars cannot be read in random order"):
            open_source(str(tmp_path / name), SourceOptions())


def test_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.tar: empty file\)"):
        TarSource([tmp_path / "x.tar"], tmp_path)
    assert [row["reason"] for row in streamed(tmp_path / "x.tar")[1]] == ["empty file"]


@pytest.mark.parametrize("squeeze", [gzip.compress, bz2.compress, lzma.compress])
def test_concatenated_compressed_tars_are_read(squeeze: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Several compressed streams in one file, each a whole tar: tarfile's own reader ends behind the first."""
    (tmp_path / "x.tar").write_bytes(b"".join(squeeze(tar_of(simple("", range(k, k + 4)))) for k in (0, 4, 8)))
    came, told = streamed(tmp_path / "x.tar")
    assert ([IMAGES.index(raw.image) for raw in came], told) == (list(range(12)), [])


@pytest.mark.parametrize(
    ("tail", "says"),
    [(b"not a tar" * 100, "the bytes after its end marker are not a tar"), (b"\1" * 700, "are not a tar"), (b"", "")],
)
def test_bytes_after_the_end_marker_are_reported(tail: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(joined_tars() + tail)
    entries, damage = manifests.scan_and_judge(tmp_path / "x.tar")
    came, told = streamed(tmp_path / "x.tar")
    assert len(entries) == len(came) == 12
    assert says in damage
    assert [says in str(row["reason"]) for row in told] == ([True] if says else [])


def test_unsorted_tar_error_says_how_to_sort(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(ONLY_CREATED["labels behind all images"][0]())
    came, (row,) = streamed(tmp_path / "x.tar")
    assert [IMAGES.index(raw.image) for raw in came] == list(range(8))
    assert "8 members: apart from the image of their key" in row["reason"]
    assert "tar --sort=name" in str(row["reason"])


def test_compressed_tar_error_names_the_compression(tmp_path: Path) -> None:
    for name in ("x.tar", "y.tar.gz"):
        (tmp_path / name).write_bytes(gzip.compress(tar_of(simple("", range(8)))))
    with pytest.raises(UserError, match=r"x\.tar: is compressed with gzip .*decompress it"):
        write_source(str(tmp_path / "x.tar"), tmp_path / "set", SourceOptions(), Recipe())
    crops = {"global_crops": {"size": 8}, "local_crops": [{"size": 6, "count": 1}], "workers": 0}
    values = {"data": {"train": f"{tmp_path}/y.tar.gz", **crops}, "train": {"global_batch": 4}}
    with pytest.raises(UserError, match=r"data\.epoch_samples: not set; .*y\.tar\.gz is a compressed tar"):
        open_data(validate(values, "test"))
    values["data"]["epoch_samples"] = 8  # type: ignore[index]
    config = validate(values, "test")
    run = list(batches(config, open_data(config), 0, 1, 0, 4))
    for epoch in (run[:2], run[2:]):
        assert sorted(key for batch in epoch for key in batch.keys) == [str(i) for i in range(8)]
    assert next(batches(config, open_data(config), 0, 1, 3, 4)).keys == run[3].keys


def test_batches_are_filled_with_decodable_samples(tmp_path: Path) -> None:
    """Groups without an image take no place; a picture that cannot be decoded does, and is replaced."""
    (tmp_path / "x.tar").write_bytes(tar_of([*macos(), ("broken.png", b"\x89PNG"), ("empty.png", b"")]))
    crops = {"global_crops": {"size": 8}, "local_crops": [{"size": 6, "count": 1}], "workers": 0}
    data = {"train": f"{tmp_path}/x.tar", "epoch_samples": 8, **crops}
    config = validate({"data": data, "train": {"global_batch": 8}}, "test")
    (batch,) = batches(config, open_data(config), 0, 1, 0, 1)
    assert {f"p/{i}" for i in range(6)} <= set(batch.keys)
    assert {row["key"] for row in batch.bad if not row.get("used")} == {"broken", "empty"}


@pytest.mark.parametrize(
    ("name", "key", "ext"),
    [
        ("a/b.seg.png", "a/b", "seg.png"),
        ("./a/x.JPG", "a/x", "jpg"),
        ("22.07.png", "22.07", "png"),
        ("v1.2.left.jpg", "v1.2", "left.jpg"),
        ("a.b/c", "a.b/c", ""),
        ("x.tar.gz", "x", "tar.gz"),
        ("/../x.0.png", "x.0", "png"),
    ],
)
def test_names_are_split_into_key_and_extension(name: str, key: str, ext: str) -> None:
    assert split_name(name) == (key, ext)
    assert bool(no_sample(name)) == (not ext)


def test_joining_members_uses_little_memory() -> None:
    """Images first, labels afterwards: the members' places are kept in a file, not in memory."""
    n = 2_000
    tracemalloc.start()
    runs = ((0, Entry(f"folder/s{i % n:07d}", {("png", "cls")[i // n]: (1024 * i, 100)})) for i in range(2 * n))
    count = sum(len(entry.members) == 2 for entry in joined(runs))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == n
    assert peak < 120 * 2 * n + 200_000


def test_stream_reader_equals_file_reader() -> None:
    """`Forward` over a stream that gives few bytes at a time, with steps back of up to a block."""

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 100) if size and size > 0 else 100)

    data = joined_tars(3)
    assert list(TarReader(Forward(Slow(data)))) == list(TarReader(io.BytesIO(data), len(data)))  # type: ignore[arg-type]


STEMS = ["a", "b.c", "22.01", "22.02", "track 2.1 (live)", "d.0", "d.1", "d", "e/f", "./e/f", "/e/g", "../e/g", "UP"]
ENDINGS = ["png", "left.png", "right.png", "mask.png", "0.png", "PNG", "json", "txt", "left.json", "0.txt", "pickle"]
STRANGE = ["._a.png", ".DS_Store", "__MACOSX/._b.png", ".hidden.png", "README", "x.", "Thumbs.db", "PaxHeaders.1/a.png"]


@pytest.mark.parametrize("order", ["sorted", "shuffled", "twice"])
def test_every_member_is_used_or_counted(order: str, tmp_path: Path) -> None:
    """Combinations of the kinds, every member with bytes of its own."""
    rng = random.Random(order)
    for n in range(60):
        names = [f"{stem}.{rng.choice(ENDINGS)}" for stem in rng.choices(STEMS, k=rng.randint(1, 24))]
        names = sorted({*names, *rng.sample(STRANGE, rng.randint(0, 4)), "sure.png"}, key=lambda x: (split_name(x), x))
        if order != "sorted":
            rng.shuffle(names)
        members = [(name, b"%s %d %d" % (name.encode(), n, i)) for i, name in enumerate(names)]
        parts = [members] if order != "twice" else [members, [(name, data + b"!") for name, data in members]]
        (tmp_path / "x.tar").write_bytes(b"".join(map(tar_of, parts)))
        source = TarSource([tmp_path / "x.tar"], tmp_path, "none")
        items = [source.read(i) for i in range(len(source))]
        images = [item.data for item in items]
        used = {*images, *(data for item in items for data in item.extras.values())}
        everything = {data for part in parts for _, data in part}
        assert used <= everything
        assert len(used) + source.left_out.total() == len(everything), (names, source.left_out.rows())
        assert len(set(images)) == len(images)
        if order == "sorted":
            assert sorted(raw.image for raw in streamed(tmp_path / "x.tar")[0]) == sorted(images)
