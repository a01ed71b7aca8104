"""Rows held to a grammar in the engine: alone and among others, with thoughts, penalties, preemption."""

from __future__ import annotations

import json
from typing import Any

import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

from qwenrt.engine.engine import Engine  # noqa: E402
from qwenrt.errors import RequestError  # noqa: E402
from qwenrt.sampling_params import SamplingParams  # noqa: E402
from qwenrt.structure import Grammar  # noqa: E402
from qwenrt.text.tokenizer.tokenizer import Tokenizer  # noqa: E402
from qwenrt.text.tokenizer.vocabulary import AddedToken, Vocabulary  # noqa: E402
from tests.engine.conftest import ScriptedSampler, byte_tokenizer, last, make_engine, run, text, tokens  # noqa: E402

EOD = 256
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["kind", "age", "tags"],
    "additionalProperties": False,
}
JSON = Grammar.json_schema(SCHEMA)
DIGITS = Grammar.regex("[0-9]{2}-[a-z]{1,8}")


def engine(tokenizer: Tokenizer | None = None, **settings: Any) -> Engine:
    tokenizer = tokenizer or byte_tokenizer()
    return make_engine(tokenizer=tokenizer, eos_token_ids=[EOD], vocab_limit=tokenizer.vocab_size, **settings)


def params(seed: int, grammar: Grammar | None = JSON, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 120, "grammar": grammar, **more})


def test_every_answer_fits_its_grammar() -> None:
    served = engine()
    asked = {
        served.add(
            [10 + seed, 3, 7], params(seed, top_p=[0.7, 1.0][seed % 2], top_k=[0, 40, 0][seed % 3])
        ): seed
        for seed in range(8)
    }
    outputs = run(served)
    for request_id in asked:
        assert last(outputs[request_id]).finish_reason == "stop"
        jsonschema.validate(json.loads(text(outputs[request_id])), SCHEMA)


def test_an_answer_that_can_only_end_ends() -> None:
    """Without a token that says so; and an end is no token of text before."""
    served = engine()
    only = served.add([5], params(1, Grammar.choice(["yes"]), ignore_eos=True))
    free = served.add([5], params(2, Grammar.regex("a{3,}"), logit_bias={EOD: 100.0}))
    early = served.add([5], params(3, Grammar.choice(["no", "none"]), min_tokens=4))
    outputs = run(served)
    assert text(outputs[only]) == "yes" and tokens(outputs[only]) == [*b"yes"]
    assert tokens(outputs[free]) == [*b"aaa", EOD] and last(outputs[free]).finish_reason == "stop"
    assert text(outputs[early]) == "none"


def test_what_is_cut_off_stays_as_it_is() -> None:
    served = engine()
    cut = served.add([5], params(1, max_tokens=5))
    outputs = run(served)
    assert last(outputs[cut]).finish_reason == "length" and len(tokens(outputs[cut])) == 5
    assert text(outputs[cut]).startswith("{")


