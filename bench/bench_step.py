"""The stages of a GRPO step, and a whole one, against plain PyTorch and against the roofline. Decoder: bench_decode.py.

    pytest bench/bench_step.py --benchmark-only
    VARFAST_BENCH_LARGE=1 pytest bench/bench_step.py --benchmark-only     on a CPU: d16 too, in ten minutes

Random weights: times do not depend on their values. On a GPU d16 and d30; on a CPU the digits' model, and d16 with 4
images; in bfloat16 where the device computes in it. Peers do the same work with the same weights:

- eager: ours without a CUDA graph (rollouts on a GPU);
- plain: every op in plain PyTorch, eagerly, in the same dtype, tokens drawn by softmax and multinomial;
- compiled: as plain, with all that lies between products and attention, and the decoder, under torch.compile;
- public (CPU): float32, sampling with the guidance half, which the public code always computes.

One that runs out of memory goes on with half of its micro-batch, which the row's notes say. FLOPs and bytes:
varfast.roofline.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import harness
import pytest
import torch
import torch._dynamo

from varfast import kernels
from varfast.advantages import group_advantages
from varfast.config import load_config
from varfast.kernels import reference
from varfast.kernels.selection import OPS
from varfast.learner import Learner
from varfast.losses.grpo import GRPO
from varfast.perf.devices import Ceilings, available_bytes, measure_here, with_dtype
from varfast.perf.limits import STAGES, speed_of_light_s, stage_counts
from varfast.perf.memory import MemoryPlan
from varfast.perf.plan import plan_memory
from varfast.perf.stages import StageClock, stage
from varfast.perf.work import Work
from varfast.policies.families import family_of
from varfast.policies.pixels import Pixels
from varfast.policies.var.policy import VARPolicy
from varfast.policies.var.transformer import FFN
from varfast.randomness import Key
from varfast.rewards import WeightedSum
from varfast.runs.load import random_policy
from varfast.state import State
from varfast.types import Batch, Sampling

CONFIGS = Path(__file__).parent.parent / "configs"
CUDA, DEVICE = harness.CUDA, harness.DEVICE
LARGE = CUDA or os.environ.get("VARFAST_BENCH_LARGE") == "1"
ROLLOUTS = [("digits", 512)] + ([("d16", 4)] if LARGE else [])
STEPS = UPDATES = ROLLOUTS
PASSES = []
if CUDA:
    ROLLOUTS = [(model, images) for model in ("d16", "d30") for images in (16, 64, 512)]
    UPDATES = [("d16", 32), ("d30", 32)]
    STEPS = [("d16", 512), ("d30", 512)]
    PASSES = [("d16", 64), ("d30", 24)]
FREE_BYTES = available_bytes(DEVICE)  # before there is any model
TEMPERATURE = 0.7

# ---------------------------------------------------------------------------------------------------------------------
# Peers


def eager_sample_tokens(logits, key, scale, temperature, bias_V=None, **inference):
    """What the public code does: softmax and multinomial. Guided and filtered as the reference does it."""
    logits = logits if bias_V is None else logits + bias_V
    if inference.get("guidance") or inference.get("top_k") or inference.get("top_p"):
        return kernels.sampling.sample_tokens(logits, key, scale, temperature, **inference, impl="reference")
    logp = (logits / temperature).log_softmax(dim=-1)
    tokens = torch.multinomial(logp.exp().flatten(0, 1), 1).view(logits.shape[:2])
    return tokens, logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(dim=-1)


def plain_logp(logits, tokens, temperature, consume_logits=False, bias_V=None):
    return reference.selective_log_softmax(logits, tokens, temperature, bias_V)


def plain_linear_gelu(x, weight, bias, low=None):
    return reference.linear_gelu(x, weight, low, bias)


def plain_attention(q, k, v, scale_ends, logit_scale, impl="auto"):
    return reference.block_causal_attention(q, k, v, scale_ends, logit_scale)


def plain_cached_attention(q, k_cache, v_cache, num_keys, logit_scale, impl="auto", position=None):
    return reference.cached_attention(q, k_cache, v_cache, num_keys, logit_scale, position)


_OTHERWISE = {
    "block_causal_attention": plain_attention,
    "cached_attention": plain_cached_attention,
    "sample_tokens": eager_sample_tokens,
    "selective_log_softmax": plain_logp,
    "linear_gelu": plain_linear_gelu,
    "adamw_step": functools.partial(kernels.adamw_step, impl="library"),
}
PLAIN = {op: _OTHERWISE.get(op) or getattr(reference, op) for op in OPS if op != "group_norm_silu"}
# Library calls, and a copy.
_NOT_COMPILED = ("block_causal_attention", "cached_attention", "split_heads_to_cache", "adamw_step")


@functools.cache
def compiled_ops(num_tokens):
    """PLAIN under torch.compile: for the shapes of the update one graph each, for those of the scales a dynamic one."""
    torch._dynamo.config.recompile_limit = 64

    def choosing(function, takes_tokens_at):
        static, dynamic = torch.compile(function, dynamic=False), torch.compile(function, dynamic=True)

        def call(*arguments, **keywords):
            whole = arguments[takes_tokens_at].shape[1] == num_tokens
            return (static if whole else dynamic)(*arguments, **keywords)

        return call

    found = {op: choosing(f, 0) for op, f in PLAIN.items() if op not in _NOT_COMPILED}
    return PLAIN | found, choosing(FFN.forward, 1)


@contextlib.contextmanager
def acting_as(who, num_tokens):
    """Ours as it is; a peer with the ops of its own in place of varfast.kernels'."""
    if who not in ("plain", "compiled", "public"):
        yield
        return
    ops, mlp = compiled_ops(num_tokens) if who == "compiled" else (PLAIN, FFN.forward)
    with pytest.MonkeyPatch.context() as patch:
        for op, function in ops.items():
            patch.setattr(kernels, op, function)
        patch.setattr(FFN, "forward", mlp)
        yield


