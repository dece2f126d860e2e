"""Rendered characters, from the fonts that come with matplotlib."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from asam.experiments import InputError, glyphs
from asam.experiments.data import _read, load

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
LETTERS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "STIXGeneral",
    "STIXGeneralItalic",
    "cmr10",
    "cmss10",
    "cmtt10",
)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    glyphs.glyphs.cache_clear()
    _read.cache_clear()


@pytest.fixture
def fonts(tmp_path):
    folder = tmp_path / "fonts"
    folder.mkdir()
    for name in LETTERS:
        shutil.copy(FONTS / f"{name}.ttf", folder)
    return folder


def test_images_are_centred_fill_their_frame_and_are_what_they_are_called(fonts):
    images, labels, families = glyphs.glyphs(str(fonts))
    assert images.shape == (len(LETTERS) * 36, 28, 28)
    assert images.dtype == np.uint8
    assert labels.tolist() == list(range(36)) * len(LETTERS)
    assert len(set(families.tolist())) == 5
    for image in images:
        rows, columns = np.nonzero(image.max(1))[0], np.nonzero(image.max(0))[0]
        assert max(np.ptp(rows), np.ptp(columns)) in (22, 23)
        assert abs(rows[0] + rows[-1] - 27) <= 1
        assert abs(columns[0] + columns[-1] - 27) <= 1
    # a bar in the middle, a bar to the left and below, a bar above
    sans = images[labels.argsort(kind="stable")].reshape(36, len(LETTERS), 28, 28)[:, 1]
    letter_i, letter_l, letter_t = (sans["ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789".index(name)] for name in "ILT")
    assert letter_i[:, 13:15].min(1)[3:25].mean() > 200
    assert letter_l[24:26, 8:20].mean() > 200 > 50 > letter_l[2:20, 14:].mean()
    assert letter_t[2:4, 6:22].mean() > 200 > 50 > letter_t[10:, :8].mean()


def test_fonts_without_letters_and_broken_files_are_left_out(fonts):
    expected, _, _ = glyphs.glyphs(str(fonts))
    for name in ("STIXSizOneSymReg", "LastResortHE-Regular"):
        shutil.copy(FONTS / f"{name}.ttf", fonts)
    (fonts / "broken.ttf").write_bytes(b"no font")
    (fonts / "cut.ttf").write_bytes((FONTS / "cmr10.ttf").read_bytes()[:5000])
    glyphs.glyphs.cache_clear()
    np.testing.assert_array_equal(glyphs.glyphs(str(fonts))[0], expected)


def test_no_family_is_in_two_parts(fonts):
    images, _, families = glyphs.glyphs(str(fonts))
    of = {image.tobytes(): family for image, family in zip(images, families.tolist(), strict=True)}
    seen = set()
    for seed in range(6):
        data = load("glyphs", str(fonts), 0.0, seed)
        assert (data.classes, data.flips) == (36, False)
        parts = []
        for split in (data.train, data.validation, data.test):
            pixels = (split.inputs * images.std() + images.mean()).round().numpy().astype(np.uint8)
            parts.append({of[image.tobytes()] for image in pixels[:, 0]})
        assert sum(len(part) for part in parts) == 5
        assert len(set().union(*parts)) == 5
        seen.add(str(parts))
    assert len(seen) > 1
    fewer = load("glyphs", str(fonts), 0.0, 0, train_size=40)
    assert len(fewer.train.labels) == 40
    np.testing.assert_array_equal(fewer.test.labels, load("glyphs", str(fonts), 0.0, 0).test.labels)


def test_they_are_rendered_once(fonts, tmp_path, monkeypatch):
    first = glyphs.glyphs(str(fonts))
    (kept,) = (tmp_path / "cache" / "asam").iterdir()
    glyphs.glyphs.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(glyphs, "_rendered", None)
        again = glyphs.glyphs(str(fonts))
    for array, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(array, other)
    # a broken file is written anew; another folder of fonts has a file of its own
    kept.write_bytes(kept.read_bytes()[:1000])
    glyphs.glyphs.cache_clear()
    np.testing.assert_array_equal(glyphs.glyphs(str(fonts))[0], first[0])
    (fonts / "cmtt10.ttf").unlink()
    glyphs.glyphs.cache_clear()
    assert len(glyphs.glyphs(str(fonts))[0]) == len(first[0]) - 36
    assert sorted(file.suffix for file in kept.parent.iterdir()) == [".npz", ".npz"]


def test_a_cache_folder_that_cannot_be_written_is_done_without(fonts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(glyphs.glyphs(str(fonts))[0]) == len(LETTERS) * 36


def test_what_is_missing_is_told(fonts, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "FONT_FOLDER", tmp_path / "none")
    with pytest.raises(InputError, match=r"none holds no fonts: install Debian's fonts-aenigma.* --data-dir"):
        load("glyphs", None, 0.0, 0)
    for name in LETTERS[1:]:
        (fonts / f"{name}.ttf").unlink()
    with pytest.raises(InputError, match="1 families of fonts are too few"):
        load("glyphs", str(fonts), 0.0, 0)
    (fonts / "DejaVuSans.ttf").write_bytes(b"no font")
    glyphs.glyphs.cache_clear()
    _read.cache_clear()
    with pytest.raises(InputError, match=r"no font in .* has the letters"):
        load("glyphs", str(fonts), 0.0, 0)


@pytest.mark.skipif(not glyphs.FONT_FOLDER.is_dir(), reason="Debian's fonts-aenigma is not installed")
def test_the_typefaces_of_debian():
    images, _, families = glyphs.glyphs(None)
    assert (len(images), len(np.unique(families))) == (464 * 36, 291)
    data = load("glyphs", None, 0.0, 0)
    assert (len(data.train.labels), len(data.validation.labels), len(data.test.labels)) == (10836, 1728, 4140)
