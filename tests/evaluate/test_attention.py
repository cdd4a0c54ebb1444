"""Attention maps against a slow attention written out here, for both versions of Swin, with padding and shifts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from esvit_scale.errors import UserError
from esvit_scale.evaluate.attention import attention, components, read_picture
from esvit_scale.models.pyramid import Pyramid
from esvit_scale.models.swin import Swin
from esvit_scale.models.swin_v2 import SwinV2

# window 3 on maps of 8×8 and 4×4 (13×10 and 7×5 in the second picture): shifts, padding and masks everywhere
SHAPE = {"embed_dim": 8, "depths": (2, 2), "heads": (2, 4), "window": 3, "size": 32}
PICTURES = [(32, 32), (52, 40)]


def trunk_of(version: type[Swin], seed: int = 0) -> Swin:
    torch.manual_seed(seed)
    trunk = version(**SHAPE).double()
    for p in trunk.parameters():
        nn.init.normal_(p, std=0.5)
    return trunk


def slow_probabilities(trunk: Swin, image: torch.Tensor) -> list[torch.Tensor]:
    """[heads, T, T + pads] of every block: each query's attention over all tokens (0 outside its window), and as the
    last column over padding. A loop over blocks, windows, heads and queries, from the block's recorded input."""
    inputs: list[torch.Tensor] = []
    hooks = [b.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in trunk.blocks]
    trunk([image[None]])
    for hook in hooks:
        hook.remove()
    found, at = [], 0
    h, w = -(-image.shape[1] // 4), -(-image.shape[2] // 4)
    for s, (depth, heads) in enumerate(zip(SHAPE["depths"], SHAPE["heads"], strict=True)):
        n = SHAPE["window"]
        for i in range(depth):
            tokens = inputs[at][in_storage(h, w, n)]  # row-major
            shift = n // 2 if i % 2 else 0
            found.append(one_block(trunk.blocks[at].attn, tokens, h, w, n, shift, heads))
            at += 1
        h, w = -(-h // 2), -(-w // 2)
        assert s < 2
    return found


def in_storage(h: int, w: int, n: int) -> torch.Tensor:
    """Where the trunk keeps each row-major token: window by window, real tokens only."""
    order = [
        y * w + x
        for wy in range(0, h, n)
        for wx in range(0, w, n)
        for y in range(wy, min(wy + n, h))
        for x in range(wx, min(wx + n, w))
    ]
    return torch.tensor(order).argsort()


def one_block(attn: nn.Module, tokens: torch.Tensor, h: int, w: int, n: int, shift: int, heads: int) -> torch.Tensor:
    hp, wp, c = -(-h // n) * n, -(-w // n) * n, tokens.shape[1]
    padded = F.pad(tokens.view(h, w, c), (0, 0, 0, wp - w, 0, hp - h))
    number = F.pad(torch.arange(h * w).view(h, w), (0, wp - w, 0, hp - h), value=-1)
    out = torch.zeros(heads, h * w, h * w + 1, dtype=tokens.dtype)
    rolled, number = padded.roll((-shift, -shift), (0, 1)), number.roll((-shift, -shift), (0, 1))
    wraps = lambda i, length: shift > 0 and i >= length - shift  # noqa: E731
    for wy in range(0, hp, n):
        for wx in range(0, wp, n):
            places = [(y, x) for y in range(wy, wy + n) for x in range(wx, wx + n)]
            for query in places:
                if number[query] < 0:
                    continue
                scores = [
                    score(attn, rolled[query], rolled[key], query, key, heads)
                    - 100.0 * ((wraps(query[0], hp), wraps(query[1], wp)) != (wraps(key[0], hp), wraps(key[1], wp)))
                    for key in places
                ]
                for head, row in enumerate(torch.stack(scores, 1).softmax(1)):
                    for key, value in zip(places, row, strict=True):
                        out[head, number[query], number[key]] += value  # −1: the last column
    return out


def score(
    attn: nn.Module, q_token: torch.Tensor, k_token: torch.Tensor, q: tuple, k: tuple, heads: int
) -> torch.Tensor:
    """[heads]"""
    n, c = SHAPE["window"], len(q_token)
    dy, dx = q[0] - k[0], q[1] - k[1]
    if hasattr(attn, "logit_scale"):
        bias = torch.cat([attn.q_bias, torch.zeros(2 * c)])
        query = F.linear(q_token, attn.qkv.weight, bias)[:c].view(heads, -1)
        key = F.linear(k_token, attn.qkv.weight)[c : 2 * c].view(heads, -1)
        cosine = F.cosine_similarity(query, key, dim=1)
        scale = attn.logit_scale.flatten().clamp(max=math.log(100)).exp()
        spaced = [math.copysign(math.log2(abs(d) * 8 / (n - 1) + 1) / 3, d) for d in (dy, dx)]
        return scale * cosine + 16 * attn.cpb_mlp(torch.tensor(spaced, dtype=torch.float64)).sigmoid()
    query = attn.qkv.weight[:c] @ q_token + attn.qkv.bias[:c]
    key = attn.qkv.weight[c : 2 * c] @ k_token + attn.qkv.bias[c : 2 * c]
    product = (query * key).view(heads, -1).sum(1) / math.sqrt(c // heads)
    return product + attn.relative_position_bias_table[(dy + n - 1) * (2 * n - 1) + dx + n - 1]


@torch.no_grad()
@pytest.mark.parametrize("version", [Swin, SwinV2])
@pytest.mark.parametrize("size", PICTURES)
def test_attention_rows_sum_to_one_and_equal_slow_reference(version: type[Swin], size: tuple[int, int]) -> None:
    trunk, image = trunk_of(version), torch.randn(3, *size, dtype=torch.float64)
    blocks = attention(trunk, image)
    assert [(b.stage, b.block) for b in blocks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for block, expected in zip(blocks, slow_probabilities(trunk, image), strict=True):
        ones = torch.ones(block.probabilities.shape[:3], dtype=torch.float64)
        torch.testing.assert_close(block.probabilities.sum(-1), ones)
        h, w = block.grid
        for token in range(0, h * w, 5):
            row, pads = block.row(token)
            torch.testing.assert_close(row.flatten(1), expected[:, token, :-1], rtol=0, atol=1e-12)
            torch.testing.assert_close(pads, expected[:, token, -1], rtol=0, atol=1e-12)
        received = expected[:, :, :-1].sum(1)  # what a token gets, of how many queries its window asks
        queries = (expected[:, :, :-1] > 0).any(0).sum(0)
        share = received / queries * SHAPE["window"] ** 2
        torch.testing.assert_close(block.received().flatten(1), share, rtol=0, atol=1e-11)


@torch.no_grad()
def test_uniform_attention_is_one_everywhere() -> None:
    """Without scores every token gets its share: no window, shift or padding leaves a trace."""
    trunk = trunk_of(Swin)
    for block in trunk.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.relative_position_bias_table)
    for block in attention(trunk, torch.randn(3, 36, 48, dtype=torch.float64))[:1]:  # 9×12 tokens: no padding
        torch.testing.assert_close(block.received(), torch.ones_like(block.received()))


@torch.no_grad()
def test_components_are_principal_components_with_fixed_signs() -> None:
    from sklearn.decomposition import PCA

    trunk, image = trunk_of(Swin), torch.randn(3, 64, 48, dtype=torch.float64)
    found = components(trunk, image)
    assert [tuple(c.shape) for c in found] == [(3, 16, 12), (3, 8, 6)]
    for c, tokens in zip(found, Pyramid(trunk)(image[None]), strict=True):
        assert 0 <= c.min() < c.max() <= 1
        expected = PCA(3).fit_transform(tokens[0].flatten(1).T.numpy())
        for ours, theirs in zip(c.flatten(1).numpy(), expected.T, strict=True):
            inside = (ours > 0) & (ours < 1)
            assert abs(np.corrcoef(ours[inside], theirs[inside])[0, 1]) > 0.999999
    assert all(torch.equal(a, b) for a, b in zip(found, components(trunk, image), strict=True))


def test_trunk_without_attention_is_refused() -> None:
    with pytest.raises(UserError, match="the windows of a Swin; Linear has none"):
        attention(nn.Linear(2, 2), torch.zeros(3, 8, 8))  # type: ignore[arg-type]


def test_unreadable_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (60, 20), "red").save(tmp_path / "wide.png")
    assert read_picture(tmp_path / "wide.png", 40).shape == (40, 120, 3)
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.setattr("esvit_scale.evaluate.attention.MAX_PIXELS", 1000)
    for name, size, match in [
        ("wide.png", 40, r"120×40 pixels with the short side at 40.*nearest: --size 18$"),
        ("text.png", 40, "not an image"),
        ("nowhere.png", 40, "no such image"),
        ("", 40, "is a folder; name one image"),
    ]:
        with pytest.raises(UserError, match=match) as error:
            read_picture(tmp_path / name, size)
        assert "\n" not in str(error.value)
    assert read_picture(tmp_path / "wide.png", 18).shape[0] == 18
