"""A model that writes what a script says: everything is real but the network.

Prompts are rendered, tokenised, scheduled, cached and preempted as ever, answers are detokenised, parsed and held to
grammars as ever; only a step's numbers are not computed. What a token "computes" is itself: its id is its key, stored
in the paged cache. The next token is that of the script for the prompt which is found in the cache, so that a cache
which mixes up its blocks writes nonsense here too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import qwenrt
from qwenrt.backends.base import Backend
from qwenrt.backends.stack import Outcome, StackParts
from qwenrt.load_options import LoadOptions
from qwenrt.loading import load_with
from qwenrt.ops.steps import FROM_BEFORE, Step
from qwenrt.text.chat.builtin_templates import TEMPLATES
from qwenrt.text.tokenizer.tokenizer import Tokenizer
from tests.text.bpe_vocab import tokenizer_config
from tests.text.strict_template import STRICT

# What is said to a prompt: a text, or its token ids, where it matters how it is cut into tokens.
Reply = Callable[[str], str | list[int]]

# templates by the name used here
CHATS = {"qwen3": "qwen3", "thinking": "qwen3-thinking", "xml": "qwen3-coder"}
RANKS = 3000  # tokens of the built-in vocabulary, which takes two characters a token
WIDTH = 8  # of the network that computes nothing
CERTAIN = 100.0  # the logit of the scripted token, where logits are asked for; that of the end is half of it
KEPT = 512  # prompts whose scripts are remembered


def scripted_llm(reply: Reply, max_model_len: int = 65536, chat: str = "qwen3", **options: Any) -> qwenrt.LLM:
    """An LLM that answers each prompt with what ``reply`` says to its text, control tokens shown.

    The answer is written as a model would: "<think>...</think>" and calls in its own form, without the token that ends
    it. A prompt is asked about once; an error that ``reply`` raises is one of the computation. chat: "qwen3" (thinks or
    not, calls in JSON), "thinking" (its prompts end in a thought), "xml" (Qwen3-Coder), "qwen1" (ReAct) or
    "strict" (as Qwen3.8 in what it refuses and in its efforts). options:
    fields of LoadOptions.
    """
    directory = Path(tempfile.mkdtemp(prefix="scripted-"))
    _write_checkpoint(directory / f"scripted-{chat}", chat, max_model_len)
    chosen = {"device": "cpu", "dtype": "float32", "progress": False, **options}
    llm = load_with(
        directory / f"scripted-{chat}",
        LoadOptions(max_model_len=max_model_len, **chosen),
        backend=_Nothing(torch.device("cpu")),
    )
    weakref.finalize(llm, shutil.rmtree, directory, ignore_errors=True)
    assert llm._assembled is not None
    runner = llm._assembled.engine._engine.runner
    parts = StackParts(
        runner.model, runner.cache.layers, runner.stacks[-1]._parts.vocabulary, 1, max_model_len
    )
    runner.stacks = [ScriptedStack(parts, llm.tokenizer, reply)]
    return llm


class _Nothing(Backend):
    """A device with room for whatever a network would need. A cache of 64 bytes a token is all that is taken."""

    def memory(self) -> tuple[int, int]:
        return 2**40, 2**40


@dataclass(frozen=True)
class _Script:
    """What follows a prompt. Both float32, as the cache has them."""

    prompt: np.ndarray
    answer: np.ndarray

    def goes_on(self, ids: np.ndarray) -> bool:
        """Whether ``ids`` are the prompt and a beginning of the answer."""
        size = len(self.prompt)
        written = ids[size:]
        return (
            len(written) <= len(self.answer)
            and np.array_equal(written, self.answer[: len(written)])
            and np.array_equal(ids[:size], self.prompt)
        )


class ScriptedStack:
    """Steps without a network (see Stack in qwenrt.backends.stack)."""

    name = "script"

    def __init__(self, parts: StackParts, tokenizer: Tokenizer, reply: Reply) -> None:
        self._vocab, self._block_size = parts.network.vocab_size, parts.block_size
        self._tokenizer, self._reply = tokenizer, reply
        self._end = tokenizer.token_id("<|im_end|>")
        keys = parts.cache[0].k.numpy()
        self._slots = keys.reshape(keys.shape[0] * keys.shape[1], -1)[:, 0]
        self._blocks = keys[:, :, 0, 0]
        self._scripts: OrderedDict[bytes, _Script] = OrderedDict()
        # by block: what is written in it, up to which length
        self._writing: dict[int, tuple[_Script, int]] = {}

    def why_not(self, step: Step) -> str | None:
        return None

    def run(self, step: Step, before: Outcome | None = None) -> Outcome:
        assert FROM_BEFORE not in step.token_ids
        self._slots[step.slots(self._block_size)] = step.token_ids
        chosen = torch.tensor(self._chosen(step), dtype=torch.int64)
        logits = torch.empty(len(chosen), 0)
        if None in step.draws:  # the host wants to choose
            logits = torch.zeros(len(chosen), self._vocab)
            logits[:, self._end] = CERTAIN / 2
            logits[torch.arange(len(chosen)), chosen] = CERTAIN
        return Outcome(chosen, lambda: chosen, logits, self)

    def _chosen(self, step: Step) -> list[int]:
        """The next token of each row of logits."""
        wanted, first, tokens = iter(step.logit_rows), 0, []
        row = next(wanted, -1)
        for q_len, kv_len, table in zip(step.q_lens, step.kv_lens, step.tables, strict=True):
            if not first <= row < first + q_len:  # more of this prompt is to come
                self._writing.pop(table[(kv_len - 1) // self._block_size], None)
            while first <= row < first + q_len:
                tokens.append(self._next(table, kv_len - q_len + row - first + 1, q_len == 1))
                row = next(wanted, -1)
            first += q_len
        return tokens

    def _next(self, table: list[int], length: int, decodes: bool) -> int:
        """What follows the ``length`` tokens in the blocks of a table. All of them are read where a block begins."""
        block, place = table[(length - 1) // self._block_size], (length - 1) % self._block_size
        script = self._writing_in(block, length) if decodes and place else None
        if script is None:
            ids = self._blocks[table[: -(-length // self._block_size)]].reshape(-1)[:length]
            if decodes and length > 1:
                script = self._writing_in(table[(length - 2) // self._block_size], length)
                if script is not None and not np.array_equal(ids[: len(script.prompt)], script.prompt):
                    script = None
            script = script or self._known(ids)
        self._writing[block] = script, length
        place = length - len(script.prompt)
        return int(script.answer[place]) if place < len(script.answer) else self._end

    def _writing_in(self, block: int, length: int) -> _Script | None:
        """The script of the answer whose token before the last of ``length`` is in a block. What was written of it need
        not be the script's: a grammar may have had another token."""
        script, written = self._writing.get(block, (None, 0))
        return script if script is not None and written >= length - 1 >= len(script.prompt) else None

    def _known(self, ids: np.ndarray) -> _Script:
        """The script of a prompt, or of one whose answer was begun before and is computed again."""
        key = ids.tobytes()
        if key not in self._scripts:
            begun = [script for script in self._scripts.values() if script.goes_on(ids)]
            if begun:
                return max(begun, key=lambda script: len(script.prompt))
            self._scripts[key] = self._asked(ids)
            if len(self._scripts) > KEPT:
                self._scripts.popitem(last=False)
        self._scripts.move_to_end(key)
        return self._scripts[key]

    def _asked(self, ids: np.ndarray) -> _Script:
        said = self._reply(self._tokenizer.decode(ids.astype(np.int64).tolist(), skip_special_tokens=False))
        written = self._tokenizer.encode(said, allow_special=True) if isinstance(said, str) else said
        return _Script(ids.copy(), np.array([*written, self._end], dtype=np.float32))


