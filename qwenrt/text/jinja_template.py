"""A chat template, compiled once and rendered in a sandbox: no files, no imports, limited work and memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

from jinja2 import TemplateError, nodes, pass_context
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from qwenrt.errors import ConfigError, QwenrtError, RequestError
from qwenrt.text.template_budget import MAX_INT_BITS, Budget, LimitError, current
from qwenrt.text.template_library import (
    ATTRIBUTES,
    FILTERS,
    FUNCTIONS,
    TESTS,
    check_method,
    concat,
    percent,
    text,
)

MAX_SOURCE_CHARS = 2**20
MAX_TOKENS = 30_000  # the longest released template has a tenth; compiling takes seconds beyond
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": operator.pow,
    "%": operator.mod,
}
_ALLOWED = frozenset(
    {
        *("Template", "Output", "TemplateData", "For", "If", "Macro", "CallBlock", "FilterBlock", "With"),
        *("Assign", "AssignBlock", "Break", "Continue", "Scope", "Name", "NSRef", "Const", "Tuple", "List"),
        *("Dict", "Pair", "Keyword", "CondExpr", "Filter", "Test", "Call", "Getitem", "Getattr", "Slice"),
        *("Concat", "Compare", "Operand", "And", "Or", "Not", "Neg", "Pos"),
        *("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"),
    }
)


class JinjaTemplate:
    """One compiled template. Any number of threads may render it.

    source: its text; variables: the names that it takes from outside; words: its strings.
    ``where`` names the file in errors.
    Raises ConfigError for a template that is too large, is not Jinja, or asks for files.
    """

    def __init__(self, source: str, where: str) -> None:
        self.source, self.where = source, where
        if len(source) > MAX_SOURCE_CHARS:
            raise self._unfit(f"{len(source)} characters, at most {MAX_SOURCE_CHARS} are read")
        try:
            tokens = sum(1 for _ in islice(_SANDBOX.lex(source), MAX_TOKENS + 1))
            if tokens > MAX_TOKENS:
                raise self._unfit(f"more than {MAX_TOKENS} parts")
            tree = _SANDBOX.parse(source)
            for node in _walk(tree):
                if type(node).__name__ not in _ALLOWED:
                    raise self._unfit(f"it has {{% {type(node).__name__.lower()} %}} in line {node.lineno}")
            self.words = frozenset(n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str))
            self.variables = frozenset(find_undeclared_variables(tree)) - set(_SANDBOX.globals)
            tree = _Metering().visit(tree)
            tree.set_environment(_SANDBOX)
            code = _SANDBOX.compile(tree, filename="<chat template>")
            self._template = Template.from_code(_SANDBOX, code, _SANDBOX.make_globals(None))
        except QwenrtError:
            raise
        except (TemplateError, SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            words = getattr(error, "message", None) or error
            found = f"{type(error).__name__}: {str(words)[:200]}" + (f" (line {line})" if line else "")
            raise self._unfit(found) from error

    def render(self, variables: Mapping[str, Any], mark: str = "") -> str:
        """The text. ``variables`` hold str, numbers, None, lists and dicts only, with ``mark`` in outside text.

        Raises RequestError with the template's own words where it refuses the conversation, and wherever it
        fails or goes over a limit.
        """
        asked = f"rendering {self.where}"
        token = None
        try:
            token = current.set(Budget(dict(variables), mark))
            return self._template.render(variables)
        except LimitError as error:
            raise RequestError(asked, error.found, error.remedy or _BROKEN) from error
        except QwenrtError:
            raise
        except Exception as error:  # the template is a program: it may fail in any way
            raise RequestError(asked, f"{type(error).__name__}: {str(error)[:300]}", _BROKEN) from error
        finally:
            if token is not None:
                current.reset(token)

    def _unfit(self, found: str) -> ConfigError:
        return ConfigError(
            f"reading {self.where}", found, "It is no chat template of a Qwen: fetch the file again."
        )


_BROKEN = "The template does not fit this conversation, or the file is damaged."


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}, which marks what a model is trained on, is just its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counted:
    """What a loop goes over, each round a step. It has a length where the original has one."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return current.get().counted(self._values)

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with everything replaced that makes values, so that each is accounted for in the current Budget."""

    intercepted_binops = frozenset(_OPERATORS)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            optimized=False,  # folding constants would be work done while compiling
            finalize=_output,
            cache_size=0,
        )
        self.filters, self.tests = dict(FILTERS), dict(TESTS)
        self.globals.clear()
        self.globals.update(FUNCTIONS)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not isinstance(attr, str) or attr.startswith("_"):
            return False
        return isinstance(obj, Namespace) or any(
            isinstance(obj, kind) and attr in names for kind, names in ATTRIBUTES
        )

    def wrap_str_format(self, value: Any) -> None:
        """str.format is not among the attributes; the filter `format` and the operator % are checked."""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current.get()
        budget.step()
        if operator == "%" and isinstance(left, str):
            return percent(left, right)
        if operator == "+" and isinstance(left, (str, list, tuple)):
            budget.reserve(budget.size(left) + budget.size(right))
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    budget.reserve(budget.size(value) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            if operator == "**":
                bits = left.bit_length() * max(right, 0)
            if bits > 2 * MAX_INT_BITS:
                raise LimitError("rendering", f"a number of {bits} bits")
        return budget.made(_OPERATORS[operator](left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **named: Any) -> Any:
        budget = current.get()
        budget.step()
        if isinstance(__obj, LoopContext):
            args = tuple(_Counted(arg) for arg in args)  # a recursive loop goes over these
        else:
            for arg in (*args, *named.values()):
                if isinstance(arg, (list, tuple, dict)):
                    budget.size(arg)  # a macro may keep its arguments as a tuple
            check_method(__obj, args, named)
        result = super().call(__context, __obj, *args, **named)
        if isinstance(result, (type({}.items()), type({}.keys()), type({}.values()))):
            result = budget.listed(result)
        return budget.made(result)

    # What _Metering puts into the template's code.

    @staticmethod
    def counted(values: Iterable[Any]) -> _Counted:
        return _Counted(values)

    @staticmethod
    def made(value: Any) -> Any:
        return value  # `call` accounts for every result

    @staticmethod
    def ticked(value: Any) -> Any:
        budget = current.get()
        budget.step(16)
        if isinstance(value, (list, tuple, dict)):
            budget.size(value)
        return value

    @staticmethod
    def joined(*values: Any) -> str:
        return concat(*values)


@pass_context
def _output(context: Context, value: Any) -> str:
    """Everything that is written goes through here, into whichever buffer."""
    return str(current.get().made(text(value)))


class _Metering(NodeTransformer):
    """Puts the sandbox's hooks around what Jinja would do without asking the environment."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # so that it is written through _output

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _hook("counted", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _hook("joined", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _hook("ticked", node.expr)
        for operand in node.ops:
            operand.expr = _hook("ticked", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _hook("made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _hook("made", node) if node.ctx == "load" else node

    def _literal(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _hook("made", node)

    visit_List = visit_Dict = _literal


def _hook(name: str, *args: nodes.Node) -> nodes.Call:
    line = args[0].lineno if args else 1
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, cast("list[nodes.Expr]", list(args)), [], None, None, lineno=line)


def _walk(tree: nodes.Node) -> Iterator[nodes.Node]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.iter_child_nodes())


_SANDBOX = _Sandbox()
