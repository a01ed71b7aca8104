"""How a checkpoint turns texts into vectors: modules.json and what it names, as sentence-transformers writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwenrt.config.fields import bad, boolean, integer, read_json, read_json_list
from qwenrt.errors import ConfigError
from qwenrt.files import is_there

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
_MODULES, _POOLING_CONFIG = "modules.json", "1_Pooling/config.json"
_SWITCHES = {  # of older files -> pooling, in the order in which several are joined
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_FOLDER = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class DenseModule:
    """A linear behind the pooling, in a folder of its own. ``residual``: its input is added to its output."""

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool


@dataclass(frozen=True)
class EmbeddingRecipe:
    """From the final states of a text's tokens to its vector. The defaults are Qwen3-Embedding's.

    pooling: one of POOLINGS, or several whose vectors are joined. include_prompt: whether the prompt's tokens are
    pooled as well. modules: what follows, in its order. prompts: texts to put in front, by name; default_prompt: the
    name of the one used where none is asked for. max_length: tokens that are read of a text; the rest is left out, on
    the left with truncate_left. lower_case: the text is lower-cased. as_written: a text ends as the post-processor of
    tokenizer.json says; otherwise with <|endoftext|> where it says nothing.
    """

    pooling: tuple[str, ...] = ("lasttoken",)
    include_prompt: bool = True
    modules: tuple[DenseModule | Literal["normalize"], ...] = ("normalize",)
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_length: int | None = None
    truncate_left: bool = False
    lower_case: bool = False
    as_written: bool = False


def read_recipe(directory: Path, hidden_size: int, positions: int) -> EmbeddingRecipe:
    """The recipe in a model directory. ConfigError for a module or a pooling that this package does not have.

    ``hidden_size``: of the final states. ``positions``: the most tokens the model knows.
    """
    prompts, default_prompt = _prompts(directory)
    listed = is_there(directory / _MODULES, ConfigError)
    if not listed and not is_there(directory / _POOLING_CONFIG, ConfigError):
        return EmbeddingRecipe(prompts=prompts, default_prompt=default_prompt)
    found = _listed_modules(directory) if listed else [("Pooling", "1_Pooling"), ("Normalize", "")]
    if [kind for kind, _ in found].count("Pooling") != 1 or found[0][0] != "Pooling":
        raise _unsupported(
            directory, f"{' + '.join(kind for kind, _ in found) or 'nothing'} behind the Transformer"
        )
    pooling, include_prompt, width = _pooling(directory / found[0][1] / "config.json", hidden_size)
    modules: list[DenseModule | Literal["normalize"]] = []
    for kind, folder in found[1:]:
        module = _dense(directory, folder, width) if kind == "Dense" else "normalize"
        width = module.out_features if isinstance(module, DenseModule) else width
        modules.append(module)  # type: ignore[arg-type]
    max_length, truncate_left, lower_case = _limits(directory, positions)
    return EmbeddingRecipe(
        pooling,
        include_prompt,
        tuple(modules),
        prompts,
        default_prompt,
        max_length,
        truncate_left,
        lower_case,
        as_written=True,
    )


def _listed_modules(directory: Path) -> list[tuple[str, str]]:
    """(kind, folder) of the modules behind the Transformer, which must come first and lie in the directory itself."""
    path = directory / _MODULES
    found = []
    for number, entry in enumerate(read_json_list(path)):
        kind, folder = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, None)
        name = kind.rpartition(".")[2] if isinstance(kind, str) else ""
        own = isinstance(kind, str) and kind.startswith("sentence_transformers.")
        if not own or name not in ("Transformer", "Pooling", "Dense", "Normalize"):
            raise _unsupported(directory, f"entry {number} is {kind or entry!r:.100}")
        if not isinstance(folder, str) or (folder and not _FOLDER.fullmatch(folder)):
            raise bad(str(path), f"path of entry {number}", folder, "the name of a folder in the directory")
        if (name == "Transformer") is not (number == 0) or (number == 0 and folder):
            raise _unsupported(
                directory, f"entry {number} is a {name} in {folder or 'the directory itself'!r:.60}"
            )
        found.append((name, folder))
    return found[1:]


def _pooling(path: Path, hidden_size: int) -> tuple[tuple[str, ...], bool, int]:
    """(poolings, whether prompts are pooled, width of the vector)."""
    config, where = read_json(path), str(path)
    asked = config.get("pooling_mode")
    if asked is None:
        asked = [mode for name, mode in _SWITCHES.items() if boolean(config, name, where, False)] or ["mean"]
    modes = [asked] if isinstance(asked, str) else asked
    if not isinstance(modes, list) or not modes or not all(mode in POOLINGS for mode in modes):
        raise bad(where, "pooling_mode", asked, f"one or several of {', '.join(POOLINGS)}")
    unknown = [
        n for n in config if n.startswith("pooling_mode_") and n not in _SWITCHES and config[n] is True
    ]
    if unknown:
        raise bad(where, unknown[0], True, f"absent: supported poolings are {', '.join(POOLINGS)}")
    named = next((n for n in ("embedding_dimension", "word_embedding_dimension") if n in config), None)
    if named is not None and integer(config, named, where) != hidden_size:
        raise bad(where, named, config[named], f"the model's hidden_size, {hidden_size}")
    return tuple(modes), boolean(config, "include_prompt", where, True), len(modes) * hidden_size


def _dense(directory: Path, folder: str, width: int) -> DenseModule:
    path = directory / folder / "config.json"
    config, where = read_json(path), str(path)
    if integer(config, "in_features", where) != width:
        raise bad(where, "in_features", config["in_features"], f"{width}, the width of what comes before")
    kind = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = kind.rpartition(".")[2] if isinstance(kind, str) and kind.startswith("torch.nn.") else kind
    if activation not in ACTIVATIONS:
        raise bad(where, "activation_function", kind, f"one of {', '.join(ACTIVATIONS)} of torch.nn")
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise bad(where, name, config[name], "'sentence_embedding'")
    out_features = integer(config, "out_features", where)
    residual = boolean(config, "use_residual", where, False)
    return DenseModule(
        folder, width, out_features, boolean(config, "bias", where, True), activation, residual
    )


def _prompts(directory: Path) -> tuple[dict[str, str], str | None]:
    path = directory / "config_sentence_transformers.json"
    config: Mapping[str, Any] = read_json(path) if is_there(path, ConfigError) else {}
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise bad(str(path), "prompts", prompts, "an object of texts")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise bad(str(path), "default_prompt_name", default, f"one of {', '.join(prompts) or 'no prompts'}")
    return {name: text or "" for name, text in prompts.items()}, default


def _limits(directory: Path, positions: int) -> tuple[int, bool, bool]:
    """(most tokens of a text, whether the left is cut, whether text is lower-cased)."""
    ours, theirs = directory / "sentence_bert_config.json", directory / "tokenizer_config.json"
    config: Mapping[str, Any] = read_json(ours) if is_there(ours, ConfigError) else {}
    tokenizer: Mapping[str, Any] = read_json(theirs) if is_there(theirs, ConfigError) else {}
    longest = positions
    if config.get("max_seq_length") is not None:
        longest = integer(config, "max_seq_length", str(ours))
    elif isinstance(known := tokenizer.get("model_max_length"), int) and known > 0:
        longest = min(known, positions)
    left = tokenizer.get("truncation_side", "right") == "left"
    return longest, left, boolean(config, "do_lower_case", str(ours), False)


def _unsupported(directory: Path, found: str) -> ConfigError:
    return ConfigError(
        f"embedding as {directory / _MODULES} says",
        found,
        "Supported are Transformer, Pooling, then any of Dense and Normalize, all of sentence_transformers.",
    )
