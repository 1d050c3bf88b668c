"""What a project says once for all runs: `[tool.rezero-convert]` in its pyproject.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .options import unknown

_SECTION = "tool.rezero-convert"


def project_settings(start: Path, names: Sequence[str]) -> dict[str, Any]:
    """The section of the nearest pyproject.toml at or above `start`, dashes in its keys made underscores.

    Args:
        start: a folder.
        names: the valid keys, with underscores.

    Raises:
        ConversionError: that file cannot be read or parsed, or has an unknown key.
    """
    for folder in (start, *start.parents):
        file = folder / "pyproject.toml"
        if not file.is_file():
            continue
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
            raise ConversionError(f"{file}: cannot be read: {error}") from error
        section = content.get("tool", {}).get("rezero-convert", {})
        if not isinstance(section, dict):
            raise ConversionError(f"{file}: [{_SECTION}] must be a table")
        settings = {key.replace("-", "_"): value for key, value in section.items()}
        for key in settings:
            if key not in names:
                raise ConversionError(f"{file}: [{_SECTION}]: {unknown('option', key, names)}")
        return settings
    return {}
