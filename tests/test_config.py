import copy
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import get_args

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from varfast import InputError
from varfast.config import Config, KernelsConfig, load_config, parse_config
from varfast.evaluation.config import EvaluateConfig, SampleConfig
from varfast.policies.var.config import VARConfig
from varfast.report.config import ReportConfig
from varfast.rewards import BrightnessReward
from varfast.runs.config import ExportConfig
from varfast.runs.manifest import dump_config
from varfast.settings import schema
from varfast.settings.aliases import ALIASES
from varfast.settings.loading import parse_arguments
from varfast.settings.reading import apply_override, dump_yaml, read_yaml
from varfast.settings.section import Section
from varfast.train import train

MINIMAL = {
    "run": {"dir": "r", "steps": 3},
    "policy": {"preset": "d16", "checkpoint": "random"},
    "reward": {"bright": {"type": "brightness"}},
}


def parse(**overrides) -> Config:
    data = copy.deepcopy(MINIMAL)
    for key, value in overrides.items():
        *parents, last = key.split("__")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return parse_config(data)


def test_defaults_are_the_settings_of_the_paper():
    config = parse()
    assert (config.rollout.labels_per_step, config.rollout.group_size, config.rollout.images) == (32, 16, 512)
    assert config.rollout.temperature == 0.7
    assert (config.update.minibatch, config.update.lr, config.update.epochs) == (32, 1e-4, 1)
    assert (config.grpo.clip_eps, config.grpo.kl_beta) == (0.2, 0.2)
    assert config.rollout.labels == "all"


