"""Strict mode: the rollout's log-probabilities are the update's, bit for bit, and tokens do not depend on the batch.

Elsewhere the two differ by rounding: a library's product of another number of rows adds in another order. Strict mode
needs no other model, but ops whose rows do not depend on one another:

- products (kernels/matmul.py): every Linear, the head, and phi's convolution in the quantizer, as a product of patches;
- attention (impl "triton_invariant", "sdpa_invariant"): keys are added in one order, alone and among all scales;
- log-probabilities: the rollout's too by selective_log_softmax, on the tokens that were drawn;
- all else works row by row, or number by number, in any case.

Not among what it promises: pixels of the decoder, gradients, and other GPUs, libraries or numbers of threads.
The promise is checked on the machine: `check` at the start of a run, `must_agree` in every step.

Axes: B image, L token over all scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from varfast.policies.var.policy import Policy
from varfast.policies.var.sampler import SamplingSettings, sample
from varfast.policies.var.transformer import VAR
from varfast.randomness import GRID_STEP
from varfast.types import InputError, Rollout

_IMAGES = 3  # of the check: among others, first, in the middle and last


def check(policy: Policy, temperature: float = 1.0, seed: int = 0) -> None:
    """Sample a few images together and alone, teacher-force them together and alone, and compare bits.

    Raises: InputError, naming the first module that differs, where this machine's libraries break the promise.
    """
    assert policy.strict
    labels = [index % policy.num_classes for index in range(_IMAGES)]
    found = difference(policy, labels, temperature, seed)
    if found is not None:
        raise InputError(f"run.strict=true does not hold here ({policy.device}, torch {torch.__version__}): {found}")


def must_agree(differing: int, policy: Policy, rollout: Rollout, step: int) -> None:
    """The update has met `differing` log-probabilities that were not the rollout's, on weights that had not moved.

    Raises: InputError if there are any, with what `difference` finds now.
    """
    if not differing:
        return
    labels = rollout.labels_B[:_IMAGES].tolist()
    found = difference(policy, labels, rollout.temperature, step) or "three of its images alone agree"
    raise InputError(
        f"run.strict=true: in step {step + 1}, before its first optimizer step, {differing} log-probabilities of the "
        f"rollout were not those of the update: {found}. No checkpoint holds this step; run.strict=false in another "
        "run.dir goes on without the promise"
    )


def difference(policy: Policy, labels: list[int], temperature: float, seed: int) -> str | None:
    """Where images sampled alone, together, and teacher-forced together first differ in a bit; None: nowhere."""
    captured, policy.cuda_graph = policy.cuda_graph, False  # a graph would keep its memory, and calls no hook
    try:
        together = policy.sample(labels, temperature, seed=seed, step=GRID_STEP)
        alone = policy.sample(labels, temperature, seed=seed, step=GRID_STEP, micro_batch=1)
    finally:
        policy.cuda_graph = captured
    inputs = [policy.teacher_input(tokens_1L) for tokens_1L in alone.tokens_BL.split(1)]
    if not torch.equal(policy.teacher_input(alone.tokens_BL), torch.cat(inputs)):
        return "the quantizer's sum of several images has other bits than that of each"
    in_rollout: dict[str, list[Tensor]] = {}
    for index, label_1 in enumerate(alone.labels_B.split(1)):
        key = torch.tensor([seed, GRID_STEP, index], device=policy.device)
        with _recorded(policy.sampled_var) as outputs:
            sample(policy.sampled_var, policy.vqvae, label_1, key, SamplingSettings(temperature))
        for name, pieces in outputs.items():
            by_scale = pieces[0].ndim == 3 and len(pieces) > 1
            in_rollout.setdefault(name, []).append(torch.cat(pieces, dim=1) if by_scale else pieces[0])
    with _recorded(policy.var) as outputs:
        forced_BL = policy.token_logp(alone.labels_B, alone.tokens_BL, temperature).detach()
    for name, (given, *_) in outputs.items():
        if given.shape[0] == len(labels) and not torch.equal(torch.cat(in_rollout[name]), given):
            return f"{name} of an image alone, scale by scale, has other bits than of {len(labels)} at once"
    if not torch.equal(forced_BL, alone.logp_BL):
        return "selective_log_softmax of an image alone, scale by scale, has other bits than of several at once"
    if not (torch.equal(together.tokens_BL, alone.tokens_BL) and torch.equal(together.logp_BL, alone.logp_BL)):
        return "the rollout of several images is not that of each alone"
    return None


@contextmanager
def _recorded(var: VAR) -> Iterator[dict[str, list[Tensor]]]:
    """Inputs and outputs of every module inside, by what they are, in the order in which they come.

    Inputs too: between modules are attention, norms and residuals.
    """
    found: dict[str, list[Tensor]] = {}

    def note(what: str, value: object) -> None:
        if isinstance(value, Tensor):
            found.setdefault(what, []).append(value.detach().clone())

    def before(name: str, module: nn.Module, inputs: tuple[object, ...]) -> None:
        note(f"the input of {name}", inputs[0])

    def after(name: str, module: nn.Module, inputs: object, output: object) -> None:
        note(f"the output of {name}", output)

    hooks = []
    for name, module in var.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(partial(before, name)))
            hooks.append(module.register_forward_hook(partial(after, name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
