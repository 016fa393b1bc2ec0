"""The sandbox in which chat templates run: what ``transformers`` gives them, within bounds of time and memory."""

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

from jinja2 import nodes, pass_context, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.runtime import LoopContext, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import generate_lorem_ipsum
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from stellarbyte_jax.tokenizer import costs
from stellarbyte_jax.tokenizer.provenance import Safe, Traced, followed, is_said, joined

_NODES_A_STEP = 16
_STEPS_OF_A_CALL = 4
_OF_JINJA = ("_loop_vars", "_block_vars")  # it hands them to every call inside of a loop or a block
_WHOLE = ("max", "min", "string", "trim")  # filters whose texts are one of those that they were given, or cut from it
_TEXTS = (str, bytes, bytearray)
_BUILT_IN = (str, bytes, bytearray, int, float, list, tuple, dict)


class GenerationTag(Extension):
    """``{% generation %}`` marks what an assistant says; its places are noted where the environment looks for them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        """A block whose content is kept."""
        self.environment.marks_replies = True  # type: ignore[attr-defined]
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        said = caller()
        written: Written | None = getattr(self.environment, "written", None)
        if written is not None:
            begin = sum(map(len, written.pieces))
            written.marked.append((begin, said))
        return said


class Written:
    """The text of a rendering while it is made.

    Attributes:
      pieces: of the text so far.
      marked: begin and text of each block of ``{% generation %}``; within a macro it begins elsewhere.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.pieces: list[str] = []
        self.marked: list[tuple[int, str]] = []

    def follow(self, pieces: Iterable[str]) -> Iterator[str]:
        """The same pieces, which are kept."""
        for piece in pieces:
            self.pieces.append(piece)
            yield piece


