"""A mutation: one small, wrong edit of a source file, and the fast tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """name: says what goes wrong. file: such as "cp/loss.py".

    old, new: the text to replace, which must occur exactly once, and its replacement.
    tests: arguments of pytest as in a shell, files relative to tests/. why: the explanation of a survivor.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    why: str = ""

    def apply(self, source: str) -> str:
        """The mutated source. ValueError if the anchor is gone or ambiguous: lists must not rot."""
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"mutation {self.name!r}: its anchor occurs {count} times in {self.file}, not once: "
                f"{self.old!r}"
            )
        return source.replace(self.old, self.new)
