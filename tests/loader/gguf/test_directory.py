"""A GGUF file as a model directory: config, vocabulary, template, parts, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from qwenrt.cli.estimate import find_config
from qwenrt.config import Environment, GenerationConfig, read_model_config
from qwenrt.errors import CheckpointError, ConfigError, QwenrtError
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.hub.resolve import resolve
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from tests.conftest import write_tiny_checkpoint
from tests.loader.gguf.gguf_files import TEMPLATE, as_gguf, tokenizer_keys
from tests.model.tiny_models import YARN, build
from tests.text.bpe_vocab import FIRST, small_json, tokenizer_config, write

TEXTS = ("hello world 你好", "<|im_end|> é <think>", "  \n\n hell or world", "éé")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENRT_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    build("Qwen2", {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 320}, directory)
    return directory


@pytest.fixture
def make(source: Path, tmp_path: Path) -> Any:
    def made(name: str = "Small Model.gguf", **changes: Any) -> Path:
        return as_gguf(source, tmp_path / name, tokenizer=True, **changes)

    return made


def test_the_tokenizer_is_that_of_the_files(make: Any, tmp_path: Path) -> None:
    config = tokenizer_config(FIRST, chat_template=TEMPLATE)
    wanted = ChatTokenizer.from_dir(
        write(tmp_path / "wanted", tokenizer_json=small_json(), tokenizer_config_json=config)
    )
    found = qwenrt.load_tokenizer(make())
    for text in TEXTS:
        for special in (False, True):
            assert found.encode(text, special) == wanted.encode(text, special)
    assert found.special_tokens == wanted.special_tokens and found.added_tokens == wanted.added_tokens
    assert (found.eos_token_id, found.eod_id) == (wanted.eos_token_id, wanted.eod_id)
    assert found.vocab_size == wanted.vocab_size  # rows without a token are never produced
    assert found.prefix_ids == []
    messages = [{"role": "user", "content": "hello"}]
    assert found.encode_chat(messages) == wanted.encode_chat(messages)


@pytest.mark.parametrize("pre", [None, "default", "qwen2", "deepseek-r1-qwen"])
def test_old_files_name_no_way_to_split_texts(make: Any, pre: str | None) -> None:
    ids = qwenrt.load_tokenizer(make(tokenizer__ggml__pre=pre)).encode(TEXTS[0])
    assert ids == qwenrt.load_tokenizer(make("other.gguf")).encode(TEXTS[0])


def test_a_text_never_begins_with_a_token_of_its_own(make: Any) -> None:
    """Some conversions say add_bos_token by accident."""
    file = make(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__bos_token_id=FIRST)
    assert qwenrt.load_tokenizer(file).prefix_ids == []


def test_ends_sampling_and_named_templates(make: Any) -> None:
    named = {
        "tokenizer__chat_templates": ["tool_use"],
        "tokenizer__chat_template.tool_use": "{{ tools }}",
        "general__sampling__temp": 0.25,
        "general__sampling__top_k": 7,
        "tokenizer__ggml__eot_token_id": FIRST + 1,
    }
    directory = resolve(make(**named))
    generation = GenerationConfig.from_dir(directory)
    assert generation.eos_token_ids == (FIRST + 2, FIRST + 1, FIRST)
    assert (generation.sampling.temperature, generation.sampling.top_k) == (0.25, 7)
    templates = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    assert {entry["name"] for entry in templates} == {"default", "tool_use"}
    released = GenerationConfig.from_dir(resolve(make("plain.gguf"))).sampling
    assert (released.temperature, released.top_p, released.top_k) == (0.7, 0.8, 20)


def test_the_config_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    changes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rope_parameters": YARN,
        "tie_word_embeddings": True,
    }
    build("Qwen2", changes, tmp_path / "source")
    wanted = read_model_config(tmp_path / "source")
    file = as_gguf(tmp_path / "source", tmp_path / "m.gguf")
    found = read_model_config(resolve(file))
    for name in ("rms_norm_eps", "rope_theta", "yarn", "tie_word_embeddings", "head_dim", "vocab_size", "qkv_bias",
                 "num_kv_heads", "max_position_embeddings", "intermediate_size", "num_layers"):  # fmt: skip
        assert getattr(found, name) == getattr(wanted, name), name


def test_qwen1_with_its_control_tokens(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "qwen1")
    wanted = ChatTokenizer.from_dir(directory)
    contents = [*map(lambda i: wanted_form(i), range(256)), *wanted.special_tokens]
    types = [1] * 256 + [3] * len(wanted.special_tokens)
    keys = tokenizer_keys() | {"tokenizer.ggml.tokens": contents, "tokenizer.ggml.token_type": types}
    keys |= {
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.padding_token_id": 256,
        "tokenizer.chat_template": None,
    }
    file = as_gguf(
        directory, tmp_path / "m.gguf", **{key.replace(".", "__"): value for key, value in keys.items()}
    )
    found = qwenrt.load_tokenizer(file)
    assert found.encode(TEXTS[0]) == wanted.encode(TEXTS[0])
    assert found.special_tokens == wanted.special_tokens
    assert GenerationConfig.from_dir(resolve(file)).chat_format == "chatml"
    contents[300] = "<|other|>"
    other = keys | {"tokenizer.ggml.tokens": contents}
    bad = as_gguf(
        directory, tmp_path / "b.gguf", **{key.replace(".", "__"): value for key, value in other.items()}
    )
    with pytest.raises(ConfigError, match=r"token 300 is '<\|other\|>', and Qwen-1's is '<\|extra_41\|>'"):
        resolve(bad)


def wanted_form(byte: int) -> str:
    from qwenrt.text.tokenizer.merges import FORMS_OF_BYTES

    return FORMS_OF_BYTES[byte]


# ---- where the file is


def test_a_directory_with_one_file_and_with_several(make: Any, tmp_path: Path) -> None:
    file = make()
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"GGUF")
    assert resolve(tmp_path) == resolve(file)
    shutil.copy(file, tmp_path / "second.gguf")
    with pytest.raises(
        CheckpointError, match=r"2 GGUF models: Small Model.gguf, second.gguf\. Give the path"
    ):
        resolve(tmp_path)


def test_the_directory_has_the_name_of_the_file(make: Any) -> None:
    assert resolve(make("Qwen3-Coder 模型 Q4_K_M.gguf")).name == "Qwen3-Coder-Q4_K_M"


def test_a_name_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        resolve("modell.gguf")
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(CheckpointError):
        open_checkpoint(resolve(tmp_path / "m.gguf"))


def test_where_nothing_can_be_kept_it_is_made_for_this_process(
    make: Any, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "qwenrt"):
        directory = resolve(make(), env=Environment(cache_dir=tmp_path / "file" / "home"))
    assert "is not kept in" in caplog.text
    assert read_model_config(directory).hidden_size == 64


def test_parts_of_one_file(make: Any, tmp_path: Path) -> None:
    import gguf

    whole = make()
    reader = gguf.GGUFReader(whole)
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, tensors in enumerate((reader.tensors[:10], reader.tensors[10:])):
        writer = gguf.GGUFWriter(folder / f"m-{number + 1:05d}-of-00002.gguf", "qwen2")
        for key, field in reader.fields.items():
            if number == 0 and not key.startswith(("GGUF.", "general.")):
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), kind, sub)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    second = folder / "m-00002-of-00002.gguf"
    for name in (folder, second, folder / "m-00001-of-00002.gguf"):
        checkpoint = open_checkpoint(resolve(name))
        assert checkpoint.tensors.keys() == open_checkpoint(resolve(whole)).tensors.keys()
    assert checkpoint.directory.name == "m"
    second.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"1 of its 2 parts are missing: m-00002-of-00002\.gguf"):
        resolve(folder)
    shutil.copy(folder / "m-00001-of-00002.gguf", second)
    with pytest.raises(CheckpointError, match="it says that it is part 1 of 2, and its name says 2 of 2"):
        resolve(folder)


def test_estimates_read_the_header_alone(make: Any) -> None:
    config, where = find_config(str(make("a.gguf", kind="Q8_0")))
    assert config.quant is not None and config.quant.name == "gguf int8"
    assert where.endswith("/a")


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"general__architecture": "llama"}, "architecture 'llama': that is no Qwen"),
        ({"general__architecture": "clip"}, "a vision tower"),
        ({"general__architecture": "qwen4exp"}, "a Qwen that this version does not know"),
        ({"general__architecture": "qwen9"}, "a Qwen that this version does not know"),
        ({"general__type": "adapter"}, "of the type 'adapter', no model"),
        ({"tokenizer__ggml__model": "llama"}, "it is 'llama'. Qwen's vocabularies are byte-level BPE"),
        ({"tokenizer__ggml__pre": "gpt-4o"}, "Qwen's ways to split texts"),
        ({"tokenizer__ggml__token_type": [1, 1]}, "it has 2 elements, and there are"),
        ({"tokenizer__ggml__eos_token_id": 99999}, "it is 99999, and there are"),
        ({"qwen2__embedding_length": "64"}, "64.*not an integer"),
        ({"qwen2__embedding_length": None}, "there is none"),
        ({"general__sampling__top_k": math.inf}, "sampling.top_k.*it is .*[iI]nf.*, not a number"),
        ({"general__sampling__temp": math.nan}, "sampling.temp.*it is .*[nN]a[nN].*, not a number"),
        ({"qwen2__block_count": 100000}, "num_hidden_layers is 100000 .as config.json would say it"),
        ({"qwen2__rope__scaling__type": "linear", "qwen2__rope__scaling__factor": 2.0}, "rope type is 'linear'"),
        ({"qwen2__attention__value_length": 32}, "it is 32, and keys have 16 channels"),
        ({"qwen2__attention__head_count_kv": [2, 1, 2]}, "differs from layer to layer"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(make: Any, changes: dict[str, Any], match: str) -> None:
    file = make(**changes)
    with pytest.raises(QwenrtError, match=match):
        resolve(file)


def test_a_file_that_is_cut_while_it_is_served(make: Any) -> None:
    """Its pages are mapped: what is gone reads as an error, not as a crash."""
    file = make(kind="F32")
    with qwenrt.load(file, device="cpu", progress=False) as llm:
        os.truncate(file, 4096)
        with pytest.raises(QwenrtError, match=r"cut|truncated|changed"):
            for _ in range(3):
                llm.generate(prompt_token_ids=[1, 2, 3], sampling_params=qwenrt.SamplingParams(max_tokens=2))


def test_config_and_checkpoint_agree(make: Any) -> None:
    directory = resolve(make(kind="Q8_0"))
    config = as_stored(read_model_config(directory), open_checkpoint(directory))
    assert config.quant is not None
    assert sum(each.number for each in config.quant.corrections if each.bits < 16) == 1  # the head
