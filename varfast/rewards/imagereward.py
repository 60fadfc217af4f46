"""ImageReward v1.0: how well people would rate an image for a text, by a BLIP model that reads both together.

Source: arXiv:2304.05977, https://github.com/THUDM/ImageReward (Apache-2.0); weights ImageReward.pt, hub repository
THUDM/ImageReward. What computes is in blip.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from varfast.rewards.building import Building, PerImage, Reward, Scored, on_embeddings, reads_or_fetches
from varfast.rewards.clip import Text
from varfast.settings.section import Source

if TYPE_CHECKING:
    from torch import Tensor

    from varfast.rewards.blip import Blip


class ImageRewardReward(Text):
    """ImageReward v1.0: people's rating of an image for a text, by BLIP; mean 0, standard deviation 1 on its data."""

    type: Literal["imagereward"] = Field(description="the kind of reward")
    pretrained: Source = Field(
        "hf://THUDM/ImageReward/ImageReward.pt", description="the weights: a path or hf://owner/repo/file"
    )
    vocabulary: Source = Field(
        "hf://google-bert/bert-base-uncased/vocab.txt",
        description="words of BERT's tokenizer, one a line: a path or hf://owner/repo/file",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the model; scores are float32")
    batch_size: int = Field(
        64, ge=1, le=1_000_000, description="images at a time; the smallest counts where rewards share the model"
    )

    def build(self, building: Building) -> Reward:
        from varfast.rewards.blip import Blip, BlipSpec

        texts = self.texts(building)
        spec = BlipSpec(self.pretrained, self.vocabulary, self.dtype)
        blip = building.share(spec, self.batch_size, lambda: Blip(spec, building.device, self.batch_size, building.key))
        if texts is None:

            def rating(scored: Scored) -> Tensor:
                tokens_BT, used_BT = blip.tokens_of_batch(self.of_batch(scored.batch), building.key)
                return blip.rate(scored.embeddings(blip), tokens_BT, used_BT)

            return PerImage(building, rating)
        return on_embeddings(building, blip, Rating(blip, texts, self.label_prompt is not None, building.key))

    def reaches_outside(self) -> str:
        return reads_or_fetches(self.pretrained, self.vocabulary, self.names)


class Rating:
    """Scores of images for the text, or for the text of their label.

    Args:
        blip: reads images and texts.
        texts: one, or one a label.
        per_label: whether there is one a label.
        key: of the reward in the config, for errors.
    Raises: InputError for a text of more tokens than the model was trained with.
    """

    def __init__(self, blip: Blip, texts: list[str], per_label: bool, key: str) -> None:
        self._blip = blip
        self._tokens_NT, self._used_NT = blip.tokens(texts, key)
        self._per_label = per_label

    def __call__(self, images_BPW: Tensor, labels_B: Tensor) -> Tensor:
        """What Blip.embed_images returns, (B,) labels -> (B,)."""
        rows_B = (labels_B if self._per_label else labels_B * 0).to(self._tokens_NT.device)
        return self._blip.rate(images_BPW, self._tokens_NT[rows_B], self._used_NT[rows_B])
