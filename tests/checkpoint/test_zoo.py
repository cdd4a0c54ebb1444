"""The shipped backbones: all load by name and give the recorded features, and a run's beginning is the recorded one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esvit_scale
from esvit_scale.checkpoint import frozen_teacher, zoo
from esvit_scale.checkpoint.initial_weights import load_initial_weights
from esvit_scale.config import resolve
from esvit_scale.errors import UserError
from esvit_scale.evaluate.features import load_frozen_trunk
from esvit_scale.machine import processor
from esvit_scale.resources import shipped_folder

ROOT = Path(__file__).parents[2]
FOLDER = shipped_folder("zoo")
STEPS = 50


@pytest.mark.parametrize("name", zoo.names())
def test_backbones_load_by_name_and_give_the_recorded_features(name: str) -> None:
    backbone = esvit_scale.load_backbone(f"zoo:{name}")
    about = json.loads((FOLDER / name / "about.json").read_text())
    picture = torch.arange(3 * backbone.size**2, dtype=torch.float32).sin().view(1, 3, backbone.size, backbone.size)
    with torch.no_grad():
        found = backbone(picture)[0, :8]
    # Recorded in fp32 on one machine; others add in another order.
    torch.testing.assert_close(found, torch.tensor(about["features"]), rtol=1e-3, atol=1e-3)
    accuracy = about["test"]
    assert accuracy["trained"]["knn"] > accuracy["untrained"]["knn"]


def test_zoo_is_small() -> None:
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert max(sizes.values()) <= 2e6
    assert sum(sizes.values()) <= 10e6


def test_names_of_the_zoo_stand_wherever_weights_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = esvit_scale.load_backbone("zoo:digits").trunk.state_dict()
    assert torch.equal(
        load_frozen_trunk(Path("zoo:digits")).trunk.state_dict()["conv1.weight"], expected["conv1.weight"]
    )
    start = load_initial_weights(resolve("small", ["model.init_from=zoo:digits"]))
    assert torch.equal(start.values["trunk.conv1.weight"], expected["conv1.weight"])
    taught = ["objective.name=distill", "objective.teacher=zoo:digits", "objective.targets=cosine"]
    config = frozen_teacher.described_in(
        resolve("small", [*taught, "data.mean=[0.305,0.305,0.305]", "data.std=[0.376,0.376,0.376]"])
    )
    assert config.objective.teacher_config is not None
    with pytest.raises(UserError, match=r"zoo:digit: the zoo has no backbone of this name; did you mean 'digits'"):
        esvit_scale.load_backbone("zoo:digit")
    with pytest.raises(UserError, match=r"zoo:mammoth: the zoo has no backbone of this name; known: .*digits"):
        load_frozen_trunk(Path("zoo:mammoth"))


REPEAT = """
import sys
import torch
import learning, learning_sets
from esvit_scale import config as configs
from esvit_scale.data import stream
from esvit_scale.parallel import world as worlds

folder, name, recorded, steps = learning.Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
train, _ = learning_sets.shards(name, "test", None, folder / "shards")
config = configs.resolve(recorded, [f"data.train={train}", "data.held_out=''", "train.knn_every=null"])
world = worlds.start()
side = learning.OurSide(config, world)
for batch in stream.batches(config, stream.open_data(config), 0, 1, 0, steps):
    print("loss", side.step(stream.micro_batches(config, batch, torch.device("cpu"), torch.float32)[0]), flush=True)
worlds.stop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", pytest.param("demo", marks=pytest.mark.long)])
def test_first_steps_of_a_run_are_the_recorded_ones_bit_for_bit(name: str, tmp_path: Path) -> None:
    recorded = json.loads((FOLDER / name / "environment.json").read_text())
    here = (processor(), torch.backends.cpu.get_cpu_capability(), torch.__version__.partition("+")[0])
    there = (recorded["processor"], recorded["cpu_capability"], recorded["packages"]["torch"])
    if here != there:
        pytest.skip(f"recorded on {', '.join(there)}; this is {', '.join(here)}, which adds in another order")
    shutil.copy(FOLDER / name / "config.json", tmp_path / f"{name}.yaml")  # JSON is YAML
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    command = [sys.executable, "-c", REPEAT, str(tmp_path), name, str(tmp_path / f"{name}.yaml"), str(STEPS)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    losses = [float(line.split()[1]) for line in said.splitlines() if line.startswith("loss ")]
    rows = [json.loads(line) for line in (FOLDER / name / "metrics.jsonl").read_text().splitlines()]
    assert losses == [row["loss"] for row in rows if 1 <= row["step"] <= STEPS]
    assert len(losses) == STEPS
