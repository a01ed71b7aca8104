"""Every generation learns: gradients of all weights, precisions, and directories that load again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import qwenrt
from qwenrt.config import read_model_config
from qwenrt.errors import ConfigError, RequestError
from qwenrt.finetune.building import Base, build
from qwenrt.finetune.checkpoint import make_it_chat, write_checkpoint
from qwenrt.finetune.data import Corpus, Counts
from qwenrt.finetune.network import balance
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.loader.checkpoint.directory import Planned, write_shards
from tests.conftest import GOLDEN, HYBRID_GOLDENS

QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
QWEN3_MOE = {
    **QWEN2,
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.05,
}
SHAPES = {"qwen2": QWEN2, "qwen3_moe": QWEN3_MOE}


def corpus_of(vocabulary, lengths=(9, 5, 9, 12)):
    """Random samples whose second half is learned."""
    generator = torch.Generator().manual_seed(5)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    ids = torch.randint(0, vocabulary, (starts[-1],), generator=generator, dtype=torch.int32)
    labels = ids.clone()
    for start, length in zip(starts, lengths, strict=False):
        labels[start : start + length // 2] = -100
    return Corpus(ids, labels, starts, Counts(len(lengths), len(lengths), 0, 0, 0, starts[-1], max(lengths)))


@pytest.fixture(params=[*SHAPES, *HYBRID_GOLDENS])
def source(request, tmp_path):
    """A directory of each kind of network; those of the first kind have no weights."""
    if request.param not in SHAPES:
        return GOLDEN / request.param
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SHAPES[request.param]))
    return directory


def run_of(source, **how):
    how = {"method": "full", "max_length": 64, "learning_rate": 1e-2, "batch_tokens": 64, **how}
    options = TrainingSettings(from_scratch=not (source / "model.safetensors").exists(), **how)
    base = Base.open(source, read_model_config(source), options)
    return base, build(base, corpus_of(min(150, base.config.vocab_size)), options)


def test_gradients_are_those_of_the_loss_for_every_weight(source):
    """A small step along them changes the loss by what they say, and none is without one: a tied head, convolutions and
    routers too."""
    _, run = run_of(source, router="trained")
    run.network.balance = 0.0  # it is no part of the loss that is compared
    samples = list(range(len(run.corpus)))
    run.gradients(samples)
    masters = run.optimizer.masters
    slopes = {name: master.grad.clone() for name, master in masters.items()}
    assert all(slope.isfinite().all() and slope.any() for slope in slopes.values())
    for names in (slopes, [name for name in slopes if name.endswith("conv")]):
        norm = sum(float(slopes[name].double().square().sum()) for name in names) ** 0.5
        losses, step = [], 2e-4 if norm > 3 else 2e-3
        for sign in (1, -1):
            for name in names:
                run.optimizer.set_master(name, masters[name].detach() + sign * step / norm * slopes[name])
            losses.append(run.loss(samples))
            for name in names:
                run.optimizer.set_master(name, masters[name].detach() - sign * step / norm * slopes[name])
        if names:
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(norm, rel=0.1)


def test_it_learns_and_what_is_written_loads_again(source, tmp_path):
    base, run = run_of(source, epochs=15)
    samples = list(range(len(run.corpus)))
    before = run.loss(samples)
    for batch in run.remaining():
        run.train_step(batch)
    assert run.loss(samples) < 0.8 * before
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(run.network.model, source, out, base.checkpoint, dtype=torch.float32)
    if base.checkpoint is not None:  # what no text network needs is as it was
        old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
        rest = [name for name in old if name.startswith(("mtp.", "model.visual."))]
        assert all(torch.equal(old[name], new[name]) for name in rest)
    ids = run.corpus.ids[: run.corpus.starts[1]]
    hidden = run.network.model.forward(ids.long(), *_alone(len(ids)))
    wanted = run.network.model.logits(hidden).detach()
    with qwenrt.load(out, device="cpu", dtype="float32", progress=False) as llm:
        assert torch.allclose(llm.logits(ids.tolist()), wanted, atol=2e-3 if base.checkpoint else 1e-4)


def _alone(length):
    from qwenrt.ops.steps import StepPlan

    return StepPlan([length], [length]), [1]


SIXTEEN = [
    *({"precision": precision} for precision in ("bfloat16", "bfloat16-pure", "float16")),
    *({"precision": precision, "moments": "bfloat16"} for precision in ("float32", "bfloat16")),
]


@pytest.mark.parametrize("how", SIXTEEN, ids=lambda how: "-".join(how.values()))
@pytest.mark.parametrize("source", ["qwen3_moe"], indirect=True)
def test_sixteen_bits_learn_too_and_go_on_exactly(source, how, tmp_path):
    """Also where some experts got no token in some steps."""

    def run():
        return run_of(source, epochs=8, recompute="all", max_grad_norm=5.0, **how)[1]

    whole, cut = run(), run()
    samples = list(range(len(whole.corpus)))
    before = whole.loss(samples)
    for number, batch in enumerate(whole.remaining()):
        whole.train_step(batch)
        if number < 5:
            cut.train_step(batch)
    assert whole.loss(samples) < before - 0.5
    cut.save_state(tmp_path / "state")
    resumed = run()
    resumed.load_state(tmp_path / "state")
    for batch in resumed.remaining():
        resumed.train_step(batch)
    wanted, found = whole.optimizer.tensors(), resumed.optimizer.tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    for name, tensor in wanted.items():
        half = "pure" in how["precision"] or ("moments" in how and not name.startswith("weight."))
        assert tensor.dtype == (torch.bfloat16 if half else torch.float32), name


@pytest.mark.parametrize("source", ["qwen2"], indirect=True)
def test_moments_in_sixteen_bits_keep_gradients_so_and_are_not_for_float16(source):
    _, run = run_of(source, precision="bfloat16", moments="bfloat16")
    run.gradients([0, 1])
    assert {gradient.dtype for gradient in run.optimizer.gradients()} == {torch.bfloat16}
    exact = run_of(source, precision="bfloat16")[1]
    exact.gradients([0, 1])
    assert run.optimizer.norm() == pytest.approx(exact.optimizer.norm(), rel=0.01)
    before = run.optimizer.masters["norm"].clone()
    run.optimizer.step(1e-3, 1e-3)
    moved = (run.optimizer.masters["norm"] - before).abs()
    assert run.optimizer.masters["norm"].dtype == torch.float32 and 5e-4 < float(moved.max()) < 2e-3
    with pytest.raises(RequestError, match=r'moments="bfloat16" with precision="float16"'):
        run_of(source, precision="float16", moments="bfloat16")


@pytest.mark.parametrize("source", ["qwen2"], indirect=True)
def test_an_overflow_in_float16_is_no_error(source):
    _, run = run_of(source, precision="float16")
    run.optimizer.scale = 2.0**60
    before = {name: master.clone() for name, master in run.optimizer.masters.items()}
    run.train_step([0])
    assert run.optimizer.scale == 2.0**59 and run.progress.step == 1
    assert all(torch.equal(before[name], master) for name, master in run.optimizer.masters.items())


@pytest.mark.parametrize("source", ["qwen2"], indirect=True)
def test_a_gradient_unlike_all_others_is_left_out_once(source, monkeypatch):
    _, run = run_of(source, max_grad_norm=1e-3)
    run.progress.norms = [1e-4] * 60
    before = {name: master.clone() for name, master in run.optimizer.masters.items()}
    run.train_step([0])
    assert all(torch.equal(before[name], master) for name, master in run.optimizer.masters.items())
    with pytest.raises(qwenrt.QwenrtError, match="after one left out before"):
        run.train_step([0])


@pytest.mark.parametrize("source", ["qwen2"], indirect=True)
def test_numbers_that_are_not_finite_are_found(source):
    _, run = run_of(source)
    run.optimizer.masters["layers.1.post_norm"].data[0] = float("nan")
    with pytest.raises(qwenrt.QwenrtError, match=r"training step 1: the loss is nan, from layers\.1 on"):
        run.train_step([0])


@pytest.mark.parametrize("source", ["qwen2"], indirect=True)
def test_the_best_step_on_what_is_held_out_is_kept(source, tmp_path):
    def run(keep, held_out):
        options = TrainingSettings(
            method="full",
            from_scratch=True,
            learning_rate=0.05,
            epochs=12,
            eval_every=2,
            keep=keep,
            batch_tokens=16,
        )
        base = Base.open(source, read_model_config(source), options)
        trainer = build(base, corpus_of(150), options, held_out=held_out)
        trainer.run(tmp_path, None, False)
        return trainer

    other = corpus_of(150, (8, 8))
    other.ids[:] = other.ids.flip(0)
    other.labels[:] = other.ids
    best = run("best", other)
    step, loss = best.progress.best
    assert step < best.progress.step and best._measure(other, [0, 1]) == pytest.approx(loss, rel=1e-5)
    last = run("last", other)
    assert last.progress.held_out[-1][1] > loss
    assert last._measure(other, [0, 1]) == pytest.approx(last.progress.held_out[-1][1], rel=1e-5)


@pytest.mark.parametrize("source", ["qwen3_moe"], indirect=True)
def test_routers_are_kept_in_balance_or_left_alone(source):
    router = torch.zeros(4, 8)
    alike = float(balance(torch.randn(50, 8), router, 2))
    assert alike == pytest.approx(2.0)  # top_k, where all are equally likely
    router[0] = 5.0
    assert float(balance(torch.ones(50, 8), router, 2)) > 3.9
    _, run = run_of(source, router="frozen")
    assert run.network.balance == 0.0 and not any("router" in name for name in run.optimizer.parameters)
    _, run = run_of(source)
    assert run.network.balance == 0.05 / 2
    run.gradients([0])
    assert run.optimizer.masters["layers.0.router"].grad.any()


def test_large_checkpoints_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenrt.loader.checkpoint.directory.SHARD_BYTES", 1000)
    (tmp_path / "model-00001-of-00009.safetensors").write_text("old")
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    files = write_shards([Planned.of(*each) for each in tensors.items()], tmp_path)
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert len(list(tmp_path.iterdir())) == 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000 and len(index["weight_map"]) == 5
    assert torch.equal(load_file(tmp_path / index["weight_map"]["t4"])["t4"], tensors["t4"])


def test_a_base_model_that_learned_to_talk_says_so(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"chat_format": "raw", "eos_token_id": 5}')
    assert "chatml" in make_it_chat(tmp_path, "qwen", 7)
    assert make_it_chat(tmp_path, "qwen", 7) is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "x": 1}')
    assert "<|im_end|>" in make_it_chat(tmp_path, "qwen2", 7)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [7, 5]}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": "<|im_end|>", "x": 1}
    assert make_it_chat(tmp_path, "qwen2", 7) is None


@pytest.mark.parametrize("source", ["qwen2"], indirect=True)
def test_networks_that_cannot_be_trained_are_refused(source):
    options, config = TrainingSettings(method="full", from_scratch=True), read_model_config(source)
    with pytest.raises(ConfigError, match="embeds texts only"):
        Base.open(source, replace(config, has_head=False), options)
    (source / "gguf.json").write_text("{}")
    with pytest.raises(ConfigError, match="in a GGUF file"):
        Base.open(source, config, options)
    with pytest.raises(RequestError, match=r"context is 10 tokens.*at most as many"):
        build(Base(source, replace(config, max_position_embeddings=10), None), corpus_of(150), options)
