"""What the next-token families share: transformer, engine, policy, a training run."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from varfast import InputError
from varfast.export import main as export
from varfast.policies import strict
from varfast.policies.device import pick_device
from varfast.policies.families import family_of
from varfast.policies.llamagen.config import GPTConfig, LlamaGenLoRAConfig, LlamaGenPolicyConfig
from varfast.policies.llamagen.policy import LlamaGenPolicy
from varfast.policies.llamagen.transformer import LlamaGen
from varfast.policies.llamagen.weights import load_gpt
from varfast.policies.nexttoken import policy as nexttoken_policy
from varfast.policies.nexttoken.prompts import Prompted, PromptTable, places_of, sequence_of, token_places
from varfast.policies.nexttoken.rotary import rotary_1d
from varfast.policies.nexttoken.transformer import KVCache, Positions
from varfast.policies.precision import Head
from varfast.policies.taming.config import TamingLoRAConfig, TamingPolicyConfig
from varfast.policies.taming.weights import load_mingpt
from varfast.randomness import Key
from varfast.runs.folder import RunFolder
from varfast.train import train
from varfast.types import Prompts, Sampling

CPU = torch.device("cpu")
TOKENIZER = {
    "base_channels": 32,
    "channel_multipliers": [1, 1],
    "num_res_blocks": 1,
    "latent_width": 32,
    "code_width": 4,
}
SIZES = {"depth": 2, "width": 32, "num_heads": 4, "vocab_size": 24, "num_classes": 5, "side": 3}
POLICIES = {
    "llamagen": {"gpt": SIZES | {"num_kv_heads": 2, "mlp_width": 64}, "vq": TOKENIZER},
    "taming": {"transformer": SIZES, "vqgan": TOKENIZER},
}
KINDS = {"llamagen": LlamaGenPolicyConfig, "taming": TamingPolicyConfig}
LABELS = [0, 1, 2, 3, 4, 0]
GUIDED = {"cfg": 2.0, "top_k": 9, "top_p": 0.9}


def make(family, dtype="float32", spread=12.0, **options):
    """A random policy; spread: of its logits, which would be nearly even else."""
    config = KINDS[family](checkpoint="random", **POLICIES[family])
    build = family_of(config)
    parts = build.random_parts(config, 0, CPU)
    with torch.no_grad():
        for parameter in parts[config.parts[0]].parameters():
            parameter.mul_(spread if parameter.ndim > 1 else 1.0)
    return build.assemble(parts, CPU, dtype, **options)


both = pytest.mark.parametrize("family", POLICIES)


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sample_logp_equals_teacher_forced(family, dtype, temperature):
    policy = make(family, dtype)
    rollout, images = policy.sample_images(LABELS, Sampling(temperature), Key(3), micro_batch=2, keep_input=True)
    assert rollout.logp_BL.shape == (6, 9)
    assert images.shape == (6, 3, 6, 6)
    assert torch.equal(policy.decode(rollout.tokens_BL), images)
    forced = policy.teacher_forced(rollout, entropy=True)
    close = 5e-5 if dtype == "float32" else 0.3
    torch.testing.assert_close(forced.logp_BL.detach(), rollout.logp_BL, rtol=0, atol=close)
    torch.testing.assert_close(forced.entropy_BL.detach(), rollout.entropy_BL, rtol=0, atol=close)
    assert rollout.on_policy
    assert float(rollout.entropy_BL.std()) > 0.1  # no even distribution


@pytest.mark.parametrize(("family", "how"), [("llamagen", {}), ("taming", {}), ("llamagen", GUIDED)])
def test_sample_does_not_depend_on_the_batch_split(family, how):
    policy = make(family)
    whole = policy.sample(LABELS, 0.8, seed=1, **how)
    parts = [policy.sample(LABELS[i : i + 3], 0.8, seed=1, first_sample=i, **how) for i in (0, 3)]
    assert torch.equal(torch.cat([part.tokens_BL for part in parts]), whole.tokens_BL)
    assert torch.equal(policy.sample(LABELS, 0.8, seed=1, micro_batch=1, **how).tokens_BL, whole.tokens_BL)
    assert not torch.equal(policy.sample(LABELS, 0.8, seed=2, **how).tokens_BL, whole.tokens_BL)
    assert not torch.equal(policy.sample(LABELS, 0.8, seed=1, step=1, **how).tokens_BL, whole.tokens_BL)
    assert whole.on_policy == ("top_k" not in how)


@both
def test_labels_out_of_range_are_refused(family):
    with pytest.raises(InputError, match="labels_B"):
        make(family).sample([5], seed=0)


class Loop:
    """What perf.graphs.CudaLoop does, without a graph."""

    steps: ClassVar[list[int]] = []

    def __init__(self, begin, step, end, times, *inputs, pool):
        self._inputs = tuple(torch.empty_like(x) for x in inputs)
        self._functions, self._times = (begin, step, end), times

    def __call__(self, *inputs):
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        begin, step, end = self._functions
        state = begin(*self._inputs)
        for _ in range(self._times):
            step(state)
        self.steps.append(self._times)
        return tuple(x.clone() for x in end(state))


@pytest.mark.parametrize(("family", "how"), [("llamagen", {}), ("taming", {"top_k": 5}), ("llamagen", GUIDED)])
def test_a_captured_step_samples_what_the_eager_loop_does(family, how, monkeypatch):
    policy, how = make(family), Sampling(0.9, **how)
    eager, images = policy.sample_images(LABELS, how, Key(7), micro_batch=3, keep_input=True)
    monkeypatch.setattr(nexttoken_policy, "CudaLoop", Loop)
    Loop.steps.clear()
    with torch.no_grad():
        captured = policy._capture_batch(Prompts(torch.tensor([0, 0, 0])), torch.tensor([7, 0, 0]), how, True)
        tokens, logp, entropy, latent, teacher_input = captured(torch.tensor(LABELS[3:]), torch.tensor([7, 0, 3]))
    assert Loop.steps == [9]
    assert torch.equal(tokens, eager.tokens_BL[3:])
    assert torch.equal(teacher_input, eager.tokens_BL[3:])
    assert torch.equal(logp, eager.logp_BL[3:])
    assert torch.equal(entropy, eager.entropy_BL[3:])
    assert torch.equal(policy.decode(tokens), images[3:])
    assert latent.shape == (3, 4, 3, 3)


@pytest.mark.gpu
@both
def test_a_captured_step_on_a_gpu_samples_what_the_eager_loop_does(family):
    config = KINDS[family](checkpoint="random", **POLICIES[family])
    build = family_of(config)
    policies = [build.assemble(build.random_parts(config, 0, CPU), pick_device("cuda"), "float32", fast) for fast in
                (True, False)]  # fmt: skip
    eager = policies[1].sample(LABELS, seed=5)
    for _ in range(3):  # eager, captured, replayed
        assert torch.equal(policies[0].sample(LABELS, seed=5).tokens_BL, eager.tokens_BL)
    other = policies[0].sample(LABELS[::-1], seed=6, step=2)
    assert torch.equal(other.tokens_BL, policies[1].sample(LABELS[::-1], seed=6, step=2).tokens_BL)


class Llama(LlamaGen):
    """With Llama's rotary positions, as Janus-Pro has them."""

    def positions(self, device):
        return Positions(rotary_1d(self.config.num_tokens, self.config.head_dim, device), "halves")