def test_sizes_of_the_vqvae_follow_the_transformer():
    config = parse(policy__preset="d36")
    assert config.policy.vqvae.patch_nums == (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    assert config.policy.vqvae.image_size == 512
    assert parse().policy.vqvae.image_size == 256
    assert config.policy.sizes.shared_adaln


def test_scale_ends():
    assert VARConfig().scale_ends == (1, 5, 14, 30, 55, 91, 155, 255, 424, 680)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rollout__group_siz", 3, "rollout.group_siz: unknown key; did you mean rollout.group_size?"),
        ("rollot", {}, "rollot: unknown key; did you mean rollout?"),
        ("run__zzz", 1, "run.zzz: unknown key; known: dir, steps, seed"),
        ("policy__vqvae__base_chanels", 3, "did you mean policy.vqvae.base_channels?"),
        ("reward__bright__mod", "x", "reward.bright.mod: unknown key; did you mean reward.bright.mode?"),
        ("rollout__group_size", 1, "rollout.group_size: got 1; want a whole number from 2 to 10**6"),
        ("update__lr", "fast", "update.lr: got 'fast'; want a number above 0"),
        ("run__steps", 2.5, "run.steps: got 2.5; want a whole number from 1"),
        ("rollout__micro_batch", 7, "rollout.micro_batch=7 does not divide 512 images a step; use 8"),
        ("update__micro_batch", 12, "update.micro_batch=12 does not divide 32 images of a minibatch; use 8"),
        ("update__minibatch", 100, "update.minibatch=100 does not divide 512 images a step; use 128"),
        ("rollout__labels", [3, 1000], "rollout.labels holds 1000; the model has labels 0..999"),
        ("rollout__labels", [], "rollout.labels is empty"),
        ("policy__preset", "d17", "policy.preset: got 'd17'"),
        ("policy__checkpoint", "a.pth", "vqvae_checkpoint is missing"),
        ("policy__vqvae__patch_nums", [1, 2], "they must be equal"),
        ("policy__var", {"depth": 2}, "one of the two"),
        ("reward__c", {"type": "clip", "promt": "x"}, "reward.c.promt: unknown key; did you mean reward.c.prompt?"),
        ("reward__c", {"type": "clip"}, "reward.c: give prompt or label_prompt, one of the two"),
        (
            "reward__c",
            {"type": "clip", "prompt": "x", "names": ["y"]},
            "reward.c: names stand for {name} in label_prompt",
        ),
        ("reward__c", {"type": "clip", "prompt": " "}, "reward.c: prompt is blank"),
        ("reward__c", {"type": "clip", "label_prompt": "a {nam}", "names": ["y"]}, "has no {name}"),
        ("reward__c", {"type": "aesthetic", "dtype": "float16"}, "reward.c.dtype: got 'float16'"),
        ("grpo__combine", "sum", "grpo.combine: got 'sum'"),
        ("grpo", {"kl_beta": 0, "reference_every": 5}, "grpo: reference_every=5 with kl_beta=0, which holds no ref"),
        ("grpo__reference_every", 0, "grpo.reference_every: got 0"),
        ("grpo", {"kl_beta": 0, "reference_ema": 0.9}, "grpo: reference_ema=0.9 with kl_beta=0, which holds no ref"),
        ("grpo", {"reference_every": 5, "reference_ema": 0.9}, "a policy of before or an average; leave one of them"),
        ("grpo__reference_ema", 1.0, "grpo.reference_ema: got 1.0; want a number above 0 to below 1, or null"),
        ("grpo__ratio", "image", "grpo.ratio: got 'image'; want token or sequence"),
        ("grpo__kl_gradient", "k2", "grpo.kl_gradient: got 'k2'; want k3 or unbiased"),
        ("grpo__scale_alpha", -1, "grpo.scale_alpha: got -1"),
        ("grpo__entropy", {"clamp": [1e-3, 1e-4]}, "grpo.entropy: clamp=[0.001, 0.0001]: want the smaller number"),
        ("grpo__entropy", {"target": 1.5}, "grpo.entropy.target: got 1.5"),
        ("update__ema_decay", 1.0, "update.ema_decay: got 1.0; want a number above 0 to below 1, or null"),
        ("update__ema_decay", 0, "update.ema_decay: got 0; want a number above 0 to below 1, or null"),
        ("reward__bright__type", "brigtness", "want brightness, function"),
        ("reward", {}, "reward: got {}"),
        (
            "dpo",
            {"reference_every": 5, "reference_ema": 0.9},
            "dpo: reference_every=5 with reference_ema=0.9: the reference is a policy of before or an average",
        ),
        ("dpo", {"label_smoothing": 0.5}, "dpo.label_smoothing: got 0.5; want a number from 0 to below 0.5"),
        ("dpo", {"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing=0.1 with loss_type=hinge: only the"),
        ("dpo", {"pairs_per_prompt": 9}, "dpo.pairs_per_prompt=9 takes 18 images of each group, which has rollout.gro"),
        ("dpo", {"pairs": "x", "save_pairs": True}, "dpo: save_pairs=true with pairs=x: saved pairs are neither sam"),
        ("dpo", {"pairs": "x", "samples": "reference"}, "dpo: samples=reference with pairs=x"),
        ("dpo", {"pairs": "x", "min_margin": 0.1}, "dpo: min_margin with pairs=x"),
        ("update__warmup_share", 1.0, "update.warmup_share: got 1.0; want a number from 0 to below 1"),
        ("update", {"warmup_share": 0.1, "warmup_steps": 3}, "update: warmup_steps=3 with warmup_share=0.1: leave one"),
        ("run__device", "tpu", "run.device: got 'tpu'"),
    ],
)
def test_parse_config_says_what_is_wrong(key, value, message):
    with pytest.raises(InputError) as caught:
        parse(**{key: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"grpo__kl_beta": 0.1, "grpo__clip_eps": 0.1}, "dpo beside grpo.clip_eps, grpo.kl_beta: a run minimises one"),
        (
            {"update__minibatch": 48},
            "update.minibatch=48 does not divide 64 images of a step's pairs (2 a pair); use 32",
        ),
        ({"update__micro_batch": 1}, "update.micro_batch=1 splits a pair of dpo: count 2 images a pair, and be even"),
        ({"dpo__samples": "reference", "run__strict": True}, "with what it has sampled itself, which dpo.samples=refe"),
        ({"dpo__pairs": "x", "run__strict": True}, "which dpo.pairs=x is not"),
        ({"dpo__pairs": "x", "run__budget_images": 100}, "run.budget_images=100 with dpo.pairs=x, which samples none"),
        (
            {"reward": {"fid": {"type": "loo_fid", "normalise": "batch", "features": "digits", "reference": "digits"}}},
            "reward.fid.normalise=batch with dpo, which chooses pairs by the weighted sum",
        ),
    ],
)
def test_parse_config_says_what_does_not_go_with_dpo(more, message):
    with pytest.raises(InputError) as caught:
        parse(**{"dpo": {}} | more)
    assert message in str(caught.value)


