"""CLIP models of open_clip and DINO models of timm as networks of features.

Axes: B image, D feature. Levels are uint8 (B, 3, H, W).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from varfast.features.names import content_name
from varfast.rewards.backbone import Backbone, BackboneSpec, import_open_clip
from varfast.rewards.files import fetch
from varfast.rewards.preprocess import Preprocessing
from varfast.types import InputError
from varfast.weights.containers import read_checkpoint
from varfast.weights.hub import one_line

# FD-DINOv2 is of images of this side (arXiv:2306.04675), not of the 518 pixels that these models were trained on last.
_DINOV2_SIDE = 224


class ClipFeatures:
    """The image embedding of a CLIP, of norm 1: what the clip reward reads, so that both share one pass.

    Attributes:
        backbone: the model.
    """

    def __init__(self, backbone: Backbone, spec: BackboneSpec) -> None:
        self.backbone = backbone
        self.name = clip_name(spec)
        black = torch.zeros(1, 3, 8, 8)
        self.width = backbone.embed_images(black).shape[1]

    def features(self, levels: Tensor) -> Tensor:
        return self.backbone.embed_images(levels.float() / 255.0)

    def __call__(self, levels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, 3, H, W) uint8 -> features (B, D) float32, and no logits."""
        return self.features(levels).cpu().numpy(), None


def clip_name(spec: BackboneSpec) -> str:
    """Identifies the features: by model and tag, or the content of a file."""
    path = Path(spec.pretrained).expanduser()
    is_tag = bool(import_open_clip().get_pretrained_cfg(spec.model, spec.pretrained))
    weights = content_name(path) if not is_tag and path.is_file() else spec.pretrained
    return f"clip {spec.model}{'-quickgelu' if spec.quick_gelu else ''} {weights}"


class DinoFeatures:
    """The class token, or what else a model of timm without its head returns, as DINO's.

    Args:
        model: a name of timm.list_models(); those of DINOv2 get images of 224 pixels, others of the size they name.
        weights: path, hf:// or https address; None: timm's of that name, from the hub.
        device: where it runs.
        dtype: of weights and activations.
        key: where they stand in the config, for errors.
    Raises: InputError for a name that timm does not have, and for weights that cannot be had or do not fit.
    """

    def __init__(
        self,
        model: str,
        weights: str | None,
        device: torch.device,
        dtype: Literal["float32", "bfloat16"],
        key: str,
    ) -> None:
        try:
            import timm
            from timm.data.config import resolve_data_config
        except ImportError as error:
            raise InputError(f"{key}: these features need timm; pip install timm ({error})") from error
        if not timm.is_model(model):
            raise InputError(f"{key}.model={model}: timm has no such model; timm.list_models('*dino*') names some")
        sized: dict[str, Any] = {"img_size": _DINOV2_SIDE} if "dinov2" in model else {}
        entry: Any = timm.create_model(model, pretrained=False, num_classes=0, **sized).pretrained_cfg
        if weights is None and not entry.get("hf_hub_id"):
            raise InputError(f"{key}.model={model}: timm has no weights of that name; set {key}.pretrained to a file")
        address = weights or f"hf://{entry['hf_hub_id']}/model.safetensors"
        path = fetch(address, f"{key}.pretrained")
        held = read_checkpoint(path)  # refuses pickles with code
        try:
            network: Any = timm.create_model(
                model, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=0, **sized
            )
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{key}.pretrained={address} does not hold the weights of timm's {model}: {one_line(str(error), 300)}"
            ) from error
        # timm takes what fits by name, and leaves the rest at random.
        missing = [name for name in network.state_dict() if name not in held]
        if missing:
            raise InputError(
                f"{key}.pretrained={address} does not hold the weights of timm's {model}: {missing[0]} is missing, one "
                f"of {len(missing)}"
            )
        self.name = f"dino {model}" + ("" if weights is None else f" {content_name(path)}")
        self.width = int(network.num_features)
        self._dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self._network: Any = network.eval().requires_grad_(False).to(device, self._dtype)
        self._device = device
        settings = resolve_data_config(network.pretrained_cfg)
        side = _DINOV2_SIDE if sized else int(settings["input_size"][1])
        self._preprocess = Preprocessing(
            int(side / settings["crop_pct"]),
            side,
            "shortest",
            settings["interpolation"],
            tuple(settings["mean"]),
            tuple(settings["std"]),
        )

    @torch.no_grad()
    def features(self, levels: Tensor) -> Tensor:
        images = self._preprocess(levels.to(self._device).float() / 255.0)
        features_BD: Tensor = self._network(images.to(self._dtype)).float()
        return features_BD

    def __call__(self, levels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, 3, H, W) uint8 -> features (B, D) float32, and no logits."""
        return self.features(levels).cpu().numpy(), None
