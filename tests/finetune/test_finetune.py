"""Fine-tuning: the training form of a conversation, a run that learns, repeats and resumes, and bad data."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import signal
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwenrt.config import read_model_config
from qwenrt.errors import CheckpointError, ConfigError, RequestError
from qwenrt.finetune import finetune
from qwenrt.finetune.building import Base, build
from qwenrt.finetune.data import Corpus
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.finetune.state import STATE_FILE
from qwenrt.finetune.trainer import Trainer
from qwenrt.loader.checkpoint.writing import save_atomically
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.training_form import IGNORE, training_samples
from qwenrt.text.entries import read_entries

CONFIG = {
    "model_type": "qwen",
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 96,
    "seq_length": 128,
    "max_position_embeddings": 256,
    "no_bias": True,
    "layer_norm_epsilon": 1e-06,
    "initializer_range": 0.05,
}
ENTRIES = [
    {"conversations": [{"from": "user", "value": f"{word}?"}, {"from": "assistant", "value": f"{word}!"}]}
    for word in ("red", "green", "blue", "one", "two", "three")
]
QUICK = {
    "from_scratch": True,
    "learning_rate": 5e-3,
    "batch_tokens": 256,
    "max_length": 96,
    "threads": 1,
    "progress": False,
}


def encode_entry(tokenizer, entry):
    (sample,) = training_samples(tokenizer, entry)
    return sample.ids, sample.labels


@pytest.fixture
def base(tmp_path):
    """A Qwen-1 directory without weights: the 256 bytes as its vocabulary."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text('{"chat_format": "chatml"}')
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    (directory / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    return directory


def weights(directory):
    return load_file(directory / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the training form


def test_labels_are_what_the_assistant_says_and_the_frame_of_every_turn(base):
    tokenizer = ChatTokenizer.from_dir(base)
    start, end, newline = tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.encode("\n")[0]

    def part(role, text, spoken):
        name, content = list(role.encode()), list(text.encode())
        ids = [start, *name, newline, *content, end, newline]
        labels = [
            start,
            *[IGNORE] * (len(name) + 1),
            *(content if spoken else [IGNORE] * len(content)),
            end,
            newline,
        ]
        return ids, labels

    parts = [
        part("system", "You are a helpful assistant.", False),
        part("user", "hi", False),
        part("assistant", "hello", True),
    ]
    turns = [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]
    ids, labels = encode_entry(tokenizer, {"id": "1", "conversations": turns})
    assert ids == [i for p in parts for i in p[0]]
    assert labels == [i for p in parts for i in p[1]]
    with_leading = [{"from": "assistant", "value": "dropped"}, *turns]
    assert encode_entry(tokenizer, {"conversations": with_leading})[0] == ids
    assert encode_entry(tokenizer, {"system": "Be brief.", "conversations": turns})[0] != ids


def test_conversations_in_openais_shape_are_the_same_ones(base):
    tokenizer = ChatTokenizer.from_dir(base)
    said = [("user", "hi"), ("assistant", "Hello!"), ("user", "more"), ("assistant", "no")]
    ours = {"conversations": [{"from": role, "value": text} for role, text in said]}
    theirs = {"messages": [{"role": role, "content": text} for role, text in said]}
    assert encode_entry(tokenizer, ours) == encode_entry(tokenizer, theirs)
    system = {"role": "system", "content": "Be brief."}
    assert encode_entry(tokenizer, {**ours, "system": "Be brief."}) == encode_entry(
        tokenizer, {"messages": [system, *theirs["messages"]]}
    )


def test_control_tokens_typed_by_a_user_stay_text(base):
    tokenizer = ChatTokenizer.from_dir(base)
    turns = [{"from": "user", "value": "<|im_end|>"}, {"from": "assistant", "value": "<|endoftext|>"}]
    ids, _ = encode_entry(tokenizer, {"conversations": turns})
    assert ids.count(tokenizer.im_end_id) == 3 and tokenizer.eod_id not in ids


def test_plain_text_carries_loss_everywhere_and_ends(base):
    tokenizer = ChatTokenizer.from_dir(base)
    ids, labels = encode_entry(tokenizer, {"text": "ab"})
    assert ids == labels == [97, 98, tokenizer.eod_id]


def test_batches_take_every_entry_once_and_keep_to_the_budget(base):
    tokenizer = ChatTokenizer.from_dir(base)
    entries = [{"text": "x" * (1 + 7 * i % 60)} for i in range(300)]
    corpus = Corpus.encode(tokenizer, entries, 64)
    batches = corpus.batches(3, 0, 256)
    assert sorted(e for b in batches for e in b) == list(range(300))
    for batch in batches:
        ids, targets, lengths = corpus.take(batch)
        assert sum(lengths) == len(ids) == len(targets) <= 256
        assert (targets != IGNORE).sum() == sum(map(corpus.learned, batch)) == len(ids) - len(batch)
    assert corpus.batches(3, 0, 256) == batches != corpus.batches(3, 1, 256)


def run_of(source, entries=ENTRIES, config=None, held_out=None, identity=None, **settings):
    options = TrainingSettings(**{"batch_tokens": 256, "max_length": 96, "method": "full", **settings})
    corpus = Corpus.encode(ChatTokenizer.from_dir(source), entries, options.max_length)
    found = Base.open(source, config or read_model_config(source), options)
    return build(found, corpus, options, identity=identity, held_out=held_out)


def gradients(trainer, samples):
    value = trainer.gradients(samples)
    found = {name: p.grad.clone() for name, p in trainer.optimizer.masters.items()}
    trainer.optimizer.forget()
    return value, found


def test_however_a_step_is_cut_its_gradients_are_the_sum_over_its_samples(base):
    """Packed in one pass, one by one, and with recomputation: nothing crosses from sample to sample, and each learned
    token counts the same."""
    whole = run_of(base, from_scratch=True)
    value, wanted = gradients(whole, list(range(6)))
    learned = [whole.corpus.learned(s) for s in range(6)]
    assert len(set(learned)) > 1
    summed = {name: torch.zeros_like(gradient) for name, gradient in wanted.items()}
    for sample in range(6):
        _, alone = gradients(whole, [sample])
        for name, gradient in alone.items():
            summed[name] += gradient * learned[sample] / sum(learned)
    for name, gradient in wanted.items():
        assert torch.allclose(summed[name], gradient, atol=1e-6, rtol=1e-5), name
    for how in ({"micro_tokens": 1}, {"micro_tokens": 150}, {"recompute": "all"}):
        other, found = gradients(run_of(base, from_scratch=True, **how), list(range(6)))
        assert other == pytest.approx(value, rel=1e-6)
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, atol=1e-6, rtol=1e-5), (how, name)
    assert whole.loss([0, 1]) == pytest.approx(gradients(whole, [0, 1])[0], rel=1e-6)


# ---- a run


def test_it_learns_and_writes_a_complete_checkpoint(base, tmp_path):
    report = finetune(base, ENTRIES, tmp_path / "out", epochs=40, **QUICK)
    assert report.losses[0][1] > 3 * report.final_loss
    assert f"{report.steps} steps over 6 entries" in report.format()
    out = tmp_path / "out"
    files = {f.name for f in out.iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "qwen.tiktoken",
        "model.safetensors",
        "loss_curve.json",
    }
    tensors = weights(out)
    assert len(tensors) == 8 * CONFIG["num_hidden_layers"] + 3
    assert tensors["transformer.h.1.attn.c_attn.bias"].shape == (96,)
    assert tensors["transformer.h.0.mlp.w1.weight"].shape == (48, 32)
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    curve = json.loads((out / "loss_curve.json").read_text())
    assert curve["steps"] == report.steps and curve["loss"][-1][0] == report.steps


def test_the_same_seed_gives_the_same_weights(base, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(base, ENTRIES, tmp_path / name, epochs=3, seed=seed, **QUICK)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_run_that_was_cut_goes_on_to_the_same_weights(base, tmp_path, monkeypatch):
    whole = finetune(base, ENTRIES, tmp_path / "whole", epochs=8, **QUICK)
    step = Trainer.train_step

    def cut(self, batch):
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", cut)
    with pytest.raises(KeyboardInterrupt):
        finetune(base, ENTRIES, tmp_path / "cut", epochs=8, save_every=2, **QUICK)
    monkeypatch.setattr(Trainer, "train_step", step)
    assert (tmp_path / "cut" / STATE_FILE).exists()
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match=r"a run with epochs=8\. Use the same"):
        finetune(base, ENTRIES, tmp_path / "cut", epochs=9, **QUICK)
    report = finetune(base, ENTRIES, tmp_path / "cut", epochs=8, save_every=2, **QUICK)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert not (tmp_path / "cut" / STATE_FILE).exists()
    assert report.steps == whole.steps > 5


def test_ctrl_c_finishes_the_step_keeps_it_and_says_how_to_go_on(base, tmp_path, monkeypatch, capsys):
    whole = finetune(base, ENTRIES, tmp_path / "whole", epochs=8, **QUICK)
    loss = Trainer.gradients

    def press(self, batch):
        if self.progress.step == 2:
            signal.raise_signal(signal.SIGINT)
        return loss(self, batch)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Trainer, "gradients", press)
    with pytest.raises(KeyboardInterrupt, match=rf"after step 3 of {whole.steps}; they are kept.*goes on"):
        finetune(base, ENTRIES, tmp_path / "cut", epochs=8, **QUICK)
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    finetune(base, ENTRIES, tmp_path / "cut", epochs=8, **QUICK)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_the_second_ctrl_c_stops_within_the_step(base, tmp_path, monkeypatch):
    def press(self, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "gradients", press)
    with pytest.raises(KeyboardInterrupt) as stopped:
        finetune(base, ENTRIES, tmp_path / "out", **QUICK)
    assert stopped.value.args == () and not (tmp_path / "out" / STATE_FILE).exists()


