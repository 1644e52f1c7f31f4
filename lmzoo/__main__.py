"""The `lmzoo` command, also as `python -m lmzoo`."""

from __future__ import annotations

import sys

import tyro


def main() -> None:
    """Runs `lmzoo launch` without TensorFlow, which only its workers need, and the other commands through `cli`."""
    if sys.argv[1:2] != ["launch"]:
        from lmzoo.cli import main as run

        run()
        return
    from lmzoo.engine.launch import launch

    try:
        status = tyro.cli(launch, prog="lmzoo launch", args=sys.argv[2:])
    except ValueError as error:
        print(f"lmzoo: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        print(f"lmzoo: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
