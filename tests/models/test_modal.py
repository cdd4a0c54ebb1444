"""The multimodal trunk: its tokens, masks and DropToken, and the published sizes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initialize
from esvit_scale.models.modal import ModalTrunk
from esvit_scale.models.modal_tokens import SpectrogramTokens, kept_tokens
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.traced import signals_cost
from esvit_scale.objective.registry import build_objective

DATA = {
    "global_crops": {"size": 16, "count": 2},
    "local_crops": [],
    "audio": {"views": 1, "rate": 1000, "seconds": 0.06},
    "video": {"views": 1, "frames": 10, "size": 8},
    "text": {"views": 2, "length": 6},
}
MODEL = {"trunk": "modal_small", "embed_dim": 16, "depths": [2], "heads": [2]}


def config_of(data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **modalities: Any) -> Config:
    modalities = {"patch": 4, "waveform_patch": 7, "drop_audio": 0.0, "drop_video": 0.0, **modalities}
    values = {
        "data": {**DATA, **(data or {})},
        "model": {**MODEL, "drop_path": 0.0, **(model or {}), "modalities": modalities},
        "objective": {"name": "vatt"},
    }
    return configs.validate(values, where="modal")


def trunk_of(config: Config, double: bool = True) -> ModalTrunk:
    trunk = build_trunk(config)
    assert isinstance(trunk, ModalTrunk)
    initialize(trunk, 1)
    return trunk.double() if double else trunk


def signals_of(n: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Signals of n sequences of fresh values and lengths; the first lacks its modality."""
    audio = torch.rand(n, 60, dtype=torch.float64) - 0.5
    video = torch.randn(n, 3, 10, 8, 8, dtype=torch.float64)
    text = torch.randint(1, 257, (n, 6))
    found = {}
    for name, values, longest in (("audio", audio, 60), ("video", video, 10), ("text", text, 6)):
        lengths = torch.randint(1, longest + 1, (n,))
        lengths[0] = 0
        axis = 2 if name == "video" else 1
        place = torch.arange(values.shape[axis]).view([-1 if d == axis else 1 for d in range(values.ndim)])
        found[name] = (torch.where(place < lengths.view(-1, *[1] * (values.ndim - 1)), values, 0), lengths)
    return found


def slow_block(block: Any, x: Tensor) -> Tensor:
    """A pre-norm block on one sequence [L, C], head by head and query by query."""
    qkv = block.attn.qkv(block.norm1(x))
    heads, width = block.attn.heads, x.shape[1] // block.attn.heads
    q, k, v = (part.view(len(x), heads, width) for part in qkv.chunk(3, 1))
    mixed = torch.stack(
        [
            torch.cat([(q[i, h] @ k[:, h].t() / width**0.5).softmax(0) @ v[:, h] for h in range(heads)])
            for i in range(len(x))
        ]
    )
    x = x + block.attn.proj(mixed)
    mlp = block.mlp
    return x + F.linear(F.gelu(mlp.fc1(block.norm2(x))), mlp.fc2.weight, mlp.fc2.bias)


