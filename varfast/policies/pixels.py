"""From latents to images: parts that fit the libraries' limits, a CUDA graph, and the range of the pixels.

Axes: B image; H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from varfast.perf.graphs import CudaGraph
from varfast.perf.stages import stage
from varfast.policies.config import DECODE_GRAPH_IMAGES

# (B, ...) latents -> (B, 3, H, W) in [-1, 1], not clamped; without gradient.
Decode = Callable[[Tensor], Tensor]


class Pixels:
    """A family's decoder, run in parts. On a GPU a batch size that is met twice in a row is captured and replayed.

    most_images: at a time.
    """

    def __init__(self, most_images: int) -> None:
        self._most_images = most_images
        self._graph: tuple[int, CudaGraph] | None = None  # and the number of images that it decodes
        self._last = 0
        self._stream: torch.cuda.Stream | None = None

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream that decodes beside the rollout on a GPU: one for all steps, as the allocator keeps memory by
        stream."""
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    @torch.no_grad()
    def write(
        self, decode: Decode, latent: Tensor, images: Tensor, micro_batch: int | None = None, capture: bool = False
    ) -> None:
        """Write the images of latents into `images`, (B, 3, H, W) float32: in [0, 1], or NaN.

        Args:
            decode: of the family; the same at every call.
            micro_batch: images at a time; default: as many as the limit allows.
            capture: whether a CUDA graph may be made.
        """
        size = min(micro_batch or self._most_images, self._most_images)
        if capture:
            size = min(size, DECODE_GRAPH_IMAGES)
        half = torch.full((1,), 0.5, device=images.device)
        with stage("decode"):
            for part, out in zip(latent.split(size), images.split(size), strict=True):
                # x / 2 + 1 / 2, in float32, as the copy into place: two passes over the pixels instead of six. Folded
                # into the last convolution it would cost a bit: bfloat16 has 128 steps from 0.5 to 1.
                torch.add(half, self._part(decode, part, capture), alpha=0.5, out=out)
                # Infinity becomes NaN, for check_finite: clamped it would be white. A pass of 0.3 ms for 512 images of
                # 256 pixels at 3 TB/s.
                out.nan_to_num_(nan=math.nan, posinf=math.nan, neginf=math.nan).clamp_(0.0, 1.0)

    def _part(self, decode: Decode, latent: Tensor, capture: bool) -> Tensor:
        batch, captured, last = len(latent), self._graph[0] if self._graph else 0, self._last
        self._last = batch
        if not capture or batch not in (captured, last):
            return decode(latent)
        if self._graph is None or batch != captured:
            self._graph = None  # its memory goes first
            self._graph = batch, CudaGraph(lambda latent: (decode(latent),), latent)
        (images,) = self._graph[1](latent)
        return images


@contextmanager
def after_this_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Inside, work goes to `stream`, after all that the current one was given."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
