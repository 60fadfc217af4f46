"""The sampling engine: key-value cache, micro-batches, CUDA graphs, keyed randomness.

Axes: B image, L token over all scales, l token of one scale, V vocabulary, C channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from varfast import kernels
from varfast.perf.graphs import CudaGraph, GraphPool
from varfast.perf.stages import span
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR, KVCache


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. Training uses the temperature alone; the rest is for inference.

    Attributes:
        temperature: > 0.
        cfg: classifier-free guidance; scale k of K-1 is guided with t = cfg * k / (K - 1).
        top_k, top_p: filters of sample_tokens; 0 switches one off.
    """

    temperature: float = 1.0
    cfg: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    @property
    def on_policy(self) -> bool:
        """The tempered policy itself is sampled, unmixed and unfiltered."""
        return self.cfg == 0.0 and self.top_k == 0 and self.top_p in (0.0, 1.0)


class Drawn(NamedTuple):
    """Sampled images.

    Attributes:
        tokens_BL: (B, L) int64.
        logp_BL, entropy_BL: (B, L) float32.
        f_hat: (B, C, HW, HW) float32, the sum of the quantized scales, which is decoded; only with `keep`.
        var_input_BLC: (B, L - first, C) float32, the transformer's input of each scale but the first; only with `keep`.
    """

    tokens_BL: Tensor
    logp_BL: Tensor
    entropy_BL: Tensor
    f_hat: Tensor | None = None
    var_input_BLC: Tensor | None = None


class Sampler:
    """Draws tokens from a transformer.

    Fast: on a GPU, a batch size met twice in a row is captured as one CUDA graph and replayed from then on. Else every
    call runs eagerly: the path that the fast one is tested against. Both read the weights that the update reads, and
    draw the same tokens.

    Args:
        var, vqvae: on one device.
        fast: see above.
        pool: memory of the graph, shared with what never runs beside a rollout; default: its own.
    """

    def __init__(self, var: VAR, vqvae: VQVAE, fast: bool = True, pool: GraphPool | None = None) -> None:
        self.var, self._vqvae, self._fast, self._pool = var, vqvae, fast, pool
        self._graph: CudaGraph | None = None
        self._captured: tuple[int, SamplingSettings, bool] | None = None
        self._last: tuple[int, SamplingSettings, bool] | None = None

    @torch.no_grad()
    def parts(
        self,
        labels_B: Tensor,
        settings: SamplingSettings,
        seed: int,
        step: int = 0,
        first_sample: int = 0,
        micro_batch: int | None = None,
        capture: bool = True,
        keep: bool = False,
    ) -> Iterator[Drawn]:
        """Sample one image a label, `micro_batch` (default all) at a time.

        The tokens of image i are a function of the weights, its label, the settings and (seed, step, first_sample + i):
        any split into micro-batches or calls gives the same ones, up to rounding in matrix products of another size.

        Args:
            labels_B: (B,) int64 on the models' device.
            settings: how to draw.
            seed, step, first_sample: key of the randomness.
            capture: False: no CUDA graph, which would hold on to cache and activations until the next call.
            keep: yield f_hat and the transformer's input too: 120 KB an image of the public models.
        Yields: each micro-batch.
        """
        self.var.low_precision_copies()  # up to date: a replayed graph does not look
        size = micro_batch or len(labels_B)
        parts_B = labels_B.split(size)
        # Made on the device: a copy from the host would wait for all that was launched before.
        first_N = torch.arange(len(parts_B), device=labels_B.device) * size + first_sample
        keys_N3 = torch.stack([torch.full_like(first_N, seed), torch.full_like(first_N, step), first_N], dim=1)
        for key, part_B in zip(keys_N3, parts_B, strict=True):
            yield self._run(part_B, key, settings, capture, keep)

    def _run(self, labels_B: Tensor, key: Tensor, settings: SamplingSettings, capture: bool, keep: bool) -> Drawn:
        shape = (len(labels_B), settings, keep)
        met = shape in (self._captured, self._last)
        self._last = shape
        if self._fast and capture and labels_B.device.type == "cuda" and met:
            if shape != self._captured:
                self._graph = None  # its memory goes first
                self._graph = CudaGraph(
                    lambda labels, key: _made(sample(self.var, self._vqvae, labels, key, settings, keep)),
                    labels_B,
                    key,
                    pool=self._pool,
                )
                self._captured = shape
            assert self._graph is not None
            return Drawn(*self._graph(labels_B, key))
        return sample(self.var, self._vqvae, labels_B, key, settings, keep)


def _made(drawn: Drawn) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in drawn if tensor is not None)


@torch.no_grad()
def sample(
    var: VAR, vqvae: VQVAE, labels_B: Tensor, key: Tensor, settings: SamplingSettings, keep: bool = False
) -> Drawn:
    """Scale by scale, without looking at a value on the host.

    Args:
        labels_B: (B,) int64.
        key: (3,) int64 on the same device: seed, step, index of the first image.
        keep: return f_hat, with the last scale, and the transformer's input: what VQVAE.f_hat and VQVAE.var_input make
            of the tokens, bit for bit for the same images.
    """
    config, batch = var.config, labels_B.shape[0]
    guided = settings.cfg > 0.0
    if guided:  # second half: the same images without their label
        labels_B = torch.cat([labels_B, torch.full_like(labels_B, config.num_classes)])
    cache = KVCache(config, labels_B.shape[0], var.compute_dtype, labels_B.device)
    x_BlC, cond_BC = var.embed_start(labels_B)
    constants = var.constants(cond_BC)
    f_hat = vqvae.quantize.empty_f_hat(batch)
    drawn, inputs = [], [f_hat.new_zeros(batch, 0, f_hat.shape[1])]
    last = len(config.patch_nums) - 1
    for scale in range(last + 1):
        with span(f"scale {scale}"):
            logits_BlV, bias_V = var.forward_scale(x_BlC, constants, scale, cache, bias_apart=True)
            tokens_Bl, logp_Bl, entropy_Bl = kernels.sample_tokens(
                logits_BlV[:batch],
                key,
                scale,
                settings.temperature,
                uncond_logits_BlV=logits_BlV[batch:] if guided else None,
                guidance=settings.cfg * scale / max(1, last),
                top_k=settings.top_k,
                top_p=settings.top_p,
                bias_V=bias_V,
            )
            if var.strict and settings.on_policy:  # by the kernel of the update: sampling adds in another order
                logp_Bl, entropy_Bl = kernels.selective_log_softmax(
                    logits_BlV, tokens_Bl, settings.temperature, bias_V=bias_V
                )
            drawn.append((tokens_Bl, logp_Bl, entropy_Bl))
            if scale < last or keep:
                f_hat = f_hat + vqvae.quantize.contribution(drawn[-1][0], scale)
            if scale < last:
                inputs.append(vqvae.quantize.next_input(f_hat, scale + 1))
                x_BlC = var.embed_scale(inputs[-1], scale + 1)
                if guided:
                    x_BlC = x_BlC.repeat(2, 1, 1)
    tokens_BL, logp_BL, entropy_BL = (torch.cat(pieces, dim=1) for pieces in zip(*drawn, strict=True))
    drawn_BL = Drawn(tokens_BL, logp_BL, entropy_BL)
    return drawn_BL._replace(f_hat=f_hat, var_input_BLC=torch.cat(inputs, dim=1)) if keep else drawn_BL
