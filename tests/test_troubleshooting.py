"""docs/troubleshooting.md quotes what the program really says, and leaves no monitor and no exit code out."""

import ast
import re
from pathlib import Path

import pytest

from esvit_scale import errors
from tests.test_docs import inline

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()

SCRIPTS = [ROOT / "Makefile", ROOT / "constraints" / "install.py", *(ROOT / "slurm").glob("*.s*")]


def rows() -> list[tuple[str, ...]]:
    """The cells of every table row below the list of exit codes."""
    text = PAGE.split("\n## Installing\n")[1]
    return [
        tuple(row.split(" | ")) for row in re.findall(r"^\| (.*) \|$", text, re.MULTILINE) if not row.startswith("you")
    ]


def quotes() -> list[str]:
    """What the page says that the program prints: code in the first column."""
    return [span for first, *_ in rows() for _, span in inline(first)]


def words(quote: str) -> list[str]:
    """The fixed parts of a quote, between the places of names and numbers."""
    return [part.strip() for part in quote.split("…") if part.strip(" .:;()")]


def literals(path: Path) -> list[str]:
    """Every text in a module but docstrings; the places of an f-string or of `%s` are a …."""
    found, nodes = [], [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            nodes += [v for v in node.values if not isinstance(v, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            nodes += ast.iter_child_nodes(node)
    return [re.sub(r"%[-+.\d]*[sdgf]", "…", text) for text in found]


@pytest.fixture(scope="module")
def said() -> list[str]:
    """All that the program can say, and the lines of the scripts."""
    texts = [text for path in (ROOT / "esvit_scale").rglob("*.py") for text in literals(path)]
    return [*texts, *(line for path in SCRIPTS for line in path.read_text().splitlines())]


def is_said(quote: str, said: list[str]) -> bool:
    """Tell whether one text of the program has all fixed parts of a quote, in order."""
    pattern = re.compile(".*".join(map(re.escape, words(quote))), re.DOTALL)
    return any(pattern.search(text) for text in said)


def test_every_quote_stands_in_the_source(said: list[str]) -> None:
    assert len(quotes()) > 120
    assert [quote for quote in quotes() if not is_said(quote, said)] == []


def test_renamed_messages_are_found(said: list[str]) -> None:
    assert is_said("in use by …; stop that process", said)
    assert not is_said("in usage by …; stop that process", said)
    assert not is_said("stop that process … in use by", said)


def test_every_row_says_why_and_what_to_do() -> None:
    assert [row for row in rows() if len(row) != 3 or not all(cell.strip() for cell in row)] == []


def sentences_of_monitors() -> list[str]:
    """The beginning of every sentence that the monitors can say, in words of its own."""
    tree = ast.parse((ROOT / "esvit_scale" / "train" / "monitors.py").read_text())
    [states] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "_states"]
    names = [ast.unparse(node.value.elts[0]) for node in ast.walk(states) if isinstance(node, ast.Yield)]
    assert len(names) == 5
    return [re.sub(r"\{.*?\}", "…", ast.literal_eval(name.removeprefix("f"))) for name in names]


def test_every_monitor_sentence_is_on_the_page() -> None:
    quoted = quotes()
    missing = [name for name in sentences_of_monitors() if not any(quote.startswith(name) for quote in quoted)]
    assert missing == []
    for beginning in ("gradient spike at step", "k-NN accuracy fell to", "has been the slowest for", "loader process"):
        assert any(quote.startswith(beginning) for quote in quoted), beginning


def test_every_reason_for_having_learned_nothing_is_on_the_page() -> None:
    quoted = [part for quote in quotes() for part in words(quote)]
    tree = ast.parse((ROOT / "esvit_scale" / "train" / "learning.py").read_text())
    functions = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef) and n.name in ("reasons", "_settings_that_cannot_work", "_momentum_too_high")
    ]
    calls = [
        n.args[0]
        for f in functions
        for n in ast.walk(f)
        if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "append"
    ]
    calls += [n.value for f in functions for n in ast.walk(f) if isinstance(n, ast.Yield)]
    told = [
        "".join(v.value if isinstance(v, ast.Constant) else "…" for v in c.values)
        for c in calls
        if isinstance(c, ast.JoinedStr)
    ]
    assert len(told) == 10
    assert [text for text in told if not any(part in text for part in quoted)] == []


def test_every_exit_code_is_on_the_page() -> None:
    table = re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)
    classes = [c for c in vars(errors).values() if isinstance(c, type) and hasattr(c, "exit_code")]
    assert len(classes) == 3
    assert {"0", "1", "130", *(str(c.exit_code) for c in classes)} <= set(table)
