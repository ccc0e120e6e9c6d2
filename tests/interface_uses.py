"""What our source asks of a library without types: every attribute and call on its objects, and methods it overrides.

An object is followed from where its class is known (a table of the caller's) through assignments, calls, attributes,
loops and changes of class, by what the library's own signatures say they give.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tests.library_interface import Interface, parse_signature

Comprehension = ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp


class Kind(NamedTuple):
    """What an expression is: an object of a class of the library, the class itself, or several such objects."""

    owner: str
    form: str = "object"  # or "class", "many"


MODULE = Kind("", "class")


@dataclass(frozen=True)
class Call:
    """How something is called. positional: with `self`; is_open: a star hands on more."""

    positional: int
    keywords: tuple[str, ...] = ()
    is_open: bool = False


@dataclass(frozen=True)
class Use:
    """One name of the library in our source, read, set or called."""

    where: str
    function: str
    owner: str
    name: str
    call: Call | None = None
    is_set: bool = False

    @property
    def full_name(self) -> str:
        return f"{self.owner}.{self.name}".removeprefix(".")


@dataclass(frozen=True)
class Origins:
    """Where objects of the library come from.

    modules: expressions that are the library itself. anys: by the name of what is annotated `Any`, its class; "" where
    it is the library, None where it is nothing of the library's.
    """

    modules: tuple[str, ...]
    anys: Mapping[str, str | None]


class Reader(ast.NodeVisitor):
    """Collects the uses of a file, and what is annotated `Any` there and not in the table."""

    def __init__(self, where: str, interface: Interface, origins: Origins) -> None:
        self.interface = interface
        self.origins = origins
        self.uses: list[Use] = []
        self.unknown: list[str] = []
        self._where = where
        self._function = ""
        self._kinds = dict.fromkeys(origins.modules, MODULE)

    def _add(self, node: ast.AST, owner: str, name: str, call: Call | None = None, is_set: bool = False) -> None:
        where = f"{self._where}:{getattr(node, 'lineno', 0)}"
        self.uses.append(Use(where, self._function, owner, name, call, is_set))

    def visit(self, node: ast.AST) -> None:
        """One kind of node after the other; all comprehensions are one kind."""
        if isinstance(node, Comprehension):
            self._visit_comprehension(node)
        else:
            super().visit(node)

    # What an expression is

    def _kind(self, node: ast.expr) -> Kind | None:
        """None for what is not the library's."""
        if found := self._kinds.get(ast.unparse(node)):
            return found
        match node:
            case ast.Attribute():
                return self._kind_of_attribute(node)
            case ast.Call():
                return self._kind_of_call(node)
            case ast.NamedExpr():
                return self._kind(node.value)
            case ast.IfExp():
                return self._kind(node.body) or self._kind(node.orelse)
            case ast.Subscript():
                return self._one_of(node.value)
            case ast.GeneratorExp() | ast.ListComp():
                element = self._kind(node.elt)
                return element and Kind(element.owner, "many")
        return None

    def _one_of(self, node: ast.expr) -> Kind | None:
        kind = self._kind(node)
        return Kind(kind.owner) if kind and kind.form == "many" else None

    def _owner(self, node: ast.expr) -> Kind | None:
        """What has the attributes of an expression, where that is the library's; several objects are a list of ours."""
        kind = self._kind(node)
        return kind if kind and kind.form != "many" else None

    def _kind_of_attribute(self, node: ast.Attribute) -> Kind | None:
        owner = self._owner(node.value)
        member = owner and self.interface.member(owner.owner, node.attr)
        if not owner or not member or not member.kind or member.kind not in self.interface.classes:
            return None  # a function has no kind; "" is the library itself
        return Kind(member.kind, "class" if owner == MODULE else "object")

    def _kind_of_call(self, node: ast.Call) -> Kind | None:
        called = self._kind(node.func)
        if called and called.form == "class":
            return Kind(called.owner)
        name = ast.unparse(node.func).rpartition(".")[2]
        owner = self._kind(node.func.value) if isinstance(node.func, ast.Attribute) else None
        if owner is None:
            ours = self.origins.anys.get(name)
            return Kind(ours) if ours else None
        if owner.form == "many":  # such as values() of a dictionary
            return owner
        member = self.interface.member(owner.owner, name)
        given = [parse_signature(text).returns for text in member.signatures] if member else []
        return next((Kind(kind) for kind in given if kind in self.interface.classes), None)

    def _bind(self, target: ast.expr, kind: Kind | None) -> None:
        if isinstance(target, ast.Attribute) and target.attr == "__class__":
            target, kind = target.value, kind and Kind(kind.owner)
        self._kinds.pop(ast.unparse(target), None)
        if kind:
            self._kinds[ast.unparse(target)] = kind

    # What is used

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if owner := self._owner(node.value):
            is_set = isinstance(node.ctx, ast.Store) and node.attr != "__class__"
            self._add(node, owner.owner, node.attr, is_set=is_set)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        kind = self._kind(node.func)
        if kind and kind.form == "class":
            self._add(node, kind.owner, "__init__", _call_of(node, 1))
        elif isinstance(node.func, ast.Attribute) and (owner := self._owner(node.func.value)):
            with_self = int(owner.form != "class")  # a method called through its class is given `self`
            self._add(node, owner.owner, node.func.attr, _call_of(node, with_self))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """A method that the library shall call is one that it knows, with as many arguments."""
        for base in filter(None, map(self._kind, node.bases)):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("__"):
                    self._add(method, base.owner, method.name, Call(len(method.args.args)))
        self.generic_visit(node)

    # What gets a name

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        kinds, function = dict(self._kinds), self._function
        self._function = node.name
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            self._bind(ast.Name(argument.arg), self._of_any(argument.arg, argument.annotation))
        self._of_any(node.name, node.returns)
        self.generic_visit(node)
        own = {text: kind for text, kind in self._kinds.items() if text.startswith("self.")}
        self._kinds, self._function = kinds | own, function

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        text = ast.unparse(node.target)
        self._bind(node.target, self._of_any(text, node.annotation) or (self._kind(node.value) if node.value else None))

    def _of_any(self, name: str, annotation: ast.expr | None) -> Kind | None:
        """What something annotated `Any`, or as a dictionary or list of it, is by the table."""
        text = ast.unparse(annotation) if annotation else ""
        is_many = text.startswith(("dict[", "list[")) and text.endswith((", Any]", "[Any]"))
        if text != "Any" and not is_many:
            return None
        if name not in self.origins.anys:
            self.unknown.append(f"{self._where}: {name}")
        owner = self.origins.anys.get(name)
        if owner is None:
            return None
        return MODULE if owner == "" else Kind(owner, "many" if is_many else "object")

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for one, kind in [(one, self._kind(value)) for one, value in pairs]:
                self._bind(one, kind)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._bind(node.target, self._kind(node.value))

    def visit_withitem(self, node: ast.withitem) -> None:
        self.generic_visit(node)
        if node.optional_vars:
            self._bind(node.optional_vars, self._kind(node.context_expr))

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._bind(node.target, self._one_of(node.iter))
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def _visit_comprehension(self, node: Comprehension) -> None:
        """The loops first: what they bind stands before them in the source."""
        kinds = dict(self._kinds)
        for loop in node.generators:
            self.visit(loop.iter)
            self._bind(loop.target, self._one_of(loop.iter))
            for condition in loop.ifs:
                self.visit(condition)
        for element in [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]:
            self.visit(element)
        self._kinds = kinds


def _call_of(node: ast.Call, with_self: int) -> Call:
    plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
    is_open = len(plain) < len(node.args) or len(keywords) < len(node.keywords)
    return Call(with_self + len(plain), keywords, is_open)


def misfit(use: Use, interface: Interface) -> str | None:
    """What is wrong with a use, were it made of this library."""
    member = interface.member(use.owner, use.name)
    if member is None:
        return f"{use.where}: there is no {use.full_name}"
    if use.is_set and not member.is_settable:
        return f"{use.where}: {use.full_name} cannot be set"
    if use.call is None or use.call.is_open:
        return None
    signatures = [parse_signature(text) for text in member.signatures]
    if any(signature.takes(use.call.positional, use.call.keywords) for signature in signatures):
        return None
    return f"{use.where}: {use.full_name} is called with {use.call}, takes {list(member.signatures)}"