@pytest.mark.parametrize(("head_dim", "kv_heads"), [(64, 1), (100, 2), (128, 2)])
@torch.no_grad()
def test_llama_of_the_package_transformers_has_the_same_logits(head_dim, kv_heads):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=2 * head_dim, num_key_value_heads=kv_heads, rms_norm_eps=1e-6, rope_theta=10000.0, **sizes
        )
    ).eval()
    config = GPTConfig(depth=2, width=2 * head_dim, num_heads=2, num_kv_heads=kv_heads, mlp_width=96, vocab_size=40,
                       num_classes=3, side=4, norm_eps=1e-6)  # fmt: skip
    ours = Llama(config).init_weights(1)
    for parameter in ours.parameters():
        parameter.mul_(3.0 if parameter.ndim > 1 else 1.1)
    renamed = {"model.norm.weight": ours.norm.weight, "lm_head.weight": ours.output.weight}
    for index, block in enumerate(ours.layers):
        prefix = f"model.layers.{index}."
        q, k, v = block.attention.wqkv.weight.split([2 * head_dim, kv_heads * head_dim, kv_heads * head_dim])
        renamed |= {f"{prefix}self_attn.{name}_proj.weight": weight for name, weight in
                    zip("qkvo", (q, k, v, block.attention.wo.weight), strict=True)}  # fmt: skip
        renamed |= {f"{prefix}mlp.{theirs_name}_proj.weight": getattr(block.feed_forward, own).weight
                    for own, theirs_name in (("w1", "gate"), ("w3", "up"), ("w2", "down"))}  # fmt: skip
        renamed[f"{prefix}input_layernorm.weight"] = block.attention_norm.weight
        renamed[f"{prefix}post_attention_layernorm.weight"] = block.ffn_norm.weight
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert (missing, unexpected) == (["model.embed_tokens.weight"], [])
    ids, tokens = torch.tensor([0, 2]), torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(2))
    inputs = torch.cat([ours.embed_prompt(ids).unsqueeze(1), ours.embed_tokens(tokens[:, :-1])], dim=1)
    wanted = theirs(inputs_embeds=inputs).logits
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(ours(ids, tokens), wanted, rtol=0, atol=2e-5)
    cache = KVCache(config, 2, torch.float32, CPU)
    steps = [ours.step(x, torch.tensor(place), cache) for place, x in enumerate(inputs.unbind(1))]
    torch.testing.assert_close(torch.stack(steps, 1), wanted, rtol=0, atol=2e-5)


