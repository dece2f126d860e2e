"""What the pages share: one self-contained HTML document that loads nothing."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#0f172a;background:#f8fafc;margin:0}
main{max-width:900px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;margin:0 0 4px} h2{font-size:1.15rem;margin:32px 0 8px} p,li{overflow-wrap:anywhere}
figure{margin:0;background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:12px}
figure svg{width:100%;height:auto;display:block} figcaption{color:#475569;font-size:.88rem;margin-top:6px}
.table{overflow-x:auto;background:#fff;border:1px solid #e2e8f0;border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 9px;text-align:right;border-bottom:1px solid #e2e8f0} th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0} .number{white-space:nowrap} .asam td{font-weight:600;color:#1d4ed8}
.small{color:#475569;font-size:.88rem} code{overflow-wrap:anywhere}
"""


def document(title: str, summary: str, body: str) -> str:
    """A page with a title, a line under it, and a body of HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="small">{escape(summary)}</p>{body}</main></body></html>\n'
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text; the rows of ASAM stand out."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f'<tr class="{"asam" if row[0] == "ASAM" else ""}">'
        + "".join(f"<td{_number(cell)}>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(cell: str) -> str:
    """The class of a cell of numbers, such as "79.1 ± 0.2", "1 + 2e-16" or "8 (edge)": they stay on one line."""
    return ' class="number"' if cell[:1] in tuple("0123456789+-.") else ""


def figure(title: str, svg: str, caption: str) -> str:
    """A plot under its title."""
    return f"<h2>{escape(title)}</h2><figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def bullets(sentences: Iterable[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def made_with(environment: dict[str, str]) -> str:
    """Versions, hardware and command."""
    return (
        f'<p class="small">asam {environment["asam"]}, torch {escape(environment["torch"])}, Python '
        f"{environment['python']}, scikit-learn {environment['scikit-learn']}, {escape(environment['hardware'])}.<br>"
        f"<code>{escape(environment['command'])}</code></p>"
    )