def test_a_run_goes_on_only_with_all_that_decides_its_result(base, tmp_path):
    """Each setting, the data, and the weights and configuration it began with."""
    finetune(base, ENTRIES, tmp_path / "first", epochs=1, **QUICK)
    finetune(base, ENTRIES, tmp_path / "second", epochs=1, **{**QUICK, "seed": 1})
    config = read_model_config(base)

    def trainer(source="first", threads=None, **how):
        how = {"epochs": 2, **how}
        return run_of(tmp_path / source, identity={"threads": threads}, **how)

    state = tmp_path / STATE_FILE
    begun = trainer()
    begun.train_step(begun.schedule[0][0])
    begun.save_state(state)
    trainer(epochs=np.int64(2), max_grad_norm=1).load_state(state)  # the same, said otherwise
    others = {
        "epochs": 3,
        "max_steps": 1,
        "decay_steps": 50,
        "learning_rate": 1e-4,
        "min_learning_rate_ratio": 0.5,
        "batch_tokens": 128,
        "max_length": 64,
        "warmup_ratio": 0.5,
        "weight_decay": 0.0,
        "adam_beta2": 0.99,
        "max_grad_norm": 2.0,
        "seed": 5,
        "from_scratch": True,
        "micro_tokens": 32,
        "precision": "bfloat16",
        "recompute": "all",
        "router": "frozen",
        "eval_every": 3,
        "keep": "last",
        "max_dropped": 0.5,
        "moments": "bfloat16",
    }
    assert {"method", "shard", *others} == {field.name for field in fields(TrainingSettings)}
    for name, value in others.items():
        with pytest.raises(CheckpointError, match=f"a run with.* {name}="):
            trainer(**{name: value}).load_state(state)
    with pytest.raises(CheckpointError, match=r"a run with another data\."):
        trainer(entries=ENTRIES[1:]).load_state(state)
    with pytest.raises(CheckpointError, match=r"a run with another model\."):
        trainer("second").load_state(state)
    with pytest.raises(CheckpointError, match=r"a run with another model\."):
        trainer(config=replace(config, rms_norm_eps=1e-3)).load_state(state)
    with pytest.raises(CheckpointError, match=r"a run with threads=None\."):
        trainer(threads=1).load_state(state)


