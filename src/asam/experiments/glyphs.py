"""A to Z and 0 to 9 in hundreds of typefaces: images of 28x28 whose difficulty is a typeface never seen.

A few typefaces are next to unreadable, which is a label noise that nobody made up.
"""

import hashlib
import io
import os
import re
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageFont

from . import InputError
from .caches import cache_folder

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
# where Debian's package fonts-aenigma puts the files: 465 display typefaces by one hand
FONT_FOLDER = Path("/usr/share/fonts/truetype/aenigma")
SIDE, MARGIN = 28, 2
RENDERED_AT = 48  # pixels to the em, before a glyph is scaled to fill its image
VERSION = 1  # of the rendering, for the file that keeps it


@cache
def glyphs(folder: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (n, 28, 28) of bytes, their characters as indices (n,), and the families of their fonts (n,).

    Rendered once, then read from a file in the user's cache folder.

    Raises:
        InputError: there are no fonts.
    """
    path = Path(folder) if folder else FONT_FOLDER
    files = sorted(file for file in path.glob("*") if file.suffix.lower() in (".ttf", ".otf"))
    if not files:
        raise InputError(
            f"{path} holds no fonts: install Debian's fonts-aenigma, or name a folder of .ttf files with --data-dir"
        )
    names = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    key = hashlib.sha256(f"{VERSION} {PIL.__version__}\n{names}".encode()).hexdigest()[:16]
    kept = cache_folder() / f"glyphs-{key}.npz"
    try:
        with kept.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return stored["images"], stored["labels"], stored["families"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there yet, or broken
    images, labels, families = _rendered(files)
    if not len(images):
        raise InputError(f"no font in {path} has the letters A to Z and the digits: name another --data-dir")
    _keep(kept, images=images, labels=labels, families=families)
    return images, labels, families


def family(name: str) -> str:
    """The first word of a font's name, without what is neither letter nor digit: what its variants have in common.

    >>> family("Quantum Round Hollow BRK"), family("Mini Kaliber S TT BRK"), family("8-bit Limit O BRK")
    ('quantum', 'kaliber', '8bit')
    """
    words = (re.sub(r"[^a-z0-9]", "", word) for word in name.lower().split())
    return next((word for word in words if word not in ("", "mini")), name)


def _rendered(files: list[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images: list[np.ndarray] = []
    families: list[int] = []
    numbers: dict[str, int] = {}
    for file in files:
        try:
            # not by its path: where that is no font, Pillow takes one of that name from elsewhere
            font = ImageFont.truetype(io.BytesIO(file.read_bytes()), RENDERED_AT)
            typeface = [_glyph(font, character) for character in CHARACTERS]
        except OSError:
            continue  # no font, or a broken one
        found = [glyph for glyph in typeface if glyph is not None]
        # a font without letters shows the same box for all; the O may well be the zero
        if len(found) < len(CHARACTERS) or len({glyph.tobytes() for glyph in found}) < len(CHARACTERS) / 2:
            continue
        images += found
        families += [numbers.setdefault(family(font.getname()[0] or file.stem), len(numbers))] * len(CHARACTERS)
    labels = np.tile(np.arange(len(CHARACTERS)), len(images) // len(CHARACTERS))
    return np.array(images, np.uint8).reshape(-1, SIDE, SIDE), labels, np.array(families, np.int64)


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """The character in white on black, as large as the margin allows and in the middle; None if there is nothing."""
    mask = font.getmask(character, mode="L")
    if 0 in mask.size:
        return None
    drawn = Image.frombytes("L", mask.size, bytes(mask))
    box = drawn.getbbox()
    if box is None:
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    scale = (SIDE - 2 * MARGIN) / max(width, height)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    image = Image.new("L", (SIDE, SIDE))
    scaled = drawn.resize(size, Image.Resampling.BILINEAR, box=box)
    image.paste(scaled, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(image)


def _keep(path: Path, **arrays: np.ndarray) -> None:
    """Write the file whole or not at all, whoever else is writing it; without a place to write, do without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            try:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError:
        pass
