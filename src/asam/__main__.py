"""The command ``asam``; its libraries come with the ``experiments`` extra."""

import sys
from io import TextIOWrapper


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, TextIOWrapper):  # its encoding may lack the signs of a table
        sys.stdout.reconfigure(errors="replace")
    try:
        from .experiments.cli import run

        code = run()
    except ModuleNotFoundError as error:  # commands import what they need when they run
        if (error.name or "").startswith("asam"):
            raise
        print(f"asam: the command line needs {error.name}: pip install 'asam[experiments]'", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:  # before there was a command to answer it
        print("asam: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
