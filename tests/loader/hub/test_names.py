"""What a user types, and the repository it means."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.errors import CheckpointError
from qwenrt.loader.hub.names import about_base, nearest, released, short, table_date, understand


@pytest.mark.parametrize(
    ("typed", "repo"),
    [
        ("Qwen3-4B", "Qwen/Qwen3-4B"),
        ("qwen3-4b", "Qwen/Qwen3-4B"),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("QWEN/qwen3-4b", "Qwen/Qwen3-4B"),
        ("qwen3:4b", "Qwen/Qwen3-4B"),
        ("library/qwen3:4b", "Qwen/Qwen3-4B"),
        ("qwen3:4b-base", "Qwen/Qwen3-4B-Base"),
        ("qwen3:4b-text", "Qwen/Qwen3-4B-Base"),
        ("qwen3:4b-thinking-2507", "Qwen/Qwen3-4B-Thinking-2507"),
        ("qwen3:30b", "Qwen/Qwen3-30B-A3B"),
        ("qwen3:30b-a3b-instruct-2507", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("qwen3-coder:30b", "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
        ("qwen2.5:7b", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen2.5:7b-base", "Qwen/Qwen2.5-7B"),
        ("qwen2.5:7b-instruct-fp16", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen2.5:7b-instruct-awq", "Qwen/Qwen2.5-7B-Instruct-AWQ"),
        ("qwen2.5-coder:0.5b-instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"),
        ("qwen2.5vl:7b", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("qwen1.5:1.8b", "Qwen/Qwen1.5-1.8B-Chat"),
        ("codeqwen:7b", "Qwen/CodeQwen1.5-7B-Chat"),
        ("qwq", "Qwen/QwQ-32B"),
        ("qwq:latest", "Qwen/QwQ-32B"),
        ("qwen-1.8b-chat", "Qwen/Qwen-1_8B-Chat"),
        ("Qwen-1_8B-Chat", "Qwen/Qwen-1_8B-Chat"),
        ("qwen2.5-7b-instruct-gptq-int4", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"),
        ("someone/Qwen-7B.v2_ft", "someone/Qwen-7B.v2_ft"),
        ("Qwen3-9B", "Qwen/Qwen3-9B"),  # released after the table, perhaps
    ],
)
def test_names(typed: str, repo: str) -> None:
    assert understand(typed).repo == repo


def test_a_repository_at_hand_is_found_in_any_case() -> None:
    assert understand("ME/my-Finetune", ["me/My-Finetune"]).repo == "me/My-Finetune"


@pytest.mark.parametrize(
    ("typed", "note"),
    [
        ("Qwen3-4B", ""),
        ("Qwen2.5-7B-Instruct", ""),
        ("someone/Qwen2.5-7B", ""),
        (
            "Qwen2.5-7B",
            "Qwen2.5-7B is a base model, which continues texts; Qwen2.5-7B-Instruct answers questions",
        ),
        ("qwen3:4b-base", "Qwen3-4B-Base is a base model, which continues texts; Qwen3-4B answers questions"),
        (
            "qwen2.5:7b",
            "qwen2.5:7b is Qwen/Qwen2.5-7B-Instruct; others of this size: Qwen2.5-7B, Qwen2.5-7B-Instruct-1M",
        ),
        ("qwen2.5vl:7b", "qwen2.5vl:7b is Qwen/Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_what_a_name_does_not_say_is_said(typed: str, note: str) -> None:
    assert understand(typed).note == note


@pytest.mark.parametrize(
    ("typed", "found", "remedy"),
    [
        ("qwen3", "it comes in 8 sizes", "Choose one: qwen3:0.6b, qwen3:1.7b, qwen3:4b"),
        ("qwen2.5-coder:latest", "it comes in 6 sizes", "qwen2.5-coder:0.5b"),
        ("qwen:7b", "with other tools this name is Qwen1.5", "Qwen1.5-7B-Chat or Qwen-7B-Chat"),
        (
            "qwen2.5:7b-instruct-q4_K_M",
            "q4_K_M is a quantisation of GGUF",
            "Load qwen2.5:7b-instruct and round",
        ),
        ("qwen2.5:q8_0", "q8_0 is a quantisation of GGUF", "Load qwen2.5 and round"),
        ("qwen3:5b", "qwen3 has no release 5b", "Did you mean Qwen3-4B, Qwen3-8B or Qwen3-14B?"),
        ("qwen3:4b-chat", "qwen3 has no release 4b-chat", "Did you mean Qwen3-4B"),
        ("Qwen-7B-Chta", "no known name", "Did you mean Qwen-7B-Chat"),
        ("llama3:8b", "no released models are known as llama3", "Names are such as Qwen3-4B, qwen3:4b"),
        ("gpt2", "not of the form 'owner/name'", "owner/name"),
        ("Qwen3-..-x", "no known name", ""),
        ("Qwen3 0.6B", "no known name", "Did you mean Qwen3-0.6B"),
        ("Qwen3-0.6B/..", "no known name", ""),
        ("a/b--c", "no known name", ""),
    ],
)
def test_names_that_mean_no_single_model(typed: str, found: str, remedy: str) -> None:
    with pytest.raises(CheckpointError) as error:
        understand(typed)
    assert found in error.value.found and remedy in error.value.remedy and repr(typed) in error.value.asked


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("Qwen3-4C", "Qwen3-4B"),
        ("qwem3-4b", "Qwen3-4B"),
        ("Qwen2.5-7B-Instrcut", "Qwen2.5-7B-Instruct"),
        ("Qwen2.5-7B-Instrcut-AWQ", "Qwen2.5-7B-Instruct-AWQ"),
        ("other/Qwen3-4B", "Qwen3-4B"),
        ("my-finetune", "me/my-finetune-v2"),
    ],
)
def test_the_nearest_three(typed: str, first: str) -> None:
    found = nearest(typed, ["me/my-finetune-v2"])
    assert found[0] == first and len(found) <= 3


def test_the_table() -> None:
    assert re.fullmatch(r"20[0-9]{2}-[01][0-9]", table_date())
    names = released()
    assert len(names) == len({name.lower() for name in names}) > 250
    for name in names:
        assert understand(name).repo == understand(name.lower()).repo == f"Qwen/{name}"
        assert short(f"Qwen/{name}") == name and nearest(name)[0] == name
    assert short("someone/Qwen3-4B") == "someone/Qwen3-4B" and short("qwen/Qwen3-4B") == "Qwen3-4B"


def test_base_models_are_told_from_those_to_talk_to() -> None:
    assert about_base("Qwen-7B") and about_base("Qwen3-8B-Base") and about_base("CodeQwen1.5-7B")
    assert not about_base("Qwen3-8B") and not about_base("QwQ-32B") and not about_base("Qwen3-Embedding-4B")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40) | st.from_regex(r"\A(qwen[0-9.]*|qwq)[:/-][a-z0-9._:-]{0,20}\Z", fullmatch=False))
def test_any_text_is_a_repository_or_an_error(typed: str) -> None:
    try:
        repo = understand(typed).repo
    except CheckpointError as error:
        assert error.found and error.remedy
    else:
        assert (
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*", repo)
            and ".." not in repo
        )
