"""What the site adds to its Markdown: linked source files, the studies' findings, formulas, docstrings.

mkdocs calls the functions, mkdocstrings the class; `make docs` builds the site.
"""

import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r'(?<=\]\()(\.\./[^)\s#"]+)')
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
CLASS = re.compile(r":class:`(?:asam\.)?(\w+)`")
ROLE = re.compile(r":(?:attr|meth|func):(`[^`]+`)")
BRACKETS = re.compile(r"<([^<>`]+, [^<>`]+)>")  # an inner product, not a tag
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CONTRIBUTING.md and a page for each source file outside of docs/ that a page links to."""
    paths = {_path(page, link) for page in files.documentation_pages() for link in LINK.findall(page.content_string)}
    for path in sorted(path.removeprefix("../") for path in paths if path.startswith("../")):
        if path.endswith(".py") and (ROOT / path).is_file():
            hidden = "---\nsearch: {exclude: true}\n---\n" if path.startswith("tests/") else ""
            text = f"{hidden}# {path}\n\n`````python\n{(ROOT / path).read_text()}`````\n"
            page = File.generated(config, f"source/{path}.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(page)
    files.append(File.generated(config, "contributing.md", content=(ROOT / "CONTRIBUTING.md").read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Point links that leave docs/ to the pages made above, and fill in the table of findings."""

    def inside(match: re.Match[str]) -> str:
        made = f"source/{_path(page.file, match[1]).removeprefix('../')}.md"
        if files.get_file_from_path(made) is None:
            return match[1]  # mkdocs tells what is broken
        return posixpath.relpath(made, posixpath.dirname(page.file.src_uri) or ".")

    linked = re.findall(r"results/(\w+)/table\.md", markdown)
    return LINK.sub(inside, markdown).replace("<!-- all findings -->", _table(linked))


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""

    def mathml(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(mathml, content)


class Docstrings(griffe.Extension):
    """Docstrings of this project as Markdown: classes are linked, and a section of examples is called so."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring:
            text = CLASS.sub(r"[`\1`][asam.\1]", ROLE.sub(r"\1", obj.docstring.value))
            text = BRACKETS.sub(r"&lt;\1&gt;", text)
            obj.docstring.value = EXAMPLE.sub("Examples:", text)


def _path(page: File, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page.src_uri), link))


def _findings(study: str) -> list[dict[str, Any]]:
    findings: list[dict[str, Any]] = json.loads((ROOT / f"docs/results/{study}/summary.json").read_text())["findings"]
    return findings


def _table(studies: list[str]) -> str:
    """A row for every finding of these studies, as their summaries hold them."""
    lines = ["| study | claim | estimate | 95 % interval | n | at this scale |", "|---|---|---|---|---|---|"]
    for name in studies:
        for found in _findings(name):
            cells = (
                f"[{name}](results/{name}/table.md)",
                f"{found['claim']} ({found['quantity']})",
                f"{found['estimate']:.3g}",
                f"{found['low']:.3g} to {found['high']:.3g}",
                str(found["n"]),
                found["verdict"].removesuffix(" at this scale"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
