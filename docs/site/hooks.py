"""What mkdocs.yml does to the pages before they are rendered, so that no text stands in two places.

- A link alone on its line with the title "include" becomes what it points to: a section of a Markdown file, a function
  or class of a Python file, or a whole file. On a code host it stays a link.
- A link out of docs/ gets a target in the site: a file of the repository becomes a page that shows it.
- The notebook becomes a page, and the source of the API reference is laid out as an install lays it out.
"""

from __future__ import annotations

import ast
import base64
import functools
import json
import os
import posixpath
import re
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOK, NOTEBOOK_PAGE = "tutorial.ipynb", "tutorial.md"

_FENCE = re.compile(r"^ *(```|~~~)")
_INCLUDE = re.compile(r'^\[[^\]]*\]\((?P<file>[^)#\s]+)(?:#(?P<anchor>[^)\s]+))? "include"\)$')
_LINK = re.compile(r"(?P<before>\]\()(?P<file>[^)#\s:]*)(?P<anchor>#[^)\s]*)?(?P<after>(?: \"[^\"]*\")?\))")
_SHOWN = {".py": "python", ".yaml": "yaml", ".sh": "bash"}


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let the API reference read varfast with kernels/ inside, as setup.py installs it. Nothing is imported."""
    _pages_of_includes.cache_clear()  # mkdocs serve builds again and again
    package = Path(tempfile.mkdtemp(prefix="varfast-docs-")) / "varfast"
    package.mkdir()
    for source in (ROOT / "varfast").iterdir():
        (package / source.name).symlink_to(source)
    (package / "kernels").symlink_to(ROOT / "kernels")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(package.parent)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebook's page, and pages and files for what the pages link to outside of docs/."""
    notebook = json.loads((DOCS / NOTEBOOK).read_text())
    files.append(File.generated(config, NOTEBOOK_PAGE, content=notebook_page(notebook)))
    linked: set[Path] = set()
    for file in files.documentation_pages():
        source = DOCS / file.src_uri
        linked |= {target for _, target, _ in _links_out(expand(file.content_string, source), source)}
    for target in sorted(linked):
        if not _page_of(target, ""):
            files.append(_file_of_repository(target, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Expand includes, and let links point to where the site has what they point to."""
    if page.file.src_uri.startswith("repository/"):
        return markdown
    source = DOCS / page.file.src_uri
    markdown = expand(markdown, source)
    for link, target, anchor in _links_out(markdown, source):
        found = _page_of(target, anchor)
        uri = found or _uri_of_repository(target)
        keeps = found and (target, anchor) not in _pages_of_includes()
        to = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + (anchor if keeps else "")
        markdown = markdown.replace(link[0], f"{link['before']}{to}{link['after']}")
    return markdown.replace(f"{NOTEBOOK})", f"{NOTEBOOK_PAGE})")


# ---------------------------------------------------------------------------------------------------------------------
# Includes


def expand(markdown: str, source: Path) -> str:
    """`markdown`, which stands in the file `source`, with its includes in their places, and links as `source` has them.

    Raises: PluginError for an include of something that is not there.
    """
    lines = []
    for line, is_text in _lines(markdown):
        found = _INCLUDE.match(line) if is_text else None
        lines.append(_included(source, found["file"], found["anchor"]) if found else line)
    return "\n".join(lines)


def _included(source: Path, file: str, anchor: str | None) -> str:
    path = Path(os.path.normpath(source.parent / file))
    where = f"{source.relative_to(ROOT)} includes {file}{'#' + anchor if anchor else ''}"
    if not path.is_file():
        raise PluginError(f"{where}: there is no such file")
    text = path.read_text()
    if path.suffix == ".py" and anchor:
        text = _definition(text, anchor, where)
    if path.suffix in _SHOWN:
        return f"```{_SHOWN[path.suffix]}\n{text.rstrip()}\n```"
    body = _section(text, anchor, where) if anchor else re.sub(r"\A# .*\n", "", text)

    def moved(link: re.Match[str]) -> str:
        to = link["file"] and os.path.relpath(path.parent / link["file"], source.parent)
        return f"{link['before']}{to}{link['anchor'] or ''}{link['after']}"

    lines = [_LINK.sub(moved, line) if is_text else line for line, is_text in _lines(body)]
    return "\n".join(lines).strip("\n")


def _definition(text: str, name: str, where: str) -> str:
    """Source of the function or class of this name at the top of a module, decorators included."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    raise PluginError(f"{where}: the file has no such function or class")


def _section(text: str, anchor: str, where: str) -> str:
    """What stands below the heading of this anchor, to the next one of its level or above; or between the comments
    `<!-- anchor: ... -->` and `<!-- end of anchor -->`."""
    lines, level = [], 0
    for line, is_text in _lines(text):
        heading = re.match(r"(#+) (.*)", line) if is_text else None
        if level and heading and len(heading[1]) <= level:
            break
        if level:
            lines.append(line)
        elif heading and slug(heading[2]) == anchor:
            level = len(heading[1])
    if level:
        return "\n".join(lines)
    between = re.search(rf"^<!-- {anchor}:.*?-->\n(.*?)^<!-- end of {anchor} -->$", text, re.DOTALL | re.MULTILINE)
    if between is None:
        raise PluginError(f"{where}: the file has no such heading, and no comments around it")
    return between[1]


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it, and mkdocs.yml too."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def _lines(markdown: str) -> list[tuple[str, bool]]:
    """Lines, and whether each is text, and not code between fences."""
    found, fence = [], ""
    for line in markdown.splitlines():
        mark = _FENCE.match(line)
        if mark and (not fence or fence == mark[1]):
            found.append((line, False))
            fence = "" if fence else mark[1]
        else:
            found.append((line, not fence))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Links


def _links_out(markdown: str, source: Path) -> list[tuple[re.Match[str], Path, str]]:
    """Links from `source`, a file in docs/, to what there is in the repository outside of docs/: file and #anchor."""
    found = []
    for link in (link for line, is_text in _lines(markdown) if is_text for link in _LINK.finditer(line)):
        target = Path(os.path.normpath(source.parent / link["file"])) if link["file"] else DOCS
        if target.is_relative_to(ROOT) and not target.is_relative_to(DOCS) and target.exists():
            found.append((link, target, link["anchor"] or ""))
    return found  # mkdocs checks the others


def _page_of(target: Path, anchor: str) -> str | None:
    """The page that includes this section of a Markdown file, or the whole file."""
    pages = _pages_of_includes()
    return (pages.get((target, anchor)) or pages.get((target, ""))) if target.suffix == ".md" else None


@functools.cache
def _pages_of_includes() -> dict[tuple[Path, str], str]:
    """By a file and an #anchor ("" for the whole file), the page that includes it."""
    found = {(ROOT / "README.md", ""): "index.md"}
    for page in DOCS.rglob("*.md"):
        for line, is_text in _lines(page.read_text()):
            if is_text and (include := _INCLUDE.match(line)):
                target = Path(os.path.normpath(page.parent / include["file"]))
                anchor = f"#{include['anchor']}" if include["anchor"] else ""
                found[target, anchor] = page.relative_to(DOCS).as_posix()
    return found


def _uri_of_repository(target: Path) -> str:
    name = target.relative_to(ROOT).as_posix()
    return f"repository/{name}" if target.suffix == ".json" else f"repository/{name}.md"


def _file_of_repository(target: Path, config: MkDocsConfig) -> File:
    """A page that shows a file, or lists a folder; JSON, which nobody reads through, as it is."""
    uri = _uri_of_repository(target)
    if target.suffix == ".json":
        return File.generated(config, uri, abs_src_path=str(target))
    text = "\n".join(sorted(p.name for p in target.iterdir())) if target.is_dir() else target.read_text().rstrip()
    title = target.relative_to(ROOT).as_posix()
    return File.generated(config, uri, content=f"# {title}\n\n````{_SHOWN.get(target.suffix, 'text')}\n{text}\n````\n")


# ---------------------------------------------------------------------------------------------------------------------
# The notebook


def notebook_page(notebook: dict) -> str:
    """A notebook as Markdown: text, code, and what the code printed and drew when the notebook was last run."""
    parts = [f'<a class="md-button" href="{NOTEBOOK}" download>Download the notebook</a>']
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output) for output in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def _output(output: dict) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        png = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
        alt = output.get("metadata", {}).get("alt", "Picture that the cell above drew")
        return f'<img class="output" alt="{alt}" src="data:image/png;base64,{png}">'
    text = "".join(output.get("text") or data.get("text/plain") or "").rstrip()
    return f"```{{.text .output}}\n{text}\n```" if text else ""
