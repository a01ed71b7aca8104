"""Names that other programs have for what qwenrt has: whoever uses one is told the right one.

One table, for keywords in Python and for options on the command line. What it knows is an error that says what to write
instead; nothing is renamed in silence, because what a name means differs in small ways between programs.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from qwenrt.errors import RequestError

P = ParamSpec("P")
R = TypeVar("R")


class UnknownName(RequestError, TypeError):
    """A keyword or an attribute that there is not."""


@dataclass(frozen=True)
class Here:
    """What serves here. ``option``: of `load`, of the server or of sampling, with the ``value`` that means the same;
    ``why``: a sentence, alone where no option is needed."""

    option: str = ""
    value: str | int | None = None
    why: str = ""

    def in_python(self) -> str:
        """As a caller of `load`, `chat` or `generate` writes it."""
        if not self.option:
            return self.why
        written = self.option if self.value is None else f"{self.option}={self._literal()}"
        return f"Use {written}.{self._because()}"

    def on_command_line(self) -> str:
        """As an option of a command."""
        if not self.option:
            return self.why
        written = "--" + self.option.replace("_", "-")
        written += "" if self.value in (None, "True") else f" {self.value}"
        return f"Use {written}.{self._because()}"

    def _literal(self) -> str:
        bare = isinstance(self.value, int) or self.value == "True"
        return str(self.value) if bare else f'"{self.value}"'

    def _because(self) -> str:
        return f" {self.why}" if self.why else ""


_FIRST = Here(why="The model comes first, without a name: a name, a repository or a directory.")
_ONE_DEVICE = Here("device", why="A model runs on one device.")
_ONE_DEVICE_ALONE = Here(why="Leave it out: a model runs on one device.")
_BEST = Here(why="Leave it out: the fastest code that the device has is taken; `explain` says which.")
_AS_CONFIGURED = Here(why="Leave it out: the checkpoint's config.json decides it.")
_LONGEST = Here("max_model_len")
_CACHE = Here(
    "max_model_len", why="The cache takes what the context and the requests at once (max_num_seqs) need."
)
_THREADS = Here(why="Set the environment variable QWENRT_NUM_THREADS.")
_INT8_CACHE = Here("kv_cache_dtype", "int8")
_MAX_TOKENS = Here("max_tokens")
_STREAM = Here(why="Iterate over llm.stream(...): it gives pieces, not all of the text so far.")
_GRAMMAR = Here(why="Use grammar=qwenrt.Grammar.json_schema({...}) or another kind of qwenrt.Grammar.")
_NOT_HERE = Here(why="There is no such way to choose tokens here; leave it out.")
_SAMPLING = Here(
    why="It belongs to an answer: pass it to chat, stream or generate, or in qwenrt.SamplingParams."
)
_LOADING = Here(why="It belongs to the model: pass it to qwenrt.load.")


def _table(*rows: tuple[str, Here]) -> dict[str, Here]:
    return {name: here for names, here in rows for name in names.split()}


OPTIONS: dict[str, Here] = _table(
    # of loading
    ("torch_dtype compute_dtype precision", Here("dtype")),
    ("fp16 half", Here("dtype", "float16")),
    ("bf16", Here("dtype", "bfloat16")),
    ("fp32", Here("dtype", "float32")),
    ("model_path model_name_or_path pretrained_model_name_or_path model_name model_id repo_id", _FIRST),
    ("checkpoint_path checkpoint model_file", _FIRST),
    ("device_map n_gpu_layers num_gpu gpu_layers ngl device_id", _ONE_DEVICE),
    ("cpu_only", Here("device", "cpu")),
    ("tensor_parallel_size pipeline_parallel_size tp dp split_mode", _ONE_DEVICE_ALONE),
    ("max_memory offload_folder cpu_offload_gb low_cpu_mem_usage", _ONE_DEVICE_ALONE),
    ("load_in_4bit", Here("quantize", "int4")),
    ("load_in_8bit", Here("quantize", "int8")),
    (
        "quantization quantization_config",
        Here(
            "quantize", why="It rounds dense weights; GPTQ, AWQ and FP8 files are recognised by themselves."
        ),
    ),
    ("use_cache_quantization use_cache_kernel", _INT8_CACHE),
    ("cache_type_k cache_type_v type_k type_v kv_cache_type kv_dtype", Here("kv_cache_dtype")),
    ("n_ctx num_ctx ctx_size context_length max_seq_len max_seq_length model_max_length", _LONGEST),
    ("gpu_memory_utilization swap_space mem_fraction_static", _CACHE),
    ("n_batch num_batch", Here("max_num_batched_tokens")),
    ("parallel max_batch_size", Here("max_num_seqs")),
    ("n_threads num_thread threads", _THREADS),
    ("trust_remote_code", Here(why="Leave it out: no code from a checkpoint is run, and none is needed.")),
    ("use_flash_attn attn_implementation flash_attn enforce_eager disable_exllama fuse_layers", _BEST),
    ("use_dynamic_ntk use_logn_attn rope_scaling rope_freq_base", _AS_CONFIGURED),
    ("enable_prefix_caching enable_chunked_prefill", Here(why="Leave it out: it is always so.")),
    ("cache_dir download_dir", Here(why="Set the environment variable QWENRT_HOME.")),
    ("token use_auth_token", Here(why="Set the environment variable HF_TOKEN.")),
    ("local_files_only", Here("offline", "True")),
    (
        "use_safetensors safe_serialization use_mmap",
        Here(why="Leave it out: safetensors are mapped, always."),
    ),
    ("resume_download force_download", Here(why="Leave it out: a download that was stopped goes on.")),
    # of choosing tokens
    ("max_new_tokens num_predict n_predict max_length max_completion_tokens max_output_tokens", _MAX_TOKENS),
    ("do_sample", Here("temperature", 0, "That is do_sample=False; otherwise leave it out.")),
    ("repeat_penalty", Here("repetition_penalty")),
    ("num_return_sequences best_of", Here("n")),
    ("temp", Here("temperature")),
    ("topp topP", Here("top_p")),
    ("topk topK", Here("top_k")),
    ("min_new_tokens min_length", Here("min_tokens")),
    ("stop_strings stop_words stop_sequences", Here("stop")),
    ("stop_words_ids eos_token_id", Here("stop_token_ids")),
    ("top_logprobs output_scores", Here("logprobs")),
    ("random_seed", Here("seed")),
    ("generation_config sampling", Here("sampling_params", why="It takes a qwenrt.SamplingParams.")),
    ("streamer stream", _STREAM),
    ("guided_json guided_regex guided_grammar response_format json_schema", _GRAMMAR),
    ("num_beams use_beam_search length_penalty typical_p mirostat tfs_z no_repeat_ngram_size", _NOT_HERE),
    ("tokenizer", Here(why="Leave it out: it belongs to the model, as llm.tokenizer.")),
    ("input_ids", Here("prompt_token_ids")),
    ("system_prompt system_message", Here("system", why="It is an argument of chat and stream.")),
    # of the server
    ("server_name", Here("host")),
    ("server_port", Here("port")),
    ("api_auth", Here("api_key_file")),
    ("share inbrowser disable_gc", Here(why="Leave it out: there is none and none is needed.")),
    # ours, in the wrong place
    ("max_tokens temperature top_p top_k min_p seed stop repetition_penalty presence_penalty", _SAMPLING),
    ("device dtype quantize kv_cache_dtype max_model_len max_num_seqs activations", _LOADING),
)

# Methods and classes that code written for transformers or vLLM asks for.
ATTRIBUTES: dict[str, str] = {
    "chat_stream": "Use stream(query, history=...), which gives pieces, not all of the text so far.",
    "stream_chat": "Use stream(query, history=...).",
    "from_pretrained": "Use qwenrt.load(...).",
    "AutoModelForCausalLM": "Use qwenrt.load(...): chat, stream and generate are methods of what it returns.",
    "AutoModel": "Use qwenrt.load(...).",
    "AutoTokenizer": "Use qwenrt.load_tokenizer(...), or llm.tokenizer.",
    "GenerationConfig": "Use qwenrt.SamplingParams(...).",
    "pipeline": "Use qwenrt.load(...).",
    "Llama": "Use qwenrt.load(...).",
    "AsyncLLMEngine": "Use achat, astream and agenerate of what qwenrt.load returns.",
    "create_chat_completion": "Use chat(messages=[...]), or `qwenrt serve` for clients of OpenAI.",
    "eval": "Leave it out: a model that was loaded is ready.",
    **dict.fromkeys(("cuda", "cpu", "to"), "Use qwenrt.load(..., device=...)."),
    **dict.fromkeys(("half", "float", "bfloat16"), "Use qwenrt.load(..., dtype=...)."),
    "quantize": 'Use qwenrt.load(..., quantize="int4"), or `qwenrt quantize`, which writes files.',
}


def unknown_keyword(asked: str, name: str, known: Collection[str]) -> UnknownName:
    """The error for a keyword that is none of ``known``. ``asked``: how the error begins."""
    here = OPTIONS.get(name)
    return UnknownName(asked, "unknown", here.in_python() if here else _like(name, known))


def unknown_attribute(owner: str, name: str) -> AttributeError:
    """The error for an attribute that ``owner`` has not."""
    said = ATTRIBUTES.get(name)
    return AttributeError(f"{owner} has no attribute {name!r}" + (f". {said}" if said else ""))


def advice_for_option(word: str) -> str | None:
    """What to write in the place of an option of a command line ("--max-new-tokens", "--ngl=9"); None where the table
    does not know it."""
    name = word.partition("=")[0].lstrip("-").replace("-", "_")
    here = OPTIONS.get(name) or (_FIRST if word == "-c" else None)
    return here.on_command_line() if here else None


def says_right_names(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, where a keyword that it does not take is an UnknownName that says which is right."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    where = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        for name in keywords:
            if name not in known:
                raise unknown_keyword(f"{where}({name}=...)", name, known)
        return function(*args, **keywords)

    return call


def takes_no_tokenizer(method: Callable[P, R]) -> Callable[P, R]:
    """``method``, which says so where a tokenizer comes first, as in the ``chat`` of Qwen's own code. Python itself
    would speak of two values for ``history``."""

    @functools.wraps(method)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        first = args[1] if len(args) > 1 else None
        if hasattr(first, "decode") and hasattr(first, "encode"):
            name = method.__name__
            raise UnknownName(
                f"{name}(tokenizer, ...)",
                "a tokenizer in the place of the question",
                f"Pass the text alone, {name}(query, history=...): the model has its tokenizer.",
            )
        return method(*args, **keywords)

    return call


def _like(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    listed = f"Known are: {', '.join(sorted(known))}."
    return f"Did you mean {close[0]}? {listed}" if close else listed
