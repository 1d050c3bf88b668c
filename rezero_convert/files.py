"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import ConversionError


def replace(path: Path, data: bytes, mode_of: Path | None = None) -> None:
    """Write a file whole or not at all, also when interrupted; symbolic links are followed, mode and owner are kept.

    Other hard links keep the old content: they are names that nobody gave.

    Raises:
        ConversionError: it cannot be written, or is write-protected.
    """
    shown, path = path, path.resolve()
    mode = next((one.stat().st_mode & 0o7777 for one in (path, mode_of) if one is not None and one.exists()), 0o644)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if path.exists() and not (mode & 0o222 and os.access(path, os.W_OK)):  # root may write all the same
            raise PermissionError(0, "it is write-protected")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            _keep_owner(path, temporary)
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)  # an interrupt may come when it has its new name already
            raise
    except OSError as error:
        raise ConversionError(f"{shown}: cannot be written: {error.strerror}") from error


def _keep_owner(path: Path, temporary: str) -> None:
    """Give a new file the owner and the group of the one that it replaces."""
    if path.exists():
        old, new = path.stat(), os.stat(temporary)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.chown(temporary, old.st_uid, old.st_gid)