class TextLlama(Llama):
    """With prompts of several tokens, looked up among the codes; the unguided ones keep their first and last."""

    def __init__(self, config):
        super().__init__(config)
        self.prompts = PromptTable()

    @property
    def num_prompts(self):
        return len(self.prompts)

    @property
    def prompts_version(self):
        return self.prompts.version

    def unguided(self, ids):
        return self.prompts.unguided(ids)

    def embed_prompts(self, ids):
        tokens, length = self.prompts.rows(ids)
        return Prompted(self.embed_tokens(tokens), length)

    def positions(self, device):
        places = self.prompts.places + self.config.num_tokens - 1
        return Positions(rotary_1d(places, self.config.head_dim, device), "halves")


TEXTS = [[1, 7, 9, 4, 2], [1, 2], [1, 5, 2], [1, 9, 9, 9, 9, 9, 2], [3]]


def text_policy(texts=TEXTS, dtype="float32", **options):
    config = GPTConfig(**POLICIES["llamagen"]["gpt"])
    model = TextLlama(config).init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(7.0 if parameter.ndim > 1 else 1.0)
    unguided = [[*text[:1], *[0] * (len(text) - 2), *text[-1:]][: len(text)] for text in texts]
    model.prompts.add([str(text) for text in texts], texts, unguided, CPU)
    parts = make("llamagen").parts
    return LlamaGenPolicy(model, parts["vq"], CPU, dtype, **options)


def test_sequence_of_takes_prompt_tokens_and_padding_once():
    index = sequence_of(torch.tensor([2, 4, 1]), 4, 3)
    assert index.tolist() == [[0, 1, 4, 5, 2, 3], [0, 1, 2, 3, 4, 5], [0, 4, 5, 1, 2, 3]]
    assert token_places(torch.tensor([2, 4]), 3).tolist() == [[1, 2, 3], [3, 4, 5]]


def test_places_of_has_the_gradient_of_gather():
    x = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    place = torch.tensor([[5, 0, 2], [1, 2, 3], [4, 3, 0]])
    assert torch.equal(places_of(x, place), x.gather(1, place.unsqueeze(2).expand(-1, -1, 5)))
    assert torch.autograd.gradcheck(lambda x: places_of(x, place), (x,))


@pytest.mark.parametrize("cfg", [0.0, 3.0])
def test_prompts_of_unequal_length_together_equal_each_alone(cfg):
    together, ids = text_policy(), [3, 0, 1, 2, 4, 1]
    rollout = together.sample(ids, 0.8, seed=2, cfg=cfg)
    forced = together.teacher_forced(rollout, entropy=True)
    torch.testing.assert_close(forced.logp_BL.detach(), rollout.logp_BL, rtol=0, atol=5e-5)
    torch.testing.assert_close(forced.entropy_BL.detach(), rollout.entropy_BL, rtol=0, atol=5e-5)
    weights = torch.linspace(-1, 1, forced.logp_BL.numel()).view_as(forced.logp_BL)
    (forced.logp_BL * weights).sum().backward()
    summed = {}
    for row, prompt in enumerate(ids):
        alone = text_policy([TEXTS[prompt]])  # a table without padding
        single = alone.sample([0], 0.8, seed=2, first_sample=row, cfg=cfg)
        assert torch.equal(single.tokens_BL, rollout.tokens_BL[row : row + 1])
        logp_1L = alone.teacher_forced(single).logp_BL
        torch.testing.assert_close(logp_1L, forced.logp_BL[row : row + 1], rtol=0, atol=1e-5)
        torch.testing.assert_close(single.logp_BL, rollout.logp_BL[row : row + 1], rtol=0, atol=1e-5)
        (logp_1L * weights[row]).sum().backward()
        for name, parameter in alone.transformer.named_parameters():
            if parameter.grad is not None:
                summed[name] = summed.get(name, 0) + parameter.grad
    for name, parameter in together.transformer.named_parameters():
        assert name in summed or parameter.grad is None
        if name in summed:
            error = float((parameter.grad - summed[name]).norm() / summed[name].norm())
            assert error < 1e-5, name


