# ruff: noqa: E501
"""Rewards that misbehave, in a real run of a few steps: each trains, or ends with an error that is the reward's own.

What counts as an answer: the run is complete; or an InputError of one line that names the reward; or an error that was
raised in the reward's own file. A traceback from anywhere else, a hang, or other numbers than those of a well-behaved
reward are failures. Counts are printed (pytest -s).
"""

import collections
import gc
import json
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from varfast import InputError
from varfast.train import train

# Each is the body of score(images, labels), in a module that imports what it needs; `mean` is what a good one returns.
# What stands before "---" is done on import.
REWARDS = {
    # threads
    "thread that goes on": "threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start(); return mean",
    "thread with other settings": "t = threading.Thread(target=lambda: torch.set_grad_enabled(False)); t.start(); t.join(); return mean",
    "thread that sets the dtype": "t = threading.Thread(target=torch.set_default_dtype, args=(torch.float64,)); t.start(); t.join(); return mean",
    "thread that fails": "t = threading.Thread(target=lambda: None); t.start(); t.join(); return mean",
    "pool of threads": "from concurrent.futures import ThreadPoolExecutor as P\n    with P(4) as p: return list(p.map(float, mean))",
    "thread that writes later": "out = mean.clone(); keep.append(threading.Timer(0.0, out.fill_, (9.0,))); keep[-1].start(); return mean",
    # processes
    "fork that exits": "pid = os.fork()\n    if pid == 0: os._exit(0)\n    os.waitpid(pid, 0); return mean",
    "fork that comes back": "pid = os.fork()\n    if pid: os.waitpid(pid, 0)\n    return mean",
    "fork that raises": "pid = os.fork()\n    if pid == 0: raise ValueError('child')\n    os.waitpid(pid, 0); return mean",
    "fork that exits by sys": "pid = os.fork()\n    if pid == 0: sys.exit(0)\n    os.waitpid(pid, 0); return mean",
    "subprocess": "subprocess.run(['true'], check=True); return mean",
    # random numbers
    "seeds": "torch.manual_seed(0); numpy.random.seed(0); random.seed(0); return mean",
    "draws": "torch.rand(7); numpy.random.rand(3); random.random(); return mean",
    "seeds on import": "torch.manual_seed(0); numpy.random.seed(0); random.seed(0)\n---\nreturn mean",
    # signals
    "takes signals": "signal.signal(signal.SIGTERM, lambda *_: None); signal.signal(signal.SIGINT, signal.SIG_IGN); return mean",
    "alarm within": "signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(0.02); return mean",
    "blocks signals": "signal.pthread_sigmask(signal.SIG_BLOCK, []); return mean",
    # settings
    "no gradients on import": "torch.set_grad_enabled(False)\n---\nreturn mean",
    "no gradients": "torch.set_grad_enabled(False); return mean",
    "inference mode": "torch.inference_mode().__enter__(); return mean * 1",
    "double on import": "torch.set_default_dtype(torch.float64)\n---\nreturn mean",
    "device": "torch.set_default_device('meta'); return mean",
    "autocast": "torch.autocast('cpu', dtype=torch.bfloat16).__enter__(); return mean",
    "deterministic": "torch.use_deterministic_algorithms(True); return mean",
    "warnings are errors": "warnings.simplefilter('error'); return mean",
    "no garbage collection": "gc.disable(); return mean",
    "recursion": "sys.setrecursionlimit(200); return mean",
    "numpy raises": "numpy.seterr(all='raise'); return mean",
    "elsewhere": "os.chdir('/'); return mean",
    "folder gone": "d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d); return mean",
    "other rank": "os.environ.update(RANK='5', WORLD_SIZE='9', LOCAL_RANK='5'); return mean",
    "silent": "sys.stdout = sys.stderr = open(os.devnull, 'w'); return mean",
    "hooks": "sys.excepthook = lambda *_: None; sys.settrace(None); return mean",
    # what it is given
    "writes labels": "labels.zero_(); return mean",
    "writes images": "out = mean.clone(); images.zero_(); return out",
    "frees labels": "labels.resize_(0); return mean",
    "gradients of labels": "images.requires_grad_(); return images.mean(dim=(1, 2, 3))",
    # patches
    "patches manual_seed": "torch.manual_seed = lambda *_: 1 / 0; return mean",
    "patches no_grad": "torch.no_grad = None; return mean",
    "patches warnings": "warnings.warn = lambda *_, **__: None; return mean",
    "patches print": "import builtins; builtins.print = builtins.print; return mean",
    "patches json": "json.dumps = json.dumps; return mean",
    # what it returns
    "None": "return None",
    "a dict": "return {'score': mean}",
    "a tuple": "return mean, {}",
    "text": "return 'good'",
    "strings": "return ['1'] * len(images)",
    "bytes": "return b'x' * 10**7",
    "a terabyte": "return torch.zeros(1).expand(10**6, 10**6)",
    "a list of a million": "return [1.0] * 10**6",
    "an endless generator": "return itertools.count()",
    "itself": "a = []; a.append(a); return a * len(images)",
    "a huge int": "return [10**400] * len(images)",
    "sparse": "return mean.to_sparse()",
    "meta": "return mean.to('meta')",
    "complex": "return mean + 0j",
    "object array": "return numpy.array([mean] + [None] * (len(images) - 1), object)",
    "column": "return mean[:, None]",
    "row": "return mean[None]",
    "float64": "return mean.double().numpy()",
    "integers": "return [int(m * 1000) for m in mean]",
    "NaN": "return mean * float('nan')",
    "infinite": "return mean / 0",
    "beyond float32": "return mean.double() * 1e300",
    "a buffer of its own": "out = keep[0] if keep else mean.clone(); keep[:] = [out]; out.copy_(mean); return out",
    # ends
    "exit 0": "sys.exit(0)",
    "exit 3": "sys.exit(3)",
    "exit on import": "sys.exit(0)\n---\nreturn mean",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "GeneratorExit": "raise GeneratorExit",
    "StopIteration": "raise StopIteration",
    "MemoryError": "raise MemoryError",
    "RecursionError": "return score(images, labels)",
    "BaseException": "raise BaseException('mine')",
    "an exception whose text fails": "class E(Exception):\n        def __str__(self): raise E\n    raise E",
    "an error with escapes": "raise ValueError('\\x1b[2J' * 1000)",
    "InputError of its own": "import varfast; raise varfast.InputError('\\x1b[2J')",
    "slow": "time.sleep(0.05); return mean",
    "wrong signature": "---signature images, labels, metadata\nreturn mean",
    "no module": "import no_such_module\n---\nreturn mean",
    "syntax": "return ((",
}  # fmt: skip
HEAD = "import gc, itertools, json, os, random, signal, subprocess, sys, tempfile, threading, time, warnings\nimport numpy, torch\nkeep = []\n"
_LIMIT_S = 20


