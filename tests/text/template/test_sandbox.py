"""The sandbox of chat templates: what they may do, what they may not, and how much of it."""

from __future__ import annotations

import threading
import time
import tracemalloc

import pytest

from qwenrt.errors import ConfigError, QwenrtError, RequestError
from qwenrt.text.template.sandbox import MAX_SOURCE_CHARS, JinjaTemplate

GROW = "{% set ns = namespace(s='a' * 1000, l=[1]) %}{% for i in range(200) %}"


def render(source, **variables):
    return JinjaTemplate(source, "a template").render(variables)


# ---- what templates use


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{% for m in messages %}\n  {{- m.role ~ m['content'] }}\n{% endfor %}\n{% if 1 %}\nend{% endif %}",
            "user hé<b> \nend",
        ),
        ("{{ messages | tojson }}", '[{"role": "user", "content": " hé<b> "}]'),
        ("{{ {'b': 1, 'a': '\\u4f60'} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": "你"\n}'),
        ("{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true, sort_keys=true) }}", '{"a": "\\u00e9", "b": 1}'),
        ("{% set ns = namespace(x=1) %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}", "4"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}", "1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{{ loop.length }}{{ loop.last }}{% endfor %}", "a11True"),
        ("{% for k, v in {'a': 1} | items %}{{ k ~ v }}{% endfor %}{{ {'a': 1}.get('b', 2) }}", "a12"),
        ("{{ 'a</think>\n\nb'.split('</think>')[-1].lstrip('\n') }}{{ 'abc'.startswith(('x', 'a')) }}", "bTrue"),
        ("{{ ('a' if x is defined else 'b') ~ (x is none) ~ ('a' is string) ~ ([] is mapping) }}", "bFalseTrueFalse"),
        (
            "{{ '%s-%02d' % ('a', 3) }}{{ '%s' | format('b') }}{{ [1, 2] | join(', ') }}{{ 'x' | replace('x', 'y') }}",
            "a-03b1, 2y",
        ),
        (
            "{{ messages[::-1][0].role }}{{ messages[1:] }}{{ (messages | first).role | upper }}{{ [3, 1] | sort }}",
            "user[]USER[1, 3]",
        ),
        ("{% macro f(a, b='!') %}{{ a ~ b }}{% endmacro %}{{ f('x') + f('y', '?') }}", "x!y?"),
        (
            "{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ x | length }}{{ ' b ' | trim }}{{ none | default('c', true) }}",
            "a12bc",
        ),
        ("{% generation %}a{{ 1 }}{% endgeneration %}", "a1"),
        ("{{ '<' ~ ({'a': '<'} | tojson | safe) ~ '>' }}{{ '<' + ('<' | safe) }}", '<{"a": "<"}>&lt;<'),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a\nb' | indent(2) }}", "1a\n  b"),
        ("{% for x in [[1, [2]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}", "12"),
        (
            "{{ range(3) | list }}{{ 7 // 2 }}{{ 2 ** 3 }}{{ -1 }}{{ 'a' * 3 }}{{ [1] + [2] }}{{ 1.5 | round }}",
            "[0, 1, 2]38-1aaa[1, 2]2.0",
        ),
        (
            "{{ '{0.__class__}'.format(1) }}{{ '{a}'.format_map({'a': 1}) }}{{ '{}{:>3}'.format('b', 7) }}",
            "1b  7",
        ),
        ("{{ undefined_name }}{{ messages[0].nothing }}{{ strftime_now('%%') }}", "%"),
    ],
)  # fmt: skip
def test_what_templates_use(source, text):
    assert render(source, messages=[{"role": "user", "content": " hé<b> "}]) == text


def test_the_templates_own_refusal_is_told_in_its_words():
    with pytest.raises(RequestError, match="the chat template: only \\['user'\\] may speak"):
        render("{{ raise_exception('only ' ~ roles ~ ' may speak') }}", roles=["user"])


def test_one_template_many_threads():
    template = JinjaTemplate("{% for i in range(200) %}{{ x }}{% endfor %}", "a template")
    results = {}

    def work(name):
        results[name] = {template.render({"x": name}) for _ in range(10)}

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: {name * 200} for name in "abcd"}


