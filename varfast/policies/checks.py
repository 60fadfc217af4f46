"""Checks of what a policy is given, and of what it gives.

Axes: B image, L token; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.settings.section import check_labels
from varfast.types import InputError, NotFinitePolicy, Prompts, Rollout

if TYPE_CHECKING:
    from varfast.policies.driver import Driver

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a user may give as prompts: one number an image, or one text where the family is conditioned on text.
Given = Prompts | Tensor | Sequence[int] | Sequence[str]


def compute_dtype(name: str) -> torch.dtype:
    """The dtype of activations, by its name. Raises: InputError for another one than float32 and bfloat16."""
    if name not in DTYPES:
        raise InputError(f"dtype={name!r}: want one of {', '.join(DTYPES)}")
    return DTYPES[name]


def as_prompts(labels_B: Given, policy: Driver) -> Prompts:
    """Prompts on the policy's device, from what a user may give for them.

    Ids that come as a tensor on a GPU, or as Prompts there, are taken as they are: to look at them would wait for it.

    Raises: InputError for what is not one whole number in [0, num_classes), or one text, an image.
    """
    num_classes, device = policy.num_classes, policy.device
    if isinstance(labels_B, Prompts):
        labels_B = labels_B.ids_B
    if isinstance(labels_B, str):
        raise InputError(f"got the text {labels_B!r}, want one prompt an image, as [{labels_B!r}] * 8")
    if not hasattr(labels_B, "__iter__"):
        raise InputError(f"labels_B={labels_B}: want one label an image, as [{labels_B}] or [{labels_B}] * 8")
    if isinstance(labels_B, Tensor) and (labels_B.is_floating_point() or labels_B.dtype == torch.bool):
        raise InputError(f"labels_B is {labels_B.dtype}, want whole numbers, as labels_B.long()")
    if isinstance(labels_B, Tensor) and labels_B.device.type != "cpu":
        return Prompts(labels_B)
    if not isinstance(labels_B, Tensor):
        given: list[Any] = list(labels_B)
        if texts := [label for label in given if isinstance(label, str)]:
            if len(texts) < len(given):
                raise InputError("labels_B holds texts and numbers; want one or the other")
            return Prompts(torch.tensor(policy.ids_of(texts), dtype=torch.int64).to(device))
        wrong = [label for label in given if isinstance(label, bool) or not hasattr(label, "__index__")]
        if wrong:
            raise InputError(f"labels_B holds {wrong[0]!r}, want whole numbers")
        labels_B = given
    labels = torch.as_tensor(labels_B, dtype=torch.int64)
    if labels.ndim != 1:
        raise InputError(f"labels_B is {tuple(labels.shape)}, want (B,): one label an image")
    check_labels("labels_B", labels.tolist(), num_classes)
    return Prompts(labels.to(device))


def as_tokens(tokens_BL: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Tokens on the device. Raises: InputError unless they are (B, *shape)."""
    if tokens_BL.ndim != 1 + len(shape) or tuple(tokens_BL.shape[1:]) != shape:
        raise InputError(f"tokens_BL is {tuple(tokens_BL.shape)}, want (B, {', '.join(map(str, shape))})")
    return tokens_BL.to(device)


def check_images(images: Tensor) -> None:
    """Raises: InputError for images that are whole numbers, or numbers outside [0, 1]."""
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}, want floats in [0, 1]; of bytes: images / 255")
    low, high = (float(bound) for bound in torch.aminmax(images)) if images.numel() else (0.0, 1.0)
    if not (low >= 0.0 and high <= 1.0):  # false for NaN too
        raise InputError(f"images hold numbers from {low:.4g} to {high:.4g}, want [0, 1]: {_to_unit(low, high)}")


def _to_unit(low: float, high: float) -> str:
    if low >= 0.0 and 1.0 < high <= 255.0:
        return "images / 255, if they are levels"
    if low >= -1.0 and high <= 1.0:
        return "(images + 1) / 2, if they are in [-1, 1]"
    return "clamp(0, 1) what sharpening or resizing left outside"


def check_weights(tensors: dict[str, Tensor]) -> None:
    """Raises: NotFinitePolicy if a weight is NaN or infinite."""
    # A sum is finite only if all of its terms are. It may overflow where they are: then, and only then, look at each.
    if bool(torch.stack([t.sum(dtype=torch.float32) for t in tensors.values()]).isfinite().all()):
        return
    wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise NotFinitePolicy(
            f"{len(wrong)} of {len(tensors)} weights hold NaN or infinite numbers, the first is {wrong[0]}"
        )


def check_finite(rollout: Rollout | None, images: Tensor | None = None) -> None:
    """Whether tokens were sampled from distributions and images consist of numbers. Waits for the device, once.

    The sampler gives NaN as the log-probability of a token whose logits hold NaN or infinity (kernels.sample_tokens).

    Raises: NotFinitePolicy, an InputError, if not.
    """
    flags = [] if rollout is None else [rollout.logp_BL.isnan().any()]
    if images is not None and len(images):
        flags.append(images.amax().isnan())  # NaN is its own maximum
    if not flags or not bool(torch.stack(flags).any()):
        return
    if rollout is not None and bool((wrong_BL := rollout.logp_BL.isnan()).any()):
        wrong_B = wrong_BL.any(dim=1)
        token = int(wrong_BL[wrong_B].int().argmax(dim=1).min())
        raise NotFinitePolicy(
            f"the transformer's logits hold NaN or infinite numbers in {int(wrong_B.sum())} of {len(wrong_B)} images, "
            f"from token {token} on, at temperature {rollout.temperature:g}: it has diverged, or its numbers are too "
            "large for this dtype or temperature"
        )
    assert images is not None
    wrong = int(images.isnan().flatten(1).any(dim=1).sum())
    raise NotFinitePolicy(
        f"the VQ-VAE's decoder gives NaN or infinite numbers in {wrong} of {len(images)} images: its weights are "
        "damaged, or too large for this dtype"
    )
