"""Tiny networks in float64, data and trainers, and Trainer's loop written by hand."""

import torch
from slow_reference import weights
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

from asam.integrations.transformers import SharpnessAwareTrainer


def network(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(
        vocab_size=30, num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **sizes
    )
    return BertForSequenceClassification(config).to(dtype)


def sentences(count=24):
    generator = torch.Generator().manual_seed(2)
    ids, labels = torch.randint(30, (count, 5), generator=generator), torch.randint(3, (count,), generator=generator)
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels.tolist(), strict=True)]


def batches(rows, size=4):
    return [
        {"input_ids": torch.stack([r["input_ids"] for r in part]), "labels": torch.tensor([r["labels"] for r in part])}
        for part in (rows[i : i + size] for i in range(0, len(rows), size))
    ]


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch["input_ids"]).logits, batch["labels"])


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


class Aware(SharpnessAwareTrainer, InOrder):
    pass


def trainer(folder, model, rows=None, kind=Aware, more=None, make=TrainingArguments, **options):
    """A trainer in order, with AdamW at a constant rate; ``more`` goes to the trainer, ``options`` to its arguments."""
    arguments = {
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = make(str(folder), **(arguments | options))
    result = kind(model, arguments, train_dataset=sentences() if rows is None else rows, **(more or {}))
    result.remove_callback(PrinterCallback)
    return result


def by_hand(model, asam, groups, loss=cross_entropy, max_norm=None):
    """One step for each group of micro-batches, with the loss of each divided by their number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    for group in groups:
        share = 1 / len(group)
        for batch in group:
            asam.backward(lambda batch=batch, share=share: share * loss(model, batch))
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model


class Watching(Aware):
    """Notes the weights that each pass sees, and its loss."""

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        if model.training:
            self.__dict__.setdefault("seen", []).append((weights(model), loss.item()))
        return loss
