import copy
from contextlib import suppress
from pathlib import Path
from typing import get_args

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from varfast import InputError
from varfast.checkpoint import dump_config
from varfast.config import Config, KernelsConfig, SampleConfig, VARConfig, load_config, parse_arguments, parse_config
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


def test_a_moving_reference_does_not_go_with_an_adapter(make_config):
    with pytest.raises(InputError, match="grpo.reference_every with policy.lora: the reference is the base"):
        make_config(policy__lora={"rank": 2}, grpo__reference_every=5)


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
        ("reward__c", {"type": "clip"}, "reward.c: give prompt, or label_prompt and names, one of the two"),
        ("reward__c", {"type": "clip", "prompt": "x", "names": ["y"]}, "reward.c: label_prompt and names go together"),
        ("reward__c", {"type": "clip", "prompt": " "}, "reward.c: prompt is blank"),
        ("reward__c", {"type": "clip", "label_prompt": "a {nam}", "names": ["y"]}, "has no {name}"),
        ("reward__c", {"type": "clip", "label_prompt": "a {name}"}, "reward.c: label_prompt and names go together"),
        ("reward__c", {"type": "aesthetic", "dtype": "float16"}, "reward.c.dtype: got 'float16'"),
        ("grpo__combine", "sum", "grpo.combine: got 'sum'"),
        ("grpo", {"kl_beta": 0, "reference_every": 5}, "grpo: reference_every=5 with kl_beta=0, which holds no ref"),
        ("grpo__reference_every", 0, "grpo.reference_every: got 0"),
        ("update__ema_decay", 1.0, "update.ema_decay: got 1.0; want a number above 0 to below 1, or null"),
        ("update__ema_decay", 0, "update.ema_decay: got 0; want a number above 0 to below 1, or null"),
        ("reward__bright__type", "brigtness", "want brightness, function"),
        ("reward", {}, "reward: got {}"),
        ("run__device", "tpu", "run.device: got 'tpu'"),
    ],
)
def test_parse_config_says_what_is_wrong(key, value, message):
    with pytest.raises(InputError) as caught:
        parse(**{key: value})
    assert message in str(caught.value)


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
    with pytest.raises(InputError, match="got list at the top"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_parse_arguments_of_sample():
    config = parse_arguments(["checkpoint=a.pth", "labels=[1,2]", "cfg=4"], SampleConfig)
    assert (config.checkpoint, config.labels, config.cfg) == ("a.pth", [1, 2], 4.0)
    with pytest.raises(InputError, match="lables: unknown key; did you mean labels"):
        parse_arguments(["checkpoint=a", "lables=[1]"], SampleConfig)


def test_every_shipped_config_is_valid_and_every_field_documented():
    from pathlib import Path

    from pydantic import BaseModel

    from varfast import config as module

    paths = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert {p.name for p in paths} >= {"digits.yaml", "d16_brightness.yaml", "d30.yaml"}
    for path in paths:
        load_config(path)
    for section in vars(module).values():
        if isinstance(section, type) and issubclass(section, BaseModel) and not issubclass(section, Config):
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

    declared = {op: {"auto", *(i.name for i in impls)} for op, impls in selection._OPS.items()}
    listed = {op: set(get_args(field.annotation)) for op, field in KernelsConfig.model_fields.items()}
    assert listed == declared