def test_a_run_has_the_loss_of_its_own_file(tmp_path):
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(MINIMAL | {"grpo": {"kl_beta": 0.1}}))
    (tmp_path / "dpo.yaml").write_text("base: grpo.yaml\ndpo: {beta: 0.3}\n")
    (tmp_path / "back.yaml").write_text("base: dpo.yaml\ngrpo: {clip_eps: 0.1}\n")
    assert load_config(tmp_path / "grpo.yaml").loss.name == "grpo"
    config = load_config(tmp_path / "dpo.yaml")
    assert (config.loss.name, config.loss.beta, config.learned_images) == ("dpo", 0.3, 64)
    assert load_config(tmp_path / "back.yaml").loss.name == "grpo"
    # A run folder keeps the one that it has, and reads it again.
    kept = config.model_dump(mode="json", exclude_none=True)
    assert "grpo" not in kept
    assert parse_config(kept) == config
    assert "dpo" not in load_config(tmp_path / "grpo.yaml").model_dump(mode="json", exclude_none=True)
    # On a command line.
    assert load_config(tmp_path / "grpo.yaml", ["grpo=null", "dpo={}"]).loss.beta == 0.1
    assert load_config(tmp_path / "dpo.yaml", ["dpo=null"]).loss.name == "grpo"
    with pytest.raises(InputError, match="dpo beside grpo.kl_beta: a run minimises one loss"):
        load_config(tmp_path / "grpo.yaml", ["dpo.beta=0.2"])


def test_parse_config_reports_all_problems_at_once():
    with pytest.raises(InputError) as caught:
        parse(rollout__group_size=1, update__lr=-1, run__sed=0)
    assert all(text in str(caught.value) for text in ("rollout.group_size", "update.lr", "did you mean run.seed?"))


def test_load_config_applies_overrides(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    overrides = ["update.lr=3e-5", "rollout.labels=[1, 2]", "grpo.kl_beta=0", "log.tensorboard=false"]
    config = load_config(path, overrides)
    assert config.update.lr == 3e-5
    assert config.rollout.labels == [1, 2]
    assert config.grpo.kl_beta == 0.0
    assert not config.log.tensorboard


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("update.lr", "want key=value"),
        ("=3", "want key=value"),
        ("run.steps.x=3", "steps is a value, not a section"),
        ("run.dir=[", "the value is not valid YAML"),
        ("grpo.beta=0.1", "did you mean grpo.kl_beta?"),
    ],
)
def test_load_config_refuses_overrides(tmp_path, override, message):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(InputError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)


def test_load_config_refuses_files(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="got a list at the top"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_parse_arguments_of_sample():
    config = parse_arguments(["checkpoint=a.pth", "labels=[1,2]", "cfg=4"], SampleConfig)
    assert (config.checkpoint, config.labels, config.cfg) == ("a.pth", [1, 2], 4.0)
    with pytest.raises(InputError, match="lables: unknown key; did you mean labels"):
        parse_arguments(["checkpoint=a", "lables=[1]"], SampleConfig)


def all_sections(base):
    for section in base.__subclasses__():
        yield section
        yield from all_sections(section)


def test_every_shipped_config_is_valid_and_every_field_documented():
    paths = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert {p.name for p in paths} >= {"digits.yaml", "d16_brightness.yaml", "d30.yaml"}
    for path in paths:
        load_config(path)
    sections = list(all_sections(Section))
    assert {VARConfig, KernelsConfig, EvaluateConfig, ReportConfig, BrightnessReward} <= set(sections)
    for section in sections:
        if not issubclass(section, Config):
            undocumented = [n for n, f in section.model_fields.items() if not f.description]
            assert undocumented == [], section


def test_lora_is_set_by_one_key_and_refuses_what_it_does_not_take():
    root = Path(__file__).parent.parent / "configs"
    assert load_config(root / "digits.yaml").policy.lora is None
    lora = load_config(root / "digits.yaml", ["policy.lora.rank=8"]).policy.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.targets) == (8, 32.0, ("mat_qkv", "proj", "fc1", "fc2"))
    assert load_config(root / "digits.yaml", ["policy.lora={}"]).policy.lora.rank == 16
    assert load_config(root / "digits_lora.yaml", ["policy.lora=null"]).policy.lora is None
    for override, message in {
        "policy.lora.ranks=8": r"policy.lora.ranks: unknown key; did you mean policy.lora.rank\?",
        "policy.lora.targets=[head]": "policy.lora.targets.0: got 'head'",
        "policy.lora.targets=[]": "policy.lora.targets: got",
        "policy.lora.rank=0": "policy.lora.rank: got 0",
    }.items():
        with pytest.raises(InputError, match=message):
            load_config(root / "digits.yaml", [override])
    with pytest.raises(InputError, match=r"policy.lora with run.parallel=fsdp: .*; use run.parallel=ddp"):
        load_config(root / "digits.yaml", ["policy.lora.rank=8", "run.parallel=fsdp"])


CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_base_is_changed_section_by_section_and_rewards_are_replaced(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(MINIMAL | {"run": {"dir": "a", "steps": 5}}))
    (tmp_path / "mid.yaml").write_text(
        yaml.safe_dump({"base": "base.yaml", "run": {"dir": "b"}, "update": {"lr": 0.5}})
    )
    dark = {"dark": {"type": "brightness", "mode": "dark"}}
    (tmp_path / "top.yaml").write_text(yaml.safe_dump({"base": "mid.yaml", "update": {"epochs": 2}, "reward": dark}))
    config = load_config(tmp_path / "top.yaml", ["run.steps=7"])
    assert (config.run.dir, config.run.steps, config.update.lr, config.update.epochs) == ("b", 7, 0.5, 2)
    assert list(config.reward) == ["dark"]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("missing.yaml", r"missing.yaml \(the base of .*top.yaml\): No such file"),
        ("top.yaml", "base leads back to it, by .*top.yaml -> .*top.yaml"),
        (3, "base is 3, want the path of a config"),
    ],
)
def test_base_that_cannot_be_used_is_refused(tmp_path, base, message):
    (tmp_path / "top.yaml").write_text(yaml.safe_dump({"base": base}))
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "top.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_has_a_folder_of_its_own(path):
    config = load_config(path)
    assert config.run.dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.startswith("digits")], ids=lambda p: p.stem)
def test_every_digits_experiment_runs(path, tmp_path):
    overrides = ["policy.checkpoint=random", f"run.dir={tmp_path}/run", "run.steps=1", "run.device=cpu"]
    overrides += ["rollout.labels_per_step=2", "rollout.group_size=2", "update.minibatch=4", "eval.samples_per_label=1"]
    if load_config(path).policy.conditioned_on == "text":  # random weights have no tokenizer: texts are read as bytes
        overrides += ["policy.transformer.text_vocab_size=259", "policy.max_prompt_tokens=64", "eval.max_labels=2"]
    assert train(load_config(path, [*overrides, "log.tensorboard=false"])) == 0


# The same examples every time, so that a failure is a failure of the change at hand.
def fuzz(max_examples):
    fixtures = [HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=max_examples, deadline=None, derandomize=True, database=None, suppress_health_check=fixtures
    )


def keys(data, prefix=""):
    for name, value in data.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")


NUMBERS = st.one_of(
    st.integers().map(str), st.floats().map(str), st.sampled_from(["1e400", "0x_", "10" * 3000, "0x" + "f" * 9000])
)
# What YAML makes something else of than it seems.
ODD = ["null", "~", "=", "<<", "*a", "&a b", "!!python/object:os.system x", "2001-13-45", "1:99", "{[1]: 2}", "{1: 2}",
       "!!bool x", "!!int ''", "!!timestamp x", "- a", "a: b: c", "'", "\\x00", "\ufeff", "yes", "[1, 2]",
       "{type: brightness}", "{type: [1]}"]  # fmt: skip
VALUES = st.one_of(NUMBERS, st.sampled_from(ODD), st.text(max_size=20), st.lists(NUMBERS, max_size=4).map(str))


@fuzz(300)
@given(data=st.data())
def test_any_override_gives_a_config_or_an_input_error(make_config, tmp_path, data):
    config = make_config()
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    known = [
        *keys(config.model_dump()),
        "policy.preset",
        "rollout.micro_batch",
        "update.micro_batch",
        "reward.new.type",
    ]
    words = st.one_of(st.sampled_from(known), st.text(max_size=8), st.sampled_from(known).map(lambda k: k + ".x"))
    overrides = data.draw(st.lists(st.builds("{}={}".format, words, VALUES), max_size=3))
    with suppress(InputError):
        assert isinstance(load_config(path, overrides), Config)


@pytest.mark.parametrize("value", ["[" * 1000, "{a: " * 1000])
def test_yaml_that_is_too_deep_is_refused(value):
    with pytest.raises(InputError, match="is nested more than 32 deep"):
        parse_arguments([f"labels={value}"], SampleConfig)


