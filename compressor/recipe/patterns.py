"""Which layers a list of patterns means.

A pattern is one of
    linear                          every name that was offered
    model.layers.0                  that module and everything below it
    model.layers.*.mlp.down_proj    `*` stands for any characters, dots included
    re:model\\.layers\\.\\d+\\..*   a regular expression that must match the whole name

Regular expressions come from people's files, so they are kept from running away: no quantifier
inside a quantified group, no back references or look-arounds, and few unbounded quantifiers.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable, Collection, Sequence

from compressor.errors import RecipeError, Where, printable

ALL_LINEAR = "linear"
MAX_PATTERN = 500
MAX_UNBOUNDED = 4
MAX_SECONDS = 0.1

Matcher = Callable[[str], bool]


def match_names(
    patterns: Sequence[str],
    names: Sequence[str],
    *,
    where: Where,
    optional: Collection[str] = (),
) -> dict[str, list[str]]:
    """Names that each pattern matches, in the order of `names`.

    Raises `RecipeError` RC14 for a pattern that matches nothing (unless it is in `optional`, for
    defaults that the user never wrote) and RC16 for a regular expression that is bad or slow.
    """
    matched: dict[str, list[str]] = {}
    for pattern in patterns:
        matched[pattern] = _matches(pattern, names, where)
        if not matched[pattern] and pattern not in optional:
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.0)
            raise RecipeError(
                f"the pattern `{printable(pattern)}` matches nothing",
                code="RC14", where=where,
                fix="nearest names: " + ", ".join(printable(name) for name in near),
            )  # fmt: skip
    return matched


def check_patterns(patterns: Sequence[str], *, where: Where) -> None:
    """Refuse bad and dangerous patterns before any model is open."""
    for pattern in patterns:
        _matcher(pattern, where)


def _matches(pattern: str, names: Sequence[str], where: Where) -> list[str]:
    matches, found = _matcher(pattern, where), []
    start = time.thread_time()
    for name in names:
        if matches(name):
            found.append(name)
        if time.thread_time() - start > MAX_SECONDS * (1 + len(names) / 1000):
            raise _bad_regex(pattern, "it takes too long", where)
    return found


def _matcher(pattern: str, where: Where) -> Matcher:
    if pattern == ALL_LINEAR:
        return lambda name: True
    if pattern.startswith("re:"):
        compiled = _compile(pattern.removeprefix("re:"), where)
        return lambda name: compiled.fullmatch(name) is not None
    if "*" in pattern:
        return lambda name: _glob(pattern, name)
    return lambda name: name == pattern or name.startswith(pattern + ".")


def _glob(pattern: str, name: str) -> bool:
    """Match `*` greedily piece by piece: time grows with len(pattern) * len(name) at most."""
    first, *middle, last = pattern.split("*")
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return False
    position, end = len(first), len(name) - len(last)
    for piece in middle:
        found = name.find(piece, position, end)
        if found < 0:
            return False
        position = found + len(piece)
    return True


def _compile(regex: str, where: Where) -> re.Pattern[str]:
    problem = _danger(regex)
    if problem:
        raise _bad_regex(regex, problem, where)
    try:
        return re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise _bad_regex(regex, str(error), where) from error


def _bad_regex(regex: str, problem: str, where: Where) -> RecipeError:
    return RecipeError(
        f"the regular expression `{printable(regex)}` is not usable: {problem}",
        code="RC16", where=where, fix="use `*` or a simpler one, for example re:.*\\.mlp\\..*",
    )  # fmt: skip


_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(\?|\(|\)|[*+?|]|\{\d*,?\d*\}|.", re.S)


def _danger(regex: str) -> str:
    """Why an expression could take exponential or high polynomial time; empty if it cannot."""
    if len(regex) > MAX_PATTERN:
        return f"it is longer than {MAX_PATTERN} characters"
    tokens = _TOKEN.findall(regex)
    if any(t == "(?" or re.fullmatch(r"\\[1-9]", t) for t in tokens):
        return "look-arounds, flags, named groups and back references are not allowed"
    num_unbounded = sum(t in ("*", "+") or bool(re.fullmatch(r"\{\d*,\}", t)) for t in tokens)
    if num_unbounded > MAX_UNBOUNDED:
        return f"it has more than {MAX_UNBOUNDED} of `*`, `+` and `{{n,}}`"
    return _nested(tokens)


def _nested(tokens: list[str]) -> str:
    branching = [False]  # for each open group: does it hold a quantifier or an alternative?
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        if token in ("(", "(?:"):
            branching.append(False)
        elif token == ")" and len(branching) > 1:
            inside = branching.pop()
            repeats = following in ("*", "+") or (following.startswith("{") and len(following) > 1)
            if inside and repeats:
                return "a repeated group holds a repetition or an alternative"
            branching[-1] = branching[-1] or inside
        elif token in ("*", "+", "?", "|") or (token.startswith("{") and len(token) > 1):
            branching[-1] = True
    return ""
