"""qwenrt serve: a model for the clients of OpenAI, Anthropic, Ollama and DashScope."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_type_hints

from qwenrt.cli.options import (
    MODEL_HELP,
    SHARING_OPTIONS,
    add_adapter_option,
    add_model_options,
    add_sharing_options,
    check_installed,
    example,
    load_model,
)
from qwenrt.cli.terminal import Terminal
from qwenrt.errors import ConfigError
from qwenrt.loader.progress import is_shown
from qwenrt.server import settings as serving
from qwenrt.server.settings import ServeSettings

if TYPE_CHECKING:
    from qwenrt.llm import LLM

EXAMPLES = """examples:
  qwenrt serve                    the built-in model, at http://127.0.0.1:8000
  qwenrt serve Qwen3-4B --quantize int4 --port 11434
  qwenrt serve Qwen3-4B --host 0.0.0.0 --api-key-file ~/.qwenrt-keys
"""
_ONE_OF_MANY = {"served_model_names": "--served-model-name", "allow_origins": "--allow-origin"}
_ONE_OF_MANY |= {"allow_hosts": "--allow-host"}  # options that are given once for each entry
_SIZES = ("max_body", "max_header", "receive_rate", "send_buffer")
# What agents send before a question. How many tokens that is depends on the vocabulary: a text of their kind tells.
AGENTS_SEND = 105_000  # bytes, with what a chat format adds
_AGENTS_TEXT = (
    "You are an agent that helps users with software engineering. Use the tools to read, search and edit files, and "
    'run commands. {"name": "Bash", "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}}}'
)
_NEEDS = ("starlette", "uvicorn", "msgspec", "prometheus_client")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP, to the clients of OpenAI, Anthropic, Ollama and DashScope.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", nargs="?", default="demo", help=MODEL_HELP)
    group = parser.add_argument_group("the server")
    for name in serving.ABOUT:
        _add_setting(group, name)
    add_adapter_option(parser, "a request's `model` chooses one")
    add_model_options(parser)
    add_sharing_options(parser)
    parser.set_defaults(command=serve)


def _add_setting(group: Any, name: str) -> None:
    """A field of ServeSettings as an option: its name, default and help are those of the field."""
    (setting,) = (field for field in dataclasses.fields(ServeSettings) if field.name == name)
    kind = get_type_hints(ServeSettings)[name]
    option = _ONE_OF_MANY.get(name, "--" + name.replace("_", "-"))
    told: dict[str, Any] = {"dest": name, "default": setting.default, "help": serving.ABOUT[name]}
    if name in _ONE_OF_MANY:
        told |= {
            "action": "append",
            "default": None,
            "metavar": "NAME",
            "help": f"{told['help']}; may be repeated",
        }
    elif kind is bool:
        told["action"] = argparse.BooleanOptionalAction if setting.default else "store_true"
    elif kind in (int, float):
        told["help"] += f" (default: {_shown(name, setting.default)})"
        told |= {"type": int, "metavar": "N"}
        if name in _SIZES:
            told |= {"type": _parsed(serving.size), "metavar": "SIZE"}
        elif kind is float:
            told |= {"type": _parsed(serving.seconds), "metavar": "SECONDS"}
    else:
        told["metavar"] = {"api_key_file": "FILE", "adapter_directory": "DIR"}.get(name, "ADDRESS")
    group.add_argument(option, **told)


def _shown(name: str, default: Any) -> str:
    if name in _SIZES:
        return f"{int(default) >> 20}MiB" if default >= 1 << 20 else f"{int(default) >> 10}KiB"
    return f"{default:g}"


def _parsed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def serve(args: argparse.Namespace) -> int:
    check_installed("qwenrt serve", _NEEDS)
    given: dict[str, Any] = {name: getattr(args, name) for name in serving.ABOUT}
    given |= {name: () for name in _ONE_OF_MANY if given[name] is None}
    settings = ServeSettings(**given)
    sharing = {name: getattr(args, name) for name in SHARING_OPTIONS}
    from qwenrt.server import app
    from qwenrt.server.keys import Keyring
    from qwenrt.server.lifecycle import bind, run

    Keyring(settings)  # as the address below: what is wrong with the file of keys is told at once
    sockets = bind(settings)  # before a large model is loaded for a port that somebody else has
    address = _address(*sockets[0].getsockname()[:2])
    with load_model(args, **sharing) as llm:
        application, terminal = app(llm, settings), Terminal()

        def started() -> None:
            # undimmed, so that nothing wraps what is to be pasted
            terminal.remark(_greeting(llm, settings, address, application.service.names[0]), style="")

        _log()
        run(application, settings, application.hooks(started), sockets=sockets)
    return 0


def _address(host: str, port: int) -> str:
    """Where this machine reaches the server, also if it listens at all addresses."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log() -> None:
    """A line on stderr for each request, and for what it came to."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("qwenrt.server").setLevel(logging.INFO)


def _greeting(llm: LLM, settings: ServeSettings, address: str, name: str) -> str:
    """Where the server is, what it serves, and the lines to paste for the agents that people use."""
    stats = llm.stats()
    context = int(stats["max_model_len"])
    full = int(stats["total_blocks"]) * int(stats["block_size"]) // context
    lines = [f"Serving {name} at {address}  (Ctrl-C stops it)"]
    if settings.page and llm.has_tokenizer:
        lines.append(f"  Open {address}/ in a browser to talk with it.")
    if not settings.loopback:
        port = address.rpartition(":")[2]
        lines.append(
            f"  Other machines reach it at port {port} of this one's addresses; by a name after --allow-host NAME."
        )
    if llm.name == "demo":
        lines.append(
            "  It is the built-in toy: it knows a small world and calls a few tools. It is no assistant."
        )
    if not is_shown(llm.options.progress):  # else it was told when it was loaded
        lines.append(f"  {llm.summary}")
    if llm.adapters:
        lines.append(f"  Adapters, asked for as the model: {', '.join(llm.adapters)}.")
    lines.append(
        f"  A context of {context} tokens; {min(full, llm.options.max_num_seqs) or 1} answers at once at full length, "
        f"{llm.options.max_num_seqs} shorter ones; {settings.max_queue} more wait."
    )
    if not llm.has_tokenizer:
        lines.append(
            "  It has no tokenizer file: prompts can only be ids, at /v1/completions, and answers have no text."
        )
        return "\n".join(lines)
    key = "one of your keys" if settings.has_keys else "any"
    lines.append(f"  Open WebUI and other OpenAI clients: base URL {address}/v1, API key: {key}")
    agents = agent_lines(address, name, context, settings.has_keys)
    need = AGENTS_SEND * len(llm.tokenizer.encode(_AGENTS_TEXT)) // len(_AGENTS_TEXT)
    if context < need:
        lines.append(
            f"  Agents send up to {need:,} tokens before a question: they need a longer context than these {context}."
        )
    lines += [f"  {agent + ':':<13} {line}" for agent, line in agents.items()]
    return "\n".join(lines)


def agent_lines(address: str, name: str, context: int, has_keys: bool = False) -> dict[str, str]:
    """What a person types in a shell to use an agent with the server. ``name``: of the model; ``context``: in tokens,
    which Codex would otherwise guess."""
    key, model = "YOUR-KEY" if has_keys else "none", shlex.quote(name)
    provider = {"name": "qwenrt", "base_url": f"{address}/v1", "wire_api": "responses"}
    if has_keys:
        provider["env_key"] = "QWENRT_API_KEY"
    codex = [f"-c model_providers.qwenrt.{field}={value}" for field, value in provider.items()]
    codex = ["codex", f"-m {model}", "-c model_provider=qwenrt", *codex, f"-c model_context_window={context}"]
    return {
        "Claude Code": f"ANTHROPIC_BASE_URL={address} ANTHROPIC_AUTH_TOKEN={key} claude",
        "Codex": " ".join([f"QWENRT_API_KEY={key}", *codex] if has_keys else codex),
        "Qwen Code": f"OPENAI_BASE_URL={address}/v1 OPENAI_API_KEY={key} OPENAI_MODEL={model} qwen",
    }
