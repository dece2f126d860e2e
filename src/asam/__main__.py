"""The command ``asam``; its libraries come with the ``experiments`` extra."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from .experiments.cli import run

        code = run()
    except ModuleNotFoundError as error:  # commands import what they need when they run
        if (error.name or "").startswith("asam"):
            raise
        print(f"asam: the command line needs {error.name}: pip install 'asam[experiments]'", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
