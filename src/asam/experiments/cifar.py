"""CIFAR-10 and CIFAR-100 from their official archives, which are pickles: read so that they can only hold data."""

import importlib
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import InputError

# archive, folder in it, files of training and of test images, labels
FILES = {
    "cifar10": (
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)],
        "test_batch",
        b"labels",
    ),
    "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python", ["train"], "test", b"fine_labels"),
}
HUB = {"cifar10": ("uoft-cs/cifar10", "label"), "cifar100": ("uoft-cs/cifar100", "fine_label")}


def read(dataset: str, folder: str | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Images (n, 3, 32, 32) of bytes and labels (n,), the test images last, and how many those are.

    Args:
        dataset: ``"cifar10"`` or ``"cifar100"``.
        folder: where the archive of the python version is, or what was unpacked from it; or the archive itself;
            ``"hub"``: from the Hugging Face hub, by the library ``datasets``.

    Raises:
        InputError: it is not there, or is not what it should be.
    """
    archive, inside, train, test, labels_key = FILES[dataset]
    if folder is None:
        raise InputError(f"{dataset} needs --data-dir: the folder of {archive} or of {inside}, or hub to download it")
    parts = _hub(dataset) if folder == "hub" else _parts(Path(folder), archive, inside, [*train, test], labels_key)
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images, labels, len(parts[-1][1])


def _parts(path: Path, archive: str, inside: str, names: list[str], key: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    places = (path, path / archive)
    file = next((place for place in places if place.is_file()), None)
    folder = next((place for place in (path / inside, path) if (place / names[-1]).is_file()), None)
    try:
        if folder is not None:
            return [_batch(name, (folder / name).read_bytes(), key) for name in names]
        if file is None:
            raise InputError(f"{path} holds neither {archive} nor {inside}: name their folder with --data-dir, or hub")
        wanted = {f"{inside}/{name}": name for name in names}
        found = {}
        with tarfile.open(file) as tar:
            for member in tar:
                name = wanted.get(member.name)
                if name is not None and (content := tar.extractfile(member)) is not None:
                    found[name] = _batch(name, content.read(), key)
        if missing := [name for name in names if name not in found]:
            raise InputError(f"{file} lacks {inside}/{missing[0]}")
        return [found[name] for name in names]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{file or folder} cannot be read: {error}") from None


def _batch(name: str, content: bytes, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _DataOnly(io.BytesIO(content), encoding="bytes").load()
        images, labels = batch[b"data"], np.asarray(batch[key])
        if images.dtype != np.uint8 or images.shape != (len(labels), 3 * 32 * 32) or labels.dtype.kind not in "iu":
            raise ValueError("wrong shapes")
    except Exception as error:  # a broken pickle raises whatever it runs into
        raise InputError(f"{name} is not a file of CIFAR: {error}") from None
    return images.reshape(-1, 3, 32, 32), labels.astype(np.int64)


class _DataOnly(pickle.Unpickler):
    """Reads dictionaries, lists, strings, bytes, numbers and arrays; nothing else in it is looked up or called."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickled array is made of, under its old and its new name."""
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
            ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): _encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which data does not need")
        return known[module, name]


def _dtype(kind: Any, *_: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(kind)  # 2.4.0 to 2.4.4 warn of the integers that Python 2 wrote
    return dtype


def _encode(text: str, encoding: str | bytes) -> bytes:
    """How Python 3 writes bytes in the pickles that Python 2 could read."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _hub(dataset: str) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise InputError(f"{dataset} from the hub needs the library datasets: pip install datasets") from None
    name, label = HUB[dataset]
    try:
        found = datasets.load_dataset(name)
        splits = [found["train"], found["test"]]
        return [
            (
                np.stack([np.asarray(image, np.uint8) for image in split["img"]]).transpose(0, 3, 1, 2),
                np.asarray(split[label], np.int64),
            )
            for split in splits
        ]
    except Exception as error:  # the library's own, those of its transport, of the file system
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name} cannot be had from the hub: {reason}") from None
