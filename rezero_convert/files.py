"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import ConversionError


def replace(path: Path, data: bytes, mode_of: Path | None = None) -> None:
    """Write a file whole or not at all; links are followed, the mode is kept.

    Raises:
        ConversionError: it cannot be written.
    """
    shown, path = path, path.resolve()
    mode = next((one.stat().st_mode & 0o7777 for one in (path, mode_of) if one is not None and one.exists()), 0o644)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConversionError(f"{shown}: cannot be written: {error.strerror}") from error
