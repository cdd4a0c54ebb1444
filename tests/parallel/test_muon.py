"""Muon against a slow loop over single matrices in float64, with the matrices cut over one and several ranks."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.checkpoint import state
from esvit_scale.config import Optim
from esvit_scale.data.stream import MicroBatch
from esvit_scale.errors import UserError
from esvit_scale.objective.network import build_network
from esvit_scale.objective.param_groups import MATRICES, Matrix, hidden_matrices, parameter_groups
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import collectives, muon, optimizers
from esvit_scale.parallel import world as worlds
from esvit_scale.parallel.zero import Partition
from esvit_scale.train import pretraining
from esvit_scale.train.trainer import Trainer
from tests import tiny

LR, DECAY, STEPS = 0.1, 0.3, 4
# Three fused matrices, a tall, a wide and a square one, and one of which the last of three ranks has nothing.
SHAPES: dict[str, tuple[int, ...]] = {
    "qkv": (12, 5),
    "tall": (7, 3),
    "wide": (3, 8),
    "conv": (4, 2, 2, 1),
    "small": (2, 2),
}
STACKED = {"qkv": 3}
BIAS = "bias"  # a parameter of AdamW's
# 4 steps of sums of at most 16 products in float64; the polynomial's slope at zero, 3.4⁵ = 485, enlarges their rounding.
TOLERANCE = 1e-11


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def orthogonalised(x: Tensor) -> Tensor:
    """The published iteration for one matrix, without transposing tall ones."""
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def slow(values: dict[str, Tensor], gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the parameters after the published updates, computed one matrix at a time."""
    result = {}
    for name, start in values.items():
        w, b = start.clone(), torch.zeros_like(start)
        m, v = torch.zeros_like(start), torch.zeros_like(start)
        for t, of_step in enumerate(gradients, start=1):
            g = of_step[name]
            if name == BIAS:
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                w = w - LR * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                continue
            b = 0.95 * b + 0.05 * g
            updates = []
            for one in (0.05 * g + 0.95 * b).flatten(1).chunk(STACKED.get(name, 1)):
                updates.append(orthogonalised(one) * 0.2 * max(one.shape) ** 0.5)
            w = w - LR * (torch.cat(updates).view(w.shape) + DECAY * w)
        result[name] = w
    return result


def matrices() -> list[Matrix]:
    found = []
    for name, shape in SHAPES.items():
        count = STACKED.get(name, 1)
        rows, columns = shape[0] // count, torch.Size(shape[1:]).numel()
        found += [Matrix(name, i * rows * columns, rows, columns) for i in range(count)]
    return found


