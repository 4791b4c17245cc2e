"""Finds the uses of TensorRT attributes in a source file, and the guards around them.

TensorRT's objects are recognized by variable name: `trt` is the module, `trtp` its submodule `plugin`, which not every
release has, and `ROOTS` gives the classes of the other variables, also as attributes of self (`self._engine`). A use is
a path from one of them: `config.get_timing_cache().serialize()`.

A guard is `hasattr(OBJECT, "name")`, or a comparison with a member of `Flavour`, in an `if`, a conditional expression,
an `and` or an `or`; after an `if` whose body leaves the block, the rest of the block has the opposite guard.
"""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

ROOTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "runtime_config": "IRuntimeConfig",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "timing_cache": "ITimingCache",
    "engine": "ICudaEngine",
    "runtime": "Runtime",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "refitter": "Refitter",
    "parser_refitter": "OnnxParserRefitter",
    "logger": "ILogger",
    "serialized": "IHostMemory",
    "registry": "IPluginRegistry",
}
MODULES = ("trt", "trtp")


@dataclass(frozen=True)
class Guard:
    """The condition that `path` exists, or that the flavour's name is `path`; negated if `holds` is false."""

    path: str
    holds: bool
    is_flavour: bool = False


@dataclass(frozen=True)
class Use:
    """A path, the keywords of the call that it ends in, and the guards around it."""

    path: str
    line: int
    keywords: tuple[str, ...] = ()
    guards: tuple[Guard, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """A variable to which the value of a path is assigned."""

    variable: str
    line: int
    path: str


class Scan(ast.NodeVisitor):
    """The uses and assignments in `source`; none if it has neither `trt` nor `trtp`.

    A method that a subclass of a TensorRT class adds, and that the source itself calls, is no use of TensorRT.
    """

    def __init__(self, source: str) -> None:
        self.uses: list[Use] = []
        self.assignments: list[Assignment] = []
        self._guards: tuple[Guard, ...] = ()
        nodes = list(ast.walk(tree := ast.parse(source)))
        called = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        self._own = {path for node in classes for path, method in _methods(node) if method.name in called}
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        if not (names | {node.arg for node in nodes if isinstance(node, ast.arg)}).isdisjoint(MODULES):
            self.visit(tree)

    def generic_visit(self, node: ast.AST) -> None:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self._visit_block(value)
            else:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child)

    def visit_If(self, node: ast.If) -> None:
        holds, fails = _guards(node.test)
        self.visit(node.test)
        self._visit_behind(holds, node.body)
        self._visit_behind(fails, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        holds, fails = _guards(node.test)
        self.visit(node.test)
        self._visit_behind(holds, [node.body])
        self._visit_behind(fails, [node.orelse])

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        outer = self._guards
        for operand in node.values:
            self.visit(operand)
            holds, fails = _guards(operand)
            self._guards += tuple(holds if isinstance(node.op, ast.And) else fails)
        self._guards = outer

    def visit_Call(self, node: ast.Call) -> None:
        asked = _asked(node)
        if asked is None:
            self._visit_path(node)
            return
        # The name that a `hasattr` asks for is guarded by itself: some release must have it, but not every one.
        is_plain = isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 2
        guards = self._guards if is_plain else (*self._guards, Guard(asked, True))
        self.uses.append(Use(asked, node.lineno, (), guards))
        for argument in (node.args[0], *node.args[2:]):
            self.visit(argument)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._visit_path(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        # A misspelt override would never be called, and nobody would notice.
        overrides = [(path, method) for path, method in _methods(node) if path not in self._own]
        self.uses += [Use(path, method.lineno, (), self._guards) for path, method in overrides]
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assign(target, node.value)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._assign(node.target, node.value)
        self.generic_visit(node)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        path = _path(value)
        if path is not None and isinstance(target, ast.Name | ast.Attribute):
            variable = target.id if isinstance(target, ast.Name) else target.attr.removeprefix("_")
            self.assignments.append(Assignment(variable, target.lineno, path))

    def _visit_path(self, node: ast.Attribute | ast.Call) -> None:
        path = _path(node)
        if path is None:
            self.generic_visit(node)
            return
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute | ast.Call):
            if isinstance(inner, ast.Call) or inner is node:
                self._use(inner)
            if isinstance(inner, ast.Call):
                for argument in (*inner.args, *(word.value for word in inner.keywords)):
                    self.visit(argument)
            inner = inner.func if isinstance(inner, ast.Call) else inner.value

    def _use(self, node: ast.Attribute | ast.Call) -> None:
        path = str(_path(node))
        keywords = [word.arg for word in node.keywords if word.arg is not None] if isinstance(node, ast.Call) else []
        if "." in path and _on_class(path) not in self._own:
            self.uses.append(Use(path, node.lineno, tuple(keywords), self._guards))

    def _visit_behind(self, guards: Iterable[Guard], nodes: list[ast.stmt] | list[ast.expr]) -> None:
        outer = self._guards
        self._guards += tuple(guards)
        self._visit_block(nodes)
        self._guards = outer

    def _visit_block(self, nodes: list[ast.stmt] | list[ast.expr]) -> None:
        outer = self._guards
        for node in nodes:
            self.visit(node)
            leaves = isinstance(node, ast.If) and isinstance(node.body[-1], ast.Return | ast.Raise | ast.Continue)
            if leaves and not node.orelse:
                self._guards += tuple(_guards(node.test)[1])
        self._guards = outer


def _path(node: ast.expr) -> str | None:
    """Return `node` as a path if it begins at one of TensorRT's objects."""
    if isinstance(node, ast.Name):
        return node.id if node.id in MODULES or node.id in ROOTS else None
    if isinstance(node, ast.Call):
        path = _path(node.func)
        return None if path is None else f"{path}()"
    if not isinstance(node, ast.Attribute):
        return None
    if isinstance(node.value, ast.Name) and node.value.id == "self":
        name = node.attr.removeprefix("_")
        return name if name in MODULES or name in ROOTS else None
    path = _path(node.value)
    return None if path is None else f"{path}.{node.attr}"


def _on_class(path: str) -> str:
    """Return a path's first attribute on its variable's class: `trt.ILogger.log` for `logger.log().x`."""
    root, attribute = re.findall(r"\w+", path)[:2]
    return f"trt.{ROOTS.get(root)}.{attribute}"


def _methods(node: ast.ClassDef) -> list[tuple[str, ast.FunctionDef]]:
    """Return the public methods of a subclass of a TensorRT class, as attributes of the TensorRT class."""
    bases = [base for base in map(_path, node.bases) if base is not None]
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef) and not child.name.startswith("_")]
    return [(f"{base}.{method.name}", method) for base in bases for method in methods]


