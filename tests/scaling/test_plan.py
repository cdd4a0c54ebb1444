"""What `plan` says a rank holds, against engines that are really built."""

import json
import re
from pathlib import Path

import pytest

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.checkpoint import frozen_teacher
from esvit_scale.errors import UserError
from esvit_scale.objective import costs
from esvit_scale.scaling import memory, step_trace, traffic
from esvit_scale.scaling import plan as plans
from tests import launcher, tiny
from tests.objective.distillation import write_teacher

SPEED = plans.Speed(100, 0.4, "given")
G80 = 80 * 2**30


def tiny_config(tmp_path, **overrides):
    # Odd widths, so that ZeRO has something to pad.
    odd = {"model__embed_dim": 18, "model__heads": [1, 2, 3], "objective__prototypes": 65, "objective__bottleneck": 15}
    return tiny.config(tmp_path, tmp_path, optim__freeze_last_layer_epochs=0, **odd, **overrides)


def test_planned_state_bytes_equal_those_of_real_engines(tmp_path):
    """Two ranks, one step, every stage: each part of rank 0 to the byte, padding included; rank 1 pads, so has no more."""
    cases = {"zero0": "fp32", "zero1": "bf16", "zero2": "bf16", "zero3": "bf16", "zero3-fp32": "fp32"}
    cases |= {"zero1-muon": "bf16", "zero3-muon": "bf16"}
    cases |= {"zero1-distill": "bf16", "zero3-distill": "bf16"}
    teacher = write_teacher(tmp_path / "teacher.safetensors", heads=False)
    made = {}
    for name, precision in cases.items():
        optimizer = "muon" if "muon" in name else "adamw"
        further = {"objective__gram_weight": 1.0, "objective__gram_start": 1} if "muon" not in name else {}
        if "distill" in name:
            further = {"objective__name": "distill", "objective__targets": "cosine", "objective__teacher": str(teacher)}
            further["objective__students"] = [{"trunk": "swin_t", "embed_dim": 9, "depths": [1, 1], "heads": [1, 3]}]
        made[name] = frozen_teacher.described_in(
            tiny_config(
                tmp_path / name, train__ds_config=name[:5], train__precision=precision, optim__name=optimizer, **further
            )
        )
        tiny.write_config(tmp_path / f"{name}.yaml", made[name])
    files = [tmp_path / f"{name}.yaml" for name in cases]
    launcher.run(Path(__file__).with_name("engine_bytes.py"), tmp_path / "bytes", *files, ranks=2)

    for rank in range(2):
        found = json.loads((tmp_path / f"bytes.{rank}").read_text())
        for name, config in made.items():
            planned = memory.memory(config, memory.network_of(config), int(name[4]), 2, "none")
            expected = {part: getattr(planned, part) for part in found[name]}
            if rank == 1:  # the EMA is kept without padding, which the last rank has
                assert found[name].pop("ema") <= expected.pop("ema")
                assert found[name].pop("gram", 0) <= expected.pop("gram", 0)
            assert found[name] == expected, (name, rank)


def test_accumulated_gradients_are_planned_in_fp32(tmp_path):
    """tests/parallel/test_accumulation.py looks at the engine's."""

    def of(precision, accum):
        config = tiny_config(tmp_path, train__precision=precision, train__grad_accum=accum)
        return memory.memory(config, memory.network_of(config), 1, 2, "none").gradients

    assert of("bf16", 2) == of("fp32", 1) == of("fp32", 2) == 2 * of("bf16", 1)


def test_each_zero_stage_needs_less_memory():
    config = configs.resolve("swinv2_1b")
    found = plans.plan(config, 64, G80, None, SPEED)
    states = [s.memory.state for s in found.settings if s.checkpointing == "none"]
    assert states == sorted(states, reverse=True)
    for more, less in ((found.settings[:3], found.settings[3:6]), (found.settings[3:6], found.settings[6:])):
        assert all(a.memory.peak > b.memory.peak for a, b in zip(more, less, strict=True))


def test_smallest_fitting_setting_is_named_and_too_little_memory_refused():
    config = configs.resolve("swinv2_g", ["train.global_batch=64"])
    roomy = plans.plan(config, 8, G80, None, SPEED)
    assert roomy.fits is roomy.settings[0]
    assert plans.refusal(roomy, config, 8) is None
    tight = plans.plan(config, 8, 20 * 2**30, None, SPEED)
    assert tight.fits
    assert (tight.fits.stage, tight.fits.checkpointing) == (3, "full")
    none = plans.plan(config, 8, 12 * 2**30, None, SPEED)
    assert none.fits is None
    advice = plans.refusal(none, config, 8)
    assert advice.startswith("does not fit: zero3 + activation checkpointing needs")
    assert "16 GPUs" in advice or "32 GPUs" in advice


