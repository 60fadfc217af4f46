"""What the trainings of all families' base models share: batches, the learning rate, an optimizer step.

Axes: B image; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from varfast.config import Config
from varfast.data.datasets import Images
from varfast.optim.schedule import scheduled
from varfast.types import InputError

_GRAD_CLIP = 1.0
# After so many batches, codes that none of them used are moved to where the data is.
REVIVE_EVERY = 25
# Steps between lines of progress without a terminal; a step of the digits' base takes 20 to 100 ms on a CPU.
LINE_EVERY = 100


def batches(dataset: Images, config: Config, steps: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """`steps` shuffled batches, over as many passes as that takes.

    Labels, or rows of captions, are the last tensor of each.
    """
    loader = DataLoader(
        _Answers(dataset),
        collate_fn=_collated,
        batch_size=config.pretrain.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.pretrain.num_workers,
        generator=torch.Generator().manual_seed(config.run.seed),
    )
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            if isinstance(batch, InputError):
                raise batch
            largest = int(batch[-1].max())
            if config.policy.conditioned_on == "labels" and largest >= config.policy.num_classes:
                raise InputError(
                    f"{config.pretrain.dataset} has label {largest}, but {config.policy.sizes_key}.num_classes="
                    f"{config.policy.num_classes}; raise it"
                )
            yield tuple(tensor.to(device) for tensor in batch)
            done += 1


class _Answers(Dataset[Any]):
    """A data set that returns errors as items, since a DataLoader worker would put its traceback into their message."""

    def __init__(self, dataset: Images) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except InputError as error:
            return error


def _collated(items: list[Any]) -> Any:
    error = next((item for item in items if isinstance(item, InputError)), None)
    return default_collate(items) if error is None else error


def pixels(images: Tensor) -> Tensor:
    """Images in [0, 1] to [-1, 1], as the VQ-VAE takes them."""
    return images.mul(2.0).sub(1.0)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth of the steps, then a cosine down to a hundredth of the peak."""
    return scheduled(peak, step, steps, max(1, steps // 20), "cosine", floor=0.01)


def optimizer_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _GRAD_CLIP, foreach=True)
    optimizer.step()


def variance(images: Tensor) -> float:
    """Mean square of pixels (B, 3, H, W) around the mean colour of the batch."""
    return float((images - images.mean(dim=(0, 2, 3), keepdim=True)).square().mean())
