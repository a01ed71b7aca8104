"""qwenrt chat through a pipe: every command, what is remembered, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenrt.cli.chat_commands import COMMANDS, Mistaken, Order, Question, Typed, meaning
from qwenrt.cli.session import parse_settings, shortened, tidy

Qwenrt = Callable[..., Any]


def test_one_question_per_line_and_nothing_but_answers(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", stdin="hello\n你好\n")
    assert done.code == 0
    assert done.out == (
        "echo hello (0 turns, seed 1234, top_p 0.8)\necho 你好 (1 turns, seed 1234, top_p 0.8)\n"
    )
    assert done.err == ""
    assert fake.loaded[0][0] == "demo"
    assert fake.llm.closed


def test_history_and_system_reach_the_model(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    qwenrt("chat", "--system", "Be brief.", stdin="a\nb\n")
    first, second = fake.llm.calls
    assert (first["history"], first["system"]) == ([], "Be brief.")
    assert second["history"] == [("a", "echo a (0 turns, seed 1234, top_p 0.8)")]


def test_every_question_is_asked_with_the_seed(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    qwenrt("chat", "-s", "7", stdin="a\n:clh\na\n:seed 9\n:clh\na\n")
    assert [call["sampling_params"].seed for call in fake.llm.calls] == [7, 7, 9]


@pytest.mark.parametrize("command", [":help", ":h"])
def test_help(command: str, fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    out = qwenrt("chat", stdin=command + "\n").out
    for name in (
        ":exit",
        ":clear-his",
        ":history",
        ":seed",
        ":conf",
        ":reset-conf",
        ":reset-system",
        ":save",
        ":load",
    ):
        assert name in out
    assert max(map(len, out.splitlines())) <= 80
    assert all(f":{name}" in out for command in COMMANDS for name in command.names)
    assert not fake.llm.calls


@pytest.mark.parametrize("command", [":exit", ":quit", ":q", ": q", ":quit now"])
def test_leaving(command: str, fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    assert qwenrt("chat", stdin=f"{command}\nnever asked\n").code == 0
    assert not fake.llm.calls


@pytest.mark.parametrize("command", [":clear", ":cl"])
def test_clear_writes_no_escape_codes_into_a_pipe(command: str, fake: Any, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", stdin=f"a\n{command}\nb\n")
    assert "\x1b" not in done.out + done.err
    assert len(fake.llm.calls[1]["history"]) == 1, "clearing the screen keeps the history"


@pytest.mark.parametrize("command", [":clear-his", ":clh"])
def test_clear_history(command: str, fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", stdin=f"a\nb\n{command}\nc\n")
    assert "[INFO] Forgot 2 turns" in done.out
    assert fake.llm.calls[2]["history"] == []


@pytest.mark.parametrize("command", [":history", ":his"])
def test_show_history(command: str, fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    lines = qwenrt("chat", stdin=f"a\nb\n{command}\n").out.splitlines()[2:]
    assert lines[0].strip("=") == " History (2) "
    assert abs(len(lines[0].split(" ")[0]) - len(lines[0].split(" ")[-1])) <= 1, "the header is centred"
    assert lines[1:5] == [
        "User[0]: a",
        "Qwen[0]: echo a (0 turns, seed 1234, top_p 0.8)",
        "User[1]: b",
        "Qwen[1]: echo b (1 turns, seed 1234, top_p 0.8)",
    ]


def test_seed(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", stdin=":seed\n:seed 5\n:seed\n:seed x\n:seed\n")
    assert done.out.splitlines() == [
        "[INFO] Current random seed: 1234",
        "[INFO] Random seed changed to 5",
        "[INFO] Current random seed: 5",
        "[INFO] Current random seed: 5",
    ]
    assert "must be an integer, not 'x'; it stays 5" in done.err


def test_conf_takes_effect_and_can_be_reset(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt(
        "chat", "--top-p", "0.7", stdin="a\n:conf top_p=0.5 max_new_tokens=9\nb\n:seed 3\n:reset-conf\nc\n"
    )
    used = [call["sampling_params"] for call in fake.llm.calls]
    assert [p.top_p for p in used] == [0.7, 0.5, 0.7]
    assert [p.max_tokens for p in used] == [512, 9, 512]
    assert used[2].seed == 3, "the seed is not part of :reset-conf"
    assert "  top_p = 0.5    (was 0.7)" in done.out


def test_conf_shows_every_setting(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    out = qwenrt("chat", stdin=":conf\n").out
    for name in ("temperature = 1.0", "top_k = 0", "top_p = 0.8", "max_tokens = 512", "stop = ()"):
        assert f"  {name}\n" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("top_p=2", "sampling parameter top_p: got 2. It must be a number in (0, 1]. Nothing was changed."),
        ("top_p", '"top_p" has no "="'),
        ("top_p=print", "top_p=print is not a number"),
        ("top_p=__import__('os').getpid()", "is not a number"),
        ("nonsense=1", "sampling parameter 'nonsense': unknown"),
        ("n=2", "n is always 1"),
        ("top_p=", "is not a number"),
    ],
)
def test_conf_refuses(given: str, said: str, fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", stdin=f":conf {given}\na\n")
    assert said in done.err
    assert fake.llm.calls[0]["sampling_params"].top_p == 0.8


@pytest.mark.parametrize(
    ("text", "changes", "refused"),
    [
        ("a=1 b=2.5", {"a": 1, "b": 2.5}, 0),
        ("stop=['x y', \"z\"] top_p=0.1", {"stop": ["x y", "z"], "top_p": 0.1}, 0),
        ("top_p=0.5 foo bar", {"top_p": 0.5}, 2),
        ("seed=none ignore_eos=true", {"seed": None, "ignore_eos": True}, 0),
        ("do_sample=False", {"temperature": 0.0}, 0),
        ("do_sample=True", {}, 0),
        ("a=" + "(" * 5000, {}, 1),
        ("a=\x00", {}, 1),
    ],
)
def test_settings_are_literals(text: str, changes: dict[str, Any], refused: int) -> None:
    found, left_out = parse_settings(text)
    assert (found, len(left_out)) == (changes, refused)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (":unknown", ":help lists the commands"),
        (":hlep", "Did you mean :help?"),
        (":temperature=0", ":help lists the commands"),
        ("/help", "Did you mean :help?"),
        ("/bye", "Did you mean :exit?"),
        ("/set parameter seed 1", "Did you mean :conf?"),
        ("Exit", "Did you mean :exit?"),
        ("quit()", "Did you mean :exit?"),
    ],
)
def test_what_looks_like_a_command_is_not_sent(
    typed: str, meant: str, fake: SimpleNamespace, qwenrt: Qwenrt
) -> None:
    done = qwenrt("chat", stdin=f"{typed}\n:send {typed}\n {typed}\n")
    assert done.err.count("[ERROR]") == 1 and done.code == 1, "a pipe must not lose a question in silence"
    assert f'"{typed.split()[0]}" is no command here' in done.err and meant in done.err
    assert [call["query"] for call in fake.llm.calls] == [typed, typed], "these two are how it is sent"


def test_retry_asks_with_another_seed_in_place_of_the_last_turn(
    fake: SimpleNamespace, qwenrt: Qwenrt
) -> None:
    done = qwenrt("chat", stdin=":retry\na\nb\n:retry\n:retry\nc\n:retry\n:his\n")
    asked = [(c["query"], len(c["history"]), c["sampling_params"].seed) for c in fake.llm.calls]
    assert asked == [
        ("a", 0, 1234),
        ("b", 1, 1234),
        ("b", 1, 1235),
        ("b", 1, 1236),
        ("c", 2, 1234),
        ("c", 2, 1235),
    ]
    assert "No question was asked yet" in done.err and " History (3) " in done.out


def test_retry_says_where_it_changes_nothing_and_asks_again_what_failed(
    fake: SimpleNamespace, qwenrt: Qwenrt
) -> None:
    done = qwenrt("chat", stdin=":conf temperature=0\na\n:retry\n/fail\n:retry\n:his\n")
    assert "The most probable answer comes again" in done.err
    assert [c["query"] for c in fake.llm.calls] == ["a", "a", "/fail", "/fail"]
    assert len(fake.llm.calls[-1]["history"]) == 1 and " History (1) " in done.out


def test_undo_takes_back_a_turn(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", stdin="a\nb\n:undo\nc\n:undo\n:undo\n:undo\n:retry\n")
    assert [c["query"] for c in fake.llm.calls] == ["a", "b", "c"]
    assert [len(c["history"]) for c in fake.llm.calls] == [0, 1, 1]
    assert "[INFO] Took back: c" in done.out
    assert "There is no turn to take back" in done.err and "No question was asked yet" in done.err


def test_stats(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    before, after = qwenrt("chat", stdin=":stats\na\n:stats\n").out.split("echo a")
    assert "last answer   none yet" in before
    assert "last answer   2 tokens in 1.50 s, the first after 0.50 s, then 2.0 a second" in after
    assert "its prompt    5 tokens, 4 of them from the cache" in after
    assert "context       7 of 4096 tokens used" in after
    assert "conversation  1 turn" in after and "model         fake on cpu" in after


def test_empty_and_undecodable_input_is_asked_again(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", stdin=b"\n  \n\xff\xfe\xfa\nok\n")
    assert done.err.count("The question is empty") == 2
    assert done.err.count("not readable text") == 1
    assert [call["query"] for call in fake.llm.calls] == ["ok"]


@pytest.mark.parametrize(
    ("typed", "query"),
    [
        ('"""a\n  b\n\nc"""\n', "a\n  b\n\nc"),
        ('"""\na\n"""\n', "a"),
        ('"""one line"""\n', "one line"),
        ('"""the input ends\nhere', "the input ends\nhere"),
        ("a\\\nb\\\nc\n", "a\nb\nc"),
        ("windows\r\n", "windows"),
        ("\ufeffmarked\n", "marked"),
    ],
)
def test_longer_messages(typed: str, query: str, fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    qwenrt("chat", stdin=typed)
    assert [call["query"] for call in fake.llm.calls] == [query]


def test_a_chinese_console(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    qwenrt("chat", stdin="你好\n", encoding="gbk")
    assert fake.llm.calls[0]["query"] == "你好"


def test_an_error_keeps_the_session_and_fails_the_pipe(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", stdin="a\n/fail\nb\n")
    assert done.code == 1
    assert "[ERROR] a query: it fails. Ask another one." in done.err
    assert [len(call["history"]) for call in fake.llm.calls] == [0, 1, 1]


def test_ctrl_c_in_a_pipe_ends_the_program(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    assert qwenrt("chat", stdin="/interrupt\nnever\n").code == 130
    assert len(fake.llm.calls) == fake.llm.closed_streams == 1, "the stream was closed"
    assert fake.llm.closed


def test_an_answer_cut_by_its_limit_says_so(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", stdin="/long\nnext\n")
    assert ":conf max_tokens=N allows more" in done.err
    assert len(fake.llm.calls[1]["history"]) == 1


def test_system(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", stdin=":system\n:system You are a cat.\na\n")
    assert "[INFO] System prompt: the model's own" in done.out
    assert fake.llm.calls[0]["system"] == "You are a cat."
    done = qwenrt("chat", "--system", "Meow.", stdin=":reset-system\na\n")
    assert "[INFO] System prompt: the model's own" in done.out
    assert fake.llm.calls[-1]["system"] is None


def test_save_and_load(fake: SimpleNamespace, qwenrt: Qwenrt, tmp_path: Path) -> None:
    path = tmp_path / "my talk 对话.json"
    done = qwenrt("chat", stdin=f"你好\n:system Meow.\n:save {path}\n")
    assert f"[INFO] Saved 1 turn to {path}" in done.out
    json.loads(path.read_text(encoding="utf-8"))
    done = qwenrt("chat", stdin=f":load {path}\nand then?\n")
    assert f"[INFO] Loaded 1 turn from {path}" in done.out
    call = fake.llm.calls[-1]
    assert call["history"] == [("你好", "echo 你好 (0 turns, seed 1234, top_p 0.8)")]
    assert call["system"] == "Meow."


@pytest.mark.parametrize("content", [None, "", "not json", "[1]", '{"history": 5}'])
def test_what_cannot_be_loaded_changes_nothing(
    content: str | None, fake: SimpleNamespace, qwenrt: Qwenrt, tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    done = qwenrt("chat", stdin=f"a\n:load {path}\nb\n:load\n:save\n:save {tmp_path}\n")
    assert done.err.count("[ERROR]") == 2 and "talk.json" in done.err
    assert ":load conversation.json" in done.err and ":save conversation.json" in done.err
    assert len(fake.llm.calls[1]["history"]) == 1


def test_options_reach_load(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    options = "--device cpu --dtype float32 --quantize int4 --kv-cache-dtype int8 --max-model-len 99"
    more = (
        "--source modelscope --revision v1 --offline --fallback error --activations int8 --packed-cache kept"
    )
    qwenrt("chat", "Qwen-7B-Chat", *options.split(), *more.split())
    model, arguments = fake.loaded[0]
    assert model == "Qwen-7B-Chat"
    assert arguments == {
        "device": "cpu",
        "dtype": "float32",
        "quantize": "int4",
        "quantize_head": None,
        "kv_cache_dtype": "int8",
        "max_model_len": 99,
        "source": "modelscope",
        "revision": "v1",
        "offline": True,
        "activations": "int8",
        "fallback": "error",
        "packed_cache": "kept",
        "draft": None,
        "draft_tokens": 1,
    }


def test_a_bad_setting_is_found_before_the_model_is_loaded(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("chat", "--temperature", "-1")
    assert done.code == 1
    assert done.err == (
        "qwenrt: error: sampling parameter temperature: got -1.0. It must be a number in [0, 100].\n"
    )
    assert not fake.loaded


def test_a_pipe_gets_the_answer_without_the_thought(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt(
        "chat", "--thinking", "off", "--thinking-budget", "9", "--reasoning-effort", "low", stdin="/think\n"
    )
    assert "think." not in done.out and "echo /think" in done.out
    assert fake.llm.calls[0]["enable_thinking"] is False and fake.llm.calls[0]["thinking_budget"] == 9
    assert fake.llm.calls[0]["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (":help", Order("help", "")),
        (": q", Order("exit", "")),
        (":HELP me", Order("help", "me")),
        ("：帮助", Question("：帮助")),
        ("：clh", Order("clear-his", "")),
        (":system  You are a cat. ", Order("system", "You are a cat.")),
        (":conf a=1 b=2", Order("conf", "a=1 b=2")),
        *(
            (text, Question(text))
            for text in (":", "::", ":)", ":-D", ": hello", "a:help", "help", "", ":你好")
        ),
        *(
            (text, Question(text))
            for text in ("/think", "/no_think hi", "/usr/bin/env", "//", "/", "exit now")
        ),
        ("::help", Question(":help")),
        (":help\nof two lines", Question(":help\nof two lines")),
        (Typed(":help", literal=True), Question(":help")),
    ],
)
def test_what_a_line_means(typed: str | Typed, meant: Order | Question) -> None:
    assert meaning(typed if isinstance(typed, Typed) else Typed(typed)) == meant


@pytest.mark.parametrize(
    "text", [":D", ":seed=5", ":smile:", ":help你好", "/exit", "/?", "/regenerate", "QUIT"]
)
def test_what_is_mistaken_for_a_command(text: str) -> None:
    meant = meaning(Typed(text))
    assert isinstance(meant, Mistaken) and f":send {text}" in meant.said
    assert (meant.plainly is not None) == (text in ("/exit", "/?", "QUIT"))


def test_names_are_tidy() -> None:
    assert tidy("/models/Qwen3-4B/") == tidy("Qwen/Qwen3-4B") == tidy("D:\\models\\Qwen3-4B") == "Qwen3-4B"
    assert tidy("demo") == "demo" and tidy("/") == "/"
    assert shortened("a\nb  c") == "a b c" and shortened("x" * 99) == "x" * 57 + "..."
