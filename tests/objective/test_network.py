import pytest
import torch

from esvit_scale.config import validate
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initialize
from esvit_scale.models.trunk import Features, SignalFeatures
from esvit_scale.objective.network import build_student, build_teacher, watched
from tests.objective.test_param_groups import SMALL

B = 2


def pair(dtype=torch.float32, **sections):
    config = validate({**SMALL, **sections}, where="test")
    networks = build_student(config), build_teacher(config)
    for seed, network in enumerate(networks):
        initialize(network, seed)
        network.to(dtype)
    return networks


def crops_of(*groups):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n * B, 3, s, s, generator=generator) for n, s in groups]


@pytest.mark.parametrize("groups", [[(2, 32)], [(2, 32), (3, 16)], [(2, 32), (1, 24), (2, 12)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient_for_any_crops(groups, dtype):
    """A parameter without one would be re-applied its old gradient under ZeRO-3."""
    student, teacher = pair(dtype)
    crops = crops_of(*groups)
    with torch.no_grad():
        targets = teacher(crops[:1])
    keys = drop_keys(0, 0, torch.arange(B), sum(n for n, _ in groups))
    loss, logs, _ = student(crops, targets, keys, teacher_temp=0.04)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert 0 < logs["teacher_entropy_view"] <= torch.tensor(16.0).log() + 1e-4


def test_teacher_returns_targets_without_gradients():
    _, teacher = pair()
    crops = crops_of((2, 32), (2, 16))
    targets = teacher(crops[:1])
    assert not any(t.requires_grad for t in (*targets.view, *targets.region, targets.features))
    assert targets.view.z.shape == (2 * B, 4)
    assert targets.region.z.shape == (2 * B * 16, 4)
    assert targets.images == B


def test_loss_does_not_depend_on_the_batch_around_equal_images():
    """The mean over a batch of two is the mean of the two alone, drop path included."""
    student, teacher = pair(torch.float64, model={**SMALL["model"], "drop_path": 0.5})
    crops = [x.double() for x in crops_of((2, 32), (3, 16))]

    def loss(images):
        part = [x.view(-1, B, *x.shape[1:])[:, images].flatten(0, 1) for x in crops]
        keys = drop_keys(0, 4, torch.tensor(images), 5)
        with torch.no_grad():
            return student(part, teacher(part[:1]), keys, 0.04)[0].item()

    assert loss([0, 1]) == pytest.approx((loss([0]) + loss([1])) / 2, abs=1e-12)
    assert loss([0]) != pytest.approx(loss([1]), abs=1e-3)


def test_parameter_names_are_stable():
    names = {name for name, _ in pair()[0].named_parameters()}
    assert "trunk.patch_embed.proj.weight" in names
    assert "objective.view_head.last_layer.weight_v" in names
    assert "objective.region_head.mlp.4.bias" in names


def test_monitors_watch_another_modality_where_a_sample_has_no_image():
    """Crops of missing images are all alike; they would look like collapsed features."""
    view, audio, text = torch.randn(2 * 4, 3), torch.randn(2 * 4, 3), torch.randn(4, 3)
    heard, has_text = torch.tensor([1, 1, 0, 0] * 2).bool(), torch.tensor([1, 1, 1, 0]).bool()
    signals = {
        "audio": SignalFeatures(audio, audio[:, None], heard[:, None], heard),
        "text": SignalFeatures(text, text[:, None], has_text[:, None], has_text),
    }
    found = watched(Features(view, view, [(8, 1, 1)], signals, torch.tensor([True, False, False, False])))
    torch.testing.assert_close(
        found, torch.stack([view[0], audio[1], text[2], view[3], view[4], audio[1], text[2], view[7]])
    )
    assert torch.equal(watched(Features(view, view, [(8, 1, 1)])), view)
