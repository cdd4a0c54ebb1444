"""Weight files as people have them: read as what they hold, or called what they are."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import esvit_scale
from esvit_scale import cli
from esvit_scale.checkpoint import official
from esvit_scale.checkpoint.convert import convert
from esvit_scale.checkpoint.initial_weights import load_initial_weights
from esvit_scale.errors import UserError
from tests import tiny

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 19332096\n"
ANSWER = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code><Message>no</Message></Error>'
SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}


def saved(value: object, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def archived(names: tuple[str, ...]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("swin.pth"))
    return buffer.getvalue()


def safe(tensors: dict[str, Tensor], folder: Path) -> bytes:
    save_file(tensors, folder / "x")
    return (folder / "x").read_bytes()


NUMBERS = saved({"model": {"w": torch.zeros(3000)}})
ODD = {
    "": (b"", "not weights but an empty file"),
    "page": (
        b"\n<!DOCTYPE html><html><title>404: Not\nFound</title>",
        r"an HTML page \('404: Not Found'\), a server's answer",
    ),
    "page with a mark": (b"\xef\xbb\xbf<HTML><body>moved", "an HTML page, a server's answer"),
    "page in UTF-16": ("<!doctype html><title>Sign in</title>".encode("utf-16"), r"an HTML page \('Sign in'\)"),
    "latin page": (b"<html><title>Seite gel\xf6scht</title>", "an HTML page"),
    "store's answer": (ANSWER, r"an XML document \('AccessDenied'\)"),
    "pointer": (POINTER, r"a Git LFS pointer for 19332096 bytes \(`git lfs pull`"),
    "annex": (b"/annex/objects/SHA256E-s1--0.pth\n", "a git-annex pointer"),
    "json": (json.dumps({"error": "Repository not found"}).encode(), "JSON .*Repository not found"),
    "nested json": (b'{"data":{"message": "gone"}}', "JSON"),
    "words": (b"Not Found", r"a text file \('Not Found'\)"),
    "gzip": (gzip.compress(NUMBERS), "a gzip archive; unpack it first"),
    "tar": (tarred(), "a tar archive; unpack it first"),
    "zip": (archived(("weights/swin.pth",)), "a zip archive of weights/swin.pth; unpack it first"),
    "npz": (archived(("a.npy", "b.npy")), r"NumPy arrays \(.npz\)"),
    "TorchScript": (archived(("m/data.pkl", "m/constants.pkl", "m/code/x.py")), "a TorchScript program"),
    "cut zip": (NUMBERS[:5000], "a torch checkpoint cut short: 5000 bytes are there"),
    "cut legacy": (saved({"model": {"w": torch.zeros(3000)}}, legacy=True)[:4000], "damaged, or not a checkpoint"),
    "pickle": (pickle.dumps({"w": np.zeros(3)}), "a Python pickle but no checkpoint of torch.save; it was not opened"),
    "module": (saved(torch.nn.Linear(2, 2)), r"asks for torch.nn.modules.linear.Linear.*save its state_dict\(\)"),
    "a tensor": (saved(torch.zeros(3)), "not a checkpoint of networks: it holds a Tensor"),
    "zeros": (bytes(9000), "zeros at its beginning"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0", "a PNG picture"),
    "keras": (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file"),
    "noise": (b"\x93\x01\xfe" * 99, "an unknown file"),
    "safetensors without a list": ((30).to_bytes(8, "little") + b"{" + b" " * 40, "a damaged safetensors file"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_error_names_the_kind_of_a_file_without_weights(case: str, suffix: str, tmp_path: Path) -> None:
    """By every way in, in one line, whatever the name, and never with torch's advice to read it unsafely."""
    content, match = ODD[case]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    config = tiny.config(tmp_path / "run", tmp_path, model__init_from=str(path))
    ways = {
        "load_backbone": lambda: esvit_scale.load_backbone(path),
        "convert": lambda: convert(path, tmp_path / "x", "esvit", "safetensors"),
        "init_from": lambda: load_initial_weights(config),
    }
    for way, read in ways.items():
        with pytest.raises(UserError, match=match) as error:
            read()
        said = str(error.value)
        assert str(path) in said, way
        assert said.startswith("model.init_from: ") == (way == "init_from")
        assert "\n" not in said
        assert "weights_only" not in said
    assert not (tmp_path / "x").exists()


