"""Ten steps of an adapter's training beside peft's: the same losses. Runs where peft and transformers are installed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwenrt.config import read_model_config
from qwenrt.finetune.building import Base, build_adapter
from qwenrt.finetune.lora import LoraSettings
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.loader.adapters import BaseWeights, write_adapter
from tests.finetune.test_lora import NoTokens
from tests.finetune.test_networks import corpus_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    "lora",
    [{}, {"dora": True}, {"rslora": True, "rank_pattern": {"q_proj": 2}}],
    ids=["lora", "dora", "rslora"],
)
def test_ten_steps_have_pefts_losses(kind, lora, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    model.save_pretrained(tmp_path / "model")
    how = {"learning_rate": 1e-2, "batch_tokens": 64, "epochs": 10, "warmup_ratio": 0.0, "weight_decay": 0.0}
    options = TrainingSettings(method="lora", max_length=64, max_grad_norm=1e6, adam_beta2=0.99, **how)
    base = Base.open(tmp_path / "model", read_model_config(tmp_path / "model"), options)
    corpus = corpus_of(150)
    settings = LoraSettings(rank=4, alpha=8, keep_modules="none", **lora)
    run, adapter = build_adapter(base, corpus, options, settings, NoTokens(7))
    with torch.no_grad():
        weights = adapter.weights()
    write_adapter(
        tmp_path / "adapter",
        base.config,
        weights,
        base=BaseWeights(base.checkpoint, base.config),
        rslora=settings.rslora,
    )
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).train()
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == adapter.num_parameters
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for batch in run.remaining():
        optimizer.param_groups[0]["lr"] = run.learning_rate(run.progress.step)
        loss, learned = torch.zeros(()), 0
        for sample in batch:
            here = slice(corpus.starts[sample], corpus.starts[sample + 1])
            ids, labels = corpus.ids[here].long(), corpus.labels[here].long()
            logits = theirs(ids[None]).logits[0]
            loss = loss + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            learned += corpus.learned(sample)
        loss = loss / learned
        assert run.train_step(batch) == pytest.approx(float(loss.detach()), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert run.progress.step == 10
