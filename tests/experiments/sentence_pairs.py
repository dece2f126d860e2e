"""Sentence pairs of a language that is translated word by word, in files like those of IWSLT'14."""

import random

WORDS = {"hund": "dog", "katze": "cat", "haus": "house", "baum": "tree", "buch": "book", "rot": "red", "grün": "green"}


def sentences(n, seed):
    """German and English."""
    draws = random.Random(seed)
    german = [[draws.choice(list(WORDS)) for _ in range(draws.randint(1, 7))] for _ in range(n)]
    return [" ".join(words) for words in german], [" ".join(WORDS[word] for word in words) for words in german]


def write_pairs(folder, train=103, valid=12, test=14):
    for seed, (part, n) in enumerate({"train": train, "valid": valid, "test": test}.items()):
        for language, lines in zip(("de", "en"), sentences(n, seed), strict=True):
            (folder / f"{part}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
