import torch

from esvit_scale.models import products
from esvit_scale.objective import costs
from esvit_scale.train import metrics, mfu, pretraining
from esvit_scale.train.row_file import read_rows
from tests import tiny

CPU = torch.device("cpu")


def test_mfu_is_useful_flops_divided_by_matmul_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(mfu, "matmul_rate", lambda device, dtype: {torch.float32: 5e9, torch.bfloat16: 9e9}[dtype])
    config = tiny.config(tmp_path / "run", tmp_path)
    flops = costs.image_flops(config, "useful")
    assert mfu.ideal_images_per_s(config, CPU, 3) == 3 * 5e9 / flops
    half = tiny.config(tmp_path / "run", tmp_path, train__precision="bf16")
    for wide, rate in ((False, 9e9), (True, 5e9)):  # where products of bf16 are computed in fp32, it is fp32's rate
        monkeypatch.setattr(products, "fp32_is_faster", lambda wide=wide: wide)
        assert mfu.ideal_images_per_s(half, CPU, 1) == rate / flops


def test_matmul_rate_is_measured_once_and_fast():
    mfu.matmul_rate.cache_clear()
    rate = mfu.matmul_rate(CPU, torch.float32)
    side = 512
    a = torch.randn(side, side)
    reached = 2 * side**3 / min(mfu.elapsed_seconds(lambda: a @ a, CPU) for _ in range(20))
    assert 0.2 < reached / rate < 5  # the machine may be busy
    assert mfu.elapsed_seconds(lambda: mfu.matmul_rate(CPU, torch.float32), CPU) < 0.01


def test_measuring_does_not_change_the_random_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    mfu.matmul_rate.cache_clear()
    mfu.matmul_rate(CPU, torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_rows_have_mfu_and_it_is_a_time_field(tmp_path):
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__steps=2)
    assert pretraining.pretrain(config) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    ideal = mfu.ideal_images_per_s(config, CPU, 1)
    for row in rows:
        assert 0 < row["mfu"] < 1
        assert abs(row["mfu"] * ideal / row["images_per_s"] - 1) < 1e-9
    assert "mfu" in metrics.TIME_FIELDS
