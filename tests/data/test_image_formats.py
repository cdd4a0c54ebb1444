"""The image format of a set, and other libraries that read it."""

import io
from pathlib import Path

import pytest
from PIL import Image

from esvit_scale.data import manifest as manifests
from esvit_scale.data.reencode import Reencode
from esvit_scale.data.shard_plan import Recipe
from tests.data.conftest import encoded, picture
from tests.data.source_helpers import Capture, contents, run_create, write


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    for i in range(12):
        kind = ["JPEG", "PNG", "WEBP"][i % 3]
        path = tmp_path / "mixed" / "ab"[i % 2] / f"{i}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i), kind))
    return tmp_path / "mixed"


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "keep"])
def test_format_option_gives_one_image_type(form: str, mixed: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run_create(mixed, tmp_path / "set", "--format", form) == 0
    manifest = manifests.load(tmp_path / "set")
    said = capsys.readouterr().err
    if form == "keep":
        assert manifest.formats == {"jpeg": 4, "png": 4, "webp": 4}
        assert "images of several types (4 .jpeg, 4 .png, 4 .webp)" in said
    else:
        assert (manifest.formats, said) == ({form: 12}, "")
        kinds = {Image.open(io.BytesIO(data)).format for data in contents(manifest)}
        assert kinds == {{"jpg": "JPEG"}.get(form, form.upper())}


def test_webdataset_and_hugging_face_read_our_shards(mixed: Path, tmp_path: Path) -> None:
    """What docs/your_data.md says of Hugging Face datasets, webdataset and torch's DataLoader."""
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    import webdataset
    from torch.utils.data import DataLoader

    write(mixed, tmp_path / "one", Recipe(reencode=Reencode(format="jpeg")))
    write(mixed, tmp_path / "several", Recipe())

    def read(name: str) -> object:
        urls = str(tmp_path / name / "*.tar")
        return datasets.load_dataset("webdataset", data_files=urls, split="train", cache_dir=str(tmp_path / "cache"))

    rows = list(read("one"))  # type: ignore[call-overload]
    assert (len(rows), {row["cls"] for row in rows}, rows[0]["jpg"].size) == (12, {0, 1}, (20, 16))
    with pytest.raises(ValueError, match="same types"):
        read("several")
    for name in ("one", "several"):
        tars = [str(path) for path in (tmp_path / name).glob("*.tar")]
        stream = webdataset.WebDataset(tars, shardshuffle=False).decode("pil")
        samples = list(DataLoader(stream, batch_size=None, num_workers=0))
        assert len(samples) == 12
        assert all(
            isinstance(next(v for k, v in s.items() if k in ("jpg", "jpeg", "png", "webp")), Image.Image)
            for s in samples
        )