def test_a_captured_step_takes_prompts_of_unequal_length_and_a_new_table_drops_it(monkeypatch):
    policy, how = text_policy(), Sampling(0.9, cfg=2.0)
    eager = policy.sample([3, 0, 1, 2], 0.9, seed=7, cfg=2.0)
    monkeypatch.setattr(nexttoken_policy, "CudaLoop", Loop)
    with torch.no_grad():
        captured = policy._capture_batch(Prompts(torch.tensor([0, 0])), torch.tensor([7, 0, 0]), how, False)
        tokens, logp, _ = captured(torch.tensor([1, 2]), torch.tensor([7, 0, 2]))
    assert torch.equal(tokens, eager.tokens_BL[2:])
    torch.testing.assert_close(logp, eager.logp_BL[2:], rtol=0, atol=1e-5)
    sampler, reference = policy._sampler, policy.frozen_copy()
    policy.sample([0], seed=7)
    assert policy._sampler is sampler
    policy.transformer.prompts.add(["longer"], [[1, 8, 8, 8, 8, 8, 8, 8, 2]], [[1, 0, 0, 0, 0, 0, 0, 0, 2]], CPU)
    other = policy.sample([5, 3, 0, 1, 2], 0.9, seed=7, cfg=2.0, first_sample=-1)
    assert policy._sampler is not sampler
    assert policy.num_classes == reference.num_classes == 6  # one table
    assert torch.equal(other.tokens_BL[1:], eager.tokens_BL)  # ids that were there are what they were
    policy.transformer.prompts.clear()
    assert policy.num_classes == reference.num_classes == 0


@pytest.mark.parametrize(("dtype", "cfg"), [("float32", 0.0), ("bfloat16", 2.0)])
def test_strict_mode_holds_for_prompts_of_unequal_length(cfg, dtype):
    policy = text_policy(dtype=dtype, strict=True)
    strict.check(policy, 0.8, cfg=cfg)
    whole = policy.sample([3, 0, 1], 0.8, seed=4, cfg=cfg)
    for row, prompt in enumerate([3, 0, 1]):
        alone = text_policy([TEXTS[prompt]], dtype, strict=True).sample([0], 0.8, seed=4, first_sample=row, cfg=cfg)
        assert torch.equal(alone.logp_BL[0], whole.logp_BL[row])
    assert torch.equal(policy.teacher_forced(whole).logp_BL, whole.logp_BL)


@both
@torch.no_grad()
def test_a_token_sees_none_of_its_own_and_later_ones(family):
    model = make(family).transformer
    ids, tokens = torch.tensor([1]), torch.zeros(1, 9, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, 4] = 7
    differs = (model(ids, tokens) != model(ids, changed)).any(-1)[0]
    assert differs.tolist() == [False] * 5 + [True] * 4


@both
def test_low_precision_copies_frozen_copy_and_update(family):
    policy = make(family, "bfloat16")
    reference = policy.frozen_copy()
    rollout = policy.sample(LABELS, seed=0)
    before_BL = policy.teacher_forced(rollout).logp_BL.detach()
    assert torch.equal(reference.teacher_forced(rollout).logp_BL, before_BL)
    assert all(copy.dtype == torch.bfloat16 for _, copy in policy.low_precision_copies())
    matrices = [m for m in policy.transformer.modules() if isinstance(m, torch.nn.Linear)]
    assert len(policy.low_precision_copies()) >= len(matrices)
    assert all(matrix.weight.dtype == torch.bfloat16 for matrix in reference.transformer.modules()
               if isinstance(matrix, torch.nn.Linear))  # fmt: skip
    policy.teacher_forced(rollout).logp_BL.sum().backward()
    trained = [p for p in policy.trainable.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert not any(p.requires_grad for p in policy.tokenizer.parameters())
    torch.optim.SGD(trained, lr=0.1).step()
    policy.weights_changed()
    assert not torch.equal(policy.teacher_forced(rollout).logp_BL, before_BL)
    assert torch.equal(reference.teacher_forced(rollout).logp_BL, before_BL)
    reference.refresh(policy)
    assert torch.equal(reference.teacher_forced(rollout).logp_BL, policy.teacher_forced(rollout).logp_BL)


@pytest.mark.parametrize(("family", "lora"), [("llamagen", LlamaGenLoRAConfig(rank=2)),
                                              ("taming", TamingLoRAConfig(rank=2))])  # fmt: skip
def test_an_adapter_on_all_matrices_is_merged(family, lora):
    pytest.importorskip("peft")
    policy = make(family)
    base = {name: tensor.clone() for name, tensor in policy.trainable.state_dict().items()}
    policy.add_lora(lora, seed=0)
    adapted = {name.rpartition(".")[0] for name, p in policy.trainable.named_parameters() if p.requires_grad}
    assert len(adapted) == 2 * 2 * {"llamagen": 5, "taming": 6}[family]  # A and B, blocks, matrices
    with torch.no_grad():
        for name, parameter in policy.trainable.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0), std=0.1)
    rollout = policy.sample(LABELS, seed=0)
    forced = policy.teacher_forced(rollout).logp_BL
    torch.testing.assert_close(forced.detach(), rollout.logp_BL, rtol=0, atol=5e-5)
    merged, without = make(family), policy.frozen_copy()
    merged.trainable.load_state_dict(policy.merged_state(base))
    torch.testing.assert_close(merged.teacher_forced(rollout).logp_BL, forced, rtol=0, atol=5e-5)
    assert torch.equal(without.teacher_forced(rollout).logp_BL, make(family).teacher_forced(rollout).logp_BL)


