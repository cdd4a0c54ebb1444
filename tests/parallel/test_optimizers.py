"""LAMB and LARS on flat tensors, against their definition for one parameter, in float64."""

import pytest
import torch
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.config import Optim
from esvit_scale.errors import UserError
from esvit_scale.parallel import optimizers
from esvit_scale.parallel.zero import Partition

SHAPES: dict[str, list[tuple[int, ...]]] = {"decay": [(4, 5), (3, 2)], "no_decay": [(7,), (2,)]}
LR, DECAY, STEPS = 0.1, 0.3, 4


def one_rank(measured: Tensor) -> Tensor:
    """The sum over a single rank."""
    return measured


def slow(
    name: str, values: dict[str, list[Tensor]], gradients: list[dict[str, list[Tensor]]]
) -> dict[str, list[Tensor]]:
    """Return the parameters after the published updates, computed one parameter at a time."""
    result: dict[str, list[Tensor]] = {group: [] for group in values}
    for group, tensors in values.items():
        decay = DECAY if group == "decay" else 0.0
        for i, start in enumerate(tensors):
            w = start.clone()
            m, v, b = (torch.zeros_like(start) for _ in range(3))
            for t, of_step in enumerate(gradients, start=1):
                g = of_step[group][i]
                if name == "lamb":
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                    update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + decay * w
                else:
                    update = g + decay * w
                if group == "decay":
                    update = update * (w.norm() / update.norm()) * (1 if name == "lamb" else 0.001)
                b = update if name == "lamb" else 0.9 * b + update
                w = w - LR * b
            result[group].append(w)
    return result


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_layer_wise_updates_equal_the_published_ones(name: str) -> None:
    def random() -> dict[str, list[Tensor]]:
        return {g: [torch.randn(s, dtype=torch.float64) for s in shapes] for g, shapes in SHAPES.items()}

    values, gradients = random(), [random() for _ in range(STEPS)]
    flats, partitions = {}, []
    for group, tensors in values.items():
        flat = torch.cat([t.flatten() for t in tensors]).requires_grad_()
        offset = 0
        for i, tensor in enumerate(tensors):
            partitions.append(Partition(f"{group}{i}", tensor.shape, 0, tensor.numel(), flat, offset))
            offset += tensor.numel()
        flats[group] = flat
    optimizer = optimizers.build(
        Optim(name=name), [{"name": group, "params": [flat]} for group, flat in flats.items()], flat=True
    )
    assert isinstance(optimizer, optimizers.LayerWise)
    optimizer.own(partitions, [p.name for p in partitions], one_rank)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = LR, DECAY if group["name"] == "decay" else 0.0
    for of_step in gradients:
        for group, flat in flats.items():
            flat.grad = torch.cat([g.flatten() for g in of_step[group]])
        optimizer.step()
    expected = slow(name, values, gradients)
    for partition in partitions:
        right = expected[partition.name[:-1]][int(partition.name[-1])].flatten()
        # The trusts travel between ranks in fp32.
        torch.testing.assert_close(partition.master, right, rtol=1e-6, atol=1e-6)


def test_group_without_gradients_stays_unchanged() -> None:
    flat, other = (torch.ones(3, requires_grad=True) for _ in range(2))
    groups = [{"name": "decay", "params": [flat]}, {"name": "last_layer", "params": [other]}]
    optimizer = optimizers.build(Optim(name="lamb"), groups, flat=True)
    assert isinstance(optimizer, optimizers.LayerWise)
    partitions = [Partition("a", flat.shape, 0, 3, flat, 0), Partition("b", other.shape, 0, 3, other, 0)]
    optimizer.own(partitions, ["a", "b"], one_rank)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    flat.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(flat, torch.ones(3))
    assert torch.equal(other, torch.ones(3))
    assert other not in optimizer.state


@pytest.mark.parametrize(("name", "instead"), [("apex_adam", "adamw"), ("apex_lamb", "lamb")])
def test_missing_apex_is_refused(name: str, instead: str) -> None:
    pytest.importorskip("torch")
    try:
        import apex.optimizers  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=f"{name}: NVIDIA apex is not installed; use {instead}"):
            optimizers.build(Optim(name=name), [{"params": [torch.ones(1)]}], flat=True)
    else:
        pytest.skip("apex is installed")


def test_every_optimizer_has_named_moments() -> None:
    names = configs.Optim.model_fields["name"].annotation.__args__  # type: ignore[union-attr]
    assert set(names) == set(optimizers.MOMENTS)
