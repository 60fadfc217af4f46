"""The part of sampling that is the same for all families: micro-batches, keys, a CUDA graph.

Axes: B image, L token, N micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from varfast.randomness import Key
from varfast.types import Prompts, Sampling


class Sampled(NamedTuple):
    """Sampled images.

    Attributes:
        tokens_BL: (B, L) int64.
        logp_BL, entropy_BL: (B, L) float32.
        latent: (B, ...), what the decoder reads; only with `keep`. For VAR (B, C, HW, HW) float32, the sum of the
            quantized scales.
        teacher_input: (B, ...), what `teacher_input` makes of the tokens; only with `keep`. For VAR (B, L - first, C)
            float32.
    """

    tokens_BL: Tensor
    logp_BL: Tensor
    entropy_BL: Tensor
    latent: Tensor | None = None
    teacher_input: Tensor | None = None


# Samples one micro-batch, of prompts, key, how and keep: see Driver._sample_batch.
SampleBatch = Callable[[Prompts, Tensor, Sampling, bool], Sampled]
# The same as CUDA graphs for one number of images, of ids and key: see Driver._capture_batch.
Captured = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
CaptureBatch = Callable[[Prompts, Tensor, Sampling, bool], Captured]


class Sampler:
    """Samples a batch in parts.

    Fast: on a GPU, a batch size met twice in a row is captured as CUDA graphs and replayed from then on. Else every
    call runs eagerly: the path that the fast one is tested against. Both read the weights that the update reads, and
    sample the same tokens.

    Args:
        fast: see above.
    """

    def __init__(self, fast: bool = True) -> None:
        self._fast = fast
        self._graph: Captured | None = None
        self._captured: tuple[int, Sampling, bool] | None = None
        self._last: tuple[int, Sampling, bool] | None = None

    @torch.no_grad()
    def parts(
        self,
        sample_batch: SampleBatch,
        prompts: Prompts,
        how: Sampling,
        key: Key,
        micro_batch: int | None = None,
        capture: CaptureBatch | None = None,
        keep: bool = False,
    ) -> Iterator[Sampled]:
        """Sample one image a prompt, `micro_batch` (default all) at a time.

        The tokens of image i are a function of the weights, its prompt, `how` and (seed, step, first_sample + i): any
        split into micro-batches or calls gives the same ones, up to rounding in matrix products of another size.

        Args:
            sample_batch: of the family; the same at every call.
            prompts: on the model's device.
            capture: of the family; None: no CUDA graph, which would hold on to cache and activations until the next
                call.
            keep: yield latent and teacher_input too: 120 KB an image of the public VAR models.
        Yields: each micro-batch.
        """
        size = micro_batch or len(prompts)
        parts = [prompts.rows(slice(first, first + size)) for first in range(0, len(prompts), size)]
        # Made on the device: a copy from the host would wait for all that was launched before.
        first_N = torch.arange(len(parts), device=prompts.ids_B.device) * size + key.first_sample
        keys_N3 = torch.stack([torch.full_like(first_N, key.seed), torch.full_like(first_N, key.step), first_N], dim=1)
        for key_3, part in zip(keys_N3, parts, strict=True):
            yield self._run(sample_batch, part, key_3, how, capture, keep)

    def _run(
        self,
        sample_batch: SampleBatch,
        prompts: Prompts,
        key_3: Tensor,
        how: Sampling,
        capture: CaptureBatch | None,
        keep: bool,
    ) -> Sampled:
        shape = (len(prompts), how, keep)
        met = shape in (self._captured, self._last)
        self._last = shape
        if not (self._fast and capture is not None and prompts.ids_B.device.type == "cuda" and met):
            return sample_batch(prompts, key_3, how, keep)
        if shape != self._captured:
            self._graph = None  # its memory goes first
            self._graph = capture(prompts, key_3, how, keep)
            self._captured = shape
        assert self._graph is not None
        return Sampled(*self._graph(prompts.ids_B, key_3))