def test_a_state_without_its_best_step_is_refused(base, tmp_path):
    run = run_of(
        base, from_scratch=True, epochs=3, batch_tokens=64, held_out=run_of(base, from_scratch=True).corpus
    )
    run.progress.step, run.progress.held_out = 2, [(1, 0.5), (2, 0.7)]
    run.save_state(tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match=r"best_step\.safetensors is not there.*of step 1, the best"):
        run.load_state(tmp_path / STATE_FILE)
    (tmp_path / "best_step.safetensors").touch()
    run.load_state(tmp_path / STATE_FILE)


def test_a_damaged_state_is_named(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / STATE_FILE).write_bytes(b"\x00" * 50)
    with pytest.raises(CheckpointError, match=r"resuming from .*not readable.*Delete it"):
        finetune(base, ENTRIES, tmp_path / "out", **QUICK)


def test_it_goes_on_from_given_weights_and_leaves_them_alone(base, tmp_path):
    finetune(base, ENTRIES, tmp_path / "first", epochs=2, **QUICK)
    before = (tmp_path / "first" / "model.safetensors").read_bytes()
    settings = {**QUICK, "from_scratch": False, "learning_rate": 0.0}
    finetune(tmp_path / "first", ENTRIES, tmp_path / "second", epochs=1, **settings)
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    settings["learning_rate"] = 1e-2
    finetune(tmp_path / "first", ENTRIES, tmp_path / "third", epochs=1, **settings)
    assert not same(weights(tmp_path / "first"), weights(tmp_path / "third"))
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == before


