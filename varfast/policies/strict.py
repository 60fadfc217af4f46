"""Strict mode: the rollout's log-probabilities are the update's, bit for bit, and tokens do not depend on the batch.

Elsewhere the two differ by rounding: a library's product of another number of rows adds in another order. Strict mode
needs no other model, but ops whose rows do not depend on one another:

- products (kernels/matmul.py): every Linear, the head, and phi's convolution in VAR's quantizer, by patches;
- attention (impl "triton_invariant", "sdpa_invariant"): keys are added in one order, alone and among all scales;
- log-probabilities: the rollout's too by selective_log_softmax, on the tokens that were sampled, with guidance from
  logits that guidance.guided_logits has mixed in both;
- all other ops treat each row, or each number, on its own anyway.

Not among what it promises: pixels of the decoder, gradients, and other GPUs, libraries or numbers of threads.
The promise is checked on the machine: `check` at the start of a run, `must_agree` in every step.

Axes: B image, L token over all scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from varfast.policies.protocol import Policy
from varfast.randomness import GRID_STEP
from varfast.types import InputError, Rollout

_IMAGES = 3  # of the check: among others, first, in the middle and last


def check(policy: Policy, temperature: float = 1.0, seed: int = 0, cfg: float = 0.0) -> None:
    """Sample a few images together and alone, teacher-force them together and alone, and compare bits.

    Raises: InputError, naming the first module that differs, where this machine's libraries break the promise.
    """
    assert policy.strict
    labels = [index % policy.num_classes for index in range(_IMAGES)]
    found = difference(policy, labels, temperature, seed, cfg)
    if found is not None:
        raise InputError(f"run.strict=true does not hold here ({policy.device}, torch {torch.__version__}): {found}")


def must_agree(differing: int, policy: Policy, rollout: Rollout, step: int) -> None:
    """The update has met `differing` log-probabilities that were not the rollout's, on weights that had not moved.

    Raises: InputError if there are any, with what `difference` finds now.
    """
    if not differing:
        return
    labels = rollout.labels_B[:_IMAGES].tolist()
    found = difference(policy, labels, rollout.temperature, step, rollout.cfg) or "three of its images alone agree"
    raise InputError(
        f"run.strict=true: in step {step + 1}, before its first optimizer step, {differing} log-probabilities of the "
        f"rollout were not those of the update: {found}. No checkpoint holds this step; run.strict=false in another "
        "run.dir goes on without the promise"
    )


def difference(policy: Policy, labels: list[int], temperature: float, seed: int, cfg: float = 0.0) -> str | None:
    """Where images sampled alone, together, and teacher-forced together first differ in a bit; None: nowhere."""
    alone: list[Rollout] = []
    in_rollout: dict[str, list[Tensor]] = {}
    captured, policy.cuda_graph = policy.cuda_graph, False  # a graph would keep its memory, and calls no hook
    try:
        together = policy.sample(labels, temperature, seed=seed, step=GRID_STEP, cfg=cfg)
        for index, label in enumerate(labels):
            with _recorded(policy.sampled) as outputs:
                key = {"seed": seed, "step": GRID_STEP, "first_sample": index}
                alone.append(policy.sample([label], temperature, **key, cfg=cfg))
            for name, pieces in outputs.items():
                in_parts = pieces[0].ndim == 3 and len(pieces) > 1  # scale by scale, or token by token
                in_rollout.setdefault(name, []).append(torch.cat(pieces, dim=1) if in_parts else pieces[0])
    finally:
        policy.cuda_graph = captured
    tokens_BL, logp_BL = (torch.cat([getattr(each, name) for each in alone]) for name in ("tokens_BL", "logp_BL"))
    inputs = torch.cat([policy.teacher_input(each.tokens_BL) for each in alone])
    if not torch.equal(policy.teacher_input(tokens_BL), inputs):
        return "the quantizer's sum of several images has other bits than that of each"
    with _recorded(policy.trainable) as outputs:
        given = replace(together, tokens_BL=tokens_BL, teacher_input=inputs)
        forced_BL = policy.teacher_forced(given).logp_BL.detach()
    rows = len(labels) * (2 if cfg > 0.0 else 1)  # with guidance those of all images with their label come first
    for name, (output, *_) in outputs.items():
        if output.shape[0] != rows:
            continue
        sampled = torch.stack(in_rollout[name], dim=1).flatten(0, 1)
        if sampled.shape[1:] != output.shape[1:]:
            continue  # of prompts of several places, which a rollout computes apart: the head tells whether they agree
        times = rows // len(sampled)  # what both halves have in common a rollout may compute once
        if not torch.equal(sampled.repeat(times, *(1,) * (output.ndim - 1)), output):
            return f"{name} of an image alone, scale by scale, has other bits than of {len(labels)} at once"
    if not torch.equal(forced_BL, logp_BL):
        return "selective_log_softmax of an image alone, scale by scale, has other bits than of several at once"
    if not (torch.equal(together.tokens_BL, tokens_BL) and torch.equal(together.logp_BL, logp_BL)):
        return "the rollout of several images is not that of each alone"
    return None


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Inputs and outputs of every module inside, by name, in the order of the calls.

    Inputs too: attention, norms and residuals are no modules, and stand between those.
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
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(partial(before, name)))
            hooks.append(module.register_forward_hook(partial(after, name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
