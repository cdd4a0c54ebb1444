"""Our batch norm against torch's, over ranks against one process, and under recomputation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esvit_scale.models.batch_norm import BatchNorm
from esvit_scale.parallel import activation_checkpointing, collectives

SHAPES = [(6, 5), (4, 5, 3, 2)]


def pair(channels: int, affine: bool = True) -> tuple[BatchNorm, nn.Module]:
    """Ours and torch's with the same values, double precision."""
    theirs = nn.SyncBatchNorm(channels, affine=affine).double()
    for tensor in theirs.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    ours = BatchNorm(channels, affine=affine).double()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"})
    reference = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    plain = nn.ModuleList([reference[d](channels, affine=affine).double() for d in (2, 4)])
    for module in plain:
        module.load_state_dict(theirs.state_dict())
    return ours, plain


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_gradients_and_statistics_match_torch(shape: tuple[int, ...], training: bool, affine: bool) -> None:
    ours, plain = pair(5, affine)
    theirs = plain[0 if len(shape) == 2 else 1]
    ours.train(training)
    theirs.train(training)
    x = (3 * torch.randn(*shape, dtype=torch.float64) + 2).requires_grad_()
    y = x.detach().clone().requires_grad_()
    grad = torch.randn(*shape, dtype=torch.float64)
    for _ in range(2):
        a, b = ours(x), theirs(y)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    a.backward(grad)
    b.backward(grad)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=name)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(name), rtol=1e-12, atol=1e-12, msg=name)


def test_half_precision_statistics_are_fp32() -> None:
    """256 numbers near 1000 with spread 1: in bf16 their mean square says nothing about their variance."""
    norm = BatchNorm(1).train()
    x = (1000 + torch.randn(256, 1)).bfloat16()
    exact = x.double()
    norm(x)
    assert norm.running_var.dtype == torch.float32
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * exact.var(0), rtol=1e-4, atol=0)


def test_variance_of_a_constant_channel_is_not_negative() -> None:
    norm = BatchNorm(64, eps=1e-3).train()
    norm.running_var.zero_()
    norm(torch.randn(64).expand(8, 64))
    assert norm.running_var.min() >= 0
    assert norm.running_var.max() <= 1e-9  # rounding of 1/√eps squared, relative 1e-7


def test_nonfinite_batch_does_not_change_the_statistics() -> None:
    norm = BatchNorm(3).train()
    norm(torch.randn(4, 3))
    before = norm.running_mean.clone(), norm.running_var.clone()
    bad = torch.randn(4, 3)
    bad[1, 2] = torch.nan
    assert not norm(bad).isfinite().all()
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])


class OneBlock(nn.Module):
    """What activation checkpointing asks of a trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), BatchNorm(3), nn.ReLU())
        self.run_block: Any = lambda block, *args: block(*args)

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.block]

    def forward(self, x: Tensor) -> Tensor:
        return self.run_block(_without_plan(self.block), x, None)


def _without_plan(block: nn.Module) -> Any:
    return lambda x, plan: block(x)


@pytest.mark.parametrize("implementation", ["none", "selective", "torch", "deepspeed", "fairscale"])
def test_recomputation_updates_statistics_once(implementation: activation_checkpointing.Implementation) -> None:
    torch.manual_seed(0)
    trunk, x = OneBlock(), torch.randn(8, 3)
    start = {k: v.clone() for k, v in trunk.state_dict().items()}
    plain = OneBlock()
    plain.load_state_dict(start)
    activation_checkpointing.apply(trunk, implementation)
    for module in (trunk, plain):
        module(x.clone().requires_grad_()).square().sum().backward()
    for (name, a), b in zip(trunk.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, start[name])
    for p, q in zip(trunk.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def _of_rank(rank: int, world: int, x: Tensor, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(_normed(x.chunk(world)[rank], world), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _normed(x: Tensor, world: int) -> dict[str, Tensor]:
    """Gradients as data parallelism has them: each rank's mean over its own rows, averaged over ranks."""
    norm = BatchNorm(x.shape[1]).double().train()
    x = x.clone().requires_grad_()
    y = norm(x)
    everyone = collectives.gather_rows(y)  # [n, C], every rank's rows
    weights = torch.arange(1.0, everyone.numel() + 1, dtype=y.dtype).view_as(everyone).sin()
    loss = (y.square().sin().sum(1) * (weights * everyone).sum().cos()).mean()
    loss.backward()
    parameters = {f"grad {n}": collectives.all_reduce_mean_(p.grad.clone()) for n, p in norm.named_parameters()}
    return {"y": y.detach(), "grad x": x.grad / world, **parameters, **dict(norm.named_buffers())}


@pytest.fixture
def whole_and_ranks(tmp_path: Path) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    x = torch.randn(8, 3, dtype=torch.float64)
    torch.multiprocessing.spawn(_of_rank, (2, x, str(tmp_path)), nprocs=2)
    return _normed(x, 1), [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_match_one(whole_and_ranks: tuple[dict[str, Tensor], list[dict[str, Tensor]]]) -> None:
    whole, ranks = whole_and_ranks
    for name, expected in whole.items():
        got = torch.cat([of[name] for of in ranks]) if name in ("y", "grad x") else ranks[0][name]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, msg=name)