# ---- where it is written


def test_nothing_of_the_users_is_overwritten_unless_asked(base, tmp_path):
    out = tmp_path / "out"
    finetune(base, ENTRIES, out, epochs=1, **QUICK)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(RequestError, match=r"holds 5 files already \(config.json, .*overwrite=True"):
        finetune(base, ENTRIES, out, epochs=2, **QUICK)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"holds 1 files already \(todo.txt\)"):
        finetune(base, ENTRIES, tmp_path / "notes", **QUICK)
    assert (out / "model.safetensors").read_bytes() == before
    finetune(base, ENTRIES, out, epochs=2, overwrite=True, **QUICK)
    assert (out / "model.safetensors").read_bytes() != before


def test_the_models_own_directory_is_refused_unless_asked(base, tmp_path):
    finetune(base, ENTRIES, tmp_path / "model", epochs=1, **QUICK)
    settings = {**QUICK, "from_scratch": False}
    before = weights(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(RequestError, match="the model's own directory"):
        finetune(tmp_path / "model", ENTRIES, tmp_path / "link", epochs=1, **settings)
    assert same(before, weights(tmp_path / "model"))
    finetune(tmp_path / "model", ENTRIES, tmp_path / "model", epochs=1, overwrite=True, **settings)
    assert not same(before, weights(tmp_path / "model"))


def test_a_place_that_cannot_be_written_to(base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(RequestError, match=r"writing the new checkpoint to .*file.*written to"):
            finetune(base, ENTRIES, place, **QUICK)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RequestError, match=r"GB are needed there, 0\.0 GB are free"):
        finetune(base, ENTRIES, tmp_path / "full", **QUICK)


def test_a_write_that_fails_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"writing .*\(4\.0 MB were to be written\)"):
        save_atomically({"x": torch.zeros(1_000_000)}, tmp_path / "file" / "model.safetensors", {})


def test_a_run_too_short_to_change_anything_says_so(base, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "qwenrt"):
        finetune(base, ENTRIES, tmp_path / "short", epochs=3, **{**QUICK, "learning_rate": 1e-5})
        (said,) = caplog.messages
        assert said.startswith("With a learning_rate of 1e-05 all the steps (6) change a weight by about")
        assert "steps in an epoch now: 2" in said
        finetune(base, ENTRIES, tmp_path / "few", epochs=3, **QUICK)
        assert caplog.messages[1].startswith("6 steps are few to learn from. Use more epochs")
        finetune(base, ENTRIES, tmp_path / "enough", epochs=25, **QUICK)
    assert len(caplog.messages) == 2


# ---- bad input


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "line 1 is not JSON"),
        (b"\n\n  [1, 2", "line 3 is not JSON"),
        (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        (b'"text"', "a JSON str"),
        (b'[{"text": "a"}]\n\xff', "line 2 is not UTF-8"),
    ],
)
def test_files_that_are_not_training_data(tmp_path, content, found):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=found):
        read_entries(path)


