"""Settings in files: TOML or JSON in, JSON out."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")  # a dataclass of plain values


def read_settings(path: Path, default: T) -> T:
    """`default` with the settings of a file: TOML where its name ends in .toml, else JSON.

    Raises ValueError, naming the file, for a file that is neither, an unknown setting (and the nearest known
    one), a value of another type, and settings that contradict each other or the defaults.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}, not a table of settings")
        kinds = get_type_hints(type(default))
        return replace(default, **{name: _checked(name, value, kinds) for name, value in found.items()})
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; give a TOML or JSON file") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_settings(path: Path, settings: Any) -> None:
    """All settings, as JSON that `read_settings` takes."""
    path.write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")


def _checked(name: str, value: Any, kinds: dict[str, Any]) -> Any:
    """The value of the setting `name`; whole numbers stand for floats too."""
    if name not in kinds:
        near = get_close_matches(name, kinds, 1, 0.0)[0]
        raise ValueError(f"unknown setting {name!r}; did you mean {near!r}?")
    allowed = get_args(kinds[name]) or (kinds[name],)
    if type(value) is int and int not in allowed and float in allowed:
        return float(value)
    if type(value) not in allowed:
        wanted = " or ".join(kind.__name__ for kind in allowed)
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; it must be {wanted}")
    return value
