"""What the source of a forward shows: whether layers that it calls get one input, which nothing in between can change.

And what its bytecode shows: layers whose weights it uses itself.

Where torch counts changes of tensors, nobody needs this. In inference mode and under torch.compile it does not, and
there only such a proof lets layers share a product. What is not understood is not proved.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

# Methods of tensors that change nothing.
_HARMLESS = {"view", "reshape", "transpose", "permute", "unflatten", "flatten", "contiguous", "size", "to", "float"}


def shows_one_input(forward: Callable[..., Any], names: Sequence[str]) -> bool:
    """Whether source code proves that self.NAME(x), of all names, get one x that nothing in between can change.

    From the first of these calls to the last there may be nothing but assignments to other names, of what is made from
    results of these calls: by arithmetic, by methods that change nothing, or by modules that see nothing else.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return False
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        return False
    self_name = tree.args.args[0].arg
    calls = [node for node in ast.walk(tree) if _module_called(node, self_name) in names]
    inputs = {ast.unparse(argument) for node in calls for argument in _arguments(node)}
    if sorted(str(_module_called(node, self_name)) for node in calls) != sorted(names) or len(inputs) != 1:
        return False
    (x,) = inputs
    if not x.isidentifier() or any(len(_arguments(node)) != 1 for node in calls):
        return False
    holding = [i for i, statement in enumerate(tree.body) if any(node in calls for node in ast.walk(statement))]
    made: set[str] = set()  # names of what is made from results
    return all(_harmless(s, self_name, names, x, made) for s in tree.body[holding[0] : holding[-1] + 1])


def _harmless(statement: ast.stmt, self_name: str, names: Sequence[str], x: str, made: set[str]) -> bool:
    """Whether a statement can change nothing but names that it assigns, which are added to `made`."""

    def fresh(node: ast.expr) -> bool:
        """Made from results of the calls: no other tensor, which may share memory with x, is given away."""
        if isinstance(node, ast.Name):
            return node.id in made
        if isinstance(node, ast.BinOp):
            return fresh(node.left) and (fresh(node.right) or _plain(node.right))
        if not isinstance(node, ast.Call) or node.keywords:
            return False
        if (module := _module_called(node, self_name)) is not None:
            return module in names or (bool(node.args) and all(fresh(argument) for argument in node.args))
        called = node.func
        return (
            isinstance(called, ast.Attribute)
            and called.attr in _HARMLESS
            and fresh(called.value)
            and all(_plain(argument) for argument in node.args)
        )

    if isinstance(statement, ast.Return):
        return statement.value is not None and fresh(statement.value)
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    target = statement.targets[0]
    if not isinstance(target, ast.Name) or target.id == x or not fresh(statement.value):
        return False
    made.add(target.id)
    return True


def _plain(node: ast.expr) -> bool:
    """Names, attributes and numbers: read, and given to nothing but arithmetic and harmless methods."""
    kinds = (ast.Name, ast.Attribute, ast.Constant, ast.UnaryOp, ast.USub, ast.Load, ast.Starred, ast.Tuple)
    return all(isinstance(n, kinds) for n in ast.walk(node))


def _module_called(node: ast.AST, self_name: str) -> str | None:
    """NAME of self.NAME(...)."""
    called = node.func if isinstance(node, ast.Call) else None
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == self_name:
        return called.attr
    return None


def _arguments(node: ast.AST) -> list[ast.expr]:
    assert isinstance(node, ast.Call)
    return [*node.args, *(keyword.value for keyword in node.keywords)]


@functools.cache
def weights_read(kind: Any) -> frozenset[str]:
    """Attributes X of which methods of a class of modules read self.X.weight, for more than its device.

    Those that set a model up do not count. Read from bytecode, which is there where source is not.
    """
    found = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins", "qkernels"):
            continue
        for name, member in vars(base).items():
            function = inspect.unwrap(member) if callable(member) else None
            if isinstance(function, FunctionType) and not any(s in name for s in ("init", "tie", "resize", "reset")):
                found |= {attribute for code in _codes(function.__code__) for attribute in _weights_loaded(code)}
    return frozenset(found)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of what is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _weights_loaded(code: CodeType) -> Iterator[str]:
    """The X of each `.X.weight`."""
    names = [i.argval if i.opname in ("LOAD_ATTR", "LOAD_METHOD") else None for i in dis.get_instructions(code)]
    for attribute, weight, use in zip(names, names[1:], [*names[2:], None], strict=False):
        if attribute is not None and weight == "weight" and use != "device":
            yield attribute
