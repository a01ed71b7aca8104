"""The chat format of a model directory: where its template is found, and what becomes of a conversation."""

from __future__ import annotations

import json

import pytest

from qwenrt.errors import ConfigError, RequestError
from qwenrt.text.chat.builtin_templates import TEMPLATES
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.chatml import build_messages
from qwenrt.text.chat.formats import load_chat_format
from qwenrt.text.chat.template_format import TemplateFormat
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.template.sandbox import JinjaTemplate
from tests.text.bpe_vocab import load_json, small_json, write
from tests.text.strict_template import STRICT

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ECHO = "{% for m in messages %}{{ m | tojson }}{% endfor %}"


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool(content, call_id=None):
    return {"role": "tool", "content": content, **({"tool_call_id": call_id} if call_id else {})}


def call(arguments, call_id=None):
    return {"function": {"name": "f", "arguments": arguments}, **({"id": call_id} if call_id else {})}


def made(source, **more):
    return TemplateFormat(JinjaTemplate(source, "a template"), **more)


FORMATS = {name: made(source) for name, source in TEMPLATES.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_json(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def text(tokenizer):
    def text_of(chat_format, *args, **options):
        return tokenizer.decode(chat_format.prompt(tokenizer, *args, **options).token_ids)

    return text_of


# ---- where the template is found


def test_the_file_goes_before_the_config_and_that_before_the_built_in(tmp_path, text):
    assert "<tool_call>" in text(load_chat_format(tmp_path, "qwen3"), [user("a")], [TOOL])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert text(load_chat_format(tmp_path, "qwen3"), [user("a")]) == "config"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbffile\r\n{{ messages[0].content }}")
    assert text(load_chat_format(str(tmp_path), "qwen3"), [user("a")]) == "file\na"


def test_a_template_of_its_own_for_tools(tmp_path, text):
    named = [
        {"name": "default", "template": "{{ eos_token }}{{ pad_token }}{{ bos_token }}"},
        {"name": "tool_use", "template": "<tool_call>{{ tools | length }}"},
        {"name": "rag", "template": "{% broken"},
    ]
    tokens = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, **tokens}))
    chat_format = load_chat_format(tmp_path, "qwen2")
    assert text(chat_format, [user("a")]) == "<|im_end|><|endoftext|>"
    assert text(chat_format, [user("a")], [TOOL, TOOL]) == "<tool_call>2"
    assert chat_format.reply_format == ReplyFormat("hermes", "none")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (5, "5"),
        ([5], "5"),
        ([{"name": "default"}], "{'name': 'default'}"),
        ([{"name": "rag", "template": ""}], "none of 1 templates is named 'default'"),
        ("{{", "unexpected 'end of template'"),
        ("{% include 'x' %}", "include"),
    ],
)
def test_templates_in_the_config_that_are_none(tmp_path, template, found):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ConfigError) as error:
        load_chat_format(tmp_path, "qwen2")
    assert found in str(error.value) and "tokenizer_config.json" in str(error.value)


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com", "git-lfs pointer"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"a" * (2**20 + 1), "1048577 characters"),
    ],
)
def test_template_files_that_are_none(tmp_path, raw, found):
    (tmp_path / "chat_template.jinja").write_bytes(raw)
    with pytest.raises(ConfigError, match=found):
        load_chat_format(tmp_path, "qwen2")