def test_advice_of_a_refusal_fits():
    """What the refusal names does fit."""
    config = configs.resolve("swinv2_h", ["train.global_batch=512"])
    capacity = 24 * 2**30
    found = plans.plan(config, 1, capacity, None, SPEED)
    assert found.fits is None
    advice = plans.refusal(found, config, 1)
    more = int(advice.split(" GPUs, ")[0].split()[-1])
    assert plans.plan(config, more, capacity, None, SPEED).fits
    accum = advice.split("train.grad_accum=")[1].split(",")[0]
    assert plans.plan(configs.resolve("swinv2_h", [f"train.grad_accum={accum}"]), 1, capacity, None, SPEED).fits


def test_plan_of_swin_t_has_expected_costs():
    found = plans.plan(configs.resolve("swin_t"), 8, G80, 1_281_167, SPEED).numbers
    assert found["gflops_per_image"] == pytest.approx(154.4, abs=0.05)
    assert found["images_seen"] == 300 * (1_281_167 // 512) * 512
    assert found["gpu_hours"] == pytest.approx(found["useful_gflops_per_image"] * found["images_seen"] / 40e3 / 3600)
    assert found["checkpoint_bytes"] == 16 * (found["trunk_params"] + found["head_params"])


@pytest.mark.slow
def test_checkpoint_on_disk_has_the_planned_size(tmp_path):
    config = tiny_config(tmp_path / "run", train__steps=1, data__train=str(tiny.shards(tmp_path / "shards")))
    tiny.write_config(tmp_path / "c.yaml", config)
    launcher.run(*launcher.CLI, "pretrain", str(tmp_path / "c.yaml"), timeout=120)
    files = (tmp_path / "run" / "checkpoints").glob("step-*/*")
    tensors = sum(f.stat().st_size for f in files if f.suffix == ".distcp")
    planned = memory.checkpoint_bytes(memory.network_of(config))
    assert planned < tensors < planned * 1.5 + 2**18  # every tensor has a header, and these tensors are tiny


def test_indivisible_batch_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"512 does not divide over 7 GPUs .* nearest: 511"):
        plans.plan(configs.resolve("swin_t"), 7, G80, None, SPEED)


@pytest.mark.parametrize("trunk", ["timm:resnet18", pytest.param("timm:xcit_nano_12_p16_224", marks=pytest.mark.slow)])
def test_plan_supports_trunks_that_run_once_per_crop_size(trunk, capsys):
    line = ["plan", "swin_t", "--gpus", "8", "--gpu-memory", "80G", f"model.trunk={trunk}", "--tflops", "400", "--json"]
    assert cli.main(line) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["smallest"] == {
        "zero_stage": 1,
        "activation_checkpointing": False,
        "checkpointing": "none",
        "keys": "train.ds_config=zero1 train.activation_checkpointing=none",
    }


def test_a_gradient_is_there_from_the_last_call_of_its_block():
    """Two crop sizes: after the second half of the calls every block has its gradient, the first half adds none."""
    config = configs.resolve("swin_t", ["model.trunk=timm:resnet18"])
    network = memory.network_of(config)
    blocks = costs.block_activation_bytes(config)
    half, outside = len(blocks) // 2, 7
    assert half == len(network.blocks)
    early, late = memory.backward_peaks(config, network, 1, "none", outside, 4)
    total = costs.activation_bytes(config, "none").total(1) + outside
    assert early == total
    done, left, largest = 4 * network.heads, total, total
    for i in reversed(range(2 * half)):
        done += 4 * network.blocks[i - half] if i >= half else 0
        largest, left = max(largest, left + done), left - blocks[i]
    assert late == max(largest, 4 * network.total + outside)


