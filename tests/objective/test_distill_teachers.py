"""Teachers that do not fit their student are refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from esvit_scale import cli
from esvit_scale.checkpoint import frozen_teacher
from esvit_scale.errors import UserError
from esvit_scale.objective.network import build_frozen_teacher, build_network
from tests import tiny
from tests.objective.distillation import config_of, write_teacher


def message(capsys: pytest.CaptureFixture[str], folder: Path, shards: Path, *overrides: str) -> str:
    """What `pretrain` says, with exit code 2 and before anything is written."""
    path = tiny.write_config(folder / "run.yaml", tiny.config(folder / "run", shards))
    capsys.readouterr()
    assert cli.main(["pretrain", str(path), "objective.name=distill", "objective.regions=true", *overrides]) == 2
    assert not (folder / "run" / "config.yaml").exists()
    text = capsys.readouterr().err.strip().splitlines()[-1]
    return text


def test_teachers_that_do_not_fit_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], shards: Path, teacher: Path, tmp_path: Path
) -> None:
    def said(**changes: Any) -> str:
        with pytest.raises(UserError) as error:
            frozen_teacher.described_in(config_of(tmp_path / "run", shards, **{"teacher": teacher, **changes}))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "objective.teacher: distill needs the weights of a teacher" in message(capsys, tmp_path, shards)
    missing = message(capsys, tmp_path, shards, "objective.teacher=nowhere")
    assert "objective.teacher: nowhere: no such file or folder" in missing
    bare = write_teacher(tmp_path / "bare.safetensors", heads=False)
    assert "holds no view head, region head, whose prototypes" in message(
        capsys, tmp_path, shards, f"objective.teacher={bare}"
    )
    # Cells of 8 pixels where the student's have 16.
    finer = {"model__depths": [1, 1], "model__heads": [1, 2]}
    other = write_teacher(tmp_path / "finer.safetensors", **finer)
    assert "makes 4 × 4 regions of a crop of 32 pixels, and the student swin_t 2 × 2" in said(teacher=other)
    frozen_teacher.described_in(config_of(tmp_path / "run", shards, other, objective__regions=False))
    vit = {"model__trunk": "deit_s", "model__depths": [1], "model__heads": [4], "model__embed_dim": 32}
    of_16 = write_teacher(tmp_path / "vit.safetensors", heads=False, **vit)
    finer_student = said(teacher=of_16, objective__targets="cosine", **finer)
    assert "makes 2 × 2 regions of a crop of 32 pixels, and the student swin_t 4 × 4" in finer_student
    coarser = [{"trunk": "swin_t", "embed_dim": 8, "depths": [1, 1, 1, 1], "heads": [1, 1, 1, 1], "window": 4}]
    assert "and the student swin_t 1 × 1" in said(objective__students=coarser)
    four = {"data__channels": 4, "data__mean": [0.5] * 4, "data__std": [0.2] * 4}
    other = write_teacher(tmp_path / "four.safetensors", **four)
    assert "was trained on images of 4 channels, but data.channels=3" in said(teacher=other)
    other = write_teacher(tmp_path / "half.safetensors", data__mean=[0.5] * 3, data__std=[0.5] * 3)
    assert said(teacher=other).endswith("set data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5]")
    assert said(objective__prototypes=32) == "objective.prototypes: 32, but the teacher's heads have 64; set it to 64"
    with pytest.raises(UserError, match=r"objective\.teacher: esvit has no frozen teacher"):
        build_network(tiny.config(tmp_path, shards, objective__teacher="x"))
    with pytest.raises(UserError, match=r"distill with objective\.regions=true has no loss of masked regions"):
        build_network(config_of(tmp_path, shards, teacher, objective__mask_weight=1.0))


@pytest.mark.slow
def test_timm_weights_teach_by_name(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm gives them, normalised as timm wants; without a network or a cache, one line."""
    create, kept = timm.create_model, []

    def pretrained(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        network = create(*args, **kwargs)
        if pretrained:
            kept.append(network)
            torch.manual_seed(0)
            for p in network.parameters():
                p.data = 0.1 * torch.randn_like(p)
        return network

    monkeypatch.setattr(timm, "create_model", pretrained)
    of_timm = Path("timm:test_convnext")
    own = {"objective__targets": "cosine", "objective__regions": False}
    with pytest.raises(UserError, match=r"set data\.mean=\[0\.5,0\.5,0\.5\] data\.std=\[0\.5,0\.5,0\.5\]$"):
        frozen_teacher.described_in(config_of(tmp_path / "run", shards, of_timm, **own))
    own |= {"data__mean": [0.5] * 3, "data__std": [0.5] * 3}
    config = frozen_teacher.described_in(config_of(tmp_path / "run", shards, of_timm, **own))
    network = build_frozen_teacher(config, build_network(config).objective).eval()
    network.load_state_dict(frozen_teacher.load(config).values)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = F.normalize(kept[-1].eval()(images))
        torch.testing.assert_close(network([images]).view, expected, rtol=1e-5, atol=1e-5)

    def offline(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        if pretrained:
            raise OSError("no network\nand no cache")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"^objective.teacher: timm:test_convnext: [^\n]* at hand: no network$"):
        frozen_teacher.described_in(config_of(tmp_path / "run", shards, of_timm, **own))
    with pytest.raises(UserError, match=r"^objective.teacher: model.trunk: timm has no network 'none'[^\n]*$"):
        frozen_teacher.described_in(config_of(tmp_path / "run", shards, Path("timm:none"), **own))


@pytest.mark.slow
def test_teachers_for_other_crops_are_refused_in_one_line(shards: Path, tmp_path: Path) -> None:
    """A network of timm that takes the sizes of its own crops alone."""
    own = {"model__trunk": "timm:mixer_s32_224", "model__drop_path": 0.0, "data__local_crops": []}
    own |= {f"model__{key}": None for key in ("embed_dim", "depths", "heads")}
    sized = write_teacher(tmp_path / "mixer.safetensors", heads=False, data__global_crops={"size": 224}, **own)
    config = config_of(tmp_path / "run", shards, sized, objective__targets="cosine", objective__regions=False)
    with pytest.raises(UserError, match=r"takes no crops of 32 pixels \([^\n]*set data.global_crops.size=224$"):
        frozen_teacher.described_in(config)
