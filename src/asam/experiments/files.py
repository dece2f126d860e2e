"""Files that are written whole or not at all."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import InputError


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode("utf-8", "replace"))  # the command line stands in reports, and may be no Unicode


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # some disks say only now that they are full
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file
    finally:
        unfinished.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: JSON has no nan, which becomes null, and no inf, which becomes a string."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def read_json(path: Path, advice: str) -> Any:
    """What a JSON file holds; ``advice`` is what to do where it is damaged.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): {advice}") from None


@contextmanager
def held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it is not there, and removed if it stays empty.

    One that another process holds is refused, or with ``wait`` waited for. The system lets go of it when this process
    dies. Where a folder cannot be locked, or not made, nothing is held.

    Raises:
        InputError: another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with suppress(OSError):  # what comes next says it better
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = None
    try:
        with suppress(ImportError, OSError):  # not every system and file system can
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise InputError(
                    f"{folder}: another process is writing there: wait for it or choose another --out"
                ) from None
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def claim_folder(
    folder: Path,
    config: dict[str, Any],
    *,
    last: str,
    ours: tuple[str, ...],
    force: bool,
    written: tuple[str, ...] = (),
) -> None:
    """Make a folder of results ready: new, or of the same configuration and unfinished, to go on with.

    ``config.json`` tells the configuration, the file ``last`` that it is finished. With ``force`` the files that
    match ``ours`` are removed first, and nothing else; unless they, or files that match ``written``, are not of this
    program, whose ``config.json`` names its version.

    Raises:
        InputError: the folder holds something else, or is finished, and there is no ``force``.
    """
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: choose another --out")
    try:
        str(folder.resolve()).encode()
    except UnicodeEncodeError:  # the database and TensorBoard cannot write there
        raise InputError(f"{folder} has a name that is no Unicode: choose another --out") from None
    begun = f"{path.name}.part"  # killed while it claimed the folder
    if folder.is_dir() and any(file.name != begun for file in folder.iterdir()):
        if force:
            # config.json last: killed in between, the folder is still one of ours
            found = [
                file for pattern in (last, *ours, path.name) for file in sorted(folder.glob(pattern), reverse=True)
            ]
            files = [file for file in found if not file.is_dir()]
            others = files + [file for pattern in written for file in sorted(folder.glob(pattern))]
            if others and not _is_ours(path):
                raise InputError(f"{others[0]} would be overwritten and is of something else: choose another --out")
            for file in files:
                file.unlink(missing_ok=True)
        else:
            # with --force the files of a damaged one would be refused as of something else
            if not path.exists() or read_json(path, "choose another --out") != json.loads(json.dumps(plain(config))):
                raise InputError(
                    f"{folder} holds another configuration or other files: choose another --out, or overwrite with "
                    "--force"
                )
            if (folder / last).exists():
                raise InputError(f"{folder} holds the same, finished: choose another --out, or run again with --force")
            return
    folder.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(plain(config), indent=1) + "\n")


def _is_ours(config: Path) -> bool:
    try:
        return "asam" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
