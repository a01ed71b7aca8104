"""A text of far more tokens than there is room for is not read to its end: what is said of it is an estimate."""

from __future__ import annotations

from qwenrt.errors import RequestError


class Overlong(RequestError):
    """``tokens``: about how many tokens a text of so many ``characters`` has."""

    def __init__(self, tokens: int, characters: int) -> None:
        self.tokens, self.characters = tokens, characters
        super().__init__(
            f"a text of about {tokens} tokens", "there is no room for half of them", "Shorten it."
        )

    def __reduce__(self) -> tuple[type, tuple[int, int]]:  # type: ignore[override]
        return type(self), (self.tokens, self.characters)

    def within(self, characters: int, tokens_before: int, characters_before: int) -> Overlong:
        """The same of a longer text, in which this one stands behind what was counted."""
        known = characters_before + self.characters
        return Overlong((tokens_before + self.tokens) * max(characters, known) // max(known, 1), characters)
