"""Labels that are numbers: which class each one means."""

from pathlib import Path

import pytest

from esvit_scale.data.class_names import numbered, numbered_as
from esvit_scale.data.evaluation import evaluation_batches
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.errors import UserError
from tests.data.source_helpers import classes, contents, write


def test_folders_named_by_numbers_keep_their_numbers(tmp_path: Path) -> None:
    root = classes(tmp_path / "src", ["0", "2", "10"], 1)
    manifest = write(root, tmp_path / "set")
    assert manifest.classes == tuple(map(str, range(11)))
    assert {label for label, _ in contents(manifest).values()} == {"0", "2", "10"}
    assert [batch.labels.tolist() for batch in evaluation_batches(root, 8, 4)] == [[0, 10, 2]]


NUMBERED = [
    (["3.0", "1", " 2", "", "-1", "nan"], ("0", "1", "2", "3"), [3, 1, 2, -1, -1, -1]),
    (["b", "a", "nan"], ("a", "b", "nan"), [1, 0, 2]),
    (["10", "9", "1.5"], ("1.5", "9", "10"), [2, 1, 0]),
    (["20260101", "7"], ("7", "20260101"), [1, 0]),
    (["-1", ""], (), [-1, -1]),
    (["10", "2.0", "unknown", "2", "-1", "nan"], ("10", "2", "unknown"), [0, 1, 2, 1, -1, -1]),
    (["cat", "-1", "NA", "dog"], ("NA", "cat", "dog"), [1, -1, 0, 2]),
    (["20260101", "20260101.0", "7", "-1"], ("7", "20260101"), [1, 1, 0, -1]),
]


@pytest.mark.parametrize(("texts", "names", "numbers"), NUMBERED)
def test_whole_numbers_are_class_numbers(texts: list[str], names: tuple[str, ...], numbers: list[int]) -> None:
    found, of = numbered(texts)
    assert (found, [of.get(text, -1) for text in texts]) == (names, numbers)


def test_numbers_are_matched_to_given_classes() -> None:
    assert list(numbered_as(["x", "y"], ["y", "0", "1.0", "-1", "2", "z", ""]).values()) == [1, 0, 1, -1, -2, -2, -1]
    assert numbered(["1", "01", "2"], folders=True) == (("01", "1", "2"), {"01": 0, "1": 1, "2": 2})
    with pytest.raises(UserError, match="label -3: class numbers begin at 0"):
        numbered(["-3", "4"])
    floats = ["0.0", "2", "1.0", "", "3.0", "-1.0"]
    assert list(numbered_as(["2", "1", "0"], floats).values()) == [2, 0, 1, -1, -2, -1]
    assert list(numbered_as(["5", "7", "07"], ["5.0", "7", "7.0", "0"]).values()) == [0, 1, -2, -2]


@pytest.mark.parametrize("names", ["2\n1\n0\n", "5\n7\n9\n"])
def test_numeric_class_names_of_a_set_are_kept(names: str, pictures: Path, tmp_path: Path) -> None:
    listed = names.split()
    (pictures / "x.csv").write_text(
        "path,y\n" + "".join(f"{i}.png,{name}.0\n" for i, name in enumerate(sorted(listed)))
    )
    (pictures / "names").write_text(names)
    first = contents(write(pictures / "x.csv", tmp_path / "sets" / "a", label="y", classes=pictures / "names"))
    assert sorted(label or "" for label, _ in first.values()) == sorted(listed)
    (pictures / "other").write_text("\n".join(sorted(listed)) + "\nmore\n")
    for number, options in enumerate(({}, {"classes": pictures / "names"}, {"classes": pictures / "other"})):
        assert contents(write(tmp_path / "sets" / "a", tmp_path / f"one{number}", **options)) == first
        assert contents(write(tmp_path / "sets", tmp_path / f"all{number}", kind="tars", **options)) == first


def test_unexpected_numbering_of_classes_is_noted(pictures: Path, tmp_path: Path) -> None:
    def notes(where: Path, **options: str) -> list[str]:
        return open_source(str(where), SourceOptions(**options))[""].notes  # type: ignore[arg-type]

    table = pictures / "x.csv"
    table.write_text("path,y\n0.png,10\n1.png,2\n2.png,unknown\n")
    assert "label 'unknown' is no class number, so all labels are taken as names" in notes(table, label="y")[0]
    table.write_text("path,y\n0.png,2019\n1.png,2020\n2.png,\n")
    assert "2 class numbers up to 2020 make 2021 classes" in notes(table, label="y")[0]
    table.write_text("path,y\n0.png,2\n1.png,10\n2.png,-1\n3.png,nan\n")
    assert notes(table, label="y") == []
    root = classes(tmp_path / "years", ["2019", "2020"], 1)
    assert "make 2021 classes" in notes(root)[0]
    (tmp_path / "names").write_text("\ufeff2019\n2020\n")
    manifest = write(root, tmp_path / "set", classes=tmp_path / "names")
    assert {label for label, _ in contents(manifest).values()} == {"2019", "2020"}

    (tmp_path / "list.txt").write_text("\ufeff0.png\n")
    assert [s.name(0) for s in open_source(str(tmp_path / "list.txt"), SourceOptions()).values()] == ["0.png"]
