"""Embeddings by the checkpoint's own recipe, beside transformers' states and the recipe's formulas by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from qwenrt.errors import CheckpointError, ConfigError, RequestError
from tests.model.tiny_models import build, load
from tests.text.bpe_vocab import FIRST, small_json, tokenizer_config, write

D = 48  # the tiny models' hidden size
EOD, IM_END = FIRST, FIRST + 2
TEXTS = ["hello world", "你好", "<|im_end|> is text", "hello " * 30]
ST = "sentence_transformers.models."

Make = Callable[..., tuple[Any, Path]]


def ending(*ids: int, before: tuple[int, ...] = ()) -> dict[str, Any]:
    """A post-processor that puts tokens around a text."""
    names = {i: f"t{i}" for i in (*before, *ids)}
    tokens = {i: {"SpecialToken": {"id": name, "type_id": 0}} for i, name in names.items()}
    single = [
        *(tokens[i] for i in before),
        {"Sequence": {"id": "A", "type_id": 0}},
        *(tokens[i] for i in ids),
    ]
    known = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tiny model's oracle and directory; keywords: the recipe's files."""
    oracles: dict[str, Any] = {}

    def made(
        kind: str = "Qwen3",
        changes: dict[str, Any] | None = None,
        processor: dict[str, Any] | None = None,
        modules: list[tuple[str, str]] | None = None,
        **files: dict[str, Any],
    ) -> tuple[Any, Path]:
        directory = tmp_path_factory.mktemp("embeds")
        shape = {"vocab_size": 320, "num_hidden_layers": 2, "head_dim": 16, **(changes or {})}
        oracle = oracles[str(directory)] = build(kind, shape, directory)
        tokenizer = small_json() if processor is None else small_json(post_processor=processor)
        write(directory, tokenizer_json=tokenizer, tokenizer_config_json=tokenizer_config(FIRST))
        if modules is not None:
            listed = [("Transformer", ""), *modules]
            entries = [
                {"idx": i, "name": str(i), "path": p, "type": ST + t} for i, (t, p) in enumerate(listed)
            ]
            (directory / "modules.json").write_text(json.dumps(entries))
        for name, content in files.items():
            path = directory / name.replace("__", "/").replace("_json", ".json")
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        return oracle, directory

    return made


POOLED = [("Pooling", "1_Pooling")]


def pooling(*modes: str, **more: Any) -> dict[str, Any]:
    return {"word_embedding_dimension": D, "pooling_mode": list(modes), **more}


def states(oracle: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = oracle.model(torch.tensor([ids])).last_hidden_state[0]
    return found


def agree(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 1e-4 * max(1.0, float(wanted.abs().max()))


BY_HAND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda s: s[0],
    "max": lambda s: s.max(0).values,
    "mean": lambda s: s.sum(0) / len(s),
    "mean_sqrt_len_tokens": lambda s: s.sum(0) / torch.tensor(float(len(s))).sqrt(),
    "weightedmean": lambda s: sum((i + 1) * row for i, row in enumerate(s)) / sum(range(1, len(s) + 1)),  # type: ignore
    "lasttoken": lambda s: s[-1],
}


@pytest.mark.parametrize("modes", [[name] for name in BY_HAND] + [["mean", "lasttoken"]], ids="+".join)
def test_every_pooling(make: Make, modes: list[str]) -> None:
    oracle, directory = make(
        processor=ending(EOD), modules=POOLED, **{"1_Pooling__config_json": pooling(*modes)}
    )
    with load(directory) as llm:
        together = llm.embed(TEXTS)
        for text, vector in zip(TEXTS, together, strict=True):
            s = states(oracle, [*llm.tokenizer.encode(text), EOD])
            agree(vector, torch.cat([BY_HAND[mode](s) for mode in modes]))
            agree(llm.embed(text), vector)
        agree(llm.embed(TEXTS, normalize=True), F.normalize(together, dim=-1))


def test_older_files_name_poolings_by_switches(make: Make) -> None:
    switches = {
        "pooling_mode_cls_token": False,
        "pooling_mode_lasttoken": True,
        "pooling_mode_mean_tokens": True,
    }
    oracle, directory = make(processor=ending(EOD), modules=POOLED, **{"1_Pooling__config_json": switches})
    with load(directory) as llm:
        s = states(oracle, [*llm.tokenizer.encode("hello"), EOD])
        agree(llm.embed("hello"), torch.cat([s.mean(0), s[-1]]))
    (directory / "1_Pooling" / "config.json").write_text("{}")
    with load(directory) as llm:
        agree(llm.embed("hello"), s.mean(0))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    ],
    ids=["qwen2", "qwen3", "window", "experts"],
)
def test_attention_in_both_directions(make: Make, kind: str, changes: dict[str, Any]) -> None:
    oracle, directory = make(
        kind,
        {"is_causal": False, **changes},
        ending(EOD),
        [*POOLED, ("Normalize", "2_Normalize")],
        **{"1_Pooling__config_json": pooling("mean")},
    )
    with load(directory) as llm:
        same_length = ["hello world", "world hello"]
        for texts in (TEXTS, same_length):
            for text, vector in zip(texts, llm.embed(texts), strict=True):
                ids = [*llm.tokenizer.encode(text), EOD]
                agree(vector, F.normalize(states(oracle, ids).mean(0), dim=0))
                agree(llm.embed(text), vector)
        with torch.no_grad():
            agree(llm.logits(ids), oracle(torch.tensor([ids])).logits[0])
        for ask in (
            lambda: llm.generate("hello"),
            lambda: llm.chat("hello"),
            lambda: next(llm.stream("hello")),
            lambda: llm._assembled.engine.last_logits([[1]], [2]),  # type: ignore[union-attr]
        ):
            with pytest.raises(RequestError, match="is_causal is false"):
                ask()
        assert not llm.can_chat


