"""What is wrong with two sets, said before features are computed; and how many classes a split leaves in one part."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale import cli
from esvit_scale.errors import UserError
from esvit_scale.evaluate import overlap
from esvit_scale.evaluate.overlap import check_train_and_test, find_shared
from esvit_scale.evaluate.transfer_list import read_labels


def photo(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def one_each(tmp_path: Path) -> Path:
    """Twelve classes with one image each, in train and in test, whose images have the same names."""
    for c in range(12):
        photo(tmp_path / "train" / f"c{c:02d}" / "0.png", c)
        photo(tmp_path / "test" / f"c{c:02d}" / "0.png", 100 + c)
    return tmp_path


def created(source: Path, out: Path, *options: str) -> None:
    assert cli.main(["shards", "create", str(source), str(out), "--workers", "1", *options]) == 0


@pytest.mark.parametrize("shards", [False, True])
def test_classes_with_one_image_are_accepted(one_each: Path, caplog: pytest.LogCaptureFixture, shards: bool) -> None:
    """Equal names are no equal images."""
    sets = [one_each / "train", one_each / "test"]
    if shards:
        for path in sets:
            created(path, one_each / f"{path.name}-shards")
        sets = [one_each / f"{path.name}-shards" for path in sets]
    check_train_and_test(sets[:1], sets[1], "k-NN")
    assert not caplog.records


def test_class_without_training_images_is_reported_missing(one_each: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both parts of a split list all classes; k-NN gave 0.0 % and exit 0."""
    created(one_each / "train", one_each / "sets", "--val-fraction", "0.4")
    said = capsys.readouterr()
    numbers = {part: len(list_labels(one_each / "sets" / part)) for part in ("train", "val")}
    assert sum(numbers.values()) == 12
    expected = (
        f"of 12 classes, {numbers['train']} have samples in train only, {numbers['val']} have samples in val only"
    )
    assert expected in said.out + said.err
    with pytest.raises(
        UserError, match=rf"test set: {numbers['val']} of its {numbers['val']} classes have no training"
    ):
        check_train_and_test([one_each / "sets" / "train"], one_each / "sets" / "val", "k-NN")


def list_labels(shards: Path) -> dict[int, int]:
    from esvit_scale.data.evaluation import items_of

    return items_of(shards).labels()


def test_identical_sets_and_shared_images_are_reported(one_each: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = one_each / "train", one_each / "test"
    check_train_and_test([train], one_each / "." / "train", "k-NN")
    assert "train and test are the same set" in caplog.text
    caplog.clear()
    for c in (3, 7):
        shutil.copy(train / f"c{c:02d}" / "0.png", test / f"c{c:02d}" / "other name.png")
    check_train_and_test([train], test, "k-NN")
    assert f"{test}: 2 of 14 images have the same bytes as one of {train}, for example c03/other" in caplog.text
    caplog.clear()
    created(train, one_each / "shards")
    check_train_and_test([one_each / "shards"], train, "k-NN")
    assert "12 of 12 images have the same bytes" in caplog.text


def test_compared_images_are_spread_over_the_whole_test_set(one_each: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """714 images, of which 500 are compared: the first 500 were taken, and "all 714" reported."""
    monkeypatch.setattr(overlap, "COMPARED", 8)
    shutil.copy(one_each / "train" / "c11" / "0.png", one_each / "test" / "c11" / "0.png")
    found = find_shared(one_each / "train", one_each / "test")
    assert found == (1, 8, 12, "c11/0.png")
    assert found.in_words() == "1 of 8 compared images (of 12)"


def test_blocks_of_a_large_training_set_are_looked_through(one_each: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "BLOCK", 2)
    assert find_shared(one_each / "train", one_each / "train", most=4).images == 4
    assert find_shared(one_each / "train", one_each / "train", most=12).images == 12


def test_commands_check_the_sets_before_reading_weights(one_each: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(one_each / "train" / "c03")
    sets = ["--train", str(one_each / "train"), "--test", str(one_each / "test"), "--out", str(one_each / "out")]
    for command in ("knn", "linear"):
        assert cli.main(["evaluate", command, "--checkpoint", str(one_each / "no such weights"), *sets]) == 2
        assert "1 of its 12 classes have no training sample: 'c03'" in capsys.readouterr().err
    assert not (one_each / "out").exists()


@pytest.mark.parametrize("part", ["train", "test"])
def test_image_outside_class_folders_is_named_before_extraction(
    one_each: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = photo(one_each / part / "cover.png", 5)
    sets = ["--train", str(one_each / "train"), "--test", str(one_each / "test"), "--out", str(one_each / "out")]
    assert cli.main(["evaluate", "knn", "--checkpoint", str(one_each / "no such weights"), *sets]) == 2
    assert f"{stray}: has no label, and k-NN needs one for every image; move it" in capsys.readouterr().err


def test_unlabelled_sample_is_named_before_extraction(one_each: Path) -> None:
    """The manifest has classes, and by its index the second sample has no `.cls`."""
    created(one_each / "train", one_each / "set")
    (tar,) = (one_each / "set").glob("*.tar")
    index = tar.with_suffix(".index.jsonl")
    lines = index.read_text().splitlines()
    key, members = json.loads(lines[2])
    lines[2] = json.dumps([key, {"png": members["png"]}])
    index.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"set/{tar.name}: sample 1: has no label, .*; write the shards again"):
        check_train_and_test([one_each / "train"], one_each / "set", "k-NN")


def test_multi_label_tables_from_pandas_are_read(tmp_path: Path) -> None:
    """A column with a missing value becomes floats, one of booleans words."""
    table = tmp_path / "labels.csv"
    table.write_text("image,a,b,c,d\n1.jpg,1.0,True,yes,\n2.jpg,0.0,False,No,NaN\n3.jpg,1,0,1.,0.\n")
    classes, rows = read_labels(table)
    assert classes == ("a", "b", "c", "d")
    assert np.array_equal(rows["1"], [1, 1, 1, np.nan], equal_nan=True)
    assert np.array_equal(rows["2"], [0, 0, 0, np.nan], equal_nan=True)
    assert rows["3"] == [1, 0, 1, 0]
    for cell, match in (("0.5", "line 2: '0.5' is not 1, 0"), ("-1", "0 means absent; leave"), ("2", "'2'")):
        table.write_text(f"image,a\n1.jpg,{cell}\n")
        with pytest.raises(UserError, match=match):
            read_labels(table)
