"""`qwenrt bench serve` as a whole: against a model that plays a script, and against servers that misbehave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

import qwenrt as package
from qwenrt.cli import bench_serve, plots
from qwenrt.errors import ConfigError
from qwenrt.load_test import client
from qwenrt.server.settings import ServeSettings
from tests.load_test import fake_openai as fake
from tests.load_test.fake_openai import content, fake_openai
from tests.server.scripted import scripted_llm
from tests.server.wire import serving

Qwenrt = Callable[..., Any]
SMALL = ("--num-prompts", "6", "--concurrency", "3", "--new-tokens", "6", "--warmups", "0")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_BETWEEN_PROBES_S", 0.0)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("workload", ["chat", "agent"])
def test_a_scripted_model_is_measured(workload: str, endpoint: str, qwenrt: Qwenrt) -> None:
    sizes = ("--turns", "3", "--prompt-words", "8", "--prefix-words", "16")
    with (
        scripted_llm(lambda prompt: "a word and another word and a word") as llm,
        serving(package.server.app(llm, ServeSettings(port=0, drain=0))) as server,
    ):
        options = (
            *SMALL,
            *sizes,
            "--no-ignore-eos",
            "--workload",
            workload,
            "--endpoint",
            endpoint,
            "--json",
        )
        done = qwenrt("bench", "serve", server.url, *options)
        found = json.loads(done.out)
        read = llm.stats()["generated_tokens"]
    assert done.code == 0 and (found["completed"], found["failed"]) == (6, 0)
    assert found["total_output_tokens"] == read == 36 and found["tokens_counted_by"] == "the server"
    assert found["total_cached_tokens"] > 0, "a conversation's next turn is found in the cache"
    assert found["backend"] == {"chat": "openai-chat", "completions": "openai"}[endpoint]
    assert found["model_id"] == "scripted-qwen3" and found["max_concurrency"] == 3
    assert 0 < found["median_ttft_ms"] <= found["median_e2el_ms"]


def test_the_table_and_the_file(qwenrt: Qwenrt, tmp_path: Path) -> None:
    saved = tmp_path / "result.json"
    with fake_openai(fake.GOOD, fake.refuses("500 No", "broken inside"), fake.GOOD) as server:
        options = ("--workload", "random", "--percentiles", "50,99.9", "--goodput", "ttft:60000")
        done = qwenrt("bench", "serve", server.url, *SMALL, *options, "--save", str(saved))
    assert done.code == 0
    for said in (
        f"server          {server.url}, model fake-model, openai-chat",
        "load            random, answers of 6 tokens; 3 clients in a closed loop",
        "answers         5 of 6 in ",
        "prompt tokens   35, 20 of them from a cache",
        "answer tokens   30, counted by the server",
        "2.00 tokens in an event on average",
        "failed          1 x HTTP 500: broken inside",
        "within the goals",
        "median       std       p50     p99.9",
        "  whole answer (E2EL) ",
    ):
        assert said in done.out, done.out
    found = json.loads(saved.read_text())
    assert found["failed"] == 1 and len(found["ttfts"]) == len(found["errors"]) == 6
    assert sorted(found["errors"]) == [""] * 5 + ["HTTP 500: broken inside"]
    assert found["workload"]["name"] == "random" and found["request_rate"] == "inf"


def test_an_open_loop(qwenrt: Qwenrt) -> None:
    with fake_openai(fake.GOOD) as server:
        options = ("--num-prompts", "4", "--request-rate", "200", "--burstiness", "0.5", "--json")
        done = qwenrt("bench", "serve", server.url, *options, "--warmups", "0")
    found = json.loads(done.out)
    assert (found["request_rate"], found["burstiness"], found["max_concurrency"]) == (200, 0.5, None)
    assert found["completed"] == 4


def test_tokens_are_counted_here_where_the_server_tells_none(qwenrt: Qwenrt) -> None:
    quiet = fake.streams(content("a word"), content(" more"), fake.FINISH, "[DONE]")
    with fake_openai(quiet) as server:
        without = qwenrt("bench", "serve", server.url, *SMALL)
        counted = qwenrt("bench", "serve", server.url, *SMALL, "--tokenizer", "demo", "--json")
    assert "answer tokens   not known, counted by nobody" in without.out and "--tokenizer" in without.err
    assert "throughput" not in without.out
    found = json.loads(counted.out)
    each = len(package.load_tokenizer("demo").encode("a word more"))
    assert found["tokens_counted_by"] == "the tokenizer" and found["total_output_tokens"] == 6 * each


def test_a_server_that_dies_ends_the_run_with_what_came(qwenrt: Qwenrt, tmp_path: Path) -> None:
    saved = tmp_path / "result.json"
    with fake_openai(fake.GOOD, fake.GOOD, fake.dies) as server:
        options = ("--num-prompts", "8", "--concurrency", "1", "--warmups", "0", "--turns", "1")
        done = qwenrt("bench", "serve", server.url, *options, "--save", str(saved))
    assert done.code == 1 and "2 of 8 requests answered before" in done.err
    assert f"the server at {server.url} has gone" in done.err and "Traceback" not in done.err
    assert "answers         2 of 8 in " in done.out and "5 not sent or not finished" in done.out
    found = json.loads(saved.read_text())
    assert (found["completed"], found["failed"]) == (2, 1)
    assert found["failures"][0]["kind"] == "could not connect"  # tried once more on a new connection


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (fake.refuses("401 No", {"error": {"message": "no key"}}), "HTTP 401: no key"),
        (fake.streams(content("a")), "cut off"),
    ],
)
def test_what_is_wrong_from_the_start_is_said_once(behaviour: Any, said: str, qwenrt: Qwenrt) -> None:
    with fake_openai(behaviour) as server:
        done = qwenrt("bench", "serve", server.url, "--num-prompts", "50")
    assert done.code == 1 and done.out == "" and len(server.bodies) == 1
    assert said in done.err and done.err.count("\n") == 1


def test_nothing_answered_is_a_failure(qwenrt: Qwenrt) -> None:
    with fake_openai(fake.refuses("429 No", "full")) as server:
        done = qwenrt("bench", "serve", server.url, *SMALL, "--turns", "1")
    assert done.code == 1 and "failed          6 x HTTP 429: full" in done.out and "latency" not in done.out


def test_a_key_comes_from_a_file_or_the_environment_and_is_not_shown(
    qwenrt: Qwenrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsk-from-file priority=3\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-environment")
    with fake_openai(fake.GOOD) as server:
        first = qwenrt("bench", "serve", server.url, *SMALL, "--json")
        second = qwenrt("bench", "serve", server.url, *SMALL, "--api-key-file", str(keys), "--json")
    heads = "".join(server.heads)
    assert heads.count("bearer sk-from-environment") == heads.count("bearer sk-from-file") == 7
    assert "sk-from" not in first.out + first.err + second.out + second.err
    keys.write_text("\n")
    done = qwenrt("bench", "serve", server.url, "--api-key-file", str(keys))
    assert done.code == 1 and "no key in it" in done.err


@pytest.mark.parametrize("key", ["sk-\N{LATIN SMALL LETTER E WITH ACUTE}", "sk-\nmore", "sk-\x1b[0m"])
def test_a_key_that_cannot_be_sent_is_not_shown_either(
    key: str, qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    done = qwenrt("bench", "serve", "http://127.0.0.1:1")
    assert done.code == 1 and "the API key in OPENAI_API_KEY: characters that no key has" in done.err
    assert "sk-" not in done.out + done.err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("http://127.0.0.1:1", "--num-prompts", "0"), 1, "--num-prompts: got 0"),
        (("http://127.0.0.1:1", "--warmups", "-1"), 1, "--warmups: got -1"),
        (("http://127.0.0.1:1", "--timeout", "0"), 1, "--timeout: got 0"),
        (("http://127.0.0.1:1", "--concurrency", "0"), 1, "--concurrency: got 0"),
        (("http://127.0.0.1:1", "--goodput", "itl:3"), 1, "--goodput: got 'itl:3'"),
        (("http://127.0.0.1:1", "--quantize", "int4"), 1, "--quantize: http://127.0.0.1:1 runs already"),
        (("http://127.0.0.1:1", "--plot", "a.gif"), 1, "--plot a.gif: its name has another end"),
        (("http://127.0.0.1:1", "--plot", "nowhere/a.svg"), 1, "there is no directory nowhere"),
        (("http://127.0.0.1:1", "--save", "nowhere/a.json"), 1, "there is no directory nowhere"),
        (("http://127.0.0.1:1", "--save", "."), 1, "--save .: it is a directory"),
        (("a model that is not looked for", "--goodput", "itl:3"), 1, "--goodput: got 'itl:3'"),
        (("a model that is not looked for", "--num-prompts", "0"), 1, "--num-prompts: got 0"),
        (("http://127.0.0.1:1",), 1, "Is the server running there?"),
        (("http://a?b",), 1, "Give one like http://127.0.0.1:8000"),
        (("http://a", "--percentiles", "0"), 2, "no percentiles"),
        (("http://a", "--extra-body", "[1]"), 2, "no JSON object"),
        (("http://a", "--request-rate", "1", "--concurrency", "2"), 2, "not allowed with"),
        ((), 2, "URL|MODEL"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    argv: tuple[str, ...], code: int, said: str, qwenrt: Qwenrt
) -> None:
    done = qwenrt("bench", "serve", *argv)
    assert done.code == code and done.out == "" and said in done.err.splitlines()[-1]


def test_what_is_missing_is_named(qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_serve, "_NEEDS", ("h11", "a_made_up_package"))
    done = qwenrt("bench", "serve", "demo")
    assert (
        done.code == 1 and "a_made_up_package is not installed" in done.err and "qwenrt[server]" in done.err
    )


def test_a_model_that_cannot_be_served_says_why_in_the_server_s_words(qwenrt: Qwenrt, tmp_path: Path) -> None:
    done = qwenrt("bench", "serve", str(tmp_path / "nowhere"))
    assert done.code == 1 and done.out == "" and "qwenrt serve: " in done.err and "nowhere" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_a_model_is_served_measured_and_stopped(qwenrt: Qwenrt) -> None:
    done = qwenrt("bench", "serve", "demo", *SMALL, "--quantize", "int8", "--json")
    found = json.loads(done.out)
    assert done.code == 0 and found["completed"] == 6 and found["total_output_tokens"] == 36
    assert found["server_cpu_s"] > 0 and found["server_peak_rss_bytes"] > 2**26
    gone = qwenrt("bench", "serve", found["base_url"])
    assert gone.code == 1 and "Is the server running there?" in gone.err


@pytest.mark.parametrize("form", [".svg", ".png"])
def test_a_run_is_drawn(form: str, qwenrt: Qwenrt, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"run{form}"
    with fake_openai(fake.GOOD) as server:
        done = qwenrt("bench", "serve", server.url, *SMALL, "--plot", str(path))
    assert done.code == 0 and f"Drawn: {path}" in done.err
    raw = path.read_bytes()
    assert b"first token (TTFT)" in raw if form == ".svg" else raw.startswith(b"\x89PNG")


def test_a_picture_has_the_tokens_that_were_counted_here(qwenrt: Qwenrt, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from qwenrt.load_test.figures import LATENCIES

    path = tmp_path / "run.svg"
    with fake_openai(fake.streams(content("a word"), content(" more"), fake.FINISH, "[DONE]")) as server:
        qwenrt("bench", "serve", server.url, *SMALL, "--tokenizer", "demo", "--plot", str(path))
    assert LATENCIES["tpot"] in path.read_text()


def test_without_matplotlib_nothing_is_measured_for_a_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install \"qwenrt\[plot\]\""):
        plots.check_can_draw(Path("a.svg"))