@fuzz(100)
@given(
    content=st.one_of(st.binary(max_size=60), st.sampled_from(ODD).map(str.encode), VALUES.map(lambda t: t.encode()))
)
def test_any_file_gives_a_config_or_an_input_error(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_config(path)


def test_epilogue_without_a_gradient_is_refused_for_training(make_config):
    with pytest.raises(InputError, match="kernels.linear_gelu=epilogue has no gradient, and rollout, reference"):
        make_config(kernels__linear_gelu="epilogue")
    assert make_config(kernels__linear_gelu="quack").kernels.linear_gelu == "quack"
    assert make_config(kernels__linear_gelu="quack", policy__lora={"targets": ["proj"]}).policy.lora
    for where in ({"policy__lora": {"targets": ["fc1"]}}, {"run__parallel": "fsdp"}):
        with pytest.raises(InputError, match="kernels.linear_gelu=quack takes neither an adapter on fc1"):
            make_config(kernels__linear_gelu="quack", **where)


def test_names_of_kernels_are_those_of_the_implementations():
    """The schema lists them by itself: asking kernels/ would import PyTorch before a typo is answered."""
    from varfast.kernels import selection

    declared = {op: {"auto", *(i.name for i in impls)} for op, impls in selection.OPS.items()}
    listed = {op: set(get_args(field.annotation)) for op, field in KernelsConfig.model_fields.items()}
    assert listed == declared


# ---------------------------------------------------------------------------------------------------------------------
# YAML 1.2's idea of a value, in files and in overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("yes", "yes"), ("no", "no"),
        ("on", "on"), ("Off", "Off"), ("y", "y"), ("3", 3), ("-3", -3), ("017", 17), ("0o17", 15), ("0x1F", 31),
        ("1_000", "1_000"), ("1:30", "1:30"), ("1e-4", 1e-4), ("1E+3", 1000.0), (".5", 0.5), ("2.", 2.0),
        ("2026-01-01", "2026-01-01"), ("2001-13-45", "2001-13-45"), ("=", "="), ("'3'", "3"), ('"yes"', "yes"),
        ("-.inf", -math.inf), ("0b11", "0b11"), ("1e", "1e"), ("+.5e3", 500.0), ("<<", "<<"),
    ],
)  # fmt: skip
def test_a_scalar_means_what_yaml_1_2_says(text, value):
    data = {}
    apply_override(data, f"a.b={text}")
    assert data == {"a": {"b": value}}
    assert type(data["a"]["b"]) is type(value)
    assert read_yaml(f"[{text or 'null'}]", "x") == [value]


