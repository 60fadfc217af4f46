"""The machine around a run: processes killed while a base is made, bits that flip, a clock that goes back, few files.

Seeded, so that a failure is a failure of the change at hand; counts are printed (pytest -s).
"""

import collections
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch

import varfast.files
import varfast.pretraining.cache
import varfast.runs.base
from varfast import InputError
from varfast.pretraining.cache import pretrained
from varfast.pretraining.training import PretrainReport
from varfast.runs.base import Base
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_run
from varfast.runs.manifest import dump_config
from varfast.train import train

from ..runs import assert_same_run

CPU = torch.device("cpu")
PARTS = ("var", "vqvae")
PRETRAINED = {
    "policy__checkpoint": "pretrain",
    "policy__var": {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 10},
    "policy__vqvae": {"base_channels": 32, "channel_multipliers": [1, 1, 1], "num_res_blocks": 1},
    "pretrain__vqvae_steps": 2,
    "pretrain__var_steps": 2,
}


@pytest.fixture
def instant(monkeypatch, make_models):
    """Pre-training that takes no time: models that were made before. A list that grows by one for each base."""
    models, made = make_models(), []
    stand_in = lambda *given: made.append(1) or (*models, PretrainReport(0.1, 1.0, 0.5, 2.0, 1.0))  # noqa: E731
    monkeypatch.setattr(varfast.pretraining.cache, "pretrain", stand_in)
    return made


def test_processes_killed_while_a_base_is_made_leave_it_whole_or_not_there(make_config, instant, monkeypatch):
    """Three at once, of which one or two are killed; every fsync takes up to 20 ms, so that kills fall into writes."""
    rng, sync, counts = random.Random(0), os.fsync, collections.Counter()
    monkeypatch.setattr(varfast.pretraining.cache, "print", lambda *_: None, raising=False)
    config = make_config(**PRETRAINED)
    paths = pretrained(config, CPU)
    whole = [path.read_bytes() for path in paths]

    def child(seed):
        own = random.Random(seed)
        os.fsync = lambda descriptor: time.sleep(own.random() * 0.02) or sync(descriptor)
        try:
            pretrained(config, CPU)
            os._exit(0)
        finally:
            os._exit(1)

    for number in range(40):
        shutil.rmtree(paths[0].parent)
        children = []
        for index in range(3):
            if not (pid := os.fork()):
                child(3 * number + index)
            children.append(pid)
        for pid in rng.sample(children, rng.choice([1, 2, 3])):
            time.sleep(rng.random() * 0.06)
            os.kill(pid, signal.SIGKILL)
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert set(ends) <= {0, -signal.SIGKILL}, ends  # whoever is not killed has a base
        counts.update("killed" if code else "has a base" for code in ends)
        before = len(instant)
        assert pretrained(config, CPU) == paths
        counts["made in the end"] += len(instant) - before
        assert [path.read_bytes() for path in paths] == whole
        left = sorted(path.name for path in paths[0].parent.iterdir())
        counts["lock of a killed one left"] += "lock.json" in left
        assert set(left) - {"lock.json"} >= {"report.json", "var.pth", "vqvae.pth"}
    print(f"\n40 rounds of 3 processes: {dict(counts)}")
    assert counts["killed"] >= 20
    assert counts["has a base"] >= 20
    assert counts["made in the end"] >= 1


def damaged(rng, content):
    """A flipped bit, a byte too many or too few, a cut; what changed."""
    at, how = rng.randrange(len(content)), rng.choice(["flip", "flip", "flip", "cut", "insert", "drop", "empty"])
    if how == "flip":
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :], how
    return {
        "cut": content[:at],
        "insert": content[:at] + bytes([rng.randrange(256)]) + content[at:],
        "drop": content[:at] + content[at + 1 :],
        "empty": b"",
    }[how], how


def test_bit_flips_in_a_cached_base_never_reach_a_run(make_config, instant, monkeypatch):
    rng, counts = random.Random(1), collections.Counter()
    monkeypatch.setattr(varfast.pretraining.cache, "print", lambda *_: None, raising=False)
    config = make_config(**PRETRAINED)
    paths = pretrained(config, CPU)
    files = {path: path.read_bytes() for path in (*paths, paths[0].with_name("report.json"))}
    for _ in range(150):
        path = rng.choice(list(files))
        content, how = damaged(rng, files[path])
        path.write_bytes(content)
        before = len(instant)
        assert pretrained(config, CPU) == paths
        counts[f"{how}: {'made again' if len(instant) > before else 'of no weight'}"] += 1
        assert all(p.read_bytes() == files[p] for p in paths)
        for p, kept in files.items():  # the report may hold another number of seconds now
            p.write_bytes(kept)
    print(f"\n150 damaged files of a cached base: {dict(counts)}")
    assert counts["flip: made again"] >= 30


