"""AdamW over all tensors of a model in two kernel launches. It updates the weights, both moments, and the low-precision
(16-bit) copies of the weights that the matrix products read.

The step moves 30 bytes per parameter: it reads weight, gradient and both moments, and writes weight, moments and copy.
PyTorch's fused AdamW moves 28, and the separate pass that then writes the copies 6 more.

Axes: P parameter tensors, N chunks of these tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw as torch_adamw

from varfast.kernels import reference
from varfast.kernels._triton import jit, tl
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, run
from varfast.kernels.settings import setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime


@dataclass(frozen=True)
class AdamWTensors:
    """What an optimizer step reads and writes: lists with one entry for each parameter.

    Attributes:
        parameters, gradients, exp_avgs, exp_avg_sqs: float32, contiguous, of one shape for each parameter.
        steps: () float32, steps taken so far.
        weight_decays: decoupled weight decay.
        copies: bfloat16 or float16 copy of the parameter, rewritten after the step, or None.
    """

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    weight_decays: Sequence[float]
    copies: Sequence[Tensor | None]

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def written(self) -> list[Tensor]:
        """All tensors that a step changes."""
        copies = [copy for copy in self.copies if copy is not None]
        return [*self.parameters, *self.exp_avgs, *self.exp_avg_sqs, *self.steps, *copies]


# ---------------------------------------------------------------------------------------------------------------------
# Triton

# Columns of the int64 table with one row for each tensor: first memory addresses, then sizes.
_PARAMETER, _GRADIENT, _EXP_AVG, _EXP_AVG_SQ, _STEP, _COPY, _NUMEL, _FIRST_CHUNK, _COLUMNS = range(9)
_CHUNK = 16384  # numbers per program: 0.5 MB of traffic, which makes the cost of reading the table negligible


@jit
def _address(table_ptr, row, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    address = tl.load(table_ptr + row * COLUMNS + COLUMN)
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@jit
def _tail(ptr, at, numel):
    return tl.load(ptr + at, mask=at < numel, other=0.0)


@jit
def _advance_kernel(
    table_ptr,
    corrections_ptr,
    skip_ptr,
    num_tensors,
    log_beta1,
    log_beta2,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Increment each tensor's step unless the step is skipped; write its 1 - beta1^step and sqrt(1 - beta2^step)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_tensors
    step_ptr = tl.load(table_ptr + row * COLUMNS + STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    taken = tl.where(tl.load(skip_ptr) == 0.0, 1.0, 0.0)
    step = tl.load(step_ptr, mask=inside, other=1.0) + taken
    tl.store(step_ptr, step, mask=inside)
    # float64: in float32 cancellation would leave only 4 digits of 1 - 0.999 at the first step.
    wide = step.to(tl.float64)
    tl.store(corrections_ptr + 2 * row, (1.0 - tl.exp(wide * log_beta1)).to(tl.float32), mask=inside)
    tl.store(corrections_ptr + 2 * row + 1, tl.sqrt(1.0 - tl.exp(wide * log_beta2)).to(tl.float32), mask=inside)


@jit
def _adamw_kernel(
    table_ptr, tensor_of_chunk_ptr, decay_ptr, corrections_ptr, clip_ptr, skip_ptr,
    lr, beta1, rest1, beta2, rest2, eps,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    COPY: tl.constexpr, NUMEL: tl.constexpr, FIRST_CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    COPY_TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program updates one chunk of one tensor. A skipped step writes nothing.

    Only the last block of a tensor is masked: where a mask is not known to be equal for adjacent numbers, the compiler
    loads them one by one instead of 128 bits at a time.
    """
    if tl.load(skip_ptr) == 0.0:
        chunk = tl.program_id(0)
        row = tl.load(tensor_of_chunk_ptr + chunk).to(tl.int64)
        parameter_ptr = _address(table_ptr, row, PARAMETER, COLUMNS, tl.float32)
        gradient_ptr = _address(table_ptr, row, GRADIENT, COLUMNS, tl.float32)
        exp_avg_ptr = _address(table_ptr, row, EXP_AVG, COLUMNS, tl.float32)
        exp_avg_sq_ptr = _address(table_ptr, row, EXP_AVG_SQ, COLUMNS, tl.float32)
        has_copy = tl.load(table_ptr + row * COLUMNS + COPY) != 0
        copy_ptr = _address(table_ptr, row, COPY, COLUMNS, COPY_TYPE)
        numel = tl.load(table_ptr + row * COLUMNS + NUMEL)
        start = (chunk - tl.load(table_ptr + row * COLUMNS + FIRST_CHUNK)) * CHUNK
        rate = lr * tl.load(decay_ptr + row)
        size = lr / tl.load(corrections_ptr + 2 * row)
        root_correction = tl.load(corrections_ptr + 2 * row + 1)
        unclip = 1.0 / tl.load(clip_ptr)
        for first in range(0, CHUNK, BLOCK):
            at = tl.multiple_of(start + first, BLOCK) + tl.arange(0, BLOCK)
            if start + first < numel:
                whole = start + first + BLOCK <= numel
                if whole:
                    parameter, gradient = tl.load(parameter_ptr + at), tl.load(gradient_ptr + at)
                    exp_avg, exp_avg_sq = tl.load(exp_avg_ptr + at), tl.load(exp_avg_sq_ptr + at)
                else:
                    parameter, gradient = _tail(parameter_ptr, at, numel), _tail(gradient_ptr, at, numel)
                    exp_avg, exp_avg_sq = _tail(exp_avg_ptr, at, numel), _tail(exp_avg_sq_ptr, at, numel)
                gradient *= unclip
                exp_avg = beta1 * exp_avg + rest1 * gradient
                exp_avg_sq = beta2 * exp_avg_sq + rest2 * gradient * gradient
                change = size * exp_avg / (tl.sqrt(exp_avg_sq) / root_correction + eps)
                parameter -= rate * parameter + change
                low = parameter.to(COPY_TYPE)
                if whole:
                    tl.store(parameter_ptr + at, parameter)
                    tl.store(exp_avg_ptr + at, exp_avg)
                    tl.store(exp_avg_sq_ptr + at, exp_avg_sq)
                    if has_copy:
                        tl.store(copy_ptr + at, low)
                else:
                    tl.store(parameter_ptr + at, parameter, mask=at < numel)
                    tl.store(exp_avg_ptr + at, exp_avg, mask=at < numel)
                    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=at < numel)
                    tl.store(copy_ptr + at, low, mask=(at < numel) & has_copy)