@functools.lru_cache(maxsize=1)  # one model at a time on the device
def models(name: str) -> dict[str, VARPolicy]:
    """Ours and the peers, with the same weights."""
    ours = random_policy(step_work(name, 2)[0].config, DEVICE)
    dtype = str(ours.var.compute_dtype).removeprefix("torch.")
    policies = {"ours": ours, "plain": VARPolicy(ours.var, ours.vqvae, DEVICE, dtype, fast=False)}
    if CUDA:
        policies["compiled"] = VARPolicy(ours.var, ours.vqvae, DEVICE, dtype, fast=False)
        in_dtype = copy.deepcopy(ours.vqvae).bfloat16().to(memory_format=torch.channels_last)
        for who in ("plain", "compiled"):
            policies[who]._pixels = Pixels(64)  # one shape to compile, that of bench_decode.py
        policies["plain"]._decode_latent = functools.partial(plain_decode, in_dtype.decode_f_hat)
        policies["compiled"]._decode_latent = functools.partial(
            plain_decode, torch.compile(in_dtype.decode_f_hat, dynamic=False)
        )
    else:
        policies["public"] = VARPolicy(copy.deepcopy(ours.var), ours.vqvae, DEVICE, "float32", fast=False)
    return policies


def plain_decode(decode_f_hat, f_hat):
    """The plain decoder in bfloat16, channels last."""
    return decode_f_hat(f_hat.bfloat16().contiguous(memory_format=torch.channels_last))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and measuring


