"""CIFAR in small: archives as Python 2 wrote them, and what must not get through."""

import io
import os
import pickle
import struct
import sys
import tarfile
import types
from typing import ClassVar

import numpy as np
import pytest
import torch

from asam.experiments import InputError, cifar
from asam.experiments.data import SIZES, _read, load


class Python2(pickle._Pickler):
    """Writes what Python 2 and the numpy of 2009 wrote: bytes as strings, the old name of an array's constructor."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, obj):
        self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch[bytes] = save_bytes

    def save_str(self, obj):
        self.save_bytes(obj.encode("latin1"))

    dispatch[str] = save_str

    def save_bool(self, obj):
        self.save(int(obj))

    dispatch[bool] = save_bool

    def save_global(self, obj, name=None):
        module = "numpy.core.multiarray" if obj.__name__ == "_reconstruct" else "numpy"
        self.write(f"c{module}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[types.FunctionType] = dispatch[types.BuiltinFunctionType] = dispatch[type] = save_global


def pickled(batch, python2=True):
    if not python2:
        return pickle.dumps(batch, protocol=2)
    file = io.BytesIO()
    Python2(file, protocol=2).dump(batch)
    return file.getvalue()


def archive(folder, dataset, n_train, n_test, python2=True):
    """The unpacked archive and, beside it, the packed one; images and labels, test last."""
    random = np.random.default_rng(0)
    name, inside, train, test, key = cifar.FILES[dataset]
    (folder / "open" / inside).mkdir(parents=True)
    images, labels = [], []
    for file, n in [*((file, n_train // len(train)) for file in train), (test, n_test)]:
        images.append(random.integers(0, 256, (n, 3072), np.uint8))
        labels.append(random.integers(0, 100 if dataset == "cifar100" else 10, n).tolist())
        batch = {b"data": images[-1], key: labels[-1], b"batch_label": b"synthetic", b"filenames": [b"a.png"] * n}
        (folder / "open" / inside / file).write_bytes(pickled(batch, python2))
    (folder / "packed").mkdir()
    with tarfile.open(folder / "packed" / name, "w:gz") as tar:
        tar.add(folder / "open" / inside, inside)
    return np.concatenate(images).reshape(-1, 3, 32, 32), np.concatenate(labels)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("python2", [True, False])
def test_the_archive_is_read_packed_and_unpacked(tmp_path, dataset, python2):
    images, labels = archive(tmp_path, dataset, 20, 6, python2)
    name, inside, *_ = cifar.FILES[dataset]
    for place in ("open", f"open/{inside}", "packed", f"packed/{name}"):
        found, found_labels, n_test = cifar.read(dataset, str(tmp_path / place))
        assert n_test == 6
        np.testing.assert_array_equal(found, images)
        np.testing.assert_array_equal(found_labels, labels)


def test_parts_and_statistics(tmp_path, monkeypatch):
    images, labels = archive(tmp_path, "cifar10", 60, 25)
    monkeypatch.setitem(SIZES, "cifar10", [50, 10, 25])
    data = load("cifar10", str(tmp_path / "open"), 0.0, seed=0)
    assert [len(split.labels) for split in (data.train, data.validation, data.test)] == [50, 10, 25]
    assert (data.classes, data.flips) == (10, True)
    known = torch.cat([data.train.inputs, data.validation.inputs]).double()
    torch.testing.assert_close(known.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(known.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))
    scale = images[:60].std((0, 2, 3))[:, None, None]
    restored = (data.test.inputs - data.black) * torch.tensor(scale, dtype=torch.float32)
    assert torch.equal(restored.round(), torch.tensor(images[60:], dtype=torch.float32))
    assert data.test.labels.tolist() == labels[60:].tolist()
    everything = load("cifar10", str(tmp_path / "open"), 0.0, seed=0, train_size=60)
    assert torch.equal(everything.train.inputs, torch.cat([data.train.inputs, data.validation.inputs]))
    assert len(everything.validation.labels) == 0
    with pytest.raises(InputError, match="at most 50, or 60 with no validation data, got 55"):
        load("cifar10", str(tmp_path / "open"), 0.0, seed=0, train_size=55)
    _read.cache_clear()


def test_noise_is_over_all_classes(tmp_path, monkeypatch):
    archive(tmp_path, "cifar100", 2000, 10)
    monkeypatch.setitem(SIZES, "cifar100", [1990, 10, 10])
    clean, noisy = (load("cifar100", str(tmp_path / "open"), noise, seed=0) for noise in (0.0, 0.5))
    changed = clean.train.labels != noisy.train.labels
    assert changed.sum() == 995
    # 995 uniform draws of 99 differences miss hardly any
    assert len(((noisy.train.labels - clean.train.labels)[changed] % 100).unique()) >= 97
    _read.cache_clear()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("must-not-be-there",)


def test_a_pickle_that_calls_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive(tmp_path, "cifar10", 10, 2)
    file = tmp_path / "open" / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(InputError, match=r"test_batch is not a file of CIFAR: it asks for posix.mkdir"):
        cifar.read("cifar10", str(tmp_path / "open"))
    assert not (tmp_path / "must-not-be-there").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        pickled({b"labels": [0]}),
        pickled({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}),
        pickled({b"data": np.zeros((1, 3072), np.float32), b"labels": [0]}),
        pickled({b"data": np.zeros((1, 3072), np.uint8), b"labels": [b"cat"]}),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content):
    archive(tmp_path, "cifar10", 10, 2)
    (tmp_path / "open" / "cifar-10-batches-py" / "data_batch_2").write_bytes(content)
    with pytest.raises(InputError, match=r"^data_batch_2 is not a file of CIFAR: .*\Z"):
        cifar.read("cifar10", str(tmp_path / "open"))


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(InputError, match=r"cifar10 needs --data-dir"):
        cifar.read("cifar10", None)
    with pytest.raises(InputError, match=r"holds neither cifar-100-python.tar.gz nor cifar-100-python"):
        cifar.read("cifar100", str(tmp_path))
    archive(tmp_path, "cifar10", 10, 2)
    (tmp_path / "open" / "cifar-10-batches-py" / "data_batch_5").unlink()
    with pytest.raises(InputError, match=r"cannot be read: .*data_batch_5"):
        cifar.read("cifar10", str(tmp_path / "open"))
    packed = tmp_path / "packed" / "cifar-10-python.tar.gz"
    with pytest.raises(InputError, match=r"cifar-10-python.tar.gz lacks cifar-100-python/train"):
        cifar.read("cifar100", str(packed))
    packed.write_bytes(packed.read_bytes()[:200])
    with pytest.raises(InputError, match=r"cifar-10-python.tar.gz cannot be read"):
        cifar.read("cifar10", str(packed))
    archive(tmp_path / "small", "cifar10", 10, 2)
    with pytest.raises(InputError, match=r"holds 10 and 2 images: that is not cifar10"):
        load("cifar10", str(tmp_path / "small" / "open"), 0.0, 0)


def test_the_hub(monkeypatch):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6, 32, 32, 3), np.uint8)
    split = {"img": list(images), "fine_label": [0, 1, 2, 3, 98, 99]}
    hub = types.ModuleType("datasets")
    hub.load_dataset = {"uoft-cs/cifar100": {"train": split, "test": split}}.__getitem__
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found, labels, n_test = cifar.read("cifar100", "hub")
    np.testing.assert_array_equal(found, np.concatenate([images, images]).transpose(0, 3, 1, 2))
    assert (labels.tolist(), n_test) == (split["fine_label"] * 2, 6)
    with pytest.raises(InputError, match=r"^uoft-cs/cifar10 cannot be had from the hub: .*\Z"):
        cifar.read("cifar10", "hub")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        cifar.read("cifar10", "hub")
