import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from varfast import InputError
from varfast.config import parse_config
from varfast.files import save_text, write_atomically
from varfast.runs.checkpoint import Checkpoints, newest_checkpoint
from varfast.runs.folder import RunFolder
from varfast.runs.manifest import dump_config


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
        from varfast.files import save_tensors
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


def names(folder):
    return sorted(p.name for p in folder.checkpoints.iterdir())


def test_a_checkpoint_holds_the_moment_of_its_save(tmp_path, make_config, monkeypatch):
    """The thread writes only when the weights have been overwritten."""
    folder, (model, optimizer) = RunFolder(tmp_path), networks()
    before = {name: tensor.clone() for name, tensor in tensors(model, optimizer).items()}
    overwritten = threading.Event()
    write = HuggingFaceStorageWriter.write_data

    def late(self, *args):
        assert overwritten.wait(60)
        return write(self, *args)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", late)
    with Checkpoints(folder.checkpoints, make_config(), {"varfast": "0"}, print) as checkpoints:
        checkpoints.save(4, model, optimizer, {})
        with torch.no_grad():
            for tensor in tensors(model, optimizer).values():
                tensor.fill_(7.0)
        overwritten.set()
    folder.newest().load(model, optimizer)
    assert equal(tensors(model, optimizer), before)


def test_a_state_larger_than_a_file_is_spread_over_several(tmp_path, make_config, monkeypatch):
    monkeypatch.setattr("varfast.runs.checkpoint._FILE_BYTES", 40)
    folder = RunFolder(tmp_path)
    save(folder, make_config())
    assert len(list((folder.checkpoints / "step_000004").glob("*.safetensors"))) > 4
    model, optimizer = networks(seed=1)
    folder.newest().load(model, optimizer)
    assert equal(tensors(model, optimizer), tensors(*networks()))


def test_an_optimizer_that_has_not_stepped_stays_so(tmp_path, make_config):
    folder = RunFolder(tmp_path)
    save(folder, make_config(), 0, lambda: networks(steps=0))
    model, optimizer = networks(seed=1, steps=0)
    folder.newest().load(model, optimizer)
    assert equal(model.state_dict(), networks(steps=0)[0].state_dict())
    assert not optimizer.state


def test_the_manifest_says_what_the_checkpoint_is(tmp_path, make_config):
    folder, config = RunFolder(tmp_path), make_config()
    save(folder, config, reward_mean=0.25)
    path = folder.checkpoints / "step_000004"
    manifest = json.loads((path / "manifest.json").read_text())
    assert parse_config(manifest["config"]) == config
    assert manifest["config_sha256"] == hashlib.sha256(dump_config(config).encode()).hexdigest()
    assert (manifest["step"], manifest["varfast"], manifest["environment"]) == (4, "0", {"varfast": "0"})
    assert (manifest["before"], manifest["reward_mean"]) == ({"reward": 0.5}, 0.25)
    for name, noted in manifest["files"].items():
        content = (path / name).read_bytes()
        assert noted == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=path, check=True, capture_output=True)


def test_nothing_is_unpickled(tmp_path, make_config, monkeypatch):
    folder = RunFolder(tmp_path)
    save(folder, make_config())
    path = folder.checkpoints / "step_000004"
    (path / ".metadata").write_bytes(b"cos\nabort\n(tR.")  # where torch.distributed.checkpoint keeps its pickle
    refuse = mock.Mock(side_effect=AssertionError("unpickled"))
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    model, optimizer = networks(seed=1)
    folder.newest().load(model, optimizer)
    assert equal(tensors(model, optimizer), tensors(*networks()))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, ["step_000003", "step_000004"]),
        ({"log__keep_last": 1}, ["step_000004"]),
        ({"log__keep_best": True}, ["step_000002", "step_000003", "step_000004"]),
        ({"log__keep_best": True, "log__keep_last": 3}, ["step_000002", "step_000003", "step_000004"]),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, make_config, settings, kept):
    folder = RunFolder(tmp_path)
    with Checkpoints(folder.checkpoints, make_config(**settings), {"varfast": "0"}, print) as checkpoints:
        for step, reward in ((1, 0.1), (2, 0.9), (3, 0.3), (4, None)):
            checkpoints.save(step, *networks(), {}, reward)
    assert names(folder) == kept


def test_the_checkpoint_that_a_run_went_on_from_is_not_written_again(tmp_path, make_config):
    folder = RunFolder(tmp_path)
    with Checkpoints(folder.checkpoints, make_config(), {"varfast": "0"}, print) as checkpoints:
        checkpoints.save(2, *networks(), {})
    written = (folder.newest().path / "manifest.json").stat().st_ino
    with Checkpoints(folder.checkpoints, make_config(), {"varfast": "0"}, print, begun_from=2) as checkpoints:
        checkpoints.save(2, *networks(), {})
        assert (folder.newest().path / "manifest.json").stat().st_ino == written
        checkpoints.save(3, *networks(), {})
    assert names(folder) == ["step_000002", "step_000003"]


