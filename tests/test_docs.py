"""The documentation names only what exists: pages and headings, files, tests, commands, options and config keys."""

import ast
import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from esvit_scale import config as configs
from esvit_scale.cli import build_parser, main
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.scaling import sweep_file
from esvit_scale.schema import declared
from tests.test_layering import ORDER

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "docs", "data_shards", "ds_configs", "slurm", "benchmarks", "studies/fashion")
PAGES = sorted(str(page.relative_to(ROOT)) for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md"))
CODE = (
    "esvit_scale",
    "tests",
    "benchmarks",
    "studies",
    "ds_configs",
    "data_shards",
    "slurm",
    "findings",
    "constraints",
    ".ci",
)
SECTIONS = tuple(name for name in Config.model_fields if isinstance(Config.model_fields[name].default, configs.Section))

# What the pages show of programs that are not ours.
FOREIGN_OPTIONS = {  # of sbatch, apptainer, docker, tar, pip and pytest
    *("--exclude", "--export", "--mem-per-cpu", "--ntasks-per-node", "--output", "--signal"),
    *("--append", "--bind", "--extra-index-url", "--help", "--ignore-zeros", "--shm-size"),
}
FOREIGN_NAMES = {
    "convert_to_rgb",
    "images_seen_drawings",
    "images_seen_photos",
    "lower_precision_safe_modules",
    "swinv2_cr",
    "VIL_MODE_SWITCH",
}
FOREIGN_FILES = {"models/swin_transformer.py", "main_esvit.py"}  # of the official EsViT code
# Of what load_backbone returns, called `model` in examples.
BACKBONE_ATTRIBUTES = {f"model.{name}" for name in ("channels", "config", "dim", "reductions", "size")}
# Files of a user's project in examples.
EXAMPLE_FILES = {
    "esvit_scale/models/poolformer.py",
    "esvit_scale/objective/barlow_twins.py",
    "pictures.py",
    "fashion.yaml",
}


class Command(NamedTuple):
    """One call of `esvit-scale` on a page."""

    line: int
    words: tuple[str, ...]  # after `esvit-scale`
    complete: bool  # a line of a code block, without placeholders: it must parse as it stands


def fenced(text: str) -> Iterator[tuple[int, str, str]]:
    """First line number, language and content of every code block."""
    for block in re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, block.start()) + 2, block[1], block[2]


