"""A second family through the driver: a next-token model of 16 pixels, without a cache and without scales.

What it fills in is all that a family must: see `Toy`, `ToyPolicy` and `build`.

Axes: B image, L token, V vocabulary, C channel.
"""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding, gelu, mse_loss

from varfast import InputError, kernels
from varfast.perf.cost import ITEM_BYTES, Cost, Count, Weights
from varfast.policies.config import LoRAConfig
from varfast.policies.driver import Driver
from varfast.policies.precision import Head, Linear, MixedPrecision
from varfast.policies.protocol import Policy
from varfast.policies.sampler import Sampled
from varfast.policies.var.cost import VARCost
from varfast.randomness import Key
from varfast.runs import load
from varfast.runs.folder import RunFolder
from varfast.runs.setup import set_up
from varfast.train import train
from varfast.types import NotFinitePolicy, Prompts, Sampling

VOCAB, SIDE, CLASSES, WIDTH = 8, 4, 5, 32
CPU = torch.device("cpu")


class Toy(MixedPrecision):
    """Logits of a token from the one before it, its place and the class; class CLASSES and token VOCAB mean 'none'."""

    lora_targets: ClassVar = {"fc1": "fc"}

    def __init__(self):
        super().__init__()
        self.token_emb, self.class_emb = nn.Embedding(VOCAB + 1, WIDTH), nn.Embedding(CLASSES + 1, WIDTH)
        self.pos_LC = nn.Parameter(torch.randn(SIDE * SIDE, WIDTH))
        self.fc, self.head = Linear(WIDTH, WIDTH), Head(WIDTH, VOCAB)

    def large_modules(self):
        yield from (self.fc, self.head)

    def logits(self, ids_B, previous_Bl, first):
        """(B, l, V) of the tokens from place `first` on."""
        place_lC = self.pos_LC[first : first + previous_Bl.shape[1]]
        x_BlC = self.token_emb(previous_Bl) + self.class_emb(ids_B).unsqueeze(1) + place_lC
        return self.head(gelu(self.fc(x_BlC.to(self.compute_dtype))))

    def forward(self, ids_B, tokens_BL):
        return self.logits(ids_B, torch.cat([torch.full_like(tokens_BL[:, :1], VOCAB), tokens_BL[:, :-1]], 1), 0)


class Palette(nn.Module):
    """A token is the colour of a pixel."""

    def __init__(self):
        super().__init__()
        self.colours_VC = nn.Parameter(torch.linspace(-1.0, 1.0, VOCAB).unsqueeze(1).repeat(1, 3))


class ToyCost:
    """What an image costs: see varfast.perf.cost.Cost. A real family counts the zeros too."""

    num_tokens = rollout_passes = SIDE * SIDE
    rollout = forward = Count(2.0 * SIDE * SIDE * WIDTH * (WIDTH + VOCAB), 0.0)
    backward, decode = forward * 2.0, Count(0.0, 0.0)
    decoder_read_bytes = tokenizer_bytes = 4 * 3 * VOCAB
    image_bytes, input_bytes, kv_cache_bytes = 4 * 3 * SIDE * SIDE, 8 * SIDE * SIDE, 0
    rollout_activation_bytes = decode_activation_bytes = 4 * (WIDTH + VOCAB)

    def __init__(self, dtype: str, rank: int = 0):
        self.dtype = dtype
        tables = [(VOCAB + 1) * WIDTH, (CLASSES + 1) * WIDTH]
        matrices, others = [WIDTH * WIDTH, WIDTH * VOCAB], [SIDE * SIDE * WIDTH, WIDTH, VOCAB]
        self.weights = Weights(ITEM_BYTES[dtype], matrices, others, tables, [rank * WIDTH] * 2 if rank else [])

    @property
    def base(self):
        return ToyCost(self.dtype)

    def recomputed_share(self, checkpointing):
        return 0.0

    def update_activation_bytes(self, checkpointing):
        return 4 * SIDE * SIDE * (3 * WIDTH + 2 * VOCAB)