def _asked(node: ast.expr) -> str | None:
    """Return the path that a `hasattr` or `getattr` asks for."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None
    if node.func.id not in ("hasattr", "getattr"):
        return None
    path, name = _path(node.args[0]), node.args[1]
    return f"{path}.{name.value}" if path is not None and isinstance(name, ast.Constant) else None


def _flavour(node: ast.expr) -> str | None:
    """Return NAME if `node` is `Flavour.NAME`."""
    is_member = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Flavour"
    return node.attr if is_member else None


def _guards(test: ast.expr) -> tuple[list[Guard], list[Guard]]:
    """Return the guards that `test` gives where it is true, and where it is false."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        holds, fails = _guards(test.operand)
        return fails, holds
    if isinstance(test, ast.BoolOp):
        known = [_guards(operand) for operand in test.values]
        if isinstance(test.op, ast.And):
            return [guard for holds, _ in known for guard in holds], []
        return [], [guard for _, fails in known for guard in fails]
    asked = _asked(test)
    if asked is not None:
        return [Guard(asked, True)], [Guard(asked, False)]
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is | ast.IsNot | ast.Eq | ast.NotEq):
        name, same = _flavour(test.comparators[0]), isinstance(test.ops[0], ast.Is | ast.Eq)
        if name is not None:
            return [Guard(name, same, True)], [Guard(name, not same, True)]
    return [], []
