"""The built-in chat templates against what each family was trained on, written out; and which one is chosen."""

from __future__ import annotations

import json

import pytest

from qwenrt.errors import RequestError
from qwenrt.text.chat.builtin_templates import TEMPLATES, family
from qwenrt.text.chat.template_format import TemplateFormat
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.template.sandbox import JinjaTemplate
from tests.text.bpe_vocab import load_json

COMPILED = {name: TemplateFormat(JinjaTemplate(source, name)) for name, source in TEMPLATES.items()}
HERMES = ("qwen2.5", "qwen2.5-math", "qwq", "qwen3", "qwen3-instruct", "qwen3-thinking")
DEFAULT_SYSTEM = {
    "qwen2": "You are a helpful assistant.",
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen2.5-math": "Please reason step by step, and put your final answer within \\boxed{}.",
}
HYBRID = ("qwen3.5", "qwen3.5-small", "qwen3.6", "qwen3.8")
OPENING = {"qwq": "<think>\n", "qwen3-thinking": "<think>\n"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city 天气 ",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name", "enum": ["Rome", "<b>"]}},
            "required": ["city"],
        },
    },
}
HERMES_BLOCK = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city 天气 ", \
"parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "its name", \
"enum": ["Rome", "<b>"]}}, "required": ["city"]}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
XML_BLOCK = """# Tools

You have access to the following functions:

<tools>
<function>
<name>get_weather</name>
<description>Weather of a city 天气</description>
<parameters>
<parameter>
<name>city</name>
<type>string</type>
<description>its name</description>
<enum>["Rome", "<b>"]</enum>
</parameter>
<required>["city"]</required>
</parameters>
</function>
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not \
tell the user about function calls
</IMPORTANT>"""


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(**arguments):
    return {"type": "function", "function": {"name": "get_weather", "arguments": json.dumps(arguments)}}


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_json(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def written(tokenizer):
    def prompt(name, messages, tools=None, **options):
        return tokenizer.decode(COMPILED[name].prompt(tokenizer, messages, tools, **options).token_ids)

    return prompt


def opening(name):
    return "<|im_start|>assistant\n" + OPENING.get(name, "")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in HYBRID])
def test_system_turns(written, name):
    default = turn("system", DEFAULT_SYSTEM[name]) if name in DEFAULT_SYSTEM else ""
    asked = turn("user", "你好 ")
    assert written(name, [user("你好 ")]) == default + asked + opening(name)
    assert written(name, [user("你好 ")], add_generation_prompt=False) == default + asked
    for text in ("Be brief. ", ""):
        given = [{"role": "system", "content": text}, user("你好 ")]
        assert written(name, given) == turn("system", text) + asked + opening(name)
    late = [user("a"), {"role": "system", "content": "s"}, user("b")]
    assert written(name, late) == (
        default + turn("user", "a") + turn("system", "s") + turn("user", "b") + opening(name)
    )


@pytest.mark.parametrize("name", HERMES)
def test_hermes_tools(written, name):
    default = {"qwq": "\n\n"}.get(name, f"{DEFAULT_SYSTEM[name]}\n\n" if name in DEFAULT_SYSTEM else "")
    asked = turn("user", "q") + opening(name)
    assert written(name, [user("q")], [WEATHER]) == turn("system", default + HERMES_BLOCK) + asked
    given = [{"role": "system", "content": "S"}, user("q")]
    assert written(name, given, [WEATHER]) == turn("system", f"S\n\n{HERMES_BLOCK}") + asked
    twice = HERMES_BLOCK.replace("</tools>\n", '{"name": "now"}\n</tools>\n')
    assert written(name, given, [WEATHER, {"name": "now"}]) == turn("system", f"S\n\n{twice}") + asked


