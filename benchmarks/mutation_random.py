"""Mutations drawn over the syntax trees of the library: one small edit at a random place.

Operators, comparisons, constants and conditions are changed, statements deleted, arguments swapped. Error
messages, texts, annotations and decorators are left alone. Such an edit may be equivalent to the original.
"""

from __future__ import annotations

import ast
import difflib
import random
from dataclasses import dataclass
from pathlib import Path

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
TEXTS = ("__repr__", "__str__")


@dataclass(frozen=True)
class Drawn:
    """A random edit: where and what, the new text of the file, and the difference."""

    name: str
    file: str
    text: str
    diff: str


def draw(library: Path, files: list[str], count: int, seed: int) -> list[Drawn]:
    """`count` different edits; every place in the files is equally likely. The same seed, the same edits."""
    sources = {file: (library / file).read_text(encoding="utf-8") for file in files}
    places = [(file, i) for file in files for i in range(_edit(sources[file])[0].places)]
    chosen = random.Random(seed).sample(places, min(count, len(places)))
    return [_drawn(file, sources[file], place) for file, place in chosen]


def _edit(source: str, place: int | None = None) -> tuple[_Edit, str]:
    edit = _Edit(place)
    tree = ast.fix_missing_locations(edit.visit(ast.parse(source)))
    return edit, ast.unparse(tree) + "\n"


def _drawn(file: str, source: str, place: int) -> Drawn:
    _, before = _edit(source)
    edit, after = _edit(source, place)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), file, file, n=1, lineterm="")
    return Drawn(f"{file}:{edit.line} {edit.what}", file, after, "\n".join(lines))


class _Edit(ast.NodeTransformer):
    """Numbers the places that can be edited and edits the one called `place`."""

    def __init__(self, place: int | None):
        self.place, self.places = place, 0
        self.line, self.what = 0, ""

    def here(self, node: ast.AST, what: str) -> bool:
        """Counts a place; whether it is the one to edit."""
        self.places += 1
        if self.places - 1 != self.place:
            return False
        self.line, self.what = node.lineno, what
        return True

    # -- what is left alone ---------------------------------------------------------------------------

    def leave(self, node: ast.AST) -> ast.AST:
        return node

    visit_Raise = visit_JoinedStr = visit_arg = visit_Import = visit_ImportFrom = leave

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node.name not in TEXTS:
            node.args = self.visit(node.args)
            node.body = [self.visit(x) for x in node.body]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = [self.visit(x) for x in node.body]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        return node if node.arg == "strict" else self.generic_visit(node)

    # -- what is edited -------------------------------------------------------------------------------

    def swap(self, node: ast.AST, kind: ast.AST) -> ast.AST:
        """The operator that replaces `kind`, or itself."""
        other = OPERATORS.get(type(kind))
        if other is not None and self.here(node, f"{type(kind).__name__} -> {other.__name__}"):
            return other()
        return kind

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        node.op = self.swap(node, node.op)
        return node

    visit_BoolOp = visit_AugAssign_op = visit_BinOp

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.visit_AugAssign_op(node)
        return ast.copy_location(ast.Pass(), node) if self.here(node, "statement deleted") else node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        node.ops = [self.swap(node, op) for op in node.ops]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            if self.here(node, f"{node.value} -> {not node.value}"):
                node.value = not node.value
        elif isinstance(node.value, int):
            for step in (1, -1):
                if self.here(node, f"{node.value} -> {node.value + step}"):
                    return ast.copy_location(ast.Constant(node.value + step), node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node
        self.generic_visit(node)
        if self.here(node, "condition negated"):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        return node

    visit_IfExp = visit_While = visit_If

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if not isinstance(node.value, ast.Call):
            return self.generic_visit(node)
        self.generic_visit(node)
        return ast.copy_location(ast.Pass(), node) if self.here(node, "call deleted") else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        plain = [x for x in node.args if not isinstance(x, ast.Starred)]
        if len(plain) == len(node.args) >= 2 and self.here(node, "first two arguments swapped"):
            node.args[:2] = node.args[1::-1]
        return node

    def visit_Break(self, node: ast.Break) -> ast.AST:
        return ast.copy_location(ast.Continue(), node) if self.here(node, "break -> continue") else node

    def visit_Continue(self, node: ast.Continue) -> ast.AST:
        return ast.copy_location(ast.Break(), node) if self.here(node, "continue -> break") else node
