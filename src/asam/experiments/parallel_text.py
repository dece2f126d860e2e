"""German-English sentence pairs: the help of LibreOffice, or a folder of files like those of IWSLT'14; as units.

The help texts are Debian's ``libreoffice-help-de`` and ``libreoffice-help-en-us`` (MPL-2.0), aligned by the ids of
their elements. Whole files go to training, validation or test data, and a sentence that occurs twice, with other
digits or punctuation for instance, is kept at its first place only: no sentence is in two parts.
"""

import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from . import InputError
from .caches import cached_folder

HELP = Path("/usr/share/libreoffice/help")
MAX_WORDS = 12  # of a sentence of the help texts, punctuation marks included
MAX_RATIO = 2.0  # of the words of the two sides
CLEANING = 1  # part of the cache's name: raise it when other pairs come out of the same files

PAD, BEGIN, END = range(3)
SPECIAL = ["<pad>", "<s>", "</s>"]
MOST_UNITS = 256  # of a sentence; longer ones are cut

Pair = tuple[str, str]
Units = tuple[Tensor, Tensor]

# a paragraph or heading with an id; what shows on a Mac only; any other choice between texts; a tag
_ELEMENT = re.compile(r'<(p|h[1-6]) id="((?:par|hd)_id\w+)"([^>]*)>(.*?)</\1>', re.DOTALL)
_MAC = re.compile(r'<span hidden="true" id="\w+" class="MAC">(?:[^<]|<span[^>]*>[^<]*</span>)*</span>')
_CHOICE = re.compile(r'<span hidden="true" id="[^"]*" class=')
_TAG = re.compile(r"<[^>]*>")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class ParallelText:
    """Pairs of a German and an English sentence."""

    train: Sequence[Pair]
    validation: Sequence[Pair]
    test: Sequence[Pair]


def load(folder: str | None) -> ParallelText:
    """The pairs of a user's folder, or else of the help texts.

    Raises:
        InputError: they are not there.
    """
    return iwslt(Path(folder)) if folder else help_texts()


def iwslt(folder: Path) -> ParallelText:
    """Files with a sentence a line: ``train.de``, ``train.en``, and so on with ``valid`` and ``test``.

    Training pairs without a word, of more than 175 words, or with one side 1.5 times as long as the other are left out,
    as is usual for these data.

    Raises:
        InputError: a file is not there, those of a part differ in length, or nothing is left.
    """
    train, validation, test = (_lines(folder, part) for part in ("train", "valid", "test"))
    train = [pair for pair in train if _matching(pair, 175, 1.5)]
    if not train:
        raise InputError(f"{folder}: train.de and train.en hold no sentences that match in length")
    return ParallelText(train, validation, test)


def _lines(folder: Path, part: str) -> list[Pair]:
    sides = []
    for language in ("de", "en"):
        path = folder / f"{part}.{language}"
        try:
            sides.append(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(
                f"{path} cannot be read ({reason}): --data-dir must hold train, valid and test, each as .de and .en"
            ) from None
    if len(sides[0]) != len(sides[1]):
        raise InputError(f"{folder}: {part}.de has {len(sides[0])} lines and {part}.en {len(sides[1])}")
    return list(zip(*sides, strict=True))


def help_texts(root: Path = HELP) -> ParallelText:
    """The short pairs of the help texts, about 90 % of the files for training and 5 % each for validation and test.

    The files come in the order of a hash of their names, so that the first pairs are a sample of all.

    Raises:
        InputError: the texts are not installed.
    """
    parts: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    for file, source, target in aligned(root):
        parts[part(file)].append((source, target))
    return ParallelText(**parts)


def part(file: str) -> str:
    """The part that a file belongs to."""
    return {0: "test", 1: "validation"}.get(_hash(file) % 20, "train")


def _hash(file: str) -> int:
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big")


def aligned(root: Path) -> list[tuple[str, str, str]]:
    """File, German and English of every pair, read once and then from a cache.

    Raises:
        InputError: the texts are not installed.
    """
    files = _files(root)
    sizes = [(file, (root / language / file).stat().st_size) for file in files for language in ("de", "en-US")]
    key = hashlib.sha256(repr((CLEANING, MAX_WORDS, MAX_RATIO, sizes)).encode()).hexdigest()[:16]

    def fill(folder: Path) -> None:
        pairs = list(_distinct(_pairs(root, files)))
        (folder / "pairs.json").write_text(json.dumps(pairs, ensure_ascii=False), encoding="utf-8")

    text = (cached_folder(f"help-texts-{key}", fill) / "pairs.json").read_text(encoding="utf-8")
    return [(file, source, target) for file, source, target in json.loads(text)]


def _files(root: Path) -> list[str]:
    german, english = (
        {path.relative_to(root / language).as_posix() for path in (root / language / "text").rglob("*.html")}
        for language in ("de", "en-US")
    )
    if not german & english:
        raise InputError(
            f"{root} does not hold the help texts: install Debian's libreoffice-help-de and libreoffice-help-en-us, or "
            "name a folder of train, valid and test files (.de, .en) with --data-dir"
        )
    return sorted(german & english, key=_hash)


def _pairs(root: Path, files: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    for file in files:
        german, english = (_elements(root / language / file) for language in ("de", "en-US"))
        for name in [name for name in german if name in english]:
            pair = german[name], english[name]
            if _matching(pair, MAX_WORDS, MAX_RATIO) and sum(letter.isalpha() for letter in pair[0]) > len(pair[0]) / 2:
                yield file, *pair


def _elements(path: Path) -> dict[str, str]:
    found = {}
    for element in _ELEMENT.finditer(path.read_text(encoding="utf-8")):
        _, name, attributes, content = element.groups()
        content = _MAC.sub("", content)
        if "code" not in attributes and not _CHOICE.search(content):
            found[name] = " ".join(html.unescape(_TAG.sub("", content)).split())
    return found


def _matching(pair: Pair, most: int, ratio: float) -> bool:
    """Whether both sides have words, not too many, in a plausible proportion."""
    shorter, longer = sorted(len(_WORD.findall(side)) for side in pair)
    return shorter > 0 and longer <= most and longer <= ratio * shorter


def _distinct(pairs: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """The pairs whose German and whose English were not there before; what is the same in both is no translation."""
    seen: tuple[set[str], set[str]] = (set(), set())
    for file, german, english in pairs:
        letters = [re.sub(r"[\W\d_]", "", side).casefold() for side in (german, english)]
        if letters[0] != letters[1] and not any(side in known for side, known in zip(letters, seen, strict=True)):
            yield file, german, english
        for side, known in zip(letters, seen, strict=True):
            known.add(side)


def learned_tokenizer(pairs: Sequence[Pair], vocabulary: int) -> Tokenizer:
    """Byte-pair encoding (arXiv:1508.07909) of both languages together; it encodes every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((side for pair in pairs for side in pair), trainer)
    special = [("<s>", BEGIN), ("</s>", END)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.enable_truncation(MOST_UNITS)
    return tokenizer


def encoded(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[Units]:
    """Both sides of every pair, from the unit of the beginning to that of the end."""
    sides = ([pair[side] for pair in pairs] for side in (0, 1))
    source, target = ([torch.tensor(found.ids) for found in tokenizer.encode_batch(side)] for side in sides)
    return list(zip(source, target, strict=True))