# ---- what they may not


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{% include 'x' %}", "it has {% include %} in line 1"),
        ("{% import 'x' as y %}", "it has {% import %}"),
        ("{% from 'x' import y %}", "it has {% fromimport %}"),
        ("a\n{% extends '/etc/passwd' %}", "it has {% extends %} in line 2"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "it has {% block %}"),
        ("{{ 'a' | random }}", "No filter named 'random'"),
        ("{{ 'a' | urlize }}", "No filter named 'urlize'"),
        ("{{ x is prime }}", "No test named 'prime'"),
        ("{{", "unexpected 'end of template' (line 1)"),
        ("{% if %}", "line 1"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{{ a" + ".b" * 8000 + " }}", "RecursionError"),
        ("{% for a in b %}" * 50 + "{% endfor %}" * 50, "too many statically nested blocks"),
        ("{{ " + "9" * 5000 + " }}", "4300 digits"),
        ("{{ a }}" * 20_000, "more than 30000 parts"),
        ("x" * (MAX_SOURCE_CHARS + 1), "1048577 characters, at most 1048576 are read"),
    ],
)
def test_refused_when_read(source, found):
    with pytest.raises(ConfigError) as error:
        JinjaTemplate(source, "dir/chat_template.jinja")
    assert found in str(error.value)
    assert "dir/chat_template.jinja" in error.value.asked and error.value.remedy


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ [''] | map(attribute='__class__') | map(attribute='__mro__') | list }}",
        "{{ raise_exception.__globals__['x'] }}",
        "{{ messages.append(1) }}",
        "{{ {}.update(a=1) }}",
        "{{ {}.setdefault('a', 1) }}",
        "{{ 'a'.encode() }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ 'a'.zfill(10 ** 9) }}",
        "{{ ('a' | attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ '{:.999999999f}'.format(1.5) }}",
        "{{ '{a:>99999999999}'.format_map({'a': 1}) }}",
        "{{ lipsum() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ range }}",
        "{{ 'a'.upper }}",
        "{{ namespace() }}",
        "{% set ns = namespace() %}{% set ns.a = [ns] %}",
        "{{ [messages, raise_exception] }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ 1 / 0 }}",
        "{{ messages.nothing.more }}",
        "{{ 'a' + 1 }}",
        "{{ messages() }}",
    ],
)
def test_refused_when_rendered(source):
    with pytest.raises(RequestError) as error:
        render(source, messages=["a"])
    assert error.value.remedy and " at 0x" not in str(error.value)


def test_an_unsafe_attribute_is_nothing():
    assert (
        render("{{ ''.__class__ }}{{ ''['__class__'] }}{{ ('' | map(attribute='__doc__') | list) }}") == "[]"
    )


# ---- how much

