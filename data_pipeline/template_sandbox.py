"""Chat templates with bounds on their time and memory: they come with models that others made.

transformers renders templates in jinja2's sandbox, which bounds access and not cost: nested loops, 'a' * 3000000000 and
center(2000000000) run for hours or fill the memory. Here every construct that can repeat or grow is counted:

- Each round of a loop and each call of a macro, by a filter that is added to its body when the template is compiled.
- Each operator, call, filter and literal that makes a new value, by the sizes of what goes in and comes out. So no
  value ever exceeds the bounds, and no single operation on values takes long.

It works in any thread and process, since nothing has to be interrupted. The text of a rendering stays the same.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

# Characters of a template; the longest of well-known models has 20,000.
MAX_SOURCE = 1 << 18
# Processor time of a rendering, of which a long one takes some milliseconds.
MAX_SECONDS = 10.0
# Characters of a text, and items of a list or dictionary with all that they contain.
MAX_CHARACTERS = 64 << 20
MAX_ITEMS = 1 << 20
MAX_DEPTH = 200
# Characters of all texts that a rendering makes, in between and at the end.
MAX_TOTAL = 2 << 30
# Characters of the largest two arguments of a function, multiplied; MAX_CHARACTERS where the result may have as many.
MAX_PRODUCT = 1 << 30
# Numbers that are a width, an indentation or a count.
MAX_WIDTH = 10_000
_MAX_BITS = 4096
_ROUNDS_PER_CHECK = 256
# Characters that a value of another kind is counted for.
_OTHER_CHARACTERS = 32
# All methods and filters whose result grows with a number that is passed to them.
_WIDENING = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "indent", "batch", "slice", "round")
)
_CHECKED = _WIDENING | {"format", "format_map", "encode", "decode"}
# All methods and filters that may put one argument in place of many characters of another.
_MULTIPLYING = frozenset(
    ("replace", "join", "translate", "format", "format_map", "indent", "wordwrap", "urlize", "tojson")
)
_ENCODINGS = ("utf-8", "utf8", "ascii", "latin-1", "strict", "ignore", "replace")
# A width in a format, "%99999d" or "{:>99999}", and one that is itself a field.
_LONG_WIDTH = re.compile(r"\d{5}")
_NESTED = re.compile(r"\{[^}]*\{")


class TemplateLimitError(Exception):
    """A rendering exceeds a bound. The message says which."""


def compile_template(source: str) -> jinja2.Template:
    """A template with bounds, in the environment of transformers' chat templates. Render it with `render`.

    Raises Exception of any kind, with a message, if the source is not a template.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateLimitError(f"it has {len(source)} characters, more than {MAX_SOURCE}")
    return _environment().from_string(source)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text of a template of `compile_template`.

    Raises TemplateLimitError, or whatever the template raises.
    """
    before = getattr(_thread, "budget", None)
    _thread.budget = _Budget()
    try:
        return template.render(variables)
    finally:
        _thread.budget = before


class _Budget:
    """What a rendering has used so far."""

    def __init__(self) -> None:
        self._end = time.thread_time() + MAX_SECONDS
        self._rounds = 0
        self._characters = 0
        # Sizes of containers, which templates cannot change; held, so that no other object gets their id.
        self._sizes: dict[int, tuple[int, int, int]] = {}
        self._held: list[Any] = []
        self._namespaces: list[Namespace] = []

    def count_round(self) -> None:
        """Counts a round of a loop, or a call."""
        self._rounds += 1
        if not self._rounds % _ROUNDS_PER_CHECK:
            self._check_time()

    def _check_time(self) -> None:
        if time.thread_time() > self._end:
            raise TemplateLimitError(f"it takes more than {MAX_SECONDS:g} seconds")

    def count_text(self, characters: int) -> None:
        """Counts a text that is made."""
        if characters > MAX_CHARACTERS:
            raise TemplateLimitError(f"it makes a text of more than {MAX_CHARACTERS} characters")
        self._characters += characters
        if self._characters > MAX_TOTAL:
            raise TemplateLimitError(f"it makes texts of more than {MAX_TOTAL} characters together")

    def count_value(self, value: Any) -> Any:
        """Counts a value that is made, and returns it."""
        if isinstance(value, (str, bytes)):
            self.count_text(len(value))
        elif isinstance(value, (list, tuple, dict, set, frozenset, Namespace)):
            self.size(value)
        return value

    def size(self, value: Any, depth: int = 0) -> tuple[int, int, int]:
        """(items, characters, depth) of a value, counting what it contains as often as it would be printed."""
        if (kept := self._sizes.get(id(value))) is not None:
            return kept
        if isinstance(value, (str, bytes)):
            return 1, len(value), 0
        if isinstance(value, int):
            return 1, value.bit_length() // 3 + 1, 0
        if isinstance(value, dict):
            children: Iterable[Any] = itertools.chain(value, value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            children = value
        elif isinstance(value, Namespace):
            children = object.__getattribute__(value, "_Namespace__attrs").values()
        else:
            return 1, _OTHER_CHARACTERS, 0
        if depth > MAX_DEPTH:
            raise TemplateLimitError(f"it nests values more than {MAX_DEPTH} deep")
        items, characters, deepest = 1, 2, 0
        for child in children:
            if type(child) is str:
                items, characters = items + 1, characters + len(child)
                continue
            child_items, child_characters, child_depth = self.size(child, depth + 1)
            items, characters = items + child_items, characters + child_characters
            deepest = max(deepest, child_depth + 1)
            # Within the loop: what contains itself often would take forever to count.
            if items > MAX_ITEMS:
                break
        if items > MAX_ITEMS or characters > MAX_CHARACTERS or deepest > MAX_DEPTH:
            bounds = f"{MAX_ITEMS} items, {MAX_CHARACTERS} characters or {MAX_DEPTH} levels"
            raise TemplateLimitError(f"it makes a value of more than {bounds}")
        self._sizes[id(value)] = items, characters, deepest
        self._held.append(value)
        # Templates change no values but namespaces, whose sizes hold for this call only.
        if isinstance(value, Namespace):
            self._namespaces.append(value)
        if not depth:
            for namespace in self._namespaces:
                del self._sizes[id(namespace)]
            self._namespaces.clear()
        return items, characters, deepest

    def check_call(self, name: str, values: tuple[Any, ...]) -> None:
        """Checks what is passed to a function, a method or a filter; the first value of a method is its object."""
        self.count_round()
        if name in _CHECKED:
            _check_special(name, values)
        if len(values) < 2:
            return
        # The result has at most as many characters as a text in which each one is replaced by another value.
        largest = second = 1
        for value in values:
            if type(value) is str:
                size = len(value)
            elif value is None or isinstance(value, (bool, float)):
                continue
            elif isinstance(value, int):
                size = abs(value) if name in ("indent", "expandtabs") else 1
            else:
                items, characters, _ = self.size(value)
                size = items + characters
            if size > largest:
                largest, second = size, largest
            elif size > second:
                second = size
        if largest * second > (MAX_CHARACTERS if name in _MULTIPLYING else MAX_PRODUCT):
            raise TemplateLimitError("it passes values to a function that are too large together")


def _check_special(name: str, values: tuple[Any, ...]) -> None:
    if name in _WIDENING:
        check_widths(values[1:])
    elif name in ("format", "format_map"):
        if values and isinstance(values[0], str):
            check_format(values[0], values[1:])
    elif any(value not in _ENCODINGS for value in values[1:]):
        # Others take quadratic time.
        raise TemplateLimitError(f"it uses an encoding that is none of {', '.join(_ENCODINGS)}")


def check_widths(values: Iterable[Any]) -> None:
    """Raises TemplateLimitError for a number in the values, or in what they contain, that is too large for a width."""
    for value in values:
        if isinstance(value, (int, float)) and abs(value) > MAX_WIDTH:
            raise TemplateLimitError(f"it uses a width or a count of more than {MAX_WIDTH}")
        if isinstance(value, dict):
            check_widths(value.values())
        elif isinstance(value, (list, tuple)):
            check_widths(value)


def check_format(form: str, values: Iterable[Any]) -> None:
    """Raises TemplateLimitError for a format with a width that is too large, in itself or in the values."""
    # "%*d" and "{:{}}" take widths from the values.
    if "*" in form or _NESTED.search(form):
        check_widths(values)
    if _LONG_WIDTH.search(form):
        raise TemplateLimitError(f"it uses a width or a count of more than {MAX_WIDTH}")


# The budget of the rendering of each thread. The compiler has none: what it evaluates early it fails to, and leaves.
_thread = threading.local()


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, in which what repeats or grows is counted."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Guard().visit(super()._parse(source, name, filename))
        _count_rounds(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _thread.budget
        if operator == "%" and isinstance(left, str):
            budget.check_call("format", (left, right))
            return budget.count_value(left % right)
        elif operator == "*" and not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    items, characters, _ = budget.size(value)
                    if items * times > MAX_ITEMS or characters * times > MAX_CHARACTERS:
                        raise TemplateLimitError(f"it repeats a value {_shown(times)} times")
            return budget.count_value(left * right)
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise TemplateLimitError(f"it makes a number of more than {_MAX_BITS} bits")
        return super().call_binop(context, operator, left, right)

    # The names jinja2 gives them: a template's keyword arguments may be called anything else.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _thread.budget
        # A method works on its object too; of "...".format, jinja2 passes a function that wraps it.
        method = getattr(__obj, "__wrapped__", __obj)
        subject = getattr(method, "__self__", None)
        # jinja2 adds two more.
        named = [value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")]
        if isinstance(subject, (str, bytes, int)):
            budget.check_call(method.__name__, (subject, *args, *named))
        else:
            budget.check_call("", (*args, *named))
        return budget.count_value(super().call(__context, __obj, *args, **kwargs))


@functools.cache
def _environment() -> jinja2.Environment:
    base = _compile_jinja_template("").environment
    environment: Any = base.overlay()
    # The environment of transformers is made inside a function, so its class cannot be named when it is made.
    environment.__class__ = _BoundedEnvironment
    environment.finalize = _print
    # A text of random words, of any length.
    environment.globals = {name: value for name, value in base.globals.items() if name != "lipsum"}
    environment.filters = {name: _bounded_filter(name, function) for name, function in base.filters.items()} | {
        "_round": _round,
        "_made": _made,
        "_added": _added,
        "_joined": _joined,
    }
    bounded: jinja2.Environment = environment
    return bounded


def _print(value: Any) -> Any:
    """Called with each value that is printed."""
    if type(value) is str:
        _thread.budget.count_text(len(value))
    else:
        _thread.budget.count_text(_thread.budget.size(value)[1])
    return value


def _round(characters: int) -> None:
    budget = _thread.budget
    budget.count_round()
    if characters:
        budget.count_text(characters)


def _made(value: Any) -> Any:
    return _thread.budget.count_value(value)


def _added(*values: Any) -> Any:
    """The operator +, of two or more operands."""
    budget = _thread.budget
    total = 0
    for value in values:
        if type(value) is not str:
            break
        total += len(value)
    else:
        budget.count_text(total)
        return "".join(values)
    budget.count_round()
    for value in values:
        total += budget.size(value)[1]
    if total > _OTHER_CHARACTERS * len(values):
        budget.count_text(total)
    return budget.count_value(functools.reduce(operator.add, values))


def _joined(*values: Any) -> str:
    """The operator ~, whose operands are texts or are printed as such."""
    budget = _thread.budget
    budget.count_text(sum(len(value) if type(value) is str else budget.size(value)[1] for value in values))
    return "".join(map(str, values))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks its arguments and counts its result. It takes the same first argument from jinja2."""
    passed = getattr(function, "jinja_pass_arg", None)

    @functools.wraps(function)
    def bounded(*arguments: Any, **options: Any) -> Any:
        budget = _thread.budget
        values = arguments[1:] if passed is not None else arguments
        values = (*values, *options.values()) if options else values
        budget.check_call(name, values)
        if name == "tojson" and len(values) > 1:
            _check_indent(budget, values)
        return budget.count_value(function(*arguments, **options))

    # Otherwise jinja2 takes the wrapper for an ordinary function, and passes no environment.
    if passed is not None:
        bounded.jinja_pass_arg = passed  # type: ignore[attr-defined]
    return bounded


