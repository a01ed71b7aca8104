"""What went wrong with a request, in one type; each dialect has its own words and bodies for it."""

from __future__ import annotations

from typing import Any, Literal

from qwenrt.errors import CapacityError, ConfigError, QwenrtError, RequestError

Kind = Literal[
    "invalid_json",
    "invalid_request",
    "context_length",
    "unauthorized",
    "forbidden",
    "not_found",
    "method_not_allowed",
    "too_large",
    "queue_full",
    "queue_timeout",
    "timeout",
    "unavailable",
    "not_implemented",
    "internal",
]

STATUS: dict[Kind, int] = {
    "invalid_json": 400,
    "invalid_request": 400,
    "context_length": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "too_large": 413,
    "queue_full": 429,
    "queue_timeout": 503,
    "timeout": 504,
    "unavailable": 503,
    "not_implemented": 501,
    "internal": 500,
}


class Problem(Exception):
    """A request that is not served.

    message: for a person, in the words of an error of qwenrt. param: the JSON path of what is wrong, such as
    "messages[1].role". prompt_tokens, max_tokens: of a prompt that does not fit (kind "context_length"). retry_after:
    seconds. details: what else a dialect's clients look for in an error.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        param: str | None = None,
        prompt_tokens: int = 0,
        max_tokens: int = 0,
        retry_after: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.param = kind, message, param
        self.prompt_tokens, self.max_tokens, self.retry_after = prompt_tokens, max_tokens, retry_after
        self.details = details

    @property
    def status(self) -> int:
        """The status of an answer that is this problem."""
        return STATUS[self.kind]

    @classmethod
    def context_length(cls, prompt_tokens: int, max_tokens: int, about: bool = False) -> Problem:
        """A prompt that leaves no room for an answer; dialects say it in the words that their clients look for.
        ``about``: its tokens are an estimate."""
        return cls(
            "context_length",
            f"This model's maximum context length is {max_tokens} tokens, and the prompt has "
            f"{'about ' * about}{prompt_tokens}. Shorten it, or start the server with a larger --max-model-len.",
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
        )

    @classmethod
    def of(cls, error: Exception) -> Problem:
        """An error of qwenrt, or any other, as a problem of the request that met it."""
        if isinstance(error, Problem):
            return error
        if isinstance(error, (RequestError, ConfigError)):  # asked wrongly, or of a model that cannot do it
            return cls("invalid_request", str(error))
        if isinstance(error, CapacityError):
            return cls("unavailable", str(error))
        if isinstance(error, QwenrtError):
            return cls("internal", str(error))
        return cls("internal", f"{type(error).__name__} in the server; its log says more.")
