"""What a policy is conditioned on: labels by default; a family that reads texts derives from this and overrides it.

A prompt is a number everywhere: a label, or a row of the table of texts that `set_prompts` makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from varfast.types import InputError

# The file of a text tokenizer, beside the weights and in a run folder: of the package tokenizers.
TOKENIZER_FILE = "tokenizer.json"


class TextTokenizer(Protocol):
    """Turns the text of a prompt into the tokens that a model reads before the first token of the image."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with all that the model's template puts around it."""
        ...

    def unguided(self, length: int) -> list[int]:
        """The prompt of `length` tokens that says nothing, for guidance."""
        ...

    def to_json(self) -> str:
        """The content of its file, TOKENIZER_FILE."""
        ...


def reads_texts(policy: object) -> bool:
    """Whether a policy is conditioned on text, and not on labels."""
    return getattr(type(policy), "set_prompts", Conditioned.set_prompts) is not Conditioned.set_prompts


class Conditioned:
    """Conditioned on labels: there are no texts."""

    def set_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """How texts are read from now on; of a family that is conditioned on text."""
        raise InputError(f"{type(self).__name__} is conditioned on labels; it reads no texts")

    def tokenizer_json(self) -> str | None:
        """Content of the file of the text tokenizer; None: conditioned on labels.

        Raises: InputError if none has been set.
        """
        return None

    def text_settings(self) -> dict[str, Any]:
        """Keys of the section `policy` that say how texts are read."""
        return {}

    def set_prompts(self, texts: Sequence[str]) -> None:
        """Make these the table of prompts: id i is row i, and num_classes their number. Rollouts of before are void.

        Raises: InputError for a text that is too long, or a family that is conditioned on labels.
        """
        raise InputError(f"{type(self).__name__} is conditioned on labels; it has no table of texts")

    def ids_of(self, texts: Sequence[str]) -> list[int]:
        """Ids of texts, at least one; those that are not in the table yet are added to it.

        Raises: InputError as set_prompts.
        """
        raise InputError(
            f"labels_B holds {texts[0]!r}, want whole numbers: {type(self).__name__} is conditioned on labels"
        )