class _Counting(NodeTransformer):
    """Lets each pass through a body, and what is compared, cut or put together, cost steps."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (Jinja's name)
        self._body(node)
        node.iter = _filtered(node.iter, "_counted")  # by itself: a loop with a condition may never reach its body
        return node

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        cost = 1 + sum(1 for _ in node.find_all(nodes.Node)) // _NODES_A_STEP
        spend = nodes.ExprStmt(_filtered(nodes.Const(cost, lineno=node.lineno), "_spend"), lineno=node.lineno)
        node.body.insert(0, spend)
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concatenated")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        node.expr = _measured(node.expr)
        for operand in node.ops:
            operand.expr = _measured(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(node.node, "_measured_top")
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _measured(node.key)
        return node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _measured(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filtered(node, "_measured")


class Environment(ImmutableSandboxedEnvironment):
    """Counts steps, and bounds the size of what operators, methods and filters make.

    Attributes:
      budget: of the rendering that is going on.
      written: of it, where the places of what an assistant says are asked for.
      marks_replies: whether a template that was compiled has ``{% generation %}``.
    """

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        """As Jinja's own; the budget is there before anything is compiled."""
        self.budget = costs.Budget()
        self.written: Written | None = None
        self.marks_replies = False
        # Not optimized: what is computed while compiling, such as a list of a filter, would cost its readers nothing.
        super().__init__(finalize=self._written, optimized=False, **options)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Counting().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def _written(self, value: Any) -> Any:
        """What is put into the text, which is escaped afterwards where the template has switched that on."""
        said = self.budget.spend_on(value)
        if isinstance(value, Markup):
            return Safe(value)
        return Traced(str(value)) if said and not isinstance(value, str) else value

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """One text, of a block, a macro or all."""
        kept, size = [], 0
        for piece in pieces:
            kept.append(piece)
            size += len(piece)
            costs.check_text(size)
        return joined(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, if what it makes is not too large."""
        if operator == "*":
            costs.check_product(left, right)
        if operator == "**":
            costs.check_power(left, right)
        if operator == "%" and isinstance(left, str | bytes):
            costs.check_format(left, right)
        function = self.binop_table[operator]
        made = function(left, right)
        self.budget.spend_on_top(made)
        if type(made) is str and operator != "+" and self.budget.spend_on(left, right):  # texts add themselves
            return followed(made, function, (left, right), {})
        return made

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An element; a tuple is hashed with all that it holds."""
        if isinstance(argument, tuple):
            self.budget.spend_on(argument)
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A function, a method or a macro, if what it makes is not too large."""
        self.budget.spend(_STEPS_OF_A_CALL)
        said = False
        name = getattr(obj, "__name__", "")
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        named = {key: value for key, value in kwargs.items() if key not in _OF_JINJA}
        if isinstance(owner, _BUILT_IN):
            args = tuple(list(x) if isinstance(x, Iterator) else x for x in args)
            self.budget.spend_on_top(owner)
            said = self.budget.spend_on(*args, *named.values())
            if name in ("index", "count") and isinstance(owner, list | tuple):
                self.budget.spend_on(owner)
            if name in costs.SEARCHES and args:
                self.budget.spend_on_search(owner, args[0])
            if name in costs.CHECKS_OF_METHODS:
                costs.CHECKS_OF_METHODS[name](owner, *args, **named)
        elif isinstance(owner, LoopContext) or isinstance(obj, type | FunctionType):
            said = self.budget.spend_on(*args, *named.values())
        made = super().call(context, obj, *args, **kwargs)
        self.budget.spend_on_top(made)
        if type(made) is str:  # macros and blocks have followed theirs
            if isinstance(owner, _TEXTS) and (said or is_said(owner)):
                return followed(made, self._method(context, name), (owner, *args), kwargs)
            if isinstance(obj, FunctionType) and said:
                return Traced(made)
        return made

    def _method(self, context: Any, name: str) -> Callable[..., Any]:
        def called(owner: Any, *args: Any, **kwargs: Any) -> Any:
            return super(Environment, self).call(context, self.getattr(owner, name), *args, **kwargs)

        return called

    def guard(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, with its costs; it goes on to know what Jinja passes it."""
        passed = int(hasattr(function, "jinja_pass_arg"))
        check, shallow = costs.CHECKS_OF_FILTERS.get(name), name in costs.SHALLOW_FILTERS

        @functools.wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            before, value, rest = args[:passed], args[passed], args[passed + 1 :]
            if isinstance(value, Iterator) and not (shallow or isinstance(value, LoopContext)):
                value = list(value)
            said = not shallow and self.budget.spend_on(value, slow=name in costs.SLOW_FILTERS)
            if shallow and name not in costs.FREE_FILTERS:
                self.budget.spend_on_top(value)
            said = self.budget.spend_on(*rest, *kwargs.values()) or said
            if check:
                check(value, *rest, **kwargs)
            made = function(*before, value, *rest, **kwargs)
            if isinstance(made, Iterator):
                return self.counted(made, self.budget.spend_on_top)
            self.budget.spend_on_top(made)
            if said and not (isinstance(made, Traced) and (shallow or name in _WHOLE)):
                return followed(made, functools.partial(function, *before), (value, *rest), kwargs)
            return made

        return filtered

    def guard_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The test, with the cost of reading what it compares."""

        @functools.wraps(function)
        def tested(*args: Any, **kwargs: Any) -> Any:
            self.budget.spend_on(*args, *kwargs.values())
            return function(*args, **kwargs)

        return tested

    def counted(self, values: Iterable[Any], spend: Callable[[Any], None] = lambda value: None) -> Iterator[Any]:
        """The same values, each for a step and what ``spend`` counts."""
        for value in values:
            self.budget.spend(1)
            spend(value)
            yield value


def make_environment() -> Environment:
    """The filters, functions and tags that ``transformers`` has."""
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    for name, function in environment.filters.items():
        environment.filters[name] = environment.guard(name, function)
    for name in costs.DEEP_TESTS:
        environment.tests[name] = environment.guard_test(environment.tests[name])
    environment.filters |= {
        "_counted": _counted,
        "_spend": _spend,
        "_measured": _measured_value,
        "_measured_top": _measured_top,
        "_concatenated": _concatenated,
    }
    environment.globals["lipsum"] = _lorem_ipsum
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


# Jinja computes a filter of constants while it compiles, but not one that is passed the context.
@pass_context
def _counted(context: Any, values: Any) -> Iterator[Any]:
    return context.environment.counted(Safe(values) if isinstance(values, Markup) else values)


@pass_context
def _spend(context: Any, steps: int) -> None:
    context.environment.budget.spend(steps)


@pass_context
def _measured_value(context: Any, value: Any) -> Any:
    context.environment.budget.spend_on(value)
    return value


@pass_context
def _measured_top(context: Any, value: Any) -> Any:
    context.environment.budget.spend_on_top(value)
    return value


@pass_eval_context
def _concatenated(context: Any, values: list[Any]) -> str:
    said = context.environment.budget.spend_on(values)
    made = (markup_join if context.autoescape else str_join)(values)
    return joined(map(_text, values)) if said and not isinstance(made, Markup) else made


def _text(value: Any) -> str:
    return value if isinstance(value, str) else Traced(str(value))


def _lorem_ipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    if n * max > 100_000:
        raise SecurityError(f"{n} paragraphs of {max} words")
    return generate_lorem_ipsum(n, html, min, max)


def _refuse(message: str) -> Any:
    raise TemplateError(message)


def _now(form: str) -> str:
    costs.check_text(1000 * len(form))  # what one letter can stand for, with room
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """JSON without escapes for HTML, as ``transformers`` writes it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