def slow_tokens(trunk: ModalTrunk, name: str, values: Tensor, length: int) -> Tensor:
    """The valid tokens of one signal with positions, aggregation token first, cut out one by one."""
    embed: Any = trunk.embed[name]
    tokens = []
    if name == "audio":
        for i in range(-(-length // 7)):
            piece = torch.zeros(7, dtype=values.dtype)
            cut = values[7 * i : 7 * i + 7]
            piece[: len(cut)] = cut
            tokens.append(embed.proj(piece) + embed.positions[i])
    elif name == "text":
        tokens = [embed.table.weight[values[i]] + embed.positions[i] for i in range(length)]
    else:
        for t in range(-(-length // 4)):
            for y in range(2):
                for x in range(2):
                    tube = torch.zeros(3, 4, 4, 4, dtype=values.dtype)
                    cut = values[:, 4 * t : 4 * t + 4, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
                    tube[:, : cut.shape[1]] = cut
                    place = (
                        embed.frame_positions[t, 0, 0] + embed.row_positions[0, y, 0] + embed.column_positions[0, 0, x]
                    )
                    tokens.append(embed.proj(tube.flatten()) + place)
    return torch.stack([embed.aggregate[0, 0], *tokens])


@pytest.mark.parametrize("backbone", ["shared", "separate"])
def test_every_sequence_and_its_gradients_match_one_pass_of_its_valid_tokens(backbone: str) -> None:
    """Packing, padding and missing modalities change nothing: 1e-9 in float64."""
    trunk = trunk_of(config_of(backbone=backbone))
    crops, signals = [torch.randn(2, 3, 16, 16).double(), torch.randn(3, 3, 8, 8).double()], signals_of()
    found = trunk(crops, None, signals)
    fast, slow = [], []
    for name, (values, lengths) in signals.items():
        transformer: Any = trunk.transformers["shared" if backbone == "shared" else name]
        assert found.signals[name].present.tolist() == (lengths > 0).tolist()
        for i in range(len(values)):
            x = slow_tokens(trunk, name, values[i], int(lengths[i]))
            for block in transformer.blocks:
                x = slow_block(block, x)
            x = transformer.norm(x)
            fast += [found.signals[name].view[i], *found.signals[name].tokens[i][found.signals[name].valid[i]]]
            slow += list(x)
    assert len(fast) == len(slow)
    a, b = torch.stack(fast), torch.stack(slow)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    weight = torch.randn_like(a)
    named = [(n, p) for n, p in trunk.named_parameters() if "embed.image" not in n and "transformers.image" not in n]
    ours, theirs = (torch.autograd.grad((x * weight).sum(), [p for _, p in named]) for x in (a, b))
    for (n, _), x, y in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9, msg=n)
    alone = trunk(crops, None)
    torch.testing.assert_close(alone.view, found.view, rtol=0, atol=1e-12)
    assert alone.grids == [(2, 4, 4), (3, 2, 2)]


def test_droptoken_keeps_the_right_number_by_keys_alone() -> None:
    counts = torch.tensor([0, 1, 5, 9, 10])
    keys = drop_keys(3, 7, torch.arange(5), 1)
    index, valid = kept_tokens(counts, 10, keys, 0.5)
    assert index.shape == (5, 5)
    assert valid.sum(1).tolist() == [0, 1, 3, 5, 5]
    for row, ok, count in zip(index, valid, counts, strict=True):
        assert (row[ok] < count).all()
        assert (row[ok].diff() > 0).all()
    for i in range(5):  # whoever else is in the batch
        alone, _ = kept_tokens(counts[i : i + 1], 10, keys[i : i + 1], 0.5)
        assert torch.equal(alone[0][valid[i]], index[i][valid[i]])
    many = drop_keys(0, 1, torch.arange(4000), 1)
    index, _ = kept_tokens(torch.full((4000,), 10), 10, many, 0.5)
    shares = torch.stack([(index == i).any(1).double().mean() for i in range(10)])
    assert (shares - 0.5).abs().max() < 0.04  # five standard errors


def test_droptoken_shortens_training_sequences_only() -> None:
    trunk = trunk_of(config_of(drop_audio=0.5, drop_video=0.25))
    crops, signals = [torch.randn(3, 3, 16, 16).double()], signals_of()
    keys = drop_keys(0, 0, torch.arange(3), 4)
    trained, seen = trunk(crops, keys, signals), trunk(crops, None, signals)
    assert trained.signals["audio"].tokens.shape[1] == 5  # of 9
    assert seen.signals["audio"].tokens.shape[1] == 9
    assert trained.signals["video"].tokens.shape[1] == 9  # of 12
    one = {name: (values[1:2], lengths[1:2]) for name, (values, lengths) in signals.items()}
    alone = trunk([crops[0][1:2]], keys.view(4, 3)[:, 1], one)
    for name in one:
        torch.testing.assert_close(alone.signals[name].view[0], trained.signals[name].view[1], rtol=0, atol=1e-9)


def test_spectrogram_matches_its_definition_and_ignores_loudness() -> None:
    rate, samples = 1000, 105
    tokens = SpectrogramTokens(8, rate, samples)
    values, lengths = torch.randn(2, samples).double(), torch.tensor([105, 63])
    values[1, 63:] = 0
    found = tokens.spectrogram(values, (lengths + 9) // 10)
    assert found.shape == (2, 11, 64)
    mels = np.linspace(0, 2595 * np.log10(1 + 500 / 700), 66)
    edges = 700 * (10 ** (mels / 2595) - 1)
    for i in range(2):
        frames = -(-int(lengths[i]) // 10)
        logs = np.zeros((frames, 64))
        for t in range(frames):
            cut = np.zeros(32)
            piece = values[i, 10 * t : 10 * t + 25].numpy()
            cut[: len(piece)] = piece * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(len(piece)) / 25))
            power = [abs(sum(cut[s] * np.exp(-2j * np.pi * f * s / 32) for s in range(32))) ** 2 for f in range(17)]
            for m in range(64):
                low, mid, high = edges[m : m + 3]
                bands = [
                    min((f * rate / 32 - low) / (mid - low), (high - f * rate / 32) / (high - mid)) for f in range(17)
                ]
                logs[t, m] = np.log(sum(max(b, 0) * p for b, p in zip(bands, power, strict=True)) + 1e-6)
        logs = (logs - logs.mean()) / logs.std()
        torch.testing.assert_close(found[i, :frames], torch.from_numpy(logs), rtol=0, atol=1e-9)
        assert not found[i, frames:].any()
    assert not tokens.spectrogram(torch.zeros(1, samples), torch.tensor([0])).any()


@pytest.mark.parametrize(
    ("name", "layers", "transformer", "published"),
    [("modal_medium", 12, 151_156_736, 155.0e6), ("modal_large", 24, 302_311_424, 306.1e6)],
)
def test_published_sizes(name: str, layers: int, transformer: int, published: float) -> None:
    """VATT's shared backbones: width 1024, 16 heads, MLP 4096; 155.0 and 306.1 million with tokenizers."""
    data = {"global_crops": {"size": 224}, "audio": {"views": 1, "rate": 48_000, "seconds": 3.2}}
    data |= {"video": {"views": 1, "frames": 32, "size": 224}, "text": {"views": 1, "length": 16}}
    values = {"data": data, "model": {"trunk": name}, "objective": {"name": "vatt"}}
    with torch.device("meta"):
        trunk = build_trunk(configs.validate(values, where=name))
    assert isinstance(trunk, ModalTrunk)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert len(trunk.blocks) == layers
    assert count(trunk.transformers) == transformer
    image = count(trunk.embed["image"])  # VATT has none
    assert count(trunk) - image == transformer + 4_827_136
    assert abs((count(trunk) - image) / published - 1) < 0.01
    assert trunk.embed["audio"].positions.shape == (1200, 1024)


@pytest.mark.parametrize("backbone", ["shared", "separate"])
def test_flops_of_signals_are_those_of_their_products(backbone: str) -> None:
    """Tokenizers, and per block qkv, proj, MLP and attention; DropToken shortens what the student's blocks see."""
    found = signals_cost(config_of(backbone=backbone, drop_audio=0.5, drop_video=0.25))
    c, projections = 16, 2 * 16 * (9 * 7 + 12 * 3 * 4 * 4 * 4)
    for flops, lengths in zip(found, ([10, 13, 7, 7], [6, 10, 7, 7]), strict=True):
        assert flops == projections + 2 * sum(24 * c * c * n + 4 * n * n * c for n in lengths)


def test_configs_that_do_not_fit_are_refused() -> None:
    def built(**changes: Any) -> None:
        config = config_of(**changes)
        build_objective(build_trunk(config), config)

    with pytest.raises(UserError, match=r"objective.pairs: no pair has video"):
        built()
    with pytest.raises(UserError, match=r"data.audio.views: objective.pairs has audio, which is not read"):
        built(data={"audio": {"views": 0}, "video": {"views": 0}})
    with pytest.raises(UserError, match=r"sees images alone"):
        built(data={"video": {"views": 0}}, model={"trunk": "deit_s"})


def slow_attention(trunk: ModalTrunk, modality: str, tokens: Tensor) -> list[Tensor]:
    """[heads, L, L] of every block for the tokens [L, C] of one sequence alone: loops over heads, queries and keys."""
    one = trunk.transformers[modality if modality in trunk.transformers else "shared"]
    found, x = [], tokens
    for block in one.blocks:
        heads, dim = block.attn.heads, x.shape[1] // block.attn.heads
        q, k, v = F.linear(block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, 1)
        weights, mixed = x.new_zeros(heads, len(x), len(x)), torch.zeros_like(x)
        for head in range(heads):
            own = slice(head * dim, (head + 1) * dim)
            for i in range(len(x)):
                scores = torch.stack([sum(q[i, c] * k[j, c] for c in range(*own.indices(9999))) for j in range(len(x))])
                weights[head, i] = (scores / dim**0.5).exp() / (scores / dim**0.5).exp().sum()
                mixed[i, own] = sum(weights[head, i, j] * v[j, own] for j in range(len(x)))
        found.append(weights)
        x = x + F.linear(mixed, block.attn.proj.weight, block.attn.proj.bias)
        x = x + block.mlp(block.norm2(x))
    return found


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["shared", "separate"])
def test_attention_is_that_of_every_sequence_alone(backbone: str) -> None:
    trunk = trunk_of(config_of(backbone=backbone))
    for p in trunk.parameters():
        torch.nn.init.normal_(p, std=0.4)
    signals, images = signals_of(2), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = trunk.attention([images], signals)
    assert list(found) == ["image", "audio", "video", "text"]
    for modality, (embedded, valid) in trunk._sequences([images], None, signals):
        there = found[modality].valid
        assert valid is None or torch.equal(valid, there)
        assert len(found[modality].blocks) == 2
        for row, tokens in enumerate(embedded):
            for got, slow in zip(
                found[modality].blocks, slow_attention(trunk, modality, tokens[there[row]]), strict=True
            ):
                torch.testing.assert_close(got[row][:, there[row]][:, :, there[row]], slow, rtol=0, atol=1e-12)
                assert not got[row][:, :, ~there[row]].any()
    blocks = trunk.attention_maps(images[1])
    received = found["image"].blocks[1][1][:, 1:, 1:].mean(1) * 5  # patches ask; 4 of them and the aggregation token
    torch.testing.assert_close(blocks[1].received().flatten(1), received)
