"""The run config: presets, round trips, overrides, and the one clear line for every mistake."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_scale import config as configs
from esvit_scale import yaml_text
from esvit_scale.config import Config, differences, dump, load, preset_names, resolve
from esvit_scale.errors import UserError
from esvit_scale.resources import ds_config_names, ds_config_path

SWIN = ["swin_t", "swin_s", "swin_b", "swin_l"]


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def error_of(config: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(config, list(overrides))
    return str(caught.value)


# --- presets -------------------------------------------------------------------------------------------------------


def test_swin_presets_are_shipped():
    assert {*SWIN, *(f"{name}_w14" for name in SWIN), "swin_t_view"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_preset_survives_dump_and_load(name, tmp_path):
    config = resolve(name)
    assert config.name == name
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config
    assert resolve(str(tmp_path / "config.yaml")) == config
    ds_config_path(config.train.ds_config)


@pytest.mark.parametrize("name", preset_names())
def test_preset_header_states_source_cost_and_expected_result(name):
    header = (Path(configs.__file__).parent / "configs" / f"{name}.yaml").read_text().split("\nname:")[0]
    for word in ("Source", "Cost", "Expected"):
        assert word.lower() in header.lower()


@pytest.mark.parametrize("name", [n for n in preset_names() if n.startswith("swin_")])
def test_swin_presets_match_the_official_recipe(name):
    config = resolve(name)
    letter, window = name.split("_")[1], 14 if name.endswith("_w14") else 7
    assert (config.model.trunk, config.model.window) == (f"swin_{letter}", window)
    assert config.model.drop_path == (0.1 if letter == "t" else 0.2)
    assert config.crop_sizes == [224] * 2 + [96] * 8
    assert config.data.global_crops.scale == (0.4, 1.0)
    assert config.data.local_crops[0].scale == (0.05, 0.4)
    assert (config.train.epochs, config.train.global_batch, config.peak_lr) == (300, 512, 1e-3)
    optim, objective = config.optim, config.objective
    assert (optim.lr_end, optim.warmup_epochs, optim.betas) == (1e-6, 10, (0.9, 0.999))
    assert (optim.weight_decay, optim.weight_decay_end) == (0.04, 0.4)
    assert (optim.clip, optim.clip_by, optim.freeze_last_layer_epochs) == (3.0, "tensor", 1)
    assert (objective.prototypes, objective.norm_last_layer, objective.center_momentum) == (65536, False, 0.9)
    assert (objective.student_temp, objective.teacher_temp, objective.teacher_temp_end) == (0.1, 0.04, 0.07)
    assert objective.teacher_temp_warmup_epochs == 30
    assert (objective.ema_momentum, objective.ema_momentum_end) == (0.996, 1.0)
    assert objective.regions is (name != "swin_t_view")


# --- reading and writing -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)  # each reads and writes a whole config
@given(
    st.fixed_dictionaries(
        {
            "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True),
            "run_dir": st.none() | st.text(max_size=12).filter(lambda text: not text.startswith("~")),
            "seed": st.integers(0, 2**63 - 1),
            "optim": st.fixed_dictionaries({"lr": st.floats(0, 1e9), "clip": st.none() | st.floats(1e-9, 1e9)}),
        }
    )
)
def test_any_config_survives_dump_and_load(values):
    config = configs.validate(values, "test")
    assert configs.validate(yaml_text.parse(dump(config), "dump"), "dump") == config


@pytest.mark.parametrize("name", ["12e4567", "1e5", "007", "2024-01-01", "null", "true", "no", "12_30", "0x10", ".5"])
def test_name_that_looks_like_another_type_stays_text(name, tmp_path):
    if not name.startswith("."):
        config = resolve("swin_t", [f"name={name}"])
        assert config.name == name
        (tmp_path / "c.yaml").write_text(dump(config))
        assert load(tmp_path / "c.yaml").name == name
        assert yaml.safe_load(dump(config))["name"] == name  # other tools read it so, too
    assert resolve("swin_t", [f"run_dir={name}"]).run_dir == (None if name == "null" else name)


@pytest.mark.parametrize(
    ("text", "lr"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("1.e-3", 1e-3), (".001", 1e-3), ("1", 1.0), ("0.5", 0.5), ("+5e-4", 5e-4)],
)
def test_every_float_notation_is_read(text, lr, write):
    assert resolve(write(f"optim: {{lr: {text}}}")).optim.lr == lr
    assert resolve("swin_t", [f"optim.lr={text}"]).optim.lr == lr


def test_integers_are_decimal_and_byte_order_mark_is_ignored(write):
    assert resolve(write("\ufeffseed: 010\n")).seed == 10


def test_empty_file_gives_the_defaults(write):
    assert resolve(write("# nothing yet\n")) == Config()


def test_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = resolve("swin_t", ["data.train=~/shards", "run_dir=~/runs/a"])
    assert (config.data.train, config.run_path) == ("/home/someone/shards", Path("/home/someone/runs/a"))


def test_run_path_defaults_to_runs_and_the_name():
    assert resolve("swin_s").run_path == Path("runs/swin_s")


def test_config_is_frozen():
    with pytest.raises((dataclasses.FrozenInstanceError, ValueError)):
        Config().seed = 3


# --- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_apply_at_every_depth_and_last_one_wins():
    config = resolve(
        "swin_t",
        [
            "train.epochs=5",
            "train.epochs=6",
            "data.local_crops.0.size=64",
            "data.global_crops.scale.0=0.3",
            "model.depths=[1, 1, 2, 1]",
            "optim.clip=null",
            "data.slots=",
            "data.train=/data/a=b #1: {x}",
        ],
    )
    assert config.train.epochs == 6
    assert config.data.local_crops[0].size == 64
    assert config.data.local_crops[0].count == 8
    assert config.data.global_crops.scale == (0.3, 1.0)
    assert config.model.depths == [1, 1, 2, 1]
    assert (config.optim.clip, config.data.slots) == (None, None)
    assert config.data.train == "/data/a=b #1: {x}"


def test_quoted_text_loses_its_quotes():
    config = resolve("swin_t", ['data.train="/data/a b\\u00e9"', "name='1e5'", "run_dir='null'"])
    assert (config.data.train, config.name, config.run_dir) == ("/data/a b\u00e9", "1e5", "null")


def test_overrides_change_items_of_a_list(write):
    path = write("data: {local_crops: [{size: 96}, {size: 64, count: 2}]}")
    config = resolve(path, ["data.local_crops.1.count=3"])
    assert config.crop_sizes == [224] * 2 + [96] * 8 + [64] * 3


def test_empty_list_of_local_crops_is_valid():
    assert resolve("swin_t", ["data.local_crops=[]"]).crop_sizes == [224, 224]


# --- mistakes ------------------------------------------------------------------------------------------------------

IN_A_FILE = {
    "train: {epoch: 3}": "unknown key train.epoch; did you mean 'train.epochs'?",
    "epochs: 3": "unknown key epochs; did you mean 'train.epochs'?",
    "trian: {steps: 3, epochs: 2}": "unknown key trian; did you mean 'train'?",
    "objectve: {}": "unknown key objectve; did you mean 'objective'?",
    "data: {global_crops: {augment: {jitter:1.0}}}": "unknown key data.global_crops.augment.jitter:1.0; put a space behind "
    "the colon: jitter: 1.0",
    "data: {global_crops: {augment: {x.y: 1}}}": "unknown key data.global_crops.augment.x.y; known: jitter, brightness",
    "data: {local_crops: [{}, {sise: 3}]}": "unknown key data.local_crops.1.sise; did you mean 'data.local_crops.1.size'?",
    "zzzz: 3": "unknown key zzzz; known: format_version, name, run_dir, seed, data, model, objective, optim, train",
    "train: {epochs: three}": "train.epochs: expected a whole number, got 'three'",
    "train: {epochs: 3.0}": "train.epochs: expected a whole number, got 3.0; write 3",
    "train: {epochs: true}": "train.epochs: expected a whole number, got true",
    "train: {epochs: '3'}": "train.epochs: expected a whole number, got '3'",
    "train: {epochs: 0}": "train.epochs: must be ≥ 1, got 0; nearest: 1",
    "train: {epochs: null}": "train.epochs: expected a whole number, got nothing",
    "seed: -1": "seed: must be ≥ 0, got -1; nearest: 0",
    "seed: 99999999999999999999": "seed: must be ≤ 9223372036854775807",
    "optim: {lr: true}": "optim.lr: expected a number, got true",
    "optim: {lr: fast}": "optim.lr: expected a number, got 'fast'",
    "optim: {lr: .nan}": "optim.lr: expected a number, got '.nan'; it must be finite",
    "optim: {lr: nan}": "optim.lr: expected a number, got 'nan'; it must be finite",
    "optim: {lr: 1e999}": "optim.lr: expected a finite number, got inf",
    "optim: {clip: 0}": "optim.clip: must be > 0",
    "optim: {clip: .inf}": "optim.clip: expected a number, got '.inf'; it must be finite",
    "optim: {betas: [0.9, 1.0]}": "optim.betas.1: must be < 1",
    "objective: {regions: 1}": "objective.regions: expected true or false, got 1",
    "objective: {regions: yes}": "objective.regions: expected true or false, got 'yes'",
    "objective: {student_temp: 0}": "objective.student_temp: must be > 0",
    "objective: {center_momentum: 1.1}": "objective.center_momentum: must be ≤ 1.0, got 1.1; nearest: 1.0",
    "data: {global_crops: {scale: [0.4]}}": "data.global_crops.scale: expected a list of two numbers",
    "data: {global_crops: {scale: [0.4, 1, 2]}}": "data.global_crops.scale: expected a list of two numbers, got [0.4, 1, 2]",
    "data: {global_crops: {scale: 0.4}}": "data.global_crops.scale: expected a list of two numbers, got 0.4",
    "data: {global_crops: {scale: [0.8, 0.4]}}": "data.global_crops.scale: needs 0 < low <= high, got [0.8, 0.4]",
    "data: {local_crops: [{scale: [0, 0.4]}]}": "data.local_crops.0.scale: needs 0 < low <= high",
    "data: {local_crops: 8}": "data.local_crops: expected a list, written [1, 2], got 8",
    "data: {slots: 100}": "data.slots: 100 does not divide train.global_batch=512; nearest: 64",
    "data: {audio: {views: 1, seconds: 1.0e-5}}": "data.audio.seconds: 1e-05 s at 16000 Hz are no sample; nearest: 6.25e-05",
    "model: {depths: []}": "model.depths: expected at least one number, got []",
    "model: {depths: [1, 1], heads: [1]}": "model.heads: 1 stages, but model.depths has 2",
    "train: {global_batch: 10, grad_accum: 3}": "train.global_batch: 10 does not divide over train.grad_accum=3; nearest: 9",
    "train: {precision: fp23}": "train.precision: expected 'fp32', 'bf16', 'fp16' or 'autocast', got 'fp23'; did you mean 'fp32'?",
    "train: 5": "train: expected a section (`key: value` lines), got 5",
    "name: 12": "name: expected text, got 12; put it in quotes",
    "name: a b": "name: letters, digits, '.', '_' and '-', beginning with a letter or digit; got 'a b'",
    "name: ../x": "name: letters, digits",
    "format_version: 2": "format_version: expected 1, got 2",
    "seed: &a [*a]": "seed: expected a whole number, got [[...]]",
    "1: 2": "1: keys should be strings",
    "seed: 1\nseed: 2": "line 2: not valid YAML: key 'seed' is given twice",
    "train:\n  epochs: 1\n  epochs: 2": "line 3: not valid YAML: key 'epochs' is given twice",
    "? [a]\n: 1": "line 1: not valid YAML: a key must be one word",
    "train:\n\tepochs: 1": "line 2: not valid YAML: ",
    "seed: !!python/object/apply:os.getcwd []": "not valid YAML: could not determine a constructor",
    "- a": "must hold `key: value` lines, got ['a']",
    "just text": "must hold `key: value` lines, got 'just text'",
}


@pytest.mark.parametrize("text", IN_A_FILE)
def test_error_in_a_file_names_file_key_and_nearest_value(text, write):
    path = write(text)
    line = error_of(path)
    assert line.startswith(path)
    assert IN_A_FILE[text] in line
    assert "\n" not in line


ON_THE_COMMAND_LINE = {
    "train.epoch=3": "unknown key train.epoch; did you mean 'train.epochs'?",
    "optim.Lr=3": "unknown key optim.Lr; did you mean 'optim.lr'?",
    "trian.steps=3": "unknown key trian.steps; did you mean 'train.steps'?",
    "trian.step=3": "unknown key trian.step; did you mean 'train.steps'?",
    "data.globl_crops.size=3": "unknown key data.globl_crops.size; did you mean 'data.global_crops.size'?",
    "trian.zzzz=3": "unknown key trian; did you mean 'train'?",
    "train.epochs=three": "'train.epochs=three': train.epochs: expected a whole number, got 'three'",
    "train.epochs=": "train.epochs: expected a whole number, got nothing",
    "train.epochs": "overrides are written key=value",
    "=3": "overrides are written key=value",
    "train=3": "'train=3': train: expected a section",
    "seed.x=3": "'seed.x=3': seed: expected a whole number, got {'x': 3}",
    "name.x.y=3": "is a value, not a section",
    "data.local_crops.1.size=3": "'1' is not an item of a list of 1; use 0 to 0",
    "data.local_crops.-1.size=3": "'-1' is not an item",
    "data.local_crops.².size=3": "'²' is not an item",
    "model.depths=[1, 2": "'model.depths=[1, 2': not valid YAML",
    "train.epochs=" + "[" * 5000: "not valid YAML",
    "seed=" + "9" * 5000: "not valid YAML",
}


@pytest.mark.parametrize("override", ON_THE_COMMAND_LINE, ids=lambda text: text[:30])
def test_error_in_an_override_names_the_override(override):
    line = error_of("swin_t", override)
    assert ON_THE_COMMAND_LINE[override] in line
    assert line.startswith(repr(override)[:30])
    assert "\n" not in line
    assert len(line) < 300


def test_override_of_an_item_of_an_empty_list_is_refused(write):
    line = error_of(write("data: {local_crops: []}"), "data.local_crops.0.size=3")
    assert "is not an item of a list of 0; give the whole list" in line


def test_each_error_gets_its_own_line(write):
    lines = error_of(write("seed: x\ntrain: {epochs: 0, epoch: 1}"), "optim.lr=fast").splitlines()
    assert len(lines) == 4


def test_missing_file_or_preset_is_an_error(tmp_path, write):
    assert "neither a file nor a preset; did you mean 'swin_t'?" in error_of("swint")
    assert "no such config file; did you mean 'swin_t'?" in error_of(str(tmp_path / "swint.yaml"))
    (tmp_path / "stamps.yaml").write_text("name: stamps\n")
    assert f"did you mean '{tmp_path / 'stamps.yaml'}'?" in error_of(str(tmp_path / "stampz.yaml"))
    (tmp_path / "runs/stamps").mkdir(parents=True)
    (tmp_path / "runs/stamps/config.yaml").write_text("name: stamps\n")
    assert f"did you mean '{tmp_path / 'runs/stamps'}'?" in error_of(str(tmp_path / "runs/stampz"))
    write("")
    (tmp_path / "run.yaml").rename(tmp_path / "config.yaml")
    assert str(tmp_path / "config.yaml") in error_of(str(tmp_path))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in error_of(str(tmp_path / "b.yaml"))
    (tmp_path / "d.yaml").mkdir()
    assert "no such config file" in error_of(str(tmp_path / "d.yaml"))


def test_pretraining_without_data_names_the_missing_key():
    with pytest.raises(UserError, match=r"data\.train: not set.*data\.train=/.*shards create"):
        configs.require_training_data(resolve("swin_t"))
    configs.require_training_data(resolve("swin_t", ["data.train=x"]))


def test_ds_config_is_found_by_name_or_path(tmp_path):
    assert {"zero0", "zero1", "zero2", "zero3"} <= set(ds_config_names())
    assert ds_config_path("zero3").is_file()
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    assert ds_config_path(str(mine)) == mine
    with pytest.raises(UserError, match=r"no shipped DeepSpeed config is named 'zero4'; did you mean 'zero"):
        ds_config_path("zero4")
    with pytest.raises(UserError, match="no such file; did you mean 'zero1'"):
        ds_config_path(str(tmp_path / "zer1.json"))


# --- comparing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ds_config_names())
def test_ds_configs_are_short_and_use_auto_for_run_config_values(name):
    text = ds_config_path(name).read_text()
    assert len(text.splitlines()) <= 40
    values = json.loads(text)
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert values[key] == "auto"
    assert values["bf16"]["enabled"] == "auto"
    assert values["zero_optimization"]["memory_efficient_linear"] is False
    if values["zero_optimization"]["stage"] == 3:
        assert values["zero_optimization"]["stage3_param_persistence_threshold"] == 0


def test_differences_list_every_changed_key():
    a = resolve("swin_t")
    b = resolve("swin_t", ["seed=1", "data.local_crops.0.count=2", "model.depths=[2, 2]"])
    assert differences(a, a) == []
    assert differences(a, b) == ["seed: 0 → 1", "data.local_crops.0.count: 8 → 2", "model.depths: None → [2, 2]"]
    assert differences(a, resolve("swin_t", ["data.local_crops=[]"]))


def test_slots_depend_only_on_the_global_batch():
    assert resolve("swin_t").slots == 512
    assert resolve("swin_t", ["train.global_batch=1536"]).slots == 512
    assert resolve("swin_t", ["train.global_batch=48", "data.slots=16"]).slots == 16


def test_config_imports_no_torch():
    code = "import esvit_scale.config, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compile_with_selective_checkpointing_is_refused():
    line = error_of("swin_t", "train.compile=true", "train.activation_checkpointing=selective")
    assert "train.compile: not possible with train.activation_checkpointing=selective" in line
    assert "nearest: torch" in line
