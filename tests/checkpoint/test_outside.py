"""Networks of other people (`timm:NAME@FILE`, `hf:FOLDER`): the same features as in the libraries they come from."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from esvit_scale import load_backbone
from esvit_scale.checkpoint import outside
from esvit_scale.errors import UserError

TOWER = "vit_xsmall_patch16_clip_224"


def openai_names(network: Any) -> dict[str, torch.Tensor]:
    """A timm tower's tensors as OpenAI's whole CLIP names them, in half precision, with a part of the text tower."""
    found = {"visual.proj": torch.randn(256, 64), "token_embedding.weight": torch.randn(9, 4)}
    back = {
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
    }
    back |= {"blocks.": "transformer.resblocks.", "norm1": "ln_1", "norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj"}
    for name, tensor in network.state_dict().items():
        if name == "cls_token":
            name, tensor = "class_embedding", tensor.flatten()
        elif name == "pos_embed":
            name, tensor = "positional_embedding", tensor[0]
        elif name.startswith("norm."):
            name = name.replace("norm.", "ln_post.")
        for ours, theirs in back.items():
            name = name.replace(ours, theirs)
        found[f"visual.{name}"] = tensor
    return {name: tensor.half().contiguous() for name, tensor in found.items()}


@pytest.mark.slow
def test_timm_towers_give_timms_features(tmp_path: Path) -> None:
    network = timm.create_model(TOWER).eval()  # with its projection to 512, which is left out
    for p in network.parameters():
        p.data = p.data.half().float()  # so that the file in half precision holds the same numbers
    save_file(network.state_dict(), tmp_path / "timm.safetensors")
    torch.save({"state_dict": openai_names(network)}, tmp_path / "clip.pt")
    timm.models.save_for_hf(network, tmp_path / "folder", safe_serialization=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        wanted = network.forward_head(network.forward_features(images), pre_logits=True)  # [2, 256]
        for source in (
            f"timm:{TOWER}@{tmp_path}/timm.safetensors",
            f"timm:{TOWER}@{tmp_path}/clip.pt",
            f"hf:{tmp_path}/folder",
        ):
            found = load_backbone(source)
            assert (found(images) - wanted).abs().max() < 1e-5, source  # the same operations in fp32
            assert found.config.data.mean == pytest.approx(outside.CLIP_MEAN)
    about = json.loads((tmp_path / "folder" / "config.json").read_text())
    about["model_args"] = {**about.get("model_args", {}), "class_token": False}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"config.json: model_args: class_token cannot be set here; a plain vit_xsmall"):
        load_backbone(f"hf:{tmp_path}/folder")
    tensors = load_file(tmp_path / "timm.safetensors")
    del tensors["blocks.3.mlp.fc1.bias"]
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"another architecture: network.blocks.3.mlp.fc1.bias: absent"):
        load_backbone(f"timm:{TOWER}@{tmp_path}/part.safetensors")
    with pytest.raises(UserError, match=r"no weights of timm:resnet18: it lacks conv1.weight .*looks like a DeiT"):
        load_backbone(f"timm:resnet18@{tmp_path}/timm.safetensors")


def tiny_clip(folder: Path) -> Any:
    """Save a random CLIP with a byte-level tokenizer as transformers does; return it."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 4}
    vision |= {"image_size": 224, "patch_size": 16, "hidden_act": "gelu"}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {
        "vocab_size": 514,
        "max_position_embeddings": 24,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
    }
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)  # biases and norms, too
    model.save_pretrained(folder)
    alphabet = sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{a}</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.slow
def test_clip_folder_gives_transformers_features_and_zero_shot_scores(tmp_path: Path) -> None:
    from esvit_scale.evaluate import zero_shot

    model = tiny_clip(tmp_path / "clip")
    images = torch.randn(3, 3, 224, 224)
    backbone, tower = load_backbone(f"hf:{tmp_path}/clip"), zero_shot.text_tower(f"hf:{tmp_path}/clip")
    assert tower is not None
    prompts = ["a photo of a {}.", "{}!"]
    with torch.no_grad():
        view = backbone(images)
        assert (view - model.vision_model(images).pooler_output).abs().max() < 1e-4  # 10 blocks in fp32
        found = zero_shot.scores(tower, view, zero_shot.class_embeddings(tower, ["red_cat", "dog"], prompts))
        for k, name in enumerate(("red cat", "dog")):
            embeddings = []
            for prompt in prompts:
                tokens = tower._tokenizer([prompt.replace("{}", name)], return_tensors="pt")
                out = model(**tokens, pixel_values=images)
                embeddings.append(out.text_embeds[0] / out.text_embeds[0].norm())
            mean = sum(embeddings) / 2
            wanted = out.image_embeds @ (mean / mean.norm())
            assert (found[:, k] - wanted).abs().max() < 1e-5  # cosines
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "text_model" not in n}, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(UserError, match="its text tower is incomplete"):
        zero_shot.text_tower(f"hf:{tmp_path}/clip")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        ({"open_clip_config.json": "{}"}, "a folder of open_clip; name timm's network and the file: timm:"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": '{"model_type": "bert"}'}, "a network of type 'bert'; can be read: clip"),
        ({"config.json": '{"architecture": "vit_tiny_patch16_22"}'}, "did you mean 'vit_tiny_patch16_224'"),
        ({"config.json": '{"architecture": "resnet18"}'}, "no weights .model.safetensors or pytorch_model.bin"),
        (
            {"config.json": '{"model_type": "clip", "vision_config": {"hidden_size": 768, "patch_size": 30}}'},
            "no known image tower of CLIP .*nearest: 768, 12, 12, 32, 224",
        ),
    ],
)
def test_folders_that_cannot_be_read_are_named(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_backbone(f"hf:{tmp_path}")
    assert "\n" not in str(error.value)


def test_weights_that_are_not_there_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UserError, match=r"nothing is downloaded; fetch them with `hf download timm/resnet18.a1_in1k`"):
        load_backbone("timm:resnet18.a1_in1k")
    with pytest.raises(UserError, match="no such file"):
        load_backbone(f"timm:resnet18@{tmp_path}/none.safetensors")