def inline(text: str) -> Iterator[tuple[int, str]]:
    """Line number and content of every `inline code`, code blocks left out."""
    text = re.sub(r"^ *```.*?^ *```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for span in re.finditer(r"`([^`\n]+)`", text):
        yield text.count("\n", 0, span.start()) + 1, span[1]


def commands(text: str) -> Iterator[Command]:
    """Every call of a command: lines of code blocks, and inline code that begins with `esvit-scale` or a command."""
    for first, language, block in fenced(text):
        if language in ("python", "yaml", "csv", "mermaid"):
            continue
        for number, line in enumerate(re.sub(r"\\\n", lambda _: " ", block).splitlines(), first):
            words = tuple(shlex.split(line.removeprefix("$ "), comments=True)) if "esvit" in line else ()
            for start, word in enumerate(words):
                if word.endswith("esvit-scale") or words[max(start - 1, 0) : start + 1] == ("-m", "esvit_scale"):
                    complete = not re.search(r"(?<!=)…|\[|\.\.\.|\| | / ", line.partition("#")[0])
                    yield Command(number, words[start + 1 :], complete)
                    break
    for number, span in inline(text):
        words = tuple(span.replace('"', "").replace("'", "").split())
        if words and words[0].endswith("esvit-scale"):
            yield Command(number, words[1:], complete=False)
        elif len(words) > 1 and re.fullmatch("[a-z]+", words[0]) and help_of(words[:1]):
            yield Command(number, words, complete=False)


@cache
def help_of(words: tuple[str, ...]) -> str | None:
    """What `esvit-scale WORDS --help` prints, or None where there is no such command."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()), pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    return printed.getvalue() if end.value.code == 0 else None


def takes_subcommands(words: tuple[str, ...]) -> bool:
    return "COMMAND ..." in (help_of(words) or "")


def options_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][\w-]*", text))


def problem_of(command: Command) -> str | None:
    """What is wrong with a command line: an unknown subcommand or option, or a line that does not parse."""
    path: tuple[str, ...] = ()
    words = list(command.words)
    while words and takes_subcommands(path):
        word = words.pop(0)
        if not re.fullmatch(r"[a-z-]+", word):  # a placeholder, or several commands at once
            return None
        path = (*path, word)
        if help_of(path) is None:
            return f"there is no command {' '.join(path)}"
    unknown = options_in(" ".join(words)) - options_in(help_of(path) or "")
    if unknown:
        return f"{' '.join(path)} has no {', '.join(sorted(unknown))}"
    if command.complete:
        with redirect_stderr(io.StringIO()) as said:
            try:
                arguments = build_parser().parse_args(list(command.words))
                if path == ("pretrain",) and arguments.config not in EXAMPLE_FILES:
                    configs.resolve(arguments.config, arguments.overrides)
            except (SystemExit, UserError) as error:
                return said.getvalue() or str(error)
    return None


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)}


@pytest.fixture(scope="module")
def every_option() -> set[str]:
    """Every option of every command, and of the benchmark scripts."""
    sources = [*(ROOT / "esvit_scale" / "commands").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    return set(re.findall(r"\"(--[a-z][\w-]*)\"", "\n".join(path.read_text() for path in sources)))


@pytest.fixture(scope="module")
def words_of_code() -> set[str]:
    """Every word that stands in a file of code, configuration or template."""
    files = (
        path
        for folder in CODE
        for path in (ROOT / folder).rglob("*")
        if path.suffix not in (".pyc", ".md", ".png", ".safetensors")
    )
    top = [ROOT / name for name in ("Makefile", "pyproject.toml", "hubconf.py")]
    return set(re.findall(r"\w+", "\n".join(path.read_text() for path in [*files, *top] if path.is_file())))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_file_and_a_heading(page: str) -> None:
    wrong = []
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent / link if link else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{link}#{anchor}")
    assert wrong == []


def test_every_page_is_listed_once_in_the_index() -> None:
    """The site takes its navigation from there."""
    rows = re.findall(r"^\| (\[.*?) \|", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE)
    listed = [link for row in rows for link in re.findall(r"\]\(([\w.]+\.md)\)", row)]
    assert sorted(listed) == sorted(p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md")


def test_no_page_has_a_drawing_that_needs_the_network() -> None:
    """Pages are also read as a site without a network, where no script draws Mermaid."""
    drawn = [
        page for page in PAGES if any(language == "mermaid" for _, language, _ in fenced((ROOT / page).read_text()))
    ]
    assert drawn == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str, every_option: set[str]) -> None:
    text = (ROOT / page).read_text()
    wrong = [f"{page}:{c.line}: {' '.join(c.words)}: {why}" for c in commands(text) if (why := problem_of(c))]
    named = set().union(*(options_in(span) for _, span in inline(text) if span.startswith("--")))
    wrong += sorted(named - every_option - FOREIGN_OPTIONS)
    assert wrong == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_config_keys_exist(page: str) -> None:
    text = re.sub(r"```python\n.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    wrong = []
    for key in re.findall(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})\.[a-z_]\w*(?:\.\w+)*)", text):
        if key.endswith((".py", ".md", ".csv", ".yaml")):
            continue
        if key not in BACKBONE_ATTRIBUTES and declared(key.split("."), Config) is None:
            wrong.append(key)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_yaml_examples_are_valid(page: str, tmp_path: Path) -> None:
    for _, language, block in fenced((ROOT / page).read_text()):
        if language != "yaml":
            continue
        values = yaml.safe_load(block)
        if "sizes" in values:
            (tmp_path / "sweep.yaml").write_text(block)
            sweep_file.read(tmp_path / "sweep.yaml")
        elif values.keys() <= Config.model_fields.keys():
            configs.validate(values, where=page)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_files_and_tests_named_in_the_text_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    bases = [ROOT, ROOT / "esvit_scale", (ROOT / page).parent]
    written = {line.strip("/\n") for line in (ROOT / ".gitignore").open()}  # by `make demo` and others, so not ours
    folders = {path.name for base in bases[:2] for path in base.iterdir() if path.is_dir()} - written
    wrong = []
    for name in re.findall(r"(?<![\w/.:])(?:[\w.-]+/)+[\w.-]+\.(?:py|md|sh|sbatch|yaml|json|txt)\b", text):
        first = name.split("/")[0]
        ours = name.endswith((".py", ".sbatch")) or first in folders
        if ours and not any((base / name).exists() for base in bases) and name not in FOREIGN_FILES | EXAMPLE_FILES:
            wrong.append(name)
    modules = {path.name for folder in CODE for path in (ROOT / folder).rglob("*.py")}
    wrong += [
        name
        for _, name in inline(text)
        if re.fullmatch(r"\w+\.py", name) and name not in modules | FOREIGN_FILES | EXAMPLE_FILES
    ]
    for file, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        if f"def {test}(" not in (ROOT / file).read_text():
            wrong.append(f"{file}::{test}")
    assert wrong == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_names_in_code_font_stand_in_the_code(page: str, words_of_code: set[str]) -> None:
    names = {name for _, span in inline((ROOT / page).read_text()) for name in re.findall(r"^[A-Za-z]\w*_\w+$", span)}
    assert sorted(names - words_of_code - FOREIGN_NAMES) == []


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_import_what_exists(page: str) -> None:
    wrong = []
    for _, language, block in fenced((ROOT / page).read_text()):
        for node in ast.walk(ast.parse(block)) if language == "python" else ():
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("esvit_scale"):
                continue
            path = ROOT / str(node.module).replace(".", "/")
            source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
            for name in (alias.name for alias in node.names):
                is_module = (path / name).with_suffix(".py").is_file() or (path / name).is_dir()
                if not is_module and not re.search(
                    rf"^(?:def |class |){name}\b|\"{name}\"", source.read_text(), re.MULTILINE
                ):
                    wrong.append(f"{node.module}.{name}")
    assert wrong == []


def test_contributing_gives_the_order_of_imports_that_is_tested() -> None:
    [line] = re.findall(r"in this order: (.*?)\. ", (ROOT / "CONTRIBUTING.md").read_text())
    told = [set(re.findall(r"\w+", level)) for level in line.split("→")]
    assert told == [level - {"__init__"} for level in ORDER if level != {"__main__"}]