def mixed() -> list[tuple[list[int], SamplingParams]]:
    """Sixteen requests: held to grammars or not, with all that a row may ask for beside."""
    more: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"top_k": 20}, {"repetition_penalty": 1.3, "frequency_penalty": 0.2}, {"logprobs": 2},
        {"logit_bias": {49: 5.0, 50: -5.0}}, {"min_tokens": 6}, {"top_p": 0.8, "min_p": 0.01},
    ]  # fmt: skip
    return [
        (
            [20 + i, 40, 60 + i] * (1 + i % 3),
            params(i, [JSON, None, DIGITS, JSON][i % 4], **{"max_tokens": 24, **more[i // 2]}),
        )
        for i in range(16)
    ]


def test_a_batch_gives_the_tokens_of_each_alone() -> None:
    alone = []
    for prompt, asked in mixed():
        served = engine()
        request_id = served.add(prompt, asked)
        alone.append(run(served)[request_id])
    served = engine()
    ids = [served.add(prompt, asked) for prompt, asked in mixed()]
    together = run(served)
    for request_id, outputs in zip(ids, alone, strict=True):
        assert tokens(together[request_id]) == tokens(outputs)
        assert text(together[request_id]) == text(outputs)
    logged = [delta.logprobs for output in together[ids[8]] if (delta := output.delta).logprobs]
    assert len(logged) == len(tokens(together[ids[8]]))  # the model's own, of before the grammar
    assert any(token not in entry[0].top for entry in logged for token in [entry[0].token_id])


def test_several_completions_each_follow_it() -> None:
    served = engine()
    request_id = served.add([9, 8], params(4, n=4))
    outputs = run(served)[request_id]
    texts = [text(outputs, index) for index in range(4)]
    assert len(set(texts)) > 1
    for written in texts:
        jsonschema.validate(json.loads(written), SCHEMA)


def test_a_preempted_answer_goes_on_where_it_was() -> None:
    wide = engine()
    ids = [wide.add([30 + seed] * 20, params(seed)) for seed in range(4)]
    expected = [tokens(outputs) for outputs in map(run(wide).get, ids) if outputs is not None]
    narrow = engine(num_blocks=14, max_model_len=200, prefix_caching=False)
    ids = [narrow.add([30 + seed] * 20, params(seed)) for seed in range(4)]
    outputs = run(narrow)
    assert narrow.scheduler.num_preemptions > 0
    assert [tokens(outputs[request_id]) for request_id in ids] == expected


def test_a_grammar_that_fails_on_the_way_ends_its_request_alone() -> None:
    served = engine()
    costly = served.add(
        [5], params(1, Grammar.regex("((a{0,100}){0,100}){0,100}b"), logit_bias={ord("b"): -100.0})
    )
    other = served.add([6], params(2))
    outputs = run(served)
    error = outputs[costly][-1].error
    assert isinstance(error, RequestError) and "too much" in str(error)
    jsonschema.validate(json.loads(text(outputs[other])), SCHEMA)


def test_what_does_not_compile_is_refused_where_it_is_asked() -> None:
    served = engine()
    with pytest.raises(RequestError, match=r"\$\.not"):
        served.check([1], params(1, Grammar.json_schema({"not": {}})))
    without = make_engine()
    with pytest.raises(RequestError, match="tokenizer"):
        without.check([1], params(1))
    assert not served.has_work


# ---- thoughts


def thinking_tokenizer(tags_are_tokens: bool = True) -> Tokenizer:
    """Single bytes, a few longer tokens, and the tags of thoughts as tokens or not."""
    ranks = {bytes([i]): i for i in range(256)}
    special = [
        AddedToken("<|endoftext|>", 256, True),
        AddedToken("<|im_start|>", 257, True),
        AddedToken("<|im_end|>", 258, True),
    ]
    tags = ("<think>", "</think>") if tags_are_tokens else ()
    added = [AddedToken(tag, 259 + i, False) for i, tag in enumerate(tags)]
    more = {b"\n\n": 270, b">\n\n7": 271}
    return Tokenizer(Vocabulary(ranks, tuple(special + added), unmerged=more), "thinks")


OPEN, CLOSE, BREAK = 259, 260, 270


def scripted(script: list[int], grammar: Grammar, tokenizer: Tokenizer | None = None) -> Any:
    """What becomes of tokens that a model insists on: an engine that takes them where nothing is ruled out."""
    served = engine(tokenizer or thinking_tokenizer())
    sampler = Insisting(served, script)
    request_id = served.add([1, 2, 3], params(1, grammar, max_tokens=40))
    return run(served)[request_id], sampler


class Insisting(ScriptedSampler):
    """Takes the next token of the script where the grammar allows it, and what is chosen otherwise; notes the places
    where it was not."""

    def __init__(self, engine: Engine, script: list[int]) -> None:
        super().__init__(engine, script)
        self.refused: list[int] = []

    def sample(self, logits: Any, seqs: Any) -> Any:
        sampled = super(ScriptedSampler, self).sample(logits, seqs)
        for row, seq in enumerate(seqs):
            wanted = self.script[min(seq.num_output, len(self.script) - 1)]
            allowed = seq.constraint.allowed()
            if allowed is None or (wanted in allowed.ids.tolist()) is not allowed.but:
                sampled.token_ids[row] = wanted
            else:
                self.refused.append(seq.num_output)
        return sampled


def with_thought(thought: Any) -> Grammar:
    return Grammar("regex", "[0-9]{2}", thought)


@pytest.mark.parametrize("between", [[], [10], [10, 10], [BREAK]])
def test_the_grammar_begins_after_a_thought(between: list[int]) -> None:
    script = [*b"let me {see}", CLOSE, *between, *b"42"]
    outputs, sampler = scripted(script, with_thought("open"))
    assert tokens(outputs) == script and not sampler.refused and last(outputs).finish_reason == "stop"
    outputs, sampler = scripted([OPEN, *script], with_thought("possible"))
    assert tokens(outputs) == [OPEN, *script] and not sampler.refused


def test_a_model_that_does_not_think_is_held_at_once() -> None:
    outputs, sampler = scripted([*b"42"], with_thought("possible"))
    assert text(outputs) == "42" and not sampler.refused
    _, sampler = scripted([*b"so 42"], with_thought("possible"))
    assert sampler.refused[:2] == [0, 1]
    for refused in ([OPEN, *b"hm"], [CLOSE], [BREAK]):
        _, sampler = scripted(refused, with_thought("none"))
        assert sampler.refused[0] == 0


def test_after_a_thought_only_two_line_ends_are_free() -> None:
    _, sampler = scripted([*b"x", CLOSE, 10, BREAK, *b"42"], with_thought("open"))
    assert sampler.refused[0] == 3
    _, sampler = scripted([*b"x", CLOSE, BREAK, BREAK, *b"42"], with_thought("open"))
    assert sampler.refused[0] == 3
    _, sampler = scripted([*b"x", CLOSE, OPEN, *b"42"], with_thought("open"))
    assert sampler.refused[0] == 2


def test_a_tag_that_is_spelled_ends_a_thought_as_the_reader_sees_it() -> None:
    words = thinking_tokenizer(tags_are_tokens=False)
    outputs, sampler = scripted([*b"so </think>\n42"], with_thought("open"), words)
    assert text(outputs) == "so </think>\n42" and not sampler.refused
    outputs, sampler = scripted([*b"so </think", 271, *b"1"], with_thought("open"), words)
    assert text(outputs) == "so </think>\n\n71" and not sampler.refused


def test_a_thought_is_free_and_may_be_cut_off() -> None:
    served = engine(thinking_tokenizer())
    request_id = served.add(
        [1, 2], params(7, with_thought("open"), max_tokens=30, logit_bias={CLOSE: -100.0, EOD: -100.0})
    )
    outputs = run(served)[request_id]
    assert last(outputs).finish_reason == "length" and len(tokens(outputs)) == 30