def module(body):
    at_import, _, inside = body.partition("---") if "---" in body else ("", "", body)
    signature = "images, labels"
    if inside.startswith("signature "):
        signature, _, inside = inside.removeprefix("signature ").partition("\n")
    return f"{HEAD}{at_import}\ndef score({signature}):\n    mean = images.mean(dim=(1, 2, 3))\n    {inside.strip()}\n"


@pytest.fixture
def limit():
    """A run that takes longer is a hang."""

    def late(*_):
        raise AssertionError(f"no end within {_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def problem(error):
    """What is wrong with an error that ended a run; None: nothing."""
    text = f"{error if isinstance(error, InputError) else 0}{getattr(error, '__notes__', '')}"
    if "mine (" not in text and "reward mine" not in text and ".mine." not in text:
        return f"the reward is not named: {type(error).__name__} from {traceback.extract_tb(error.__traceback__)[-1]}"
    if isinstance(error, InputError):
        return None if len(text) < 2500 else "too long"
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = last.filename.endswith("fuzzed.py") or isinstance(error, ModuleNotFoundError | SyntaxError)
    return None if own else f"{type(error).__name__} from {last.filename}:{last.lineno}"


def answer(config, reference):
    """What came of a run: "trained", "refused" or "its own error"; anything else is a failure."""
    try:
        code = train(config)
    except BaseException as error:  # noqa: BLE001 - the reward may raise anything
        return problem(error) or ("refused" if isinstance(error, InputError) else "its own error")
    same = code == 0 and (reference is None or numbers(config) == reference)
    return "trained" if same else f"code {code}, or other numbers than those of a well-behaved reward"


def numbers(config):
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(Path(config.run.dir) / "var.pth", weights_only=True)
    return [line["loss"] for line in lines], float(
        sum(tensor.double().nan_to_num(0, 0, 0).sum() for tensor in state.values())
    )


ANSWERS = ("trained", "refused", "its own error")


def test_no_reward_reaches_the_trainer(make_config, tmp_path, limit, monkeypatch):
    class NoCeilings:  # what a second of measuring the machine gives is not asked here
        def __init__(self, *args):
            pass

        def metrics(self, *args):
            return collections.defaultdict(float, step_s=1.0, images_per_s=1.0)

    monkeypatch.setattr("varfast.runs.run.StageLimits", NoCeilings)
    settings = {"run__steps": 1, "eval__samples_per_label": 0, "log__checkpoint_every": 99, "log__grid_every": 99,
                "log__grid_labels": 1, "log__grid_samples": 1, "run__max_bad_rollouts": 1}  # fmt: skip
    counts, failures, reference = collections.Counter(), [], None
    for number, (name, body) in enumerate({"good": "return mean", **REWARDS}.items()):
        source = tmp_path / str(number) / "fuzzed.py"
        source.parent.mkdir()
        source.write_text(module(body))
        config = make_config(
            run__dir=str(source.parent / "run"),
            reward={"mine": {"type": "function", "function": f"{source}:score"}},
            **settings,
        )
        limit(_LIMIT_S)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for owner, attribute in ((sys, "excepthook"), (warnings, "warn")):
                patch.setattr(owner, attribute, getattr(owner, attribute))
            found = answer(config, None if name == "integers" else reference)
        limit(0)
        assert reference or found == "trained", found
        reference = reference or numbers(config)
        counts[found if found in ANSWERS else "FAILED"] += 1
        failures += [] if found in ANSWERS else [f"{name}: {found}"]
        for known in [m for m, it in sys.modules.items() if getattr(it, "__file__", None) == str(source)]:
            del sys.modules[known]
        sys.path[:] = [entry for entry in sys.path if entry != str(source.parent)]
    gc.enable()
    print(f"\n{sum(counts.values())} rewards: {dict(counts)}")
    assert not failures, "\n".join(failures)
    assert counts["trained"] > 40
    assert counts["refused"] > 20
    assert [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()] == []
