"""Translation from German into English: sub-word units of both languages, a Transformer, and BLEU."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from . import InputError
from .parallel_text import BEGIN, END, MOST_UNITS, PAD, Units, encoded, learned_tokenizer, load
from .run import Run

BUCKET = 100  # batches among which sentences are sorted by length
EVALUATION_BATCH = 200


@dataclass(frozen=True)
class Size:
    """The size of a network, where it normalizes, and the vocabulary that goes with it."""

    width: int
    feedforward: int
    layers: int
    heads: int
    vocabulary: int
    norm_first: bool


SIZES = {
    "transformer-tiny": Size(96, 192, 1, 4, 2000, norm_first=True),
    "transformer-iwslt": Size(512, 1024, 6, 4, 10000, norm_first=False),
}


class Translation:
    """A Transformer on sentence pairs. Losses are per unit of the target; BLEU is sacrebleu's, decoding greedy.

    Pairs and parts are the same for every seed.

    Raises:
        InputError: the texts are not there, or the run asks for what sentences do not have.
    """

    def __init__(self, run: Run) -> None:
        if run.model not in SIZES:
            raise InputError(f"model must be {' or '.join(SIZES)} for sentence pairs, got {run.model!r}")
        if run.noise or run.augment or run.scale != 1:
            raise InputError("sentence pairs go without noise, augment and scale")
        self._run = run
        self._size = SIZES[run.model]
        self.data = prepared(run.data_dir, run.train_size, run.test_size, self._size.vocabulary)
        self.steps = max(1, len(self.data.train) // run.batch_size)

    def network(self) -> "Transformer":
        """The network before training."""
        return Transformer(self._size, self.data.tokenizer.get_vocab_size(), self._run.dropout)

    def batches(self, generator: torch.Generator, rank: int, world: int) -> Iterator[Units]:
        """Sources and targets, each (sentences, units), of like length. No batch has fewer sentences than asked for."""
        # the target's length, and among equal ones the source's
        lengths = torch.tensor([(MOST_UNITS + 1) * len(target) + len(source) for source, target in self.data.train])
        order = torch.randperm(len(lengths), generator=generator)
        buckets = torch.split(order, BUCKET * self._run.batch_size)
        by_length = torch.cat([bucket[lengths[bucket].argsort(stable=True)] for bucket in buckets])
        batches = torch.tensor_split(by_length, self.steps)
        for i in torch.randperm(self.steps, generator=generator).tolist():
            yield padded([self.data.train[j] for j in batches[i][rank::world].tolist()])

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy of the target's units, each predicted from the source and those before it."""
        source, target = batch
        return cross_entropy(network(source, target[:, :-1]), target, label_smoothing=self._run.label_smoothing)

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """The validation loss, without label smoothing."""
        return {"validation_loss": mean_loss(network, self.data.validation)}

    def final(self, network: nn.Module) -> dict[str, float]:
        """BLEU on validation and test data."""
        data = self.data
        return {
            "validation_bleu": bleu(self.translations(network, data.validation), data.validation_text),
            "test_bleu": bleu(self.translations(network, data.test), data.test_text),
        }

    def translations(self, network: nn.Module, sentences: Sequence[Units]) -> list[str]:
        """The greedy translation of every source."""
        found = [""] * len(sentences)
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i][0]))
        for first in range(0, len(order), EVALUATION_BATCH):
            chosen = order[first : first + EVALUATION_BATCH]
            source, _ = padded([sentences[i] for i in chosen])
            for i, units in zip(chosen, greedy(network, source), strict=True):
                found[i] = self.data.tokenizer.decode(units).strip()
        return found


@dataclass(frozen=True)
class Prepared:
    """Sentence pairs as units, and the English of those to be translated."""

    tokenizer: Tokenizer
    train: Sequence[Units]
    validation: Sequence[Units]
    test: Sequence[Units]
    validation_text: Sequence[str]
    test_text: Sequence[str]


@cache
def prepared(folder: str | None, train_size: int | None, test_size: int | None, vocabulary: int) -> Prepared:
    """The pairs of a folder, or the help texts, in units learned from the training part."""
    text = load(folder)
    if train_size is not None and train_size > len(text.train):
        raise InputError(f"train_size must be at most {len(text.train)}, got {train_size}")
    if test_size is not None and test_size > len(text.test):
        raise InputError(f"test_size must be at most {len(text.test)}, got {test_size}")
    train, validation, test = text.train[:train_size], text.validation[:test_size], text.test[:test_size]
    tokenizer = learned_tokenizer(train, vocabulary)
    return Prepared(
        tokenizer,
        encoded(tokenizer, train),
        encoded(tokenizer, validation),
        encoded(tokenizer, test),
        [english for _, english in validation],
        [english for _, english in test],
    )


