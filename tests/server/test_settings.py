"""Settings and keys: what may be set, and what is never shown."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.errors import ConfigError
from qwenrt.server.keys import Key, Keyring, digest_of, read_key_file
from qwenrt.server.settings import ABOUT, ServeSettings, seconds, size


def test_every_setting_is_explained_but_the_keys_which_no_command_line_should_have() -> None:
    assert {f.name for f in fields(ServeSettings)} - set(ABOUT) == {"api_keys"}
    assert set(ABOUT) <= {f.name for f in fields(ServeSettings)}


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.3.2.1", "::ffff:127.0.0.1", "::1", "[::1]", "localhost", "LocalHost"]
)
def test_this_machine_needs_no_key(host: str) -> None:
    assert ServeSettings(host=host).loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "10.0.0.1", "::ffff:10.0.0.1"])
def test_other_machines_need_a_key_or_a_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no API key") as caught:
        ServeSettings(host=host)
    assert "--api-key-file" in caught.value.remedy and "--i-know-this-is-open" in caught.value.remedy
    assert not ServeSettings(host=host, i_know_this_is_open=True).loopback
    assert ServeSettings(host=host, api_keys=("secret",)).has_keys
    assert ServeSettings(host=host, api_key_file=tmp_path / "keys").has_keys


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("host", v)
            for v in ("", "example.com", "localhost.evil.com", "127.0.0.1:80", None, 5, "127.0.0.1\n1")
        ),
        *(("port", v) for v in (-1, 65536, "8000", None, True, 1.5)),
        *(("max_queue", v) for v in (-1, 10**9, "64")),
        *(("queue_timeout", v) for v in (0, -1, float("nan"), float("inf"), "60", None, True)),
        *(("drain", v) for v in (-1, float("nan"))),
        *(("max_body", v) for v in (0, -5, "8MiB", 2**60)),
        *(("strict_model", v) for v in (1, "yes", None)),
        *(
            ("allow_origins", v)
            for v in ("*", ["https://*"], ["chat.example.com"], ["https://a/b"], ["null"], 5)
        ),
        *(("allow_origins", v) for v in ("https://a\r\nx: y", "https://user@a")),
        *(("allow_hosts", v) for v in ("*", "*.example.com", "https://a", "a:80", "a b", "", [1])),
        *(("served_model_names", v) for v in ([""], ["a\nb"], "x" * 300, 7)),
        *(("api_keys", v) for v in ([""], ["a b"], ["schlüssel"], ["a\n"], 5, [5], "k" * 5000)),
        *(("api_key_file", v) for v in ("", 5, "a\0b")),
        *(("max_priority", v) for v in (-1, 10)),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeSettings(**{name: value})  # type: ignore[arg-type]
    assert name.removeprefix("api_").rstrip("s").replace("_", " ")[:3] in caught.value.asked.lower()
    assert caught.value.remedy


def test_texts_and_lists_become_tuples_without_doubles() -> None:
    settings = ServeSettings(
        served_model_names=["a", "b", "a"],  # type: ignore[arg-type]
        allow_origins="HTTPS://Chat.Example.com:8443/",  # type: ignore[arg-type]
        allow_hosts=["LLM.local.", "[fd00::1]"],  # type: ignore[arg-type]
    )
    assert settings.served_model_names == ("a", "b")
    assert settings.allow_origins == ("https://chat.example.com:8443",)
    assert settings.allow_hosts == ("llm.local", "fd00::1")


def test_keys_are_hashed_at_once_and_shown_nowhere() -> None:
    settings = ServeSettings(api_keys=("sk-very-secret",))
    again = replace(settings, port=1)
    assert again.api_keys == settings.api_keys == (Key(digest_of(b"sk-very-secret")),)
    for shown in (repr(settings), str(settings.api_keys), repr(Keyring(settings))):
        assert "secret" not in shown and digest_of(b"sk-very-secret").hex()[:8] not in shown
    with pytest.raises(ConfigError) as caught:
        ServeSettings(api_keys=("sk secret",))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8MiB", 8 << 20),
        ("64k", 65536),
        (" 1.5 GiB ", 3 << 29),
        ("1000000", 10**6),
        ("10kb", 10_000),
        ("0", 0),
    ],
)
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize(
    ("text", "time"), [("30", 30), ("250ms", 0.25), ("1.5s", 1.5), ("10m", 600), ("1h", 3600)]
)
def test_times_as_people_write_them(text: str, time: float) -> None:
    assert seconds(text) == time


@given(st.text(max_size=30))
def test_any_other_text_is_an_error_of_ours(text: str) -> None:
    for parse in (size, seconds):
        try:
            assert parse(text) >= 0
        except ConfigError as error:
            assert error.remedy


def key_file(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = key_file(tmp_path / "keys", "\ufeff# ours\r\n\r\nsk-one\r\n  sk-two priority=3  \n")
    one, two = read_key_file(path)
    assert one == Key(digest_of(b"sk-one")) and two == Key(digest_of(b"sk-two"), 3)
    assert one.caller != two.caller and len(one.caller) == 16


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path / "keys", "sk-one\n", mode)
    with pytest.raises(ConfigError, match=f"mode {mode:03o}.*chmod 600"):
        read_key_file(path)


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_a_secret_that_a_platform_hands_out_may_be_readable_by_our_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = key_file(tmp_path / "keys", "sk-one\n", 0o440)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert len(read_key_file(path)) == 1
    for mode in (0o460, 0o444, 0o442, 0o450):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"mode {mode:03o}"):
            read_key_file(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "a b\n",
        "k priority=10\n",
        "k priority=\n",
        "k priority=3 x\n",
        b"\xff\xfe",
        "k\u00e9y\n",
        "x" * 2**21,
    ],
)
def test_a_file_that_is_none_of_keys_is_refused_without_showing_it(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        read_key_file(key_file(tmp_path / "keys", text))
    assert "k\u00e9y" not in str(caught.value) and caught.value.remedy


def test_no_file_a_directory_or_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "fifo"):
        with pytest.raises(ConfigError):
            read_key_file(path)


def test_keys_are_read_again_and_stay_where_the_file_went_bad(tmp_path: Path) -> None:
    path = key_file(tmp_path / "keys", "sk-old\n")
    ring = Keyring(ServeSettings(api_keys=("sk-given",), api_key_file=path))
    assert len(ring) == 2 and ring.find([b"sk-old"])
    key_file(path, "sk-new\nsk-newer\n")
    assert ring.reload() == 3
    assert ring.find([b"sk-new"]) and ring.find([b"sk-given"]) and not ring.find([b"sk-old"])
    path.chmod(0o644)
    with pytest.raises(ConfigError):
        ring.reload()
    assert ring.find([b"sk-new"])
    path.unlink()
    with pytest.raises(ConfigError):
        ring.reload()
    assert len(ring) == 3


def test_every_key_is_compared_whatever_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    ring = Keyring(ServeSettings(api_keys=tuple(f"key-{n}" for n in range(5))))
    for text in (b"key-0", b"key-4", b"none", b"", b"x" * 10**6):
        compared.clear()
        ring.find([text])
        assert len(compared) == 5 and all(len(digest) == 32 for digest in compared)
    assert not ring.find([]) and not ring.find([b""]) and not ring.find([b"x" * 10**6])
    assert ring.find([b"wrong", b"key-3"]) == Key.of("key-3")
