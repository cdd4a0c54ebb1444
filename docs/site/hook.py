"""What mkdocs needs to build a site from pages that are written for GitHub.

- README.md is the first page, and the pages beside docs/ (of slurm/, benchmarks/, …) belong to the site.
- The navigation has the sections and pages of docs/README.md, in its order; a page not listed there fails the build.
- A link to a file or folder of the repository leads to a page that shows it; pictures are pictures.
- Lists are written as CommonMark has them, and reindented for Python-Markdown.
"""

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# Pages of the repository and where they are in the site; the other pages of docs/ keep their names.
PLACES = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "data_shards/README.md": "data_shards.md",
    "ds_configs/README.md": "ds_configs.md",
    "slurm/README.md": "slurm_scripts.md",
    "benchmarks/README.md": "benchmarks.md",
    "studies/fashion/README.md": "fashion_study.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".sbatch": "bash"}
PICTURES = (".svg", ".png", ".jpg")
ITEM = re.compile(r"(?:[-*]|\d+\.) ")

_pages: dict[str, str] = {}  # page of the repository → its place in the site


def on_config(config: Any) -> Any:
    """Take the navigation from the tables of docs/README.md; a page's title ends at its first colon."""
    config.nav = [{"What this is": "index.md"}, {"All pages": "pages.md"}]
    for section, table in re.findall(
        r"^\*\*(.+)\*\*\n\n((?:\|.*\n)+)", (ROOT / "docs/README.md").read_text(), re.MULTILINE
    ):
        links = [link for row in table.splitlines() for link in LINK.findall(row.split("|")[1])]
        pages = [page for _, link, _ in links if (page := _resolved("docs/README.md", link)).endswith(".md")]
        config.nav.append({section: [{_title(page): PLACES.get(page, page.removeprefix("docs/"))} for page in pages]})
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages beside docs/, the pictures they show, and a page for every other file or folder that a page links to."""
    _pages.clear()
    for place, page in [(f.src_uri, f"docs/{f.src_uri}") for f in files.documentation_pages()]:
        if page not in PLACES:
            _pages[page] = place
    _pages.update(PLACES)
    if (readme := files.get_file_from_path("README.md")) is not None:
        files.remove(readme)
    for page, place in PLACES.items():
        files.append(File.generated(config, place, content=(ROOT / page).read_text()))
    for target in sorted({target for page in list(_pages) for target in _targets(page)}):
        if target in _pages or target.startswith("docs/"):
            continue
        if Path(target).suffix in PICTURES:
            _pages[target] = f"source/{target}"
            files.append(File.generated(config, _pages[target], abs_src_path=str(ROOT / target)))
            continue
        _pages[target] = f"source/{target}.md"
        shown = File.generated(config, _pages[target], content=_shown(target))
        shown.inclusion = shown.inclusion.NOT_IN_NAV
        files.append(shown)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return a page with its links changed to the places in the site, and its lists reindented."""
    place = page.file.src_uri
    source = next((known for known, found in _pages.items() if found == place), "")

    def moved(link: re.Match[str]) -> str:
        target = _resolved(source, link[2])
        at = _pages.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        return link[0] if at is None else link[1] + os.path.relpath(at, PurePosixPath(place).parent) + link[3]

    if place.startswith("source/") or source == "CHANGELOG.md":
        page.meta["search"] = {"exclude": True}
    if place.startswith("source/") and not source.endswith(".ipynb"):
        return markdown
    parts = CODE.split(markdown)  # code at the odd places
    return _reindented("".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts)))


def _title(page: str) -> str:
    return (ROOT / page).read_text().split("\n", 1)[0].removeprefix("# ").partition(":")[0]


def _targets(page: str) -> set[str]:
    """Return what a page links to inside the repository, as paths from its top."""
    text = "".join(CODE.split((ROOT / page).read_text())[::2])
    found = {_resolved(page, link[2]) for link in LINK.finditer(text)}
    return {target for target in found if (ROOT / target).exists()}


def _resolved(page: str, link: str) -> str:
    return os.path.normpath(PurePosixPath(page).parent / link)


def _shown(target: str) -> str:
    """Return a page that shows a file, or the names in a folder."""
    path = ROOT / target
    if path.is_dir():
        names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if p.name[0] not in "_.")
        return (
            f"# {target}/\n\nA folder of the repository, with\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
        )
    if path.suffix == ".ipynb":
        return f"# {path.name}\n\nThe cells of the notebook `{target}`; their output is in the file.\n\n{_cells(path)}"
    return f"# {path.name}\n\n`{target}`\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(errors='replace')}\n````\n"


def _cells(notebook: Path) -> str:
    """Return the cells of a notebook, without their output."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook.read_text())["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells) + "\n"


def _reindented(markdown: str) -> str:
    """Return the text with the parts of numbered items indented by 4 spaces, and an empty line before every list."""
    lines: list[str] = []
    fence = False
    for line in markdown.splitlines():
        if line.startswith("```"):
            fence = not fence
        elif not fence:
            if line.startswith("   "):
                line = " " + line
            before = lines[-1] if lines else ""
            if ITEM.match(line) and before and not ITEM.match(before) and not before.startswith(" "):
                lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"