def test_dumped_yaml_is_read_back_and_by_yaml_1_1_too():
    texts = [
        "yes",
        "on",
        "1e-4",
        "1E5",
        "0o17",
        "017",
        "1_000",
        "1:30",
        "2026-01-01",
        "~",
        "null",
        "",
        "=",
        "<<",
        "a: b",
        " #",
    ]
    data = {"texts": texts, "numbers": [1e-4, 1e300, -0.0, 3, True, None]}
    assert read_yaml(dump_yaml(data), "x") == data
    assert yaml.safe_load(dump_yaml(data)) == data


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=yes", "run.steps: got 'yes'; want a whole number from 1"),
        ("run.steps=true", "run.steps: got true; want a whole number from 1"),
        ("run.steps=1_000", "write 1000, without quotes"),
        ("run.steps=1e3", "got 1000.0; want a whole number from 1 to 10**9; write 1000"),
        ("run.steps='3'", "run.steps: got '3'"),
        ("grpo.kl_beta=on", "grpo.kl_beta: got 'on'; want a number from 0"),
        ("update.lr=true", "update.lr: got true; want a number above 0"),
        ("log.checkpoint_every=on", "log.checkpoint_every: got 'on'"),
        ("reward.bright.weight=no", "reward.bright.weight: got 'no'"),
        ("log.tensorboard=yes", "log.tensorboard: got 'yes'; want true or false; write true"),
        ("log.tensorboard=1", "log.tensorboard: got 1; want true or false"),
        ("update.lr=.inf", "update.lr: got inf"),
        ("grpo.kl_beta=.nan", "grpo.kl_beta: got nan"),
        ("reward.bright.weight=.nan", "reward.bright.weight: got nan"),
        ("rollout.temperature=1e-40", "rollout.temperature: got 1e-40; want a number from 0.001 to 1000"),
        ("update.betas=[0.9, 1.0]", "update.betas.1: got 1.0; want a number from 0 to below 1"),
        ("update.betas=[2.0, 0.5]", "update.betas.0: got 2.0"),
        ("update.betas=[.nan, 0.5]", "update.betas.0: got nan"),
        ("update.betas=[0.9]", "update.betas.1 is missing"),
        ("policy.vqvae.channel_multipliers=[0]", "channel_multipliers.0: got 0; want a whole number from 1 to 64"),
        ("policy.vqvae.channel_multipliers=[1,1,1,1,1,1,1,1,1]", "want a list of 1 to 8 whole numbers"),
        ("policy.vqvae.num_phi=1000000000", "policy.vqvae.num_phi: got 1000000000; want a whole number from 0 to 128"),
        ("policy={checkpoint: random, var: {depth: 100000}}", "policy.var.depth: got 100000; want a whole number from"),
        ("policy={checkpoint: random, var: {vocab_size: 100000000000000}}", "policy.var.vocab_size: got 1000"),
        ("policy={checkpoint: random, var: {patch_nums: [1, 500]}}", "want sides of 1 to 128"),
        ("policy.vqvae={patch_nums: [128], channel_multipliers: [1,1,1,1,1,1,1]}", "want at most 4096 pixels"),
        ("eval.samples_per_label=10000000000000", "eval.samples_per_label: got 10000000000000"),
        ("run.device=gpu", "run.device: got 'gpu', want auto, cpu, cuda, or cuda:0"),
        ("run.device=cuda:300", "run.device: got 'cuda:300'"),
        ("run.timeout_s=1e300", "run.timeout_s: got 1e+300"),
        ("run.dir=''", "run.dir: got '', want a path"),
        ("run.dir=", "run.dir: got null; want a path"),
        ("run.dir=2026", "run.dir: got 2026; want a path; quotes make it text: 'run.dir=\"2026\"'"),
        ("run=5", "run: got 5; want a section; its keys: dir, steps, seed"),
        ("policy.lora=true", "want a section, or null; {} has its defaults; its keys: rank, alpha, targets"),
        ("policy=d16", "policy: got 'd16'; want a section; did you mean policy.preset=d16?"),
        ("reward.bright=brightness", "did you mean reward.bright.type=brightness?"),
        ("reward.brigth.threshold=0.5", "did you mean reward.bright?"),
        ("run.allow_change=update.lr", "in brackets, as run.allow_change=[update.lr]"),
        ("run.strict=1", "want true or false; write true"),
        ("run.device=0", "did you mean cuda:0?"),
        ("update.micro_batch=auto", "write null, or leave it out"),
        ("grpo.kl_beta=0.1,0.2", "varfast train CONFIG --sweep grpo.kl_beta=0.1,0.2"),
        ("log.wandb=true", "want text, or null: project of Weights & Biases"),
        ("kernels.attention=x", "kernels.block_causal_attention, kernels.cached_attention, kernels.decode_attention"),
        ("policy.lora.foo=1", "unknown key; known: rank, alpha, targets"),
        ("policy.num_classes=9", "did you mean policy.var.num_classes?"),
        ("pretrain.lr=1", "did you mean pretrain.vqvae_lr or pretrain.var_lr?"),
        ("reward={r: {type: function, function: ./a.py}}", "want the function's name too, as ./a.py:redness"),
        ("reward={r: {type: http, url: 'localhost:80'}}", "did you mean http://localhost:80?"),
        ("run.dir=$SCRATCH/r", "run.dir: got '$SCRATCH/r': $SCRATCH is not expanded here"),
        ("pretrain.cache_dir=${HOME}/c", "${HOME} is not expanded here"),
        ("run.dir=~nosuchuser/x", "there is no user 'nosuchuser'"),
        ("run.dir=s3://bucket/x", "want a path on this machine"),
        ("run.dir=" + "a" * 300, "255 bytes a name"),
        ("run.dir=\ud800", "holds bytes that are not UTF-8"),
        ("policy.preset=[1]", "policy.preset: got [1]; want d16, d20, d24, d30 or d36"),
        ("update.optimizer=adam", "did you mean adamw?"),
        ("kernels.conv3x3=cudnn", "kernels.conv3x3: got 'cudnn'; want auto, triton, library or reference"),
        ("rollout.labels=[1.5]", "rollout.labels: got [1.5], want numbers or names of labels, such as [0, 1, golden"),
        ("rollout.labels=[true]", "rollout.labels: got [True], want numbers or names of labels"),
        ("rollout.labels=", "rollout.labels: got null, want numbers or names of labels"),
        ("reward={c: {type: unifiedreward}}", "reward.c.type: got 'unifiedreward'; want brightness"),
        ("reward={c: {type: unifiedreward}}", "function or http takes any other model"),
        ("reward={c: {type: brightnes}}", "did you mean brightness?"),
        ("reward={c: {}}", "reward.c.type is missing; want brightness"),
        ("reward={c: {type: [1]}}", "reward.c.type: got [1]"),
        ("reward=brightness", "want rewards by names of your choice, such as {bright: {type: brightness}}"),
        ("reward={type: brightness}", "reward.type: got 'brightness'; want a section with a type"),
        ("reward={3: {type: brightness}}", "reward: got the key 3; want a name"),
        ("reward={r: {type: function, function: a.b}}", "reward.r.function: want module:name or file.py:name"),
        ("reward={r: {type: function}}", "reward.r.function is missing; want module:name"),
        ("reward={r: {type: function, function: '.a:x'}}", "want module:name"),
        ("reward={r: {type: function, function: 'a:b', args: {x: .nan}}}", "want finite numbers"),
        ("reward={r: {type: http, url: 'http://[::1/score'}}", "reward.r.url: 'http://[::1/score' is no address"),
        ("reward={r: {type: http, url: 'http://a..b/'}}", "is empty or too long"),
        ("run.\x1b[31mred=1", "run.'\\x1b[31mred': unknown key"),
        ("run.seed=" + "9" * 5000, "a number of 5000 digits"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_meant_are_refused_in_words(tmp_path, override, message):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(InputError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)
    assert not re.search(r"\^|\\w|literal\[|list\[|function-|Input should", str(caught.value))


def test_values_of_a_command_line_are_not_cut_at_a_comment_or_colon(tmp_path):
    data = {}
    for override in ("out=a #2.png", "p=a: b", "q=- x", "r=*stars*", "s= x ", "t={a: 1}", "u=[a, 'b #']"):
        apply_override(data, override)
    assert data == {
        "out": "a #2.png",
        "p": "a: b",
        "q": "- x",
        "r": "*stars*",
        "s": "x",
        "t": {"a": 1},
        "u": ["a", "b #"],
    }


@pytest.mark.parametrize("value", ["3", "0,3", "[0, 3]", "0, 3"])
def test_labels_need_no_brackets(value):
    config = parse_arguments(["checkpoint=a", f"labels={value}"], SampleConfig)
    assert config.labels == ([3] if value == "3" else [0, 3])
    assert parse(rollout__labels=3).rollout.labels == [3]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("learning_rate", "did you mean update.lr?"),
        ("update.learning_rate", "did you mean update.lr?"),
        ("grpo.beta", "did you mean grpo.kl_beta? (weight of the KL"),
        ("num_generations", "did you mean rollout.group_size?"),
        ("output_dir", "did you mean run.dir?"),
        ("max_steps", "did you mean run.steps? (rollouts; each is followed by several optimizer steps)"),
        ("guidance_scale", "did you mean rollout.cfg?"),
        ("num_samples", "did you mean rollout.group_size?"),
        ("per_device_train_batch_size", "update.micro_batch: images a forward and backward pass"),
        ("gradient_accumulation_steps", "did you mean update.micro_batch?"),
        ("seed", "did you mean run.seed?"),
        ("epsilon", "did you mean grpo.clip_eps?"),
        ("lora_r", "did you mean policy.lora.rank?"),
        ("report_to", "did you mean log.wandb?"),
        ("save_steps", "did you mean log.checkpoint_every?"),
        ("resume_from_checkpoint", "the same command on the same run.dir goes on"),
        ("reward_funcs", "did you mean reward?"),
        ("update.kl_beta", "did you mean grpo.kl_beta?"),
        ("lr", "did you mean update.lr?"),
    ],
)
def test_names_of_other_trainers_lead_to_ours(tmp_path, key, message):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(InputError) as caught:
        load_config(path, [f"{key}=1"])
    assert f"{key}: unknown key; " in str(caught.value)
    assert message in str(caught.value)


