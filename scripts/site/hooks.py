"""What turns docs/, plain Markdown that GitHub renders too, into the site: hooks of mkdocs.

Pages of the reference are made from the code (``reference.py``). Files outside docs/ that a page links to, or names in backticks,
become pages of the site with their text, so that no link leads out of what was built.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_NAMED = re.compile(r"(?<![\[`\w])`([\w.-]+/[\w./-]+|[A-Z]+\.md|Makefile|pyproject\.toml|constraints\.txt)`(?!\])")
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh", ".toml": "toml", ".json": "json"}
_FOLDER = "source"
_WITH_LINKS = (".md", ".ipynb")
_LONGEST_PAGE = 1_000_000  # bytes of a file that becomes a page


def on_files(files: Files, config: Any) -> Files:
    for place, make in reference.GENERATED.items():
        files.append(File.generated(config, place, content=make()))
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    found: set[str] = set()
    while waiting:
        page, text = waiting.pop()
        for path in sorted(_files_of(page, text) - found):
            found.add(path)
            content = (ROOT / path).read_text(encoding="utf-8")
            if path.endswith(".ipynb"):
                content = _notebook_as_page(content)
            elif not path.endswith(".md"):
                content = _as_page(path, content)
            if path.endswith(_WITH_LINKS):
                waiting.append((path, content))
            files.append(File.generated(config, _place(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    place = page.file.src_uri
    own = _own_path(place)

    def with_target(match: re.Match) -> str:
        if not own.startswith("docs/") and (page := _page_of(own, match[1])) is not None:
            return f"{_relative(page, place)}{match[2] or ''}"
        path = _file_of(own, match[1])
        return match[0] if path is None else f"{_relative(_place(path), place)}{match[2] or ''}"

    def with_link(match: re.Match) -> str:
        path = _existing(match[1])
        return match[0] if path is None else f"[{match[0]}]({_relative(_place(path), place)})"

    def linked(text: str) -> str:
        return _NAMED.sub(with_link, _LINK.sub(with_target, text))

    if not own.endswith(_WITH_LINKS):
        return markdown
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [linked(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, linked(markdown[end:])])


def _files_of(page: str, text: str) -> set[str]:
    """Paths, from the root, of the files outside docs/ that a page links to or names."""
    text = _FENCE.sub("", text)
    linked = (_file_of(page, match[1]) for match in _LINK.finditer(text))
    named = (_existing(match[1]) for match in _NAMED.finditer(text))
    return {path for path in (*linked, *named) if path is not None}


def _page_of(file: str, target: str) -> str | None:
    """The page of docs/ that a link in a file outside of it leads to; None where it leads elsewhere."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
    return path.removeprefix("docs/") if path.startswith("docs/") and "://" not in target else None


def _file_of(page: str, target: str) -> str | None:
    """The file outside docs/ that a link leads to, None where it leads elsewhere.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    if "://" in target or target.startswith(("mailto:", "/")):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if path.startswith("docs/"):
        return None
    found = _existing(path)
    if found is None:
        raise FileNotFoundError(f"{page} links to {target}, which is not there")
    return found


def _existing(path: str) -> str | None:
    """A text file outside docs/, of a folder its README; None where there is none."""
    place = ROOT / path
    if path.startswith("docs/"):
        return None
    if place.is_dir():
        place /= "README.md"
    is_shown = place.is_file() and place.stat().st_size <= _LONGEST_PAGE
    return place.relative_to(ROOT).as_posix() if is_shown else None


def _place(path: str) -> str:
    """Of a file in the site's own folder of sources."""
    return f"{_FOLDER}/{path}" if path.endswith(".md") else f"{_FOLDER}/{path}.md"


def _own_path(place: str) -> str:
    """From the root, that of the file of which a page was made."""
    if not place.startswith(f"{_FOLDER}/"):
        return f"docs/{place}"
    path = place.removeprefix(f"{_FOLDER}/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def _relative(target: str, place: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(place) or ".")


def _notebook_as_page(content: str) -> str:
    """The cells of a notebook, what the code printed, and its pictures."""
    parts = []
    for cell in json.loads(content)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"<img alt='' src='data:image/png;base64,{''.join(data['image/png']).strip()}'>")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"`````text\n{text}\n`````")
    return "\n\n".join(parts) + "\n"


def _as_page(path: str, content: str) -> str:
    language = _LANGUAGES.get(Path(path).suffix, "text")
    fence = "`" * 5
    return f'---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{fence}{language} linenums="1"\n{content}\n{fence}\n'
