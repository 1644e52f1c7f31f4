"""Writing files so that a reader sees the old one or the new one, and never a part."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name, waits until it is on the disk, and moves it into place.

    Args:
        file: what to write or to replace.
        content: text goes as UTF-8.

    Raises:
        OSError: it could not be written; an older file of that name is as it was.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def point(link: Path, target: Path) -> None:
    """Makes `link` a symbolic link to `target`, in one step, whether it is there already or not."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    temporary.replace(link)
