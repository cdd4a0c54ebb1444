"""Position tables of another window or resolution: resized as the codes of the trunks' authors do it."""

import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from esvit_scale.checkpoint import safetensors_file, state
from esvit_scale.checkpoint.initial_weights import load_initial_weights
from esvit_scale.checkpoint.positions import resize_to_fit
from esvit_scale.checkpoint.weights import Weights, network_shapes
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.objective.network import build_network
from tests import tiny
from tests.models.rule import by_hash, fill

TABLE = "layers.0.attn.relative_position_bias_table"


def keys(distance: float) -> float:
    """Keys' cubic convolution kernel (1981) with a = −0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slowly(table: Tensor, old: int, new: int) -> Tensor:
    """[old², heads] → [new², heads]: each new offset from its 4×4 neighbours, the border's values going on outside."""
    out = torch.zeros(new * new, table.shape[1], dtype=torch.float64)
    for y in range(new):
        for x in range(new):
            cy, cx = ((i + 0.5) * old / new - 0.5 for i in (y, x))
            for row in range(math.floor(cy) - 1, math.floor(cy) + 3):
                for column in range(math.floor(cx) - 1, math.floor(cx) + 3):
                    at = min(max(row, 0), old - 1) * old + min(max(column, 0), old - 1)
                    out[y * new + x] += keys(cy - row) * keys(cx - column) * table[at].double()
    return out


@pytest.mark.parametrize(("old", "new"), [(7, 14), (14, 7), (7, 12), (4, 3), (1, 7)])
def test_resized_table_matches_formula_and_timm(old: int, new: int) -> None:
    before, after = 2 * old - 1, 2 * new - 1
    table = torch.randn(before**2, 3, generator=torch.Generator().manual_seed(0))
    fitted, said = resize_to_fit("here", {TABLE: table}, {TABLE: [after**2, 3]})
    assert said == f"position tables resized: 1 of {before}×{before} to {after}×{after}"
    torch.testing.assert_close(fitted[TABLE].double(), slowly(table, before, after), rtol=0, atol=1e-5)
    theirs = timm.layers.resize_rel_pos_bias_table_simple(table, (new, new), (after**2, 3))
    torch.testing.assert_close(fitted[TABLE], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_absolute_positions_keep_their_prefix(prefix: int) -> None:
    positions = torch.randn(1, prefix + 14**2, 8, generator=torch.Generator().manual_seed(0))
    fitted, said = resize_to_fit("here", {"pos_embed": positions}, {"pos_embed": [1, prefix + 24**2, 8]})
    arguments = {"num_prefix_tokens": prefix, "antialias": False}
    theirs = timm.layers.resample_abs_pos_embed(positions, [24, 24], **arguments)
    torch.testing.assert_close(fitted["pos_embed"], theirs, rtol=0, atol=1e-6)
    assert torch.equal(fitted["pos_embed"][:, :prefix], positions[:, :prefix])
    assert said.endswith("1 of 14×14 to 24×24")


def weights_of(folder: Path, **changes: object) -> Weights:
    config = tiny.config(folder / "source", folder, **changes)
    teacher = build_network(config)
    fill(teacher, by_hash)
    tensors = {name: p.detach() for name, p in teacher.state_dict().items()}
    return Weights(config, {"student": tensors, "teacher": tensors}, {})


def begun(source: Weights, folder: Path, **changes: object) -> tuple[Config, dict[str, Tensor], str]:
    """What a run with `changes` starts from when it names `source` as a file, which is the trunk alone."""
    trunk = {n: t for n, t in source.networks["teacher"].items() if n.startswith("trunk.")}
    safetensors_file.write(folder / "w.safetensors", Weights(source.config, {"teacher": trunk}, {}), "teacher")
    config = tiny.config(folder / "run", folder, model__init_from=str(folder / "w.safetensors"), **changes)
    found = load_initial_weights(config)
    return config, found.values, found.note


def vil(size: int, window: int) -> dict[str, object]:
    model = {"trunk": "vil_2262", "embed_dim": 8, "depths": [1, 1, 1, 1], "heads": [1, 1, 2, 4], "window": window}
    own = {f"model__{key}": value for key, value in model.items()}
    return own | {"data__local_crops": [], "data__global_crops__size": size}


def v2(window: int) -> dict[str, object]:
    return {"model__trunk": "swinv2_t", "model__window": window}


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        ({}, {"model__window": 8}, "1 of 7×7 to 15×15"),
        ({"model__window": 8}, {"model__window": 4}, "1 of 15×15 to 7×7"),
        ({}, {"data__global_crops__size": 64}, "2 of 3×3 to 7×7"),
        (v2(4), {**v2(8), "model__pretrained_windows": [4, 4, 2]}, ""),
        (vil(64, 3), vil(96, 3), "1 of 3×3 to 5×5, 1 of 7×7 to 11×11"),
        (vil(64, 3), vil(64, 4), "2 of 11×11 to 15×15"),
    ],
    ids=["window up", "window down", "resolution", "v2 has no table", "vil at another resolution", "vil's window"],
)
def test_run_at_another_resolution_starts_from_resized_tables(
    tmp_path: Path, before: dict, after: dict, note: str
) -> None:
    source = weights_of(tmp_path, **before)
    config, values, said = begun(source, tmp_path, **after)
    wanted = {n: s for n, s in network_shapes(config).items() if n.startswith("trunk.")}
    assert {name: list(value.shape) for name, value in values.items()} == wanted
    assert (f"trunk (position tables resized: {note})" if note else "trunk, view head not in the source") in said
    tables = 0
    for name, value in values.items():
        old = source.networks["teacher"][name]
        if old.shape == value.shape:
            assert torch.equal(value, old), name
        else:
            sides = (math.isqrt(len(old)), math.isqrt(len(value)))
            torch.testing.assert_close(value.double(), slowly(old, *sides), rtol=0, atol=1e-5)
            tables += 1
    assert bool(tables) == bool(note)


def test_tables_of_a_step_folder_are_resized(tmp_path: Path) -> None:
    source = weights_of(tmp_path)
    state.write_weights(tmp_path / "step", source)
    found = load_initial_weights(
        tiny.config(tmp_path / "run", tmp_path, model__init_from=str(tmp_path / "step"), model__window=8)
    )
    assert "trunk (position tables resized: 1 of 7×7 to 15×15), view head, region head" in found.note


def test_unresizable_table_is_an_error() -> None:
    names = {"relative_position_bias_table_to_neighbors": [1, 2, 9, 16]}
    with pytest.raises(
        UserError, match=r"another resolution or window, and 1 position tables.*\[1, 2, 4, 12\] in the source"
    ) as error:
        resize_to_fit("here", {n: torch.zeros(1, 2, 4, 12) for n in names}, names)
    assert "another architecture" not in str(error.value)
    with pytest.raises(UserError, match=r"another architecture: norm\.weight"):
        resize_to_fit(
            "here", {TABLE: torch.zeros(49, 2), "norm.weight": torch.ones(3)}, {TABLE: [9, 2], "norm.weight": [4]}
        )
    with pytest.raises(UserError, match="another architecture"):
        resize_to_fit(
            "here", {"pos_embed": torch.zeros(1, 197, 8), "w": torch.zeros(1)}, {"pos_embed": [1, 197, 16], "w": [2]}
        )