@pytest.mark.parametrize(
    ("processor", "listed", "before", "after"),
    [
        (None, False, [], [EOD]),
        (None, True, [], []),
        (ending(EOD), True, [], [EOD]),
        (ending(IM_END), True, [], [IM_END]),
        (ending(IM_END), False, [], [IM_END]),
        (ending(IM_END, EOD, before=(EOD,)), True, [EOD], [IM_END, EOD]),
        (ending(), True, [], []),
    ],
)
def test_texts_begin_and_end_as_the_tokenizer_says(
    make: Make, processor: Any, listed: bool, before: list[int], after: list[int]
) -> None:
    files = {"1_Pooling__config_json": pooling("lasttoken")} if listed else {}
    oracle, directory = make(processor=processor, modules=POOLED if listed else None, **files)
    with load(directory) as llm:
        ids = [*before, *llm.tokenizer.encode("hello world"), *after]
        agree(llm.embed("hello world", normalize=False), states(oracle, ids)[-1])
        length = float(llm.embed("hello world").norm())
        assert (abs(length - 1) < 1e-5) is not listed


@pytest.mark.parametrize(
    ("doubtful", "given"),
    [
        (True, {}),
        (False, {"modules": POOLED, "1_Pooling__config_json": pooling("lasttoken")}),
        (False, {"processor": ending(EOD)}),
        (False, {"config_sentence_transformers_json": {"prompts": {"query": "Query: "}}}),
        (False, {"changes": {"is_causal": False}}),
    ],
)
def test_a_model_made_to_write_says_once_that_its_vectors_tell_little(
    make: Make, caplog: pytest.LogCaptureFixture, doubtful: bool, given: dict[str, Any]
) -> None:
    _, directory = make(**given)
    with load(directory) as llm:
        assert "recipe" not in caplog.text  # those who chat are not told
        for _ in range(2):
            llm.embed("hello world")
    assert caplog.text.count("has no recipe for embeddings (modules.json)") == doubtful


def test_prompts(make: Make) -> None:
    oracle, directory = make(
        processor=ending(EOD, before=(IM_END,)),
        modules=POOLED,
        config_sentence_transformers_json={"prompts": {"query": "world: ", "document": ""}},
        **{"1_Pooling__config_json": pooling("mean", "cls", include_prompt=False)},
    )
    with load(directory) as llm:
        encode = llm.tokenizer.encode

        def wanted(prompt: str) -> torch.Tensor:
            s = states(oracle, [IM_END, *encode(f"{prompt}hello"), EOD])
            s = s[1 + len(encode(prompt)) :] if prompt else s
            return torch.cat([s.mean(0), s[0]])

        agree(llm.embed("hello"), wanted(""))
        agree(llm.embed("hello", prompt_name="document"), wanted(""))
        agree(llm.embed("hello", prompt_name="query"), wanted("world: "))
        agree(llm.embed("hello", instruction="task"), wanted("Instruct: task\nQuery:"))
        with pytest.raises(RequestError, match=r"prompt_name='passage': unknown.*'query', 'document'"):
            llm.embed("hello", prompt_name="passage")
        with pytest.raises(RequestError, match="both an instruction and a prompt_name"):
            llm.embed("hello", prompt_name="query", instruction="task")
    config = {"prompts": {"query": "world: "}, "default_prompt_name": "query"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(config))
    with load(directory) as llm:
        agree(llm.embed("hello"), wanted("world: "))


def test_long_texts_are_cut_as_the_directory_says(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    oracle, directory = make(
        processor=ending(EOD, before=(IM_END,)),
        modules=POOLED,
        sentence_bert_config_json={"max_seq_length": 8, "do_lower_case": True},
        **{"1_Pooling__config_json": pooling("mean")},
    )
    text = "HELLO world " * 9
    with load(directory) as llm, caplog.at_level(logging.WARNING, "qwenrt"):
        ids = llm.tokenizer.encode(text.lower())
        agree(llm.embed([text, "hi"])[0], states(oracle, [IM_END, *ids[:6], EOD]).mean(0))
        assert "1 of 2 texts were cut to 8 tokens" in caplog.text
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "truncation_side": "left"}))
    with load(directory) as llm:
        agree(llm.embed(text), states(oracle, [IM_END, *ids[-6:], EOD]).mean(0))
    (directory / "sentence_bert_config.json").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 10}))
    with load(directory) as llm:
        agree(llm.embed(text.lower()), states(oracle, [IM_END, *ids[:8], EOD]).mean(0))


