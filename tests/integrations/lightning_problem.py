"""A module, data and trainers, and Lightning's loop written by hand."""

from contextlib import nullcontext

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from asam import ASAM


class Module(LightningModule):
    """Batch norm and dropout: buffers move, and random numbers are drawn."""

    def __init__(self, optimizer="sgd"):
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
        ).double()
        self.optimizer, self.passes = optimizer, 0

    def loss(self, batch):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def training_step(self, batch):
        self.passes += 1
        return self.loss(batch)

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def batches(count=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 4, dtype=dtype, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def loader(data=None):
    return DataLoader(batches() if data is None else data, batch_size=None, generator=torch.Generator())


def trainer(*callbacks, epochs=2, logger=False, **options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": epochs, "log_every_n_steps": 1, **quiet, **options}
    return Trainer(callbacks=list(callbacks), logger=logger, **options)


def fit(module, *callbacks, data=None, **options):
    torch.manual_seed(2)
    trainer(*callbacks, **options).fit(module, loader(data))
    return module.state_dict()


def by_hand(
    module, *, rho=0.5, data=None, epochs=2, accumulate=1, clip=None, autocast=nullcontext, scaler=None, **more
):
    asam = ASAM(module, rho=rho, **more)
    (optimizer,), (scheduler,) = module.configure_optimizers()
    torch.manual_seed(2)
    data = batches() if data is None else data

    def loss(batch):
        with autocast():
            value = module.loss(batch)
        value = value / accumulate
        return value if scaler is None else scaler.scale(value)

    for _ in range(epochs):
        for i, batch in enumerate(data, start=1):
            asam.backward(lambda batch=batch: loss(batch))
            if i % accumulate and i < len(data):
                continue
            if scaler is not None:
                scaler.unscale_(optimizer)
            if clip is not None:
                clip(module.parameters())
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        scheduler.step()
    return module.state_dict()


def amp():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=1)
    return scaler, {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
