"""A plan as a person reads it: tables on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from .doctor_finding import size_text

Table = tuple[str, list[tuple[str, ...]]]  # title, and rows whose first column is text


def show(found: dict[str, Any]) -> None:
    """What `predict_training` found, the verdict last."""
    tables, verdict = [memory_table(found), time_table(found), option_table(found)], verdict_of(found)
    if sys.stdout.isatty() and find_spec("rich"):
        _print_tables(tables, verdict)
    else:
        _print_lines(tables, verdict)


def memory_table(found: dict[str, Any]) -> Table:
    """Items from the largest to the smallest, and their sum."""
    items = sorted(found["memory"].items(), key=lambda item: -item[1])
    items += [("beside tensors (assumed)", found["overhead"]), ("sum", found["needed"])]
    items += [("of each GPU", found["available"])]
    if found["host_memory"]:
        items += [("of the CPU, pinned", found["host_memory"])]
    title = (
        f"memory of a rank: {found['tokens_per_rank']:,} of {found['seq_len']:,} tokens, "
        f"{found['trained']:,} of {found['parameters']:,} weights trained; most at: {found['moment']}"
    )
    return title, [(name, size_text(size)) for name, size in items]


def time_table(found: dict[str, Any]) -> Table:
    """Seconds of a step by what takes them."""
    rows = [(name, f"{seconds:.3f}") for name, seconds in found["seconds"].items()]
    title = f"seconds of a step on {found['gpus']} GPUs, cp_size {found['cp_size']}, {found['exchange']}"
    return title, [*rows, ("sum", f"{found['step_seconds']:.3f}")]


def option_table(found: dict[str, Any]) -> Table:
    """Every set of switches."""
    rows = [
        (each["switches"], size_text(each["bytes"]), "fits" if each["fits"] else "-", f"{each['longest']:,}")
        for each in found["options"]
    ]
    return "switches, what they need, and the longest sequence that fits", rows


def verdict_of(found: dict[str, Any]) -> str:
    """One line for the settings given, one for what to do, and what was assumed."""
    needed, available = size_text(found["needed"]), size_text(found["available"])
    lines = [f"{'fits' if found['fits'] else 'does not fit'}: {needed} of {available}"]
    if found["chosen"]:
        lines.append(f"cheapest switches that fit: {found['chosen']}")
    else:
        least = size_text(min(each["bytes"] for each in found["options"]))
        lines.append(
            f"no switches fit: {least} at least, {available} there; use more GPUs, a shorter --seq-len, or "
            f"--lora-rank"
        )
    return "\n".join([*lines, "assumed: " + "; ".join(found["assumed"])])


def _print_lines(tables: list[Table], verdict: str) -> None:
    for title, rows in tables:
        width = max(len(row[0]) for row in rows)
        print(title)
        for name, *values in rows:
            print(f"  {name:<{width}}" + "".join(f"{value:>14}" for value in values))
    print(verdict)


def _print_tables(tables: list[Table], verdict: str) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    for title, rows in tables:
        table = RichTable(title=title, title_justify="left", show_header=False)
        for index in range(len(rows[0])):
            table.add_column(justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    console.print(Text(verdict))
