"""A user's own reward: found, asked, checked, and kept from the trainer."""

import gc
import os
import random
import signal
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from varfast import InputError
from varfast.data.prompts import Prompt, PromptSet
from varfast.rewards import WeightedSum
from varfast.rewards.function import FunctionReward
from varfast.types import NotFiniteReward

LABELS = torch.tensor([3, 1, 4, 1, 5, 0])


@pytest.fixture
def write(tmp_path, monkeypatch, forget_modules):
    """Write a module, which is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)

    def write(source, name="mine.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source))
        return file

    return write


def reward(function="./mine.py:score", args=None, **settings):
    return WeightedSum(
        {"mine": FunctionReward(type="function", function=function, args=args or {})}, num_classes=10, **settings
    )


def of(scored):
    return scored.components["mine"]


# ---------------------------------------------------------------------------------------------------------------------
# Finding it

MEAN = "import torch\ndef score(images, labels):\n    return images.mean(dim=(1, 2, 3))\n"


@pytest.mark.parametrize(
    "function", ["./rewards/mine.py:score", "rewards/mine.py:score", "{folder}/rewards/mine.py:score"]
)
def test_a_reward_is_found_by_its_file(write, images, tmp_path, function):
    write(MEAN, "rewards/mine.py")
    torch.testing.assert_close(of(reward(function.format(folder=tmp_path))(images, LABELS)), images.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("function", ["beside_it:score", "beside_it.py:score", "./beside_it.py:score"])
def test_a_reward_is_found_beside_the_config(write, images, tmp_path, monkeypatch, function):
    write(
        "import helper_of_it\ndef score(images, labels):\n    return [helper_of_it.one] * len(images)",
        "configs/beside_it.py",
    )
    write("one = 1.0", "configs/helper_of_it.py")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no module beside_it; run from its folder|no file .*beside_it.py"):
        reward(function)
    assert of(reward(function, beside=Path("../configs"))(images, LABELS)).tolist() == [1.0] * 6


def test_a_file_of_the_user_hides_no_package(write, images, monkeypatch):
    write("raise RuntimeError('imported in place of the library')", "json.py")
    write(MEAN + "import json\nassert json.dumps({}) == '{}'\n")
    reward()
    write(MEAN, "numpy.py")
    of(reward("./numpy.py:score")(images, LABELS))
    assert sys.modules["numpy"] is np


def test_two_rewards_of_one_file_share_its_module(write, images):
    write(
        "loads = [1]\ndef a(images):\n    loads.append(1)\n    return [1] * 6\n"
        "def b(images):\n    return [len(loads)] * 6"
    )
    parts = {n: FunctionReward(type="function", function=f"mine.py:{n}") for n in "ab"}
    scored = WeightedSum(parts)(images, LABELS)
    assert scored.components["b"].tolist() == [2.0] * 6


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_rewards.redness", "want module:name or file.py:name, .* did you mean my_rewards:redness"),
        ("mine:Judge.score", "'Judge.score' is no name of a module's own; .* for a method, write a function"),
        (".a:x", "want module:name"),
        ("a..b:x", "want module:name"),
        (":x", "want module:name"),
        ("a:", "'' is no name"),
        ("a b:x", "want module:name"),
        ("mine.py", "want the function's name too, as mine.py:redness"),
        ("x\0.py:a", "want module:name"),
    ],
)
def test_the_form_of_a_function_is_said(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        FunctionReward(type="function", function=function)
    assert "pattern" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "args", "message"),
    [
        ("class score:\n    pass", {}, "instances of score cannot be called; give it __call__"),
        ("class score:\n    def __init__(self, value): pass\n    def __call__(self, images, labels): pass", {},
         r"args do not fit score\(value\): missing a required argument: 'value'"),
        ("def score(images, labels, power=1): pass", {"pwoer": 2},
         r"args do not fit score\(images, labels, power=1\): got an unexpected keyword argument 'pwoer'"),
        ("import sys\nsys.exit(0)", {}, r"raised SystemExit\(0\), which would end the run as if it were complete"),
        ("score = 3", {}, "has no such function"),
        ("def scores(images, labels): pass", {}, "did you mean scores"),
        ("async def score(images, labels): pass", {}, "score is async"),
        # What its parameters need.
        ("def score(): pass", {}, r"reward mine must take \(images, labels\); score takes no images"),
        ("class score:\n    def __call__(self, images, prompts, captions): pass", {},
         r"reward mine must take \(images, labels\); score.__call__ needs 'captions'"),
        ("def score(images, labels, extra, *, more): pass", {}, "score needs 'extra', 'more'"),
        ("import torch\nclass score(torch.nn.Module):\n    def forward(self, images, mask, text): pass", {},
         "score.forward needs 'text'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said_before_training(write, source, args, message):
    write(source)
    with pytest.raises(InputError, match=message):
        reward(args=args)


def test_what_a_module_raises_is_its_own_error_and_names_the_reward(write):
    write("import no_such_library_of_mine")
    with pytest.raises(ModuleNotFoundError, match="no_such_library_of_mine") as caught:
        reward()
    assert caught.value.__notes__ == ["  in reward mine (./mine.py:score), while it was imported or made"]


# ---------------------------------------------------------------------------------------------------------------------
# Asking it


@pytest.mark.parametrize(
    ("signature", "seen"),
    [
        ("a, b", ["images", "labels"]),
        ("images", ["images"]),
        ("images, labels", ["images", "labels"]),
        ("labels, images", ["labels", "images"]),
        ("x, batch", ["images", "batch"]),
        ("images, *, step, seed", ["images", "step", "seed"]),
        ("images, prompts, names, labels", ["images", "prompts", "names", "labels"]),
        ("images, labels, power=2", ["images", "labels", 2]),
        ("images, power=2, labels=None", ["images", 2, "labels"]),
        ("images, labels, seed=7, step=None", ["images", "labels", 7, "step"]),
        ("images, /, labels", ["images", "labels"]),
    ],
)
def test_parameters_get_what_they_name(write, images, signature, seen):
    names = [part.split("=")[0].strip() for part in signature.split(",") if part.strip() not in ("*", "/")]
    write(f"got = []\ndef score({signature}):\n    got.append([{', '.join(names)}])\n    return [1.0] * 6")
    scored = reward(seed=11, names=[f"class {i}" for i in range(10)])
    scored(images, LABELS, 4)
    words = [f"class {label}" for label in LABELS.tolist()]
    known = {"step": 4, "seed": 11, "names": words, "prompts": words}
    for value, want in zip(sys.modules["mine"].got[0], seen, strict=True):
        if want == "images":
            assert torch.equal(value, images)
        elif want == "labels":
            assert torch.equal(value, LABELS)
        elif want == "batch":
            assert torch.equal(value.labels, LABELS)
            assert (value.step, value.seed, value.names, value.prompts) == (4, 11, words, words)
        else:
            assert value == known.get(want, want)


def test_a_reward_asks_for_prompts_tags_and_metadata_which_are_its_own_copies(write, images):
    write(
        """
        got = []
        def score(images, prompts, tags, metadata, names, batch):
            assert (names, batch.tags, batch.metadata) == (None, tags, metadata)
            got.append((list(prompts), list(tags), [row["include"][0]["count"] for row in metadata]))
            metadata[0]["include"][0]["count"] = 99
            tags.clear()
            return [1.0] * 6
        """
    )
    rows = [Prompt(f"text {i}", f"tag {i}", {"include": [{"count": i}]}) for i in range(6)]
    scored = reward(prompts=PromptSet(tuple(rows)))
    for _ in range(2):
        scored(images, LABELS, 4)
    labels = LABELS.tolist()
    want = ([f"text {i}" for i in labels], [f"tag {i}" for i in labels], labels)
    assert sys.modules["mine"].got == [want, want]


def test_labels_without_names_and_no_step_in_an_evaluation(write, images):
    write(
        "def score(images, batch):\n    assert batch.names is batch.step is None\n"
        "    return [float(p) for p in batch.prompts]"
    )
    assert of(reward()(images, LABELS)).tolist() == LABELS.tolist()


def test_a_module_is_moved_put_in_eval_and_runs_without_gradients(write, images):
    write(
        """
        import torch
        class Net(torch.nn.Module):
            def __init__(self, width=4):
                super().__init__()
                self.linear, self.drop = torch.nn.Linear(3, width), torch.nn.Dropout(0.9)
                self.wide = torch.nn.Linear(width, 1)
            def forward(self, images, labels):
                assert not self.training and not self.drop.training
                assert not torch.is_grad_enabled()
                return self.wide(self.drop(self.linear(images.mean(dim=(2, 3)))))
        score = Net()
        """
    )
    for found in (reward(), reward("mine.py:Net", {"width": 8})):
        scores = of(found(images, LABELS))
        assert scores.shape == (6,)
        assert scores.requires_grad is False
    moved = sys.modules["mine"].score
    reward(device="meta")
    assert moved.linear.weight.is_meta


# ---------------------------------------------------------------------------------------------------------------------
# What it returns


class Arrayish:
    def __init__(self, content):
        self.content = content

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.content, dtype)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0),
        torch.arange(6.0)[:, None],
        torch.arange(6),
        torch.arange(6.0, dtype=torch.float64, requires_grad=True),
        torch.arange(6.0, dtype=torch.bfloat16),
        np.arange(6),
        np.arange(6.0)[::-1][::-1][:, None],
        np.arange(6, dtype=">f8"),
        np.arange(6, dtype=np.longdouble),
        np.arange(6, dtype=np.uint16),
        list(range(6)),
        tuple(float(i) for i in range(6)),
        [[float(i)] for i in range(6)],
        [torch.tensor(float(i)) for i in range(6)],
        [torch.tensor([float(i)]) for i in range(6)],
        [np.float32(i) for i in range(6)],
        Arrayish(range(6)),
    ],
    ids=str,
)
def test_numbers_of_any_kind_are_taken(write, images, value):
    write("value = None\ndef score(images, labels):\n    return value")
    found = reward()
    sys.modules["mine"].value = value
    scores = of(found(images, LABELS))
    assert (scores.tolist(), scores.dtype) == ([0, 1, 2, 3, 4, 5], torch.float32)
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        with torch.no_grad():
            value.zero_()  # its own tensor, as a reward that fills a buffer does
        assert scores.tolist() == [0, 1, 2, 3, 4, 5]


def endless():
    while True:
        yield 1.0


CYCLE = [1.0] * 5
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned None; want"),
        ("good", "returned the str 'good'"),
        ("\x1b[2J" + "x" * 10**6, r"returned the str '\\x1b\[2Jx*\.\.\. \(1000004 characters\)'"),
        ({"score": [1.0] * 6}, "returned a dict with the keys 'score'"),
        (([1.0] * 6, {}), r"returned shape \(2,\) for 6 images"),
        (endless(), "returned a generator"),
        ([[1.0], [1.0, 2.0], [], [1.0], [1.0], [1.0]], r"returned a list of 6 \(list\)"),
        (CYCLE, r"returned a list of 6 \(float\)"),
        (["1"] * 6, r"returned a list of 6 \(str\)"),
        ([None] * 6, r"returned a list of 6 \(NoneType\)"),
        ([10**400] * 6, "which holds no numbers that can be read: int too large"),
        (np.array([1.0, None, "a", 2, 3, 4], object), r"returned an array of object of shape \(6,\)"),
        (np.array(["1"] * 6), "returned an array of <U1"),
        (np.zeros(6, "M8[s]"), r"returned an array of datetime64\[s\]"),
        (np.zeros(6, complex), "returned an array of complex128"),
        (np.float64(1.0), r"returned shape \(\) for 6 images"),
        (torch.zeros(6, device="meta"), r"returned a tensor of torch.float32, torch.strided, on meta"),
        (torch.zeros(6).to_sparse(), "returned a tensor of torch.float32, torch.sparse_coo"),
        (torch.zeros(6, dtype=torch.complex64), "returned a tensor of torch.complex64"),
        (torch._empty_affine_quantized((6,), scale=1.0, zero_point=0, dtype=torch.qint8), "a tensor of torch.qint8"),
        (torch.nested.nested_tensor([torch.zeros(2)] * 6), "returned a nested tensor"),
        (torch.zeros(6, 2), r"returned shape \(6, 2\) for 6 images; want \(6,\)"),
        (torch.zeros(1, 6), r"returned shape \(1, 6\)"),
        (torch.zeros(()), r"returned shape \(\)"),
        (torch.zeros(10**6).expand(10**6, 10**6), r"returned shape \(1000000, 1000000\)"),
        (np.broadcast_to(np.zeros(1), (10**6, 10**6)), r"returned shape \(1000000, 1000000\)"),
        (range(6), "returned a range"),
        (object(), "returned a object"),
        (print, "returned a builtin_function_or_method"),
        (Arrayish(["a"] * 6), "Arrayish"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_numbers_is_answered_in_one_line(write, images, value, message):
    write("value = None\ndef score(images, labels):\n    return value")
    found = reward()
    sys.modules["mine"].value = value
    with pytest.raises(InputError, match=message) as caught:
        found(images, LABELS)
    text = str(caught.value)
    assert text.startswith("reward mine returned ")
    assert "want (6,), one number an image: a tensor, an array or a list" in text
    assert "\n" not in text
    assert len(text) < 500
    assert not isinstance(caught.value, NotFiniteReward)


@pytest.mark.parametrize("value", [[1e39] * 6, np.full(6, -1e300), torch.full((6,), 1e39, dtype=torch.float64)])
def test_a_number_beyond_float32_is_called_so(write, images, value):
    write("value = None\ndef score(images, labels):\n    return value")
    found = reward()
    sys.modules["mine"].value = value
    with pytest.raises(
        NotFiniteReward, match=r"returned -?1e\+(39|300), more than float32 holds \(3.4e\+38\) for image 0"
    ):
        found(images, LABELS)


# ---------------------------------------------------------------------------------------------------------------------
# What it may not leave changed


def state():
    """Of the process, by name; what does not compare is turned into what does."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled),
        "sdp": torch.backends.cuda.math_sdp_enabled(),
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": str(np.random.get_state()),
        "python rng": random.getstate(),
        "numpy errors": np.geterr(),
        "gc": gc.isenabled(),
        "recursion": sys.getrecursionlimit(),
        "folder": os.getcwd(),
        "rank": os.environ.get("RANK"),
        "world": os.environ.get("WORLD_SIZE"),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)],
        "errors": [f for f in warnings.filters if f[0] == "error"],
        "stdout": sys.stdout,
    }  # fmt: skip


