import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from varfast import InputError
from varfast.checkpoint import Checkpoints, RunFolder, save_text, write_atomically


def networks(seed=0, steps=2):
    """A model and its optimizer after some steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) == flag] for flag in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def tensors(model, optimizer):
    states = optimizer.state_dict()["state"]
    return model.state_dict() | {f"{i}.{k}": v for i, state in states.items() for k, v in state.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def save(folder, config, step=4, networks=networks, **notes):
    said = []
    with Checkpoints(folder.checkpoints, config, {"varfast": "0"}, said.append) as checkpoints:
        checkpoints.save(step, *networks(), {"reward": 0.5}, **notes)
    return said


def test_nothing_beside_the_file_is_left(tmp_path):
    save_text(tmp_path / "a" / "x.txt", "one")
    save_text(tmp_path / "a" / "x.txt", "two")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.txt"]
    assert (tmp_path / "a" / "x.txt").read_text() == "two"


def test_a_write_that_fails_half_way_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "x.bin"
    save_text(path, "whole")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device; the earlier one is whole"):
        write_atomically(path, fail)
    assert path.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    """A real limit of the operating system: no file of this process may grow beyond 64 KiB."""
    path = tmp_path / "checkpoint.pt"
    script = f"""
        import resource, torch
        from pathlib import Path
        from varfast import InputError
        from varfast.checkpoint import save_tensors
        path = Path({str(path)!r})
        save_tensors(path, {{"w": torch.ones(10)}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            save_tensors(path, {{"w": torch.zeros(1_000_000)}})
        except InputError as error:
            print("refused:", error)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"refused: cannot write {path}: " in done.stdout
    assert "the earlier one is whole" in done.stdout
    assert torch.equal(torch.load(path, weights_only=True)["w"], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_run_folder_that_cannot_be_made_is_named(tmp_path, make_config):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run.dir=.*file/run cannot be used: Not a directory; choose another run.dir"):
        RunFolder(tmp_path / "file" / "run").prepare(make_config())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_run_folder_that_cannot_be_written_is_named(tmp_path, make_config):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(InputError, match="Permission denied"):
        RunFolder(tmp_path / "run").prepare(make_config())


def test_run_folder_with_other_files_is_refused(tmp_path, make_config):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds other files and no run"):
        RunFolder(tmp_path).prepare(make_config())


def test_another_config_is_refused_with_the_difference(tmp_path, make_config):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(make_config())
    save(folder, make_config())
    with pytest.raises(InputError, match=r"grpo.kl_beta: 0.2 there, 0.1 here\n  update.lr: 0.0001 there, 0.001 here"):
        folder.prepare(make_config(grpo__kl_beta=0.1, update__lr=1e-3))
    with pytest.raises(InputError, match="update.lr_schedule: constant there, cosine here"):
        folder.prepare(make_config(update__lr_schedule="cosine"))
    longer = make_config(run__steps=50, log__grid_every=7, rollout__micro_batch=2)
    assert folder.prepare(longer).step == 4
    assert folder.load_config() == longer


def test_a_schedule_that_depends_on_the_length_fixes_it(tmp_path, make_config):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(make_config(update__lr_schedule="cosine"))
    save(folder, make_config())
    with pytest.raises(InputError, match="run.steps: update.lr_schedule=cosine depends on it"):
        folder.prepare(make_config(update__lr_schedule="cosine", run__steps=50))


def test_state_round_trip(tmp_path, make_config):
    folder = RunFolder(tmp_path / "run")
    assert folder.prepare(make_config()) is None
    save(folder, make_config(), reward_mean=0.25)
    found = folder.prepare(make_config())
    assert (found.step, found.before, found.reward_mean) == (4, {"reward": 0.5}, 0.25)
    other = networks(seed=1, steps=0)
    found.load(*other)
    assert equal(tensors(*other), tensors(*networks()))
    assert other[1].state_dict()["param_groups"] == networks()[1].state_dict()["param_groups"]
    assert folder.load_config() == make_config()


def test_base_is_noted(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.load_base() is None
    folder.save_base("a.pth", "b.pth")
    assert folder.load_base() == ("a.pth", "b.pth")
    assert json.loads(folder.base.read_text()) == {"var": "a.pth", "vqvae": "b.pth"}