def test_a_checkpoint_is_due_by_steps_and_by_minutes(tmp_path, make_config, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    config = make_config(log__checkpoint_every=5, log__checkpoint_minutes=2)
    checkpoints = Checkpoints(tmp_path, config, {"varfast": "0"}, print)
    assert [step for step in range(1, 12) if checkpoints.due(step)] == [5, 10]
    now[0] = 219.9
    assert not checkpoints.due(6)
    now[0] = 220.1
    assert checkpoints.due(6)
    checkpoints.save(6, *networks(), {})
    assert not checkpoints.due(7)
    checkpoints.wait()


def test_an_error_of_the_thread_is_raised_at_the_next_save(tmp_path, make_config, monkeypatch):
    checkpoints = Checkpoints(tmp_path, make_config(), {"varfast": "0"}, print)
    monkeypatch.setattr(Checkpoints, "_seal", mock.Mock(side_effect=ZeroDivisionError))
    checkpoints.save(1, *networks(), {})
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(2, *networks(), {})


def test_what_a_killed_save_left_is_removed(tmp_path, make_config):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(make_config())
    save(folder, make_config())
    (folder.checkpoints / "step_000006.part").mkdir()
    (folder.checkpoints / "step_000006.part" / "x.safetensors").write_bytes(b"half")
    assert folder.prepare(make_config()).step == 4
    assert names(folder) == ["step_000004"]


def test_what_a_run_killed_in_its_first_write_left_is_not_foreign(tmp_path, make_config):
    folder = RunFolder(tmp_path / "run")
    for leftovers in (["lock.json"], ["config.yaml.incomplete"], ["lock.json", "config.yaml.0123456789ab.incomplete"]):
        folder.path.mkdir()
        for name in leftovers:
            (folder.path / name).touch()
        assert folder.prepare(make_config()) is None
        assert {p.name for p in folder.path.iterdir()} <= {"config.yaml", "lock.json"}
        shutil.rmtree(folder.path)


def test_a_log_of_the_run_in_its_folder_is_not_foreign(tmp_path, make_config):
    """varfast.train ... > run/output; run/slurm-7.out of a queue, run/log of a tee: this process cannot see those."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for name in ("slurm-7.out", "log"):
        (folder.path / name).write_text("line\n")
    kept = os.dup(1)
    with (folder.path / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        try:
            folder.prepare(make_config())
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    (folder.path / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"holds other files and no run \(output\); choose another run.dir, or move"):
        folder.prepare(make_config())


DAMAGED = [
    b"",
    b"\xff\xfe\x00",
    b"run: [",
    b"[" * 5000,
    b"x: 2001-13-45",
    b"a: &a [*a]",
    b"just text",
    b"update: {lr: !!python/object/apply:os.system [true]}",
    os.mkfifo,
    os.mkdir,
    lambda path: os.symlink("/dev/zero", path),
]


def put(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content(path)


@pytest.mark.parametrize("make", DAMAGED[-3:])
def test_what_is_no_file_is_set_aside_where_a_run_writes(tmp_path, make_config, make):
    folder = RunFolder(tmp_path / "run")
    save(folder, make_config())
    names = ("before_after.json", "config.yaml", "metrics.jsonl", "summary.json", "var.pth")
    for name in names:
        put(folder.path / name, make)
    assert folder.prepare(make_config()).step == 4
    assert folder.config.is_file()
    for name in names:
        assert name == "config.yaml" or not os.path.lexists(folder.path / name)
        assert os.path.lexists(folder.path / (name + ".damaged"))


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_config_is_named_by_whoever_reads_it(tmp_path, make_config, content):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(make_config())
    put(folder.config, content)
    with pytest.raises(InputError, match=r"config.yaml"):
        folder.load_config()


@pytest.mark.parametrize("content", [*DAMAGED[:4], None])
def test_a_run_goes_on_without_its_config_file(tmp_path, make_config, content):
    """What its settings were stands in the checkpoint, under a SHA-256."""
    folder = RunFolder(tmp_path / "run")
    folder.prepare(make_config())
    save(folder, make_config())
    folder.config.unlink() if content is None else put(folder.config, content)
    with pytest.raises(InputError, match="update.lr: 0.0001 there, 0.001 here"):
        folder.prepare(make_config(update__lr=1e-3))
    assert folder.prepare(make_config()).step == 4
    assert folder.load_config() == make_config()


def test_an_edited_config_file_does_not_change_a_run(tmp_path, make_config):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(make_config())
    save(folder, make_config())
    save_text(folder.config, dump_config(make_config(update__lr=1e-3)))
    with pytest.raises(InputError, match="update.lr: 0.0001 there, 0.001 here"):
        folder.prepare(folder.load_config())


def craft(folder, **changes):
    """Change the newest checkpoint's manifest, with the sum that belongs to it."""
    path = max(folder.checkpoints.iterdir())
    manifest = json.loads((path / "manifest.json").read_text())
    for key, change in changes.items():
        manifest[key] = change(manifest[key]) if callable(change) else change
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    return path


EMPTY = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "../x.safetensors", "a/x.safetensors", "fifo", "x\0.safetensors", "\ud800.safetensors", "x.pth", ""],
)
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path, make_config, name):
    folder = RunFolder(tmp_path)
    save(folder, make_config())
    os.mkfifo(folder.checkpoints / "step_000004" / "fifo")
    craft(folder, files=lambda files: files | {name: EMPTY})
    with pytest.raises(InputError, match="step_000004: manifest.json is not of this version of varfast"):
        folder.newest()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("name", ["more.safetensors", "manifest.json", "manifest.sha256"])
