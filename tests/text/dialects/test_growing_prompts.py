"""A prompt grows at its end only: the next turn of each agent begins with every token of this one, and goes on with
what the model wrote.

Each turn runs as it does in the server: a body is read, its prompt built, an answer written in the model's own form,
parsed in pieces and written as events; a client adds them up and sends them back. Where it does not hold, it is the
checkpoint's chat template that says so:

- Qwen3 (hybrid and 2507-Thinking) drops the thoughts before a new question of the user. The turn after it begins with
  the prompt of the question before, up to its first answer.
- Qwen3 that is told not to think ends its prompt with an empty thought, which it does not write in older turns.
- QwQ drops every thought, and ends its prompt inside one.
- Qwen-1 has its tools in front of the last question that was answered: they move with the third question.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from qwenrt.outputs import Delta, Usage
from qwenrt.text.chat.builtin_templates import TEMPLATES
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.formats import ChatFormat, ReactFormat
from qwenrt.text.chat.prompt import Prompt
from qwenrt.text.chat.template_format import TemplateFormat
from qwenrt.text.dialects import anthropic, openai_chat, openai_responses
from qwenrt.text.dialects.answers import Served
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.openai_chat_writer import ChatWriter
from qwenrt.text.replies.parser import ReplyStream
from qwenrt.text.template.sandbox import JinjaTemplate
from tests.text.bpe_vocab import load_json
from tests.text.dialects import agent_turns
from tests.text.dialects.agent_turns import ANSWERS, THOUGHTS, TURNS, Answer
from tests.text.dialects.events import events, message_of, response_of

SERVED = Served("qwen", "request", 7)


@dataclass(frozen=True)
class Agent:
    """How to build its bodies, to read them, to write what it gets, and what it makes of that."""

    body: Callable[..., dict[str, Any]]
    read: Callable[[bytes], Ask]
    writer: Callable[[Ask], Any]
    answer: Callable[[bytes], Any]  # of the events of a stream: what it sends back


def claude_answer(stream: bytes) -> list[dict[str, Any]]:
    blocks = message_of(events(stream))["content"]
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("input_json"))
    return list(blocks)


def codex_answer(stream: bytes) -> list[dict[str, Any]]:
    """Codex keeps items without the ids and states that it does not need."""
    dropped = ("id", "status")
    output = response_of(events(stream))["output"]
    return [{key: value for key, value in item.items() if key not in dropped} for item in output]


def qwen_answer(stream: bytes) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    for line in stream.decode().splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(message["tool_calls"]):
                    function = {"name": call["function"]["name"], "arguments": ""}
                    message["tool_calls"].append({"id": call["id"], "type": "function", "function": function})
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {key: value for key, value in message.items() if value}


AGENTS = {
    "claude_code": Agent(
        agent_turns.claude_code,
        lambda body: anthropic.read(anthropic.decode(body), THOUGHTS),
        lambda ask: anthropic.Writer(SERVED, ask),
        claude_answer,
    ),
    "codex": Agent(
        agent_turns.codex,
        lambda body: openai_responses.read(openai_responses.decode(body), THOUGHTS),
        lambda ask: openai_responses.Writer(SERVED, ask),
        codex_answer,
    ),
    "qwen_code": Agent(
        agent_turns.qwen_code,
        lambda body: openai_chat.read(openai_chat.decode(body)),
        lambda ask: ChatWriter(SERVED, ask),
        qwen_answer,
    ),
}
THINKING = ("qwen3", "qwen3-thinking")
FORMATS = ("react", "qwen2.5", "qwen3-instruct", "qwen3-coder", *THINKING)


def chat_format(name: str) -> ChatFormat:
    return ReactFormat() if name == "react" else TemplateFormat(JinjaTemplate(TEMPLATES[name], name))


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_json(tmp_path_factory.mktemp("later"))


def prompt_of(ask: Ask, form: ChatFormat, tokenizer: ChatTokenizer) -> Prompt:
    """The prompt as the server asks for it: a wish to think goes to models that can."""
    thinks = form.reply_format.thinking != "none"
    wish = ask.enable_thinking if thinks else None
    assert ask.messages is not None
    return form.prompt(tokenizer, ask.messages, ask.tools or None, enable_thinking=wish)


def written(answer: Answer, form: ChatFormat, prompt: Prompt) -> str:
    """What a model of this form writes for an answer, up to its end."""
    calls, thinking = form.reply_format.calls, form.reply_format.thinking
    if calls == "react":
        begin = "" if prompt.in_thought else "Thought:"
        if not answer.calls:
            return f"{begin} I now know the final answer.\nFinal Answer: {answer.said}"
        name, arguments = answer.calls[0]
        call = f"Action: {name}\nAction Input: {json.dumps(arguments, ensure_ascii=False)}\n"
        return f"{begin} {answer.said or answer.thought}\n{call}"
    opening = {"none": "", "hybrid": "<think>\n", "open": ""}[thinking]
    thought = f"{opening}{answer.thought}\n</think>\n\n" if thinking != "none" else ""
    made = []
    for name, arguments in answer.calls:
        if calls == "hermes":
            inner = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        else:
            inner = f"<function={name}>\n{''.join(map(parameter, arguments.items()))}</function>"
        made.append(f"<tool_call>\n{inner}\n</tool_call>")
    space = "\n\n" if calls == "xml" else "\n"
    return thought + answer.said + (space if made and answer.said else "") + "\n".join(made)


def parameter(entry: tuple[str, Any]) -> str:
    key, value = entry
    return f"<parameter={key}>\n{value}\n</parameter>\n"


def deltas(text: str, form: ChatFormat, prompt: Prompt, ask: Ask, size: int) -> list[Delta]:
    """The answer as the engine gives it, ``size`` characters at a time."""
    stream = ReplyStream(form.reply_format, prompt.in_thought, ask.tools)
    found = []
    for at in range(0, len(text), size):
        piece = stream.push(text[at : at + size])
        found.append(Delta(piece.content, [0], reasoning=piece.reasoning, calls=piece.calls))
    piece, whole = stream.finish()
    reason = "tool_calls" if whole.tool_calls else "stop"
    found.append(
        Delta(
            piece.content,
            [0],
            reason,  # type: ignore[arg-type]
            usage=Usage(7, 5),
            tool_calls=whole.tool_calls or None,
            reasoning=piece.reasoning,
            calls=piece.calls,
        )
    )
    return found


def run(agent: Agent, form: ChatFormat, tokenizer: ChatTokenizer, size: int) -> list[tuple[list[int], str]]:
    """(ids of the prompt, what was then written) of each turn."""
    answers: list[Any] = []
    turns = []
    for turn in range(TURNS):
        body = json.dumps(agent.body(turn, answers), ensure_ascii=False).encode()
        ask = agent.read(body)
        prompt = prompt_of(ask, form, tokenizer)
        text = written(ANSWERS[turn], form, prompt) if turn < len(ANSWERS) else ""
        writer = agent.writer(ask)
        stream = [writer.begin()]
        stream += [writer.push(delta) for delta in deltas(text, form, prompt, ask, size)]
        answers.append(agent.answer(b"".join([*stream, writer.end()])))
        turns.append((prompt.token_ids, text))
    return turns


def common(first: list[int], second: list[int]) -> int:
    """The length of the beginning that two prompts share."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


