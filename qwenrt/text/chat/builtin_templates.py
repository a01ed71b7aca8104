r"""Chat templates for checkpoints that come without one, as Jinja, one for each family.

The words in them are what the models were trained on. Which one: `family` says, from what a directory holds.
All blocks cut the white space around them, so that only what stands in an expression is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenrt.config import read_json
from qwenrt.config.fields import MAX_JSON_BYTES
from qwenrt.errors import ConfigError
from qwenrt.files import is_there, read

_TURN = r"""
{%- macro turn(role, text) -%}
  {{ '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>\n' }}
{%- endmacro -%}
"""

_HERMES_TOOLS = r"""
{%- macro tool_block() -%}
  {{ '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
  {%- for tool in tools -%}{{ '\n' ~ tool | tojson }}{%- endfor -%}
  {{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
  {{- '<tool_call></tool_call> XML tags:\n' }}
  {{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
{%- endmacro -%}
{%- macro call_block(call) -%}
  {%- set call = call.function if call.function is defined else call -%}
  {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson -%}
  {{ '<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' ~ arguments ~ '}\n</tool_call>' }}
{%- endmacro -%}
"""

# Which arguments are written as Jinja prints them, True among them; the others are JSON.
_PRINTED = "value is string or not (value is mapping or value is sequence)"
_XML_CALLS = r"""
{%- macro rules() -%}
  {{ '\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n' }}
  {{- '<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n' }}
  {{- '<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\n' }}
  {{- 'multiple lines\n</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n' }}
  {{- '- Function calls MUST follow the specified format: an inner <function=...></function> block must be ' }}
  {{- 'nested within <tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n' }}
  {{- '- You may provide optional reasoning for your function call in natural language BEFORE the function ' }}
  {{- 'call, but NOT after\n- If there is no function call available, answer the question like normal with ' }}
  {{- 'your current knowledge and do not tell the user about function calls\n</IMPORTANT>' }}
{%- endmacro -%}
{%- macro call_block(call) -%}
  {%- set call = call.function if call.function is defined else call -%}
  {{ '<tool_call>\n<function=' ~ call.name ~ '>\n' }}
  {%- for name, value in call.arguments | items -%}
    {%- set plain = %(printed)s -%}
    {{ '<parameter=' ~ name ~ '>\n' ~ (value if plain else value | tojson) ~ '\n</parameter>\n' }}
  {%- endfor -%}
  {{ '</function>\n</tool_call>' }}
{%- endmacro -%}
"""

_XML_TOOLS = (
    _XML_CALLS.replace("%(printed)s", _PRINTED)
    + r"""
{%- macro others(fields, known) -%}
  {%- if fields is mapping -%}
    {%- for key in fields if key not in known -%}
      {%- set field = fields[key] -%}
      {%- set plain = field is string or not (field is mapping or field is sequence) -%}
      {{ '\n<' ~ key ~ '>' ~ (field if plain else field | tojson) ~ '</' ~ key ~ '>' }}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro tool_block() -%}
  {{ '# Tools\n\nYou have access to the following functions:\n\n<tools>' }}
  {%- for tool in tools -%}
    {%- set tool = tool.function if tool.function is defined else tool -%}
    {{ '\n<function>\n<name>' ~ tool.name ~ '</name>' }}
    {%- if tool.description is defined -%}
      {{ '\n<description>' ~ tool.description | trim ~ '</description>' }}
    {%- endif -%}
    {{ '\n<parameters>' }}
    {%- if tool.parameters is mapping and tool.parameters.properties is mapping -%}
      {%- for name, fields in tool.parameters.properties | items -%}
        {{ '\n<parameter>\n<name>' ~ name ~ '</name>' }}
        {%- if fields.type is defined -%}{{ '\n<type>' ~ fields.type ~ '</type>' }}{%- endif -%}
        {%- if fields.description is defined -%}
          {{ '\n<description>' ~ fields.description | trim ~ '</description>' }}
        {%- endif -%}
        {{ others(fields, ['name', 'type', 'description']) ~ '\n</parameter>' }}
      {%- endfor -%}
    {%- endif -%}
    {{ others(tool.parameters, ['type', 'properties']) ~ '\n</parameters>' }}
    {{- others(tool, ['type', 'name', 'description', 'parameters']) ~ '\n</function>' }}
  {%- endfor -%}
  {{ rules() }}
{%- endmacro -%}
"""
)

# default: the system text where none is given, none for no system turn; beside_tools: the one that goes with tools.
_CONVERSATION = r"""
{%- set default, beside_tools = %(default)s, %(beside_tools)s -%}
{%- set given = messages[0].role == 'system' -%}
{%- set system = messages[0].content if given else beside_tools if tools else default -%}
{%- if tools -%}
  {{ turn('system', (system ~ '\n\n' if system is not none else '') ~ tool_block()) }}
{%- elif system is not none -%}
  {{ turn('system', system) }}
{%- endif -%}
{%- set ns = namespace(last_query=messages | length) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set ns.last_query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'system' and loop.first -%}
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
    {{ '\n<tool_response>\n' ~ message.content ~ '\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '%(after_results)s<|im_end|>\n' }}{%- endif -%}
  {%- elif message.role == 'assistant' -%}
    {%- set content = message.content -%}
    {{ '<|im_start|>assistant\n' }}
    %(speech)s
    {%- for call in message.tool_calls -%}
      {{ ('%(before_calls)s' if loop.first and content else '' if loop.first else '\n') ~ call_block(call) }}
    {%- endfor -%}
    {{ '<|im_end|>\n' }}
  {%- else -%}
    {{ turn(message.role, message.content) }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\n' }}
  %(opening)s
{%- endif -%}
"""

# How an assistant's message is written, from `content` on.
_PLAIN = "{{- content }}"
_TRIMMED = r"""{%- set content = content | trim if message.tool_calls else content -%}{{ content }}"""
_WITHOUT_THOUGHTS = r"""{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{{ content }}"""
_WITH_NEW_THOUGHTS = r"""
    {%- set reasoning = '' -%}
    {%- if message.reasoning_content is string -%}
      {%- set reasoning = message.reasoning_content -%}
    {%- elif '</think>' in content -%}
      {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {%- if loop.index0 > ns.last_query and (loop.last or reasoning) -%}
      {{ '<think>\n' ~ reasoning.strip('\n') ~ '\n</think>\n\n' ~ content.lstrip('\n') }}
    {%- else -%}
      {{ content }}
    {%- endif -%}"""

_CHATML = (
    _TURN
    + r"""
{%- if messages[0].role != 'system' -%}{{ turn('system', 'You are a helpful assistant.') }}{%- endif -%}
{%- for message in messages -%}{{ turn(message.role, message.content) }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
)

_NO_THOUGHT = r"{%- if enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
_OPEN_THOUGHT = r"{{- '<think>\n' }}"


# Qwen3.5 and later: every text is trimmed (not the end of one that is continued), tools come before the system text,
# and it refuses what it never was shown. `effort`: what the system turn begins with.
_HYBRID = (
    _TURN
    + _XML_CALLS
    + r"""
{%- set ns = namespace(last_query=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set ns.last_query = loop.index0 -%}
  {%- elif message.role == 'system' and not loop.first -%}
    {{ raise_exception('System message must be at the beginning.') }}
  {%- endif -%}
{%- endfor -%}
{%- if ns.last_query < 0 -%}{{ raise_exception('No user query found in messages.') }}{%- endif -%}
%(effort)s
{%- set given = messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim if given else '' -%}
{%- if tools -%}
  {{ '<|im_start|>system\n' ~ effort ~ ('\n\n' if effort else '') }}
  {{- '# Tools\n\nYou have access to the following functions:\n\n<tools>' }}
  {%- for tool in tools -%}{{ '\n' ~ tool | tojson }}{%- endfor -%}
  {{ rules() ~ ('\n\n' if system else '') ~ system ~ '<|im_end|>\n' }}
{%- elif %(has_system)s -%}
  {{ turn('system', effort ~ ('\n\n' if effort and system else '') ~ system) }}
{%- endif -%}
{%- for message in messages -%}
  {%- set content = message.content | trim -%}
  {%- if loop.last and message.role == 'assistant' -%}{%- set content = message.content.lstrip() -%}{%- endif -%}
  {%- if message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
    {{ '\n<tool_response>\n' ~ content ~ '\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
  {%- elif message.role == 'assistant' -%}
    {%- set reasoning = '' -%}
    {%- if message.reasoning_content is string -%}
      {%- set reasoning = message.reasoning_content -%}
    %(tagged_thought)s
    {%- endif -%}
    {{ '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.last_query or preserve_thinking is %(preserved)s -%}
      {{ '<think>\n' ~ reasoning | trim ~ '\n</think>\n\n' }}
    {%- endif -%}
    {{ content }}
    {%- for call in message.tool_calls -%}
      {{ ('\n\n' if loop.first and content else '' if loop.first else '\n') ~ call_block(call) }}
    {%- endfor -%}
    {{ '<|im_end|>\n' }}
  {%- elif message.role != 'system' -%}
    {{ turn(message.role, content) }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\n' ~ ('<think>\n' if %(thinks)s else '<think>\n\n</think>\n\n') }}
{%- endif -%}
"""
)
_TAGGED_THOUGHT = r"""{%- elif '</think>' in content -%}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}"""
# What Qwen3.8 is told of how long to think; of the middle way it is told nothing.
_EFFORT = r"""
{%- set asked = reasoning_effort | default('xhigh') if enable_thinking is not false else 'medium' -%}
{%- if asked == 'xhigh' -%}
  {%- set effort = 'Reasoning effort is set to xhigh. Please think carefully through the task, validate key '
    ~ 'assumptions, consider plausible alternatives, and prioritize correctness, consistency, and clarity in the '
    ~ 'final answer.' -%}
{%- elif asked == 'low' -%}
  {%- set effort = 'Reasoning effort is set to low. Keep your thinking brief and focused, moving directly to the '
    ~ 'conclusion without unnecessary elaboration.' -%}
{%- elif asked == 'medium' -%}
  {%- set effort = '' -%}
{%- else -%}
  {{ raise_exception('Unexpected reasoning effort: known are xhigh, medium and low.') }}
{%- endif -%}"""


def _hybrid(thinks: str = "enable_thinking is not false", **parts: str) -> str:
    """Of a model that thinks where ``thinks`` is true, a Jinja expression."""
    own = {
        "thinks": thinks,
        "effort": "{%- set effort = '' -%}",
        "has_system": "given",
        "tagged_thought": _TAGGED_THOUGHT,
        "preserved": "true",
        "printed": _PRINTED,
    } | parts
    return re.sub(r"%\((\w+)\)s", lambda found: own[found[1]], _HYBRID)


def _with_tools(
    tools: str,
    default: str = "none",
    beside_tools: str | None = None,
    speech: str = _PLAIN,
    opening: str = "",
    **spacing: str,
) -> str:
    """A template out of its parts; the system texts are Jinja expressions."""
    parts = {
        "default": default,
        "beside_tools": beside_tools or default,
        "speech": speech,
        "opening": opening,
    }
    parts |= {"before_calls": r"\n", "after_results": "", **spacing}
    return _TURN + tools + re.sub(r"%\((\w+)\)s", lambda found: parts[found[1]], _CONVERSATION)


TEMPLATES = {
    "qwen2": _CHATML,
    "qwen2.5": _with_tools(
        _HERMES_TOOLS, "'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'"
    ),
    "qwen2.5-math": _with_tools(
        _HERMES_TOOLS, r"'Please reason step by step, and put your final answer within \\boxed{}.'"
    ),
    "qwq": _with_tools(_HERMES_TOOLS, beside_tools="''", speech=_WITHOUT_THOUGHTS, opening=_OPEN_THOUGHT),
    "qwen3": _with_tools(_HERMES_TOOLS, speech=_WITH_NEW_THOUGHTS, opening=_NO_THOUGHT),
    "qwen3-instruct": _with_tools(_HERMES_TOOLS),
    "qwen3-thinking": _with_tools(_HERMES_TOOLS, speech=_WITH_NEW_THOUGHTS, opening=_OPEN_THOUGHT),
    "qwen3-coder": _with_tools(
        _XML_TOOLS,
        beside_tools="'You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks.'",
        speech=_TRIMMED,
        before_calls=r"\n\n",
        after_results=r"\n",
    ),
    "qwen3.5": _hybrid(),
    "qwen3.5-small": _hybrid("enable_thinking is true"),
    "qwen3.6": _hybrid(printed="value is string"),
    # 3.8 also keeps old thoughts, and takes them from `reasoning_content` alone.
    "qwen3.8": _hybrid(
        effort=_EFFORT,
        has_system="effort or system",
        tagged_thought="",
        preserved="not false",
        printed="value is string",
    ),
}


def family(directory: Path, model_type: str) -> str:
    """Which of TEMPLATES fits a directory without a template of its own.

    Qwen3.5 and later (model_type qwen3_5, qwen3_5_moe): dense models of up to 24 layers think only where they are told
    to. 3.6, which writes arguments as JSON, and 3.8, which is also told an effort and keeps old thoughts, are known by
    their names alone.
    Qwen3 (model_type qwen3, qwen3_moe): a position limit above 200 000 means the releases of 2507 and Coder; of
    these, Coder is known by the parser it ships or by its repetition penalty, Thinking by its sampling
    temperature of 0.6. All others switch between thinking and not. Before Qwen3: with <think> among the added
    tokens it is QwQ; with <tool_call>, 2.5, and of that Math has a context of 4096 positions with a rotary base
    of 10000; without either it is 1.5 or 2. The name of the directory (Coder, Thinking, Instruct-2507, Math,
    QwQ) goes before all of this.
    """
    name = directory.resolve().as_posix().lower().rsplit("/snapshots/", 1)[0].rsplit("/", 1)[-1]
    config, generation = (_read(directory / f"{file}.json") for file in ("config", "generation_config"))
    if model_type.startswith("qwen3_5"):
        text = config.get("text_config", config)
        layers = text.get("num_hidden_layers") if isinstance(text, Mapping) else None
        if later := re.search(r"qwen3\.[68]", name):
            return later[0]
        small = "moe" not in model_type and isinstance(layers, int) and layers <= 24
        return "qwen3.5-small" if small else "qwen3.5"
    if model_type.startswith("qwen3"):
        positions = config.get("max_position_embeddings")
        late = isinstance(positions, int) and positions > 200_000
        if "coder" in name or any(directory.glob("qwen3coder_*.py")):
            return "qwen3-coder"
        if "thinking" in name or (late and generation.get("temperature") == 0.6):
            return "qwen3-thinking"
        if "instruct-2507" in name:
            return "qwen3-instruct"
        if late:
            return "qwen3-coder" if generation.get("repetition_penalty", 1.0) != 1.0 else "qwen3-instruct"
        return "qwen3"
    if "qwq" in name or _has_token(directory, "<think>"):
        return "qwq"
    if not _has_token(directory, "<tool_call>"):
        return "qwen2"
    short = config.get("max_position_embeddings") == 4096 and config.get("rope_theta") == 10000
    return "qwen2.5-math" if short or "math" in name else "qwen2.5"


def _read(path: Path) -> Mapping[str, Any]:
    return read_json(path) if is_there(path, ConfigError) else {}


def _has_token(directory: Path, form: str) -> bool:
    """Whether a tokenizer file mentions the token. Read as bytes: they may be large, and are checked elsewhere."""
    quoted = f'"{form}"'.encode()
    names = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")
    there = (directory / name for name in names if is_there(directory / name, ConfigError))
    return any(quoted in read(path, MAX_JSON_BYTES, ConfigError) for path in there)
