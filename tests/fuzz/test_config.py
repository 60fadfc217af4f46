"""Random and crafted configs and command lines: each is a config or an InputError in words, and soon.

python -m pytest tests/fuzz/test_config.py -s     prints the counts
"""

import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from varfast import InputError
from varfast.command import COMMANDS
from varfast.config import Config, load_config
from varfast.settings.schema import leaves

ROOT = Path(__file__).parent.parent.parent
DIGITS = (ROOT / "configs" / "digits.yaml").read_text()
SECTIONS = list(Config.model_fields)
KEYS = [key for key, _ in leaves(Config)] + [
    "reward.bright.mode",
    "reward.new.type",
    "reward.new.args",
    "reward.x",
    "base",
]
# ruff: noqa: SIM905 - one word a value
SCALARS = (
    "true false yes no on off null ~ = << *a &a .inf -.inf .nan 0 1 -1 3 1.5 1e-4 1e400 -1e400 1_000 0o17 017 "
    "0x1F 1:30 1:99 2026-01-01 2001-13-45 99999999999999999999 -99999999999999999999 [] {} [1,2] [[1],[2]] {a:1} "
    "{[1]:2} {1:2} {null:1} [true,false] [.nan] ['a',1] !!int !!bool !!python/object:os.system - -- ' \" [ { }] "
    ",,, all auto random pretrain cuda cuda:0 cuda:999 cuda:-1 gpu mps digits d16 d17 /dev/zero /dev/null "
    "/etc/passwd . .. / ~/x ~nosuchuser/x $HOME/x ${HOME} http:// http://[::1/ http://a..b/ https://x:99999/ "
    "http://user@x/ hf://../.. s3://a/b file:///x a:b a.b:c .a:b x.py:f "
).split()
LONG = ["9" * 5000, "0x" + "f" * 9000, "x" * 5000, "a/" * 3000, "[" * 3000, "{a: " * 3000, "\0", "a\0b", "\ud800",
        "é" * 200, "\x1b[31mred", "a #b", "a: b", "  ", "", "\t", "\n", "\ufeff", "\u202e", "1" * 400]  # fmt: skip
VALUES = SCALARS + LONG


def laughs(depth: int, width: int) -> str:
    """A value that is `width ** depth` values once its aliases are expanded."""
    value = "&l0 [" + ", ".join(["lol"] * width) + "]"
    parts = [value, *(f"&l{i} [" + ", ".join([f"*l{i - 1}"] * width) + "]" for i in range(1, depth))]
    return "[" + ", ".join(parts) + "]"


def crafted() -> list[str]:
    """Texts that are meant to hang a reader, to fill its memory, to overflow its stack, or to mean two things."""
    without = {s: "\n".join(line for line in DIGITS.splitlines() if not line.startswith(s)) for s in SECTIONS}
    merges = "m0: &m0 {a: 1}\n" + "".join(
        f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
    )
    texts = [
        merges + DIGITS,
        DIGITS + DIGITS,
        DIGITS + "---\n" + DIGITS,
        "? [a]\n: b\n",
        "%YAML 9.9\n---\na: 1",
        "a: " * 2000,
    ]
    texts += [
        f"base: {b}\n" for b in ("/dev/zero", "/dev/random", "/dev/stdin", "/proc/self/mem", "/", "config.yaml", "[1]")
    ]
    for section in SECTIONS:
        rest = without[section]
        texts += [
            f"{rest}\n{section}: {laughs(9, 9)}\n",
            f"{rest}\n{section}: {{x: {laughs(9, 9)}}}\n",
            f"{rest}\n{section}: &a {{x: *a}}\n",
            f"{rest}\n{section}: &a [*a]\n",
            f"{rest}\n{section}: &a {{<<: *a}}\n",
            f"{rest}\n{section}: {'[' * 5000}\n",
            f"{rest}\n{section}: {'{a: ' * 500}\n",
            f"{rest}\n{section}: null\n",
            f"{DIGITS}\n{section}: {{}}\n",
        ]
    function = "type: function, function: 'a:b'"
    for args in (
        laughs(9, 9),
        f"{{x: {laughs(9, 9)}}}",
        "&a {x: *a}",
        "&a [*a]",
        "{x: &a [*a]}",
        "{1: 2}",
        "{x: .nan}",
        "{x: 2026-01-01}",
    ):
        texts.append(f"{without['reward']}\nreward: {{r: {{{function}, args: {args}}}}}\n")
    return texts


