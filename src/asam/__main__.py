"""The command ``asam``; its libraries come with the ``experiments`` extra."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from .experiments.cli import run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("asam"):
            raise
        print(f"asam: the command line needs {error.name}: pip install 'asam[experiments]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())


if __name__ == "__main__":
    main()
