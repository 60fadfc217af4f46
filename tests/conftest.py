import json
import os
import signal
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
# Empty counts as unset. A run refuses to be one of several tasks of the job that the tests run in.
os.environ["SLURM_NTASKS"] = os.environ["SLURM_STEP_NUM_TASKS"] = ""
if not torch.cuda.is_available():  # Triton kernels run interpreted then; read when varfast.kernels is imported
    os.environ["TRITON_INTERPRET"] = "1"

from varfast import Policy, kernels
from varfast.config import Config, parse_config
from varfast.kernels.selection import OPS
from varfast.models import VAR, VQVAE, VARConfig, VQVAEConfig
from varfast.perf.work import Work
from varfast.policies.families import family_of

# nohup and a shell's & start programs that ignore them; the tests want what a terminal starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# nohup and a shell's & start programs that ignore them; the tests want what a terminal starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A worker of pytest-xdist that lost its CUDA context ends and is replaced: else its later tests would all fail."""
    report = yield
    if report.failed and torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid}: {report.longreprtext}\nthe device is lost: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return report


# Buffers with structure: masks, scale numbers, rotary tables, usage statistics.
STRUCTURE = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV", "codebook_used", "attn.mask",
             "freqs_cis")  # fmt: skip


def golden_weights(model: torch.nn.Module, prefix: str) -> None:
    """The weights behind tests/data/*.npz and tests/data/golden: see golden_tensors."""
    golden_tensors(model.state_dict(), prefix)


def golden_tensors(state: dict[str, torch.Tensor], prefix: str) -> None:
    """Write a function of prefix, name and shape into each tensor; buffers that hold structure stay as they are."""
    for name, tensor in state.items():
        if name.endswith(STRUCTURE) or not tensor.is_floating_point():
            continue
        seed = zlib.crc32((prefix + name).encode()) & 0x7FFFFFFF
        noise = np.random.RandomState(seed).standard_normal(tensor.numel()).astype(np.float32).reshape(tensor.shape)
        if name.endswith("scale_mul_1H11"):
            value = np.log(4.0).astype(np.float32) + 0.3 * noise
        elif name.endswith("ada_gss"):
            value = 0.5 * noise
        elif tensor.ndim >= 2:
            fan_in = 1 if "emb" in name or "pos" in name else int(np.prod(tensor.shape[1:]))
            value = noise * np.float32(fan_in**-0.5 if fan_in > 1 else 0.5)
        elif name.endswith("weight"):
            value = 1 + 0.1 * noise
        else:
            value = 0.1 * noise
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)))


def tiny_models(
    patch_nums=(1, 2, 3), depth=1, vocab_size=32, code_width=8, num_classes=5, shared_adaln=False, qk_l2_norm=True
) -> tuple[VAR, VQVAE]:
    sizes = {"patch_nums": patch_nums, "vocab_size": vocab_size, "code_width": code_width}
    var = VAR(
        VARConfig(depth=depth, num_classes=num_classes, shared_adaln=shared_adaln, qk_l2_norm=qk_l2_norm, **sizes)
    )
    vqvae = VQVAE(VQVAEConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, **sizes))
    golden_weights(var, "var.")
    golden_weights(vqvae, "vae.")
    return var, vqvae


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory):
    """Where the digits' base model is kept once a test has pre-trained it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_policy():
    def make(**sizes) -> Policy:
        return Policy(*tiny_models(**sizes))

    return make


@pytest.fixture
def make_models():
    return tiny_models


@pytest.fixture
def make_vqvae():
    def make(**sizes) -> VQVAE:
        vqvae = VQVAE(VQVAEConfig(**({"vocab_size": 32, "code_width": 8} | sizes)))
        golden_weights(vqvae, "vae.")
        return vqvae

    return make


@pytest.fixture(params=["tiny", "tiny_saln", "tiny_nol2"])
def golden(request) -> SimpleNamespace:
    """Models with the golden weights, and the arrays as tensors by name."""
    arrays = np.load(DATA / f"{request.param}.npz")
    meta = json.loads(str(arrays["meta"]))
    sizes = {"patch_nums": meta["patch_nums"], "vocab_size": meta["V"], "code_width": meta["Cvae"]}
    var = VAR(
        VARConfig(
            depth=meta["depth"],
            num_classes=meta["num_classes"],
            shared_adaln=meta["shared_aln"],
            qk_l2_norm=meta["attn_l2_norm"],
            **sizes,
        )
    )
    vqvae = VQVAE(VQVAEConfig(base_channels=meta["ch"], **sizes))
    golden_weights(var, "var.")
    golden_weights(vqvae, "vae.")
    tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "meta"}
    return SimpleNamespace(var=var, vqvae=vqvae, params=meta["params"], **tensors)


@pytest.fixture
def make_config(tmp_path):
    """A run of a few steps on a random tiny model, in a folder of its own; keyword section__key sets a value."""

    def make(**overrides) -> Config:
        data = {
            "run": {"dir": str(tmp_path / "run"), "steps": 3, "device": "cpu"},
            "policy": {
                "checkpoint": "random",
                "var": {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 5},
                "vqvae": {"base_channels": 32, "channel_multipliers": [1], "num_res_blocks": 1},
            },
            "pretrain": {"cache_dir": str(tmp_path / "cache")},
            "rollout": {"labels_per_step": 2, "group_size": 4},
            "reward": {"luma": {"type": "brightness", "mode": "raw"}},
            "update": {"minibatch": 4},
            "log": {"tensorboard": False, "grid_labels": 2, "grid_samples": 2, "checkpoint_every": 2},
            "eval": {"samples_per_label": 2},
        }
        for key, value in overrides.items():
            *parents, last = key.split("__")
            node = data
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return parse_config(data)

    return make


@pytest.fixture(scope="session")
def make_work():
    """A whole step of the paper's settings, of a public model; keyword arguments replace sections of the config."""

    def make(preset="d16", dtype="bfloat16", **sections) -> Work:
        config = parse_config(
            {
                "run": {"dir": "r", "steps": 1000, "dtype": dtype},
                "policy": {"preset": preset, "checkpoint": "random"},
                "reward": {"bright": {"type": "brightness"}},
                **sections,
            }
        )
        return Work.whole(config, family_of(config.policy).cost_of(config.policy, dtype))

    return make


@pytest.fixture
def forget_modules(tmp_path):
    """Forget the modules that a test imported from its own folder, and what was added to the path."""
    known, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def on_meta():
    """Ops that run on the meta device: shapes alone, nothing computed."""

    def use(impl):
        names = {op: {i.name for i in OPS[op]} for op in OPS}
        # Where there is none of this name, what is made of other ops, as linear_gelu, or the specification.
        kernels.configure({op: name for name in ("reference", "library", impl) for op in OPS if name in names[op]})

    use("reference")
    yield use
    kernels.configure({})
