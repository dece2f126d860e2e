"""A folder of images in small."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from asam.experiments import InputError, image_folder
from asam.experiments.image_folder import ImageFolder, random_box
from asam.experiments.run import Run
from asam.experiments.training import Training

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]


@pytest.fixture
def folder(tmp_path):
    """Images of six classes that have each a color, brighter to the right; 20 to train on, 3 to test."""
    for part, n in (("train", 20), ("val", 3)):
        for name, color in zip(CLASSES, COLORS, strict=True):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.tile(np.linspace(0.4 + 0.01 * i, 1, 60)[:, None] * color, (40 + i, 1, 1)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train" / "README").write_text("no class")
    return tmp_path


def run(folder, **changes):
    values = {
        "method": "sgd",
        "dataset": "image-folder",
        "data_dir": str(folder),
        "model": "cnn",
        "image_size": 16,
        "batch_size": 10,
        "augment": True,
        "lr": 0.1,
        "epochs": 2,
    }
    return Run(**(values | changes))


def epoch(task, seed=0, rank=0, world=1):
    return list(task.batches(torch.Generator().manual_seed(seed), rank, world))


@pytest.mark.parametrize("augment", [False, True])
def test_the_number_of_processes_changes_nothing(folder, monkeypatch, augment):
    task = ImageFolder(run(folder, augment=augment))
    before = torch.get_rng_state()
    epochs = []
    for workers in (0, 1, 2):
        monkeypatch.setattr(image_folder, "MOST_WORKERS", workers)
        epochs.append(epoch(task))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(epochs[0]) == task.steps == 12
    for batches in epochs[1:]:
        for batch, other in zip(epochs[0], batches, strict=True):
            assert all(torch.equal(part, same) for part, same in zip(batch, other, strict=True))
    different = epoch(task, seed=1)
    assert not torch.equal(epochs[0][0][0], different[0][0])


def test_shards_make_up_the_batch(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "MOST_WORKERS", 0)
    task = ImageFolder(run(folder))
    shards = [epoch(task, rank=rank, world=3) for rank in range(3)]
    for batch, *parts in zip(epoch(task), *shards, strict=True):
        for whole, *pieces in zip(batch, *parts, strict=True):
            for rank, piece in enumerate(pieces):
                assert torch.equal(whole[rank::3], piece)


def test_images_are_standardized_and_labelled(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "MOST_WORKERS", 0)
    for inputs, labels in epoch(ImageFolder(run(folder))):
        pixels = inputs * image_folder.STD + image_folder.MEAN
        assert inputs.shape[1:] == (3, 16, 16)
        for image, label in zip(pixels, labels, strict=True):
            assert (image.amax((1, 2)) > 0.3).tolist() == [value > 0 for value in COLORS[label]]


def test_validation_data_is_held_out_by_class(folder):
    task, other = ImageFolder(run(folder)), ImageFolder(run(folder, seed=1))
    train, validation = task._train.examples, task._validation.examples
    assert sorted(label for _, label in validation) == list(range(6))
    assert len({*train, *validation}) == len(train) + len(validation) == 120
    assert validation != other._validation.examples
    fewer = ImageFolder(run(folder, train_size=30))
    assert (fewer._train.examples, fewer._validation.examples) == (train[:30], validation)
    with pytest.raises(InputError, match="train_size must be at most 114, got 115"):
        ImageFolder(run(folder, train_size=115))


class Fixed(nn.Module):
    """Scores that do not depend on the image."""

    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, inputs):
        assert not self.training
        return self.scores.expand(len(inputs), -1)


def test_errors(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "EVALUATION_BATCH", 4)
    network = Fixed([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    found = ImageFolder(run(folder)).evaluate(network)
    assert network.training
    assert found["validation_error"] == found["test_error"] == pytest.approx(500 / 6)
    assert found["test_top5_error"] == pytest.approx(100 / 6)


def test_colors_are_learned(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "MOST_WORKERS", 0)
    training = Training(run(folder, epochs=4))
    training.advance()
    assert training.outcome()["test_error"] == 0


@pytest.mark.parametrize(("width", "height"), [(500, 375), (40, 40), (1000, 10), (1, 1), (7, 400)])
def test_random_boxes_are_within_the_image_and_of_its_area(width, height):
    draws = random.Random(0)
    for _ in range(200):
        left, top, right, bottom = random_box(width, height, draws)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if min(width, height) >= 40:
            assert 0.07 < (right - left) * (bottom - top) / (width * height) <= 1
            assert 0.7 < (right - left) / (bottom - top) < 1.42


def test_evaluation_takes_the_middle(tmp_path):
    image = np.zeros((256, 512, 3), np.uint8)
    image[16:240, 144:368] = 255
    found = np.array(image_folder._cropped(Image.fromarray(image), 224, None))
    assert found.shape == (224, 224, 3)
    assert found.min() == 255


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_in_one_line(folder, monkeypatch, workers):
    monkeypatch.setattr(image_folder, "MOST_WORKERS", workers)
    for i in range(20):
        (folder / "train" / "bee" / f"{i}.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(InputError, match=r"^.*bee/\d+.png cannot be read: .*\Z"):
        epoch(ImageFolder(run(folder)))


def test_an_image_of_more_than_8_bits_is_refused(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "MOST_WORKERS", 0)
    Image.fromarray(np.full((40, 60), 300, np.uint16)).save(folder / "val" / "ant" / "0.png")
    task = ImageFolder(run(folder))
    with pytest.raises(InputError, match=r"^.*ant/0\.png has more than 8 bits a channel: convert it to 8$"):
        task.evaluate(task.network())


def test_hidden_files_and_what_is_no_file_are_not_looked_at(folder):
    examples = ImageFolder(run(folder))._train.examples
    (folder / "train" / "ant" / "._0.png").write_bytes(b"of another system")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "ant" / "folder.png").mkdir()
    assert ImageFolder(run(folder))._train.examples == examples


def test_what_is_missing_is_told(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match="image-folder needs --data-dir"):
        ImageFolder(run(folder, data_dir=None))
    with pytest.raises(InputError, match=r"noise must be 0, got 0\.2"):
        ImageFolder(run(folder, noise=0.2))
    with pytest.raises(InputError, match=r"^image-folder is tested on all of val: leave --test-size out$"):
        ImageFolder(run(folder, test_size=1))
    with pytest.raises(InputError, match=r"train is not there: --data-dir must hold train/CLASS"):
        ImageFolder(run(empty))
    (empty / "train").mkdir()
    with pytest.raises(InputError, match="train has no classes"):
        ImageFolder(run(empty))
    (folder / "val" / "gnu").mkdir()
    with pytest.raises(InputError, match="gnu has no image"):
        ImageFolder(run(folder))
    (folder / "val" / "ant" / "0.png").rename(folder / "val" / "gnu" / "0.png")
    with pytest.raises(InputError, match=r"gnu is of a class that .*train lacks"):
        ImageFolder(run(folder))
    (folder / "train" / "gnu").mkdir()
    (folder / "val" / "ant" / "1.png").rename(folder / "train" / "gnu" / "0.png")
    with pytest.raises(InputError, match="the class gnu has one training image"):
        ImageFolder(run(folder))
