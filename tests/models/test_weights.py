import argparse
import io
import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from varfast import InputError, load_policy
from varfast.models import VARConfig
from varfast.policies.var.weights import infer_var_config, infer_vqvae_config, load_var, load_vqvae
from varfast.weights.containers import read_checkpoint
from varfast.weights.files import resolve


@pytest.fixture
def models(make_models):
    return make_models(patch_nums=(1, 2, 3), depth=2)


def same(model, state):
    loaded = model.state_dict()
    return list(loaded) == list(state) and all(torch.equal(loaded[n], state[n]) for n in state)


def wrap_public_trainer(var, vqvae):
    """As the public training code saves: a trainer's state beside its arguments."""
    return {
        "args": "{'depth': 2}",
        "epoch": 3,
        "trainer": {"config": {"prog_it": 0}, "var_wo_ddp": var, "vae_local": vqvae},
    }


WRAPPERS = {
    "plain": lambda var, vqvae: var,
    "ddp": lambda var, vqvae: {f"module.{n}": t for n, t in var.items()},
    "compiled ddp": lambda var, vqvae: {f"_orig_mod.module.{n}": t for n, t in var.items()},
    "nested": lambda var, vqvae: {"state_dict": var},
    "public trainer": wrap_public_trainer,
    "slashes": lambda var, vqvae: {f"trainer/var_wo_ddp/{n}": t for n, t in var.items()},
    "fsdp inside": lambda var, vqvae: {n.replace("attn.", "_fsdp_wrapped_module.attn."): t for n, t in var.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_load_var_unwraps(models, tmp_path, wrapper):
    var, vqvae = (model.state_dict() for model in models)
    torch.save(WRAPPERS[wrapper](var, vqvae), tmp_path / "x.pth")
    loaded = load_var(str(tmp_path / "x.pth"))
    assert same(loaded, var)
    assert loaded.config == models[0].config


def test_load_vqvae_from_the_same_trainer_checkpoint(models, tmp_path):
    torch.save(wrap_public_trainer(*(m.state_dict() for m in models)), tmp_path / "x.pth")
    assert same(load_vqvae(str(tmp_path / "x.pth"), (1, 2, 3)), models[1].state_dict())


def test_load_reads_safetensors(models, tmp_path):
    for model, name in zip(models, ("var", "vqvae"), strict=True):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    policy = load_policy(str(tmp_path / "var.safetensors"), str(tmp_path / "vqvae.safetensors"))
    assert same(policy.var, models[0].state_dict())
    assert same(policy.vqvae, models[1].state_dict())


def test_saved_again_is_bit_for_bit_the_same(models, tmp_path):
    torch.save(models[0].state_dict(), tmp_path / "a.pth")
    torch.save(load_var(str(tmp_path / "a.pth")).state_dict(), tmp_path / "b.pth")
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pth", "b.pth"))
    assert list(first) == list(second)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(("shared_adaln", "qk_l2_norm"), [(False, True), (True, True), (False, False)])
def test_infer_configs_from_the_weights(make_models, shared_adaln, qk_l2_norm):
    var, vqvae = make_models(depth=2, shared_adaln=shared_adaln, qk_l2_norm=qk_l2_norm)
    assert infer_var_config(var.state_dict()) == var.config
    assert infer_vqvae_config(vqvae.state_dict(), vqvae.config.patch_nums) == vqvae.config


def test_vqvae_loads_with_usage_statistics_of_another_number_of_scales(models, tmp_path):
    state = models[1].state_dict()
    state["quantize.ema_vocab_hit_SV"] = torch.zeros(10, 32)
    torch.save(state, tmp_path / "x.pth")
    loaded = load_vqvae(str(tmp_path / "x.pth"), (1, 2, 3))
    assert loaded.state_dict()["quantize.ema_vocab_hit_SV"].shape == (3, 32)


def test_resolve_asks_the_hub(monkeypatch, tmp_path):
    asked = {}

    def download(repo_id, filename):
        asked.update(repo_id=repo_id, filename=filename)
        return str(tmp_path / "file")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert resolve("hf://FoundationVision/var/sub/var_d16.pth") == tmp_path / "file"
    assert asked == {"repo_id": "FoundationVision/var", "filename": "sub/var_d16.pth"}


def test_resolve_says_when_the_hub_cannot_be_reached(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(**_):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InputError, match="hf://a/b/c.pth cannot be fetched.*cache"):
        resolve("hf://a/b/c.pth")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere.pth", "does not exist"),
        (".", "is a folder"),
        ("/dev/zero", "is a device, want a file"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("~nosuchuser/x.pth", "there is no such user"),
        ("a\0b", "is no path"),
        ("a\ud800b.pth", "is no path|does not exist"),
        ("https://example.org/x.pth", "is a web address; download the file"),
        (
            "https://huggingface.co/FoundationVision/var/resolve/main/var_d16.pth",
            "give it as hf://FoundationVision/var/var_d16.pth",
        ),
        ("hf://owner/repo", "owner, repository or file is missing; want hf://owner/repo/file"),
        ("hf://../repo/x.pth", "'..' is no name of the hub"),
        ("hf://owner/-repo/x.pth", "'-repo' is no name of the hub"),
        ("hf://owner/re po/x.pth", "'re po' is no name of the hub"),
        ("hf://owner/repo/../../x.pth", "is no path of a file"),
        ("hf://owner/repo/ x.pth", "is no path of a file"),
        ("hf://owner/repo//x.pth", "is no path of a file"),
        ("hf://owner/repo@/x.pth", "'' is no revision"),
        ("hf://owner/repo@a b/x.pth", "'a b' is no revision"),
        ("hf://owner/repo/@main/x.pth", "a revision stands behind the repository"),
    ],
)
def test_resolve_refuses(address, message):
    with pytest.raises(InputError, match=message):
        resolve(address)


def test_resolve_refuses_what_is_no_file_that_can_be_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.pth").symlink_to("gone.pth")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name, message in (
        ("pipe", "is a pipe, want a file"),
        ("link.pth", "is a link to gone.pth, which does not exist"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("run", "is a folder, want a file .this run has no var.pth yet: python -m varfast.export"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(str(tmp_path / name))

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.pth").touch()
    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(InputError, match="x.pth cannot be read: Permission denied"):
        resolve(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("hf://a/b@main/x.pth", ("a/b", "main", "x.pth")),
        ("hf://a/b@refs%2Fpr%2F1/sub/x.pth", ("a/b", "refs/pr/1", "sub/x.pth")),
        ("hf://a/b@refs/pr/1/x.pth", ("a/b", "refs/pr/1", "x.pth")),
    ],
)
def test_resolve_reads_a_revision(monkeypatch, tmp_path, address, asked):
    def download(repo_id, filename, revision):
        assert (repo_id, revision, filename) == asked
        return str(tmp_path / "file")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert resolve(address) == tmp_path / "file"


def of_the_hub(name, status=None):
    """One of huggingface_hub's exceptions, whose constructors differ from version to version."""
    from huggingface_hub import errors

    error = getattr(errors, name).__new__(getattr(errors, name))
    error.args = ("said\nby the hub",)
    error.response = SimpleNamespace(status_code=status, headers={}, request=None)
    error.server_message = None
    return error


FAILURES = {
    "socks": (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."), "pip install socksio"),
    "proxy": (ValueError("Unknown scheme for proxy URL URL('foo://x:1')"), "is no proxy that can be used"),
    "full": (OSError(28, "No space left on device"), "disk of the hub's cache .* is full; free space, or set HF_HOME"),
    "unwritable": (PermissionError(13, "Permission denied"), "cache .* cannot be written"),
    "certificates": (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
    "not an OSError": (KeyError("etag"), "'etag'"),
    "xet": (RuntimeError("Data processing error\n  x"), "Data processing error x$"),
    "gated": (of_the_hub("GatedRepoError", 403), "a/b is gated: accept its terms on https://.*/a/b and log in"),
    "private": (of_the_hub("RepositoryNotFoundError", 401), "there is no repository a/b, or it is private"),
    "revision": (of_the_hub("RevisionNotFoundError", 404), "a/b has no revision"),
    "limits": (of_the_hub("HfHubHTTPError", 429), "too many requests"),
    "forbidden": (of_the_hub("HfHubHTTPError", 403), "refuses it .403."),
    "fault": (of_the_hub("HfHubHTTPError", 502), "has a fault .502.; try again later"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_resolve_says_in_one_line_what_the_hub_refused(monkeypatch, failure):
    error, message = FAILURES[failure]

    def download(**_):
        raise error

    monkeypatch.setenv("ALL_PROXY", "socks5://user:secret@127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InputError, match=r"^checkpoint hf://a/b/c.pth cannot be fetched") as caught:
        resolve("hf://a/b/c.pth")
    first, second = str(caught.value).split("\n")
    assert re.search(message, first)
    assert "secret" not in first
    assert "download the file and give its path" in second


def test_resolve_names_what_the_network_said_behind_the_hubs_own_words(monkeypatch):
    def download(**_):
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except ConnectionRefusedError as error:
            raise LocalEntryNotFoundError("check your connection") from error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InputError, match="https://huggingface.co.*: .Errno 111. Connection refused"):
        resolve("hf://a/b/c.pth")


def test_resolve_says_that_the_hubs_address_has_no_scheme(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "hf-mirror.example")
    with pytest.raises(InputError, match="HF_ENDPOINT=hf-mirror.example has no scheme; set it to https://hf-mirror"):
        resolve("hf://a/b/c.pth")


def test_resolve_with_the_real_client_and_a_socks_proxy_or_offline(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    real = huggingface_hub.hf_hub_download
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda **given: real(**given, cache_dir=str(tmp_path)))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, and the cache"):
        resolve("hf://a/b/c.pth")


def test_load_names_keys_shapes_and_what_would_fit(models, tmp_path):
    torch.save(models[0].state_dict(), tmp_path / "x.pth")
    wanted = models[0].config
    with pytest.raises(
        InputError, match=r"does not fit the configured VAR; it fits policy.var with depth=2(.|\n)*missing"
    ):
        load_var(str(tmp_path / "x.pth"), wanted.model_copy(update={"depth": 3}))
    with pytest.raises(InputError, match=r"head.weight: file \(32, 128\), model \(64, 128\)"):
        load_var(str(tmp_path / "x.pth"), wanted.model_copy(update={"vocab_size": 64}))


def test_load_names_the_preset_that_would_fit(tmp_path):
    from varfast.models import PRESETS, VAR

    with torch.device("meta"):
        names = VAR(PRESETS["d16"]).state_dict()
    # The shapes of d16 without its gigabyte: one stored element a tensor.
    state = {n: torch.zeros(1).expand(t.shape) for n, t in names.items()}
    state["lvl_1L"] = torch.repeat_interleave(torch.arange(10), torch.tensor([1, 4, 9, 16, 25, 36, 64, 100, 169, 256]))[
        None
    ]
    torch.save(state, tmp_path / "d16.pth")
    with pytest.raises(InputError, match="it fits preset d16"):
        load_var(str(tmp_path / "d16.pth"), PRESETS["d20"])


def test_load_says_which_keys_are_missing(models, tmp_path):
    state = models[0].state_dict()
    del state["head.bias"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match="1 missing: head.bias"):
        load_var(str(tmp_path / "x.pth"))
    del state["word_embed.weight"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match="is incomplete or of another model: no word_embed.weight"):
        load_var(str(tmp_path / "x.pth"))


def test_load_refuses_the_other_model(models, tmp_path):
    torch.save(models[1].state_dict(), tmp_path / "vqvae.pth")
    with pytest.raises(InputError, match="is not a VAR transformer: it has no pos_1LC, but encoder.conv_in.weight"):
        load_var(str(tmp_path / "vqvae.pth"))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_load_recognises_a_truncated_file(models, tmp_path, suffix, share):
    path = tmp_path / f"x.{suffix}"
    state = models[0].state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(InputError, match="truncated|is empty"):
        load_var(str(path))


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_load_runs_no_code_from_a_pickle(models, tmp_path):
    trace = tmp_path / "ran"
    torch.save({"model": models[0].state_dict(), "extra": _Bomb(trace)}, tmp_path / "zip.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(_Bomb(trace), protocol=2))
    for name in ("zip.pth", "raw.pth"):
        with pytest.raises(InputError, match="could run code, so it was not loaded"):
            load_var(str(tmp_path / name))
    assert not trace.exists()


def test_load_refuses_a_file_with_two_transformers(models, tmp_path):
    state = models[0].state_dict()
    torch.save({"model": state, "ema": state}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="several models \\(model, ema\\)"):
        load_var(str(tmp_path / "x.pth"))


def test_policy_refuses_models_that_do_not_belong_together(make_models):
    from varfast import Policy

    var, _ = make_models(vocab_size=32)
    _, vqvae = make_models(vocab_size=16)
    with pytest.raises(InputError, match="vocab_size is 32 in the transformer and 16"):
        Policy(var, vqvae)
    assert isinstance(var.config, VARConfig)


# ---------------------------------------------------------------------------------------------------------------------
# What a file is


def archive(members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return content.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1240000000\n"
LOOKALIKES = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "lfs": (LFS, "is a git-lfs pointer of 72 bytes, which stands for 1240000000 bytes; run 'git lfs pull'"),
    "annex": (b"../.git/annex/objects/a/b.pth\n", "is a git-annex pointer; run 'git annex get'"),
    "html": (b"\n<!DOCTYPE html><html><head><title>Sign in\n</title>", r"is an HTML page \('Sign in'\)"),
    "json": (b'{"error": "Repository not found"}', "is JSON text, which begins '{.error.: .Repository not found.}'"),
    "index": (b'{"metadata": {}, "weight_map": {}}', "is the index of a checkpoint in several files"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is XML text"),
    "text": (b"root:x:0:0:root:/root:/bin/bash\n", "is a text file, which begins 'root:x:0:0"),
    "utf-16": ("hello\n".encode("utf-16"), "is a text file, which begins 'hello'"),
    "escapes": (b"\x1b[31mred", r"is a text file, which begins '.*x1b\[31mred'"),
    "zeros": (b"\0" * 5000, "nothing but zeros at its beginning"),
    "noise": (bytes(range(200, 256)) * 90, "truncated or no checkpoint: 5040 bytes of no known format"),
    "gzip": (b"\x1f\x8b\x08\0\0", "is a gzip archive; unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n....", "is an HDF5 file, as Keras writes"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 20, "is a GGUF file"),
    "npy": (b"\x93NUMPY\x01\0v\0{", "is a single NumPy array"),
    "image": (b"\x89PNG\r\n\x1a\n....", "is a PNG image"),
    "tar": (b"sys_info" + b"\0" * 249 + b"ustar\0" + b"\0" * 300, "is a tar archive; unpack it; if torch before"),
    "pickle": (pickle.dumps({"a": 1}, protocol=2), "a pickle that torch.save did not write"),
    "zip": (archive({"a.txt": "", "b/c": ""}), "a zip archive without torch's data, it holds a.txt, b/c; unpack it"),
    "npz": (archive({"mu.npy": b""}), r"holds NumPy arrays \(.npz\)"),
    "script": (
        archive({"m/data.pkl": b"", "m/constants.pkl": b"", "m/code/a.py": b""}),
        "is a TorchScript archive, which is code",
    ),
    "package": (archive({"m/.data/extern_modules": b""}), "is an archive of torch.package"),
    "export": (archive({"m/archive_format": b"pt2"}), "is a program of torch.export"),
    "cut zip": (archive({"m/data.pkl": b"x" * 99})[:-9], "truncated or damaged; fetch it again. Detail: File is not a"),
    "cut safetensors": ((1000).to_bytes(8, "little") + b'{"a"', "is truncated: a safetensors file of 12 bytes"),
    "huge header": ((2**31).to_bytes(8, "little") + b"{", "is truncated: a safetensors file"),
    "deep header": (
        (400_000).to_bytes(8, "little") + b'{"a":' * 80_000,
        "truncated or damaged; fetch it again. Detail: maximum recursion depth",
    ),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("what", LOOKALIKES)
def test_read_checkpoint_names_what_is_no_checkpoint(tmp_path, what, suffix):
    content, message = LOOKALIKES[what]
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_read_checkpoint_goes_by_the_bytes_and_not_by_the_name(models, tmp_path):
    save_file(models[0].state_dict(), tmp_path / "x.pth")
    torch.save(models[0].state_dict(), tmp_path / "x.safetensors")
    torch.save(models[0].state_dict(), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("x.pth", "x.safetensors", "old.ckpt"):
        assert same(load_var(str(tmp_path / name)), models[0].state_dict())


def test_read_checkpoint_names_the_class_that_it_refused(models, tmp_path):
    path, state = tmp_path / "x.pth", models[0].state_dict()
    for beside, name in (
        (np.float64(1.0), r"numpy\._?core\.multiarray\.scalar"),
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (Path("x"), "pathlib"),
        (bytearray(b"x"), r"\w+.bytearray"),
    ):
        for new in (True, False):
            torch.save({"model": state, "beside": beside}, path, _use_new_zipfile_serialization=new)
            with pytest.raises(InputError, match=f"holds more than tensors: {name}.* could run code") as caught:
                read_checkpoint(path)
            assert "weights_only" not in str(caught.value)
    torch.save(state, path, pickle_protocol=4)
    with pytest.raises(InputError, match=r"holds more than tensors|another pickle protocol"):
        read_checkpoint(path)


def test_a_flipped_bit_in_a_tensor_is_found_by_the_crc_that_torch_does_not_read(models, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(models[0].state_dict(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(InputError, match="damaged; fetch it again. Detail: Bad CRC-32"):
        load_var(str(path))


def test_a_file_saved_without_crc_is_read(models, tmp_path):
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    set_crc32_options(False)
    try:
        torch.save(models[0].state_dict(), tmp_path / "x.pth")
    finally:
        set_crc32_options(before)
    assert same(load_var(str(tmp_path / "x.pth")), models[0].state_dict())


def test_a_zip_bomb_is_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", b"\x80\x02}.")
        file.writestr("m/data/0", b"\0" * 2**24)
    with pytest.raises(InputError, match="declares 167772.. bytes in a file of .*zip bomb"):
        read_checkpoint(path)
    torch.save({"a": "x" * 2**25}, path)
    with pytest.raises(InputError, match="bytes beside its tensors, more than 16777216"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02}.")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("m/data.pkl", b"\x80\x02}.")
    with pytest.raises(InputError, match="two members of one name"):
        read_checkpoint(path)


# ---------------------------------------------------------------------------------------------------------------------
# What is in it


def saved(state, tmp_path):
    torch.save(state, tmp_path / "x.pth")
    return str(tmp_path / "x.pth")


def test_load_tells_an_optimizer_beside_a_flat_state_dict_apart(models, tmp_path):
    var, vqvae = (model.state_dict() for model in models)
    beside = {
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "scheduler": {"last": torch.ones(1)},
    }
    assert same(load_var(saved(var | beside, tmp_path)), var)
    assert same(load_vqvae(saved(vqvae | beside, tmp_path), (1, 2, 3)), vqvae)
    with pytest.raises(InputError, match="1 unexpected: extra"):
        load_var(saved(var | {"extra": torch.ones(1)}, tmp_path))


def test_load_computes_the_constants_that_a_file_lacks(models, tmp_path):
    state = models[0].state_dict()
    short = {n: t for n, t in state.items() if n not in ("lvl_1L", "attn_bias_for_masking") and "zero_k" not in n}
    assert same(load_var(saved(short, tmp_path), models[0].config), state)
    with pytest.raises(InputError, match="no lvl_1L, and 14 tokens in 3 scales are of no preset: give policy.var"):
        load_var(saved(short, tmp_path))
    # As .bfloat16() of a whole state_dict leaves it.
    assert load_var(saved({n: t.bfloat16() for n, t in state.items()}, tmp_path)).config == models[0].config
    vqvae = models[1].state_dict()
    del vqvae["quantize.ema_vocab_hit_SV"]
    assert same(load_vqvae(saved(vqvae, tmp_path), (1, 2, 3)), models[1].state_dict())
    with pytest.raises(InputError, match=r"patch_nums: file \[1, 2, 3\], model \[1, 2, 4\]"):
        load_var(saved(state, tmp_path), models[0].config.model_copy(update={"patch_nums": (1, 2, 4)}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_load_counts_what_is_not_finite_and_names_the_tensor(models, tmp_path, value):
    var, vqvae = ({n: t.clone() for n, t in model.state_dict().items()} for model in models)
    var["head.weight"][0, :3] = value
    with pytest.raises(
        InputError, match=r"1 of its tensors .*\n  head.weight holds 3 of 4096 numbers that are not fin"
    ):
        load_var(saved(var, tmp_path))
    with pytest.raises(InputError, match=r"head.weight holds 3 of 4096"):
        load_var(saved({n: t.bfloat16() if t.is_floating_point() else t for n, t in var.items()}, tmp_path))
    vqvae["decoder.conv_out.bias"][1] = value
    with pytest.raises(InputError, match=r"decoder.conv_out.bias holds 1 of 3 numbers"):
        load_vqvae(saved(vqvae, tmp_path), (1, 2, 3))
    wide = {n: t.double() for n, t in models[0].state_dict().items()}
    wide["head.weight"][0, 0] = 1e300
    with pytest.raises(InputError, match=r"head.weight holds 1 of 4096 numbers that are not finite in float32"):
        load_var(saved(wide, tmp_path))
    large = {n: torch.full_like(t, 3e38) if n == "head.weight" else t for n, t in models[0].state_dict().items()}
    assert same(load_var(saved(large, tmp_path)), large)  # their sum overflows, they do not


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t.to(torch.complex64), "is complex64; weights are float32"),
        (lambda t: t > 0, "is bool;"),
        (lambda t: t.to(torch.int8), "is int8;"),
        (lambda t: t.to(torch.float8_e4m3fn), "is float8_e4m3fn;"),
        (lambda t: t.to("meta"), "is without content .device meta."),
        (lambda t: t.to_sparse(), "is sparse"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantised .torch.qint8."),
    ],
    ids=["complex", "bool", "int8", "float8", "meta", "sparse", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_load_refuses_what_is_no_plain_float(models, tmp_path, make, message):
    state = models[0].state_dict()
    state["head.weight"] = make(state["head.weight"])
    with pytest.raises(InputError, match=f"head.weight {message}|does not fit|truncated or damaged"):
        load_var(saved(state, tmp_path))


def cyclic():
    node = {"a": torch.ones(1)}
    node["again"] = node
    return node


def laughs():
    node = {"a": torch.ones(1)}
    for _ in range(18):
        node = {str(k): node for k in range(10)}
    return node


def long_level(last):
    return torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, last]])


STRUCTURES = {
    "levels of floats": ({"lvl_1L": torch.rand(1, 14)}, "lvl_1L does not number the tokens of square scales"),
    "negative level": ({"lvl_1L": -torch.ones(1, 14, dtype=torch.int64)}, "lvl_1L does not number"),
    "huge level": ({"lvl_1L": long_level(30_000_000)}, "lvl_1L does not number"),
    "complex level": ({"lvl_1L": torch.ones(1, 14, dtype=torch.complex64)}, "lvl_1L is complex64"),
    "empty level": ({"lvl_1L": torch.ones(0)}, "lvl_1L names the scales of 0 tokens, pos_1LC has 14"),
    "infinite level": ({"lvl_1L": torch.full((1, 14), math.nan)}, "lvl_1L does not number"),
    "huge block": ({"blocks.99999999.y": torch.ones(1)}, "no blocks.2, though it has blocks.99999999"),
    "many blocks": ({f"blocks.{k}.y": torch.ones(1) for k in range(600)}, "want at most 512"),
    "no classes": ({"class_emb.weight": torch.ones(0, 128)}, r"class_emb.weight is \(0, 128\)"),
    "one class": ({"class_emb.weight": torch.ones(1, 128)}, "num_classes = 0"),
    "width": ({"class_emb.weight": torch.ones(6, 100)}, "class_emb.weight is 100 wide, want 64 for each of the 2"),
    "flat head": ({"head.weight": torch.ones(5)}, r"head.weight is \(5,\)"),
    "scalar": ({"word_embed.weight": torch.tensor(1.0)}, r"word_embed.weight is \(\)"),
    "twice": ({"module.head.weight": torch.ones(1)}, "holds head.weight twice"),
    "cyclic": ({"more": cyclic()}, "dictionaries more than 20 deep"),
    "billion laughs": ({"more": laughs()}, "more than 200000 entries"),
    "odd keys": ({7: torch.ones(1), ("a", "\x1b[31m"): torch.ones(1)}, r"2 unexpected: 7, \('a', '.x1b"),
    "many tokens": ({"pos_1LC": torch.ones(1).expand(1, 10**9, 128)}, "lvl_1L names|is of 1000000000 tokens"),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_load_var_refuses_structures_that_make_no_sense(models, tmp_path, structure):
    changes, message = STRUCTURES[structure]
    with pytest.raises(InputError, match=message):
        load_var(saved(models[0].state_dict() | changes, tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.conv_in.weight": torch.ones(0, 3, 3, 3)}, r"encoder.conv_in.weight is \(0, 3, 3, 3\)"),
        ({"encoder.conv_in.weight": torch.ones(7, 3, 3, 3)}, "are no multiples of encoder.conv_in's 7"),
        ({"encoder.conv_in.weight": torch.ones(16, 3, 3, 3)}, "base_channels = 16"),
        ({"encoder.down.0.block.99999999.x": torch.ones(1)}, "no encoder.down.0.block.1, though it has .*99999999"),
        ({f"encoder.down.0.block.{k}.x": torch.ones(1) for k in range(70)}, "want at most 64"),
        ({"encoder.down.99999999.x": torch.ones(1)}, "no encoder.down.1,"),
        (
            {"quantize.embedding.weight": torch.ones(1).expand(10**12, 8)},
            "sizes that cannot be: vocab_size|expanded",
        ),
    ],
    ids=["0 channels", "odd", "small", "huge block", "many blocks", "huge level", "expanded"],
)
def test_load_vqvae_refuses_structures_that_make_no_sense(models, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_vqvae(saved(models[1].state_dict() | changes, tmp_path), (1, 2, 3))


def test_load_refuses_weights_that_are_declared_larger_than_the_file(make_models, tmp_path, monkeypatch):
    state = make_models()[0].state_dict()
    state["class_emb.weight"] = torch.zeros(1).expand(1_000_001, 64)
    monkeypatch.setattr("varfast.weights.state._MOST_EXPANDED_BYTES", 2**27)
    with pytest.raises(InputError, match="declares 256.* bytes of weights in a file of .*expanded views"):
        load_var(saved(state, tmp_path))


def test_load_names_the_tokenizers_and_models_of_others(models, tmp_path):
    code = {"quantize.embedding.weight": torch.ones(8, 4), "quant_conv.weight": torch.ones(1)}
    taming = models[1].state_dict()
    taming = {n: t for n, t in taming.items() if "quant_resi" not in n and "ema_vocab" not in n}
    for state, name in (
        ({"model": code | {"encoder.conv_blocks.0.res.0.norm1.weight": torch.ones(1)}}, "LlamaGen's VQ tokenizer"),
        ({"state_dict": code | {"loss.discriminator.main.0.weight": torch.ones(1)}}, "a VQGAN of taming-transformers"),
        (taming, "a VQ-VAE or VQGAN of one scale"),
        (code | {"encoder.down_blocks.0.x": torch.ones(1)}, "an autoencoder of diffusers"),
        (models[0].state_dict(), "it is a VAR transformer"),
    ):
        with pytest.raises(InputError, match=f"is not a multi-scale VQ-VAE: .*{name}"):
            load_vqvae(saved(state, tmp_path), (1, 2, 3))
    for state, name in (
        (models[1].state_dict(), "it is a VQ-VAE"),
        ({"model": {"tok_embeddings.weight": torch.ones(1)}}, "LlamaGen's transformer"),
        ({"base_model.model.head.lora_A.weight": torch.ones(1)}, "a LoRA adapter without its base"),
        ({"state": {0: {"exp_avg": torch.ones(1)}}}, "the state of an optimizer"),
        ([torch.ones(1)], "but no tensors"),
        (torch.ones(1), "has no pos_1LC"),
        (3, "but no tensors"),
    ):
        with pytest.raises(InputError, match=f"is not a VAR transformer: .*{name}"):
            load_var(saved(state, tmp_path))
