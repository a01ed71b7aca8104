"""The peers' files of random weights have the tensors of llama.cpp's own converter."""

from __future__ import annotations

from pathlib import Path

import gguf

from benchmarks.gguf_files import tensors, write_f16
from qwenrt.config import Environment, read_model_config
from qwenrt.loader.hub.resolve import resolve
from tests.conftest import GOLDEN


def test_a_file_of_linear_attention_is_laid_out_as_a_converted_one(tmp_path: Path) -> None:
    recorded = GOLDEN / "gguf" / "qwen3_5_vl" / "model.gguf"
    config = read_model_config(resolve(recorded, env=Environment(cache_dir=tmp_path)))
    head = f"blk.{config.num_layers}."  # that guesses tokens, which is left out
    wanted = {t.name: list(map(int, t.shape)) for t in gguf.GGUFReader(recorded).tensors}
    wanted = {name: shape for name, shape in wanted.items() if not name.startswith(head)}
    made = {name: list(reversed(shape)) for name, shape in tensors(config)}
    assert made == wanted

    write_f16(config, tmp_path / "m.gguf")
    reader, source = gguf.GGUFReader(tmp_path / "m.gguf"), gguf.GGUFReader(recorded)
    assert {t.name: list(map(int, t.shape)) for t in reader.tensors} == wanted
    said, of_model = ({key: field.contents() for key, field in r.fields.items()} for r in (reader, source))
    layers = said.pop("qwen35.attention.recurrent_layers")
    assert layers == [config.is_linear(n) for n in range(config.num_layers)]
    left = {"block_count", "nextn_predict_layers", "full_attention_interval", "rope.dimension_sections"}
    for key in (key for key in of_model if key.startswith("qwen35.") and key[7:] not in left):
        assert said[key] == of_model[key], key
