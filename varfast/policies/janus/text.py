"""From texts to the token ids of prompts, by a tokenizer.json, which the package tokenizers reads.

A prompt is BOS, the text, begin-of-image; its unguided version has pads between the two, as many as the text has
tokens. The three are found by their names in the file. If its vocabulary has DeepSeek's roles, the text stands in the
template that Janus-Pro was trained with; a file without them, as our own small models have, gets the text alone.

Source: the public code, github.com/deepseek-ai/Janus, commit 1daa72f, and its demo of text to image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from varfast.files import read_text, save_text
from varfast.policies.text import TOKENIZER_FILE
from varfast.types import InputError
from varfast.weights.files import shown
from varfast.weights.hub import one_line

# DeepSeek's names; their bars are FULLWIDTH VERTICAL LINE and their spaces LOWER ONE EIGHTH BLOCK.
BOS, PAD = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5c\u2581pad\u2581\uff5c>"
BEGIN_OF_IMAGE, UNKNOWN = "<begin_of_image>", "<unk>"
MAX_TOKENS = 128
USER, ASSISTANT = "<|User|>", "<|Assistant|>"


class TextTokenizer:
    """See the top of this file. All copies of a model share it.

    Args:
        tokenizer: of the package tokenizers.
        max_tokens: places of the longest prompt that is accepted, its template included.
        named: where it comes from, for errors.
    Attributes:
        vocab_size: ids are below it.
    Raises: InputError if one of the three tokens is missing.
    """

    def __init__(self, tokenizer: Any, max_tokens: int = MAX_TOKENS, named: str = TOKENIZER_FILE) -> None:
        found = {name: tokenizer.token_to_id(name) for name in (BOS, PAD, BEGIN_OF_IMAGE)}
        missing = [name for name, token in found.items() if token is None]
        if missing:
            raise InputError(f"{named} has no token {', '.join(missing)}; give the tokenizer.json of a Janus model")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._bos, self._pad, self._begin_of_image = found.values()
        self._in_template = all(tokenizer.token_to_id(role) is not None for role in (USER, ASSISTANT))
        self.max_tokens = max_tokens
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def read(cls, path: Path, max_tokens: int = MAX_TOKENS) -> TextTokenizer:
        """Of a file. Raises: InputError if it cannot be read, or is no tokenizer of a Janus model."""
        content, named = read_text(path), shown(path)
        try:
            tokenizer = _package().Tokenizer.from_str(content)
        except Exception as error:  # the package raises Exception itself
            raise InputError(
                f"{named} is no tokenizer.json of the package tokenizers: {one_line(error, 120)}"
            ) from error
        return cls(tokenizer, max_tokens, named)

    def check_fits(self, rows: int) -> None:
        """Raises: InputError if a transformer's table of text tokens has fewer rows than there are tokens."""
        if self.vocab_size > rows:
            raise InputError(
                f"the text tokenizer has {self.vocab_size} tokens, and the transformer's table {rows} rows; give the "
                f"tokenizer of these weights, or for new ones policy.transformer.text_vocab_size={self.vocab_size}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> TextTokenizer:
        return self

    def save(self, path: Path) -> None:
        """Write the file that `read` reads. Raises: WriteError."""
        save_text(path, self.to_json())

    def to_json(self) -> str:
        """The content of that file."""
        content: str = self._tokenizer.to_str()
        return content

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, of BOS and begin-of-image too.

        Raises: InputError for what is no text, or a prompt of more than `max_tokens`.
        """
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"prompts hold {one_line(repr(text), 60)}, want texts that say something")
        stripped = [text.strip() for text in texts]
        whole = [f"{USER}: {text}\n\n{ASSISTANT}:" for text in stripped] if self._in_template else stripped
        encoded = self._tokenizer.encode_batch(whole, add_special_tokens=False)
        rows = [[self._bos, *each.ids, self._begin_of_image] for each in encoded]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.max_tokens:
                raise InputError(
                    f"the prompt {one_line(text, 60)!r} has {len(row)} tokens with its template, more than "
                    f"policy.max_prompt_tokens={self.max_tokens}; shorten it, or raise that"
                )
        return rows

    def unguided(self, length: int) -> list[int]:
        """A prompt of `length` tokens that says nothing: its first and last token, and pads between."""
        return [self._bos, *[self._pad] * (length - 2), self._begin_of_image]


def word_tokenizer(words: Iterable[str], max_tokens: int = MAX_TOKENS) -> TextTokenizer:
    """For small models of a known vocabulary: texts are split at white space and punctuation, in lower case.

    Ids: BOS 0, PAD 1, begin-of-image 2, unknown 3, then the words sorted, each once.
    """
    tokenizers = _package()
    names = [BOS, PAD, BEGIN_OF_IMAGE, UNKNOWN, *sorted({word.lower() for word in words})]
    model = tokenizers.models.WordLevel({name: row for row, name in enumerate(names)}, unk_token=UNKNOWN)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([BOS, PAD, BEGIN_OF_IMAGE])
    return TextTokenizer(tokenizer, max_tokens)


def byte_tokenizer(max_tokens: int = MAX_TOKENS) -> TextTokenizer:
    """For random models: a token a byte. Ids: BOS 0, PAD 1, begin-of-image 2, then the 256 bytes."""
    tokenizers = _package()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = [BOS, PAD, BEGIN_OF_IMAGE, *alphabet]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({name: row for row, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([BOS, PAD, BEGIN_OF_IMAGE])
    return TextTokenizer(tokenizer, max_tokens)


def _package() -> Any:
    """The package tokenizers. Raises: InputError if it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            f"policy.family=janus: the package tokenizers cannot be imported ({error}); pip install 'varfast[text]'"
        ) from error
    return tokenizers
