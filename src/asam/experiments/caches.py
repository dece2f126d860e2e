"""What takes time to make and is the same every time, kept in the user's cache folder."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/asam``, or ``~/.cache/asam``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asam"


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that ``fill`` makes if it is not there yet; whole or not at all, whoever else makes it."""
    folder = cache_folder() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder.parent))
        try:
            fill(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
