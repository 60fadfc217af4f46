"""AdamW of all tensors at once: beside torch.optim.AdamW in float64, and what a skipped step leaves alone."""

import dataclasses

import pytest
import torch

from varfast.kernels import AdamWTensors, adamw, adamw_step

from .conftest import error

SHAPES = ((3, 5), (7,), (1,), (130, 127), (64, 300), ())
BETAS, EPS, LR, MAX_NORM = (0.9, 0.999), 1e-8, 3e-3, 0.5


def make(device="cpu", shapes=SHAPES, dtype=torch.float32, copies=torch.bfloat16, seed=0):
    """Weights of a model that no step has been taken of; matrices decay and have a 16-bit copy."""
    generator = torch.Generator().manual_seed(seed)

    def tensors(times, draw=torch.randn):
        return [(times * draw(shape, generator=generator)).to(device, dtype) for shape in shapes]

    matrix = [len(shape) > 1 for shape in shapes]
    return AdamWTensors(
        parameters=tensors(1.0),
        gradients=tensors(0.0),
        exp_avgs=tensors(0.0),
        exp_avg_sqs=tensors(0.0),
        steps=[torch.zeros((), device=device) for _ in shapes],
        weight_decays=[0.1 if of_matrix else 0.0 for of_matrix in matrix],
        copies=[
            torch.zeros(shape, dtype=copies, device=device) if copies and of_matrix else None
            for shape, of_matrix in zip(shapes, matrix, strict=True)
        ],
    )


def draw_gradients(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    for gradient in tensors.gradients:
        gradient.copy_(torch.randn(gradient.shape, generator=generator))


def clip_of(tensors):
    norm = torch.cat([g.flatten() for g in tensors.gradients]).norm()
    return ((norm + 1e-6) / MAX_NORM).clamp_min(1.0)


def exact(start, steps):
    """torch.optim.AdamW and clip_grad_norm_ in float64: weights and moments."""
    wide = [p.detach().cpu().double().requires_grad_() for p in start.parameters]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(wide, start.weight_decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    for seed in range(steps):
        draw_gradients(start, seed)
        for p, gradient in zip(wide, start.gradients, strict=True):
            p.grad = gradient.cpu().double()
        torch.nn.utils.clip_grad_norm_(wide, MAX_NORM)
        optimizer.step()
    states = [optimizer.state[p] for p in wide]
    return wide, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]


def run(impl, device, steps=3, **how):
    tensors = make(device, **how)
    for seed in range(steps):
        draw_gradients(tensors, seed)
        adamw_step(tensors, LR, BETAS, EPS, clip_of(tensors), torch.zeros((), device=device), impl=impl)
    return tensors


def errors(tensors, wide):
    found = (tensors.parameters, tensors.exp_avgs, tensors.exp_avg_sqs)
    return [max(error(x, y) for x, y in zip(xs, ys, strict=True)) for xs, ys in zip(found, wide, strict=True)]


def test_adamw_step_equals_torch_optim_in_float64(path):
    """And its error is at most twice that of PyTorch's fused AdamW. More than one chunk a tensor: 130 x 127."""
    wide = exact(make(), 3)
    ours, library = (errors(run(impl, path.device), wide) for impl in (path.impl, "library"))
    for own, allowed in zip(ours, library, strict=True):
        assert own <= 2 * allowed + 1e-7


def test_adamw_step_in_float64_is_exact():
    assert max(errors(run("reference", "cpu", dtype=torch.float64), exact(make(dtype=torch.float64), 3))) < 1e-10


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, None])
def test_copies_are_the_weights_rounded(path, low):
    tensors = run(path.impl, path.device, steps=1, copies=low)
    for parameter, copy in zip(tensors.parameters, tensors.copies, strict=True):
        assert (copy is None) == (low is None or parameter.ndim < 2)
        if copy is not None:
            if path.impl == "triton" and path.device == "cpu" and low == torch.bfloat16:
                parameter = (parameter.view(torch.int32) & -0x10000).view(
                    torch.float32
                )  # Triton's interpreter cuts off
            assert torch.equal(copy, parameter.to(low))


def test_a_skipped_step_changes_nothing(path):
    tensors = run(path.impl, path.device, steps=2)
    before = [x.clone() for x in tensors.written()]
    for gradient in tensors.gradients:
        gradient.fill_(float("nan"))
    skip, clip = torch.ones((), device=path.device), torch.full((), float("nan"), device=path.device)
    adamw_step(tensors, LR, BETAS, EPS, clip, skip, impl=path.impl)
    assert all(torch.equal(x, y) for x, y in zip(tensors.written(), before, strict=True))
    assert [float(step) for step in tensors.steps] == [2.0] * len(SHAPES)


def test_tensors_that_move_between_steps_are_found(path):
    """Gradients that are new tensors each step, as without a buffer; and steps that were loaded."""
    tensors = run(path.impl, path.device, steps=1)
    moved = dataclasses.replace(
        tensors,
        gradients=[g.clone() for g in tensors.gradients],
        steps=[torch.full((), 1.0, device=path.device) for _ in SHAPES],
    )
    draw_gradients(moved, 1)
    adamw_step(moved, LR, BETAS, EPS, clip_of(moved), torch.zeros((), device=path.device), impl=path.impl)
    expected = run(path.impl, path.device, steps=2)
    assert all(torch.equal(x, y) for x, y in zip(moved.written(), expected.written(), strict=True))


@pytest.mark.parametrize("impl", ["triton", "library", "reference"])
def test_autograd_is_told_of_the_change(impl, monkeypatch):
    """A backward pass that saved the weights from before raises; it would take the new ones for them in silence."""
    if impl == "triton":
        monkeypatch.setattr(adamw, "run", lambda *_: None)
    tensors = make(shapes=((2, 2),))
    weight = tensors.parameters[0].requires_grad_()
    y = (weight * weight).sum()
    adamw_step(tensors, LR, BETAS, EPS, torch.ones(()), torch.zeros(()), impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_adamw_step_refuses_what_it_cannot_take(path):
    tensors = make(path.device)
    one, none = torch.ones((), device=path.device), torch.zeros((), device=path.device)
    with pytest.raises(ValueError, match="lists of different lengths"):
        adamw_step(dataclasses.replace(tensors, steps=[]), LR, BETAS, EPS, one, none, impl=path.impl)
    if path.impl == "triton":
        wide = make(path.device, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"takes float32, got torch.float64; use impl='reference'"):
            adamw_step(wide, LR, BETAS, EPS, one, none, impl="triton")
        turned = [p.t() if p.shape == (3, 5) else p for p in tensors.parameters]
        with pytest.raises(ValueError, match="contiguous tensors at addresses divisible by 16"):
            adamw_step(dataclasses.replace(tensors, parameters=turned), LR, BETAS, EPS, one, none, impl="triton")