def test_a_special_file_in_a_checkpoint_is_not_waited_for(tmp_path, make_config, make, name):
    folder = RunFolder(tmp_path)
    save(folder, make_config())
    path = craft(folder, files=lambda files: files | {"more.safetensors": EMPTY})
    (path / name).unlink(missing_ok=True)
    make(path / name)
    with pytest.raises(InputError, match=f"step_000004: {name}: it is no regular file"):
        folder.newest()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8, b"\xff" * 8, (10**9).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"{}", b"[" * 3000],
    ids=range(6),
)
def test_crafted_tensors_under_an_agreeing_manifest_are_refused(tmp_path, make_config, content):
    folder = RunFolder(tmp_path)
    save(folder, make_config())
    (file,) = (folder.checkpoints / "step_000004").glob("*.safetensors")
    file.write_bytes(content)
    craft(folder, files={file.name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}})
    with pytest.raises(InputError, match="step_000004"):
        folder.newest().load(*networks(seed=1))


@pytest.mark.parametrize(
    ("optimizer", "wanted"),
    [
        (None, "holds an optimizer's state without its settings"),
        ([], "is of another optimizer"),
        (lambda groups: groups[:1], "is of another optimizer"),
        (lambda groups: [*groups, {}], "is of another optimizer"),
        (lambda groups: [group | {"betas": "x"} for group in groups], "is of another optimizer"),
        (lambda groups: [group | {"betas": [0.9, [0.95]]} for group in groups], "is of another optimizer"),
        (lambda groups: [group | {"lr": True} for group in groups], "is of another optimizer"),
        (lambda groups: [group | {"more": 1} for group in groups], "is of another optimizer"),
    ],
)
def test_crafted_settings_of_the_optimizer_are_refused(tmp_path, make_config, optimizer, wanted):
    folder = RunFolder(tmp_path)
    save(folder, make_config())
    craft(folder, optimizer=optimizer)
    with pytest.raises(InputError, match=wanted):
        folder.newest().load(*networks(seed=1))


def test_links_in_the_place_of_checkpoints_are_removed_as_links(tmp_path, make_config):
    folder, theirs = RunFolder(tmp_path / "run"), tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "x").touch()
    folder.prepare(make_config())
    save(folder, make_config(), 4)
    for name in ("step_000003", "step_000006.part", "step_000008", "step_000008.damaged"):
        (folder.checkpoints / name).symlink_to(theirs)
    assert folder.prepare(make_config()).step == 4
    assert save(folder, make_config(log__keep_last=1), 6) == []
    assert names(folder) == ["step_000006", "step_000008.damaged"]
    assert [p.name for p in theirs.iterdir()] == ["x"]


def test_where_folders_cannot_be_renamed_checkpoints_are_written_and_dropped(tmp_path, make_config, monkeypatch):
    """EXDEV: an overlay, for a folder that its image brought along."""
    rename = os.rename

    def refuse(path, to):
        if os.path.isdir(path):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(path, to)

    monkeypatch.setattr(os, "rename", refuse)
    folder, config = RunFolder(tmp_path), make_config(log__keep_last=1)
    for step in (4, 5, 6):
        assert save(folder, config, step) == []
    assert names(folder) == ["step_000006"]
    assert folder.newest().step == 6


