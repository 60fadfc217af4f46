"""The keys that choose a network of features. No PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from varfast.settings.section import Section, Source

if TYPE_CHECKING:
    import torch

    from varfast.features.networks import Network

FeaturesName = Literal["inception", "digits"]


class FeaturesSection(Section):
    """What images are described by."""

    features: FeaturesName = Field(
        "inception",
        description="inception: the 2048 of FID's network, with torch-fidelity's weights; digits: 8 x 8 grey levels",
    )
    weights: Source | None = Field(
        None, description="of the network: path, hf:// or https address; default: the public file"
    )
    batch_size: int = Field(64, ge=1, le=1_000_000, description="images at a time")

    @property
    def chosen(self) -> FeaturesSection:
        """These keys alone: sections with equal ones share a network."""
        return FeaturesSection(**{name: getattr(self, name) for name in FeaturesSection.model_fields})

    def load(self, device: torch.device, key: str) -> Network:
        """The network. key: where this section stands, for errors. Raises: InputError as the networks."""
        from varfast.features.networks import load_network

        return load_network(self.features, self.weights, device, f"{key}.weights")
