"""CSV and TSV as pandas, Excel and people write them."""

from pathlib import Path

import pytest

from esvit_scale.data import left_out
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.errors import UserError
from tests.data.source_helpers import Capture, contents, counts, write


def test_pandas_floats_and_empty_cells_are_read(pictures: Path) -> None:
    (pictures / "x.csv").write_text(",path,y\n0,0.png,2.0\n1,1.png,\n2,2.png,10.0\n3,3.png,-1\n")
    manifest = write(pictures / "x.csv", pictures / "set", label="y")
    assert sorted(label or "" for label, _ in contents(manifest).values()) == ["10", "2"]
    assert counts(manifest) == {("images", left_out.UNLABELLED): 2}


def test_tsv_has_no_quoting_unless_asked(pictures: Path) -> None:
    text = 'path\twords\n0.png\t"quoted\n1.png\tb\n2.png\tends"\n3.png\td\n'
    (pictures / "x.tsv").write_text(text)
    found = contents(write(pictures / "x.tsv", pictures / "set", caption="words"))
    assert sorted(str(words) for _, words in found.values()) == ['"quoted', "b", "d", 'ends"']
    (pictures / "x.tsv").write_text('path\twords\n0.png\t"one\ntwo"\n')
    with pytest.raises(UserError, match=r"line 3 has 1 columns, too few .*--quoted"):
        write(pictures / "x.tsv", pictures / "set2", caption="words")
    found = contents(write(pictures / "x.tsv", pictures / "set3", caption="words", quoted=True))
    assert [words for _, words in found.values()] == ["one\ntwo"]


def test_semicolons_and_utf16_are_read(pictures: Path, capsys: Capture) -> None:
    text = "path;y\n0.png;São\n1.png;dog\n"
    for encoding in ("utf-8-sig", "utf-16"):
        (pictures / "x.csv").write_text(text, encoding)
        assert write(pictures / "x.csv", pictures / encoding, label="y").classes == ("São", "dog")
        assert "line 1: columns are separated by semicolons" in capsys.readouterr().err


TABLES = {
    "a quote that swallows rows": (
        'path,w\n0.png,"a\n1.png,b\n2.png,c"\n',
        "line 2: a quoted field continues over line 3",
    ),
    "a quote that is never closed": ('path,w\n0.png,"a\n', "line 2: not a readable row"),
    "a comma in a caption": ("path,w\n0.png,a\n1.png,a, b\n", "line 3 has 3 columns, too many"),
    "a name twice": ("path,w,w\n0.png,a,b\n", "line 1: columns 2 and 3 are both named 'w'"),
    "latin-1": ("path,w\n0.png,a\n1.png,S\udce3o\n", r"line 3: S\\xe3o is not UTF-8 \(Latin-1\?\)"),
    "utf-16 without a mark": ("p\0a\0t\0h\0", "UTF-16 without its mark"),
    "no label at all": ("path,w\n0.png,\n1.png,nan\n2.png,-1\n", "--label w: none of its 3 images has a class"),
}


@pytest.mark.parametrize("name", TABLES)
def test_errors_in_tables_name_the_line(name: str, pictures: Path) -> None:
    text, says = TABLES[name]
    (pictures / "x.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=says) as caught:
        open_source(str(pictures / "x.csv"), SourceOptions(label="w", caption=None if "label" in name else "w"))
    assert "\n" not in str(caught.value)


QUOTED = {
    "header": '"path"\t"w"\n"0.png"\t"1"\n',
    "paths": 'path\tw\n0.png\t1\n"1.png"\t1\n',
    "labels": 'path\tw\n0.png\t"1"\n',
    "a tab in quotes": 'path\tw\tc\n0.png\t1\t"a\tb"\n',
}


@pytest.mark.parametrize("name", QUOTED)
def test_quoted_tsv_error_names_the_option(name: str, pictures: Path) -> None:
    (pictures / "x.tsv").write_text(QUOTED[name])
    with pytest.raises(UserError, match=r"line \d.* fields are quoted, add --quoted"):
        open_source(str(pictures / "x.tsv"), SourceOptions(label="w"))
    [source] = open_source(str(pictures / "x.tsv"), SourceOptions(label="w", quoted=True)).values()
    assert (source.name(0), source.classes) == ("0.png", ("0", "1"))


def test_excel_tables_are_read_or_refused(pictures: Path) -> None:
    def opened(text: bytes, label: str | None = "y") -> tuple[tuple[str, ...], list[str]]:
        (pictures / "x.csv").write_bytes(text)
        [source] = open_source(str(pictures / "x.csv"), SourceOptions(label=label)).values()
        return source.classes, source.notes

    assert opened(b"sep=;\r\npath;y\r\n0.png;1\r\n   \r\n1.png;0\r\n") == (("0", "1"), [])
    found, notes = opened(b"path;y\n0.png;1,0\n1.png;0,0\n2.png;2\n")
    assert found == ("0", "1", "2")
    assert notes[1].endswith("line 2: 1,0 has a decimal comma; read as 1.0")
    assert len(notes) == 2
    assert opened(b"path,a b,Label\n0.png,x,y\n", "none") == ((), [])
    assert (
        "column Label is not used; give --label Label to use it" in opened(b"path,a b,Label\n0.png,x,y\n", None)[1][0]
    )
    with pytest.raises(UserError, match="line 4 has 1 columns"):
        opened(b"sep=;\npath;y\n0.png;1\n1.png\n")
    with pytest.raises(UserError, match=r"line 1: the header is not UTF-8 \(Latin-1\?\); save the table as UTF-8"):
        opened(b"path,S\xe3o\n0.png,1\n", "S\xe3o")
    with pytest.raises(UserError, match=r"this is an Excel workbook \(zip\); export it as CSV \(UTF-8\)"):
        opened(b"PK\x03\x04" + bytes(100))


def test_captions_may_have_several_lines(pictures: Path) -> None:
    (pictures / "x.csv").write_text('path,w\n0.png,"one, two\nthree, four"\n1.png,\n,x\n')
    manifest = write(pictures / "x.csv", pictures / "set", caption="w")
    assert {words for _, words in contents(manifest).values()} == {"one, two\nthree, four", None}
    assert counts(manifest) == {("rows", left_out.NO_PATH): 1}
