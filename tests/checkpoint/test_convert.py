"""Official checkpoints in and out. That features are the official ones is tests/models and tests/train; here it is
that every tensor arrives under its name, or nothing does."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from esvit_scale import cli
from esvit_scale.checkpoint import official, official_trunks, safetensors_file, state
from esvit_scale.checkpoint.convert import convert, read
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.errors import UserError
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import build_network
from tests import launcher, tiny
from tests.checkpoint import official as theirs

ONE_LINE = r"^[^\n]*$"


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs.save(tmp_path_factory.mktemp("official") / "checkpoint.pth")


def test_architecture_is_inferred_from_the_tensors(pth: Path) -> None:
    config = official.read(pth).config
    model, objective = config.model, config.objective
    assert (model.embed_dim, model.depths, model.heads, model.window) == (8, [1, 1, 2, 1], [1, 2, 2, 4], 14)
    assert config.data.global_crops.size == 224
    assert (objective.regions, objective.prototypes, objective.head_hidden, objective.bottleneck) == (True, 12, 16, 8)


@pytest.mark.parametrize(
    ("windows", "size"), [([7, 7, 7, 7], 224), ([14, 14, 14, 7], 224), ([7, 7, 3, 1], 56), ([4, 4, 2], 32)]
)
def test_inferred_crop_size_gives_the_windows(windows: list[int], size: int) -> None:
    assert official_trunks.swin_size(windows) == size


def test_published_shape_gets_its_name() -> None:
    assert official_trunks.swin_model(128, [2, 2, 18, 2], [4, 8, 16, 32], 14) == {"trunk": "swin_b", "window": 14}


def test_every_tensor_is_converted_to_its_name(pth: Path) -> None:
    weights = official.read(pth)
    content = theirs.content()
    for network, wrapper in (("student", "module."), ("teacher", "")):
        ours = weights.networks[network]
        assert torch.equal(ours["trunk.patch_embed.proj.weight"], content[network][wrapper + "patch_embed.proj.weight"])
        for head, name in (("head", "view_head"), ("head_dense", "region_head")):
            expected = content[network][f"{wrapper}{head}.last_layer.weight_v"]
            assert torch.equal(ours[f"objective.{name}.last_layer.weight_v"], expected)
        buffers = sum("relative_position_index" in name for name in content[network])
        assert buffers == 5
        assert len(ours) == len(content[network]) - buffers
    assert torch.equal(weights.centers["region.values"], content["dino_loss"]["center_grid"][0])


def test_round_trip_is_exact(pth: Path, tmp_path: Path) -> None:
    convert(pth, tmp_path / "ours", "esvit", "esvit-scale")
    convert(tmp_path / "ours", tmp_path / "back.pth", "esvit-scale", "esvit")
    back, content = torch.load(tmp_path / "back.pth", weights_only=True), theirs.content()
    for part in ("student", "teacher", "dino_loss"):
        assert list(back[part]) == list(content[part])
        for name, tensor in content[part].items():
            assert back[part][name].dtype == tensor.dtype
            assert torch.equal(back[part][name], tensor), name


def test_view_only_checkpoint_has_one_head_and_centre(tmp_path: Path) -> None:
    content = theirs.content()
    pth = theirs.save(tmp_path / "v.pth", without=("head_dense",), dino_loss={"center": content["dino_loss"]["center"]})
    convert(pth, tmp_path / "ours", "esvit", "esvit-scale")
    weights = state.read_weights(tmp_path / "ours")
    assert not weights.config.objective.regions
    assert list(weights.centers) == ["view.values"]
    assert not any("region" in name for name in weights.networks["teacher"])


def test_wrapper_prefix_and_mask_buffers_are_dropped(tmp_path: Path) -> None:
    teacher = {("backbone." if not n.startswith("head") else "") + n: t for n, t in theirs.content()["teacher"].items()}
    teacher = {"module." + n: t for n, t in teacher.items()} | {
        "module.backbone.layers.0.blocks.0.attn_mask": torch.zeros(4, 9)
    }
    weights = official.read(theirs.save(tmp_path / "c.pth", teacher=teacher))
    assert weights.networks["teacher"].keys() == weights.networks["student"].keys()


def test_files_of_old_torch_and_numpy_are_read(pth: Path, tmp_path: Path) -> None:
    """Not an archive, and numpy's numbers under their old name."""
    old = tmp_path / "old.pth"
    torch.save(theirs.content(), old, _use_new_zipfile_serialization=False)
    data = old.read_bytes()
    old.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))  # numpy 2's name, if written so
    assert b"numpy.core.multiarray" in old.read_bytes()
    weights, expected = official.read(old), official.read(pth)
    assert all(torch.equal(t, expected.networks["teacher"][n]) for n, t in weights.networks["teacher"].items())


