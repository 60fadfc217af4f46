"""Reads the score in a language model's answer, strictly: an answer that is not of the form asked for has none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

# A first word yes or no that ends the answer, or is followed by a mark: "No idea" is neither.
_FIRST_WORD = re.compile(r"[\s\"'*_(]*(yes|no)[\"'*_)]*\s*(?:[.,;:!\n].*)?", re.IGNORECASE | re.DOTALL)
# What begins a word in the tokens of SentencePiece and of GPT-2, where a server does not write them as text.
_SPACES = " \t\r\n\u2581\u0120\u010a"
# Where yes and no together are less likely than this, the model was about to say something else.
LEAST_MASS = 0.1


class Unreadable(ValueError):
    """An answer that is not of the form that was asked for."""


def yes_no(text: str) -> float:
    """1 for an answer that begins with yes and 0 for no, as "Yes." or "no, because ...". Raises: Unreadable."""
    found = _FIRST_WORD.fullmatch(text)
    if found is None:
        raise Unreadable("want yes or no")
    return float(found[1].lower() == "yes")


def yes_probability(tokens: Any) -> float | None:
    """P(yes) / (P(yes) + P(no)) at the first token of an answer that is more than a space.

    Spellings count together: Yes, yes, YES, with a space before or not. One that is not among the token's alternatives
    counts as nothing.

    Args:
        tokens: choices[0].logprobs.content of a chat completion; None if the server has none.
    Returns: None if the server gave no alternatives.
    Raises: Unreadable if yes and no are unlikely together.
    """
    if not isinstance(tokens, list):
        return None
    first = next((token for token in tokens if _word(token)), None)
    if first is None or not isinstance(first.get("top_logprobs"), list) or not first["top_logprobs"]:
        return None
    mass = {"yes": 0.0, "no": 0.0}
    for alternative in first["top_logprobs"]:
        word, logp = _word(alternative), alternative.get("logprob") if isinstance(alternative, dict) else None
        if word in mass and isinstance(logp, int | float) and logp <= 0.0:
            mass[word] += math.exp(logp)
    total = mass["yes"] + mass["no"]
    if total < LEAST_MASS:
        raise Unreadable(f"want yes or no, which together have the probability {total:.3g} at the first token")
    return mass["yes"] / total


def _word(token: Any) -> str:
    text = token.get("token") if isinstance(token, dict) else None
    return text.strip(_SPACES).lower() if isinstance(text, str) else ""


def number(text: str, patterns: Sequence[str], json_key: str | None, least: float, greatest: float) -> float:
    """The number of an answer; the mean, if several patterns find one each.

    Args:
        patterns: regular expressions with one group each, searched for. Without any, and without json_key, the answer
            is the number alone.
        json_key: the answer is a JSON object with this key, alone or in a fenced block.
        least, greatest: what it must be between.
    Raises: Unreadable if there is no number, several different ones, or one out of range.
    """
    if json_key is not None:
        found = [_of_json(text, json_key)]
    elif patterns:
        found = [_matched(text, pattern) for pattern in patterns]
    else:
        found = [_float(text.strip())]
    for value in found:
        if not least <= value <= greatest:
            raise Unreadable(f"{value:g} is not in {least:g} to {greatest:g}")
    return math.fsum(found) / len(found)


def _matched(text: str, pattern: str) -> float:
    found = {_float(match[1]) for match in re.finditer(pattern, text)}
    if len(found) != 1:
        what = "different numbers" if found else "nothing"
        raise Unreadable(f"{pattern} finds {what}")
    return found.pop()


def _of_json(text: str, key: str) -> float:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    try:
        answer = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"want JSON with the key {key}") from error
    value: Any = answer.get(key) if isinstance(answer, dict) else None
    if type(value) not in (int, float):
        raise Unreadable(f"want JSON with a number under the key {key}")
    try:
        return float(value)
    except OverflowError as error:
        raise Unreadable(f"want a number under the key {key} that float64 holds") from error


def _float(text: str | None) -> float:
    if text is None or not re.fullmatch(r"[-+]?[0-9]{1,300}(?:\.[0-9]{1,300})?", text):
        raise Unreadable("want a number")
    return float(text)
