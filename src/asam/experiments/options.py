"""A command's options made of the fields of a run."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Literal

import typer

from .run import Run

LONGEST = 50  # characters of choices that stand in the option's own line


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of a run; it receives the given ones as ``options``."""
    signature = inspect.signature(command)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "options"]
    names = [item.name for item in fields(Run)]

    def wrapper(**arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in names}
        command(**arguments, options={name: value for name, value in options.items() if value is not None})

    added = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(item))
        for item in fields(Run)
    ]
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapper.__signature__ = signature.replace(parameters=[*keyword, *added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in [*keyword, *added]}
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    return wrapper


def _option(item: Any) -> Any:
    choices = item.metadata["choices"]
    kind = Literal[choices] if choices else item.type
    shown, metavar = item.metadata["help"], None
    if len("|".join(choices)) > LONGEST:
        shown, metavar = f"{shown} One of {', '.join(choices)}.", "<name>"
    if item.default:  # 0 is off
        shown += f" (default: {item.default})"
    help_text = typer.Option(help=shown, metavar=metavar, show_default=False)
    return Annotated[kind | None if not choices else kind, help_text]
