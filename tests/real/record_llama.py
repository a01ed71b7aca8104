"""Records what llama.cpp answers: PYTHON -m tests.real.record_llama 0.5B [--cache DIR].

PYTHON has llama-cpp-python. Writes tests/real/recorded/SIZE-llama.json: for each short prompt that was recorded from
transformers (tests/real/record.py) the greedy tokens by the released GGUF file, and by how much the logit of each led.
llama.cpp rounds the inputs of its linears to 8 bits: of two tokens that are nearly as likely it may choose the other.
Its layouts for single instruction sets are off: on some machines with AMX they end the process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from scripts.fetch_models import RELEASES, cache_directory, gguf_file

_RECORDED = Path(__file__).parent / "recorded"
_LONGEST, _NEW_TOKENS = 400, 48


def answer(model: Any, prompt: list[int]) -> dict[str, Any]:
    """The greedy continuation of a prompt, to the end of the turn or _NEW_TOKENS."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = _LONGEST + 2 * _NEW_TOKENS, _LONGEST, _LONGEST
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(_LONGEST, 0, 1)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    tokens: list[int] = []
    leads: list[float] = []
    new, place = prompt, 0
    while len(tokens) < _NEW_TOKENS:
        batch.n_tokens = len(new)
        for i, token in enumerate(new):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, place + i, 1, 0
            batch.logits[i] = i == len(new) - 1
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit(f"llama_decode of {len(new)} tokens failed")
        place += len(new)
        row = llama_cpp.llama_get_logits_ith(context, len(new) - 1)
        logits = np.ctypeslib.as_array(row, (llama_cpp.llama_vocab_n_tokens(vocabulary),))
        second, first = np.argsort(logits)[-2:]
        tokens.append(int(first))
        leads.append(round(float(logits[first] - logits[second]), 4))
        if llama_cpp.llama_vocab_is_eog(vocabulary, tokens[-1]):
            break
        new = tokens[-1:]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return {"prompt": prompt, "tokens": tokens, "leads": leads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=tuple(RELEASES))
    parser.add_argument("--cache", type=Path, default=cache_directory())
    args = parser.parse_args()
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(bytes(gguf_file(RELEASES[args.size], args.cache)), params)
    recorded = json.loads((_RECORDED / f"{args.size}.json").read_text(encoding="utf-8"))
    answers = {}
    for name, entry in recorded.items():
        if len(entry["prompt"]) <= _LONGEST:
            answers[name] = answer(model, entry["prompt"])
            print(name, len(answers[name]["tokens"]), min(answers[name]["leads"]), flush=True)
    path = _RECORDED / f"{args.size}-llama.json"
    path.write_text(json.dumps(answers, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
