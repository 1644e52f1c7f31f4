"""`python -m lmzoo` is the `lmzoo` command."""

from lmzoo.cli import main

main()
