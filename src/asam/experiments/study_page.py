"""A study's findings as a page, as Markdown, and for the terminal."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from . import html
from .study import Finding, Findings, Study

COLUMNS = ("claim", "quantity", "estimate", "interval", "n", "verdict")


def page(study: Study, scale: str, settings: Any, findings: Findings, environment: dict[str, str]) -> str:
    """The page, HTML with the plots inside; it loads nothing."""
    body = html.table(COLUMNS, rows(findings.findings))
    body += "".join(html.figure(figure.title, figure.svg, figure.caption) for figure in findings.figures)
    body += "".join(
        f"<h2>{escape(table.title)}</h2>" + html.table(table.headings, table.rows) for table in findings.tables
    )
    if findings.notes:
        body += "<h2>How to read this</h2>" + html.bullets(findings.notes)
    body += f'<p class="small">Settings: <code>{escape(json.dumps(asdict(settings)))}</code></p>'
    return html.document(study.title, _about(study, scale), body + html.made_with(environment))


def markdown(study: Study, scale: str, settings: Any, findings: Findings, environment: dict[str, str]) -> str:
    """The findings for a reader of the repository."""
    about = _literal(_about(study, scale))
    parts = [f"# {_literal(study.title)}", about, _markdown_table(COLUMNS, rows(findings.findings))]
    for figure in findings.figures:
        title, caption = _literal(figure.title), _literal(figure.caption)
        parts += [f"## {title}", f"![{title}]({figure.name}.svg)", caption]
    for table in findings.tables:
        parts += [f"## {_literal(table.title)}", _markdown_table(table.headings, table.rows)]
    if findings.notes:
        parts += ["## How to read this", "\n".join(f"- {_literal(note)}" for note in findings.notes)]
    versions = f"asam {environment['asam']}, torch {environment['torch']}, Python {environment['python']}"
    parts += [
        f"{versions}, {_literal(environment['hardware'])}, one thread a run. `{environment['command']}`",
        f"Settings: `{json.dumps(asdict(settings))}`",
    ]
    return "\n\n".join(parts) + "\n"


def rows(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """The findings as rows of text."""
    return [
        (
            item.claim,
            item.quantity,
            f"{item.estimate:.3g}",
            "-" if item.low is None or item.high is None else f"{item.low:.3g} to {item.high:.3g}",
            str(item.n),
            item.verdict,
        )
        for item in findings
    ]


def _about(study: Study, scale: str) -> str:
    return f"{study.source}, {scale} scale"


def _markdown_table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *body]
    return "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)


def _markdown_cell(text: str) -> str:
    return _literal(text).replace("|", "\\|")


def _literal(text: str) -> str:
    """The text in Markdown, where a tag would be one."""
    return escape(text, quote=False)
