import os
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from varfast import InputError, load_policy
from varfast.models import VARConfig
from varfast.models.weights import infer_var_config, infer_vqvae_config, load_var, load_vqvae, resolve


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
