"""Token ids to text, one token at a time, never cutting a character or showing part of a stop.

A token can be part of a UTF-8 character, and a decoder may treat the first piece of a text in a
special way (leading spaces). So a small window of tokens is decoded twice, without and with the new
ones, and the difference is the new text; it is held back while it ends in U+FFFD, the sign of an
unfinished character. The pieces joined give the text of the whole, for streams and plain answers
alike, since both take this path.
"""

from __future__ import annotations

from typing import Any

_PENDING_LIMIT = 8  # tokens; a real U+FFFD in the text is let go after that many
_UNFINISHED = "�"


class Detokenizer:
    """Text of one sequence's output, with stop strings.

    Args:
        tokenizer: decodes ids (special tokens are left out).
        prompt: ids before the output; the last few give the decoder its context.
        stop: strings that end the text.
    """

    def __init__(self, tokenizer: Any, prompt: tuple[int, ...], stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = list(prompt[-4:])
        self._start = 0
        self._read = len(self._ids)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that became certain with this token."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._pass_on(self._decode_new(flush=False), final=False)

    def finish(self) -> str:
        """What was held back, at the end of the output."""
        return "" if self.stopped else self._pass_on(self._decode_new(flush=True), final=True)

    def _decode_new(self, *, flush: bool) -> str:
        known = self._decode(self._ids[self._start : self._read])
        both = self._decode(self._ids[self._start :])
        pending = len(self._ids) - self._read
        if len(both) <= len(known) and not flush:
            return ""
        if both.endswith(_UNFINISHED) and not flush and pending < _PENDING_LIMIT:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return both[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _pass_on(self, text: str, *, final: bool) -> str:
        if not self._stop:
            return text
        self._held += text
        ends = [end for end in (self._held.find(s) for s in self._stop) if end >= 0]
        if ends:
            self.stopped = True
            return self._held[: min(ends)]
        keep = 0 if final else longest_overlap(self._held, self._stop)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def longest_overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max(len(s) for s in stops) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stops):
            return size
    return 0