def _write_checkpoint(directory: Path, chat: str, max_model_len: int) -> None:
    """Files of a model whose weights are nothing, with the vocabulary of the built-in one."""
    directory.mkdir()
    built_in = Path(qwenrt.__file__).parent / "demo"
    shutil.copy(built_in / "qwen.tiktoken", directory)
    write = _write_qwen1 if chat == "qwen1" else _write_qwen3
    config, generation, tensors = write(max_model_len)
    if chat != "qwen1":
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(RANKS)))
        template = STRICT if chat == "strict" else TEMPLATES[CHATS[chat]]
        (directory / "chat_template.jinja").write_text(template)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, directory / "model.safetensors")


Written = tuple[dict[str, Any], dict[str, Any], dict[str, tuple[int, ...]]]


def _write_qwen3(max_model_len: int) -> Written:
    vocab, d = 3072, WIDTH
    config = {
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": d,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": d,
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    layer = "model.layers.0"
    tensors: dict[str, tuple[int, ...]] = {
        f"{layer}.self_attn.{name}_proj.weight": (d, d) for name in ("q", "k", "v", "o")
    }
    tensors |= {f"{layer}.mlp.{name}_proj.weight": (d, d) for name in ("gate", "up", "down")}
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    tensors |= {f"{layer}.{name}.weight": (d,) for name in norms}
    tensors |= {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    return config, {"eos_token_id": RANKS + 2, "do_sample": False}, tensors


def _write_qwen1(max_model_len: int) -> Written:
    vocab, d = 3264, WIDTH
    config = {
        "model_type": "qwen",
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": 2 * d,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "kv_channels": d,
        "seq_length": max_model_len,
        "max_position_embeddings": max_model_len,
        "torch_dtype": "float32",
    }
    layer = "transformer.h.0"
    tensors: dict[str, tuple[int, ...]] = {
        f"{layer}.attn.c_attn.weight": (3 * d, d),
        f"{layer}.attn.c_attn.bias": (3 * d,),
        f"{layer}.attn.c_proj.weight": (d, d),
        f"{layer}.ln_1.weight": (d,),
        f"{layer}.ln_2.weight": (d,),
        "transformer.wte.weight": (vocab, d),
        "transformer.ln_f.weight": (d,),
        "lm_head.weight": (vocab, d),
    }
    tensors |= {f"{layer}.mlp.{name}.weight": (d, d) for name in ("w1", "w2", "c_proj")}
    generation = {
        "chat_format": "chatml",
        "eos_token_id": RANKS,
        "pad_token_id": RANKS,
        "max_window_size": max_model_len,
        "do_sample": False,
    }
    return config, generation, tensors
