"""Embeddings of texts, computed as the files of the checkpoint's directory say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from qwenrt.arguments import as_token_ids
from qwenrt.config import ModelConfig
from qwenrt.config.embedding import DenseModule, EmbeddingRecipe, read_recipe
from qwenrt.errors import CheckpointError, QwenrtError, RequestError, shown
from qwenrt.loader.checkpoint.checkpoint import TensorReader, open_checkpoint
from qwenrt.model.pooling import dense, pool

if TYPE_CHECKING:
    from qwenrt.engine.async_engine import AsyncEngine
    from qwenrt.text.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("qwenrt")

Module = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Embedder:
    """A recipe, and ``modules``: what follows the pooling, float32 [B, K] -> [B, N] each, on the CPU.

    ``error``: why the recipe of this checkpoint cannot be followed. ``doubt``: why its vectors may be worth little,
    which is said with the first of them.
    """

    recipe: EmbeddingRecipe = field(default_factory=EmbeddingRecipe)
    modules: tuple[Module, ...] = ()
    error: QwenrtError | None = None
    doubt: str = ""

    @classmethod
    def load(cls, directory: Path, config: ModelConfig) -> Embedder:
        """From the files of a model directory. An error in them is raised by `embed` alone: generating goes on."""
        try:
            recipe = read_recipe(directory, config.hidden_size, config.max_position_embeddings)
            modules = [
                _dense_module(directory, module) if isinstance(module, DenseModule) else _normalized
                for module in recipe.modules
            ]
        except QwenrtError as error:
            logger.warning("this model cannot embed texts: %s", error)
            return cls(error=error)
        return cls(recipe, tuple(modules), doubt=_doubt(directory, config, recipe))

    def embed(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        texts: Sequence[object],
        instruction: str | None,
        prompt_name: str | None,
        normalize: bool | None,
        *,
        longest: int | None = None,
        truncate: bool = True,
    ) -> tuple[torch.Tensor, int]:
        """As LLM.embed, of a list of texts or token ids: the vectors, and how many tokens were read.

        longest: tokens of a text at most, beside what the recipe says. truncate: longer ones are cut, else refused.
        """
        if self.error is not None:
            raise self.error
        if self.doubt and tokenizer.suffix_ids is None:  # models for embeddings say how a text ends
            logger.warning("%s", self.doubt)
            self.doubt = ""
        prompt = self._prompt(instruction, prompt_name)
        ids = self._token_ids(tokenizer, texts, prompt, longest, truncate)
        states = engine.pooled(ids, self._pool(tokenizer, prompt, min(map(len, ids))))
        return self._finished(states, normalize), sum(map(len, ids))

    def _prompt(self, instruction: str | None, name: str | None) -> str:
        """The prompt that is put in front of each text."""
        prompts = self.recipe.prompts
        if instruction is not None:
            _require_text("instruction", instruction)
            if name is not None:
                raise RequestError("embed", "both an instruction and a prompt_name", "Pass one of the two.")
            return f"Instruct: {instruction}\nQuery:"
        name = self.recipe.default_prompt if name is None else name
        if name is None:
            return ""
        if not isinstance(name, str) or name not in prompts:
            known = ", ".join(map(repr, prompts)) or "none"
            raise RequestError(f"prompt_name={shown(name)}", "unknown", f"This model's prompts: {known}.")
        return prompts[name]

    def _token_ids(
        self, tokenizer: Tokenizer, texts: Sequence[object], prompt: str, longest: int | None, truncate: bool
    ) -> list[list[int]]:
        """The ids of each text with the prompt before it, cut to the recipe's length, and with the tokens that the
        tokenizer's file puts before and after every text."""
        before, after = self._around(tokenizer)
        limits = [limit for limit in (self.recipe.max_length, longest) if limit is not None]
        most = min(limits, default=None)
        room = None if most is None else most - len(before) - len(after)
        if room is not None and room < 1:
            found = f"max_length {most} with {len(before) + len(after)} tokens around each text"
            raise RequestError("embed", found, "Correct max_seq_length in sentence_bert_config.json.")
        cut, made = 0, []
        for text in texts:
            if isinstance(text, list):
                ids = [*tokenizer.encode(prompt), *as_token_ids(text)]
            else:
                _require_text("a text to embed", text)
                whole = f"{prompt}{text}"
                ids = tokenizer.encode(whole.lower() if self.recipe.lower_case else whole)
            if room is not None and len(ids) > room:
                if not truncate:
                    found = f"{len(ids)} tokens, and this model's longest has {room}"
                    raise RequestError("a text to embed", found, "Send a shorter one, or let it be cut.")
                cut += 1
                ids = ids[-room:] if self.recipe.truncate_left else ids[:room]
            made.append([*before, *ids, *after])
        if cut:
            logger.warning(
                "%d of %d texts were cut to %d tokens, this model's longest text",
                cut,
                len(made),
                most,
            )
        return made

    def _pool(self, tokenizer: Tokenizer, prompt: str, shortest: int) -> Module:
        """The function from a text's final states [n, D] to a vector float32 [D']. ``shortest``: the smallest n of all
        texts."""
        skipped = 0
        if prompt and not self.recipe.include_prompt:
            skipped = len(self._around(tokenizer)[0]) + len(tokenizer.encode(prompt))
            if skipped >= shortest:
                found = f"{shortest} tokens, of which the prompt, which is not pooled, has {skipped}"
                raise RequestError(
                    "embedding a text behind a prompt", found, "Pass a longer text, or no prompt."
                )
        return partial(pool, poolings=self.recipe.pooling, skipped=skipped)

    def _finished(self, vectors: torch.Tensor, normalize: bool | None) -> torch.Tensor:
        """Pooled vectors [B, D'] through the modules. ``normalize``: length 1 at the end, None as the recipe says."""
        modules = self.modules
        if normalize is not None:
            while modules and modules[-1] is _normalized:
                modules = modules[:-1]
            modules = (*modules, _normalized) if normalize else modules
        for module in modules:
            vectors = module(vectors)
        return vectors

    def _around(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        after = tokenizer.suffix_ids
        if after is None:
            after = [] if self.recipe.as_written else [tokenizer.eod_id]
        return tokenizer.prefix_ids, after


def _doubt(directory: Path, config: ModelConfig, recipe: EmbeddingRecipe) -> str:
    """A sentence for a directory in which nothing but this call speaks of embeddings; else nothing."""
    if recipe.as_written or recipe.prompts or not (config.is_causal and config.has_head):
        return ""
    return (
        f"{directory} has no recipe for embeddings (modules.json): a text's vector is the state of its last token, as "
        "Qwen3-Embedding has it. Models that were made to write texts give vectors that tell little about likeness."
    )


def _normalized(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors, dim=-1)


def _dense_module(directory: Path, module: DenseModule) -> Module:
    folder = directory / module.folder
    checkpoint = open_checkpoint(folder)
    size = (module.out_features, module.in_features)
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": size}
    if module.bias:
        shapes["linear.bias"] = size[:1]
    if module.residual and size[0] != size[1]:
        shapes["residual.weight"] = size
    found = {name: tuple(entry.shape) for name, entry in checkpoint.tensors.items()}
    if found != shapes:
        raise CheckpointError(
            f"reading {folder}",
            f"it holds {found}",
            f"Its config.json describes {shapes}: one of the two belongs to another model.",
        )
    reader = TensorReader(checkpoint)
    tensors = {name: reader.tensor(name).float().clone() for name in shapes}
    residual = tensors.get("residual.weight")
    if module.residual and residual is None:
        residual = torch.eye(size[0])
    return partial(
        dense,
        weight=tensors["linear.weight"],
        bias=tensors.get("linear.bias"),
        activation=module.activation,
        residual=residual,
    )


def _require_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(what, f"got {type(value).__name__}", "Pass a str.")
