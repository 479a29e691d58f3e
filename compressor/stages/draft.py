"""What a student is worth as a draft model of speculative decoding.

The draft guesses g tokens from its distribution q; the target accepts a guess v with probability
min(1, p(v) / q(v)), so a position is accepted with probability a = sum_v min(p, q) = 1 - |p - q|/2.
With a the mean over held-out tokens, and positions taken as independent, one pass of the target
gives 1 + a + ... + a^g = (1 - a^(g+1)) / (1 - a) tokens (Leviathan et al. 2023, arXiv 2211.17192,
equation 1). With greedy decoding a guess is accepted where both like the same token best.
"""

from __future__ import annotations

from typing import Any

GUESSES = 4


def expected_tokens(acceptance: float, guesses: int) -> float:
    """Mean tokens for each pass of the target."""
    return sum(acceptance**i for i in range(guesses + 1))


def draft_note(facts: dict[str, Any]) -> str:
    """The expected acceptance rate of a finished student, for people."""
    rate, greedy = facts["acceptance"], facts["agreement"]
    return (
        f"as a draft model: expected acceptance rate {rate:.3f} sampled, {greedy:.3f} greedy, so "
        f"{expected_tokens(rate, GUESSES):.2f} and {expected_tokens(greedy, GUESSES):.2f} tokens a "
        f"pass of the teacher with {GUESSES} guesses"
    )
