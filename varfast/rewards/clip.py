"""Cosine of image and text under a CLIP model: a fixed text, or one a label.

Axes: B image, N text, D embedding.
"""

from __future__ import annotations

from torch import Tensor

from varfast.rewards.files import read_names
from varfast.types import InputError


class TextSimilarity:
    """Cosine of an image's embedding with that of the text, or of its label's text.

    Args:
        texts_ND: (N, D) of norm 1: one, or one a label.
        per_label: whether there is one a label.
    """

    def __init__(self, texts_ND: Tensor, per_label: bool) -> None:
        self._texts_ND = texts_ND
        self._per_label = per_label

    def __call__(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """(B, D) of norm 1, (B,) labels -> (B,) in [-1, 1]."""
        texts = self._texts_ND[labels_B.to(self._texts_ND.device)] if self._per_label else self._texts_ND
        return (embeddings_BD * texts).sum(dim=1)


def prompts(
    prompt: str | None, label_prompt: str | None, names: list[str] | str | None, num_classes: int | None, key: str
) -> list[str]:
    """The texts of a reward: one, or one a label.

    Args:
        prompt, label_prompt, names: as in config.ClipReward.
        num_classes: of the policy; None: not checked.
        key: of the reward in the config, for errors.
    Raises: InputError if the names cannot be read, are not one a label, or one of them is blank.
    """
    if prompt is not None:
        return [prompt]
    assert label_prompt is not None
    assert names is not None
    if isinstance(names, str):
        names = read_names(names, f"{key}.names")
    blank = [label for label, name in enumerate(names) if not name.strip()]
    if blank:
        raise InputError(f"{key}.names: the name of label {blank[0]} is blank")
    if num_classes is not None and len(names) != num_classes:
        raise InputError(f"{key}.names: got {len(names)} names, the model has {num_classes} labels; give one a label")
    return [label_prompt.replace("{name}", name.strip()) for name in names]
