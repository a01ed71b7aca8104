"""What a model is trained on: an entry of a file as token ids, and which of them it is to learn. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qwenrt.arguments import flag
from qwenrt.errors import RequestError, shown
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.formats import RawFormat, ReactFormat
from qwenrt.text.chat.react import DEFAULT_SYSTEM
from qwenrt.text.entries import Entry, Place, bad_entry, entry_of

if TYPE_CHECKING:
    from qwenrt.text.chat.template_format import TemplateFormat

IGNORE = -100  # a label that carries no loss
TrainOn = Literal["auto", "answers", "all_frames"]
Thinking = Literal["auto", "keep", "off"]
_OPEN, _CLOSE = "<think>", "</think>"
_Message = Mapping[str, Any]


@dataclass(frozen=True)
class FormSettings:
    """How entries become tokens.

    train_on: "answers" are all that the assistant says up to the token that ends its turn; "all_frames" the tokens that
    frame every turn as well, as the first Qwen was trained; "auto": all_frames for that one, answers for later ones.
    thinking: "auto" trains each answer on what it would see when it is given, where templates drop the thoughts of
    turns before; "keep" leaves them in one long sample; "off" drops all thoughts.
    allow_special: control tokens written in contents are read as such.
    """

    train_on: TrainOn = "auto"
    thinking: Thinking = "auto"
    allow_special: bool = False

    def __post_init__(self) -> None:
        choices = {"train_on": ("auto", "answers", "all_frames"), "thinking": ("auto", "keep", "off")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                remedy = f"Use one of {', '.join(known)}."
                raise RequestError(f"{name}={shown(getattr(self, name))}", "not known", remedy)
        object.__setattr__(self, "allow_special", flag("allow_special", self.allow_special))


@dataclass(frozen=True)
class Sample:
    """``ids`` of one sequence; ``labels`` as long: the id itself where it is to be learned, else IGNORE."""

    ids: list[int]
    labels: list[int]

    def cut(self, length: int) -> Sample:
        return self if len(self.ids) <= length else Sample(self.ids[:length], self.labels[:length])

    @property
    def learned(self) -> int:
        """How many tokens are predicted and learned; nothing predicts the first."""
        return sum(label != IGNORE for label in self.labels[1:])


def training_samples(
    tokenizer: ChatTokenizer, entry: object, place: Place = 1, settings: FormSettings | None = None
) -> list[Sample]:
    """The samples of one entry: one, or several where a template writes an answer otherwise once it is history.

    The law: for each answer, the prompt that a server would make of what is before it, followed by what is learned of
    it, are the first ids of a sample. RequestError names the entry's ``place``.
    """
    settings = settings or FormSettings()
    read = entry_of(entry, place)
    if read.text is not None:
        ids = [*tokenizer.encode(read.text, settings.allow_special), tokenizer.eod_id]
        return [Sample(ids, list(ids))]
    if not any(message["role"] == "assistant" for message in read.messages):
        raise bad_entry(place, "no turn of the assistant", "There is nothing to learn: remove the entry.")
    is_first = isinstance(tokenizer.chat_format, (ReactFormat, RawFormat))
    if is_first and settings.train_on != "answers":
        return [_all_frames(tokenizer, read, place, settings.allow_special)]
    if settings.train_on == "all_frames":
        found = "this model's turns are written by its chat template"
        raise RequestError('train_on="all_frames"', found, 'Use train_on="answers", or leave it out.')
    try:
        answers = _answers(tokenizer, read, settings)
    except RequestError as error:
        raise bad_entry(place, f"{error.asked}: {error.found}", error.remedy) from error
    if not answers:
        raise bad_entry(
            place, "the assistant answers nobody", "Put a turn of the user before one of the assistant."
        )
    return answers


def _all_frames(tokenizer: ChatTokenizer, entry: Entry, place: Place, allow_special: bool) -> Sample:
    """The first Qwen's own form: turns of <|im_start|>role\\ncontent<|im_end|>\\n. Learned are im_start, im_end and
    the newline after it for every role, and the content of the assistant."""
    if entry.tools or any(m.get("tool_calls") or m["role"] == "tool" for m in entry.messages):
        found = "it has tools or calls, for which Qwen-1's training form has no place"
        remedy = (
            'Use train_on="answers", or write calls as the text that the model is to say, in the ReAct form.'
        )
        raise bad_entry(place, found, remedy)
    turns = [(m["role"], m["content"]) for m in entry.messages if m.get("content") is not None]
    if turns[0][0] != "system":
        turns = [("system", DEFAULT_SYSTEM), *turns]
    newline = tokenizer.encode("\n")
    im_start, im_end = tokenizer.turn_ids()
    start, end = [im_start], [im_end, *newline]
    ids: list[int] = []
    labels: list[int] = []
    for role, text in turns:
        head, content = [*tokenizer.encode(role), *newline], tokenizer.encode(text, allow_special)
        ids += [*start, *head, *content, *end]
        spoken = content if role == "assistant" else [IGNORE] * len(content)
        labels += [*start, *[IGNORE] * len(head), *spoken, *end]
    return Sample(ids, labels)


def _answers(tokenizer: ChatTokenizer, entry: Entry, settings: FormSettings) -> list[Sample]:
    """A sample goes on from answer to answer as long as the next prompt begins with it."""
    form = _react_turn if isinstance(tokenizer.chat_format, ReactFormat) else _template_turn
    messages = [_without_thought(m) if settings.thinking == "off" else dict(m) for m in entry.messages]
    samples: list[Sample] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not any(m["role"] == "user" for m in messages[:index]):
            continue
        if messages[index - 1]["role"] == "assistant":
            raise _not_an_answer(messages[: index + 1])
        after = samples[-1].ids if samples and settings.thinking == "keep" else None
        prompt, said = form(tokenizer, messages[: index + 1], entry.tools or None, settings, after)
        labels = [*[IGNORE] * len(prompt), *said]
        if samples and prompt[: len(samples[-1].ids)] == samples[-1].ids:
            before = samples.pop()
            labels[: len(before.labels)] = before.labels
        samples.append(Sample([*prompt, *said], labels))
    return samples


def _react_turn(
    tokenizer: ChatTokenizer,
    messages: Sequence[_Message],
    tools: Sequence[_Message] | None,
    settings: FormSettings,
    after: list[int] | None,
) -> tuple[list[int], list[int]]:
    """(the prompt's ids, what the first Qwen says) of the last of ``messages``."""
    prompt = tokenizer.encode_chat(messages[:-1], tools=tools)
    whole = tokenizer.encode_chat(messages, tools=tools, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise _not_an_answer(messages)
    return prompt, whole[len(prompt) :]


def _template_turn(
    tokenizer: ChatTokenizer,
    messages: Sequence[_Message],
    tools: Sequence[_Message] | None,
    settings: FormSettings,
    after: list[int] | None,
) -> tuple[list[int], list[int]]:
    """(the prompt's ids, those of the answer) of the last of ``messages``, by the checkpoint's template: what it writes
    with the answer, less what it writes before one. ``after``: ids of a sample that the prompt is to go on from,
    whatever the template makes of the answers in it."""
    from qwenrt.text.chat.template_format import encode_rendered, end_of_turn
    from qwenrt.text.template.provenance import TemplateText, masked, plain

    chat_format: TemplateFormat = tokenizer.chat_format  # type: ignore[assignment]
    thinks: bool | None = None
    if chat_format.has_thinking_switch:
        thinks = bool(_thought(messages[-1]).strip())
    how: dict[str, Any] = {"enable_thinking": thinks}
    prompt = chat_format.rendered(tokenizer, messages[:-1], tools, **how)
    whole = chat_format.rendered(tokenizer, messages, tools, add_generation_prompt=False, **how)
    end = end_of_turn(tokenizer)
    if masked(whole[: len(prompt)]) == masked(prompt) and plain(whole[: len(prompt)]) == plain(prompt):
        said = whole[len(prompt) :]
    else:  # a template that opens the thought itself, and writes none of what is history
        opening = masked(prompt).rfind(_OPEN)
        if (
            opening < 0
            or prompt[opening:].strip() != _OPEN
            or plain(whole[:opening]) != plain(prompt[:opening])
        ):
            raise _not_an_answer(messages)
        thought = _thought(messages[-1]).strip("\n")
        said = TemplateText(f"\n{_CLOSE}\n\n") + whole[opening:].lstrip("\n")
        said = thought + said if thought else said
    at = masked(said).rfind(end)
    if at < 0:
        raise _not_an_answer(messages)
    if settings.allow_special:
        prompt, said = TemplateText(plain(prompt)), TemplateText(plain(said))
    ids = encode_rendered(tokenizer, prompt)
    if after is not None and ids[: len(after)] != after:
        end_id = after[-1]
        ends = [i for i, token in enumerate(ids) if token == end_id]
        ids = [*after, *ids[ends[after.count(end_id) - 1] + 1 :]]
    return ids, encode_rendered(tokenizer, said[: at + len(end)])


def _thought(message: _Message) -> str:
    """The thought of an assistant's message, in whichever place it stands; empty where there is none."""
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str):
        return reasoning
    content = message.get("content")
    before, closed, _ = content.partition(_CLOSE) if isinstance(content, str) else ("", "", "")
    return before.rpartition(_OPEN)[2] if closed else ""


def _without_thought(message: _Message) -> dict[str, Any]:
    kept = {name: value for name, value in message.items() if name != "reasoning_content"}
    content = kept.get("content")
    if message["role"] == "assistant" and isinstance(content, str) and _CLOSE in content:
        kept["content"] = content.partition(_CLOSE)[2].lstrip("\n")
    return kept


def _not_an_answer(messages: Sequence[_Message]) -> RequestError:
    return RequestError(
        f"what the assistant says in turn {len(messages)}",
        "the chat template does not write it behind the prompt that asks for it",
        "Let each turn of the assistant follow one of the user or of a tool.",
    )