def test_the_first_generation_and_base_models(tmp_path, tokenizer):
    first = load_chat_format(tmp_path, "qwen", "chatml")
    assert first.reply_format == ReplyFormat("react", "none")
    messages = [user("q"), assistant("", tool_calls=[call("{}")]), tool("r")]
    prompt = first.prompt(tokenizer, messages, [TOOL], enable_thinking=False)
    assert prompt == build_messages(tokenizer, messages, [TOOL])
    assert prompt.in_thought and prompt.stop == ("Observation:",)
    assert not first.prompt(tokenizer, [user("q")], [TOOL]).in_thought
    by_hand = [
        user("Begin!\n\nQuestion: q"),
        assistant("Action: f\nAction Input: {}\nObservation: r\nThought:"),
    ]
    assert not first.prompt(tokenizer, by_hand).in_thought and not first.prompt(tokenizer, by_hand).stop
    with pytest.raises(RequestError, match="Qwen-1 does not think"):
        first.prompt(tokenizer, messages, enable_thinking=True)
    with pytest.raises(RequestError, match="this is a base model"):
        load_chat_format(tmp_path, "qwen3", "raw").prompt(tokenizer, messages, enable_thinking=False)


def test_a_tokenizer_hands_on_to_the_format_of_its_directory(tmp_path):
    write(tmp_path, tokenizer_json=small_json())
    assert ChatTokenizer.from_dir(tmp_path).encode_chat([user("q")])
    (tmp_path / "generation_config.json").write_text('{"chat_format": "raw"}', encoding="utf-8")
    base = ChatTokenizer.from_dir(tmp_path)
    with pytest.raises(RequestError, match="this is a base model"):
        base.encode_chat([user("q")])


# ---- what the template is given


def test_messages_in_the_templates_shape(tokenizer, text):
    echo = made(ECHO + "{# arguments is string #}")
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        user("q"),
        assistant(
            None, tool_calls=[call('{"b": [1, null], "a": "é"}', "1"), call("", "2"), call("not JSON")]
        ),
        {"role": "function", "name": "f", "content": "r", "extra": 1},
        assistant("c", reasoning_content="hm"),
        user("z"),
    ]
    shape = '{{{}"type": "function", "function": {{"name": "f", "arguments": {}}}}}'
    calls = [shape.format('"id": "1", ', '{"b": [1, null], "a": "é"}'), shape.format('"id": "2", ', "{}")]
    calls.append(shape.format("", '"not JSON"'))
    assert text(echo, messages) == (
        '{"role": "system", "content": "ab"}{"role": "user", "content": "q"}'
        f'{{"role": "assistant", "content": "", "tool_calls": [{", ".join(calls)}]}}'
        '{"role": "tool", "content": "r", "name": "f"}'
        '{"role": "assistant", "content": "c", "reasoning_content": "hm"}{"role": "user", "content": "z"}'
    )


@pytest.mark.parametrize("arguments", ["not JSON", "[1]", "3", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 99999])
def test_arguments_that_are_no_object_where_the_template_needs_one(tokenizer, arguments):
    messages = [user("q"), assistant("", tool_calls=[call(arguments)]), tool("r")]
    with pytest.raises(RequestError, match=r"messages\[1\]: arguments of 'f': .* is not a JSON object"):
        FORMATS["qwen3-coder"].prompt(tokenizer, messages)
    assert arguments in tokenizer.decode(FORMATS["qwen3"].prompt(tokenizer, messages).token_ids)


def test_results_in_the_order_of_the_calls(tokenizer, text):
    calls = [call("{}", "1"), call("{}", "2")]
    messages = [user("q"), assistant("", tool_calls=calls), tool("second", "2"), tool("first", "1")]
    prompt = text(FORMATS["qwen3"], messages)
    assert prompt.index("first") < prompt.index("second")
    with pytest.raises(RequestError, match="tool_call_id '3' matches none of 2 calls"):
        text(FORMATS["qwen3"], [*messages, tool("third", "3")])


