"""Several students that one teacher teaches at once."""

import shutil
from pathlib import Path

import pytest
import torch

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.checkpoint import convert, state
from esvit_scale.checkpoint.backbone import load_backbone
from esvit_scale.errors import UserError
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.objective import costs
from esvit_scale.objective.network import build_network, build_student, configs_of_students
from esvit_scale.scaling import plan as plans
from tests import test_conformance as conformance
from tests.objective.distillation import BOTH, TEMP, planned, run

FURTHER = [
    {"trunk": "resnet50", "embed_dim": 8, "depths": [1, 1, 1], "drop_path": 0.2},
    {"trunk": "swin_t", "embed_dim": 8, "depths": [1, 1, 1], "heads": [1, 1, 2], "window": 4, "drop_path": 0.2},
]


@pytest.mark.parametrize("targets", BOTH)
def test_students_learn_as_each_does_alone(targets: str) -> None:
    """Every gradient is that of a network of its own with the same weights, bit for bit."""
    own = {"objective__targets": targets, "objective__regions": True, "objective__students": FURTHER}
    config = conformance.config_of("swin_t", "distill", **own)
    student, teacher = conformance.networks(config)
    crops, keys = conformance.crops_of(config), drop_keys(0, 0, torch.arange(conformance.IMAGES), 4)
    given = conformance.targets_of(student, teacher, crops)
    loss, logs, _ = student(crops, given, keys, TEMP)
    loss.backward()
    losses = []
    for number, alone in enumerate(configs_of_students(config)):
        prefix = f"students.{number - 1}." if number else ""
        network = build_student(alone)
        values = {n.removeprefix(prefix): p for n, p in student.named_parameters() if n.startswith(prefix)}
        values = {n: p for n, p in values.items() if not n.startswith("students.")}
        assert values.keys() == dict(network.named_parameters()).keys()
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(values[name])
        its_loss, its_logs, _ = network(crops, given, keys, TEMP)
        its_loss.backward()
        losses.append(its_loss.detach())
        for name, p in network.named_parameters():
            assert torch.equal(p.grad, values[name].grad), (number, name)
        if number:
            assert torch.equal(logs[f"loss_student{number - 1}"], its_loss)
            assert torch.equal(logs[f"loss_view_student{number - 1}"], its_logs["loss_view"])
    torch.testing.assert_close(loss.detach(), sum(losses))


@pytest.mark.slow
def test_further_students_are_saved_resumed_and_converted(
    shards: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At ZeRO 1, and as a run of ZeRO 3 that goes on at ZeRO 1."""
    own = {"objective__students": FURTHER, "train__steps": 4, "train__checkpoint_every": 2}
    rows = run(tmp_path / "run", shards, teacher, **own)
    assert all(row["loss"] > row["loss_student0"] + row["loss_student1"] for row in rows)
    assert rows[-1]["loss_student1"] != rows[0]["loss_student1"]
    for stage in ("zero1", "zero3"):
        source = tmp_path / "run"
        if stage == "zero3":
            run(source := tmp_path / "zero3", shards, teacher, **own, train__ds_config=stage)
        shutil.copytree(source, resumed := tmp_path / f"resumed-{stage}")
        shutil.rmtree(resumed / "checkpoints" / "step-00000004")
        (resumed / "checkpoints" / "latest").write_text("step-00000002\n")
        (resumed / "summary.json").unlink()
        again = run(resumed, shards, teacher, **own)
        if stage == "zero1":
            assert again == rows
        for row, expected in zip(again, rows, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=2e-5)
    stored = state.read_weights(tmp_path / "run" / "checkpoints" / "step-00000004").networks["teacher"]
    images = torch.randn(2, 3, 32, 32)
    for number, prefix in ((None, ""), (0, "students.0."), (1, "students.1.")):
        path = tmp_path / f"{number}.safetensors"
        convert.convert(tmp_path / "run", path, "esvit-scale", "safetensors", heads=True, student=number)
        trunk = load_backbone(path).trunk
        assert trunk.name == ("resnet50" if number == 0 else "swin_t")
        for name, value in trunk.state_dict().items():
            assert torch.equal(value, stored[f"{prefix}trunk.{name}"]), name
        assert trunk([images]).view.isfinite().all()
    command = ["convert", str(tmp_path / "run"), str(tmp_path / "x.safetensors"), "--from", "esvit-scale"]
    assert cli.main([*command, "--to", "safetensors", "--student", "2"]) == 2
    assert "no such further student (objective.students); there: 0 to 1" in capsys.readouterr().err


@pytest.mark.slow
def test_further_students_are_counted_and_refused_where_they_cannot_be() -> None:
    config = planned(students=[{"trunk": "swin_s"}])
    first, second = configs_of_students(config)
    assert second.model.trunk == "swin_s"
    teacher = 2 * costs.crop_flops(configs.resolve("swin_b"), 224)
    teacher += (2 + 2 * 49) * 2 * (1024 * 2048 + 2048**2 + 2048 * 256 + 256 * 65536)  # its heads, for its tokens
    assert costs.image_flops(config) == sum(map(costs.image_flops, (first, second))) - teacher
    assert costs.activation_bytes(config, "none").per_image == sum(
        costs.activation_bytes(one, "none").per_image for one in (first, second)
    )
    assert costs.parameters(config).trunk == sum(costs.parameters(one).trunk for one in (first, second))
    whole, alone = (plans.plan(c, 8, 80 * 2**30, None, None).settings[0].memory for c in (config, first))
    assert whole.frozen == alone.frozen
    assert whole.masters > alone.masters
    with pytest.raises(UserError, match=r"^objective\.students: esvit trains one student"):
        build_network(conformance.config_of("swin_t", "esvit", objective__students=[{"trunk": "swin_s"}]))
    with pytest.raises(UserError, match=r"objective\.students: one norm of all gradients"):
        configs.resolve("swin_t", ["objective.students=[{trunk: swin_s}]", "optim.clip_by=global"])