@pytest.mark.parametrize("name", HERMES)
def test_hermes_calls_and_results(written, name):
    results = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": "雨\n"}]
    calls = [call(city="Rome"), call(city="罗马", days=[1, {"a": None}])]
    system = {"role": "system", "content": "S"}
    both = (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "get_weather", "arguments": {"city": "罗马", "days": [1, {"a": null}]}}\n</tool_call>'
    )
    answered = turn(
        "user",
        "<tool_response>\nsunny\n</tool_response>\n<tool_response>\n雨\n\n</tool_response>",
    )
    for content, before in (("I look.", "I look.\n"), (None, ""), ("", "")):
        messages = [system, user("q"), assistant(content, tool_calls=calls), *results]
        assert written(name, messages) == (
            turn("system", "S")
            + turn("user", "q")
            + turn("assistant", before + both)
            + answered
            + opening(name)
        )


def test_coder_tools_calls_and_results(written):
    own = "You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks."
    asked = turn("user", "q")
    prompt = written("qwen3-coder", [user("q")], [WEATHER])
    assert prompt == turn("system", f"{own}\n\n{XML_BLOCK}") + asked + opening("")
    results = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": "雨"}]
    calls = [call(city="Rome", days=3, plain=True), call(city=["罗马", 1]), call()]
    messages = [user("q"), assistant(" I look. ", tool_calls=calls), *results, assistant("Fine."), user("z")]
    assert written("qwen3-coder", messages) == (
        asked
        + turn(
            "assistant",
            "I look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n<parameter=plain>\nTrue\n</parameter>\n</function>\n</tool_call>\n"
            '<tool_call>\n<function=get_weather>\n<parameter=city>\n["罗马", 1]\n</parameter>\n</function>\n'
            "</tool_call>\n<tool_call>\n<function=get_weather>\n</function>\n</tool_call>",
        )
        + turn("user", "<tool_response>\nsunny\n</tool_response>\n<tool_response>\n雨\n</tool_response>\n")
        + turn("assistant", "Fine.")
        + turn("user", "z")
        + opening("")
    )


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking"])
def test_thoughts_are_dropped_before_the_last_query_and_kept_after_it(written, name):
    old = [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c")]
    assert written(name, old) == turn("user", "a") + turn("assistant", "b") + turn("user", "c") + opening(
        name
    )
    old[1] = assistant("b", reasoning_content="hm")
    assert written(name, old) == turn("user", "a") + turn("assistant", "b") + turn("user", "c") + opening(
        name
    )
    result = {"role": "tool", "content": "r"}
    said = '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'
    for message in (
        assistant("\n\nb", reasoning_content="\nhm\n\n", tool_calls=[call()]),
        assistant("<think>\nhm\n</think>\n\nb", tool_calls=[call()]),
    ):
        assert written(name, [user("a"), message, result]) == (
            turn("user", "a")
            + turn("assistant", f"<think>\nhm\n</think>\n\nb\n{said}")
            + turn("user", "<tool_response>\nr\n</tool_response>")
            + opening(name)
        )
    plain = [user("a"), assistant("b", tool_calls=[call()]), result]
    assert f"assistant\nb\n{said}<|im_end|>" in written(name, plain)
    closed = written(name, [user("a"), assistant("b")], add_generation_prompt=False)
    assert closed == turn("user", "a") + turn("assistant", "<think>\n\n</think>\n\nb")


def test_qwq_drops_all_thoughts_and_the_others_none(written):
    messages = [user("a"), assistant("<think>\nhm\n</think>\n\nb", tool_calls=[call()]), user("c")]
    assert "assistant\nb\n<tool_call>" in written("qwq", messages)
    for name in ("qwen2.5", "qwen3-instruct", "qwen3-coder"):
        assert "assistant\n<think>\nhm\n</think>\n\nb" in written(name, messages)


def test_the_switch(written):
    begun = turn("user", "a") + "<|im_start|>assistant\n"
    assert written("qwen3", [user("a")], enable_thinking=False) == begun + "<think>\n\n</think>\n\n"
    assert written("qwen3", [user("a")], enable_thinking=True) == begun


def test_hybrid_models(written):
    """Every text trimmed, tools as JSON before the system text, calls as XML, and thoughts after the last query, always
    with their tags."""
    rules = XML_BLOCK.partition("</tools>")[2]
    listed = json.dumps(WEATHER, ensure_ascii=False)
    block = f"# Tools\n\nYou have access to the following functions:\n\n<tools>\n{listed}\n</tools>{rules}"
    begun = "<|im_start|>assistant\n"
    system, asked = {"role": "system", "content": " S "}, turn("user", "q")
    for name, thinks in (("qwen3.5", True), ("qwen3.5-small", False)):
        prompt = turn("system", "S") + asked + begun
        closed, opened = "<think>\n\n</think>\n\n", "<think>\n"
        assert written(name, [system, user(" q\n")]) == prompt + (opened if thinks else closed)
        assert written(name, [user("q")], enable_thinking=False) == asked + begun + closed
        assert written(name, [user("q")], enable_thinking=True) == asked + begun + opened
        assert written(name, [user("q")], [WEATHER]).startswith(turn("system", block) + asked)
        given = written(name, [system, user("q")], [WEATHER])
        assert given.startswith(turn("system", f"{block}\n\nS") + asked)
    results = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": " 雨"}]
    calls = [call(city="Rome"), call(days=[1])]
    said = (
        "I look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n"
        "</tool_call>\n"
        "<tool_call>\n<function=get_weather>\n<parameter=days>\n[1]\n</parameter>\n</function>\n</tool_call>"
    )
    answered = turn("user", "<tool_response>\nsunny\n</tool_response>\n<tool_response>\n雨\n</tool_response>")
    old = [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("q")]
    now = assistant("I look.", reasoning_content=" so ", tool_calls=calls)
    before = turn("user", "a") + turn("assistant", "b") + asked
    assert written("qwen3.5", [*old, now, *results]) == (
        before + turn("assistant", f"<think>\nso\n</think>\n\n{said}") + answered + begun + "<think>\n"
    )
    plain = written("qwen3.5", [user("q"), assistant("b")], add_generation_prompt=False)
    assert plain == asked + turn("assistant", "<think>\n\n</think>\n\nb")
    for refused in ([user("a"), system, user("b")], [system, assistant("b")]):
        with pytest.raises(RequestError):
            written("qwen3.5", refused)


def test_what_changed_with_3_6_and_3_8(written):
    """Arguments in JSON; then an effort that the system turn begins with, and old thoughts that stay."""
    said = [user("q"), assistant("", tool_calls=[call(plain=True, days=3)])]
    for name, word in (("qwen3.5", "True"), ("qwen3.6", "true"), ("qwen3.8", "true")):
        assert f"<parameter=plain>\n{word}\n</parameter>\n<parameter=days>\n3\n</p" in written(name, said)
    xhigh = (
        "Reasoning effort is set to xhigh. Please think carefully through the task, validate key assumptions, consider "
        "plausible alternatives, and prioritize correctness, consistency, and clarity in the final answer."
    )
    low = (
        "Reasoning effort is set to low. Keep your thinking brief and focused, moving directly to the conclusion "
        "without unnecessary elaboration."
    )
    asked, begun = turn("user", "q"), "<|im_start|>assistant\n<think>\n"
    system = {"role": "system", "content": " S "}
    for effort, told in ((None, xhigh), ("xhigh", xhigh), ("low", low)):
        given = {} if effort is None else {"reasoning_effort": effort}
        assert written("qwen3.8", [user("q")], **given) == turn("system", told) + asked + begun
        assert written("qwen3.8", [system, user("q")], **given).startswith(turn("system", f"{told}\n\nS"))
        tools = written("qwen3.8", [system, user("q")], [WEATHER], **given)
        assert tools.startswith(f"<|im_start|>system\n{told}\n\n# Tools\n\n") and "\n\nS<|im_end|>" in tools
    assert written("qwen3.8", [user("q")], reasoning_effort="medium") == asked + begun
    assert (
        written("qwen3.8", [{**system, "content": " "}, user("q")], reasoning_effort="medium")
        == asked + begun
    )
    silent = written("qwen3.8", [system, user("q")], enable_thinking=False)
    assert silent == turn("system", "S") + asked + begun + "\n</think>\n\n"
    old = [user("a"), assistant("b", reasoning_content=" hm\n"), user("q")]
    kept, gone = (turn("assistant", f"{thought}b") for thought in ("<think>\nhm\n</think>\n\n", ""))
    assert (
        kept in written("qwen3.8", old)
        and gone in written("qwen3.6", old)
        and kept not in written("qwen3.6", old)
    )
    assert COMPILED["qwen3.8"].efforts == ("low", "medium", "xhigh") and not COMPILED["qwen3.6"].efforts


def test_styles():
    none, hermes = ReplyFormat("none", "none"), ReplyFormat("hermes", "none")
    assert {name: made.reply_format for name, made in COMPILED.items()} == {
        "qwen2": none,
        "qwen2.5": hermes,
        "qwen2.5-math": hermes,
        "qwq": ReplyFormat("hermes", "open"),
        "qwen3": ReplyFormat("hermes", "hybrid"),
        "qwen3-instruct": hermes,
        "qwen3-thinking": ReplyFormat("hermes", "open"),
        "qwen3-coder": ReplyFormat("xml", "none"),
        "qwen3.5": ReplyFormat("xml", "open"),
        "qwen3.5-small": ReplyFormat("xml", "hybrid"),
        "qwen3.6": ReplyFormat("xml", "open"),
        "qwen3.8": ReplyFormat("xml", "open"),
    }


TOOL_TOKENS = {"added_tokens": {"<tool_call>": 3}}
THOUGHT_TOKENS = {"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "<think>"}}}}
LATE = {"config": {"max_position_embeddings": 262144}}


@pytest.mark.parametrize(
    ("model_type", "name", "files", "chosen"),
    [
        ("qwen2", "m", {}, "qwen2"),
        ("qwen2_moe", "m", {}, "qwen2"),
        ("qwen2", "m", TOOL_TOKENS, "qwen2.5"),
        ("qwen2", "Qwen2.5-Math-7B", TOOL_TOKENS, "qwen2.5-math"),
        ("qwen2", "m", {**TOOL_TOKENS, "config": {"max_position_embeddings": 4096, "rope_theta": 1e4}}, "qwen2.5-math"),
        ("qwen2", "m", {**TOOL_TOKENS, "config": {"max_position_embeddings": 4096, "rope_theta": 1e6}}, "qwen2.5"),
        ("qwen2", "m", {**TOOL_TOKENS, **THOUGHT_TOKENS}, "qwq"),
        ("qwen2", "QwQ-32B", TOOL_TOKENS, "qwq"),
        ("qwen3", "m", {}, "qwen3"),
        ("qwen3_moe", "m", {"config": {"max_position_embeddings": 40960}}, "qwen3"),
        ("qwen3", "m", {**LATE, "generation_config": {"temperature": 0.6}}, "qwen3-thinking"),
        ("qwen3", "m", {**LATE, "generation_config": {"temperature": 0.7}}, "qwen3-instruct"),
        ("qwen3_moe", "m", {**LATE, "generation_config": {"repetition_penalty": 1.05}}, "qwen3-coder"),
        ("qwen3_moe", "Qwen3-Coder-30B-A3B-Instruct", {}, "qwen3-coder"),
        ("qwen3", "Qwen3-4B-Thinking-2507", {}, "qwen3-thinking"),
        ("qwen3_next", "m", {**LATE, "generation_config": {"temperature": 0.6}}, "qwen3-thinking"),
        ("qwen3_5", "m", {"config": {"text_config": {"num_hidden_layers": 24}}}, "qwen3.5-small"),
        ("qwen3_5_text", "m", {"config": {"num_hidden_layers": 32}}, "qwen3.5"),
        ("qwen3_5_moe", "m", {"config": {"text_config": {"num_hidden_layers": 4}}}, "qwen3.5"),
        ("qwen3_5", "Qwen3.6-27B", {}, "qwen3.6"),
        ("qwen3_5", "models--Qwen--Qwen3.8-27B-FP8/snapshots/abc", {}, "qwen3.8"),
        ("qwen3", "models--Qwen--Qwen3-4B-Instruct-2507/snapshots/abc", {}, "qwen3-instruct"),
    ],
)  # fmt: skip
def test_which_template_is_chosen(tmp_path, model_type, name, files, chosen):
    directory = tmp_path / name
    directory.mkdir(parents=True)
    for file, content in files.items():
        (directory / f"{file}.json").write_text(json.dumps(content))
    assert family(directory, model_type) == chosen
