"""Translation: batches, the Transformer, what is measured, and whole runs."""

import pytest
import torch
from sentence_pairs import write_pairs
from torch import nn

from asam.experiments import InputError
from asam.experiments.parallel_text import BEGIN, END, PAD, iwslt
from asam.experiments.run import Run
from asam.experiments.training import Training, train
from asam.experiments.translation import SIZES, Transformer, Translation, bleu, greedy, mean_loss, padded


@pytest.fixture
def folder(tmp_path):
    return write_pairs(tmp_path)


def run(folder, **changes):
    values = {
        "method": "sgd",
        "dataset": "help-texts",
        "data_dir": str(folder),
        "model": "transformer-tiny",
        "optimizer": "adam",
        "batch_size": 10,
        "lr": 5e-3,
        "epochs": 1,
    }
    return Run(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "mlp"}, "model must be transformer-tiny or transformer-iwslt for sentence pairs, got 'mlp'"),
        ({"noise": 0.2}, "without noise"),
        ({"train_size": 104}, "train_size must be at most 103, got 104"),
    ],
)
def test_what_sentences_do_not_have_is_refused(folder, changes, message):
    with pytest.raises(InputError, match=message):
        Translation(run(folder, **changes))


def test_sizes_are_those_asked_for(folder):
    data = Translation(run(folder, train_size=50, test_size=5)).data
    assert [len(part) for part in (data.train, data.validation, data.test)] == [50, 5, 5]
    assert [len(text) for text in (data.validation_text, data.test_text)] == [5, 5]


def test_an_epoch_has_every_sentence_once_in_batches_of_like_length(folder):
    task = Translation(run(folder))
    batches = list(task.batches(torch.Generator().manual_seed(1), 0, 1))
    again = list(task.batches(torch.Generator().manual_seed(1), 0, 1))
    assert len(batches) == task.steps == 10
    assert all(
        torch.equal(a, b) for one, two in zip(batches, again, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert {len(source) for source, _ in batches} == {10, 11}
    rows = [rows_of(*batch) for batch in batches]
    assert sorted(row for batch in rows for row in batch) == sorted(
        (s.tolist(), t.tolist()) for s, t in task.data.train
    )
    assert sum(int((target == PAD).sum()) for _, target in batches) < 0.1 * sum(t.numel() for _, t in batches)


def rows_of(source, target):
    sides = ([[unit for unit in row if unit != PAD] for row in side.tolist()] for side in (source, target))
    return list(zip(*sides, strict=True))


def test_the_shares_of_the_processes_are_the_batch(folder):
    task = Translation(run(folder))
    whole, *shares = (
        list(task.batches(torch.Generator().manual_seed(1), *place)) for place in ((0, 1), (0, 2), (1, 2))
    )
    for batch, first, second in zip(whole, *shares, strict=True):
        assert sorted(rows_of(*batch)) == sorted(rows_of(*first) + rows_of(*second))
        assert abs(len(first[0]) - len(second[0])) <= 1


@pytest.mark.parametrize("model", SIZES)
def test_padding_changes_no_loss(folder, model):
    task = Translation(run(folder, model=model, label_smoothing=0.1))
    network = task.network().double().eval()
    pairs = sorted(task.data.train, key=lambda pair: len(pair[1]))
    pairs = [pairs[0], pairs[50], pairs[-1]]
    counts = [len(target) - 1 for _, target in pairs]
    alone = [task.loss(network, padded([pair])).item() for pair in pairs]
    expected = sum(n * loss for n, loss in zip(counts, alone, strict=True)) / sum(counts)
    assert len(set(counts)) == 3
    assert task.loss(network, padded(pairs)).item() == pytest.approx(expected, rel=1e-10)
    # and in training mode, which takes another path through torch's encoder
    network.train()
    assert task.loss(network, padded(pairs)).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_what_follows_in_the_target_changes_nothing_before(folder, training):
    task = Translation(run(folder))
    network = task.network().double().train(training)
    source, target = padded(task.data.train[:8])
    changed = target.clone()
    changed[:, 3:] = 17
    logits, other = network(source, target), network(source, changed)
    torch.testing.assert_close(logits[:, :3], other[:, :3], rtol=0, atol=1e-12)
    assert not torch.allclose(logits[:, 3], other[:, 3])


def test_the_target_depends_on_the_source_and_on_its_order(folder):
    network = Translation(run(folder)).network().double()
    source, target = torch.tensor([[BEGIN, 5, 6, 7, END]]), torch.tensor([[BEGIN, 9]])
    assert not torch.allclose(network(source, target), network(source.flip(1), target))


def test_evaluation_is_without_smoothing_and_dropout_and_leaves_the_mode(folder):
    task = Translation(run(folder, dropout=0.5, label_smoothing=0.1))
    network = task.network()
    first = task.evaluate(network)["validation_loss"]
    assert task.evaluate(network)["validation_loss"] == first
    assert network.training
    network.eval()
    losses = [
        nn.functional.cross_entropy(network(s[None], t[None, :-1])[0], t[1:], reduction="sum")
        for s, t in task.data.validation
    ]
    units = sum(len(target) - 1 for _, target in task.data.validation)
    assert first == pytest.approx(sum(losses).item() / units, rel=1e-5)
    assert first == mean_loss(network, task.data.validation)
    assert not network.training


class Scripted(nn.Module):
    """Says 7 as often as the first unit of the source tells, and ends."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.embedding = lambda hidden: hidden
        self.calls = 0

    def encode(self, source):
        return source, source == PAD

    def decode(self, target, memory, padding):
        self.calls += 1
        following = torch.where(target.shape[1] > memory[:, 0], END, 7)
        return nn.functional.one_hot(following, 10).float()[:, None].expand(-1, target.shape[1], -1)


def test_greedy_decoding_stops_at_the_end_or_at_its_limit():
    network = Scripted()
    assert greedy(network, torch.tensor([[3], [0], [2]])) == [[7, 7, 7], [], [7, 7]]
    assert network.calls == 4
    assert network.training
    assert [len(units) for units in greedy(network, torch.tensor([[1, 8, 8, 8, 8], [99, 8, 8, 8, 8]]))] == [1, 16]


def test_bleu_of_the_references_themselves_is_100_and_of_others_less():
    texts = ["the red dog reads a book", "a green tree", "yes"]
    assert bleu(texts, texts) == pytest.approx(100)
    assert bleu(["the red dog eats a book", *texts[1:]], texts) < 90


def test_pairs_are_learned_by_heart_and_translated_back(folder):
    task_run = run(folder, train_size=8, epochs=120, batch_size=8, warmup=10, weight_decay=0.0)
    training = Training(task_run)
    training.advance()
    task = training.task
    assert isinstance(task, Translation)
    found = task.translations(training.network, task.data.train)
    assert bleu(found, [english for _, english in iwslt(folder).train[:8]]) > 99


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_a_run_ends_in_its_metrics(folder, method):
    outcome, weights = train(run(folder, method=method, rho=0.1, train_size=20, label_smoothing=0.1, dropout=0.1))
    assert {"validation_loss", "validation_bleu", "test_bleu", "curves", "seconds_per_step"} == set(outcome)
    assert "positions" not in weights


def test_one_embedding_serves_source_target_and_output():
    names = [name for name, _ in Transformer(SIZES["transformer-tiny"], 50, 0.0).named_parameters()]
    assert [name for name in names if not name.startswith(("encoder.", "decoder."))] == ["embedding.weight"]
