"""The `lmzoo` command, also as `python -m lmzoo`."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import tyro

# Commands that need no model, and `launch` no TensorFlow either: where each is, and its exit status for a ValueError.
_LIGHT = {
    "launch": ("lmzoo.engine.launch", 2),
    "serve": ("lmzoo.serving", 1),
    "demo": ("lmzoo.serving", 1),
}
_SERVERS = ("serve", "demo")


def main() -> None:
    """Runs a command that needs no model without loading what models need, and the other commands through `cli`."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in _LIGHT:
        from lmzoo.cli import main as run

        run()
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if name in _SERVERS:
        # oneDNN keeps what it compiles for each new shape, 1,024 of them for each kind of operation and thread.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    module, usage_status = _LIGHT[name]
    config = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)
    try:
        function = getattr(import_module(module), name)
        status = tyro.cli(function, prog=f"lmzoo {name}", args=sys.argv[2:], config=config)
    except ValueError as error:
        print(f"lmzoo: {error}", file=sys.stderr)
        status = usage_status
    except OSError as error:
        print(f"lmzoo: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