def padded(pairs: Sequence[Units]) -> Units:
    """Sources and targets, each (sentences, units of the longest)."""
    source, target = ([pair[side] for pair in pairs] for side in (0, 1))
    return pad_sequence(source, True, PAD), pad_sequence(target, True, PAD)


class Embedding(nn.Embedding):
    """Units as vectors and, with the same weights, vectors (..., width) as the logits of units."""

    def forward(self, x: Tensor) -> Tensor:
        """Of integers the vectors, of vectors the logits."""
        return functional.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class Transformer(nn.Module):
    """Encoder and decoder (arXiv:1706.03762) with one embedding for source, target and output."""

    def __init__(self, size: Size, vocabulary: int, dropout: float) -> None:
        super().__init__()
        self.scale = math.sqrt(size.width)
        self.embedding = Embedding(vocabulary, size.width)
        nn.init.normal_(self.embedding.weight, std=1 / self.scale)
        self.dropout = nn.Dropout(dropout)
        shape = (size.width, size.heads, size.feedforward, dropout)
        options: dict[str, Any] = {"batch_first": True, "norm_first": size.norm_first}
        norms = [nn.LayerNorm(size.width) if size.norm_first else None for _ in range(2)]
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*shape, **options), size.layers, norms[0], enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*shape, **options), size.layers, norms[1])
        for param in (*self.encoder.parameters(), *self.decoder.parameters()):
            if param.ndim > 1:
                nn.init.xavier_uniform_(param)
        self.positions: Tensor
        self.register_buffer("positions", positions(MOST_UNITS, size.width), persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (sentences, units, vocabulary) of what follows each unit of the target."""
        logits: Tensor = self.embedding(self.decode(target, *self.encode(source)))
        return logits

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output, and where the source is padding."""
        padding = source == PAD
        return self.encoder(self._embedded(source), src_key_padding_mask=padding), padding

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """The decoder's output. The target's padding comes last, where no unit before it looks."""
        n = target.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=target.device).triu(1)
        embedded = self._embedded(target)
        hidden: Tensor = self.decoder(embedded, memory, mask, memory_key_padding_mask=padding, tgt_is_causal=True)
        return hidden

    def _embedded(self, units: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(self.scale * self.embedding(units) + self.positions[: units.shape[1]])
        return embedded


def positions(n: int, width: int) -> Tensor:
    """Sines and cosines of the positions, (n, width)."""
    angles = torch.arange(n)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """That of a target's units after the first; padding does not count."""
    return functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, **options)


def mean_loss(network: nn.Module, sentences: Sequence[Units]) -> float:
    """Mean cross-entropy of a unit, in eval mode."""
    device, mode = next(network.parameters()).device, network.training
    total, count = 0.0, 0
    network.eval()
    with torch.no_grad():
        for first in range(0, len(sentences), EVALUATION_BATCH):
            source, target = (part.to(device) for part in padded(sentences[first : first + EVALUATION_BATCH]))
            total += float(cross_entropy(network(source, target[:, :-1]), target, reduction="sum"))
            count += int((target[:, 1:] != PAD).sum())
    network.train(mode)
    return total / count


def greedy(network: Any, source: Tensor) -> list[list[int]]:
    """The most probable next unit, again and again until the end, in eval mode.

    A translation has at most 1.2 times as many units as the longest source, and 10 more.
    """
    device, mode = next(network.parameters()).device, network.training
    limit = min(source.shape[1] * 6 // 5 + 10, MOST_UNITS - 1)
    network.eval()
    with torch.no_grad():
        memory, padding = network.encode(source.to(device))
        target = torch.full((len(source), 1), BEGIN, device=device)
        going = torch.arange(len(source), device=device)
        found = torch.full((len(source), limit), END, device=device)
        for n in range(limit):
            following = network.embedding(network.decode(target, memory, padding)[:, -1]).argmax(1)
            found[going, n] = following
            on = following != END
            target = torch.cat([target, following[:, None]], 1)[on]
            going, memory, padding = going[on], memory[on], padding[on]
            if not len(going):
                break
    network.train(mode)
    return [row[: row.index(END)] if END in row else row for row in found.tolist()]


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of sacrebleu, from 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU

    return float(BLEU().corpus_score(list(translations), [list(references)]).score)
