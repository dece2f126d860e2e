"""Sentence pairs and their units, from texts made here; the real ones where they are installed."""

import os
import subprocess
import sys

import pytest
from sentence_pairs import sentences, write_pairs

from asam.experiments import InputError, parallel_text
from asam.experiments.parallel_text import BEGIN, END, HELP, MAX_WORDS, help_texts, iwslt, learned_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    return write_pairs(tmp_path)


def help_folder(root, pages):
    """Help texts: pages of German and English elements by file."""
    for file, (german, english) in pages.items():
        for language, content in (("de", german), ("en-US", english)):
            path = root / language / "text" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"<html><body>{content}</body></html>", encoding="utf-8")
    return root


def many_pages(root):
    """A hundred pages of four sentences, some of them on several."""
    pairs = list(zip(*sentences(400, 5), strict=True))
    elements = [element(f"par_id{i}", *pair) for i, pair in enumerate(pairs)]
    pages = {
        f"{i}.html": ["".join(side) for side in zip(*elements[4 * i : 4 * i + 4], strict=True)] for i in range(100)
    }
    return help_folder(root, pages)


def all_pairs(text):
    return [*text.train, *text.validation, *text.test]


def element(name, german, english, attributes="", tag="p"):
    return tuple(f'<{tag} id="{name}"{attributes} dir="auto">{text}</{tag}>\n' for text in (german, english))


def test_elements_are_aligned_by_id_and_cleaned(tmp_path):
    mac = '<span hidden="true" id="MACx" class="MAC"><span class="keycode">{}</span></span><span id="d">{}</span>'
    kept = [
        element("par_id3", "<a href='x'>Datei\n  &amp; Ordner</a>", "File &amp; Folder"),
        element("hd_id2", "Der Titel", "The Title", tag="h2"),
        element("par_id4", "Drücke " + mac.format("Befehl", "Strg"), "Press " + mac.format("Command", "Ctrl")),
    ]
    dropped = [
        element("par_id5", "WENN A THEN B", "If A Then B", ' class="bascode"'),
        element("par_id6", 'In <span hidden="true" id="x" class="CALC">Calc</span>', "In Calc"),
        element("par_id7", "Name 3", "name 4"),  # the same in both languages
        element("par_id8", "Der  Titel!", "A title"),  # once more
        element("par_id9", "Ein Wort zu viel für seine kurze Übersetzung", "A word"),
        element("par_id10", "wort " * (MAX_WORDS + 1), "word " * (MAX_WORDS + 1)),
        element("par_id11", "12; 13; (14); a", "twelve; 13; (14)"),
        ('<p id="par_id12">Nur auf Deutsch</p>', '<p id="par_id13">English only</p>'),
    ]
    elements = kept + dropped
    german, english = "".join(e[0] for e in elements), "".join(e[1] for e in reversed(elements))
    text = help_texts(help_folder(tmp_path, {"shared/a.html": (german, english)}))
    expected = [("Datei & Ordner", "File & Folder"), ("Der Titel", "The Title"), ("Drücke Strg", "Press Ctrl")]
    assert all_pairs(text) == expected


def test_no_file_and_no_sentence_is_in_two_parts(tmp_path):
    root = many_pages(tmp_path)
    text = help_texts(root)
    parts = [text.train, text.validation, text.test]
    assert all(parts)
    assert len(text.train) > 0.8 * len(all_pairs(text))
    for side in (0, 1):
        found = [pair[side] for pair in all_pairs(text)]
        assert len(set(found)) == len(found)
    files = {(german, english): file for file, german, english in parallel_text.aligned(root)}
    names = ("train", "validation", "test")
    assert all(
        parallel_text.part(files[pair]) == name for name, part in zip(names, parts, strict=True) for pair in part
    )


def test_pairs_and_units_are_the_same_in_every_process(tmp_path):
    root = many_pages(tmp_path)
    pairs = all_pairs(help_texts(root))
    here = ascii((pairs, sorted(learned_tokenizer(pairs, 400).get_vocab().items())))
    program = f"""
from pathlib import Path
from asam.experiments.parallel_text import help_texts, learned_tokenizer
text = help_texts(Path({str(root)!r}))
pairs = [*text.train, *text.validation, *text.test]
print(ascii((pairs, sorted(learned_tokenizer(pairs, 400).get_vocab().items()))))"""
    environment = os.environ | {"PYTHONHASHSEED": "7", "XDG_CACHE_HOME": str(tmp_path / "other")}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True)
    assert found.stdout.strip() == here


def test_pages_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    page = element("par_id1", "Der Titel", "The Title")
    root = help_folder(tmp_path, {"a.html": page})
    first = all_pairs(help_texts(root))
    with monkeypatch.context() as patch:
        patch.setattr(parallel_text, "_elements", None)
        assert all_pairs(help_texts(root)) == first
    help_folder(root, {"a.html": element("par_id1", "Der neue Titel", "The New Title")})
    assert all_pairs(help_texts(root)) == [("Der neue Titel", "The New Title")]


def test_missing_help_texts_say_what_to_install(tmp_path):
    with pytest.raises(
        InputError, match=r"install Debian's libreoffice-help-de and libreoffice-help-en-us, or"
    ) as found:
        help_texts(tmp_path)
    assert "\n" not in str(found.value)


def test_a_folder_of_files_is_taken_as_it_is_but_for_training_pairs_that_do_not_match(folder):
    german, english = sentences(103, 0)
    (folder / "train.de").write_text("\n".join([*german, "", "viele " * 200, "ein zwei drei vier"]), encoding="utf-8")
    (folder / "train.en").write_text("\n".join([*english, "", "many " * 200, "one two"]), encoding="utf-8")
    text = iwslt(folder)
    assert list(text.train) == list(zip(german, english, strict=True))
    assert len(text.validation) == 12
    assert len(text.test) == 14


def test_incomplete_folders_are_refused(folder):
    (folder / "test.en").unlink()
    with pytest.raises(InputError, match=r"test\.en cannot be read \(No such file.*must hold train, valid and test"):
        iwslt(folder)
    (folder / "test.en").write_text("one\n")
    with pytest.raises(InputError, match=r"test\.de has 14 lines and test\.en 1"):
        iwslt(folder)
    (folder / "test.en").write_bytes(b"\xff")
    with pytest.raises(InputError, match="it is not UTF-8"):
        iwslt(folder)


def test_every_text_comes_back_from_its_units():
    tokenizer = learned_tokenizer([("Der Hund", "The dog")], 300)
    for text in ("Der Hund", "Ça va? 你好", "a  b-c (d)"):
        ids = tokenizer.encode(text).ids
        assert [ids[0], ids[-1]] == [BEGIN, END]
        assert tokenizer.decode(ids[1:-1]).strip() == text


def test_the_help_texts_of_this_machine():
    if not (HELP / "de" / "text").is_dir() or not (HELP / "en-US" / "text").is_dir():
        pytest.skip("libreoffice-help-de and libreoffice-help-en-us are not installed")
    text = help_texts()
    assert len(text.train) > 5000
    assert min(len(text.validation), len(text.test)) > 300
    for side in (0, 1):
        parts = [{pair[side].casefold() for pair in part} for part in (text.train, text.validation, text.test)]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert sum(" der " in german and " the " in english for german, english in text.train) > 500
    assert not any("<span" in side or "&amp;" in side for pair in text.train for side in pair)
