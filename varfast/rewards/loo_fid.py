"""LOO-FID: what each image of a step does to the distance of the policy's images to real ones.

The policy's images are known by moving averages of the moments of their features, which begin with samples of the base.
An image earns what the distance would be more without it: moments.py.

Axes: B image; D feature.
Source: arXiv:2603.23086.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from varfast.features.config import FeaturesSection
from varfast.rewards.building import Building, RewardSection, SetReward, reads_or_fetches
from varfast.settings.section import LocalPath, Source
from varfast.types import InputError, Normalise


class LooFidReward(RewardSection, FeaturesSection):
    """How much farther from real images the policy's would be, as a set, without this image."""

    of_sets: ClassVar[bool] = True

    type: Literal["loo_fid"] = Field(description="the kind of reward")
    reference: Source = Field(
        description="the real images: a folder, 'digits', or an .npz with mu and sigma (python -m varfast.statistics "
        "makes one; pytorch-fid's and ADM's will do), or with arr_0, uint8 (N, H, W, 3)"
    )
    covariance: Literal["diagonal", "full"] = Field(
        "diagonal",
        description="of the distance: the authors', of the standard deviation of each feature; or FID's, of the whole "
        "covariance",
    )
    ema: float = Field(
        0.5, ge=0, lt=1, description="share of the earlier steps in the moments of the policy's images after a step"
    )
    begin_images: int = Field(
        5000, ge=2, le=10_000_000, description="images of the base, sampled before step 0, that the moments begin with"
    )
    normalise: Normalise | None = Field(
        "batch",
        description="advantages of this reward by itself, which are added to those of the others: normalised within "
        "each group, or over the whole step; none: its raw numbers; null: together with the others, as grpo.combine "
        "says",
    )
    cache_dir: LocalPath = Field(
        "~/.cache/varfast", description="statistics of a folder are kept here, in statistics/, by a hash of its content"
    )

    def check_step(self, key: str, labels_per_step: int, labels: int) -> None:
        if labels_per_step == 1 and labels > 1:
            raise ValueError(
                f"{key} with rollout.labels_per_step=1: all images of a step are of one label, and the real ones of "
                f"{labels}, so that it would score labels, not images; raise rollout.labels_per_step, to 16 or more"
            )

    def build(self, building: Building) -> SetReward:
        import torch

        from varfast.features.reference import reference_statistics
        from varfast.rewards.leave_one_out import LeaveOneOut
        from varfast.rewards.moments import DiagonalDistance, Distance, FullDistance

        key, device = building.key, building.device
        network = building.network(self)
        cache = Path(self.cache_dir).expanduser() / "statistics"
        image_size = building.image_size or 256
        found = reference_statistics(self.reference, network, image_size, f"{key}.reference", cache, self.batch_size)
        mu_D, sigma_DD = (torch.from_numpy(array).to(device) for array in (found.mu_D, found.sigma_DD))
        distance: Distance
        if self.covariance == "full":
            if found.count is not None and found.count <= network.width:
                raise InputError(
                    f"{key}.reference={self.reference}: {found.count} images are too few for the covariance of "
                    f"{network.width} features, which needs more than {network.width}; give more images, or use "
                    f"{key}.covariance=diagonal"
                )
            distance = FullDistance(mu_D, sigma_DD)
        else:
            distance = DiagonalDistance(mu_D, sigma_DD.diagonal())
        return LeaveOneOut(building, network, distance, self.ema, self.begin_images, self.batch_size)

    def reaches_outside(self) -> str | None:
        sources = [self.loads(), None if self.reference == "digits" else self.reference]
        return reads_or_fetches(*sources) if any(sources) else None