def test_plan_command_prints_table_json_and_refusal(capsys):
    assert cli.main(["plan", "swin_t", "--gpus", "8", "--gpu-memory", "80G", "--tflops", "400"]) == 0
    text = capsys.readouterr().out
    assert "smallest that fits" in text
    assert "GPU hours" in text
    if "this torch cannot trace" in text:
        pytest.skip("this torch cannot trace the backward of a weight norm")
    assert re.search(r"step \(estimate\) +0\.\d+ s, of which \d+% is .* \(memory\), \d+% is ", text)
    assert "assumed: memory 3,350 GB/s (80% reached), 8 GPUs a node" in text
    assert "gradients: all-reduce of " in text
    assert cli.main(["plan", "swin_t", "--gpus", "8", "--gpu-memory", "80G", "--tflops", "400", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert {row["checkpointing"] for row in planned["settings"]} == {"none", "selective", "full"}
    assert planned["smallest"] == {
        "zero_stage": 1,
        "activation_checkpointing": False,
        "checkpointing": "none",
        "keys": "train.ds_config=zero1 train.activation_checkpointing=none",
    }
    step = planned["step"]
    assert step["seconds"] == pytest.approx(sum(term["seconds"] for term in step["terms"]))
    assert planned["images_per_s"] == pytest.approx(512 / step["seconds"])
    assert {said["source"] for said in step["traffic"]} == {"traced", "modelled"}
    assert cli.main(["plan", "swinv2_g", "--gpus", "1", "--gpu-memory", "24G", "--tflops", "400"]) == 2
    assert "would fit" in capsys.readouterr().err


def test_plan_assumes_an_mfu_where_torch_cannot_trace_a_step(monkeypatch):
    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(plans.step_trace, "trace", refuse)
    config, machine = configs.resolve("demo"), plans.Machine(400.0, "400 TFLOP/s as given")
    found = plans.plan(config, 2, 16 << 30, 2000, machine, traced=True)
    assumed = plans.plan(config, 2, 16 << 30, 2000, plans.Speed(400.0, 0.35, ""), traced=False)
    assert found.step is None
    assert found.numbers["hours"] == assumed.numbers["hours"] > 0
    assert "MFU 0.35 assumed, since this torch cannot trace" in plans.table(found, config, 2)


def test_plan_reads_the_sizes_of_the_deepspeed_file(tmp_path):
    """Stages 1 to 3 reserve the reduction bucket whole, and stage 3 keeps gathered what the file allows."""
    path = tmp_path / "mine.json"
    sizes = {"reduce_bucket_size": 1e4, "stage3_max_live_parameters": 2e4, "stage3_prefetch_bucket_size": 1e3}
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **sizes}}))
    config = tiny_config(tmp_path, train__ds_config=str(path))  # in fp32
    network = memory.network_of(config)
    of = {stage: memory.memory(config, network, stage, 8, "none") for stage in (1, 3)}
    assert [m.buckets for m in of.values()] == [4e4, 2 * 4e4]
    assert of[3].gathered == 8e4
    trace = step_trace.trace(config, 8, "none", step_trace.ON_CPU)
    said = {one.purpose: one for one in traffic.of_step(config, network, 3, 8, trace)}
    assert said["gradients"].calls == -(-network.total // 10**4)
    assert said["student's parameters"].calls >= network.total // 10**3
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        memory.memory(config, network, 1, 8, "none")


@pytest.mark.parametrize(
    "wrong", ["--network=-1", "--network=400G", "--tflops=0", "--bandwidth=nan", "--mfu=40", "--node-link=inf"]
)
def test_wrong_rate_is_an_error_of_one_line_that_names_the_option(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "demo", "--gpus", "2", "--gpu-memory", "16G", wrong])
    assert stopped.value.code == 2
    option, _, value = wrong.partition("=")
    assert re.fullmatch(rf".*argument {option}: expected a .*, got {value!r} .*\n", capsys.readouterr().err)


def test_plan_explains_every_row(capsys):
    assert cli.main(["plan", "demo", "--gpus", "2", "--gpu-memory", "16G", "--tflops", "400"]) == 0
    table, _, below = capsys.readouterr().out.partition("What the rows are:\n")
    rows = [line.split("  ")[0] for line in table.splitlines()[1:] if line]
    assert rows[-2:] == ["peak", "fits in 14.7"]
    for row in rows:
        assert f"\n  {row.removesuffix(' 14.7')}  " in f"\n{below}", row
    assert "92% of 16.00 GiB: 8% are left for the driver" in below


def test_plan_without_a_known_rate_asks_for_it_and_guesses_no_time(capsys, monkeypatch):
    """On a machine without a GPU the rate of GPUs is unknown; the CPU's own would give thousands of days."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = ["plan", "swin_t", "--gpus", "8", "--gpu-memory", "80G"]
    assert cli.main(line) == 0
    text = capsys.readouterr().out
    assert "give --tflops RATE for a time" in text
    assert "7.91e+13 a step of 512 images, 5.93e+19 in all 750,600 steps" in text
    assert not any(word in text for word in ("days", " h in all", "GPU hours", "images/s", "MFU"))
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[key] for key in ("speed", "images_per_s", "hours_per_epoch", "hours", "gpu_hours")] == [None] * 5
    assert found["flops_per_step"] * found["steps"] == pytest.approx(found["total_flops"])