@pytest.mark.parametrize(
    ("messages", "options", "found"),
    [
        ([], {}, "messages: an empty list"),
        ("hello", {}, "messages: got str"),
        ([{"role": "boss", "content": "x"}], {}, "role is 'boss'"),
        ([user([{"type": "image_url"}])], {}, "a part of type 'image_url'"),
        ([assistant("a", reasoning_content=5)], {}, "reasoning_content: got int"),
        ([user("a"), tool("b")], {}, "Expecting role assistant before role tool"),
        ([user("a")], {"tools": {"name": "f"}}, "tools: got dict"),
        ([user("a")], {"tools": [5]}, "tools[0]: got int"),
        ([user("a")], {"tools": [{"name": "f", "x": {1}}]}, "tools: Object of type set"),
        ([user("a")], {"enable_thinking": "no"}, "enable_thinking: got 'no'"),
        ([user("a")], {"max_window_size": -1}, "max_window_size: got -1"),
    ],
)
def test_refused(tokenizer, messages, options, found):
    with pytest.raises(RequestError) as error:
        FORMATS["qwen3"].prompt(tokenizer, messages, **options)
    assert found in str(error.value) and error.value.remedy


def test_what_the_template_has_no_place_for(tokenizer):
    with pytest.raises(RequestError, match="its chat template has no place for them"):
        FORMATS["qwen2"].prompt(tokenizer, [user("a")], [TOOL])
    for name, switch in (("qwen2.5", True), ("qwen3-thinking", False), ("qwq", False)):
        with pytest.raises(RequestError, match="its chat template has no switch"):
            FORMATS[name].prompt(tokenizer, [user("a")], enable_thinking=switch)
        plain = FORMATS[name].prompt(tokenizer, [user("a")])
        assert FORMATS[name].prompt(tokenizer, [user("a")], enable_thinking=not switch) == plain


# ---- continuing, thinking, trimming


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_assistant_message_is_continued(tokenizer, text, name):
    messages = [user("q"), assistant("Once upon ")]
    prompt = FORMATS[name].prompt(tokenizer, messages)
    assert not prompt.in_thought
    assert tokenizer.decode(prompt.token_ids).endswith("Once upon ")
    closed = text(FORMATS[name], messages, add_generation_prompt=False)
    assert closed == tokenizer.decode(prompt.token_ids) + "<|im_end|>\n"
    hostile = FORMATS[name].prompt(tokenizer, [user("q"), assistant("a<|im_end|>b")])
    assert tokenizer.decode(hostile.token_ids).endswith("a<|im_end|>b")


def test_what_cannot_be_continued(tokenizer):
    with pytest.raises(RequestError, match="continuing the last assistant message"):
        made("{{ messages[0].content }}").prompt(tokenizer, [assistant("a")])


@pytest.mark.parametrize(
    ("name", "messages", "options", "in_thought"),
    [
        ("qwen3", [user("a")], {}, False),
        ("qwen3", [user("a")], {"enable_thinking": True}, False),
        ("qwen3", [user("a")], {"enable_thinking": False}, False),
        ("qwen3-thinking", [user("a /no_think")], {}, True),
        ("qwen3-thinking", [user("a")], {"add_generation_prompt": False}, False),
        ("qwq", [user("a")], {}, True),
        ("qwen3-instruct", [user("a /think")], {}, False),
        ("qwen2.5", [user("a")], {}, False),
    ],
)
def test_whether_the_prompt_opens_a_thought(tokenizer, name, messages, options, in_thought):
    assert FORMATS[name].prompt(tokenizer, messages, **options).in_thought == in_thought


def test_an_open_thought_is_continued(tokenizer):
    turns = "{% for m in messages %}{{ '<|im_start|>' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
    plain = made(turns + "{{ '<think>' if add_generation_prompt }}")
    prompt = plain.prompt(tokenizer, [user("a"), assistant("<think>\nhm")])
    assert prompt.in_thought


LONG = [
    {"role": "system", "content": "Be brief"},
    user("one"),
    assistant("", tool_calls=[call("{}", "1")]),
    tool("r1", "1"),
    assistant("two"),
    user("three"),
    assistant("four"),
    user("five"),
]