@functools.cache
def step_work(name: str, images: int) -> tuple[Work, MemoryPlan]:
    """The paper's settings for so many images a step, and the micro-batches that fit."""
    labels = min(32, images // 2)
    overrides = [
        "policy.checkpoint=random",
        f"rollout.labels_per_step={labels}",
        f"rollout.group_size={images // labels}",
    ]
    overrides += [f"update.minibatch={min(32, images)}", f"run.device={DEVICE.type}"]
    overrides.append("run.dtype=auto")
    file = "digits.yaml"
    if name != "digits":
        file = "d30.yaml"
        overrides += [f"policy.preset={name}", "policy.vqvae_checkpoint=null", "rollout.micro_batch=null"]
        overrides += ["update.micro_batch=null", "reward={bright: {type: brightness}}"]
    config = with_dtype(load_config(CONFIGS / file, overrides), DEVICE)
    work = Work.whole(config, family_of(config.policy).cost_of(config.policy, config.run.dtype))
    return work, plan_memory(work, FREE_BYTES)


@functools.cache
def ceilings_of(dtype: torch.dtype) -> Ceilings:
    return measure_here(DEVICE, dtype)


def fitting(make, sizes):
    """make(*sizes) as a call that fits into memory, after one run of it; and a note where it took smaller sizes."""
    wanted = sizes
    while True:
        call = make(*sizes)
        try:
            call()
            harness.synchronize()
        except RuntimeError as error:
            if max(sizes) == 1 or not out_of_memory(error):
                raise
            sizes = tuple(max(1, size // 2) for size in sizes)
            torch.cuda.empty_cache()
        else:
            return call, [] if sizes == wanted else [f"out of memory at micro-batches of {wanted}, so {sizes}"]


def out_of_memory(error):
    """Itself, or what it was raised from: a capture that runs out ends with an error of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def measure(benchmark, record, stages, name, images, makes, sizes, what, count=None):
    """One row: ours and its peers, each made for the micro-batches that fit it.

    Args:
        makes: by who it is, a function of the micro-batches that returns the call.
        sizes: micro-batches to begin with.
        count: (FLOPs, bytes) instead of those of the stages.
    """
    work, plan = step_work(name, images)
    num_tokens = work.config.policy.sizes.num_tokens
    counts = stage_counts(work, plan, "none")  # model FLOPs: what checkpointing computes again does not count
    flop, io_bytes = count or (sum(getattr(counts[s], kind) for s in stages) for kind in ("flop", "io_bytes"))
    row = harness.Row(what, f"{name}, {images} images", "forward", 0.0, flop=flop, io_bytes=io_bytes)
    row.model, row.images = name, images
    row.notes.append(f"micro-batches {sizes}, checkpointing {plan.update.checkpointing}")

    def by(who, make):
        made = []

        def call():
            with acting_as(who, num_tokens):
                if not made:  # in harness.runnable, where a peer that cannot run is left out
                    found, notes = fitting(make, sizes)
                    row.notes.extend(f"{who}: {note}" for note in notes)
                    made.append(found)
                else:
                    made[0]()

        return call

    calls = {who: by(who, make) for who, make in makes.items()}
    if CUDA:
        calls["ours"]()
        torch.cuda.reset_peak_memory_stats()
        if harness.seconds(calls["ours"]) < 1.0:
            calls["ours"]()  # what is sampled in one piece is captured at its second call and replayed at its third
        row.peak_bytes = torch.cuda.max_memory_allocated()
    harness.measure(benchmark, record, row, calls, ceilings_of(getattr(torch, work.cost.dtype)))
    if row.ms:
        benchmark.extra_info |= {"images_per_s": round(images / row.ms * 1e3, 1), "threads": torch.get_num_threads()}


def labels_of(images):
    return (torch.arange(images) % 10).sort().values.to(DEVICE)


def learner_of(policy, config, plan):
    """What trains a policy, with a reference, moments and rewards of its own."""
    state = State(policy, policy.frozen_copy(), WeightedSum(config.reward, DEVICE), config.update)
    return Learner(state, GRPO(config.grpo, config.policy.vocab_size), config.update, plan, 1, 0)


def lend(learner, policy, plan, reference=None):
    """Let it train another policy that has the same weights; reference: another copy of the same base."""
    learner.state.policy = learner.state.adamw._policy = policy
    learner.state.reference = reference or learner.state.reference
    learner.plan = plan


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "images"), STEPS)
def test_step(benchmark, record, name, images):
    """Rollout, decode, reward, reference, update. The moments of the optimizer are shared, as the weights are."""
    (work, plan), labels = step_work(name, images), labels_of(images)
    config = work.config
    policies = models(name)
    # Of the public code in float32 the weights are a copy: its reference and moments are too.
    of_ours = learner_of(policies["ours"], config, plan.update)

    def stepping(policy):
        policy.cuda_graph = plan.rollout.cuda_graph
        learner = of_ours
        if policy.var is not policies["ours"].var:
            learner = learner_of(policy, config, plan.update)

        def make(sampled, trained):
            def step():
                lend(learner, policy, replace(plan.update, micro_batch=trained))
                rollout, pictures = policy.sample_images(
                    labels, Sampling(TEMPERATURE), Key(0), micro_batch=sampled, keep_input=True
                )
                with stage("reward"):
                    rewards = learner.state.rewards(pictures, labels)
                learner.step(Batch.of(rollout, group_advantages(rewards.total_B, config.rollout.group_size)), 0)

            return step

        return make

    sizes = (plan.rollout.micro_batch, plan.update.micro_batch)
    makes = {who: stepping(policy) for who, policy in policies.items()}
    measure(benchmark, record, list(STAGES), name, images, makes, sizes, "step")
    stages(record, name, images, makes["ours"](*sizes))


def in_strict_mode(policy):
    """A policy on the same weights whose rollout and update have the same bits."""
    memo = {id(t): t for model in (policy.var, policy.vqvae) for t in (*model.parameters(), *model.buffers())}
    var, vqvae = copy.deepcopy(policy.var, memo), copy.deepcopy(policy.vqvae, memo)
    return VARPolicy(var, vqvae, DEVICE, str(policy.var.compute_dtype).removeprefix("torch."), strict=True)


@pytest.mark.parametrize(("name", "images"), STEPS)
def test_strict_step(benchmark, record, name, images):
    """The step of run.strict=true beside the ordinary one: what strict mode costs. Weights and moments are shared."""
    (work, plan), labels = step_work(name, images), labels_of(images)
    config = work.config
    ordinary = models(name)["ours"]
    policies = {"ours": in_strict_mode(ordinary), "without strict": ordinary}
    references = {who: policy.frozen_copy() for who, policy in policies.items()}
    eager = replace(plan.update, cuda_graph=False)  # a captured pass would be that of one policy
    learner = learner_of(ordinary, config, eager)

    def stepping(who):
        policy = policies[who]
        policy.cuda_graph = plan.rollout.cuda_graph

        def make(sampled, trained):
            def step():
                lend(learner, policy, replace(eager, micro_batch=trained), references[who])
                rollout, pictures = policy.sample_images(labels, Sampling(TEMPERATURE), Key(0), micro_batch=sampled)
                rewards = learner.state.rewards(pictures, labels)
                learner.step(Batch.of(rollout, group_advantages(rewards.total_B, config.rollout.group_size)), 0)

            return step

        return make

    sizes = (plan.rollout.micro_batch, plan.update.micro_batch)
    makes = {who: stepping(who) for who in policies}
    measure(benchmark, record, list(STAGES), name, images, makes, sizes, "strict step")


def stages(record, name, images, step):
    """A row for every stage of a steady step of ours, from events on the streams where they run."""
    with StageClock(DEVICE) as clock:
        step()
        measured = clock.read()
    work, plan = step_work(name, images)
    best = ceilings_of(getattr(torch, work.cost.dtype))
    for name_of_stage, count in stage_counts(work, plan).items():
        if measured.get(name_of_stage):
            ms = measured[name_of_stage]
            row = harness.Row(f"step: {name_of_stage}", f"{name}, {images} images", "forward", ms, samples=1)
            row.flop, row.io_bytes, row.model, row.images = count.flop, count.io_bytes, name, images
            row.share = speed_of_light_s(count, best) * 1e3 / ms
            record.add(row)
            print(row.line(), flush=True)


@pytest.mark.parametrize(("name", "images"), UPDATES)
def test_update(benchmark, record, name, images):
    """Reference, forward, backward and optimizer of so many images."""
    (work, plan), labels = step_work(name, images), labels_of(images)
    config = work.config
    rewards = torch.randn(images, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    advantages = group_advantages(rewards, config.rollout.group_size)
    policies = models(name)
    of_ours = learner_of(policies["ours"], config, plan.update)

    def updating(policy):
        learner = of_ours
        if policy.var is not policies["ours"].var:
            learner = learner_of(policy, config, plan.update)
        drawn = policy.sample(labels, TEMPERATURE, seed=0, micro_batch=plan.rollout.micro_batch)
        batch = Batch.of(drawn, advantages)

        def make(trained):
            def update():
                lend(learner, policy, replace(plan.update, micro_batch=trained))
                learner.step(batch, 0)

            return update

        return make

    makes = {
        who: functools.partial(lambda policy, trained: updating(policy)(trained), p) for who, p in policies.items()
    }
    stages = ["reference", "update", "optimizer"]
    measure(benchmark, record, stages, name, images, makes, (plan.update.micro_batch,), "update")


@pytest.mark.parametrize(("name", "images"), PASSES)
def test_forward_backward(benchmark, record, name, images):
    """The policy alone: log-probabilities of given tokens and their gradient in every weight."""
    policies, config = models(name), step_work(name, 2)[0].config
    labels, length = labels_of(images), config.policy.sizes.num_tokens
    tokens = torch.randint(config.policy.sizes.vocab_size, (images, length), device=DEVICE)

    def passing(policy):
        def make(size):
            def both():
                for parameter in policy.var.parameters():
                    parameter.grad = None
                for part in range(0, images, size):
                    rows = slice(part, part + size)
                    policy.token_logp(labels[rows], tokens[rows], TEMPERATURE).sum().backward()

            return both

        return make

    makes = {who: passing(policy) for who, policy in policies.items()}
    flop = 3.0 * images * family_of(config.policy).cost_of(config.policy, config.run.dtype).forward.flop
    measure(benchmark, record, [], name, images, makes, (images,), "forward and backward", (flop, 0.0))


@pytest.mark.parametrize(("name", "images"), ROLLOUTS)
def test_rollout(benchmark, record, name, images):
    (work, plan), labels = step_work(name, images), labels_of(images)
    config = work.config
    policies = dict(models(name))
    for policy in policies.values():
        policy.cuda_graph = True
    if CUDA:  # ours but for the graph
        eager = policies["eager"] = VARPolicy(policies["ours"].var, policies["ours"].vqvae, DEVICE, config.run.dtype)
        eager.cuda_graph = False

    def sampling(who, policy):
        def make(micro_batch):
            cfg = 1.5 if who == "public" else 0.0
            return lambda: policy.sample(labels, TEMPERATURE, seed=0, cfg=cfg, micro_batch=micro_batch)

        return make

    makes = {who: sampling(who, policy) for who, policy in policies.items()}
    measure(benchmark, record, ["rollout"], name, images, makes, (plan.rollout.micro_batch,), "rollout")


@pytest.mark.skipif(not LARGE or not importlib.util.find_spec("open_clip"), reason="needs open_clip and a GPU")
def test_reward(benchmark, record):
    """The image tower of CLIP ViT-L/14 with random weights, as the aesthetic and CLIP rewards run it, in bfloat16."""
    import open_clip

    from varfast.rewards.backbone import Backbone, clip_preprocessing

    images = 512 if CUDA else 2
    backbone = Backbone.__new__(Backbone)  # its own constructor wants weights
    backbone._model = open_clip.create_model("ViT-L-14", precision="bf16", device=DEVICE).eval().requires_grad_(False)
    backbone._device, backbone._dtype, backbone.batch_size = DEVICE, torch.bfloat16, 64
    backbone._preprocess = clip_preprocessing(open_clip.get_model_preprocess_cfg(backbone._model))
    pictures = torch.rand(images, 3, 256, 256, device=DEVICE)
    row = harness.Row("reward: CLIP ViT-L/14", f"{images} images", "forward", 0.0, flop=images * 162e9, images=images)
    calls = {"ours": lambda: backbone.embed_images(pictures)}
    harness.measure(benchmark, record, row, calls, ceilings_of(torch.bfloat16))