@pytest.mark.parametrize("size", (1, 7, 10_000))
@pytest.mark.parametrize("form_name", FORMATS)
@pytest.mark.parametrize("agent_name", AGENTS)
def test_the_next_turn_begins_with_this_one_and_its_answer(
    agent_name: str, form_name: str, size: int, small: ChatTokenizer, later: ChatTokenizer
) -> None:
    tokenizer, form = small if form_name == "react" else later, chat_format(form_name)
    turns = run(AGENTS[agent_name], form, tokenizer, size)
    for turn, ((ids, text), (following, _)) in enumerate(itertools.pairwise(turns)):
        if form_name in THINKING and turn + 1 in agent_turns.QUESTIONS:
            first = turns[0][0]
            opened = (
                tokenizer.encode("<think>\n", allow_special=True) if form_name == "qwen3-thinking" else []
            )
            assert common(first, following) == len(first) - len(opened)
            continue
        assert following[: len(ids)] == ids, f"the prompt of turn {turn + 1} begins otherwise"
        goes_on = tokenizer.decode(following[len(ids) :])
        assert goes_on.startswith(text), f"turn {turn}: {text!r} became {goes_on[: len(text) + 40]!r}"


@pytest.mark.parametrize("agent_name", AGENTS)
def test_what_is_new_is_the_answer_and_what_was_said_to_it(agent_name: str, later: ChatTokenizer) -> None:
    turns = run(AGENTS[agent_name], chat_format("qwen3-coder"), later, 5)
    for (ids, _), (following, _) in itertools.pairwise(turns):
        assert len(following) - len(ids) < 600 < 20_000 < len(ids)