@pytest.mark.slow
def test_single_file_holds_the_trunk_and_loads_without_deepspeed(pth: Path, tmp_path: Path) -> None:
    files = {network: tmp_path / f"{network}.safetensors" for network in ("teacher", "student")}
    for network, file in files.items():
        convert(pth, file, "esvit", "safetensors", network)
        tensors = load_file(file)
        assert all(name.startswith("trunk.") for name in tensors)
        prefix = "module." if network == "student" else ""
        assert torch.equal(tensors["trunk.norm.weight"], theirs.content()[network][prefix + "norm.weight"])
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from pathlib import Path; from esvit_scale.checkpoint.state import load_teacher; import torch\n"
        "for file in sys.argv[1:]:\n"
        "    trunk, config = load_teacher(Path(file))\n"
        "    print(trunk([torch.ones(1, 3, 224, 224)]).view.double().sum().item())"
    )
    environment = {**os.environ, **launcher.environment()}
    command = [sys.executable, "-c", code, *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    teacher, student = map(float, done.stdout.split())
    convert(pth, tmp_path / "ours", "esvit", "esvit-scale")
    trunk, _ = state.load_teacher(tmp_path / "ours")
    expected = trunk([torch.ones(1, 3, 224, 224)]).view.double().sum().item()
    assert teacher == pytest.approx(expected, rel=1e-6)
    assert student != pytest.approx(expected, rel=1e-6)


def test_heads_option_exports_heads_and_centres(pth: Path, tmp_path: Path) -> None:
    convert(pth, tmp_path / "all.safetensors", "esvit", "safetensors", heads=True)
    weights = safetensors_file.read(tmp_path / "all.safetensors")
    full = official.read(pth)
    assert list(weights.networks) == ["teacher"]
    for name, tensor in full.networks["teacher"].items():
        assert torch.equal(weights.networks["teacher"][name], tensor)
    assert weights.centers.keys() == full.centers.keys()
    assert weights.config == full.config


def test_convert_command_works_in_both_directions(
    pth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "t.safetensors"
    assert cli.main(["convert", str(pth), str(file), "--from", "esvit", "--to", "safetensors"]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: teacher of swin_t (")
    assert cli.main(["convert", str(pth), str(file), "--from", "esvit", "--to", "safetensors"]) == 2
    assert "exists already" in capsys.readouterr().err


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(path: Path, tmp_path: Path, match: str, form: str = "esvit-scale") -> None:
    """One line, and nothing written."""
    destination = tmp_path / "out" / ("x.safetensors" if form == "safetensors" else "x")
    with pytest.raises(UserError, match=match) as error:
        convert(path, destination, "esvit", form)
    assert "\n" not in str(error.value)
    assert not destination.exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    vit = {
        "cls_token": torch.zeros(1, 1, 8),
        "absolute_pos_embed": torch.zeros(1, 5, 8),
        "blocks.0.attn.qkv.weight": torch.ones(3),
    }
    path = theirs.save(tmp_path / "vit.pth", student=vit, teacher=vit)
    refused(
        path,
        tmp_path,
        r"no trunk of the official code .* nearest: DeiT, but it lacks pos_embed; it has cls_token, absolute_pos_embed, blocks.0.attn.qkv.weight and 0 more",
    )


def test_unknown_and_missing_tensors_are_listed(tmp_path: Path) -> None:
    content = theirs.content()
    extra = {"absolute_pos_embed": torch.zeros(1, 3136, 8), "head.mlp.1.running_mean": torch.zeros(16)}
    path = theirs.save(tmp_path / "ape.pth", teacher=content["teacher"] | extra)
    refused(
        path, tmp_path, r"teacher: .*trunk.absolute_pos_embed: \[1, 3136, 8\] in the checkpoint, absent in the model"
    )
    path = theirs.save(tmp_path / "holes.pth", without=("norm2",))
    refused(path, tmp_path, r"student: .*trunk.layers.0.blocks.0.norm2.weight: absent in the checkpoint.*; and 7 more")
    cut = content["student"] | {"module.norm.weight": torch.ones(63)}
    refused(
        theirs.save(tmp_path / "cut.pth", student=cut), tmp_path, r"trunk.norm.weight: \[63\] .* \[64\] in the model"
    )


def test_missing_head_is_an_error(tmp_path: Path) -> None:
    path = theirs.save(tmp_path / "half.pth", without=("head_dense.last_layer",))
    refused(path, tmp_path, r"objective.region_head.last_layer.weight_g: absent .*weight_v: absent")
    path = theirs.save(tmp_path / "headless.pth", without=("head",))
    refused(path, tmp_path, "holds no view head; --to safetensors needs none")
    convert(path, tmp_path / "trunk.safetensors", "esvit", "safetensors")
    with pytest.raises(UserError, match="holds no heads; leave out --heads"):
        convert(path, tmp_path / "heads.safetensors", "esvit", "safetensors", heads=True)


def test_missing_network_is_an_error(tmp_path: Path) -> None:
    content = theirs.content()
    torch.save({"teacher": content["teacher"]}, tmp_path / "t.pth")
    refused(tmp_path / "t.pth", tmp_path, "holds no student; --to safetensors needs none")
    with pytest.raises(UserError, match="holds no student, only the teacher"):
        convert(tmp_path / "t.pth", tmp_path / "s.safetensors", "esvit", "safetensors", "student")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "m.pth")
    refused(tmp_path / "m.pth", tmp_path, "no network in it .*; it holds epoch, model")
    torch.save([1, 2], tmp_path / "l.pth")
    refused(tmp_path / "l.pth", tmp_path, "holds a list")


def test_pickle_with_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> object:
            return (os.mkdir, (str(marker),))

    refused(theirs.save(tmp_path / "evil.pth", args=Evil()), tmp_path, r"asks for \w+.mkdir, which weights do not need")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    refused(tmp_path / "raw.pth", tmp_path, "a Python pickle but no checkpoint of torch.save; it was not opened")
    assert not marker.exists()


def test_flipped_bit_is_detected(pth: Path, tmp_path: Path) -> None:
    data = bytearray(pth.read_bytes())
    with zipfile.ZipFile(pth) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[largest.header_offset + largest.file_size // 2] ^= 1
    (tmp_path / "bad.pth").write_bytes(data)
    refused(tmp_path / "bad.pth", tmp_path, "bad.pth: damaged")
    refused(tmp_path / "bad.pth", tmp_path, "bad.pth: damaged", "safetensors")


def test_contradictory_arguments_are_refused(pth: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to convert"):
        convert(pth, tmp_path / "x", "esvit", "esvit")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        convert(pth, tmp_path / "x.bin", "esvit", "safetensors")
    with pytest.raises(UserError, match="holds both networks and all heads"):
        convert(pth, tmp_path / "x", "esvit", "esvit-scale", "student")
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "nowhere.pth", tmp_path / "x", "esvit", "esvit-scale")


def test_foreign_and_damaged_files_are_refused(pth: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    convert(pth, tmp_path / "good.safetensors", "esvit", "safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-9])
    tensors, config = load_file(tmp_path / "good.safetensors"), official.read(pth).config
    metadata = {"format": "esvit-scale", "network": "teacher", "config": json.dumps(config.model_dump(mode="json"))}
    save_file(tensors, tmp_path / "newer.safetensors", metadata | {"format_version": "99"})
    del tensors["trunk.norm.weight"]
    save_file(tensors, tmp_path / "hole.safetensors", metadata | {"format_version": "1"})
    for name, match in {
        "foreign": "not a file of esvit-scale",
        "cut": r"a safetensors file cut short: \d+ of \d+ bytes",
        "newer": "format version 99; this version of esvit-scale reads 1",
        "hole": r"norm.weight: absent in the checkpoint",
        "nowhere": "no such",
    }.items():
        with pytest.raises(UserError, match=match):
            state.load_teacher(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"esvit-scale convert .* --from esvit --to safetensors"):
        state.load_teacher(pth)


def test_damaged_step_folder_is_not_converted(pth: Path, tmp_path: Path) -> None:
    convert(pth, tmp_path / "ours", "esvit", "esvit-scale")
    file = next((tmp_path / "ours").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: .* has changed since it was written"):
        read(tmp_path / "ours")


def test_trunk_unknown_to_the_official_code_is_refused(tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", tmp_path, model__trunk="swinv2_t")
    network = build_network(config)
    initialize(network, 0)
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    weights = Weights(config, {"student": tensors, "teacher": tensors}, {})
    state.write_weights(tmp_path / "ours", weights)
    with pytest.raises(UserError, match="the official code has no trunk swinv2_t; use --to safetensors"):
        convert(tmp_path / "ours", tmp_path / "theirs.pth", "esvit-scale", "esvit")
    convert(tmp_path / "ours", tmp_path / "t.safetensors", "esvit-scale", "safetensors")
    trunk, _ = state.load_teacher(tmp_path / "t.safetensors")
    image = [torch.ones(1, 3, 32, 32)]
    assert torch.equal(trunk(image).view, network.trunk(image).view)