MISCHIEF = {
    "grad": "torch.set_grad_enabled(False)",
    "inference": "keep.append(torch.inference_mode()); keep[-1].__enter__()",
    "autocast": "torch.autocast('cpu').__enter__()",
    "dtype": "torch.set_default_dtype(torch.float64)",
    "device": "torch.set_default_device('meta')",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "anomaly": "torch.autograd.set_detect_anomaly(True)",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
    "new tf32": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "cudnn": "torch.backends.cudnn.benchmark = True; torch.backends.cudnn.enabled = False",
    "sdp": "torch.backends.cuda.enable_math_sdp(False)",
    "torch rng": "torch.manual_seed(1)",
    "numpy rng": "numpy.random.seed(1)",
    "python rng": "random.seed(1)",
    "numpy errors": "numpy.seterr(all='raise')",
    "gc": "gc.disable()",
    "recursion": "sys.setrecursionlimit(777)",
    "folder": "os.chdir('/')",
    "rank": "os.environ['RANK'] = '3'",
    "world": "os.environ['WORLD_SIZE'] = '7'",
    "signals": "[signal.signal(n, print) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]",
    "ignored": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "errors": "warnings.simplefilter('error')",
    "stdout": "sys.stdout = open(os.devnull, 'w')",
}


@pytest.mark.parametrize("when", ["import", "call", "raise"])
@pytest.mark.parametrize("what", MISCHIEF)
def test_what_a_reward_changes_of_the_process_is_put_back(write, images, what, when):
    do = MISCHIEF[what]
    body = f"    {do}\n" if when != "import" else ""
    write(
        "import gc, os, random, signal, sys, warnings\nimport numpy, torch\nkeep = []\n"
        f"{do if when == 'import' else ''}\ndef score(images, labels):\n{body}"
        f"    {'raise RuntimeError' if when == 'raise' else 'return [1.0] * 6'}\n"
    )
    before = state()
    found = reward()
    assert state() == before
    if when == "raise":
        with pytest.raises(RuntimeError):
            found(images, LABELS)
    else:
        found(images, LABELS)
    assert state() == before
    if what == "inference":  # when its guard dies it switches gradients off: train() switches them on for the update
        sys.modules["mine"].keep.clear()
        torch.set_grad_enabled(True)
    parameter = torch.ones(2, requires_grad=True)
    (parameter * 2).sum().backward()