class ToyPolicy(Driver):
    num_classes, tokens_shape, image_size = CLASSES, (SIDE * SIDE,), SIDE

    def cost(self, dtype, lora=None) -> Cost:
        return ToyCost(dtype, lora.rank if lora else 0)

    def _sample_batch(self, prompts, key, how, keep):
        ids_B = prompts.ids_B
        tokens_BL, found = torch.full_like(ids_B, VOCAB).unsqueeze(1), []
        for place in range(SIDE * SIDE):
            logits_B1V = self.sampled.logits(ids_B, tokens_BL[:, -1:], place)
            uncond = self.sampled.logits(torch.full_like(ids_B, CLASSES), tokens_BL[:, -1:], place)
            found.append(
                kernels.sample_tokens(
                    logits_B1V, key, place, how.temperature, uncond if how.cfg else None, how.cfg, how.top_k, how.top_p
                )
            )
            tokens_BL = torch.cat([tokens_BL, found[-1][0]], dim=1)
        tokens_BL, logp_BL, entropy_BL = (torch.cat(pieces, dim=1) for pieces in zip(*found, strict=True))
        return Sampled(tokens_BL, logp_BL, entropy_BL, *((tokens_BL, tokens_BL) if keep else ()))

    def _strengths(self, cfg):
        return [cfg] * SIDE**2

    def _logits(self, model, prompts, teacher_input, checkpointing, bias_apart):
        return model(prompts.ids_B, teacher_input), None

    def _decode_latent(self, latent):
        return embedding(latent.view(-1, SIDE, SIDE), self.parts["palette"].colours_VC).permute(0, 3, 1, 2)

    def _encode(self, images):
        return (images[:, :1] - self.parts["palette"].colours_VC[:, :1, None]).abs().argmin(dim=1).flatten(1)


def random_parts(config, seed, device):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"model": Toy(), "palette": Palette()}


# What runs/load.py asks of a family: what families.family_of returns for it.
build = SimpleNamespace(PARTS=("model", "palette"), random_parts=random_parts, assemble=ToyPolicy, empty_model=Toy)


def make(dtype="float32", **options) -> Policy:
    return ToyPolicy(random_parts(None, 0, CPU), CPU, dtype, **options)