def mutated(rng: random.Random) -> bytes:
    """The digits' config with some bytes or lines changed, doubled or left out."""
    data = bytearray(DIGITS.encode())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data))
        what = rng.randrange(4)
        if what == 0:
            data[at] = rng.randrange(256)
        elif what == 1:
            del data[at : at + rng.randint(1, 40)]
        elif what == 2:
            data[at:at] = rng.choice(VALUES).encode("utf-8", "surrogatepass")
        else:
            data[at:at] = bytes(data[at : at + rng.randint(1, 80)])
    return bytes(data)


def word(rng: random.Random, name: str) -> str:
    """One argument of a command, more or less."""
    schema = COMMANDS[name].schema
    keys = KEYS if name in ("train", "pretrain", "roofline") else list(schema.model_fields) if schema else ["x"]
    key, value = rng.choice([*keys, "learning_rate", "beta", "x.y", "", "run"]), rng.choice(VALUES)
    return rng.choice([
        *[f"{key}={value}"] * 3, f"--{key}={value}", f"--{key}", f"-{key[:1]}", f"+{key}={value}", f"~{key}", value,
        key, "--sweep", "--sweep=update.lr=1,2", "--profile", f"{key}.{key}={value}", "=", f"{key}:{value}",
        "configs/digits.yaml", "runs/grpo.kl_beta=0.1/config.yaml", "--config",
    ])  # fmt: skip


class Tally:
    """Counts what became of each case; a traceback or a case of more than 5 s fails, with its text."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.bad: list[str] = []

    def attempt(self, kind: str, case: object, call) -> None:
        def hang(*_: object) -> None:
            raise TimeoutError("hang")

        before = signal.signal(signal.SIGALRM, hang)
        signal.setitimer(signal.ITIMER_REAL, 5.0)
        try:
            call()
            outcome = "accepted"
        except InputError as error:
            outcome = "refused"
            if not str(error).isprintable() and "\x1b" in str(error):
                outcome = "BAD: a terminal would obey the message"
            elif any(
                inner in str(error) for inner in ("function-", "list[", "literal[", "^", "Input should", "pydantic")
            ):
                outcome = f"BAD: pydantic's inside: {error}"
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            outcome = f"BAD: {type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        self.counts[f"{kind} {outcome.split(':')[0]}"] += 1
        if outcome.startswith("BAD"):
            self.bad.append(f"{kind}: {str(case)[:300]!r}: {outcome[:300]}")


@pytest.fixture
def tally():
    found = Tally()
    yield found
    print(f"\n{sum(found.counts.values())} attempts: {dict(sorted(found.counts.items()))}")
    assert found.bad == []


def test_crafted_files_are_answered(tally, tmp_path):
    path = tmp_path / "config.yaml"
    for text in crafted():
        path.write_text(text)
        tally.attempt("crafted file", text[-300:], lambda: load_config(path))


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files_are_answered(tally, tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "config.yaml"
    for _ in range(100):
        content = mutated(rng)
        path.write_bytes(content)
        tally.attempt("damaged file", content, lambda: load_config(path))


@pytest.mark.parametrize("seed", range(2))
def test_overrides_are_answered(tally, tmp_path, seed):
    """Every key once with a random value, and some values for every key over the seeds."""
    rng, path = random.Random(seed), tmp_path / "config.yaml"
    path.write_text(
        "run: {dir: r, steps: 3}\npolicy: {preset: d16, checkpoint: random}\nreward: {bright: {type: brightness}}\n"
    )
    for key in KEYS * 2:
        override = f"{key}={rng.choice(VALUES)}"
        tally.attempt("override", override, lambda override=override: load_config(path, [override]))


@pytest.mark.parametrize("name", list(COMMANDS))
def test_command_lines_are_answered(tally, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    rng, begin_s = random.Random(name), time.monotonic()
    for _ in range(200):
        arguments = [word(rng, name) for _ in range(rng.randint(0, 4))]
        tally.attempt(f"{name} command line", arguments, lambda arguments=arguments: COMMANDS[name].read(arguments))
        if time.monotonic() - begin_s > 3:  # 8 commands; a slow machine tries fewer
            break
