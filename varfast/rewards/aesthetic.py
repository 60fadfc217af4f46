"""LAION aesthetic predictor V2: five linear layers on an embedding of OpenAI's CLIP ViT-L/14.

Axes: B image, D = 768 embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from varfast.rewards.building import Building, Reward, on_embeddings, reads_or_fetches
from varfast.rewards.clip import ClipModel
from varfast.rewards.files import fetch, file_name
from varfast.settings.section import Source
from varfast.types import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLIP_MODEL = "ViT-L-14-quickgelu"
PUBLIC_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
PUBLIC_HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


class AestheticReward(ClipModel):
    """LAION aesthetic predictor V2: linear layers on the embedding of OpenAI's CLIP ViT-L/14; about 1 to 10."""

    type: Literal["aesthetic"] = Field(description="the kind of reward")
    head: Source = Field(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        description="weights of the layers: a path, hf://owner/repo/file or https address; the default is the public "
        "file, and a file of its name must have its SHA-256",
    )
    pretrained: Source = Field(
        "openai", description="weights of ViT-L-14: open_clip's tag, or a path or hf:// address of the same weights"
    )

    @property
    def network(self) -> tuple[str, str]:
        return CLIP_MODEL.removesuffix("-quickgelu"), self.pretrained

    def build(self, building: Building) -> Reward:
        from varfast.rewards.backbone import backbone_spec, shared_backbone

        head = Aesthetic(self.head, building.device, f"{building.key}.head")
        spec = backbone_spec(CLIP_MODEL, self.pretrained, self.dtype, building.key)
        return on_embeddings(building, shared_backbone(building, spec, self.batch_size), head)

    def reaches_outside(self) -> str:
        return reads_or_fetches(self.pretrained, self.head)


class Aesthetic:
    """Scores, about 1 to 10, of embeddings.

    Args:
        head: weights of the layers, as AestheticReward.head.
        device: where the embeddings are.
        key: where the head stands in the config, for errors.
    Raises: InputError if the file cannot be had, is not the public one though it has its name, or holds other layers.
    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0).
    """

    def __init__(self, head: str, device: torch.device | str, key: str) -> None:
        from torch import nn

        from varfast.weights.containers import read_checkpoint

        path = fetch(head, key, PUBLIC_HEAD_SHA256 if file_name(head) == PUBLIC_HEAD else "")
        state = read_checkpoint(path)
        # No activations between the layers. The dropout is the identity outside of the head's own training; it is here
        # for the numbers in the names of the weights.
        self._layers = nn.Sequential(
            nn.Linear(768, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
        try:
            self._layers.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in state.items()})
        except (RuntimeError, AttributeError) as error:
            raise InputError(f"{key}: {path} does not hold the layers 768-1024-128-64-16-1 of {PUBLIC_HEAD}: {error}"
                             ) from error  # fmt: skip
        self._layers.eval().requires_grad_(False).to(device)

    def __call__(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """(B, 768) of norm 1 -> (B,)."""
        return self._layers(embeddings_BD).squeeze(1)
