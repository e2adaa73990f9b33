"""Prompt and response as tokens, with the tokens whose loss counts.

The loss of an example is the mean of −log p(x_t | x_<t) over its scored tokens: all tokens of the response, or a subset of
them. Where a response begins among the tokens is a question of its own:

    joint      prompt and response are one text; the response begins with the first token that holds one of its characters,
               even if that token also holds the end of the prompt
    apart      prompt and response are tokenised one by one and put together; the boundary is exact, the tokens may differ
               from those of the whole text
    official   one text, and as many tokens are skipped as the prompt alone has, as in the authors' code: off by a token where
               the tokenizer joins characters across the boundary
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError

Boundary = Literal["joint", "apart", "official"]
BOUNDARIES = ("joint", "apart", "official")
TEXTS, WORDS = 64, 200  # of texts without prompts
CONDITIONS = "condition"  # the column that is looked for where none is named


@dataclass(frozen=True)
class Pair:
    """A prompt with its response, as text."""

    prompt: str
    response: str
    id: str = ""
    condition: str = ""


@dataclass(frozen=True)
class Example:
    """A tokenised pair.

    Attributes:
        tokens: of prompt and response.
        scored: places among `tokens` whose loss counts; place 0 has nothing before it and never counts.
        start: place of the response's first token.
    """

    tokens: tuple[int, ...]
    scored: tuple[int, ...]
    start: int = 0
    id: str = ""
    condition: str = ""

    @classmethod
    def of(cls, tokens: Sequence[int], start: int, id: str = "", condition: str = "") -> Example:
        """Every token from `start` on is scored."""
        return cls(tuple(tokens), tuple(range(max(start, 1), len(tokens))), start, id, condition)

    def truncated(self, length: int) -> Example:
        """The first `length` tokens."""
        kept = tuple(place for place in self.scored if place < length)
        return replace(self, tokens=self.tokens[:length], scored=kept)


def tokenise(subject: Subject, pair: Pair, boundary: Boundary = "joint") -> Example:
    """The tokens of a pair; raises ConfigError for an unknown boundary or where the model has no tokenizer."""
    if boundary not in BOUNDARIES:
        raise ConfigError(f"boundary={boundary!r} is unknown; give one of {', '.join(BOUNDARIES)}.")
    prompt = subject.encode(pair.prompt)
    if boundary == "apart":
        return Example.of((*prompt, *subject.encode(pair.response)), len(prompt), pair.id, pair.condition)
    tokens = subject.encode(pair.prompt + pair.response)
    start = len(prompt) if boundary == "official" else _response_start(subject, tokens, prompt, len(pair.response))
    return Example.of(tokens, start, pair.id, pair.condition)


def _response_start(subject: Subject, tokens: list[int], prompt: list[int], response: int) -> int:
    """First token that holds one of the text's last `response` characters.

    Where the prompt's tokens begin the text's tokens, they are the answer. Otherwise tokens were joined across the boundary,
    and characters are counted from the end, where no tokenizer adds or strips spaces.
    """
    start = next((i for i, (a, b) in enumerate(zip(tokens, prompt, strict=False)) if a != b), len(prompt))
    if start == len(prompt):
        return start
    whole = len(subject.decode(tokens))
    while start + 1 < len(tokens) and whole - len(subject.decode(tokens[: start + 1])) >= response:
        start += 1
    return start


def read_pairs(path: str | Path, conditions: str = CONDITIONS) -> list[Pair]:
    """Pairs of a JSONL file: `prompt` and `response`, or `text` and the `response` within it; `id` and the condition's column
    may be absent or null.

    Args:
        conditions: name of the column that says which condition a row belongs to.

    Raises:
        ConfigError: no row has a column of that name, which is not the default.
        DataError: naming file and line, for a row that is no object, lacks a field, or whose response is not in its text.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # other line separators are characters of a JSON string
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}.") from error
    rows = {n: _object(f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()}
    if not rows:
        raise DataError(f"{path} holds no pairs; write one JSON object a line with prompt and response.")
    if conditions != CONDITIONS and not any(conditions in row for row in rows.values()):
        columns = dict.fromkeys(column for row in rows.values() for column in row)
        raise ConfigError(f"no row of {path} has a column {conditions!r}; its columns are {', '.join(columns)}.")
    return [_pair(f"{path}:{n}", row, n, conditions) for n, row in rows.items()]


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: this line is not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: each line is an object with prompt and response; this one is {type(row).__name__}.")
    return row


def _pair(where: str, row: dict[str, Any], number: int, conditions: str) -> Pair:
    prompt, response = row.get("prompt"), row.get("response")
    if prompt is None and isinstance(row.get("text"), str) and isinstance(response, str):
        place = row["text"].rfind(response)
        if place < 0 or not response:
            raise DataError(
                f"{where}: the response {response[:40]!r} is not found in the text; it must stand there literally."
            )
        prompt = row["text"][:place]
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise DataError(
            f"{where}: the texts `prompt` and `response` are needed; found the fields {', '.join(map(str, row))}."
        )
    id, condition = row.get("id"), row.get(conditions)
    return Pair(prompt, response, str(number if id is None else id), "" if condition is None else str(condition))


def halved(texts: Sequence[str]) -> list[Pair]:
    """The first half of each text, by words, as a prompt for the second; for texts that come without prompts.

    Only the first `WORDS` words of the first `TEXTS` texts that have two.

    Raises:
        DataError: no text has two words.
    """
    pairs = []
    for number, text in enumerate(texts):
        words = list(islice(re.finditer(r"\S+", text), WORDS))
        if len(words) > 1:
            cut = words[len(words) // 2 - 1].end()
            pairs.append(Pair(text[words[0].start() : cut], text[cut : words[-1].end()], str(number)))
        if len(pairs) == TEXTS:
            break
    if not pairs:
        raise DataError(
            f"none of the {len(texts)} texts has two words to part into prompt and response; give longer texts."
        )
    return pairs


def rotated(pairs: Sequence[Pair]) -> list[Pair]:
    """Every prompt with the next response that differs from its own: responses of the same kind that do not belong.

    The first follows the last. Pairs without a different response are left out, which is all of them where all answer alike.
    Spaces around a response make no difference.
    """
    words = [pair.response.strip() for pair in pairs]
    if len(set(words)) < 2:
        return []
    found = []
    for i, pair in enumerate(pairs):
        following = (j % len(pairs) for j in range(i + 1, i + len(pairs)))
        found.append(replace(pair, response=next(pairs[j].response for j in following if words[j] != words[i])))
    return found


def matched(example: Example, count: int, generator: np.random.Generator) -> Example:
    """The example with `count` random ones of its scored tokens, or all where it has no more."""
    if count >= len(example.scored):
        return example
    return replace(example, scored=tuple(sorted(generator.choice(example.scored, count, replace=False).tolist())))