def _check_indent(budget: _Budget, values: tuple[Any, ...]) -> None:
    items, characters, depth = budget.size(values[0])
    for option in values[1:]:
        width = len(option) if isinstance(option, str) else option if isinstance(option, int) else 0
        # Every item is a line, which is indented once for each level.
        if characters + items * depth * width > MAX_CHARACTERS:
            raise TemplateLimitError(f"it makes a text of more than {MAX_CHARACTERS} characters")


def _count_rounds(tree: nodes.Template) -> None:
    """Adds a count to the body of every loop, macro and block that is called."""
    repeated: tuple[type[Any], ...] = (nodes.For, nodes.Macro, nodes.CallBlock)
    node: Any
    for node in tree.find_all(repeated):
        count = _filtered("_round", nodes.Const(_own_characters(node.body)))
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))


def _own_characters(body: list[nodes.Node]) -> int:
    """Characters of the template itself in a body, without those of loops and macros in it."""
    total = 0
    for node in body:
        if isinstance(node, nodes.TemplateData):
            total += len(node.data)
        elif not isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
            total += _own_characters(list(node.iter_child_nodes()))
    return total


class _Guard(NodeTransformer):
    """Replaces what makes values, other than calls: lists, tuples, dictionaries, and the operators + and ~."""

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return node if _is_constant(node) else _filtered("_made", self.generic_visit(node))

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return node if _is_constant(node) else _filtered("_made", self.generic_visit(node))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        # Other tuples are the targets of assignments.
        if node.ctx != "load" or _is_constant(node):
            return node
        return _filtered("_made", self.generic_visit(node))

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        operands: list[nodes.Node] = [node.right]
        # a + b + c is (a + b) + c: one call for all. Without recursion, since texts have hundreds of parts.
        left: nodes.Node = node.left
        while isinstance(left, nodes.Add):
            operands.append(left.right)
            left = left.left
        return _filtered("_added", *map(self.visit, (left, *reversed(operands))))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return _filtered("_joined", *map(self.visit, node.nodes))

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        # Texts that are printed as they are need no check.
        node.nodes = [
            nodes.TemplateData(child.value, lineno=child.lineno)
            if isinstance(child, nodes.Const) and type(child.value) is str
            else child
            for child in node.nodes
        ]
        return self.generic_visit(node)


def _is_constant(node: nodes.Node) -> bool:
    return all(
        isinstance(child, nodes.Const) or (isinstance(child, nodes.Pair) and _is_constant(child))
        for child in node.iter_child_nodes()
    )


def _filtered(name: str, first: nodes.Node, *others: nodes.Node) -> nodes.Node:
    """A call of one of our filters, which no name in the template can hide."""
    return nodes.Filter(first, name, list(others), [], None, None, lineno=first.lineno)


def _shown(number: int) -> str:
    return str(number) if number.bit_length() < 100 else "a number of hundreds of digits"