def test_every_alias_leads_to_a_key_of_some_command():
    models = (Config, SampleConfig, EvaluateConfig, ExportConfig, ReportConfig)
    for name, meanings in ALIASES.items():
        assert meanings, name
        for key, note in meanings:
            assert note if not key else any(schema.exists(model, key) for model in models), (name, key)


def test_sample_and_evaluate_know_the_names_of_diffusers():
    for name, ours in {"guidance_scale": "cfg", "num_samples": "samples_per_label", "output_dir": "out"}.items():
        with pytest.raises(InputError, match=rf"{name}: unknown key; did you mean {ours}\?"):
            parse_arguments(["checkpoint=x", f"{name}=3"], SampleConfig)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("update: {lr: 1}\ngrpo: {}\nupdate: {epochs: 2}\n", "key update stands on lines 1 and 3"),
        ("update:\n  lr: 1\n  epochs: 2\n  lr: 2\n", "key lr stands on lines 2 and 4"),
        ("reward: {a: {type: brightness}, a: {type: brightness}}\n", "key a stands on line 1, twice"),
        ("? [a]\n: b\n", "line 1: a key is a list or a section, want a name"),
        ("a: !!python/object:os.system x\n", "the tag !!python/object:os.system is not read"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: &a [*a]\n", "nested more than 32 deep"),
        ("a: &a {b: *a}\n", "nested more than 32 deep"),
        ("", "got nothing at the top"),
        ("update.lr: 1\n", "update.lr: unknown key; in a file write update: {lr: ...}"),
        ("base: /dev/zero\n", "is a device, pipe or socket, want a YAML file"),
        ("base: .\n", "is a folder, want a YAML file"),
        ("base: pipe\n", "is a device, pipe or socket"),
        ("base: utf16.yaml\n", "is UTF-16 or UTF-32; save it as UTF-8"),
        ("base: binary.yaml\n", "is not text in UTF-8"),
        ("base: large.yaml\n", "has more than 256 KiB"),
        ("base: ~nosuchuser/x.yaml\n", "there is no user 'nosuchuser'"),
        ("base: ''\n", "want a path"),
    ],
)
def test_files_that_cannot_be_meant_are_refused_at_once(tmp_path, text, message):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "utf16.yaml").write_bytes("a: 1".encode("utf-16"))
    (tmp_path / "binary.yaml").write_bytes(bytes(range(128, 256)))
    (tmp_path / "large.yaml").write_text("# x\n" * 70_000)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_a_key_of_a_merge_is_no_second_key():
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n", "x") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}
    assert read_yaml("a: &a {x: 1}\nb: &b {z: 1}\nc: {<<: [*a, *b]}\n", "x")["c"] == {"x": 1, "z": 1}