class Rank:
    """What one rank steps: for each name, the interval of the parameter that it owns and the tensor it lies in."""

    def __init__(self, layout: str, rank: int, world: int, values: dict[str, Tensor]) -> None:
        self.intervals: dict[str, tuple[int, int]] = {}
        begin, size = 0, -(-sum(values[name].numel() for name in SHAPES) // world)
        for name in SHAPES:
            n = values[name].numel()
            if layout == "whole":
                first, last = 0, n
            elif layout == "equal parts":
                part = -(-n // world)
                first, last = min(rank * part, n), min((rank + 1) * part, n)
            else:  # one flat buffer of all matrices, cut where it happens to be
                first, last = (min(max(end - begin, 0), n) for end in (rank * size, (rank + 1) * size))
            begin += n
            self.intervals[name] = first, last
        together = [[name] for name in SHAPES] if layout == "whole" else [list(SHAPES)]
        self.partitions, self.stepped = [], {}
        self.flats: list[tuple[list[str], Tensor]] = []
        for names in together:
            flat = torch.cat([values[name].flatten()[slice(*self.intervals[name])] for name in names])
            flat = torch.cat([flat, flat.new_zeros(2)])  # padding
            offset = 0
            for name in names:
                first, last = self.intervals[name]
                if first < last:
                    self.partitions.append(Partition(name, values[name].shape, first, last - first, flat, offset))
                offset += last - first
                self.stepped[name] = flat
            self.flats.append((names, flat))
        self.bias = values[BIAS].clone()
        groups = [
            {"name": MATRICES, "params": [flat for _, flat in self.flats]},
            {"name": "no_decay", "params": [self.bias]},
        ]
        self.optimizer = optimizers.build(Optim(name="muon"), groups, flat=layout != "whole")
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = LR, 0.0 if group["name"] == "no_decay" else DECAY

    def train(self, gradients: list[dict[str, Tensor]]) -> None:
        assert isinstance(self.optimizer, muon.Muon)
        self.optimizer.own(matrices(), self.partitions, self.stepped, torch.device("cpu"))
        for of_step in gradients:
            for names, flat in self.flats:
                owned = [of_step[name].flatten()[slice(*self.intervals[name])] for name in names]
                flat.grad = torch.cat([*owned, flat.new_zeros(2)])
            self.bias.grad = of_step[BIAS].clone()
            self.optimizer.step()


class Ranks:
    """Collectives between threads, each of which is a rank."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.local, self.posts = world, threading.local(), [None] * world
        self.barrier = threading.Barrier(world, timeout=30)
        monkeypatch.setattr(collectives, "rank", lambda: self.local.rank)
        monkeypatch.setattr(collectives, "world_size", lambda: world)
        monkeypatch.setattr(collectives, "gather_objects", self.gather)
        monkeypatch.setattr(collectives, "exchange", self.exchange)

    def gather(self, obj: Any) -> list[Any]:
        self.posts[self.local.rank] = obj
        self.barrier.wait()
        found = list(self.posts)
        self.barrier.wait()
        return found

    def exchange(self, parts: list[Tensor], lengths: list[int]) -> list[Tensor]:
        received = [of_rank[self.local.rank].clone() for of_rank in self.gather(parts)]
        assert [len(part) for part in received] == lengths
        return received

    def run(self, ranks: list[Rank], gradients: list[dict[str, Tensor]]) -> None:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            self.local.rank = number
            try:
                ranks[number].train(gradients)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", ["whole", "one buffer", "equal parts"])
def test_updates_equal_a_slow_loop_however_matrices_are_cut(
    layout: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {**SHAPES, BIAS: (6,)}
    values = {name: random(*shape) for name, shape in shapes.items()}
    gradients = [{name: random(*shape) for name, shape in shapes.items()} for _ in range(STEPS)]
    ranks = [Rank(layout, rank, world, values) for rank in range(world)]
    monkeypatch.setattr(muon, "BATCH", 40)  # two of the three matrices of `qkv` at once
    Ranks(world, monkeypatch).run(ranks, gradients)
    expected = slow(values, gradients)
    for rank in ranks:
        for p in rank.partitions:
            right = expected[p.name].flatten()[p.start : p.start + p.length]
            torch.testing.assert_close(p.master, right, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(rank.bias, expected[BIAS], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(3, 6, 9), (2, 9, 6), (1, 5, 5)])
def test_newton_schulz_maps_singular_values_by_the_polynomial(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(muon.newton_schulz(x), u * values[:, None] @ v, rtol=1e-9, atol=1e-9)
    single = muon.newton_schulz(x.float())
    assert single.dtype == torch.float32
    # fp32 rounding of 6e-8 under the polynomial's slope at zero of 485.
    torch.testing.assert_close(single.double(), muon.newton_schulz(x), rtol=0, atol=1e-4)


def test_update_has_the_root_mean_square_of_adamw() -> None:
    for rows, columns in ((64, 64), (96, 32), (24, 120)):
        update = muon.newton_schulz(random(1, rows, columns)) * muon.UPDATE_RMS * max(rows, columns) ** 0.5
        assert 0.15 < float(update.square().mean().sqrt()) < 0.25  # singular values between 0.7 and 1.2


def test_zero_gradient_moves_nothing() -> None:
    assert torch.equal(muon.newton_schulz(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_costly_matrices_are_spread_over_ranks() -> None:
    of = [Matrix("a", 0, 8, 8), Matrix("b", 0, 64, 64), Matrix("c", 0, 64, 64), Matrix("d", 0, 8, 8)]
    assert muon._owners(of, 2) == [0, 0, 1, 1]
    assert muon._owners(of, 1) == [0, 0, 0, 0]


CASES: dict[str, tuple[dict[str, int], set[str]]] = {
    # preset: matrices in some weights (the layer's path without `trunk.` → number), and weights that are AdamW's
    "swin_t": (
        {
            "layers.0.blocks.0.attn.qkv": 3,
            "layers.0.blocks.0.attn.proj": 1,
            "layers.3.blocks.1.mlp.fc1": 1,
            "layers.0.downsample.reduction": 1,
        },
        {"patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table", "norm.weight"},
    ),
    "swinv2_t": ({"layers.0.blocks.0.attn.qkv": 3}, {"layers.0.blocks.0.attn.cpb_mlp.0.weight"}),
    "vil_2262": (
        {"layers.0.blocks.0.attn.kv": 2, "layers.0.blocks.0.attn.query": 1, "layers.1.patch_embed.proj": 1},
        {"layers.0.patch_embed.proj.weight", "layers.0.patch_embed.cls_token"},
    ),
    "cvt_s1": (
        {"stage0.1.layers.0.0.fn.qkv.pw": 3, "stage1.0.proj": 1},
        {"stage0.0.proj.weight", "stage0.1.layers.0.0.fn.qkv.dw.weight"},
    ),
    "focal_t": (
        {"layers.0.blocks.0.attn.qkv": 3, "layers.0.downsample.proj": 1},
        {"layers.0.blocks.0.pool_layers.0.weight"},
    ),
    "deit_s": ({"blocks.0.attn.qkv": 3}, {"pos_embed", "cls_token", "patch_embed.proj.weight"}),
    "resnet50": ({"layer1.0.conv2": 1}, {"conv1.weight"}),
}


@pytest.mark.parametrize("preset", CASES)
def test_matrices_of_hidden_layers_are_muons(preset: str) -> None:
    with torch.device("meta"):
        network = build_network(configs.resolve(preset, ["data.train=/x"]))
    found = hidden_matrices([network.trunk], network)
    parameters = dict(network.named_parameters())
    counts = {name: [m.name for m in found].count(name) for name in parameters}
    expected, others = CASES[preset]
    for path, count in expected.items():
        assert counts[f"trunk.{path}.weight"] == count, path
    for name in others:
        assert counts[f"trunk.{name}"] == 0, name
    heads = {name: n for name, n in counts.items() if name.startswith("objective.")}
    assert heads["objective.view_head.mlp.0.weight"] == 1
    assert not any(n for name, n in heads.items() if "last_layer" in name)
    for name, count in counts.items():  # together, the matrices are the whole parameter
        elements = sum(m.rows * m.columns for m in found if m.name == name)
        assert elements == (parameters[name].numel() if count else 0)
    groups = parameter_groups(network, matrices={m.name for m in found})
    assert {name for name, group in groups.items() if group == MATRICES} == {name for name, n in counts.items() if n}


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    config = tiny.config(
        tmp_path / "run",
        tiny.shards(tmp_path / "shards"),
        optim__name="muon",
        train__steps=6,
        train__checkpoint_every=3,
    )
    assert pretraining.pretrain(config) == 0
    whole = tiny.rows(tmp_path / "run")
    assert whole[-1]["update_ratio_stage1"] > 0
    checkpoints = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "summary.json").unlink()
    (checkpoints / "step-00000006").rename(checkpoints / "later")
    (checkpoints / "latest").write_text("step-00000003\n")
    assert pretraining.pretrain(config) == 0
    assert tiny.rows(tmp_path / "run") == whole


def test_checkpoints_of_other_optimizers_are_refused(tmp_path: Path) -> None:
    cursor = {"step": 1, "optimizer_step": 1, "batch_index": 1, "data_offset": 0, "images_seen": 8}
    made, world = {}, worlds.start()
    try:
        for name in ("muon", "adamw"):
            config = tiny.config(tmp_path / name, tmp_path, optim__name=name, train__ds_config="zero0")
            trainer = Trainer(config, world, Schedules(config, steps_per_epoch=4))
            crops = [torch.randn(16, 3, 32, 32), torch.randn(32, 3, 16, 16)]
            assert trainer.train_step([MicroBatch(crops, torch.arange(8))]).applied
            made[name] = trainer.engines, state.save(tmp_path / name, config, trainer.engines, {}, cursor)
        with pytest.raises(UserError, match=r"saved by another kind of optimizer \(Muon\)"):
            state.restore(made["muon"][1], made["adamw"][0], {})
        with pytest.raises(UserError, match=r"another kind of optimizer \(it holds no momentum_buffer\)"):
            state.restore(made["adamw"][1], made["muon"][0], {})
    finally:
        worlds.stop()
