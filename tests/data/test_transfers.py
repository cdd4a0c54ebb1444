"""A batch reaches the device in one transfer per resolution and one for everything else, and nothing waits for it.

The meta device stands in for a GPU: it is a device other than the CPU, so that copies to it are seen, and reading a value
from it is an error.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esvit_scale.config import Config
from esvit_scale.data import photometric
from esvit_scale.data.crops import keyed_generator
from esvit_scale.data.stream import Batch, micro_batches
from tests.data.test_photometric import drawn, images
from tests.host_waits import HostWaits

META = torch.device("meta")


class Transfers(TorchDispatchMode):
    """A context that counts copies from the CPU to the meta device.

    Attributes:
        sent: number of elements of each copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator._schema.name in ("aten::_to_copy", "aten::copy_", "aten::_copy_from"):
            source = args[1] if operator._schema.name == "aten::copy_" else args[0]
            if source.device.type == "cpu" and result.device == META:
                self.sent.append(source.numel())
        return result


def batch_of(config: Config, count: int) -> Batch:
    """A batch of random pixels with parameters as they are drawn for images."""
    generator = torch.Generator().manual_seed(0)
    views = [config.crop_sizes.count(size) for size in dict.fromkeys(config.crop_sizes)]
    pixels = [
        torch.randint(0, 256, (v, count, size, size, 3), dtype=torch.uint8, generator=generator).permute(0, 1, 4, 2, 3)
        for v, size in zip(views, dict.fromkeys(config.crop_sizes), strict=True)
    ]
    params = photometric.stack(
        [
            [
                photometric.draw_params(keyed_generator(0, 0, str(i), v), photometric.ESVIT[min(v, 2)])
                for i in range(count)
            ]
            for v in range(sum(views))
        ]
    )
    positions = torch.arange(count)
    return Batch(pixels, params, positions, [str(i) for i in range(count)], -torch.ones(count), [], 0)


@pytest.mark.parametrize("accum", [1, 2])
def test_a_batch_takes_one_transfer_per_resolution_and_one_for_the_rest(accum: int) -> None:
    config = Config.model_validate({"train": {"grad_accum": accum}, "data": {"global_crops": {"size": 32}}})
    batch = batch_of(config, 8)
    micro_batches(config, batch, META, torch.bfloat16)  # copies mean, standard deviation and hue offsets once
    with Transfers() as transfers, HostWaits() as waits:
        micro = micro_batches(config, batch, META, torch.bfloat16)
    small = transfers.sent[0]
    assert transfers.sent[1:] == [group.numel() for group in batch.crops]
    assert small < 8 * 100 * len(config.crop_sizes) * 2, "bytes: indices and values of at most six operations per crop"
    assert {place.split(" at ")[0] for place in waits.places} <= {"nonzero"}, "on the host"
    assert len(micro) == accum
    assert all(t.device == META for m in micro for t in (*m.crops, m.positions))


def test_tensors_that_share_a_transfer_arrive_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is the CPU's own here: the packing and unpacking must give back every value, dtype and shape."""
    tensors = [
        torch.arange(5),
        torch.randn(3, 7),
        torch.tensor([True, False, True]),
        torch.empty(0),
        torch.randn(2, 3, dtype=torch.float64).t(),
        torch.randn(5).bfloat16(),
    ]

    class Elsewhere:
        type = "elsewhere"

    real = torch.Tensor.to
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda t, *a, **k: t.clone() if isinstance(a[0], Elsewhere) else real(t, *a))
        arrived = photometric.send_together(tensors, Elsewhere())  # type: ignore[arg-type]
    for before, after in zip(tensors, arrived, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)


def test_a_plan_names_the_crops_of_every_operation_in_order() -> None:
    params = drawn(64, 1)
    planned = photometric.plan(params)
    names = [operation.function.__name__ for operation in planned.operations]
    assert names[-3:] == ["_grayscale", "_blur", "_solarize"]
    for operation in planned.operations[-3:]:
        rows = planned.rows[operation.first : operation.first + operation.crops].tolist()
        chosen = {"_grayscale": params.grayscale, "_blur": params.radius > 0, "_solarize": params.solarize}
        assert rows == chosen[operation.function.__name__].nonzero().flatten().tolist()
    assert sum(o.crops for o in planned.operations if o.function.__name__ == "_hue") == int((params.order >= 0).sum())
    x = images(6)
    six = photometric.BatchAugmentationParams(*(field[:6] for field in params))
    assert torch.equal(photometric.run(x, photometric.plan(six)), photometric.apply(x, six))
