"""A chat template, compiled once and rendered in a sandbox: no files, no imports, limited work and memory."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, cast

from jinja2 import TemplateError, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from qwenrt.errors import ConfigError, QwenrtError, RequestError
from qwenrt.text.template.budget import CONTAINER, ITEM, MAX_INT_BITS, Budget, LimitError, current
from qwenrt.text.template.library import ATTRIBUTES, FILTERS, FUNCTIONS, TESTS, escaped
from qwenrt.text.template.provenance import Escaped, TemplateText, joined, ownership
from qwenrt.text.template.sources import MAX_SOURCE_CHARS
from qwenrt.text.template.strings import METHODS, concat, format_braces, format_percent, text

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
_JINJAS = frozenset(("_loop_vars", "_block_vars"))  # what it passes to every call
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

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text, a TemplateText where the template wrote some of it. ``variables`` hold str, numbers, None, lists
        and dicts only; a plain str is untrusted text.

        Raises RequestError with the template's own words where it refuses the conversation, and wherever it
        fails or goes over a limit.
        """
        asked = f"rendering {self.where}"
        token = None
        try:
            token = current.set(Budget(dict(variables)))
            return self._template.render(variables)
        except LimitError as error:
            raise RequestError(asked, error.found, error.remedy or _TOO_MUCH) from error
        except QwenrtError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            remedy = _UNSUPPORTED if _NO_SUCH.match(str(error)) else _BROKEN
            raise RequestError(asked, f"{type(error).__name__}: {str(error)[:300]}", remedy) from error
        finally:
            if token is not None:
                current.reset(token)

    def _unfit(self, found: str) -> ConfigError:
        remedy = _UNSUPPORTED if _NO_SUCH.search(found) else _NOT_READ
        return ConfigError(f"reading {self.where}", found, remedy)


_BROKEN = "The template does not fit this conversation, or the file is damaged."
_TOO_MUCH = (
    "The work a template may do is limited by the size of the conversation: shorten it, or fix the template."
)
_NOT_READ = "Fix the template, or remove it: a built-in one is used then."
_NO_SUCH = re.compile("No (?:filter|test) named")
_UNSUPPORTED = "The template uses a feature that is not supported: write that part in another way."


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


class _Generator(CodeGenerator):
    """Makes the literals of a template the template's own text."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        if isinstance(node.value, str):
            self.write(f"environment.own({node.value!r})")
        else:
            super().visit_Const(node, frame)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with every operation that makes values replaced by one that charges the current Budget."""

    intercepted_binops = frozenset(_OPERATORS)
    code_generator_class = _Generator

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
        self.own = lru_cache(maxsize=1024)(TemplateText)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not isinstance(attr, str) or attr.startswith("_"):
            return False
        return isinstance(obj, Namespace) or any(
            isinstance(obj, kind) and attr in names for kind, names in ATTRIBUTES
        )

    def wrap_str_format(self, value: Any) -> None:
        """`call` has str.format done by `format_braces`."""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current.get()
        budget.step()
        if operator == "%" and isinstance(left, str):
            return format_percent(left, right)
        if operator == "+" and isinstance(left, (str, list, tuple)):
            budget.reserve(budget.size(left) + budget.size(right))
            if isinstance(left, str) and isinstance(right, str):
                return budget.made(_added(left, right))
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
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            named = {key: value for key, value in named.items() if key not in _JINJAS}
            if name == "format":
                return format_braces(owner, args, named, __self)
            if name == "format_map":
                return format_braces(owner, (), args[0], __self)
            return METHODS[name](owner, *args, **named)
        if isinstance(owner, (list, tuple)):
            budget.read(owner, deep=True)  # it looks through its items
        if isinstance(__obj, LoopContext):
            args = tuple(_Counted(arg) for arg in args)  # a recursive loop goes over these
        else:
            budget.spend(CONTAINER + ITEM * len(args))  # a macro may keep its arguments as a tuple
            for arg in (*args, *named.values()):
                if isinstance(arg, (list, tuple, dict)):
                    budget.size(arg)
        result = super().call(__context, __obj, *args, **named)
        if isinstance(result, (type({}.items()), type({}.keys()), type({}.values()))):
            result = budget.listed(result)
        return budget.made(result)

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """What a template, a macro or a block wrote."""
        return str(current.get().made(joined(pieces)))

    # What _Metering puts into the template's code.

    @staticmethod
    def counted(values: Iterable[Any]) -> _Counted:
        return _Counted(values)

    @staticmethod
    def made(value: Any) -> Any:
        return value  # `call` accounts for every result

    @staticmethod
    def compared(value: Any) -> Any:
        budget = current.get()
        budget.step(16)
        budget.read(value, deep=True)
        return value

    @staticmethod
    def joined(*values: Any) -> str:
        return concat(*values)


def _added(left: str, right: str) -> str:
    if not (isinstance(left, Escaped) or isinstance(right, Escaped)):
        return joined((left, right))
    current.get().reserve(6 * (len(left) + len(right)))
    both = joined((escaped(left), escaped(right)))
    return Escaped(both, ownership(both))


@pass_context
def _output(context: Context, value: Any) -> str:
    """All output goes through here, into whichever buffer."""
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
        node.expr = _hook("compared", node.expr)
        for operand in node.ops:
            operand.expr = _hook("compared", operand.expr)
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
