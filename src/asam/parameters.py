"""Which parameters are perturbed: all of a model's, those the user names, or a usual choice.

The choice matters: perturbing the normalization layers only (SAM-ON, arXiv:2306.04226) does as well at CIFAR scale as
perturbing everything, and with label noise leaving biases and normalization alone can be better still.
"""

import re
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# LayerNorm, BatchNorm2d, GroupNorm, LayerNorm2d, T5LayerNorm, LlamaRMSNorm, ...
_NORM_CLASS = re.compile(r"Norm(\dd)?$")


def check_model(model: object) -> None:
    """Raise if it is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of normalization layers: of modules whose class name ends in ``Norm``, ``Norm1d``, ``Norm2d``, ...

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> [tuple(p.shape) for p in norm_parameters(model)]
        [(3,), (3,)]
    """
    check_model(model)
    layers = (module for module in model.modules() if _NORM_CLASS.search(type(module).__name__))
    return list({id(p): p for layer in layers for p in layer.parameters(recurse=False)}.values())


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of two dimensions or more: weights of linear and convolutional layers, embeddings.

    Raises:
        ValueError: a lazy layer has not seen a batch yet, so that its weight has no shape.

    Example:
        >>> [tuple(p.shape) for p in weight_parameters(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))]
        [(3, 2)]
    """
    check_model(model)
    for name, param in model.named_parameters():
        if is_lazy(param):
            raise ValueError(f"{name!r} has no shape yet: run a batch through the model first")
    return [param for param in model.parameters() if param.ndim >= 2]


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers put into them (of torch.compile, checkpoints, replicas), as long as they differ."""
    names = list(names)
    bare = {name: name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "") for name in names}
    while names and all(name.startswith("module.") for name in bare.values()):
        bare = {name: short.removeprefix("module.") for name, short in bare.items()}
    return bare if len(set(bare.values())) == len(names) else {name: name for name in names}


def selected_parameters(model: nn.Module, params: Iterable[str | Tensor] | None) -> dict[str, nn.Parameter]:
    """The model's parameters by name, each once, those given by name or as tensors if ``params`` is not None."""
    named = dict(model.named_parameters())
    if params is None:
        return named
    if isinstance(params, str | Tensor):
        raise TypeError(f"params must be an iterable of names or parameters, got a single {type(params).__name__}")
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be an iterable of names or parameters, got {type(params).__name__}")
    names = {id(param): name for name, param in named.items()}
    everything = dict(model.named_parameters(remove_duplicate=False))
    bare = bare_names(everything)
    aliases = {alias: names[id(param)] for name, param in everything.items() for alias in (name, bare[name])}
    chosen = set()
    for item in params:
        if isinstance(item, str):
            if item not in aliases:
                raise ValueError(f"params names {item!r}, which is not a parameter of the model")
            chosen.add(aliases[item])
        elif isinstance(item, Tensor):
            if id(item) not in names:
                raise ValueError(
                    f"params holds a tensor of shape {tuple(item.shape)} that is not the model's parameter"
                )
            chosen.add(names[id(item)])
        else:
            raise TypeError(f"params must hold names or parameters, got {type(item).__name__}")
    return {name: param for name, param in named.items() if name in chosen}