def test_damage_to_what_a_run_folder_notes_of_its_base_is_named_or_of_no_weight(make_config, tmp_path, instant):
    """base/ and base.json of a folder that was handed on: the very files, or an InputError; nothing else."""
    rng, counts = random.Random(2), collections.Counter()
    config = make_config(**PRETRAINED)
    train_once = [pretrained(config, CPU)]
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text(dump_config(config))
    Base(folder, PARTS).keep([varfast.runs.base.Source(path, True, path) for path in train_once[0]])
    shutil.rmtree(config.pretrain.cache_dir)
    inside = {part: Base(folder, PARTS).find(part) for part in PARTS}
    files = {path: path.read_bytes() for path in (*inside.values(), folder.base)}
    for _ in range(300):
        path = rng.choice([*files, folder.base])
        content, how = damaged(rng, files[path])
        path.write_bytes(content)
        for part in PARTS:
            try:
                found = Base(folder, PARTS).find(part)
            except InputError:
                counts[f"{how}: named"] += 1
            else:
                counts[f"{how}: of no weight"] += 1
                assert found.read_bytes() == files[inside[part]]
        path.write_bytes(files[path])
    print(f"\n300 damaged files of a run folder's base: {dict(counts)}")
    assert counts["flip: named"] >= 50


def test_a_clock_that_goes_back_changes_no_number(make_config, tmp_path, monkeypatch):
    """time.time jumps by up to a day either way at every call, as do the times of files that are written."""
    few = {"run__steps": 6, "log__checkpoint_every": 2, "log__tensorboard": True, "eval__samples_per_label": 1}
    train(make_config(run__dir=str(tmp_path / "whole"), **few))
    rng, asked, now_s = random.Random(3), [0], time.time

    def jumping():
        asked[0] += 1
        return now_s() + rng.uniform(-86400.0, 86400.0)

    replace = os.replace

    def replace_at_another_time(source, target):
        os.utime(source, (jumping(), jumping()))
        replace(source, target)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(os, "replace", replace_at_another_time)
    parts = {"run__dir": str(tmp_path / "parts"), **few}
    train(make_config(**parts | {"run__steps": 3}))
    train(make_config(**parts))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert load_run(RunFolder(tmp_path / "parts"), CPU, "float32").num_classes == 5
    print(f"\nthe clock was asked {asked[0]} times")
    assert asked[0] > 10


def test_few_open_files_are_enough_or_named_and_nothing_is_lost(make_config, tmp_path):
    """Limits from what three streams need upwards; after each refusal the same command goes on to the same bits."""
    few = {"run__steps": 2, "log__checkpoint_every": 1, "log__tensorboard": True, "eval__samples_per_label": 0}
    train(make_config(run__dir=str(tmp_path / "whole"), **few))
    counts, said, usual = collections.Counter(), [], resource.getrlimit(resource.RLIMIT_NOFILE)
    # Numbers of open files have gaps; a limit counts the lowest free number.
    free = sorted(set(range(200)) - {int(name) for name in os.listdir("/proc/self/fd")})
    for more in range(0, 8):
        config = make_config(run__dir=str(tmp_path / str(more)), **few)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], usual[1]))
        try:
            train(config)
            counts["complete"] += 1
        except InputError as error:
            counts["refused"] += 1
            said.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, usual)
        train(config)
        assert_same_run(tmp_path / "whole", config.run.dir)
    assert all("Too many open files" in text and "Free space" not in text for text in said)
    print(f"\n8 limits on open files: {dict(counts)}")
    assert counts["refused"] >= 1
    assert counts["complete"] >= 1


def test_a_reward_that_uses_up_all_open_files_loses_no_step(make_config, tmp_path, monkeypatch):
    (tmp_path / "leaking.py").write_text(
        "import os\nkept = []\n"
        "def score(images, labels):\n"
        "    if len(kept) == 2:\n"
        "        while True: kept.append(open(os.devnull))\n"
        "    kept.append(open(os.devnull))\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = make_config(
        run__steps=4,
        log__checkpoint_every=99,
        eval__samples_per_label=0,
        reward={"mine": {"type": "function", "function": "leaking:score"}},
    )
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, usual[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
        import leaking

        for file in leaking.kept:
            if hasattr(file, "close"):
                file.close()
    assert any("holds step 2; the same command goes on" in note for note in caught.value.__notes__)
    assert RunFolder(config.run.dir).newest().step == 2