def _launch_settings(device: torch.device | None = None) -> dict[str, int]:
    """Each thread makes two 128-bit loads from each array."""
    return setting("adamw", 0, device, BLOCK=1024, num_warps=4)


@functools.lru_cache(maxsize=4)
def _tables(
    addresses: tuple[tuple[int, ...], ...], numels: tuple[int, ...], decays: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Table of tensors (P, _COLUMNS), index of each chunk's tensor (N,), weight decays (P,). Cached by the tensors'
    addresses, so the table is rebuilt when a tensor has moved."""
    chunks = torch.tensor([-(-numel // _CHUNK) for numel in numels])
    first = chunks.cumsum(0) - chunks
    table = torch.cat([torch.tensor(addresses).T, torch.tensor(numels).unsqueeze(1), first.unsqueeze(1)], dim=1)
    tensor_of_chunk = torch.arange(len(numels), dtype=torch.int32).repeat_interleave(chunks)
    return table.contiguous().to(device), tensor_of_chunk.to(device), torch.tensor(decays).to(device)


def _run_triton(
    tensors: AdamWTensors, lr: float, betas: tuple[float, float], eps: float, clip: Tensor, skip: Tensor
) -> None:
    device = tensors.device
    lists = (tensors.parameters, tensors.gradients, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps)
    addresses = (
        *(tuple(x.data_ptr() for x in xs) for xs in lists),
        tuple(0 if copy is None else copy.data_ptr() for copy in tensors.copies),
    )
    numels = tuple(p.numel() for p in tensors.parameters)
    table, tensor_of_chunk, decays = _tables(addresses, numels, tuple(tensors.weight_decays), device)
    kinds = {copy.dtype for copy in tensors.copies if copy is not None}
    assert len(kinds) <= 1, kinds
    num_tensors = len(numels)
    corrections = torch.empty(num_tensors, 2, device=device)
    clip, skip = clip.float().reshape(1), skip.float().reshape(1)
    if not len(tensor_of_chunk):
        return
    with torch.cuda.device_of(table):
        _advance_kernel[(-(-num_tensors // 256),)](
            table,
            corrections,
            skip,
            num_tensors,
            *(math.log(beta) if beta > 0.0 else -math.inf for beta in betas),
            STEP=_STEP,
            COLUMNS=_COLUMNS,
            BLOCK=256,
        )
        _adamw_kernel[(len(tensor_of_chunk),)](
            table,
            tensor_of_chunk,
            decays,
            corrections,
            clip,
            skip,
            lr,
            betas[0],
            1.0 - betas[0],
            betas[1],
            1.0 - betas[1],
            eps,
            PARAMETER=_PARAMETER,
            GRADIENT=_GRADIENT,
            EXP_AVG=_EXP_AVG,
            EXP_AVG_SQ=_EXP_AVG_SQ,
            COPY=_COPY,
            NUMEL=_NUMEL,
            FIRST_CHUNK=_FIRST_CHUNK,
            COLUMNS=_COLUMNS,
            COPY_TYPE=tl.float16 if kinds == {torch.float16} else tl.bfloat16,
            CHUNK=_CHUNK,
            **_launch_settings(device),
        )


def _triton_refuses(tensors: AdamWTensors, *_: Any) -> str | None:
    for xs in (tensors.parameters, tensors.gradients, tensors.exp_avgs, tensors.exp_avg_sqs):
        for x in xs:
            if x.dtype != torch.float32:
                return f"float32, got {x.dtype}"
            if not x.is_contiguous() or x.data_ptr() % 16:
                return f"contiguous tensors at addresses divisible by 16, got {tuple(x.shape)} of strides {x.stride()}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's fused AdamW


def _run_library(
    tensors: AdamWTensors, lr: float, betas: tuple[float, float], eps: float, clip: Tensor, skip: Tensor
) -> None:
    decays = list(tensors.weight_decays)
    for decay in dict.fromkeys(decays):
        members = [index for index, own in enumerate(decays) if own == decay]

        def of(xs: Sequence[Tensor], members: list[int] = members) -> list[Tensor]:
            return [xs[index] for index in members]

        torch_adamw(
            of(tensors.parameters),
            of(tensors.gradients),
            of(tensors.exp_avgs),
            of(tensors.exp_avg_sqs),
            [],
            of(tensors.steps),
            foreach=False,
            fused=True,
            grad_scale=clip,
            found_inf=skip,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=decay,
            eps=eps,
            maximize=False,
        )
    copied = [(c, p.detach()) for c, p in zip(tensors.copies, tensors.parameters, strict=True) if c is not None]
    if copied:
        copies, weights = zip(*copied, strict=True)
        torch._foreach_copy_(list(copies), list(weights))


# "triton" is not the default until it has run on a GPU.
implementations(
    "adamw_step",
    Implementation("triton", _run_triton, cannot_run_triton, (), _triton_refuses),
    Implementation("library", _run_library),
    Implementation("reference", reference.adamw_step),
)


def ahead_of_time() -> list[AheadOfTime]:
    """Tensors with and without a 16-bit copy, and a model that is a single number."""
    from varfast.kernels.aot import recorded

    def call(*shapes: tuple[int, ...], copied: bool = True) -> None:
        def zeros() -> list[Tensor]:
            return [torch.zeros(shape) for shape in shapes]

        copies = [torch.zeros(shape, dtype=torch.bfloat16) if copied and len(shape) > 1 else None for shape in shapes]
        steps = [torch.zeros(()) for _ in shapes]
        tensors = AdamWTensors(zeros(), zeros(), zeros(), zeros(), steps, [0.01] * len(shapes), copies)
        adamw_step(tensors, 1e-5, (0.9, 0.999), 1e-8, torch.ones(()), torch.zeros(()), impl="triton")

    narrow = (_advance_kernel,)
    return [
        *recorded("adamw, bf16 copies", partial(call, (1024, 4096), (1024,)), narrow=narrow, also_blackwell=True),
        *recorded("adamw, one number", partial(call, (1,), copied=False), fast=False),
    ]


def adamw_step(
    tensors: AdamWTensors,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    clip: Tensor,
    skip: Tensor,
    impl: str = "auto",
) -> None:
    """One step of AdamW in place, with the gradients divided by `clip`; then rewrites the low-precision copies.

    Args:
        tensors: what is read and written; all on one device.
        lr: learning rate.
        betas, eps: as in torch.optim.AdamW.
        clip: () float32 on the device, > 0: gradients are divided by it.
        skip: () float32 on the device: if it is not 0, nothing changes, even if gradients are not finite.
        impl: "auto", "library" (PyTorch's fused AdamW), "triton" or "reference".
    Raises: ValueError for lists of different lengths, or an impl that is unknown, cannot run or refuses these tensors.
    Source: arXiv:1711.05101.
    """
    lengths = {name: len(xs) for name, xs in vars(tensors).items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"lists of different lengths: {lengths}; want a place a parameter in each")
    if not tensors.parameters:
        return
    with torch.no_grad():
        run("adamw_step", impl, tensors, lr, betas, eps, clip, skip)
        increment_version(tensors.written())
