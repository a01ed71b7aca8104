"""What ends a request and what its text shows; bad requests; failures inside a step; cancellation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.engine.engine import Engine
from qwenrt.errors import BackendError, CapacityError, RequestError
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.tokenizer.tokenizer import Tokenizer
from qwenrt.text.tokenizer.vocabulary import END_OF_TEXT, IM_END, IM_START, AddedToken, Vocabulary
from tests.engine.conftest import (
    FaultyBackend,
    ScriptedSampler,
    byte_tokenizer,
    last,
    make_engine,
    run,
    text,
    tokens,
)

GREEDY = SamplingParams(temperature=0, max_tokens=20)
EOS = 256


def scripted(script: str | list[int], **settings: Any) -> Engine:
    """An engine whose model writes the given text, byte by byte."""
    engine = make_engine(tokenizer=byte_tokenizer(), eos_token_ids=(EOS,), vocab_limit=464, **settings)
    ScriptedSampler(engine, list(script.encode()) if isinstance(script, str) else script)
    return engine


def answer(engine: Engine, params: SamplingParams = GREEDY, **more: Any) -> tuple[str, list[int], str | None]:
    engine.add([1, 2, 3], params, request_id="r", **more)
    outputs = run(engine)["r"]
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return text(outputs), tokens(outputs), last(outputs).finish_reason


# ---- stopping


def test_end_of_text_is_a_token_but_no_text() -> None:
    written, ids, reason = answer(scripted([*b"hi", EOS]))
    assert (written, ids, reason) == ("hi", [104, 105, EOS], "stop")


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    written, ids, reason = answer(
        scripted([*b"hi", EOS, *b"yo"]), GREEDY.with_(ignore_eos=True, max_tokens=5)
    )
    assert (written, len(ids), reason) == ("hiyo", 5, "length")


def test_ignore_eos_without_a_limit_ends_with_the_context() -> None:
    engine = scripted([EOS], max_model_len=30)
    _, ids, reason = answer(engine, GREEDY.with_(ignore_eos=True, max_tokens=None))
    assert (len(ids), reason) == (27, "length")


def test_a_small_cache_ends_a_text_too() -> None:
    engine = scripted("a", max_model_len=250, num_blocks=2)
    _, ids, reason = answer(engine, GREEDY.with_(max_tokens=None))
    assert (len(ids), reason) == (29, "length")


def test_stop_token_ids() -> None:
    written, ids, reason = answer(scripted("abcd"), GREEDY.with_(stop_token_ids=[ord("c")]))
    assert (written, ids, reason) == ("ab", [97, 98, 99], "stop")


def test_stop_strings_are_cut_and_the_earliest_wins() -> None:
    written, ids, reason = answer(scripted("one two three"), GREEDY.with_(stop=["three", "wo t"]))
    assert (written, reason) == ("one t", "stop")
    assert bytes(ids).startswith(b"one two t")


def test_a_stop_string_found_only_at_the_end_is_a_stop() -> None:
    written, _, reason = answer(scripted("xab"), GREEDY.with_(stop=["ab", "abc"], max_tokens=3))
    assert (written, reason) == ("x", "stop")


def test_stop_sequences_are_held_back_and_cut() -> None:
    engine = scripted("Hum Humanity Human: x")
    stop = [list(b"Human:"), [EOS]]
    engine.add([1], GREEDY.with_(max_tokens=40), request_id="r", stop_sequences=stop)
    outputs = run(engine)["r"]
    assert text(outputs) == "Hum Humanity "
    assert bytes(tokens(outputs)) == b"Hum Humanity Human:"
    assert last(outputs).finish_reason == "stop"
    shown = ""
    for output in outputs:
        shown += output.delta.text
        assert "Hum Humanity ".startswith(shown)


def test_what_was_held_back_is_shown_when_no_stop_comes() -> None:
    written, _, reason = answer(
        scripted("a Hum"), GREEDY.with_(max_tokens=5), stop_sequences=[list(b"Human:")]
    )
    assert (written, reason) == ("a Hum", "length")
    written, _, reason = answer(scripted([*b"a Hum", EOS]), GREEDY, stop_sequences=[list(b"Human:")])
    assert (written, reason) == ("a Hum", "stop")


def test_nothing_stops_before_min_tokens() -> None:
    params = GREEDY.with_(min_tokens=4, stop=["b"])
    written, _, reason = answer(scripted("abababab"), params)
    assert (written, reason) == ("ababa", "stop")
    written, _, reason = answer(
        scripted("abcabcabc"), GREEDY.with_(min_tokens=4), stop_sequences=[list(b"bc")]
    )
    assert (written, reason) == ("abca", "stop")


def test_stop_tokens_are_not_drawn_before_min_tokens() -> None:
    engine = make_engine(eos_token_ids=(5,))
    params = SamplingParams(temperature=0, logit_bias={5: 100}, min_tokens=6, max_tokens=10)
    engine.add([1, 2, 3], params, request_id="r")
    ids = tokens(run(engine)["r"])
    assert ids.index(5) == 6 and len(ids) == 7


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([97, 98, 99, 195, 169, EOS]), min_size=1, max_size=12),
    st.lists(st.lists(st.sampled_from([97, 98, 99]), min_size=2, max_size=4), max_size=3),
    st.integers(0, 6),
)
def test_streamed_text_is_the_text_before_the_stop(
    script: list[int], stops: list[list[int]], low: int
) -> None:
    engine = scripted(script)
    params = GREEDY.with_(max_tokens=12, min_tokens=low, ignore_eos=True)
    written, ids, reason = answer(engine, params, stop_sequences=stops)
    cut = len(ids)
    for end in range(max(low, 1), len(ids) + 1):
        ending = [len(s) for s in stops if ids[:end][-len(s) :] == s]
        if ending:
            assert end == len(ids) and reason == "stop"
            cut = end - max(ending)
            break
    else:
        assert reason == "length"
    assert written == byte_tokenizer().decode(ids[:cut], skip_special_tokens=True)


# ---- logprobs


def test_logprobs_are_the_models_own() -> None:
    engine = make_engine()
    expected = engine.prefills.logits([1, 2, 3])[-1].log_softmax(-1)
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=3, logit_bias={7: 100.0})
    engine.add([1, 2, 3], params, request_id="r")
    outputs = run(engine)["r"]
    first = outputs[0].delta.logprobs
    assert first is not None and len(first) == 1
    assert first[0].token_id == 7
    assert first[0].logprob == pytest.approx(float(expected[7]), abs=1e-4)
    values, ids = expected.topk(3)
    assert list(first[0].top) == ids.tolist()
    assert list(first[0].top.values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_no_logprobs_unless_asked() -> None:
    engine = make_engine()
    engine.add([1], GREEDY.with_(max_tokens=1), request_id="none")
    engine.add([1], GREEDY.with_(max_tokens=1, logprobs=0), request_id="chosen only")
    outputs = run(engine)
    assert outputs["none"][0].delta.logprobs is None
    alone = outputs["chosen only"][0].delta.logprobs
    assert alone is not None and alone[0].top == {}


# ---- bad requests


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "an empty list. Pass at least one token"),
        ("text", "got str. Pass a list of integers"),
        (b"text", "got bytes"),
        (None, "got NoneType"),
        ((i for i in [1]), "got generator"),
        ([512], "prompt token id 512: the vocabulary has 512 ids. Ids are integers from 0 to 511"),
        ([-1], "prompt token id -1"),
        ([1.0], "prompt token id 1.0"),
        ([True], "prompt token id True"),
        ([1] * 256, "a prompt of 256 tokens: the context is 256 tokens, one of them for the answer"),
    ],
)
def test_bad_prompts_are_refused(prompt: Any, message: str) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.add(prompt, GREEDY)
    assert not engine.has_work


def test_a_prompt_the_cache_can_never_hold_fails_alone() -> None:
    engine = make_engine(num_blocks=4)
    engine.add([1, 2], GREEDY, request_id="fits")
    with pytest.raises(
        CapacityError, match="a prompt of 64 tokens: the KV cache holds 64 tokens in 4 blocks"
    ):
        engine.add([1] * 64, GREEDY)
    assert len(tokens(run(engine)["fits"])) == 20


def test_other_bad_requests_are_refused() -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=r"got dict\. Pass a qwenrt\.SamplingParams"):
        engine.add([1], {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"no tokenizer to find text with\. Use stop_token_ids"):
        engine.add([1], GREEDY.with_(stop=["x"]))
    with pytest.raises(RequestError, match="logit_bias for token 512: the vocabulary has 512 ids"):
        engine.add([1], GREEDY.with_(logit_bias={512: 1.0}))
    with pytest.raises(RequestError, match="stop_sequences: one is \\[\\]"):
        engine.add([1], GREEDY, stop_sequences=[[]])
    with pytest.raises(RequestError, match="stop_sequences: 300 of them"):
        engine.add([1], GREEDY, stop_sequences=[[1]] * 300)
    engine.add([1], GREEDY, request_id="r")
    with pytest.raises(RequestError, match="request 'r': this id is in use"):
        engine.add([1], GREEDY, request_id="r")
    with pytest.raises(RequestError, match="logits of 300 tokens: the context is 256 tokens"):
        engine.prefills.logits([1] * 300)
    with pytest.raises(RequestError, match="an empty list"):
        engine.prefills.logits([])


# ---- failures inside a step


def test_out_of_memory_fails_the_step_and_the_engine_goes_on() -> None:
    engine = make_engine(max_num_seqs=2)
    expected = answer(make_engine())[1]
    for request_id in "abc":
        engine.add([1, 2, 3], GREEDY, request_id=request_id)
    calls = 0

    def out_of_memory_at_the_fourth_step(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return x

    FaultyBackend.fault = out_of_memory_at_the_fourth_step
    outputs = run(engine)
    for request_id in "ab":
        assert outputs[request_id][-1].finished
        error = outputs[request_id][-1].error
        assert isinstance(error, CapacityError)
        assert "OutOfMemoryError: tried to allocate 1 TiB. Lower max_num_batched_tokens" in str(error)
        assert last(outputs[request_id]).finish_reason == "error"
    assert tokens(outputs["c"]) == expected
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_any_other_failure_is_a_backend_error() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("kernel launch failed")

    engine = make_engine()
    FaultyBackend.fault = broken
    engine.add([1], GREEDY, request_id="r")
    error = run(engine)["r"][-1].error
    assert isinstance(error, BackendError)
    assert "computing 1 tokens of 1 sequences: RuntimeError: kernel launch failed" in str(error)
    with pytest.raises(BackendError, match="computing the logits of 2 tokens"):
        engine.prefills.logits([1, 2])
    FaultyBackend.fault = None
    assert len(answer(engine)[1]) == 20


def test_non_finite_logits_fail_their_request_only() -> None:
    engine = make_engine()
    healthy = answer(make_engine())[1]

    def poison_the_first_sequence(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0] = torch.nan
        return x

    engine.add([1], GREEDY.with_(n=2), request_id="poisoned")
    engine.add([1, 2, 3], GREEDY, request_id="r")
    before = engine.step()
    FaultyBackend.fault = poison_the_first_sequence
    first = engine.step()
    FaultyBackend.fault = None
    first += engine.step() if engine.runner.depth else []
    ends = [o for o in first if o.request_id == "poisoned" and o.delta.finish_reason]
    failed = [o for o in ends if o.error]
    assert len(ends) == len(failed) == 2 and failed[-1].finished
    assert isinstance(failed[0].error, BackendError)
    assert "non-finite logits" in str(failed[0].error) and "float32" in str(failed[0].error)
    assert not any(o.error for o in first if o.request_id == "r")
    rest = run(engine)
    assert list(rest) == ["r"] and last(rest["r"]).finish_reason == "length"
    told = [o for o in [*before, *first, *rest["r"]] if o.request_id == "r"]
    assert tokens(told) == healthy
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_what_a_failed_step_computed_is_not_shared() -> None:
    engine = make_engine(max_num_batched_tokens=32)
    prompt = list(range(60))
    engine.add(prompt, GREEDY, request_id="r")
    for _ in range(1 + engine.runner.depth):
        engine.step()
    assert engine.blocks.num_findable == 2
    FaultyBackend.fault = lambda x: x * torch.nan
    assert "non-finite" in str(run(engine)["r"][-1].error)
    assert engine.blocks.num_findable == 0


def test_a_token_without_text_fails_its_request_only() -> None:
    engine = scripted([*b"ok", 500])
    engine.add([1], GREEDY, request_id="r")
    outputs = run(engine)["r"]
    assert isinstance(outputs[-1].error, RequestError) and outputs[-1].finished
    assert not engine.has_work and engine.blocks.num_free == engine.blocks.num_blocks


def test_gaps_in_a_vocabulary_are_never_drawn() -> None:
    ranks = {bytes([i]): i for i in range(256)}
    control = [AddedToken(form, 300 + i, True) for i, form in enumerate((END_OF_TEXT, IM_START, IM_END))]
    tokenizer = Tokenizer(Vocabulary(ranks, tuple(control)))
    assert 280 in tokenizer.unused_ids() and tokenizer.vocab_size == 303
    engine = make_engine(tokenizer=tokenizer, vocab_limit=tokenizer.vocab_size)
    bias = {280: 100.0, 400: 100.0, 65: 90.0}
    engine.add([1], GREEDY.with_(logit_bias=bias, logprobs=64, max_tokens=3), request_id="r")
    outputs = run(engine)["r"]
    assert text(outputs) == "AAA"
    shown = {i for o in outputs for p in o.delta.logprobs or () for i in p.top}
    assert shown.isdisjoint(tokenizer.unused_ids()) and max(shown) < tokenizer.vocab_size


# ---- cancelling


def test_cancelling_frees_the_blocks_at_once_and_reports_the_end() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add([1] * 40, GREEDY.with_(n=2), request_id="running")
    engine.add([2] * 40, GREEDY, request_id="waiting")
    engine.step()
    assert engine.abort("running") and engine.abort("waiting")
    assert not engine.abort("running") and not engine.abort("never")
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert engine.has_work, "the ends are still to be reported"
    ends = engine.step()
    assert [(o.request_id, o.delta.index, o.delta.finish_reason) for o in ends] == [
        ("running", 0, "abort"),
        ("running", 1, "abort"),
        ("waiting", 0, "abort"),
    ]
    assert [o.finished for o in ends] == [False, True, True]
    assert not engine.has_work


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_random_adds_steps_and_cancels_leave_nothing_behind(data: st.DataObject) -> None:
    engine = make_engine(
        max_model_len=40, num_blocks=data.draw(st.integers(10, 24)), block_size=4, max_num_batched_tokens=16
    )
    open_ids: set[str] = set()
    for _ in range(data.draw(st.integers(1, 20))):
        action = data.draw(st.sampled_from(["add", "step", "step", "abort"]))
        if action == "add":
            prompt = [data.draw(st.integers(0, 2))] * data.draw(st.integers(1, 30))
            params = SamplingParams(max_tokens=data.draw(st.integers(1, 12)), n=data.draw(st.integers(1, 3)))
            open_ids.add(engine.add(prompt, params))
        elif action == "abort" and open_ids:
            engine.abort(data.draw(st.sampled_from(sorted(open_ids))))
        else:
            open_ids -= {o.request_id for o in engine.step() if o.finished}
        stats = engine.stats()
        sequences = [*engine.scheduler.running, *engine.scheduler.waiting.values()]
        assert stats["free_blocks"] == stats["total_blocks"] - len(
            {b for s in sequences for b in s.block_table}
        )
    for request_id in open_ids:
        engine.abort(request_id)
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert open_ids >= set(run(engine))
    assert not engine.sampler._counts