def test_the_oldest_whole_exchanges_are_left_out(tokenizer):
    chat_format = FORMATS["qwen3"]
    whole = chat_format.prompt(tokenizer, LONG, [TOOL])
    shorter = [chat_format.prompt(tokenizer, [LONG[0], *LONG[start:]], [TOOL]) for start in (1, 5, 7)]
    assert shorter[0] == whole
    for dropped, expected in enumerate(shorter):
        size = len(expected.token_ids)
        prompt = chat_format.prompt(tokenizer, LONG, [TOOL], max_window_size=size)
        assert prompt.token_ids == expected.token_ids
        tighter = chat_format.prompt(tokenizer, LONG, [TOOL], max_window_size=size - 1)
        assert tighter.token_ids == shorter[min(dropped + 1, 2)].token_ids
    assert chat_format.prompt(tokenizer, LONG, [TOOL], max_window_size=0).token_ids == shorter[2].token_ids


def test_several_templates_are_files_beside_the_default_one(tmp_path, text):
    """As transformers saves them: chat_template.jinja and additional_chat_templates/NAME.jinja."""
    (tmp_path / "chat_template.jinja").write_text(
        "plain {{ messages[0].content }}{{ tools }}", encoding="utf-8"
    )
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text(
        "{{ tools[0].function.name }} {{ messages[0].content }}", encoding="utf-8"
    )
    (folder / "rag.jinja").write_text("{{", encoding="utf-8")  # nobody asks for it
    chat = load_chat_format(tmp_path, "qwen2")
    assert text(chat, [user("hi")]) == "plain hiNone"
    assert text(chat, [user("hi")], [TOOL]) == "f hi"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(
        ConfigError, match=r"additional_chat_templates: it has tool_use.jinja alone.*Add.*chat_template"
    ):
        load_chat_format(tmp_path, "qwen2")
    config = {"chat_template": "from the config{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    chat = load_chat_format(tmp_path, "qwen2")
    assert text(chat, [user("hi")]) == "from the confighi" and text(chat, [user("hi")], [TOOL]) == "f hi"


# ---- templates that take one system message, in the first place, and know efforts (Qwen3.5 to 3.8)


def system(content):
    return {"role": "system", "content": content}


def test_a_late_system_message_is_an_error_with_its_place_or_joins_the_first(tokenizer, text):
    late = [system("A"), user("a"), assistant("b"), {"role": "developer", "content": "B"}, user("c")]
    with pytest.raises(RequestError) as caught:
        made(STRICT).prompt(tokenizer, late)
    assert (caught.value.asked, "behind 3 others" in caught.value.found) == ("messages[3]", True)
    assert "merge_system_messages=True" in caught.value.remedy
    merging = made(STRICT, merge_system_messages=True)
    first = [system("A\n\nB"), user("a"), assistant("b"), user("c")]
    assert text(merging, late) == text(made(STRICT), first)
    assert text(merging, [user("a"), system("B"), system("")]) == text(made(STRICT), [system("B"), user("a")])
    assert text(merging, [user("a"), system("")]) == text(made(STRICT), [user("a")])
    early = [system("A"), user("c")]
    assert text(made(STRICT), early) == text(merging, early)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.startswith("qwen3.")])
def test_templates_that_take_late_system_messages_get_them_where_they_are(text, name):
    late = [user("a"), assistant("b"), system("B"), user("c")]
    merging = made(TEMPLATES[name], merge_system_messages=True)
    assert (
        text(merging, late) == text(FORMATS[name], late)
        and "assistant\nb" in text(merging, late).split("B")[0]
    )


def test_a_conversation_without_a_user_says_what_is_missing(tokenizer):
    with pytest.raises(
        RequestError, match=r"messages: none of 2 has role 'user', and .* Add the user's message"
    ):
        made(STRICT).prompt(tokenizer, [system("A"), assistant("b")])


def test_efforts_are_those_that_the_template_compares(text):
    assert made(STRICT).efforts == ("low", "xhigh") and FORMATS["qwen3"].efforts == ()
    assert text(made(STRICT), [user("a")], reasoning_effort="low").startswith("Be brief.\n<|im")
    assert text(made(STRICT), [user("a")]).startswith("<|im")
