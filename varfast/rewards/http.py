"""Rewards from a server of the user's: images go there, numbers come back. See docs/rewards.md.

Axes: B image; H, W pixels.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from varfast.printable import printable
from varfast.rewards.building import Building, PerImage, Reward, Scored
from varfast.rewards.client import Client, ServerSection
from varfast.rewards.formats import FORMATS, Asked
from varfast.rewards.plain_pickle import NotPlain

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_LARGEST = (2.0 - 2.0**-23) * 2.0**127  # of float32


class HttpReward(ServerSection):
    """A server of yours: gets images and what they are to show, answers one number an image. See docs/rewards.md."""

    type: Literal["http"] = Field(description="the kind of reward")
    format: Literal["json", "flow_grpo", "verl_omni"] = Field(
        "json", description="of requests and answers: varfast's own, or that of the reward servers of flow_grpo or "
        "verl-omni"
    )  # fmt: skip
    field: str | None = Field(
        None,
        min_length=1,
        description="which numbers of the answer are the rewards, as strict_rewards of flow_grpo's GenEval. Default: "
        "rewards (json), outputs or else scores (flow_grpo), scores (verl_omni)",
    )
    batch_size: int = Field(64, ge=1, le=1_000_000, description="images a request")

    def build(self, building: Building) -> Reward:
        return PerImage(building, Http(self, building))


class Http:
    """One number an image, from a server.

    Args:
        config: which server, and its limits.
        building: where the reward stands in the config, for errors, and whether the run is on prompts.
    """

    def __init__(self, config: HttpReward, building: Building) -> None:
        self._format = FORMATS[config.format]
        self._client = Client(config, building.key, content_type=self._format.content_type)
        self._fields = (config.field,) if config.field else self._format.fields
        self._field, self._batch_size = config.field, config.batch_size
        self._of_prompts = building.prompts is not None

    def __call__(self, scored: Scored) -> Tensor:
        """(B,) of images (B, 3, H, W) in [0, 1].

        Raises: InputError if the server cannot be reached, is too slow, or answers anything but one finite number an
            image.
        """
        import torch

        images, batch = scored.images, scored.batch
        pixels, labels = list(to_pixels(images)), batch.labels.tolist()
        # Labels have neither.
        tags, metadata = batch.tags or [""] * len(pixels), batch.metadata or [{} for _ in pixels]
        rows = [slice(first, first + self._batch_size) for first in range(0, len(pixels), self._batch_size)]
        requests = [
            Asked(pixels[r], labels[r], batch.prompts[r], tags[r], metadata[r], self._of_prompts, self._field)
            for r in rows
        ]
        rewards = self._client.each(self._ask, requests)
        return torch.tensor([number for part in rewards for number in part], device=images.device)

    def _ask(self, asked: Asked) -> list[float]:
        return self._numbers(self._client.ask(self._format.request(asked)), len(asked.images))

    def _numbers(self, content: bytes, count: int) -> list[float]:
        want = f'want {{"{" or ".join(self._fields)}": [...]}} with {count} finite numbers, one an image'
        try:
            answer = self._format.answer(content)
        except NotPlain as error:
            raise self._client.problem(f"the server's answer is not read: {printable(error)}; {want}") from error
        except (ValueError, RecursionError) as error:
            raise self._client.problem(f"the server answered {self._client.shown(content)}; {want}") from error
        try:
            given = next(answer[field] for field in self._fields if field in answer)
            if not (isinstance(given, list) and all(type(n) in (int, float) for n in given)):
                raise TypeError
            numbers = [float(n) for n in given]
        except (TypeError, StopIteration, OverflowError) as error:
            shown = content if self._format.answer is json.loads else repr(answer)
            raise self._client.problem(f"the server answered {self._client.shown(shown)}; {want}") from error
        if len(numbers) != count:
            raise self._client.problem(f"the server answered {len(numbers)} numbers; {want}")
        bad = [i for i, number in enumerate(numbers) if not abs(number) <= _LARGEST]  # NaN is not, either
        if bad:
            much = f", more than float32 holds ({_LARGEST:.3g})" if math.isfinite(numbers[bad[0]]) else ""
            raise self._client.problem(f"the server answered {numbers[bad[0]]}{much} for image {bad[0]}; {want}")
        return numbers


def to_pixels(images: Tensor) -> np.ndarray[Any, Any]:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8 on the CPU."""
    return images.clamp(0.0, 1.0).mul(255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy()
