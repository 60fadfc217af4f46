"""Hundreds of damaged and crafted files of weights: each is read, or answered by one InputError, and soon."""

import io
import json
import os
import pickle
import random
import struct
import time
import warnings
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save

from varfast import InputError
from varfast.policies.var.weights import load_var, load_vqvae
from varfast.weights.containers import Arrays, read_checkpoint

_SLOWEST_S = 5.0  # on 2 loaded cores; without bounds, one case in 50 took minutes or all memory


def torch_bytes(content, **how):
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def small_state():
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{k}.weight": torch.randn(3, 5, generator=generator) for k in range(6)} | {"epoch": torch.tensor(3)}


WHOLE = {
    "pth": torch_bytes(small_state()),
    "legacy.pth": torch_bytes(small_state(), _use_new_zipfile_serialization=False),
    "safetensors": save(small_state()),
    "npz": npz_bytes(mu=np.arange(8.0), sigma=np.eye(8), arr_0=np.zeros((3, 4, 4, 3), np.uint8)),
}


def read(path):
    """Everything that is read of such a file, to its last byte."""
    if path.suffix == ".npz":
        with Arrays(path, "fid_reference") as arrays:
            for name in sorted(arrays.names):
                with arrays.open(name) as (file, *_):
                    while file.read(4096):
                        pass
            return arrays.read("mu", (8,)), arrays.read("sigma", (8, 8))
    return read_checkpoint(path)


def outcome(run, *arguments):
    """read, or refused; whatever else is raised fails the test. Warnings are no output of ours."""
    begin_s = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(*arguments)
        found = "read"
    except InputError as error:
        message = str(error)
        assert "weights_only" not in message
        assert all(line.isprintable() for line in message.split("\n"))
        found = "refused"
    assert time.monotonic() - begin_s < _SLOWEST_S
    return found


def damaged(whole, chance):
    content = bytearray(whole)
    for _ in range(chance.choice([1, 1, 1, 2, 8, 64])):
        at = chance.randrange(len(content))
        kind = chance.randrange(7)
        if kind <= 2:
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 3:
            content[at] = chance.choice([0, 0xFF, 0x7F, 0x80, ord("{"), ord(".")])
        elif kind == 4:
            del content[at : at + chance.choice([1, 4, 100])]
        elif kind == 5:
            content[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice([1, 8])))
        else:
            content[at : at + 8] = struct.pack("<Q", chance.choice([0, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
        if len(content) < 16:
            break
    if chance.randrange(10) == 0:
        content = content[: chance.randrange(len(content) + 1)]
    return bytes(content)


@pytest.mark.parametrize("suffix", WHOLE)
def test_random_damage(tmp_path, suffix):
    path, counts = tmp_path / f"x.{suffix}", Counter()
    path.write_bytes(WHOLE[suffix])
    assert outcome(read, path) == "read"
    chance = random.Random(suffix)
    for number in range(400):
        path.write_bytes(damaged(WHOLE[suffix], chance))
        counts[outcome(read, path)] += 1
        assert number < 400
    print(f"{suffix}: {dict(counts)}")
    assert counts["refused"] > 100
    if suffix in ("pth", "npz"):  # their CRC covers all but padding and what nobody reads
        assert counts["read"] < 60


def test_the_bits_of_a_torch_file_that_pass_change_no_tensor(tmp_path):
    path, want = tmp_path / "x.pth", small_state()
    chance, passed = random.Random(1), 0
    for _ in range(400):
        content = bytearray(WHOLE["pth"])
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            found = read_checkpoint(path)
        except InputError:
            continue
        passed += 1
        assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    print(f"bit flips: {400 - passed} found, {passed} without effect")


class Runs:
    """A pickle that calls something."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def raw_torch(data, extra=()):
    """A torch container with a pickle of ours."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little"), *extra):
            archive.writestr(f"x/{name}", content)
    return file.getvalue()


def test_malicious_pickles_run_nothing(tmp_path):
    trace, path, counts = tmp_path / "ran", tmp_path / "x.pth", Counter()
    calls = [
        Runs(os.system, f"touch {trace}"),
        Runs(open, str(trace), "w"),
        Runs(eval, f"open({str(trace)!r}, 'w')"),
        Runs(exec, f"open({str(trace)!r}, 'w')"),
        Runs(getattr, "os", "system"),
        Runs(__import__, "os"),
        Runs(bytearray, 10**12),
        Runs(torch.load, str(trace)),
    ]
    for call in calls:
        for protocol in (0, 1, 2, 3, 4, 5):
            data = pickle.dumps({"model": call}, protocol=protocol)
            legacy = b"".join(pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {})) + data
            for content in (data, raw_torch(data), legacy, raw_torch(data, [("data/0", b"1234")])):
                path.write_bytes(content)
                counts[outcome(read_checkpoint, path)] += 1
    print(f"malicious pickles: {dict(counts)}")
    assert counts == {"refused": len(calls) * 6 * 4}
    assert not trace.exists()


