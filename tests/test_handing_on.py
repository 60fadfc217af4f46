"""An export that is whole: for a receiver who has neither this machine nor what the run started from."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from varfast import InputError, load_policy
from varfast.cards.markdown import Result, front_matter
from varfast.config import Config, parse_config
from varfast.export import file_card, main
from varfast.runs.config import ExportConfig
from varfast.runs.folder import RunFolder
from varfast.settings.private import public_settings, public_text, without_homes
from varfast.train import train

VAR = {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one step that is complete, in a folder of somebody's home."""
    home = tmp_path_factory.mktemp("home") / "alice"
    data = {
        "run": {"dir": str(home / "secret project" / "run"), "steps": 1, "device": "cpu"},
        "policy": {"checkpoint": "random", "var": VAR, "vqvae": {"base_channels": 32, "channel_multipliers": [1],
                                                                "num_res_blocks": 1}},
        "pretrain": {"cache_dir": str(home / "cache")},
        "rollout": {"labels_per_step": 2, "group_size": 4},
        "reward": {"luma": {"type": "brightness", "mode": "raw"}},
        "update": {"minibatch": 4},
        "log": {"tensorboard": False, "grid_labels": 2, "grid_samples": 2},
        "eval": {"samples_per_label": 2},
    }  # fmt: skip
    assert train(parse_config(data)) == 0
    return RunFolder(data["run"]["dir"])


def no_leak(text):
    return not re.search(r"alice|secret project|/tmp/|/home/|/root/|\.cache", text)


def test_export_of_a_folder_is_the_run_bit_for_bit(finished, tmp_path, capsys):
    out = tmp_path / "digits-bright"
    assert main([str(finished.path), f"out={out}/"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "var.safetensors", "vqvae.safetensors", "config.json", "README.md", "samples_before.png", "samples_after.png",
    }  # fmt: skip
    assert f"digits-bright/: 1.0 MB, float32. Model card: {out / 'README.md'}" in capsys.readouterr().out
    run, received = load_policy(str(finished.path)), load_policy(out)
    a, b = run.sample([0, 4], seed=1), received.sample([0, 4], seed=1)
    assert torch.equal(a.logp_BL, b.logp_BL)
    assert torch.equal(run.decode(a.tokens_BL), received.decode(a.tokens_BL))
    for name in ("samples_before.png", "samples_after.png"):
        with Image.open(out / name) as picture:
            assert picture.height > 90
    config = json.loads((out / "config.json").read_text())
    assert config["policy"]["var"] == parse_config(yaml.safe_load(finished.config.read_text())).policy.sizes.model_dump(
        mode="json"
    )
    assert all(no_leak((out / name).read_text()) for name in ("config.json", "README.md"))


def test_the_card_of_a_folder_is_metadata_samples_and_numbers(finished, tmp_path):
    main([str(finished.path), f"out={tmp_path / 'model'}"])
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "varfast"
    assert card.data.tags == ["autoregressive", "var", "class-conditional", "grpo", "fine-tuned"]
    assert card.data.model_name == "model"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    summary = json.loads((finished.path / "summary.json").read_text())
    assert found == {name: pytest.approx(value) for name, value in summary["after"].items()}
    assert "| before | after |" in card.text
    assert "![samples before training](samples_before.png)" in card.text
    assert "varfast.load_policy('model')" in card.text
    assert "| numbers in var.safetensors | float32 |" in card.text


def test_results_are_read_back_as_the_hub_reads_them():
    config = parse_config({"run": {"dir": "r", "steps": 1}, "policy": {"preset": "d16", "checkpoint": "random"},
                           "reward": {"a": {"type": "brightness"}}})  # fmt: skip
    results = [Result("fid", "FID", 12.5, "samples of all labels"), Result("accuracy", "a: b\n---", 0.5, "x", "y")]
    text = front_matter(config.policy, "m", ["grpo"], "FoundationVision/var", ["owner/set"], results)
    data = ModelCard(text + "\n\n# m\n").data
    assert (data.base_model, data.datasets, data.license) == ("FoundationVision/var", ["owner/set"], None)
    assert [(r.metric_type, r.metric_value, r.dataset_name) for r in data.eval_results] == [
        ("fid", 12.5, "samples of all labels"), ("accuracy", 0.5, "x")]  # fmt: skip


def test_both_formats_of_a_model_lie_beside_each_other_with_one_card(finished, tmp_path):
    run = str(finished.path)
    main([run, f"out={tmp_path / 'model.safetensors'}"])
    main([run, f"out={tmp_path / 'model.pth'}", "dtype=bfloat16"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors", "model.vqvae.safetensors", "model.pth", "model.vqvae.pth", "model.md"}  # fmt: skip
    card = (tmp_path / "model.md").read_text()
    assert "| numbers in model.safetensors | float32 |\n| numbers in model.pth | bfloat16 |" in card
    assert no_leak(card)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(saved[name].bfloat16(), tensor)
        for name, tensor in torch.load(tmp_path / "model.pth", weights_only=True).items()
        if tensor.is_floating_point()
    )
    with pytest.raises(InputError, match=r"model.pth exists; choose another out, or overwrite=true"):
        main([run, f"out={tmp_path / 'model.pth'}"])
    for name in ("model.pth", "model.vqvae.pth"):
        (tmp_path / name).unlink()
    other = card.replace(re.search(r"sha256 (\w{12})", card)[1], "0" * 12)
    (tmp_path / "model.md").write_text(other)
    with pytest.raises(InputError, match=r"model.md exists; choose another out, or overwrite=true"):
        main([run, f"out={tmp_path / 'model.pth'}"])
    assert (tmp_path / "model.md").read_text() == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "out is missing; want a file, as model.safetensors, a folder, as model/, or hub="),
        (["out=a.bin"], "got a.bin, want a name that ends with .safetensors or .pth, or a folder, as a.bin/"),
        (["out=a.pth", "hub=me/a"], "got a.pth; with hub=me/a want a folder, as a/, or no out"),
        (["out=a/", "private=true"], "private is of an upload; give hub=owner/name too"),
        (
            ["out={tmp}/a/", "vqvae=false"],
            "vqvae=false: a folder is whole; for the transformer alone use out=model.saf",
        ),
        (["out={tmp}/a.pth", "vqvae=false"], "vqvae=false: the frozen part came from no hf:// address"),
        (["out={tmp}/a/", "shard_gb=1"], "shard_gb=1 is for janus; here policy.family=var"),
        (["out={run}"], "is a run folder; choose another one for the model"),
        (["hub=a/b/c"], "'a/b/c' is no repository of the hub; want owner/name"),
        (["hub=me/a", "out={tmp}/a/"], "me/a cannot be written: there is no login for the hub; log in with `hf auth"),
    ],
)
def test_export_refuses_what_is_not_whole(finished, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    filled = [a.replace("{tmp}", str(tmp_path)).replace("{run}", str(finished.path)) for a in arguments]
    with pytest.raises(InputError, match=message):
        main([str(finished.path), *filled])
    assert not any(tmp_path.iterdir())


def test_a_folder_with_a_model_is_replaced_only_with_overwrite(finished, tmp_path):
    arguments = [str(finished.path), f"out={tmp_path / 'm'}"]
    main(arguments)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"var.safetensors exists; choose another out, or overwrite=true"):
        main(arguments)
    assert main([*arguments, "overwrite=true", "dtype=bfloat16"]) == 0
    assert load_file(tmp_path / "m" / "var.safetensors")["pos_1LC"].dtype == torch.bfloat16
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"


