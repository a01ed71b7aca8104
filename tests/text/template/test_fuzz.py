"""Templates made at random: tame ones write what transformers writes, all others stay within their bounds."""

from __future__ import annotations

import random
import re
import time
import tracemalloc

import pytest
from transformers.utils.chat_template_utils import render_jinja_template  # noqa: TID251

from qwenrt.errors import QwenrtError
from qwenrt.text.template.provenance import masked
from qwenrt.text.template.sandbox import JinjaTemplate
from tests.text.template.fuzz import Writer

OWN_LETTERS = re.compile("[\U0001d400-\U0001d433]")  # mathematical letters: no template here writes them


def conversation(times: int = 1) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": "hi <b> \ue000 你 ß\n x" * times},
            {"role": "assistant", "content": " <think>𝐱</think>\n\tz\u0301 <|im_end|>" * times},
        ],
        "data": {"k": ["<", {"a": "\"&'"}], "n": None},
    }


def compare_with_transformers(seed: int) -> bool:
    """Whether both wrote a text. Where both do it is the same, and where one refuses so does the other."""
    source, given = Writer(random.Random(seed), tame=True).template(), conversation()
    try:
        wanted = render_jinja_template([given["messages"]], chat_template=source, data=given["data"])[0][0]
    except Exception as error:  # a template may fail in any way
        wanted = error
    try:
        found: object = JinjaTemplate(source, f"template {seed}").render(given)
    except QwenrtError as error:
        found = error
    if isinstance(wanted, str):
        assert found == wanted, source
        assert not OWN_LETTERS.search(masked(str(found))), source
    else:
        assert isinstance(found, QwenrtError), f"{source}\n{wanted!r}"
    return isinstance(wanted, str)


def end_within_bounds(seed: int, times: int, traced: bool = True) -> None:
    """About 1.5 s and 20 MB for a short conversation; for none more than 10 s (tracing triples it) and 400 MB."""
    source = Writer(random.Random(seed), tame=False).template()
    if traced:
        tracemalloc.start()
    start = time.thread_time()
    try:
        JinjaTemplate(source, f"template {seed}").render(conversation(times))
    except QwenrtError as error:
        assert error.remedy and len(str(error)) < 800
    finally:
        seconds, peak = time.thread_time() - start, tracemalloc.get_traced_memory()[1] if traced else 0
        tracemalloc.stop()
    assert seconds < (6 if times == 1 else 30) and peak < (150e6 if times == 1 else 450e6), source


def test_tame_templates_write_what_transformers_writes() -> None:
    assert sum(map(compare_with_transformers, range(100))) > 25


def test_hostile_templates_end_quickly_and_small() -> None:
    for seed in range(100):
        end_within_bounds(seed, 1, traced=seed % 10 == 0)


@pytest.mark.slow
def test_ten_thousand_templates() -> None:
    assert sum(map(compare_with_transformers, range(1000, 6000))) > 1200
    for seed in range(1000, 6000):
        end_within_bounds(seed, 1)


@pytest.mark.slow
@pytest.mark.parametrize("times", [3_000, 300_000])
def test_the_bounds_do_not_grow_with_the_conversation(times: int) -> None:
    for seed in range(6000, 6150):
        end_within_bounds(seed, times)