def test_an_older_checkpoint_that_cannot_be_removed_costs_no_new_one(tmp_path, make_config, monkeypatch):
    folder, config = RunFolder(tmp_path), make_config(log__keep_last=1)
    save(folder, config, 4)
    monkeypatch.setattr(shutil, "rmtree", mock.Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    assert save(folder, config, 6) == [
        "step_000006 is written, but an older checkpoint cannot be removed: Input/output error"
    ]
    assert folder.newest().step == 6


def test_a_checkpoint_of_another_model_is_refused(tmp_path, make_config):
    folder = RunFolder(tmp_path)
    save(folder, make_config())
    wider = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4))
    with pytest.raises(InputError, match=r"model.0.weight is \(\(4, 3\), torch.float32\) there, \(\(4, 5\), torch.fl"):
        folder.newest().load(wider)
    deeper = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.LayerNorm(4))
    with pytest.raises(InputError, match=r"model.2.weight is missing there, \(\(4,\), torch.float32\) here"):
        folder.newest().load(deeper)


def test_further_tensors_come_back_in_place_by_kind_and_name(tmp_path, make_config):
    folder, model = RunFolder(tmp_path), networks()[0]
    average = {"0.weight": torch.rand(4, 3)}  # of some weights alone
    save(folder, make_config(), further={"ema": average, "reference": {"1.bias": torch.arange(4).bfloat16()}})
    found, into = folder.newest(), {"1.bias": torch.zeros(4, dtype=torch.bfloat16)}
    other = networks(seed=1)[0]
    found.load(other, further={"reference": into})
    assert into["1.bias"].tolist() == [0, 1, 2, 3]
    assert equal(dict(other.state_dict()), dict(model.state_dict()))
    found.load_result(other)
    assert equal(dict(other.state_dict()), dict(model.state_dict()) | average)
    with pytest.raises(InputError, match=r"reference.2.bias is missing there, \(\(4,\), torch.float32\) here"):
        found.load(other, further={"reference": {"2.bias": torch.zeros(4)}})


def test_the_result_of_a_run_without_an_average_is_its_weights(tmp_path, make_config):
    folder = RunFolder(tmp_path)
    save(folder, make_config())
    other = networks(seed=1)[0]
    folder.newest().load_result(other)
    assert equal(dict(other.state_dict()), dict(networks()[0].state_dict()))


def test_a_checkpoint_file_of_before_is_refused(tmp_path, make_config):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(make_config())
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(
        InputError, match="holds checkpoint.pt, as varfast wrote it before checkpoints/; choose another"
    ):
        folder.prepare(make_config())


SHARDED = """
    import sys
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from varfast.config import parse_config
    from varfast.runs.checkpoint import Checkpoints, newest_checkpoint
    import yaml

    rank, path = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    model.register_parameter("row", torch.nn.Parameter(torch.zeros(1, 4)))  # one rank holds none of it
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    newest_checkpoint(path / "one").load(model, optimizer)
    full = {n: t.full_tensor() for n, t in model.state_dict().items()}
    (model(torch.ones(2, 3)).square().sum() + model.row.sum()).backward()
    optimizer.step()
    stepped = {n: t.full_tensor() for n, t in model.state_dict().items()}
    moments = {n: optimizer.state[p]["exp_avg"].full_tensor() for n, p in model.named_parameters()}
    config = parse_config(yaml.safe_load((path / "config.yaml").read_text()))
    with Checkpoints(path / "two", config, {"varfast": "0"}, print) as checkpoints:
        assert checkpoints.due(2) and not checkpoints.due(1)
        checkpoints.save(2, model, optimizer, {})
    if rank == 0:
        torch.save((full, stepped, moments), path / "truth.pt")
    dist.destroy_process_group()
    """


def test_another_number_of_processes_goes_on_from_a_checkpoint(tmp_path, make_config):
    """One process saves, two with FSDP2 go on and save, one goes on: the bits stay."""

    def make(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
        model.register_parameter("row", torch.nn.Parameter(torch.randn(1, 4)))
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    model, optimizer = make(0)
    (model(torch.ones(2, 3)).square().sum() + model.row.sum()).backward()
    optimizer.step()
    with Checkpoints(tmp_path / "one", make_config(), {"varfast": "0"}, print) as checkpoints:
        checkpoints.save(1, model, optimizer, {})
    (tmp_path / "config.yaml").write_text(dump_config(make_config()))
    command = [sys.executable, "-c", textwrap.dedent(SHARDED)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    full, stepped, moments = torch.load(tmp_path / "truth.pt", weights_only=True)
    assert equal(dict(model.state_dict()), full)
    found = newest_checkpoint(tmp_path / "two")
    assert len(list(found.path.glob("*.safetensors"))) == 2
    model, optimizer = make(1)
    found.load(model, optimizer)
    assert equal(dict(model.state_dict()), stepped)
    assert equal({n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()}, moments)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


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