def test_dense_modules(make: Make) -> None:
    dense = {"in_features": D, "out_features": 20, "bias": True}
    tanh = {**dense, "activation_function": "torch.nn.modules.activation.Tanh"}
    plain = {"in_features": 20, "out_features": 20, "bias": False, "use_residual": True}
    plain["activation_function"] = "torch.nn.modules.linear.Identity"
    oracle, directory = make(
        processor=ending(EOD),
        modules=[*POOLED, ("Dense", "2_Dense"), ("Normalize", "3_Normalize"), ("Dense", "4_Dense")],
        **{
            "1_Pooling__config_json": pooling("mean"),
            "2_Dense__config_json": tanh,
            "4_Dense__config_json": plain,
        },
    )
    g = torch.Generator().manual_seed(0)
    w, b, v = (torch.randn(*shape, generator=g) / 4 for shape in ((20, D), (20,), (20, 20)))
    save_file({"linear.weight": w, "linear.bias": b}, str(directory / "2_Dense" / "model.safetensors"))
    save_file({"linear.weight": v.bfloat16()}, str(directory / "4_Dense" / "model.safetensors"))
    with load(directory) as llm:
        s = states(oracle, [*llm.tokenizer.encode("hello"), EOD])
        middle = F.normalize(torch.tanh(w @ s.mean(0) + b), dim=0)
        agree(llm.embed("hello"), v.bfloat16().float() @ middle + middle)
        assert llm.embed(["hello", "world"]).shape == (2, 20)
    save_file({"linear.weight": w}, str(directory / "2_Dense" / "model.safetensors"))
    with (
        load(directory) as llm,
        pytest.raises(CheckpointError, match=r"2_Dense: it holds.*config.json describes"),
    ):
        llm.embed("hello")


@pytest.mark.parametrize(
    ("modules", "file", "content", "found"),
    [
        (
            [("WeightedLayerPooling", "1_W")],
            None,
            None,
            "entry 1 is 'sentence_transformers.models.WeightedLayerPooling'",
        ),
        ([("Normalize", "")], None, None, "Normalize behind the Transformer"),
        ([], None, None, "nothing behind the Transformer"),
        ([("Pooling", "../1_Pooling")], None, None, "path of entry 1"),
        ([("Pooling", "/etc")], None, None, "path of entry 1"),
        (POOLED, "1_Pooling", None, "no such file"),
        (POOLED, "1_Pooling", {"pooling_mode": "attention"}, "pooling_mode is 'attention'"),
        (POOLED, "1_Pooling", {"pooling_mode": 5}, "pooling_mode is 5"),
        (POOLED, "1_Pooling", {"pooling_mode_attention": True}, "pooling_mode_attention is True"),
        (POOLED, "1_Pooling", {"word_embedding_dimension": 64}, "word_embedding_dimension is 64"),
        ([*POOLED, ("Dense", "2_Dense")], "2_Dense", {"in_features": 7}, "in_features is 7"),
        (
            [*POOLED, ("Dense", "2_Dense")],
            "2_Dense",
            {"in_features": D, "out_features": 8, "activation_function": "os.system"},
            "activation_function is 'os.system'",
        ),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_named(
    make: Make, modules: Any, file: str | None, content: Any, found: str
) -> None:
    files = (
        {"1_Pooling__config_json": pooling("mean")} if file != "1_Pooling" and POOLED[0] in modules else {}
    )
    if file is not None and content is not None:
        files[f"{file}__config_json"] = content
    _, directory = make(modules=modules, **files)
    with load(directory) as llm:
        assert llm.generate("hello", max_tokens=2, ignore_eos=True).token_ids
        with pytest.raises(ConfigError, match=found) as caught:
            llm.embed("hello")
        assert caught.value.remedy


@pytest.mark.parametrize(
    "content", ["{}", "[5]", '[{"type": 5}]', '[{"type": "custom.Transformer", "path": ""}]']
)
def test_a_list_of_modules_that_is_none(make: Make, content: str) -> None:
    _, directory = make()
    (directory / "modules.json").write_text(content)
    with load(directory) as llm, pytest.raises(ConfigError, match=r"modules.json"):
        llm.embed("hello")


def test_reranking_knows_nothing_of_the_recipe(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its question has a form of its own, whatever tokenizer.json puts around a text."""
    longer = {"max_position_embeddings": 512}
    _, plain = make(changes=longer)
    _, dressed = make(
        changes=longer,
        processor=ending(EOD, before=(IM_END,)),
        modules=POOLED,
        sentence_bert_config_json={"max_seq_length": 4},
        **{"1_Pooling__config_json": pooling("mean")},
    )
    monkeypatch.setattr("qwenrt.retrieval.verdict_ids", lambda _: (3, 4))
    with load(plain) as one, load(dressed) as other:
        assert one.rerank("hello", ["world", "你好"]) == other.rerank("hello", ["world", "你好"])
