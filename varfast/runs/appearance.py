"""Numbers of what a policy's pictures look like, from which its drift away from the base can be seen.

A reward that is hacked shows here before anybody looks: pictures become all bright, all alike, or noise, while the
reward rises. Measured on the sample grids, which have the same prompts and random numbers at every step.

Axes: N image, R row of the grid, C column of it; H, W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from varfast.config import Config
from varfast.data.captions import WORLDS
from varfast.data.datasets import DigitsClassifier
from varfast.data.prompts import PromptSet
from varfast.rewards import WeightedSum
from varfast.rewards.composition import CompositionReward

# Rec. 601, as `varfast.rewards.brightness`.
_LUMA = (0.299, 0.587, 0.114)
_DARK, _BRIGHT = 0.05, 0.95
_LEVELS = 4  # of each colour channel, of the histogram of colours

# From (N, 3, H, W) images and their (N,) labels, or rows of the table of prompts, to (N,): 1 where one is read as it.
_Reader = Callable[[Tensor, Tensor], Tensor]


class Looks:
    """What the pictures of a run's grids look like: `appearance`, and label_accuracy where the run has what reads it.

    label_accuracy is the share of the images that are read as their label, or that show what their prompt asks: by
    eval.classifier, by a reward that is a classifier, or, of the worlds of varfast/data/captions.py (digits from text,
    shapes from text or by label), by the reader of their scenes. Nothing is fetched for it.

    Args:
        config, rewards, prompts: of the run.
        names: of the labels; None: they have none, or there are prompts.
    """

    def __init__(
        self, config: Config, rewards: WeightedSum, prompts: PromptSet | None, names: Sequence[str] | None = None
    ) -> None:
        self._of_run = config, rewards, prompts, names

    @functools.cached_property
    def _reader(self) -> _Reader | None:
        return _reader(*self._of_run)

    @torch.no_grad()
    def __call__(self, images: Tensor, labels_N: Tensor, columns: int) -> dict[str, float]:
        """Of (N, 3, H, W) images in [0, 1] of these labels, `columns` in a row: numbers by name."""
        found = appearance(images, columns)
        if self._reader is not None:
            found["label_accuracy"] = float(self._reader(images, labels_N).double().mean())
        return found


def _reader(
    config: Config, rewards: WeightedSum, prompts: PromptSet | None, names: Sequence[str] | None
) -> _Reader | None:
    if prompts is None and config.eval.classifier == "digits":
        ranks = DigitsClassifier().ranks
        return lambda images, labels_N: ranks(images, labels_N) < 1
    if (of_rewards := rewards.ranks) is not None:
        return lambda images, labels_N: of_rewards(images, labels_N) < 1
    world = WORLDS.get(config.pretrain.dataset if config.prompts is None else config.prompts.source)
    if world is None or (prompts is None and not set(names or [""]) <= set(world.labels)):
        return None
    scenes = {"shown": CompositionReward(type="composition", scenes=world.name)}  # type: ignore[arg-type]
    shown = WeightedSum(scenes, names=names, prompts=prompts)
    return lambda images, rows_N: shown(images, rows_N).total_B


@torch.no_grad()
def appearance(images: Tensor, columns: int) -> dict[str, float]:
    """What (N, 3, H, W) images in [0, 1] look like; N = R rows of `columns` samples of one prompt each.

    Returns:
        brightness: mean luma.
        dark, bright: share of the pixels whose luma is below 0.05, above 0.95.
        colour: mean of the largest minus the smallest channel of a pixel; 0: grey.
        edges: mean absolute difference of luma between neighbours, to the right and below.
        colour_entropy: bits of the histogram of the colours of all pixels, of 4 x 4 x 4 bins; 6 at most.
        diversity: root mean square of pixels' distance from the mean of their row; 0: the samples of each are alike.
    """
    images = images.detach().float()
    luma_NHW = (images * images.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(dim=1)
    bins = (images * _LEVELS).long().clamp(0, _LEVELS - 1)
    counts = torch.bincount((bins[:, 0] * _LEVELS + bins[:, 1]).mul(_LEVELS).add(bins[:, 2]).flatten())
    share = counts[counts > 0].double() / counts.sum()
    differences = [luma_NHW.diff(dim=axis).abs() for axis in (1, 2)]
    edges = sum(float(d.sum()) for d in differences) / max(1, sum(d.numel() for d in differences))
    rows_RC = images.view(-1, columns, *images.shape[1:])
    return {
        "brightness": float(luma_NHW.mean()),
        "dark": float((luma_NHW < _DARK).float().mean()),
        "bright": float((luma_NHW > _BRIGHT).float().mean()),
        "colour": float((images.amax(dim=1) - images.amin(dim=1)).mean()),
        "edges": edges,
        "colour_entropy": float(-(share * share.log2()).sum()),
        "diversity": float((rows_RC - rows_RC.mean(dim=1, keepdim=True)).square().mean().sqrt()),
    }
