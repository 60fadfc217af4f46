"""VQAScore: the probability that a model which answers questions about images says yes to "does it show this text?".

The package t2v-metrics computes it, with its models: clip-flant5-xl and clip-flant5-xxl up to its version 2.1, models
of Qwen, Gemma and others from 3.1 on. It is imported when such a reward is built, and it fetches the model's weights
from the hub itself.

Source: arXiv:2404.01291, https://github.com/linzhiqiu/t2v_metrics.

Axes: B image.
"""

from __future__ import annotations

import importlib
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from varfast.printable import printable
from varfast.rewards.building import Building, PerImage, Reward, RewardSection, Scored
from varfast.rewards.http import to_pixels
from varfast.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

_PROMPT = "{prompt}"


class VQAScoreReward(RewardSection):
    """Probability that a model of t2v-metrics answers yes to whether an image shows its prompt; 0 to 1."""

    type: Literal["vqascore"] = Field(description="the kind of reward")
    model: str = Field(
        "clip-flant5-xl", min_length=1, description="a name of t2v_metrics.list_all_models(), such as qwen2.5-vl-7b"
    )
    text: str = Field(
        _PROMPT, description="what the model is asked for; {prompt} stands for the prompt, or the label's name"
    )
    batch_size: int = Field(16, ge=1, le=1_000_000, description="images at a time")

    @field_validator("text")
    @classmethod
    def _holds_the_prompt(cls, text: str) -> str:
        if _PROMPT not in text:
            raise ValueError(f"got {text!r}, which has no {_PROMPT}; as in 'a photo of a {_PROMPT}'")
        return text

    def build(self, building: Building) -> Reward:
        return PerImage(building, VQAScore(self, building))

    def reaches_outside(self) -> str:
        return f"runs t2v-metrics, which fetches {self.model}"


class VQAScore:
    """Scores of images for their prompts. What the package changes of the process is put back (rewards/shield.py).

    Args:
        config: of the reward.
        building: where it stands.
    Raises: InputError if the package cannot be imported, or has no such model.
    """

    def __init__(self, config: VQAScoreReward, building: Building) -> None:
        from varfast.randomness import Purpose
        from varfast.rewards.shield import shielded

        self._config, self._name, self._device = config, building.name, building.device
        self._key = (building.seed, int(Purpose.REWARD), zlib.crc32(building.name.encode("utf-8", "replace")))
        with shielded(self._name, self._device, self._key):
            package = _package(building.key)
            known = package.list_all_models()
            if config.model not in known:
                raise InputError(
                    f"{building.key}.model={printable(config.model)}: this version of t2v-metrics has no such model; "
                    f"it has {printable(', '.join(known), 2000)}"
                )
            self._scorer = package.VQAScore(model=config.model, device=str(self._device))

    def __call__(self, scored: Scored) -> Tensor:
        """(B,) probabilities."""
        import torch

        from varfast.rewards.shield import shielded

        texts = [self._config.text.replace(_PROMPT, prompt) for prompt in scored.batch.prompts]
        step = scored.batch.step
        key = (*self._key, *((0, 0) if step is None else (1, step)), scored.first_sample)
        with shielded(self._name, self._device, key), tempfile.TemporaryDirectory(prefix="varfast_vqascore_") as folder:
            paths = _saved(scored.images, Path(folder))
            rows = range(0, len(paths), self._config.batch_size)
            # The scorer itself compares all images with all texts; the model behind it takes pairs.
            found = [
                self._scorer.model.forward(paths[i : i + rows.step], texts[i : i + rows.step]).flatten() for i in rows
            ]
        return torch.cat(found)


def _package(key: str) -> Any:
    try:
        return importlib.import_module("t2v_metrics")
    except ImportError as error:
        missing = "" if error.name == "t2v_metrics" else f" ({printable(error)})"
        raise InputError(
            f"{key}: VQAScore is computed by t2v-metrics, which cannot be imported{missing}; pip install t2v-metrics"
        ) from error
    except RuntimeError as error:  # it looks for ffmpeg when it is imported
        raise InputError(f"{key}: t2v-metrics cannot be used: {printable(error)}") from error


def _saved(images: Tensor, folder: Path) -> list[str]:
    """Paths of PNGs of (B, 3, H, W) images in [0, 1]: the package's models read files."""
    from PIL import Image

    pixels = to_pixels(images)
    paths = [str(folder / f"{row:06d}.png") for row in range(len(pixels))]
    for path, picture in zip(paths, pixels, strict=True):
        Image.fromarray(picture).save(path, compress_level=1)
    return paths
