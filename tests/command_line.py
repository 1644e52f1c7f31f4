"""The `lmzoo` command in the process of the test, which starts faster than one of its own."""

import pytest

from lmzoo.cli import main


def run_here(*arguments: object) -> None:
    """Runs a command that ends well."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert not ended.value.code