def test_a_directory_in_place_of_training_data_is_said_once(tmp_path):
    with pytest.raises(RequestError) as refused:
        read_entries(tmp_path)
    assert str(refused.value).count(str(tmp_path)) == 1 and "it is a directory" in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ("text", "a JSON str"),
        ({}, "no list of conversations"),
        ({"conversations": []}, "no list of conversations"),
        ({"conversations": ["hi"]}, r"conversations\[0\] is a JSON str"),
        ({"conversations": [{"from": "user", "value": None}]}, r"conversations\[0\] value is NoneType"),
        (
            {"conversations": [{"from": "user", "value": "a"}, {"from": "system", "value": "b"}]},
            "from 'system'",
        ),
        ({"conversations": [{"from": "user", "value": "a"}]}, "no turn of the assistant"),
        ({"text": 5}, "text is int"),
        ({"messages": "hi"}, 'Give .*"messages"'),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"messages\[0\] is from 'tool'"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\] content is int"),
    ],
)
def test_entries_that_make_no_sense_are_named(base, tmp_path, entry, found):
    with pytest.raises(RequestError, match=f"entry 2: .*{found}"):
        finetune(base, [ENTRIES[0], entry], tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"learning_rate": -1},
        {"max_length": 1.5},
        {"warmup_ratio": 2},
        {"save_every": 0},
        {"seed": 1, "max_steps": 0},
        {"seed": "one"},
        {"threads": -1},
        {"save_every": "often"},
        {"learning_rate": float("nan")},
        {"weight_decay": True},
        {"from_scratch": "no"},
    ],
)
def test_settings_out_of_range(base, tmp_path, bad):
    with pytest.raises(RequestError):
        finetune(base, ENTRIES, tmp_path / "out", **{**QUICK, **bad})


def test_a_file_that_is_not_there_nothing_to_learn_and_a_vocabulary_too_large(base, tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        finetune(base, tmp_path / "none.json", tmp_path / "out", **QUICK)
    with pytest.raises(RequestError, match="none of 0 entries has anything to learn"):
        finetune(base, [], tmp_path / "out", **QUICK)
    with pytest.raises(RequestError, match=r"in its first 8 tokens.*larger max_length"):
        finetune(base, ENTRIES, tmp_path / "out", **{**QUICK, "max_length": 8})
    (base / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 300}))
    with pytest.raises(ConfigError, match=r"464 tokens.*300"):
        finetune(base, ENTRIES, tmp_path / "out", **QUICK)


def test_entries_with_nothing_to_learn_are_counted(base, tmp_path, caplog):
    with pytest.raises(RequestError, match=r"1 of 7 entries have nothing.*larger max_dropped"):
        finetune(base, [*ENTRIES, {"text": ""}], tmp_path / "out", epochs=1, **QUICK)
    finetune(base, [*ENTRIES, {"text": ""}], tmp_path / "out", epochs=1, max_dropped=0.2, **QUICK)
    assert "1 of 7 entries have nothing to learn in their first 96 tokens" in caplog.text


def test_quantised_weights_are_refused(base, tmp_path):
    quantised = {**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    (base / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ConfigError, match=r"quantised \(gptq int4\)"):
        finetune(base, ENTRIES, tmp_path / "out", method="full", **QUICK)


def test_a_loss_that_is_not_finite_ends_the_run(base, tmp_path):
    from qwenrt.errors import QwenrtError

    with pytest.raises(QwenrtError, match=r"the (loss|gradient) is .*smaller learning_rate"):
        finetune(
            base,
            ENTRIES,
            tmp_path / "out",
            epochs=60,
            **{**QUICK, "learning_rate": 10.0, "weight_decay": 10.0, "max_grad_norm": 1e6},
        )


def test_an_entry_is_named_with_its_file(base, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text("\n".join(map(json.dumps, ENTRIES)))
    (data / "b.json").write_text(json.dumps([ENTRIES[0], {"conversations": []}]))
    for given in (data, [data], [data / "a.jsonl", data / "b.json"]):
        with pytest.raises(RequestError, match=r"training data .*b\.json, entry 2: no list of conversations"):
            finetune(base, given, tmp_path / "out", epochs=1, **QUICK)
