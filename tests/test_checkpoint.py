import json
import os
import shutil
import subprocess
import sys
import textwrap

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from varfast import InputError
from varfast.checkpoint import Checkpoints, RunFolder, newest_checkpoint, save_text, write_atomically


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


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run folder with checkpoints of steps 2 and 4, and what they hold."""
    return tmp_path_factory.mktemp("run") / "run", {}


def damaged(draw, content):
    if not content:
        return b"x"
    at = draw(st.integers(0, len(content) - 1))
    how = draw(st.sampled_from(["flip", "truncate", "insert", "cut"]))
    if how == "flip":
        return content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
    if how == "truncate":
        return content[:at]
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
    return content[:at] + content[at + draw(st.integers(1, 9)) :]


# The same examples every time, so that a failure is a failure of the change at hand.
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_damage_gives_a_whole_checkpoint_or_an_input_error(make_config, tmp_path, two_checkpoints, data):
    run, held = two_checkpoints
    if not held:
        for step in (2, 4):
            held[step] = tensors(*networks(seed=step))
            save(RunFolder(run), make_config(), step, lambda step=step: networks(seed=step))
    path = tmp_path / "checkpoints"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(run / "checkpoints", path)
    files = sorted(str(file.relative_to(path)) for file in path.glob("*/*"))
    hit = set()
    for name in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
        file = path / name
        before = file.read_bytes()
        after = damaged(data.draw, before)
        if data.draw(st.integers(0, 9)) == 0:
            file.unlink()
        else:
            file.write_bytes(after)
        hit |= {int(name[5:11])} if after != before or not file.exists() else set()
    said = []
    try:
        found = newest_checkpoint(path, said.append)
    except InputError:
        assert hit == {2, 4}
        return
    assert found.step == max({2, 4} - hit)
    assert (4 in hit) == bool(said)
    model, optimizer = networks(seed=9, steps=0)
    found.load(model, optimizer)
    assert equal(tensors(model, optimizer), held[found.step])
