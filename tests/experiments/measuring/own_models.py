"""Functions as users name them for `asam measure` and `asam landscape`, good and bad ones."""

import torch
from torch import nn


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs = torch.randn(40, 3)
    data = [(part, (part[:, 0] > 0).long()) for part in inputs.split(16)]
    return model, loss_fn, data


def with_held_out():
    return *make(), make()[2]


def loss_fn(model, batch):
    logits = model(batch[0])
    return nn.functional.cross_entropy(logits, batch[1]), {"error": (logits.argmax(1) != batch[1]).double().mean()}


def of_tokens():
    def of_all(model, batch):
        loss, means = loss_fn(model, batch)
        return loss, {"error": means["error"] / 3}

    return make()[0], of_all, make()[2], make()[2]


def steep():
    model, loss_fn, data = make()
    with torch.no_grad():
        model[0].weight.mul_(1e24), model[2].weight.div_(1e24), model[0].bias.mul_(1e24)
    return model, loss_fn, data


def dropout():
    return nn.Linear(3, 2), lambda model, batch: nn.functional.dropout(model(batch[0])).mean(), make()[2]


def shuffled():
    model, loss_fn, _ = make()
    torch.seed()
    inputs = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    dataset = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    return model, loss_fn, torch.utils.data.DataLoader(dataset, 50, shuffle=True)


def talkative():
    print("hello")
    return make()[0], lambda model, batch: (print("again"), loss_fn(model, batch))[1], make()[2]


def exits():
    raise SystemExit(3)


def faulty():
    def loss_fn(model, batch):
        return {}["labels"]

    return make()[0], loss_fn, make()[2]


def percent():
    def loss_fn(model, batch):
        return model(batch[0]).square().mean(), {"error": 17.5}

    return make()[0], loss_fn, make()[2]


def tensor_held_out():
    return *make(), torch.ones(3, 3)


def nan():
    return make()[0], lambda model, batch: model(batch[0]).mean() * float("nan"), make()[2]


def tanh():
    model, loss_fn, data = make()
    model[1] = nn.Tanh()
    return model, loss_fn, data


def ok():
    def loss_fn(model, batch):
        loss = model(batch[0]).square().mean()
        return loss, {"top[error]": 0.25, "a[/b]": 0.5, ":train:": 0.75}

    return make()[0], loss_fn, make()[2]


def bags():
    model = nn.Sequential(nn.EmbeddingBag(9, 3), nn.Linear(3, 2))

    def loss_fn(model, batch):
        logits = model(batch)
        return logits.square().mean(), {"error": (logits[:, 0] > 0).double().mean()}

    return model, loss_fn, [torch.arange(8).view(4, 2)]


def reentrant():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))

    def loss_fn(model, batch):
        return model[1](torch.utils.checkpoint.checkpoint(torch.tanh, model[0](batch[0]), use_reentrant=True)).mean()

    return model, loss_fn, make()[2]


def positions():
    return make()[0], lambda model, batch: (model(batch[0]).square().mean(), {"positions": 0.25}), make()[2]


def frozen():
    model, loss_fn, data = make()
    model[0].requires_grad_(False)
    return model, loss_fn, data


def uncopied():
    model, loss_fn, data = make()
    torch.nn.utils.weight_norm(model[0])
    return model, loss_fn, data


def failing():
    def fail(grad):
        raise RuntimeError("of the user's own making")

    def loss_fn(model, batch):
        loss = model(batch[0]).square().mean()
        if loss.requires_grad:
            loss.register_hook(fail)
        return loss

    return make()[0], loss_fn, make()[2]


def negative():
    return make()[0], lambda model, batch: model(batch[0]).square().mean() - 9, make()[2]


def wrong():
    return 1, 2, 3


def broken():
    raise OSError("no such data")
