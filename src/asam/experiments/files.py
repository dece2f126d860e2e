"""Files that are written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from . import InputError


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): start again with --force") from None


def claim_folder(folder: Path, config: dict[str, Any], *, last: str, ours: tuple[str, ...], force: bool) -> None:
    """Make a folder of results ready: new, or of the same configuration and unfinished, to go on with.

    ``config.json`` tells the configuration, the file ``last`` that it is finished. With ``force`` the files that
    match ``ours`` are removed first, and nothing else.

    Raises:
        InputError: the folder holds something else, or is finished, and there is no ``force``.
    """
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        if force:
            for pattern in ("config.json", last, *ours):
                for file in folder.glob(pattern):
                    file.unlink()
        else:
            if not path.exists() or read_json(path) != json.loads(json.dumps(config)):
                raise InputError(
                    f"{folder} holds another configuration or other files: choose another --out, or overwrite with "
                    "--force"
                )
            if (folder / last).exists():
                raise InputError(f"{folder} holds the same, finished: choose another --out, or run again with --force")
            return
    folder.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(config, indent=1) + "\n")
