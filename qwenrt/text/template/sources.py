"""The chat templates of a model directory, as text: and the files that they are in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qwenrt.errors import ConfigError
from qwenrt.files import is_there, read_downloaded

TEMPLATE_FILE, TEMPLATE_FOLDER, CONFIG_FILE = (
    "chat_template.jinja",
    "additional_chat_templates",
    "tokenizer_config.json",
)
MAX_SOURCE_CHARS = 2**20
_USED = ("default", "tool_use")


class TemplateSource(NamedTuple):
    """A template's text, and the file that it stands in."""

    text: str
    where: str


def template_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, TemplateSource]:
    """The templates "default" and "tool_use" of a directory, those of the two that it has.

    chat_template.jinja is the default one and additional_chat_templates/NAME.jinja the others; where there is no
    chat_template.jinja, those of ``config``, which is tokenizer_config.json's, under chat_template: one, or a list.
    Raises ConfigError for what is no template, and where there are some but no default one.
    """
    files = {"default": directory / TEMPLATE_FILE}
    files |= {name: directory / TEMPLATE_FOLDER / f"{name}.jinja" for name in _USED if name != "default"}
    there = {name: path for name, path in files.items() if is_there(path, ConfigError)}
    found = {name: TemplateSource(_read(path), str(path)) for name, path in there.items()}
    if "default" in found:
        return found
    where = f"{directory / CONFIG_FILE}, chat_template"
    named = _named(config.get("chat_template"), where)
    found = {
        n: TemplateSource(source, f"{where} {n!r:.40}") for n, source in named.items() if n in _USED
    } | found
    if "default" in found or not (found or named):
        return found
    if named:
        names = f"none of {len(named)} templates is named 'default'"
        raise ConfigError(f"reading {where}", names, "Name the one for plain conversations so.")
    alone = f"it has {', '.join(path.name for path in there.values())} alone"
    raise ConfigError(
        f"reading {directory / TEMPLATE_FOLDER}",
        alone,
        f"Add the template for plain conversations, {TEMPLATE_FILE}.",
    )


def _named(given: object, where: str) -> dict[str, str]:
    """name -> source; empty where none is given."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    named = {}
    for entry in given if isinstance(given, list) else [given]:
        name, source = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str):
            raise ConfigError(
                f"reading {where}",
                f"{entry!r:.80}",
                "It is a template, or a list of {'name': ..., 'template': ...}.",
            )
        named[name] = source
    return named


def _read(path: Path) -> str:
    raw = read_downloaded(path, 4 * MAX_SOURCE_CHARS, ConfigError, what="chat template")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"reading {path}", f"byte {error.start} is not UTF-8", "Fetch the file again."
        ) from error