def test_commands_report_files_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.pth").write_bytes(POINTER)
    tiny.shards(tmp_path / "shards", 4)
    commands = (
        ["embed", "--data", str(tmp_path / "shards"), "--out", str(tmp_path / "f.npz")],
        [
            "evaluate",
            "knn",
            "--train",
            str(tmp_path / "shards"),
            "--test",
            str(tmp_path / "shards"),
            "--out",
            str(tmp_path),
        ],
    )
    for words in commands:
        assert cli.main([*words, "--checkpoint", str(tmp_path / "w.pth")]) == 2
        assert capsys.readouterr().err.count("Git LFS pointer for 19332096 bytes") == 1


def test_truncated_files_are_one_error_line(tmp_path: Path) -> None:
    """Half downloads of each kind; a legacy file has no directory at its end that would tell."""
    whole = {"zip": NUMBERS, "safe": safe({"w": torch.zeros(300)}, tmp_path)}
    for kind, content in whole.items():
        for length in (1, 3, 7, 8, 9, 20, 60, 100, len(content) // 2, len(content) - 1):
            (tmp_path / kind).write_bytes(content[:length])
            with pytest.raises(UserError) as error:
                official.read(tmp_path / kind)
            assert "\n" not in str(error.value)


# --- what is weights, by whatever name -------------------------------------------------------------------------------


def to_official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names → microsoft/Swin-Transformer's, whose merging is at a stage's end."""
    named = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        named[".".join(parts).replace("head.fc.", "head.")] = tensor
    return named


@pytest.fixture(scope="module")
def supervised() -> torch.nn.Module:
    torch.manual_seed(0)
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    model = timm.models.SwinTransformer(num_classes=10, norm_layer=norm, **SWIN).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "form", ["model", "state_dict", "bare", "legacy", "timm", "safetensors named .pth", "esvit-like"]
)
def test_published_trunk_file_is_read(form: str, supervised: torch.nn.Module, tmp_path: Path) -> None:
    tensors = supervised.state_dict()
    theirs = to_official(tensors)
    content = {
        "model": lambda: saved({"model": theirs, "epoch": 3}),
        "state_dict": lambda: saved({"state_dict": {"module." + name: tensor for name, tensor in theirs.items()}}),
        "bare": lambda: saved({name: tensor for name, tensor in theirs.items() if not name.startswith("head.")}),
        "legacy": lambda: saved({"model": theirs}, legacy=True),
        "timm": lambda: safe(tensors, tmp_path),
        "safetensors named .pth": lambda: safe(theirs, tmp_path),
        "esvit-like": lambda: saved({"student": theirs, "teacher": theirs}),
    }[form]()
    path = tmp_path / ("w.safetensors" if form in ("timm", "model") else "w.pth")
    path.write_bytes(content)
    x = torch.randn(2, 3, 224, 224)
    expected = supervised.forward_head(supervised.forward_features(x), pre_logits=True)
    torch.testing.assert_close(esvit_scale.load_backbone(path)(x), expected, rtol=0, atol=2e-5)


def test_classifier_is_skipped_with_a_notice(
    supervised: torch.nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": to_official(supervised.state_dict())}, tmp_path / "w.pth")
    official.read(tmp_path / "w.pth")
    assert caplog.messages == [f"{tmp_path / 'w.pth'}: its classifier (head.weight, head.bias) is left out"]


def test_own_file_named_pth_is_read_with_its_config(tmp_path: Path) -> None:
    model = timm.create_model("deit_small_patch16_224", num_classes=0, depth=1, embed_dim=64, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors", "esvit", "safetensors")
    (tmp_path / "ours.safetensors").rename(tmp_path / "ours.pth")
    found = esvit_scale.load_backbone(tmp_path / "ours.pth")
    assert (found.config.model.trunk, found.dim) == ("deit_s", 64)


def test_positions_of_deit_at_384_are_resized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = {"num_classes": 0, "depth": 1, "embed_dim": 64, "num_heads": 1}
    model = timm.create_model("deit_small_patch16_224", img_size=384, **arguments)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    found = dict(esvit_scale.load_backbone(tmp_path / "w.pth").trunk.named_parameters())["pos_embed"]
    expected = timm.layers.resample_abs_pos_embed(model.pos_embed.data, [14, 14], antialias=False)
    torch.testing.assert_close(found.data, expected, rtol=0, atol=1e-6)
    assert "position embeddings of a 24×24 map are resized to 14×14" in caplog.text
