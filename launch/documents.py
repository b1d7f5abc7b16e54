"""Where text comes from: text files, JSON lines, Parquet, saved datasets, or the standard library."""

from __future__ import annotations

import importlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

SUPPORTED = "supported are text files, .jsonl, .parquet, .arrow, folders of these, datasets of save_to_disk"
_SKIPPED = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages"}
_AT_ONCE = 64  # records in memory: one may be as long as a book


@dataclass(frozen=True)
class Source:
    """Something that holds documents: a file, or a folder that is read as a whole, and what reads it.

    read(path, field) yields documents as UTF-8; `field` is where records (JSON, tables) have their text.
    """

    path: Path
    read: Callable[[Path, str], Iterator[bytes]]

    def files(self) -> list[Path]:
        """Every file whose change changes the documents."""
        return sorted(p for p in self.path.iterdir() if p.is_file()) if self.path.is_dir() else [self.path]


def find_sources(data: str | None) -> list[Source]:
    """What `--data` holds, in a fixed order; without it, the standard library.

    A folder that holds records anywhere (.jsonl, .parquet, .arrow, a saved dataset) is read for these, and
    other files in it, which describe them, are not; else for its text files. Hidden files and links to
    folders are passed over. ValueError for anything else.
    """
    if data is None:
        return [Source(folder, read_package) for folder in packages()]
    path = Path(data)
    if not path.exists():
        raise ValueError(f"--data {data}: no such file or folder; {SUPPORTED}")
    found = list(_visible(path))
    records = [source for source in found if source.read is not read_text]
    sources = records or [source for source in found if _is_text(source.path)]
    if not sources:
        raise ValueError(f"--data {data}: it holds no text; {SUPPORTED}")
    return sources


def _visible(path: Path) -> Iterator[Source]:
    if not path.is_dir():
        if path.is_file():
            yield Source(path, _READERS.get(path.suffix.lower(), read_text))
        return
    if (path / "dataset_dict.json").exists():
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise ValueError(f"{path} holds the splits {splits} of a dataset; give the folder of one of them")
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        yield Source(path, read_dataset)
        return
    for child in sorted(path.iterdir()):
        if not child.name.startswith(".") and not (child.is_dir() and child.is_symlink()):
            yield from _visible(child)


def _is_text(path: Path) -> bool:
    with open(path, "rb") as file:
        begin = file.read(8192)
    return bool(begin) and b"\0" not in begin


def packages() -> list[Path]:
    """Folders of the running interpreter's standard library that hold modules, sorted; no tests."""
    found = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED)
        if any(name.endswith(".py") for name in names):
            found.append(Path(folder))
    return found


def read_package(folder: Path, field: str) -> Iterator[bytes]:
    """One document: the modules of one folder joined, so that it is long and refers far back."""
    yield b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def read_text(path: Path, field: str) -> Iterator[bytes]:
    """One document: the file."""
    yield path.read_bytes()


def read_json_lines(path: Path, field: str) -> Iterator[bytes]:
    """One document a line: the string `field` of its object. Empty lines are passed over."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: no JSON ({error}); mend or remove the line") from None
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}:{number}: a JSON {type(record).__name__}; each line must be an object"
                )
            _check_field(f"{path}:{number}", field, list(record))
            yield _text(record[field], f"{path}:{number}", field)


def read_parquet(path: Path, field: str) -> Iterator[bytes]:
    """One document a row: the strings of the column `field`."""
    parquet = _library("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no Parquet file ({error}); {SUPPORTED}") from None
    with file:
        _check_field(str(path), field, file.schema_arrow.names)
        batches = file.iter_batches(batch_size=_AT_ONCE, columns=[field])
        yield from _column((batch.column(0).to_pylist() for batch in batches), path, field)


def read_arrow(path: Path, field: str) -> Iterator[bytes]:
    """One document a row of a file that Hugging Face datasets wrote."""
    datasets = _library("datasets", path)
    try:
        dataset = datasets.Dataset.from_file(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no Arrow stream ({error}); {SUPPORTED}") from None
    yield from _rows(dataset, path, field)


def read_dataset(path: Path, field: str) -> Iterator[bytes]:
    """One document a row of a dataset that `save_to_disk` wrote, in its order."""
    yield from _rows(_library("datasets", path).load_from_disk(str(path)), path, field)


def _rows(dataset: Any, path: Path, field: str) -> Iterator[bytes]:
    _check_field(str(path), field, dataset.column_names)
    plain = dataset.with_format(None).select_columns([field])
    yield from _column((batch[field] for batch in plain.iter(_AT_ONCE)), path, field)


def _column(batches: Iterator[list[Any]], path: Path, field: str) -> Iterator[bytes]:
    values = (value for batch in batches for value in batch)
    for number, value in enumerate(values, 1):
        yield _text(value, f"{path}: row {number}", field)


def _check_field(where: str, field: str, names: list[str]) -> None:
    if field not in names:
        raise ValueError(f"{where}: no field {field!r} among {names}; name the text with --text-field")


def _text(value: Any, where: str, field: str) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} is of {type(value).__name__}; it must be a string")
    try:
        return value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise ValueError(f"{where}: {field!r} is no Unicode text ({error}); mend or remove it") from None


def _library(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(f"{path} needs the package {package}; pip install 'sparring[data]'") from error


_READERS = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
