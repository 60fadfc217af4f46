"""The reward of LOO-FID as a run uses it: features, a distance, and the moments that it keeps from step to step.

Axes: B image; D feature.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varfast.features.embedders import ClipFeatures
from varfast.features.networks import Network, features_of
from varfast.rewards.building import Building, Scored
from varfast.rewards.moments import Distance, FullDistance, Moments
from varfast.types import InputError, NotFiniteReward


class LeaveOneOut:
    """A SetReward: an image earns what the distance of the policy's images to real ones would be more without it.

    The state is the moments of the policy's images, in float64, and the number of images of the base that they began
    with.

    Args:
        building: where it stands.
        network: computes the features.
        distance: to the real images.
        ema: share of the earlier steps in the moments after a step.
        begin_images: of the base.
        batch_size: images that the network gets at a time.
    """

    def __init__(
        self, building: Building, network: Network, distance: Distance, ema: float, begin_images: int, batch_size: int
    ) -> None:
        self._building, self._network, self._distance = building, network, distance
        self._ema, self._begin_images, self._batch_size = ema, begin_images, batch_size
        empty = distance.moments(torch.zeros(1, network.width, dtype=torch.float64, device=building.device))
        self._state = {
            "first": empty.first_D,
            "second": empty.second,
            "begun_with": torch.zeros((), dtype=torch.int64, device=building.device),
        }
        self._scored: tuple[Tensor, Moments, Tensor] | None = None

    def measure(self, scored: Scored) -> Tensor:
        """(B, D) float64 features."""
        if isinstance(self._network, ClipFeatures):
            features_BD = scored.embeddings(self._network.backbone).double()  # computed once for all rewards on it
        else:
            features_BD = features_of(self._network, scored.images, self._batch_size).double()
        bad = (~features_BD.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise NotFiniteReward(
                f"reward {self._building.name}: the {self._network.name} features of image {bad[0]} are not finite "
                f"({len(bad)} of {len(features_BD)} images); their network overflows, or its weights are damaged"
            )
        return features_BD.to(self._building.device)

    def score(self, measured: Tensor) -> Tensor:
        assert self._state["begun_with"] > 0, "the reward has not begun"
        step = self._distance.moments(measured)
        after = Moments(self._state["first"], self._state["second"]).towards(step, 1.0 - self._ema)
        scores_B, distance = self._distance.without_each(after, step, measured, 1.0 - self._ema)
        self._scored = (measured, after, distance)
        return scores_B.float()

    def learn(self, measured: Tensor) -> Mapping[str, Tensor]:
        """Returns: the distance after the step."""
        if self._scored is None or self._scored[0] is not measured:
            self.score(measured)
        assert self._scored is not None
        _, after, distance = self._scored
        self._set(after)
        self._scored = None
        return {"distance": distance}

    def state(self) -> dict[str, Tensor]:
        return self._state

    def base_images(self, images: int) -> int:
        key, ema, width = self._building.key, self._ema, self._network.width
        if images < 2:
            raise InputError(f"{key}: a step of {images} image; the distance without it needs another one")
        if isinstance(self._distance, FullDistance):
            # The weights of earlier steps fall as ema^k, so that as many images are averaged as in a plain mean of
            # images * (1 + ema) / (1 - ema).
            held = int(images * (1.0 + ema) / (1.0 - ema))
            for count, what, advice in (
                (self._begin_images, f"{key}.begin_images={self._begin_images}", f"{width + 1} or more"),
                (held, f"steps of {images} images, averaged with {key}.ema={ema:g} as if they were {held},",
                 "raise ema, or rollout.labels_per_step, or rollout.group_size"),
            ):  # fmt: skip
                if count <= width:
                    raise InputError(
                        f"{what} are too few images for the covariance of {width} features, which needs more than "
                        f"{width}; {advice}; or use {key}.covariance=diagonal"
                    )
        return self._begin_images

    def begin(self, measured: Tensor) -> None:
        self._set(self._distance.moments(measured[: self._begin_images]))
        self._state["begun_with"].fill_(min(self._begin_images, len(measured)))

    def _set(self, moments: Moments) -> None:
        self._state["first"].copy_(moments.first_D)
        self._state["second"].copy_(moments.second)