@pytest.mark.parametrize("form_name", FORMATS)
@pytest.mark.parametrize("agent_name", AGENTS)
def test_another_session_has_the_same_prompt(
    agent_name: str, form_name: str, small: ChatTokenizer, later: ChatTokenizer
) -> None:
    tokenizer, form, agent = (
        small if form_name == "react" else later,
        chat_format(form_name),
        AGENTS[agent_name],
    )
    prompts = [
        prompt_of(agent.read(json.dumps(agent.body(4, session=session)).encode()), form, tokenizer).token_ids
        for session in (1, 2)
    ]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("agent_name", AGENTS)
def test_recorded_answers_give_the_prompts_of_streamed_ones(agent_name: str, later: ChatTokenizer) -> None:
    agent, form = AGENTS[agent_name], chat_format("qwen3")
    streamed = run(agent, form, later, 3)
    for turn, (ids, _) in enumerate(streamed):
        assert prompt_of(agent.read(json.dumps(agent.body(turn)).encode()), form, later).token_ids == ids


def test_an_empty_thought_is_not_written_in_older_turns(later: ChatTokenizer) -> None:
    form = chat_format("qwen3")
    asks = [AGENTS["claude_code"].read(json.dumps(agent_turns.claude_code(turn)).encode()) for turn in (0, 1)]
    prompts = []
    for ask in asks:
        assert ask.messages is not None
        messages = [{**m, "reasoning_content": ""} if m["role"] == "assistant" else m for m in ask.messages]
        prompts.append(form.prompt(later, messages, ask.tools, enable_thinking=False).token_ids)
    empty = later.encode("<think>\n\n</think>\n\n", allow_special=True)
    assert common(*prompts) == len(prompts[0]) - len(empty)


def test_qwq_ends_its_prompt_in_a_thought_that_no_later_turn_has(later: ChatTokenizer) -> None:
    turns = run(AGENTS["claude_code"], chat_format("qwq"), later, 50)
    opened = later.encode("<think>\n", allow_special=True)
    for (ids, _), (following, _) in itertools.pairwise(turns):
        assert common(ids, following) == len(ids) - len(opened)


def test_the_tools_of_qwen1_move_with_the_third_question(small: ChatTokenizer) -> None:
    def body(questions: int) -> Ask:
        messages: list[dict[str, Any]] = []
        for number in range(questions):
            messages += [
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": "yes"},
            ]
        tool = {"name": "f", "input_schema": {"type": "object"}}
        request = {"max_tokens": 9, "system": "s", "messages": messages[:-1], "tools": [tool]}
        return anthropic.read(anthropic.decode(json.dumps(request).encode()), THOUGHTS)

    first, second, third = (prompt_of(body(n), ReactFormat(), small).token_ids for n in (1, 2, 3))
    assert second[: len(first)] == first
    head = small.encode("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n", allow_special=True)
    assert common(second, third) == len(head)