def test_a_reward_gets_copies(write, images):
    write("def score(images, batch):\n    batch.labels.zero_()\n    images.numpy()[:] = 7\n    return [1.0] * 6")
    pixels, labels = images.clone(), LABELS.clone()
    found = reward()
    found(images, LABELS)
    assert torch.equal(images, pixels)
    assert torch.equal(labels, LABELS)


def test_random_numbers_of_a_reward_are_a_function_of_seed_and_step(write, images):
    write(
        """
        import random, numpy, torch
        def score(images, labels):
            return [torch.rand(()).item() + numpy.random.rand() + random.random() for _ in images]
        """
    )

    def drawn(seed, step, first=0):
        torch.manual_seed(time.monotonic_ns() % 1000)
        return of(reward(seed=seed)(images, LABELS, step, first)).tolist()

    assert drawn(0, 1) == drawn(0, 1)
    several = [drawn(0, 1), drawn(0, 2), drawn(1, 1), drawn(0, 1, 6), drawn(0, None)]
    assert len({tuple(numbers) for numbers in several}) == 5


def test_a_process_that_a_reward_forked_does_not_go_on_with_the_run(write, images, tmp_path):
    write("import os\npids = []\ndef score(images, labels):\n    pids.append(os.fork())\n    return [1.0] * 6")
    found = reward()
    found(images, LABELS)
    (tmp_path / f"back_{os.getpid()}").touch()
    (child,) = sys.modules["mine"].pids
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert [p.name for p in tmp_path.glob("back_*")] == [f"back_{os.getpid()}"]
