"""Where the checkpoint is: in the directory that was named, or in the one that a training run points to."""

from __future__ import annotations

import os
from pathlib import Path

from lmzoo.checkpoints.files import CONFIG


def checkpoint_of(directory: str | os.PathLike[str]) -> Path:
    """The checkpoint itself, or the best one (else the last one) of a run.

    Raises:
        FileNotFoundError: it is neither.
    """
    directory = Path(directory)
    for candidate in (directory, directory / "best", directory / "last"):
        if (candidate / CONFIG).is_file():
            return candidate.resolve()
    raise FileNotFoundError(
        f"{directory} is neither a checkpoint (it has no {CONFIG}) nor a run with a checkpoint (best/ or last/)."
    )