def test_pictures_that_are_none_are_left_out(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    grids = sorted((run / "grids").glob("*.png"))
    (tmp_path / "secret").write_bytes(b"\x89PNG\r\n\x1a\nprivate")
    grids[0].unlink()
    grids[0].symlink_to(tmp_path / "secret")
    grids[-1].write_text("<svg onload=alert(1)>")
    main([str(run), f"out={tmp_path / 'm'}"])
    assert not list((tmp_path / "m").glob("*.png"))
    assert "## Samples" not in (tmp_path / "m" / "README.md").read_text()


def test_a_base_from_the_hub_comes_with_its_vqvae_and_may_be_left_out(make_config, tmp_path, monkeypatch, make_models):
    var, vqvae = make_models(patch_nums=(1, 2), vocab_size=16, code_width=4)
    for name, model in (("var.pth", var), ("vae.pth", vqvae)):
        torch.save(model.state_dict(), tmp_path / name)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    config = make_config(run__steps=1, eval__samples_per_label=0, policy__checkpoint="hf://owner/base/var.pth",
                         policy__vqvae_checkpoint="hf://owner/base/vae.pth")  # fmt: skip
    assert train(config) == 0
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    main([config.run.dir, f"out={tmp_path / 'a.pth'}", "vqvae=false"])
    card = (tmp_path / "a.md").read_text()
    assert "vqvae='hf://owner/base/vae.pth')" in card
    assert ModelCard(card).data.base_model == "owner/base"
    main([config.run.dir, f"out={tmp_path / 'b.pth'}"])
    written = torch.load(tmp_path / "b.vqvae.pth", weights_only=True)
    assert all(torch.equal(written[name], tensor) for name, tensor in vqvae.state_dict().items())
    main([config.run.dir, f"out={tmp_path / 'm'}"])
    assert load_policy(tmp_path / "m").base_model == "owner/base"
    (Path(config.run.dir) / "base" / "vqvae.pth").unlink()
    (tmp_path / "vae.pth").unlink()
    with pytest.raises(InputError) as error:
        main([config.run.dir, f"out={tmp_path / 'c.pth'}"])
    assert "vqvae=false" in error.value.__notes__[0]


def test_export_to_the_hub_uploads_the_folder_and_leaves_nothing_behind(finished, tmp_path, monkeypatch, capsys):
    uploaded = {}

    def upload(folder, names, repo_id, private, revision, commit_message):
        files = {name: (folder / name).read_bytes() for name in names}
        uploaded.update(folder=folder, files=files, how=(repo_id, private, revision, commit_message))
        return "https://huggingface.co/me/digits/commit/1"

    monkeypatch.setattr("varfast.export.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "t")
    assert main([str(finished.path), "hub=me/digits", "private=true", "revision=v2", "commit_message=first"]) == 0
    assert "Uploaded: https://huggingface.co/me/digits/commit/1" in capsys.readouterr().out
    assert uploaded["how"] == ("me/digits", True, "v2", "first")
    assert uploaded["files"].keys() == {"var.safetensors", "vqvae.safetensors", "config.json", "README.md",
                                        "samples_before.png", "samples_after.png"}  # fmt: skip
    card = uploaded["files"]["README.md"].decode()
    assert "varfast.load_policy('me/digits')" in card
    assert no_leak(card)
    assert not uploaded["folder"].exists()
    assert main([str(finished.path), "hub=me/digits", f"out={tmp_path / 'kept'}/"]) == 0
    assert load_policy(tmp_path / "kept").image_size == load_policy(str(finished.path)).image_size


# ---------------------------------------------------------------------------------------------------------------------
# What strangers see of the settings


@pytest.mark.parametrize(
    ("text", "is_path", "shown"),
    [
        ("/data/alice/var_d16.pth", False, "var_d16.pth"),
        ("~/models/", False, "models"),
        ("runs/alice/first", True, "first"),
        ("weights/alice/head.pth", False, "head.pth"),
        ("./rewards/mine.py:redness", False, "mine.py:redness"),
        ("alice/mine.py:redness", False, "mine.py:redness"),
        ("my_rewards:redness", False, "my_rewards:redness"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", False, "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("is it a cat and/or a dog?", False, "is it a cat and/or a dog?"),
        ("hf://FoundationVision/var/var_d16.pth", True, "hf://FoundationVision/var/var_d16.pth"),
        ("https://user:secret@example.com/a/b.pth?sig=1#x", True, "https://example.com/a/b.pth"),
        ("http://10.1.2.3:8000/score", False, "http://a-server-of-ours/score"),
        ("http://gpu-box:8000/score", False, "http://a-server-of-ours/score"),
        ("http://127.0.0.1/v1", False, "http://a-server-of-ours/v1"),
        ("s3://alices-bucket/x", True, "s3://a-server-of-ours"),
        ("/", False, "a path"),
        ("digits", True, "digits"),
    ],
)
def test_public_text_keeps_what_a_stranger_can_use(text, is_path, shown):
    assert public_text(text, is_path) == shown


def test_public_settings_finds_the_paths_by_the_schema_and_below_free_keys():
    data = {
        "run": {"dir": "runs/alice", "steps": 3},
        "pretrain": {"cache_dir": "cache/alice", "dataset": "alice/birds"},
        "policy": {"checkpoint": "alice/base", "vqvae_checkpoint": "alice/vae.pth"},
        "prompts": {"source": "alice/prompts.txt"},
        "reward": {
            "mine": {"type": "function", "function": "alice/mine.py:f", "args": {"a": {"b": ["/home/alice/x.npz", 3]}}},
            "loo": {"type": "loo_fid", "reference": "alice/real", "cache_dir": "alice"},
        },
    }
    assert public_settings(Config, data) == {
        "run": {"steps": 3},
        "pretrain": {"dataset": "birds"},
        "policy": {"checkpoint": "base", "vqvae_checkpoint": "vae.pth"},
        "prompts": {"source": "prompts.txt"},
        "reward": {
            "mine": {"type": "function", "function": "mine.py:f", "args": {"a": {"b": ["x.npz", 3]}}},
            "loo": {"type": "loo_fid", "reference": "real"},
        },
    }


def test_without_homes_keeps_the_rest():
    assert without_homes("see /home/alice/x and /Users/bob, https://a.com/home/page /root/y") == (
        "see ~/x and ~, https://a.com/home/page ~/y"
    )


def test_no_setting_of_a_config_that_names_paths_everywhere_leaks(make_config, tmp_path):
    file = str(tmp_path / "alice" / "x.pth")
    rewards = {
        "a": {"type": "aesthetic", "head": file, "pretrained": file},
        "b": {"type": "clip", "label_prompt": "a {name}", "names": file, "pretrained": file},
        "c": {"type": "imagereward", "prompt": "a", "pretrained": file, "vocabulary": file},
        "d": {"type": "classifier", "file": file},
        "e": {"type": "http", "url": "http://alice-gpu:80/"},
        "f": {"type": "function", "function": f"{tmp_path}/alice/r.py:f", "args": {"at": file}},
    }
    config = make_config(policy__checkpoint=file, policy__vqvae_checkpoint=file, reward=rewards,
                         pretrain__dataset=str(tmp_path / "alice" / "birds"))  # fmt: skip
    folder = RunFolder(config.run.dir)
    folder.prepare(config)
    card = file_card(Path("m.pth"), ExportConfig(checkpoint="x", out="m.pth"), folder, config, 2, {})
    assert "alice" not in card
    assert str(tmp_path) not in card
    assert np.all([name in card for name in ("x.pth", "r.py:f")])