LABELS = [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sample_logp_equals_teacher_forced(dtype, cfg):
    policy = make(dtype)
    rollout, images = policy.sample_images(LABELS, Sampling(0.7, cfg), Key(3), micro_batch=2, keep_input=True)
    assert rollout.logp_BL.shape == (6, 16)
    assert torch.equal(policy.decode(rollout.tokens_BL), images)
    assert images.shape == (6, 3, SIDE, SIDE)
    logp_BL = policy.token_logp(LABELS, rollout.tokens_BL, 0.7, cfg=cfg)
    torch.testing.assert_close(logp_BL, rollout.logp_BL, rtol=0, atol=1e-5)
    forced = policy.teacher_forced(rollout, entropy=True)
    torch.testing.assert_close(forced.entropy_BL, rollout.entropy_BL, rtol=0, atol=1e-5)
    assert policy.teacher_forced(rollout).entropy_BL is None
    assert torch.equal(policy.encode(images), rollout.tokens_BL)


@pytest.mark.parametrize("how", [{}, {"cfg": 2.0, "top_k": 5, "top_p": 0.9}])
def test_sample_does_not_depend_on_the_batch_split(how):
    policy = make()
    whole = policy.sample(LABELS, 0.8, seed=1, **how)
    parts = [policy.sample(LABELS[i : i + 3], 0.8, seed=1, first_sample=i, **how) for i in (0, 3)]
    assert torch.equal(torch.cat([part.tokens_BL for part in parts]), whole.tokens_BL)
    assert torch.equal(policy.sample(Prompts(torch.tensor(LABELS)), 0.8, seed=1, micro_batch=1, **how).tokens_BL,
                       whole.tokens_BL)  # fmt: skip
    assert whole.on_policy == ("top_k" not in how)


def test_an_update_reaches_the_model_and_neither_palette_nor_reference():
    policy = make("bfloat16")
    reference = policy.frozen_copy()
    rollout = policy.sample(LABELS, seed=0)
    before_BL = reference.teacher_forced(rollout).logp_BL
    assert torch.equal(before_BL, policy.teacher_forced(rollout).logp_BL)
    assert [copy.dtype for _, copy in policy.low_precision_copies()] == [torch.bfloat16] * 3  # two matrices and a bias
    policy.teacher_forced(rollout).logp_BL.sum().backward()
    trained = [p for p in policy.trainable.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert not policy.parts["palette"].colours_VC.requires_grad
    torch.optim.SGD(trained, lr=0.1).step()
    policy.weights_changed()
    assert not torch.equal(policy.teacher_forced(rollout).logp_BL, before_BL)
    assert torch.equal(reference.teacher_forced(rollout).logp_BL, before_BL)
    reference.refresh(policy)
    assert torch.equal(reference.teacher_forced(rollout).logp_BL, policy.teacher_forced(rollout).logp_BL)


def test_an_adapter_is_trained_and_merged():
    policy = make()
    base = {name: tensor.clone() for name, tensor in policy.trainable.state_dict().items()}
    policy.add_lora(LoRAConfig(rank=2, targets=("fc1",)), seed=0)
    with torch.no_grad():
        policy.trainable.fc.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
    rollout = policy.sample(LABELS, seed=0)
    merged = make()
    merged.trainable.load_state_dict(policy.merged_state(base))
    torch.testing.assert_close(merged.teacher_forced(rollout).logp_BL, policy.teacher_forced(rollout).logp_BL)
    without = policy.frozen_copy()
    assert torch.equal(without.teacher_forced(rollout).logp_BL, make().teacher_forced(rollout).logp_BL)


def test_strict_mode_is_refused_of_a_family_without_it():
    with pytest.raises(InputError, match="run.strict=true: ToyPolicy has no strict mode; use run.strict=false"):
        make(strict=True)


def test_a_policy_is_freed_when_nobody_holds_it():
    policy = make()
    policy.sample_images(LABELS, Sampling(), Key(0))
    held = weakref.ref(policy)
    del policy
    assert held() is None  # without the garbage collector: an evaluation loads one model after the other


def test_weights_that_are_not_finite_are_named():
    policy = make()
    with torch.no_grad():
        policy.trainable.fc.weight[0, 0] = torch.nan
    with pytest.raises(NotFinitePolicy, match="1 of 7 weights hold NaN or infinite numbers, the first is fc.weight"):
        policy.check_usable([0], 1.0, 0)


def test_a_policy_of_a_config_is_of_the_family_that_is_built(make_config, monkeypatch):
    monkeypatch.setattr(load, "family_of", lambda config: build)
    policy = load.random_policy(make_config(), CPU)
    assert isinstance(policy, ToyPolicy)
    images = policy.decode(policy.sample(LABELS, seed=0).tokens_BL)
    assert mse_loss(policy.decode(policy.encode(images)), images) == 0.0


def test_a_policy_that_is_given_plans_by_its_own_cost(make_config):
    policy = make()
    assert policy.cost("float32").weights.parameters == sum(p.numel() for p in policy.trainable.parameters())
    with set_up(make_config(), policy=policy) as setup:
        assert isinstance(setup.work.cost, ToyCost)
        assert setup.plan.update.micro_batch == setup.config.update.minibatch
    with set_up(make_config(run__dir=setup.config.run.dir + "_other")) as setup:
        assert isinstance(setup.work.cost, VARCost)


def test_the_trainer_trains_a_toy_family_and_goes_on(make_config):
    options = {"policy__var": {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4}}
    options["policy__var"]["num_classes"] = CLASSES
    straight = make_config(**options, update__lr=1e-2)
    assert train(straight, policy=make()) == 0
    rows = [json.loads(line) for line in (Path(straight.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["ratio_gap_max"] < 1e-5 and row["grad_norm"] > 0 for row in rows)
    trained = torch.load(RunFolder(straight.run.dir).weights(straight), weights_only=True)
    assert list(trained) == list(Toy().state_dict())
    assert not torch.equal(trained["fc.weight"], make().trainable.fc.weight)
    in_parts = straight.run.dir + "_in_parts"
    for steps in (2, 3):
        assert train(make_config(**options, update__lr=1e-2, run__dir=in_parts, run__steps=steps), policy=make()) == 0
    again = torch.load(RunFolder(in_parts).weights(straight), weights_only=True)
    assert all(torch.equal(trained[name], tensor) for name, tensor in again.items())
