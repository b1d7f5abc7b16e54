"""Findings as a person reads them: tables on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from .doctor_finding import STATUSES, Finding, Rate, size_text, worst

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def show(findings: list[Finding], rates: list[Rate]) -> None:
    """All findings, the rates, and the verdict last."""
    rows = [(rate.what, size_text(rate.bytes), f"{rate.gigabytes_per_second:.3f}") for rate in rates]
    counts = [f"{sum(each.status == status for each in findings)} {status}" for status in STATUSES]
    verdict = f"{worst(findings)}: {', '.join(counts)}"
    if sys.stdout.isatty() and find_spec("rich"):
        _print_tables(findings, rows, verdict)
    else:
        _print_lines(findings, rows, verdict)


def _print_lines(findings: list[Finding], rows: list[tuple[str, ...]], verdict: str) -> None:
    width = max(len(finding.name) for finding in findings)
    for each in findings:
        print(f"{each.status:<4}  {each.name:<{width}}  {each.detail}")
        if each.remedy:
            print(f"{'':<{6 + width}}  -> {each.remedy}")
    for what, size, rate in rows:
        print(f"{what:<12}{size:>10}{rate:>10} GB/s")
    print(verdict)


def _print_tables(findings: list[Finding], rows: list[tuple[str, ...]], verdict: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(highlight=False), Table(title="sparring doctor", title_justify="left")
    for heading in ("", "check", "found"):
        table.add_column(heading, overflow="fold")
    for each in findings:
        found = Text(each.detail)
        if each.remedy:
            found.append(f"\n-> {each.remedy}", style="bold")
        table.add_row(Text(each.status, style=COLOURS[each.status]), Text(each.name), found)
    console.print(table)
    if rows:
        table = Table(title="bandwidth, each way", title_justify="left")
        for heading in ("", "message", "GB/s"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(Text(verdict, style=COLOURS[worst(findings)]))