HOSTILE = {
    "long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "longer range": "{% for i in range(10 ** 30) %}{% endfor %}",
    "nested loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "loops over text": "{% set s = 'a' * 1000000 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "text times": "{{ 'a' * 10 ** 10 }}",
    "times text": "{{ 10 ** 10 * 'a' }}",
    "list times": "{{ [1] * 10 ** 9 }}",
    "list of long texts times": "{% set s = 'a' * 1000000 %}{{ [s] * 100000 == ['b'] }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "powers": "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "width of %": "{{ '%1000000000d' % 1 }}",
    "star of %": "{{ '%*d' % (1000000000, 1) }}",
    "precision of %": "{{ '%.1000000000f' % 1 }}",
    "width of format": "{{ '%1000000000d' | format(1) }}",
    "repeats of %": "{% set s = 'a' * 1000000 %}{% for i in range(99) %}{{ ('%(s)s' * 99999) % {'s': s} }}{% endfor %}",
    "replace": GROW + "{% set ns.s = ns.s | replace('a', 'aaaa') %}{% endfor %}",
    "str.replace": GROW + "{% set ns.s = ns.s.replace('a', 'aaaa') %}{% endfor %}",
    "replace nothing": GROW + "{% set ns.s = ns.s.replace('', ns.s) %}{% endfor %}",
    "join": GROW + "{% set ns.s = [ns.s, ns.s] | join(ns.s) %}{% endfor %}",
    "str.join": GROW + "{% set ns.s = ns.s.join(ns.s) %}{% endfor %}",
    "concat": GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "plus": GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "plus of lists": GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "captured": GROW + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "captured data": "{% set x %}{% for i in range(9999) %}" + "a" * 100_000 + "{% endfor %}{% endset %}",
    "shared lists": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "shared tuples": GROW + "{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ {ns.l: 1} }}",
    "shared objects": GROW + "{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l | tojson }}",
    "shared by dict": GROW + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}",
    "shared arguments":
        "{% macro m() %}{% set ns.l = varargs %}{% endmacro %}" + GROW + "{{ m(ns.l, ns.l) }}{% endfor %}",
    "deep lists": "{% set ns = namespace(l=1) %}{% for i in range(9999) %}{% set ns.l = [ns.l] %}{% endfor %}",
    "macro for ever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "macro doubling": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + GROW + "{% set ns.s = m(ns.s) %}{% endfor %}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "output": "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "slow search": "{{ ('a' * 2000000).rfind('b' ~ 'a' * 1000000) }}",
    "slow splits": "{% set s = 'a' * 1000000 %}{% for i in range(999) %}{{ s.rsplit('b' ~ s[9:]) }}{% endfor %}",
    "comparisons":
        "{% set s = 'a' * 1000000 %}{% set t = s[1:] ~ 'b' %}{% for i in range(99999) %}{{ s == t }}{% endfor %}",
    "list of text": "{{ ('a' * 4000000) | list }}",
    "split": "{{ ('a ' * 2000000).split() }}",
    "splitlines": "{{ ('\n' * 4000000).splitlines() }}",
    "sorting":
        "{% set l = range(90000) | list %}{% for i in range(9999) %}{{ l | sort(reverse=true) | first }}{% endfor %}",
    "many variables": GROW + "{% set ns.s = 'a' * 4000000 %}{% set ns.l = [ns.l, ns.s] %}{% endfor %}",
    "indent of json": "{{ [1] | tojson(indent=10 ** 9) }}",
    "separators of json": "{{ ([1] * 1000) | tojson(separators=('a' * 100000, ':')) }}",
    "indent": "{{ 'a' | indent(10 ** 9) }}",
    "round": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "batch": "{{ [1] | batch(10 ** 9, 1) | list }}",
    "slice": "{{ [1] | slice(10 ** 9) | list }}",
    "width of a named %": "{{ '%(a)999999999d' % {'a': 1} }}",
    "precision of a named %": "{{ '%(a).999999999d' % {'a': 1} }}",
    "precision of the filter format": "{{ '%.999999999d' | format(1) }}",
    "width of braces": "{{ '{:>999999999}'.format('a') }}{{ '{:{}}'.format('a', 10 ** 9) }}",
    "many widths": "{{ ('%99999d' * 900) % ((1,) * 900) }}",
    "rsplit by keyword":
        "{% set s = 'a' * 1000000 %}{% for i in range(999) %}{{ s.rsplit(sep='b' ~ s[9:]) }}{% endfor %}",
    "trim of many": "{{ ('a' * 2000000) | trim('b' * 1000000 ~ 'a') }}",
    "strip of many": "{{ ('a' * 2000000).strip('b' * 1000000 ~ 'a') }}",
    "splits kept": "{% set s = 'a' * 1000000 %}" + GROW + "{% set ns.l = [ns.l, s.split('b')] %}{% endfor %}",
    "sum of lists": "{{ [[1]] * 40000 | sum(start=[]) }}{{ ([[1]] * 40000) | sum(start=[]) | length }}",
    "keys in one place": "{{ dict([[2 ** 61 - 1, 1]]) }}",
    "numbers in one place": "{{ range(0, 10 ** 24, 2 ** 61 - 1) | list | unique | list }}",
    "wordwrap": "{{ ('a' * 1000000) | wordwrap(9) }}",
    "comments": "{% for i in range(9999) %}{{ ('<!--' * 200000) | striptags }}{% endfor %}",
    "tabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "empty lists":
        GROW + "{% for j in range(9999) %}{% set ns.l = [ns.l, []] %}{% set ns.l = [] %}{% endfor %}{% endfor %}",
    "pprint": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | pprint }}",
    "number in a range": "{{ 1.5 in range(10 ** 9) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_quickly_and_small(name):
    tracemalloc.start()
    start = time.thread_time()
    try:
        with pytest.raises(QwenrtError) as error:
            render(HOSTILE[name], messages=[{"role": "user", "content": "hi"}])
        seconds = time.thread_time() - start
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error.value.remedy
    assert seconds < 6  # about 2 on a slow machine; tracemalloc triples it
    assert peak < 120e6


def test_limits_grow_with_the_conversation():
    body = "{{ m.content.split('x')[0].strip() }}{{ messages[loop.index0].content }}"
    source = "{% for m in messages %}" + body + "{% endfor %}"
    contents = ["你好" * 200_000, *(["hello"] * 20_000)]
    text = render(source, messages=[{"role": "user", "content": c} for c in contents])
    assert len(text) == 2 * sum(map(len, contents))
    with pytest.raises(RequestError, match="it makes more than"):
        render("{% for i in range(100) %}{{ messages | tojson }}{% endfor %}", messages=contents)


def test_values_that_are_not_data_are_refused():
    with pytest.raises(RequestError, match="it uses a object as a value"):
        render("", x=object())
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RequestError, match="more than 100 deep"):
        render("", x=deep)


def test_what_jinja2_refuses_to_indent_is_refused() -> None:
    with pytest.raises(RequestError, match="indent of int"):
        JinjaTemplate("{{ ('a b' | wordcount) | indent(3) }}", "a template").render({})
