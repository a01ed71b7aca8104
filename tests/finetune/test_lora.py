"""Adapters are trained beside any base, written as peft has them, and nothing else changes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenrt
from qwenrt.config import read_model_config
from qwenrt.config.released import released_config
from qwenrt.errors import RequestError
from qwenrt.finetune import finetune
from qwenrt.finetune.building import Base, build_adapter
from qwenrt.finetune.job import chosen_settings
from qwenrt.finetune.lora import SEED_TARGETS, LoraSettings, never_learned, num_trained, places
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.finetune.trainer import Trainer
from qwenrt.loader.adapters import BaseWeights, read_adapter, write_adapter
from qwenrt.loader.hub.resolve import DEMO
from qwenrt.merging import merge
from qwenrt.ops.steps import StepPlan
from qwenrt.ops.types import AdapterSpan, StepAdapters
from tests.conftest import GOLDEN
from tests.finetune.test_networks import SHAPES, corpus_of
from tests.ops.quantised_checkpoints import awq_config, awq_state, fp8_config, fp8_state

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"{word}?"},
            {"role": "assistant", "content": f'{{"a": "{word}"}}'},
        ]
    }
    for word in ("Paris", "Rome", "Oslo", "Lima")
]


class NoTokens:
    """A tokenizer of a model that is known by its ids alone."""

    def __init__(self, im_end_id):
        self.im_end_id = im_end_id

    def token_id(self, content):
        return {"<|im_end|>": self.im_end_id}.get(content)

    def decode(self, ids):
        return str(ids)


@pytest.fixture(params=["gptq_int4_act_order", "plain", "qwen3_moe", "qwen3_next", "qwen3_5"])
def source(request, tmp_path):
    """A directory with weights, of each kind of network and of codes."""
    if request.param not in SHAPES:
        return GOLDEN / request.param
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**SHAPES[request.param], "eos_token_id": 7}))
    from qwenrt.backends.base import Backend
    from qwenrt.finetune.checkpoint import write_checkpoint
    from qwenrt.finetune.network import initialise
    from qwenrt.model.qwen import Qwen

    model = Qwen(read_model_config(directory), Backend(torch.device("cpu")), torch.float32)
    initialise(model, 3, 0.2)
    write_checkpoint(model, directory, directory)
    return directory


def run_of(source, lora=None, **how):
    how = {"method": "lora", "max_length": 64, "learning_rate": 2e-2, "batch_tokens": 64, "epochs": 8, **how}
    options = TrainingSettings(**how)
    base = Base.open(source, read_model_config(source), options)
    corpus = corpus_of(min(150, base.config.vocab_size))
    said, end = int(corpus.ids[7]), int(corpus.ids[6])  # both are read and said
    lora = {"rank": 4, "alpha": 8, "keep_modules": "none", **(lora or {})}
    if lora.get("train_tokens") == "two":
        lora["train_tokens"] = (said, "<|im_end|>")
    return base, *build_adapter(base, corpus, options, LoraSettings(**lora), NoTokens(end))


def logits(run, weights, ids):
    model = run.network.model
    plan = StepPlan([len(ids)], [len(ids)])
    plan.adapters = StepAdapters((AdapterSpan(weights, 0, len(ids)),))
    with torch.no_grad():
        return model.logits(model.forward(ids, plan, [1]), plan.adapters)


@pytest.mark.parametrize("kind", ["plain", "dora", "rows", "whole", "routers"])
def test_what_is_learned_is_written_and_read_again(source, kind, tmp_path):
    lora = {"dora": {"dora": True, "rslora": True}, "rows": {"train_tokens": "two"}}.get(kind, {})
    if kind == "whole":
        lora = {"keep_modules": "all"}
    if (kind != "plain" and source.name == "qwen3_5") or (kind == "whole" and source.name != "base"):
        pytest.skip("the same code serves")
    if kind == "routers" and source.name not in ("base", "qwen3_next"):
        with pytest.raises(RequestError, match='router="trained": this model has no experts'):
            run_of(source, lora, router="trained")
        return
    base, run, adapter = run_of(source, lora, **({"router": "trained"} if kind == "routers" else {}))
    assert run.network.balance == (0.0 if kind != "routers" else pytest.approx(0.05 / 2, rel=1))
    samples = list(range(len(run.corpus)))
    before = run.loss(samples)
    frozen = {name: tensor.clone() for name, tensor in run.network.model.tensors()}
    run.gradients(samples)
    moved = {name: p.grad is not None and bool(p.grad.any()) for name, p in adapter.parameters.items()}
    assert all(
        moved[name] for name in moved if "lora_A" not in name and ".experts." not in name
    )  # B is 0 at first
    run.optimizer.forget()
    for batch in run.remaining():
        run.train_step(batch)
    assert run.loss(samples) < before - 0.1
    assert all(torch.equal(frozen[name], tensor) for name, tensor in run.network.model.tensors())
    weights = adapter.weights()
    write_adapter(tmp_path / "out", base.config, weights, base=BaseWeights(base.checkpoint, base.config))
    read, info = read_adapter(tmp_path / "out", base.config, base=BaseWeights(base.checkpoint, base.config))
    ids = run.corpus.ids[: run.corpus.starts[1]].long()
    wanted = logits(run, weights, ids)
    assert torch.allclose(logits(run, read, ids), wanted, atol=1e-4, rtol=1e-4)
    assert info.rank == 4 and info.config.dora is (kind == "dora")
    if kind == "routers":
        assert info.config.kept_modules == ("mlp.gate",) and read.routers.keys() == weights.routers.keys()
        assert all(moved[name] for name in weights.routers)
        merge(source, tmp_path / "out", tmp_path / "merged", dtype="float32")
        quiet = {"device": "cpu", "dtype": "float32", "progress": False}
        with qwenrt.load(tmp_path / "merged", **quiet) as llm:
            assert torch.allclose(llm.logits(ids.tolist()), wanted, atol=1e-4, rtol=1e-4)
        with qwenrt.load(source, adapters={"own": tmp_path / "out"}, **quiet) as llm:
            beside = llm.logits(ids.tolist(), adapter="own")
            assert torch.allclose(beside, wanted, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(llm.logits(ids.tolist()), wanted, atol=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["awq", "fp8"])
def test_codes_of_other_forms_have_the_gradients_of_what_they_stand_for(form, precision, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(GOLDEN / "plain", source)
    tensors = load_file(source / "model.safetensors")
    names = [
        name.removesuffix(".weight")
        for name in tensors
        if name.endswith(("attn.c_attn.weight", "mlp.w1.weight"))
    ]
    state, _ = awq_state(tensors, names, 32) if form == "awq" else fp8_state(tensors, names, (16, 32))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = awq_config(32) if form == "awq" else fp8_config((16, 32))
    (source / "config.json").write_text(json.dumps(config))
    base, run, adapter = run_of(source, precision=precision)
    write_adapter(
        tmp_path / "none", base.config, adapter.weights()
    )  # B is zero: the merged model is the base
    merge(source, tmp_path / "none", tmp_path / "dense", dtype="float32")
    _, dense, _ = run_of(tmp_path / "dense", precision=precision)
    found = []
    for each in (run, dense):
        each.gradients(list(range(len(each.corpus))))
        found.append({name: p.grad for name, p in each.optimizer.masters.items()})
    near = 1e-5 if precision == "float32" else 0.05
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).abs().max() <= near * gradient.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("source", ["plain"], indirect=True)
def test_a_cut_run_goes_on_exactly_with_dropout_and_a_faster_b(source, tmp_path):
    def run():
        return run_of(source, {"dropout": 0.3, "lora_plus": 4.0}, recompute="all")[1]

    whole, cut, resumed = run(), run(), run()
    for number, batch in enumerate(whole.remaining()):
        whole.train_step(batch)
        if number < 5:
            cut.train_step(batch)
    cut.save_state(tmp_path / "state")
    resumed.load_state(tmp_path / "state")
    for batch in resumed.remaining():
        resumed.train_step(batch)
    wanted = whole.optimizer.tensors()
    assert all(torch.equal(resumed.optimizer.tensors()[name], tensor) for name, tensor in wanted.items())
    samples = list(range(len(whole.corpus)))
    assert whole.loss(samples) == whole.loss(samples)  # nothing is dropped where nothing is learned
    lr = {group["lr"] for group in whole.optimizer._adamw.param_groups}
    assert max(lr) == pytest.approx(4 * min(lr))


@pytest.mark.parametrize("source", ["plain"], indirect=True)
def test_gradients_are_the_same_with_recomputation_and_in_parts(source):
    def gradients(**how):
        _, run, adapter = run_of(source, **how)
        with torch.no_grad():
            for name, parameter in adapter.parameters.items():
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        run.gradients(list(range(len(run.corpus))))
        return {name: p.grad for name, p in adapter.parameters.items()}

    wanted = gradients()
    for how in ({"recompute": "all"}, {"micro_tokens": 1}):
        found = gradients(**how)
        assert all(torch.allclose(found[n], g, atol=1e-6, rtol=1e-4) for n, g in wanted.items())


def test_numbers_that_are_trained_by_shape_alone():
    seed = LoraSettings(rank=64, alpha=16, targets=SEED_TARGETS)
    assert num_trained(released_config("Qwen-7B"), seed) == 143_130_624
    assert num_trained(released_config("Qwen-1_8B"), seed) == 53_673_984
    all_of_it = {
        place.module.rpartition(".")[2] for place in places(released_config("Qwen3-0.6B"), LoraSettings())
    }
    assert all_of_it == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    some = LoraSettings(targets="q_proj, v_proj", rank_pattern={r"layers\.0\.self_attn\.q_proj": 2})
    ranks = [place.rank for place in places(released_config("Qwen3-0.6B"), some)]
    assert ranks[:3] == [2, 16, 16] and len(ranks) == 56


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2000}, "rank=2000.*at most"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1}, "dropout=1"),
        ({"targets": "q_proj"}, "no linear of this model is called q_proj.*c_attn"),
        ({"keep_modules": "some"}, "auto, none, all"),
        ({"rank_pattern": {"x": 0}}, "rank_pattern x=0"),
        ({"quantize": "int2"}, "int8, int4"),
        ({"train_tokens": "<|nobody|>"}, "no such token"),
        ({"dora": True, "quantize": "int4"}, "DoRA's magnitudes"),
        ({"method": "full", "rank": 4}, "rank is of adapters"),
        ({"method": "lora", "from_scratch": True}, "no weights for it"),
        ({"router": "trained"}, 'router="trained": this model has no experts'),
        ({"precision": "bfloat16-pure"}, 'bfloat16-pure".*float32.*Use "bfloat16"'),
        ({"preset": "other"}, "preset='other'"),
    ],
)
def test_settings_that_make_no_sense(bad, found, tmp_path):
    with pytest.raises(RequestError, match=found):
        finetune(DEMO, TALKS, tmp_path / "out", **{"epochs": 1, "progress": False, "method": "lora", **bad})


def test_presets_and_what_implies_an_adapter():
    config = read_model_config(DEMO)
    options, _, lora = chosen_settings({"alpha": 8}, config, "seed")
    assert (options.method, options.peak_rate, lora.rank, lora.alpha) == ("lora", 3e-4, 64, 8)
    assert lora.targets == SEED_TARGETS
    assert chosen_settings({}, config)[0].method == "full"
    assert chosen_settings({}, config)[0].peak_rate == 1e-5
    assert chosen_settings({"rank": 4}, config)[0].peak_rate == 2e-4
    in_codes = read_model_config(GOLDEN / "gptq_int4")
    assert chosen_settings({}, in_codes)[0].method == "lora"
    for base, codes in ((config, "int4"), (in_codes, None)):
        options, _, lora = chosen_settings({"method": "qlora"}, base)
        assert (options.method, lora.quantize) == ("lora", codes)


def test_tokens_that_the_base_never_said_are_found_and_named(tmp_path, caplog):
    """The built-in model never said '{': its rows of the head are like those of all such tokens."""
    tokenizer = qwenrt.load_tokenizer("demo")
    head = load_file(Path(DEMO) / "model.safetensors")["lm_head.weight"]
    said = set(tokenizer.encode("The capital of France is Paris."))
    braces = set(tokenizer.encode('{"')) | {tokenizer.special_tokens["<|extra_5|>"]}
    assert set(never_learned(head, said | braces)) == braces
    how = {"epochs": 1, "progress": False, "rank": 2, "threads": 1}
    with caplog.at_level(logging.WARNING, "qwenrt"):
        finetune(DEMO, TALKS, tmp_path / "without", **how)
    assert any("never said by the base" in text and "'{'" in text for text in caplog.messages)
    report = finetune(DEMO, TALKS, tmp_path / "with", train_tokens="auto", **how)
    config = json.loads((tmp_path / "with" / "adapter_config.json").read_text())
    rows = config["trainable_token_indices"]
    assert (
        set(rows) == {"transformer.wte", "lm_head"}
        and len(rows["lm_head"]) == len(rows["transformer.wte"]) > 1
    )
    assert config["base_model_name_or_path"] == "demo" and "an adapter of" in report.format()
    assert {f.name for f in (tmp_path / "with").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "loss_curve.json")
    }


def test_a_base_model_has_its_embedding_and_head_trained(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(DEMO, base, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    about = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**about, "chat_format": "raw"}))
    how = {"epochs": 1, "progress": False, "rank": 2, "threads": 1}
    finetune(base, TALKS, tmp_path / "out", **how, method="lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == ["lm_head", "transformer.wte"]
    assert not Trainer.__subclasses__()
