"""A study's page and its Markdown: nothing in a text is markup, nothing is loaded, and the tables are whole."""

import json
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import pytest
import small_study

from asam.experiments import plots, reproduce
from asam.experiments.study import Figure, Findings, Table, finding
from asam.experiments.study_page import COLUMNS, markdown, page, rows

NASTY = '|p| < 1 & "q" > <b>0</b><script>alert(1)</script><img src=http://example.org/x.png>'
STUDY = replace(small_study.STUDY, title=f"title {NASTY}", source=f"source {NASTY}")
ENVIRONMENT = {
    "asam": "1",
    "torch": "2",
    "python": "3",
    "scikit-learn": "1",
    "hardware": "A & B <4 cores>",
    "command": "asam reproduce toy --out '<out>'",
}
NEEDS_NO_END = {"meta", "link", "br"}


@dataclass(frozen=True)
class Settings:
    data_dir: str = "<i>folder</i>"


def draw(axes):
    axes.plot([0, 1], [0, 1], marker="o", label="<b> & |w|")
    axes.set_xlabel("|w| < 1 & more")
    axes.legend()


FINDINGS = Findings(
    [
        finding(f"claim {NASTY}", f"quantity {NASTY}", 1.0, 0.5, 2.0, 3, holds="above"),
        finding("single", "run", 1.0, None, None, 1, holds="above"),
    ],
    [Table(f"table {NASTY}", ("name", f"heading {NASTY}", ""), [(f"cell {NASTY}", "||", ""), ("ASAM", "1", "a|b")])],
    [Figure("figure", f"figure {NASTY}", f"caption {NASTY}", plots.svg(draw, (4, 3)))],
    [f"note {NASTY}"],
)


class Page(HTMLParser):
    """The text of every element by its tag, the attributes, and whether all elements are closed in their order."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.attributes, self.open = {}, [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        self.texts.setdefault(tag, []).append("")
        if tag not in NEEDS_NO_END:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            self.texts[self.open[-1]][-1] += text


@pytest.fixture
def html():
    return Page(page(STUDY, "quick", Settings(), FINDINGS, ENVIRONMENT))


def test_texts_are_shown_as_they_are(html):
    assert html.open == []
    assert not {"script", "img", "b", "i", "out"} & html.texts.keys()
    assert html.texts["h1"] == html.texts["title"] == [f"title {NASTY}"]
    assert [html.texts["figcaption"], html.texts["li"]] == [[f"caption {NASTY}"], [f"note {NASTY}"]]
    assert html.texts["h2"] == [f"figure {NASTY}", f"table {NASTY}", "How to read this"]
    assert html.texts["th"] == [*COLUMNS, "name", f"heading {NASTY}", ""]
    expected = [f"claim {NASTY}", f"quantity {NASTY}", "1", "0.5 to 2", "3", "reproduces at this scale"]
    assert html.texts["td"][:6] == expected
    assert html.texts["td"][6:12] == ["single", "run", "1", "-", "1", "not decided at this scale"]
    assert html.texts["td"][12:] == [f"cell {NASTY}", "||", "", "ASAM", "1", "a|b"]
    assert html.texts["code"] == [json.dumps({"data_dir": "<i>folder</i>"}), ENVIRONMENT["command"]]


def test_the_page_loads_nothing(html):
    loading = [value for _, name, value in html.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert loading
    assert all(value == "data:," or value.startswith("#") for value in loading)
    assert not {"script", "iframe", "object", "embed", "image", "base"} & html.texts.keys()
    text = page(STUDY, "quick", Settings(), FINDINGS, ENVIRONMENT)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_every_row_of_a_markdown_table_has_the_columns_of_its_head():
    text = markdown(STUDY, "quick", Settings(), FINDINGS, ENVIRONMENT)
    tables = [re.findall(r"^\|.*$", part, re.MULTILINE) for part in text.split("\n\n") if part.startswith("|")]
    assert [len(lines) for lines in tables] == [2 + 2, 2 + 2]
    for lines, columns in zip(tables, (6, 3), strict=True):
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        assert [len(row) for row in cells] == [columns] * len(lines)
        assert cells[1] == ["---"] * columns
    assert "| \\|\\| |" in text


def test_markdown_holds_no_tags():
    text = markdown(STUDY, "quick", Settings(), FINDINGS, ENVIRONMENT)
    prose = re.sub(r"`[^`]*`", "", text)  # code is shown as it is
    assert "<" not in prose
    assert re.search(r"&(?!lt;|gt;|amp;)", prose) is None
    escaped = NASTY.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"# title {escaped}\n\nsource {escaped}, quick scale\n" in text
    for line in (f"## figure {escaped}", f"![figure {escaped}](figure.svg)", f"## table {escaped}"):
        assert line in text.splitlines()
    assert f"\n\ncaption {escaped}\n" in text
    assert f"\n- note {escaped}\n" in text
    assert "claim " + escaped.replace("|", "\\|") in text


def test_without_notes_there_is_no_heading_for_them():
    bare = Findings(FINDINGS.findings, [], [])
    assert "How to read this" not in page(STUDY, "quick", Settings(), bare, ENVIRONMENT)
    assert "How to read this" not in markdown(STUDY, "quick", Settings(), bare, ENVIRONMENT)
    assert len(rows(bare.findings)) == 2


def test_results_of_a_run_that_diverged_are_json(tmp_path):
    nan, inf = float("nan"), float("inf")

    def perform(run):
        return {"square": run.number, "losses": [nan, inf, 1.0]}

    def report(settings, outcomes):
        return Findings([finding("Nothing", "at all", nan, nan, inf, 1, holds="above")], [], [])

    study = replace(small_study.STUDY, perform=perform, report=report)
    settings = replace(small_study.STUDY.settings["quick"], seeds=2)
    reproduce.claim(study, "quick", settings, tmp_path / "out", None, force=False)
    reproduce.reproduce(study, "quick", settings, tmp_path / "out", None, 1, lambda done, planned: None)
    texts = [(tmp_path / "out" / name).read_text() for name in ("summary.json", "results.jsonl")]
    assert not re.findall(r"\b(?<!\")(NaN|-?Infinity)\b", "".join(texts))
    found = json.loads(texts[0])["findings"][0]
    assert (found["estimate"], found["low"], found["high"]) == (None, None, "inf")
    assert found["verdict"] == "not decided at this scale"
    assert json.loads(texts[1].splitlines()[0])["outcome"]["losses"] == [None, "inf", 1.0]
