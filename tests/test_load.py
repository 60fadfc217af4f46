from pathlib import Path

import pytest
import torch

import varfast
from varfast import InputError, load_policy
from varfast.models import VARConfig
from varfast.policies import device
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_run
from varfast.train import train

LABELS = [0, 1, 2, 3]


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_load_policy_takes_a_run_folder(make_config, lora):
    config = make_config(run__steps=1, policy__lora=lora)
    assert train(config) == 0
    policy = load_policy(config.run.dir)
    trained = load_run(RunFolder(config.run.dir), torch.device("cpu"), "float32")
    assert isinstance(policy, varfast.Policy)
    assert torch.equal(policy.sample(LABELS, seed=0).logp_BL, trained.sample(LABELS, seed=0).logp_BL)
    delivered = torch.load(RunFolder(config.run.dir).weights(config), weights_only=True)
    state = (
        policy.trainable.state_dict() if lora is None else policy.merged_state(policy.frozen_copy().var.state_dict())
    )
    assert all(torch.equal(state[name], tensor) for name, tensor in delivered.items())


def test_a_run_folder_is_one_whatever_was_exported_into_it(make_config):
    config = make_config(run__steps=1, eval__samples_per_label=0)
    assert train(config) == 0
    (
        Path(config.run.dir) / "model.safetensors"
    ).touch()  # a folder as transformers writes it has one, and no config.yaml
    policies = load_policy(config.run.dir), load_policy(Path(config.run.dir))
    assert torch.equal(*(policy.sample(LABELS, seed=0).tokens_BL for policy in policies))


def test_load_policy_of_a_run_folder_runs_as_the_run_did_unless_it_is_told(make_config):
    config = make_config(run__steps=1, run__fast=False, run__strict=True)
    assert train(config) == 0
    assert (load_policy(config.run.dir).fast, load_policy(config.run.dir).strict) == (False, True)
    told = load_policy(config.run.dir, dtype="bfloat16", fast=True, strict=False)
    assert (told.fast, told.strict, told.var.compute_dtype) == (True, False, torch.bfloat16)
    with pytest.raises(InputError, match="is a run folder, whose config says the sizes; give no sizes beside it"):
        load_policy(config.run.dir, var_config=VARConfig())


def test_load_policy_says_what_is_missing(tmp_path):
    weights = tmp_path / "var.pth"
    with pytest.raises(
        InputError, match=r"var=.*var.pth does not exist; want a run folder, or a transformer's weights"
    ):
        load_policy(str(weights))
    weights.touch()
    with pytest.raises(InputError, match=r"var=.*var.pth is not a run folder, so vqvae=... is needed too"):
        load_policy(str(weights))
    with pytest.raises(InputError, match=r"config.yaml"):
        load_policy(str(tmp_path))


def test_existing_device_refuses_what_this_machine_does_not_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.existing_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(InputError, match="device=cuda:1: this machine has 1 GPUs; use cpu"):
        device.existing_device("cuda:1")
    with pytest.raises(InputError, match="device='gpu': want cpu, cuda or cuda:1"):
        device.existing_device("gpu")
