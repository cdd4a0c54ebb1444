"""Extraction over batches, and the file that `embed` leaves."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from esvit_scale.data import stream
from esvit_scale.errors import UserError
from esvit_scale.evaluate import features as module
from esvit_scale.evaluate.features import FeatureSet, Teacher, extract, raw_pixels, run_embed, save, write_atomically


class Mean(nn.Module):
    """A trunk whose view feature is the mean colour; remembers whether it was in training mode."""

    def forward(self, crops: list[torch.Tensor]) -> SimpleNamespace:
        self.saw_training = self.training
        return SimpleNamespace(view=crops[0].mean((2, 3)))


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    images = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def batches(source, size, batch, workers, rank, world_size):
        for i in range(0, 10, batch):
            part = range(i, min(i + batch, 10))
            yield images[i : i + batch], [f"key{j}" for j in part], torch.tensor([j % 3 for j in part])

    monkeypatch.setattr(stream, "evaluation_batches", batches, raising=False)
    return images


def test_every_image_once_in_order(images: torch.Tensor) -> None:
    trunk = Mean()
    found = extract(trunk, Path("x"), 8, batch=4, device="cpu")
    assert torch.equal(found.features, images.mean((2, 3)))
    assert found.keys == [f"key{i}" for i in range(10)]
    assert found.labels.tolist() == [i % 3 for i in range(10)]
    assert not trunk.saw_training
    assert trunk.training  # left as it was


def test_bf16_features_are_stored_as_fp32(images: torch.Tensor) -> None:
    found = extract(Mean(), Path("x"), 8, batch=4, device="cpu", precision="bf16")
    assert found.features.dtype == torch.float32


def test_raw_pixels(images: torch.Tensor) -> None:
    assert torch.equal(raw_pixels(Path("x"), 8, batch=3).features, images.flatten(1))


def test_empty_source_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "evaluation_batches", lambda *_: iter(()), raising=False)
    with pytest.raises(UserError, match="no readable image"):
        extract(Mean(), Path("nothing"), 8, device="cpu")


def test_ranks_are_joined_in_order(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    other = (np.full((2, 3), 7, np.float32), ["z1", "z2"], np.array([1, 2]))
    monkeypatch.setattr(module.collectives, "gather_objects", lambda part: [part, None, other])
    found = extract(Mean(), Path("x"), 8, batch=4, device="cpu")
    assert found.keys[-3:] == ["key9", "z1", "z2"]
    assert found.features.shape == (12, 3)
    assert found.labels.tolist()[-2:] == [1, 2]


def test_file_loads_without_pickle(tmp_path: Path) -> None:
    found = FeatureSet(torch.randn(3, 4), ["a/1", "ü", "c"], torch.tensor([0, -1, 2]))
    save(found, tmp_path / "deep" / "f.npz")
    with np.load(tmp_path / "deep" / "f.npz", allow_pickle=False) as data:
        assert sorted(data) == ["features", "keys", "labels"]
        assert data["keys"].tolist() == found.keys
        assert data["labels"].dtype == np.int64
        np.testing.assert_array_equal(data["features"], found.features.numpy())
        assert data["features"].dtype == np.float32


def test_embed_writes_the_named_file(images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_teacher", lambda path: Teacher(Mean(), 8, 400))
    run_embed(tmp_path / "run", Path("data"), tmp_path / "f.npz", device="cpu")
    with np.load(tmp_path / "f.npz", allow_pickle=False) as data:
        assert data["features"].shape == (10, 3)
    with pytest.raises(UserError, match="is a folder"):
        run_embed(tmp_path / "run", Path("data"), tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_step_is_read_from_run_and_step_dirs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000400").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step-00000400\n")
    assert module._step_of(run) == 400
    assert module._step_of(run / "checkpoints" / "step-00000012") == 12
    assert module._step_of(tmp_path) is None