@pytest.mark.parametrize(("family", "cfg"), [("llamagen", 0.0), ("llamagen", 2.0), ("taming", 0.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_mode_has_the_same_bits_alone_together_and_teacher_forced(family, cfg, dtype):
    policy = make(family, dtype, strict=True)
    strict.check(policy, 0.8, cfg=cfg)
    whole = policy.sample(LABELS, 0.8, seed=4, cfg=cfg)
    alone = [policy.sample([label], 0.8, seed=4, first_sample=i, cfg=cfg) for i, label in enumerate(LABELS)]
    assert torch.equal(torch.cat([rollout.tokens_BL for rollout in alone]), whole.tokens_BL)
    assert torch.equal(torch.cat([rollout.logp_BL for rollout in alone]), whole.logp_BL)
    assert torch.equal(policy.teacher_forced(whole).logp_BL, whole.logp_BL)


def metrics(config):
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("family", "dtype", "more"), [
    ("llamagen", "float32", {}), ("llamagen", "bfloat16", {"run__strict": True}), ("taming", "float32", {}),
    ("llamagen", "float32", {"rollout__cfg": 2.0}),
])  # fmt: skip
def test_the_trainer_trains_and_goes_on_bit_for_bit(make_config, family, dtype, more):
    options = {"policy": {"family": family, "checkpoint": "random"} | POLICIES[family], "update__lr": 1e-3,
               "run__dtype": dtype} | more  # fmt: skip
    straight = make_config(**options)
    assert train(straight) == 0
    rows = metrics(straight)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["ratio_gap_max"] <= (0.0 if more.get("run__strict") else 1e-4) for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    trained = torch.load(RunFolder(straight.run.dir).weights(straight), weights_only=True)
    config = KINDS[family](**options["policy"])
    assert list(trained) == list(family_of(config).empty_model(config).state_dict())
    exported = Path(straight.run.dir).with_name("exported.pth")
    assert export([f"checkpoint={straight.run.dir}", f"out={exported}"]) == 0
    loaded = {"llamagen": load_gpt, "taming": load_mingpt}[family](str(exported), config.sizes).state_dict()
    assert list(loaded) == list(trained)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
    card = exported.with_suffix(".md").read_text()
    assert {"llamagen": "A LlamaGen transformer", "taming": "taming-transformers"}[family] in card
    in_parts = straight.run.dir + "_in_parts"
    for steps in (2, 3):
        assert train(make_config(**options, run__dir=in_parts, run__steps=steps)) == 0
    again = torch.load(RunFolder(in_parts).weights(straight), weights_only=True)
    assert all(torch.equal(trained[name], tensor) for name, tensor in again.items())


@pytest.mark.parametrize("rows", [1, 4, 65])
def test_logits_of_many_codes_are_summed_in_float32_for_few_rows_and_many(rows):
    """On a CPU the head's matrix is cast in parts for few rows."""
    generator = torch.Generator().manual_seed(0)
    head = Head(96, 8192 + 100, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    input = torch.randn(rows, 96, generator=generator).bfloat16()
    exact = input.double() @ head.weight.bfloat16().double().T
    assert head(input).shape == exact.shape
    assert (head(input).double() - exact).abs().max() < 2e-5  # bfloat16 logits would be off by 0.1