PICKLES = {
    "huge bytearray": b"\x80\x02c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.",
    "huge tensor": b"\x80\x02ctorch\nTensor\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ftR.",
    "unknown storage": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x03\x00\x00\x00../"
    b"X\x03\x00\x00\x00cpuK\x04tQ.",
    "inst": b"(S'touch x'\nios\nsystem\n.",
    "no stop": b"\x80\x02}",
    "empty stack": b"\x80\x02.",
    "memo": b"\x80\x02h\x05.",
    "deep": b"\x80\x02" + b"(" * 200_000 + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "long": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "string length": b"\x80\x02X\xff\xff\xff\x7fx.",
    "unknown opcode": b"\x80\x02\xfe.",
    "build": b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_crafted_pickles(tmp_path, name):
    path = tmp_path / "x.pth"
    magic = b"".join(pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
    for content in (raw_torch(PICKLES[name]), magic + PICKLES[name], PICKLES[name]):
        path.write_bytes(content)
        outcome(load_var, str(path))


HEADERS = {
    "negative": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "overlap": {k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"},
    "beyond": {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
    "backwards": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "dtype": {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
    "float8": {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
    "text": {"a": "x"},
    "list": [1, 2],
    "number": 7,
    "huge number": {"a": {"dtype": "F32", "shape": [10**400], "data_offsets": [0, 4]}},
    "float": {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}},
    "escape": {"\x1b[2J\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "metadata": {"__metadata__": {"a": 1}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    "many": {str(k): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(20_000)},
}


@pytest.mark.parametrize("name", HEADERS)
def test_crafted_headers_of_safetensors(tmp_path, name):
    path = tmp_path / "x.safetensors"
    header = json.dumps(HEADERS[name]).encode()
    for length in (len(header), 0, len(header) - 1, 2**62):
        path.write_bytes(struct.pack("<Q", length) + header + b"\0" * 4)
        outcome(load_var, str(path))


def test_zip_bombs(tmp_path):
    path = tmp_path / "x.pth"
    for size in (2**20, 2**25):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", b"\x80\x02" + b"N0" * (size // 2) + b"N.")
            archive.writestr("x/data/0", b"\0" * size)
        path.write_bytes(file.getvalue())
        assert outcome(read_checkpoint, path) == "refused"
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", kind) as archive, archive.open("mu.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
            for _ in range(64):
                member.write(bytes(2**20))
        bomb = tmp_path / "x.npz"
        bomb.write_bytes(file.getvalue())
        assert outcome(read, bomb) == "refused"


def test_crafted_structures(tmp_path, make_models):
    """Each tensor of both models in turn replaced by one of another kind, shape or content, or gone."""
    var, vqvae = (model.state_dict() for model in make_models())
    chance, counts, path = random.Random(2), Counter(), str(tmp_path / "x.pth")
    odd = [
        lambda t: None,
        lambda t: t.new_zeros(0),
        lambda t: torch.tensor(1.0),
        lambda t: t.unsqueeze(0),
        lambda t: t[:1],
        lambda t: t.to(torch.complex64),
        lambda t: t > 0,
        lambda t: t.to("meta"),
        lambda t: torch.full_like(t.float(), float("nan")),
        lambda t: torch.zeros(1).expand(10**7, *t.shape[1:]),
        lambda t: {"nested": t},
        lambda t: [t],
        lambda t: -t.float() * 1e30,
    ]
    for state, load in ((var, lambda: load_var(path)), (vqvae, lambda: load_vqvae(path, (1, 2, 3)))):
        for name in chance.sample(sorted(state), min(len(state), 24)):
            for make in chance.sample(odd, 6):
                torch.save(state | {name: make(state[name])}, path)
                counts[outcome(load)] += 1
    print(f"structures: {dict(counts)}")
    assert counts["refused"] > 100