def test_an_override_changes_one_of_two_sections_that_share_an_anchor(tmp_path):
    path = tmp_path / "x.yaml"
    rewards = "reward: {a: &r {type: brightness, weight: 1.0}, b: *r}\n"
    path.write_text("run: {dir: r, steps: 3}\npolicy: {preset: d16, checkpoint: random}\n" + rewards)
    config = load_config(path, ["reward.a.weight=0.5"])
    assert (config.reward["a"].weight, config.reward["b"].weight) == (0.5, 1.0)


def test_bom_and_crlf_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(yaml.safe_dump(MINIMAL).replace("\n", "\r\n").encode("utf-8-sig"))
    assert load_config(path).run.steps == 3


def test_functions_and_urls_that_can_be_meant_are_taken():
    for function in ("my_rewards:redness", "a.b.c:d", "rewards/mine.py:score", "./mine.py:score", "__main__:score"):
        assert parse(reward={"r": {"type": "function", "function": function}}).reward["r"].function == function
    for url in ("http://127.0.0.1:8000/score", "https://scores.example/a?b=c", "http://[::1]:80/", "http://localhost"):
        assert parse(reward={"r": {"type": "http", "url": url}}).reward["r"].url == url


LLAMAGEN = {"family": "llamagen", "preset": "B", "checkpoint": "random"}


def test_policy_is_of_the_family_that_it_names():
    assert parse(policy=LLAMAGEN).policy.family == "llamagen"
    assert parse().policy.family == "var"
    with pytest.raises(InputError, match=r"policy.patch_nums: unknown key"):
        parse(policy=LLAMAGEN | {"patch_nums": [1, 2]})
    with pytest.raises(InputError, match=r"policy.vqvae_checkpoint: unknown key beside llamagen, which has other keys"):
        parse(policy=LLAMAGEN | {"vqvae_checkpoint": "x.pth"})
    with pytest.raises(
        InputError, match=r"policy.family: got 'lamagen'; want var, llamagen, taming or janus; did you mean"
    ):
        parse(policy=LLAMAGEN | {"family": "lamagen"})


def test_a_policy_of_another_family_takes_the_place_of_that_of_the_base(tmp_path):
    (tmp_path / "a.yaml").write_text(dump_yaml(MINIMAL | {"policy": {"preset": "d16", "checkpoint": "random"}}))
    (tmp_path / "b.yaml").write_text(dump_yaml({"base": "a.yaml", "policy": LLAMAGEN}))
    (tmp_path / "c.yaml").write_text(dump_yaml({"base": "b.yaml", "policy": {"preset": "L"}}))
    assert load_config(tmp_path / "b.yaml").policy.preset == "B"
    assert load_config(tmp_path / "c.yaml", ["policy.family=llamagen"]).policy.preset == "L"
