"""The command ``asam``; its libraries come with the ``experiments`` extra."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from .experiments.cli import run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("asam"):
            raise
        sys.exit(_missing(str(error.name)))
    sys.exit(run())


def _missing(name: str) -> int:
    print(f"asam: the command line needs {name}: pip install 'asam[experiments]'", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
