"""The demo's world: the same for a seed, and nothing of the test in training."""

from __future__ import annotations

import itertools
import json

import pytest

from qwenrt.demo import facts
from qwenrt.demo.corpus import held_out_samples, training_samples
from qwenrt.demo.phrasings import ASK, OPENERS, SMALL_TALK, SYSTEMS
from qwenrt.demo.samples import Turn
from qwenrt.demo.world import World, held_out

TRAINED = 6000


@pytest.fixture(scope="module")
def trained():
    return list(itertools.islice(training_samples(1), TRAINED))


@pytest.fixture(scope="module")
def tested():
    return held_out_samples(800)


def prompts(sample):
    """(system prompt, user texts up to here, tools) of every turn: what an answer depends on."""
    for i in range(len(sample.turns)):
        yield sample.system, tuple(t.user for t in sample.turns[: i + 1]), json.dumps(sample.tools)


def test_the_same_seed_gives_the_same_samples(trained):
    again = itertools.islice(training_samples(1), 300)
    assert [s.entry() for s in again] == [s.entry() for s in trained[:300]]
    assert held_out_samples(50) == held_out_samples(50)
    assert [s.entry() for s in itertools.islice(training_samples(2), 5)] != [s.entry() for s in trained[:5]]


def test_every_category_is_tested(tested):
    assert {s.category for s in tested} == {
        "small talk",
        "capital",
        "animal",
        "colour",
        "arithmetic",
        "memory",
        "story",
        "system prompt",
        "tool call",
        "completion",
    }


def test_reserved_phrasings_are_apart():
    for (intent, _), (train, test) in ASK.items():
        assert not set(train) & set(test), intent
    for (intent, _), (train, test, _) in SMALL_TALK.items():
        assert not set(train) & set(test), intent
    for train, test in (*OPENERS.values(), *SYSTEMS.values()):
        assert not set(train) & set(test)


def test_no_question_of_the_test_is_asked_in_training(trained, tested):
    """A graded prompt never occurs in training: not alone, and not as the last turn under the same system prompt."""
    asked = {(s.system, turn.user) for s in trained for turn in s.turns}
    whole = {p for s in trained for p in prompts(s)}
    for sample in tested:
        assert not any(p in whole for p in list(prompts(sample))[-1:]), sample
        if sample.category in ("small talk", "capital", "animal", "colour", "arithmetic"):
            assert (sample.system, sample.turns[0].user) not in asked
        if sample.category == "system prompt":
            assert (sample.system, sample.turns[0].user) not in asked


def test_kept_pairs_of_numbers_never_occur_in_training(trained):
    text = "\n".join(t.answer for s in trained for t in s.turns) + "\n".join(s.text for s in trained)
    equations = set(text.split("\n"))
    kept = [(a, b) for a in range(21) for b in range(a, 21) if held_out("+", a, b, one_in=10)]
    assert len(kept) > 15
    for a, b in kept:
        assert f"{a} + {b} = {a + b}" not in equations
        assert f"{b} + {a} = {a + b}" not in equations


def test_names_of_the_test_never_occur_in_training(trained):
    text = json.dumps([s.entry() for s in trained[:3000]], ensure_ascii=False)
    assert not set(facts.NAMES_EN) & set(facts.NAMES_EN_TEST)
    for name in facts.NAMES_EN_TEST:
        assert f" {name}." not in text and f" {name}!" not in text


def test_kept_stories_and_plain_text_capitals_never_occur_in_training(trained):
    answers = {t.answer for s in trained for t in s.turns}
    kept = {s.turns[0].answer for s in held_out_samples(600, seed=3) if s.category == "story"}
    unseen = kept - answers
    assert len(unseen) > 10
    world = World("train", 0)
    told = "\n".join(s.text for s in trained)
    for country, _, country_zh, _ in facts.CAPITALS:
        if world.untold(country, "zh"):
            assert f"{country_zh}的首都是" not in told
        if world.untold(country, "en"):
            assert f"The capital of {country} is" not in told


def test_the_quickstart_of_every_qwen_readme_is_part_of_the_world(trained):
    world = World("train", 0)
    assert not world.untold("Mongolia", "zh") and not world.untold("Ethiopia", "zh")
    assert any(t.user.startswith("你好") for s in trained for t in s.turns)
    assert "给这个故事起一个标题" in ASK["title", "zh"][0]


def test_grading():
    turn = Turn("?", "The capital of France is Paris.", ("Paris",))
    assert turn.is_right("The capital of France is Paris.")
    assert turn.is_right(" Paris ")
    assert not turn.is_right("The capital of France is Berlin.")
    assert not turn.is_right("Paris, Berlin, Rome, Madrid, " * 10)
    exact = Turn("2+2", "2 + 2 = 4", ("2 + 2 = 4",), exact=True)
    assert exact.is_right("2 + 2 = 4\n")
    assert not exact.is_right("2 + 2 = 44")


def test_a_training_entry_holds_the_tools_and_the_whole_transcript(trained):
    sample = next(s for s in trained if s.call)
    user, assistant = sample.entry()["conversations"]
    name, arguments, observation, final = sample.call
    assert user["value"].startswith("Answer the following questions as best you can.")
    assert user["value"].endswith(f"Begin!\n\nQuestion: {sample.turns[0].user}")
    assert assistant["value"] == (
        f"Thought: I should use the {name} tool.\nAction: {name}\nAction Input: {arguments}\n"
        f"Observation: {observation}\nThought: I now know the final answer\nFinal Answer: {final}"
    )
    assert json.loads(arguments)
