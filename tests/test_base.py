"""What runs started from, in folders that are moved, damaged, of an earlier version, or made by somebody else."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import varfast.evaluate
import varfast.export
import varfast.pretraining.cache
import varfast.sample
from varfast import InputError, load_policy
from varfast.runs.base import Base, FileNote
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_base, load_run
from varfast.runs.manifest import dump_config
from varfast.train import train

from .runs import assert_same_run, metrics, weights

CPU = torch.device("cpu")
PARTS = ("var", "vqvae")
PRETRAINED = {
    "policy__checkpoint": "pretrain",
    "policy__var": {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 10},
    "policy__vqvae": {"base_channels": 32, "channel_multipliers": [1, 1, 1], "num_res_blocks": 1},
    "pretrain__vqvae_steps": 2,
    "pretrain__var_steps": 2,
    "update__lr": 1e-3,
    "eval__samples_per_label": 1,
}
SIZES = {"patch_nums": (1, 2), "vocab_size": 16, "code_width": 4, "num_classes": 5}


def damage(path, how):
    content = bytearray(path.read_bytes())
    path.unlink()  # not through a hard link
    content[len(content) // 2] ^= 4
    if how != "deleted":
        path.write_bytes({"flipped": content, "truncated": content[:100], "empty": b""}[how])


@pytest.fixture
def pretrainings(monkeypatch):
    """A list that grows by one for each base that is trained."""
    made, pretrain = [], varfast.pretraining.cache.pretrain
    monkeypatch.setattr(varfast.pretraining.cache, "pretrain", lambda *given: made.append(1) or pretrain(*given))
    return made


def read_all(run, out):
    """What the commands make of a run folder, bit for bit."""
    out.mkdir()
    varfast.sample.main([f"checkpoint={run}", f"out={out}/grid.png", "device=cpu", "samples_per_label=2"])
    varfast.export.main([f"checkpoint={run}", f"out={out}/model.safetensors"])
    varfast.evaluate.main([f"checkpoint={run}", f"out={out}/evaluation", "device=cpu", "samples_per_label=1"])
    rows = json.loads((out / "evaluation" / "evaluation.json").read_text())["rows"]
    shutil.move(out / "evaluation" / "pictures.png", out)
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".png", ".safetensors")}
    assert set(files) == {"grid.png", "model.safetensors", "model.vqvae.safetensors", "pictures.png"}
    return files, rows


def test_a_copied_run_folder_whose_cache_is_gone_gives_the_same_bits(make_config, tmp_path, monkeypatch, pretrainings):
    """From another working directory, with a cache by a relative path."""
    monkeypatch.chdir(tmp_path)
    run = {**PRETRAINED, "pretrain__cache_dir": "cache", "run__dir": "run"}
    train(make_config(**run | {"run__dir": "whole"}, run__steps=4))
    train(make_config(**run, run__steps=2))
    before = read_all("run", tmp_path / "a")
    varfast.evaluate.main(["checkpoint=run", "device=cpu", "samples_per_label=1"])  # into the run folder
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "run", "copy")
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    assert read_all("copy", tmp_path / "b") == before
    varfast.evaluate.main(["checkpoint=copy", "device=cpu", "samples_per_label=1"])  # as it did there
    train(make_config(**run | {"run__dir": "copy"}, run__steps=4))
    assert_same_run(tmp_path / "whole", "copy")
    assert len(pretrainings) == 1
    assert not Path("cache").exists()


@pytest.mark.parametrize("how", [("flipped", "deleted"), ("truncated", "empty")])
def test_a_damaged_base_is_brought_back_bit_for_bit(make_config, tmp_path, capsys, pretrainings, how):
    """From the cache; where that is damaged too it is made again, with the same SHA-256."""
    folder = RunFolder(make_config().run.dir)
    train(make_config(**PRETRAINED, run__steps=1))
    base, noted = Base(folder), json.loads(folder.base.read_text())
    for part, damaged in zip(PARTS, how, strict=True):
        damage(base.find(part), damaged)
        assert base.find(part) == Path(noted[part]["path"])  # the cache's
    train(make_config(**PRETRAINED, run__steps=2))
    assert [base.find(part).parent.name for part in PARTS] == ["base", "base"]
    assert len(pretrainings) == 1
    for part, damaged in zip(PARTS, how, strict=True):
        damage(base.find(part), damaged)
        damage(Path(noted[part]["path"]), damaged)
    with pytest.raises(
        InputError, match=rf"(?s)the VQ-VAE .* is not there as it was:.*{noted['vqvae']['file']['sha256']}"
    ):
        load_run(folder, CPU, "float32")  # nothing is made where a folder is only read
    assert len(pretrainings) == 1
    capsys.readouterr()
    train(make_config(**PRETRAINED, run__steps=3))
    assert "it is had again from policy.checkpoint=pretrain" in capsys.readouterr().out
    assert len(pretrainings) == 2
    assert json.loads(folder.base.read_text()) == noted
    whole = make_config(**PRETRAINED, run__steps=3, run__dir=str(tmp_path / "whole"))
    train(whole)
    assert_same_run(whole.run.dir, folder.path)


def test_a_base_that_cannot_be_had_again_bit_for_bit_ends_the_run(make_config, monkeypatch):
    config = make_config(**PRETRAINED, run__steps=1)
    train(config)
    base = Base(RunFolder(config.run.dir))
    shutil.rmtree(config.pretrain.cache_dir)
    damage(base.find("var"), "flipped")
    pretrain = varfast.pretraining.cache.pretrain

    def other(config, device):
        var, vqvae, report = pretrain(config, device)
        var.head.bias.data += 1.0
        return var, vqvae, report

    monkeypatch.setattr(varfast.pretraining.cache, "pretrain", other)
    with pytest.raises(InputError, match="the transformer .* is not there as it was") as caught:
        train(make_config(**PRETRAINED, run__steps=2))
    assert "it cannot be had again from policy.checkpoint=pretrain: " in caught.value.__notes__[0]
    assert metrics(config.run.dir)[-1]["step"] == 1


@pytest.fixture
def files(make_config, make_models, tmp_path):
    """A run that starts from files in a folder given/, and that folder."""
    given = tmp_path / "given"
    given.mkdir()
    var, vqvae = make_models(**SIZES)
    torch.save(var.state_dict(), given / "v.pth")
    save_file(vqvae.state_dict(), given / "q.safetensors")
    paths = {"policy__checkpoint": f"{given}/v.pth", "policy__vqvae_checkpoint": f"{given}/q.safetensors"}
    return lambda **more: make_config(**paths, eval__samples_per_label=0, **more), given


def test_given_files_are_linked_and_so_outlive_their_names(files, tmp_path):
    make, given = files
    train(make(run__steps=3, run__dir=str(tmp_path / "whole")))
    train(make(run__steps=1))
    inside = tmp_path / "run" / "base"
    assert {path.name for path in inside.iterdir()} == {"var.pth", "vqvae.safetensors"}
    assert all(
        inside.joinpath(a).samefile(given / b)
        for a, b in (("var.pth", "v.pth"), ("vqvae.safetensors", "q.safetensors"))
    )
    shutil.rmtree(given)
    train(make(run__steps=3))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_on_another_disk_the_vqvae_is_copied_and_the_transformer_named(files, tmp_path, monkeypatch):
    make, given = files

    def refuse(*args, **kwargs):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    train(make(run__steps=3, run__dir=str(tmp_path / "whole")))
    train(make(run__steps=1))
    folder = RunFolder(tmp_path / "run")
    assert {path.name for path in (folder.path / "base").iterdir()} == {"vqvae.safetensors"}
    assert not (folder.path / "base" / "vqvae.safetensors").samefile(given / "q.safetensors")
    given.rename(tmp_path / "moved")
    load_run(folder, CPU, "float32")  # the checkpoint holds the transformer
    sha256 = FileNote.of(tmp_path / "moved" / "v.pth").sha256
    wanted = rf"(?s)the transformer .*bring it back, as {folder.path}/base/var.pth.*{sha256}"
    with pytest.raises(InputError, match=wanted) as caught:
        train(make(run__steps=3))
    assert "v.pth does not exist" in caught.value.__notes__[0]
    with pytest.raises(InputError, match=wanted):
        load_base(make(), folder, CPU)
    (folder.path / "base" / "var.pth").symlink_to(tmp_path / "moved" / "v.pth")
    train(make(run__steps=3))
    assert_same_run(tmp_path / "whole", folder.path)


def test_another_file_under_the_old_name_is_no_base(files, make_models, tmp_path):
    make, given = files
    train(make(run__steps=1))
    folder = RunFolder(tmp_path / "run")
    shutil.rmtree(folder.path / "base")
    other = make_models(**SIZES)[0].state_dict()
    other["head.bias"] += 1.0
    torch.save(other, given / "v.pth")
    with pytest.raises(InputError, match="v.pth has another SHA-256"):
        train(make(run__steps=2))
    with pytest.raises(InputError, match="v.pth has another SHA-256"):
        load_base(make(), folder, CPU)


def test_a_folder_of_before_hashes_goes_on_and_notes_them(make_config, tmp_path, pretrainings):
    """base.json held two paths, and there was no base/. With its cache deleted, the base is made again."""
    folder = RunFolder(make_config().run.dir)
    whole = make_config(**PRETRAINED, run__steps=4, run__dir=str(tmp_path / "whole"))
    train(whole)
    train(make_config(**PRETRAINED, run__steps=1))

    def as_before():
        paths = {part: Base(RunFolder(whole.run.dir)).find(part) for part in PARTS}
        noted = json.loads((tmp_path / "whole" / "base.json").read_text())
        shutil.rmtree(folder.path / "base", ignore_errors=True)
        folder.base.write_text(json.dumps({part: noted[part]["path"] for part in paths}))

    as_before()
    load_run(folder, CPU, "float32")
    train(make_config(**PRETRAINED, run__steps=2))
    assert Base(folder).hashed
    assert {path.name for path in (folder.path / "base").iterdir()} == {"var.pth", "vqvae.pth"}
    as_before()
    shutil.rmtree(make_config().pretrain.cache_dir)
    with pytest.raises(InputError, match="is not there; bring it back, or let `python -m varfast.train .*config.yaml`"):
        load_run(folder, CPU, "float32")
    train(make_config(**PRETRAINED, run__steps=4))
    assert len(pretrainings) == 2
    assert_same_run(whole.run.dir, folder.path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no base.json"),
        ("{", "base.json cannot be read; delete it"),
        ("[" * 100_000, "base.json cannot be read; delete it"),
        ('{"var": "a.pth"}', "base.json cannot be read; delete it"),
        ('{"var": 3, "vqvae": []}', "base.json cannot be read; delete it"),
        ('{"var": "/dev/zero", "vqvae": "/dev/zero"}', "/dev/zero, is not there"),
        ('{"var": "x", "vqvae": "FIFO"}', "is not there"),
        ('{"var": "x", "vqvae": "hf://evil.example/x/y.pth"}', "y.pth, is not there"),
        ('{"var": "x", "vqvae": "hf://../../x"}', "is not there"),
        ('{"var": "x", "vqvae": "a\\u0000b"}', "is not there"),
        ('{"var": NOTE, "vqvae": {"path": "/dev/zero", "file": {"bytes": 0, "sha256": "ZEROS"}}}', "no regular file"),
        ('{"var": NOTE, "vqvae": {"path": "FIFO", "file": {"bytes": 0, "sha256": "ZEROS"}}}', "no regular file"),
        ('{"var": NOTE, "vqvae": {"path": "a\\u0000b", "file": {"bytes": 0, "sha256": "ZEROS"}}}', "is not there"),
        ('{"var": NOTE, "vqvae": {"path": "/etc/passwd", "file": {"bytes": 5, "sha256": "ZEROS"}}}', "of 5 bytes"),
    ],
)
def test_what_stands_in_base_json_is_data(make_config, tmp_path, monkeypatch, content, message):
    """Nothing is fetched, made, waited for or taken that is not what the run started from."""
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("asked the network"))
    monkeypatch.setattr(varfast.pretraining.cache, "pretrain", lambda *args: pytest.fail("pre-trained"))
    folder = RunFolder(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    folder.config.write_text(dump_config(make_config(**PRETRAINED)))
    if content is not None:
        note = '{"path": "x", "file": {"bytes": 0, "sha256": "ZEROS"}}'
        filled = content.replace("NOTE", note).replace("FIFO", str(tmp_path / "fifo")).replace("ZEROS", "0" * 64)
        folder.base.write_text(filled)
    with pytest.raises(InputError, match=message):
        load_run(folder, CPU, "float32")


def test_a_run_starts_from_what_another_one_delivers(make_config, tmp_path, pretrainings, capsys):
    train(make_config(**PRETRAINED, run__steps=2, run__dir=str(tmp_path / "first")))
    second = PRETRAINED | {"policy__checkpoint": str(tmp_path / "first"), "run__dir": str(tmp_path / "second")}
    train(make_config(**second, run__steps=4, run__seed=1))
    assert metrics(tmp_path / "second")[0]["step"] == 1
    noted = json.loads((tmp_path / "second" / "base.json").read_text())
    assert (noted["var"]["path"], noted["var"]["step"]) == (str(tmp_path / "first"), 2)
    assert f"starting from what {tmp_path / 'first'} delivers after step 2" in capsys.readouterr().out
    folder = RunFolder(tmp_path / "second")
    state = torch.load(Base(folder).find("var"), weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights(tmp_path / "first").items())
    first, started = (
        load_run(RunFolder(tmp_path / "first"), CPU, "float32"),
        load_base(make_config(**second), folder, CPU),
    )
    assert torch.equal(first.sample([0, 1], seed=0).tokens_BL, started.sample([0, 1], seed=0).tokens_BL)
    assert len(pretrainings) == 1
    parts = second | {"run__dir": str(tmp_path / "parts")}
    train(make_config(**parts, run__steps=2, run__seed=1))
    shutil.rmtree(tmp_path / "first")
    train(make_config(**parts, run__steps=4, run__seed=1))
    assert_same_run(tmp_path / "second", tmp_path / "parts")
    varfast.export.main([f"checkpoint={tmp_path}/parts", f"out={tmp_path}/model.pth"])
    with pytest.raises(InputError, match="first does not exist"):
        train(make_config(**second | {"run__dir": str(tmp_path / "third")}))
    other = second["policy__var"] | {"num_classes": 7}
    with pytest.raises(InputError, match="does not fit the configured VAR"):
        train(make_config(**second | {"policy__checkpoint": str(tmp_path / "second"), "policy__var": other,
                                      "run__dir": str(tmp_path / "fourth")}))  # fmt: skip


def test_an_adapter_starts_from_a_run_and_another_run_from_it(make_config, tmp_path):
    first = PRETRAINED | {"run__dir": str(tmp_path / "first"), "policy__lora": {"rank": 2}, "run__steps": 1}
    train(make_config(**first))
    settings = json.loads((tmp_path / "first" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "pretrain"
    second = first | {"run__dir": str(tmp_path / "second"), "policy__checkpoint": str(tmp_path / "first")}
    train(make_config(**second))
    merged = load_base(make_config(**second), RunFolder(tmp_path / "second"), CPU).var.state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in weights(tmp_path / "first").items())


def test_the_receiver_of_an_export_gets_the_vqvae_and_no_home_folder(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    config = make_config(**PRETRAINED, pretrain__cache_dir="~/.cache/varfast", run__dir="~/runs/x", run__steps=1)
    train(config)
    out = tmp_path / "handed on"
    varfast.export.main([f"checkpoint={tmp_path}/alice/runs/x", f"out={out}/model.pth"])
    card = (out / "model.md").read_text()
    assert "alice" not in card
    call = re.search(r"load_policy\(var='([^']+)', vqvae='([^']+)'\)", card)
    shutil.rmtree(tmp_path / "alice")
    received = load_policy(*(str(out / name) for name in call.groups()))
    assert received.sample([0, 9], seed=0).tokens_BL.shape == (2, 5)
    assert sorted(path.name for path in out.iterdir()) == ["model.md", "model.pth", "model.vqvae.pth"]


def test_fewer_steps_than_done_are_said_as_they_are(make_config, tmp_path, capsys):
    train(make_config(run__steps=3))
    before = weights(make_config().run.dir)
    capsys.readouterr()
    assert train(make_config(run__steps=1)) == 0
    out = capsys.readouterr().out
    assert "holds step 3, more than run.steps=1: no step is left to do" in out
    assert "run complete: 3 steps" in out
    assert "of 1" not in out
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(make_config().run.dir).items())
    assert len(metrics(make_config().run.dir)) == 3
    varfast.export.main([f"checkpoint={make_config().run.dir}", f"out={tmp_path / 'model.pth'}"])
    card = (tmp_path / "model.md").read_text()
    assert "| 3, more than the 1 that run.steps says now, 8 images each" in card
    assert "before | after" in card
