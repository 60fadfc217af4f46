"""Whether rollout and update agree at full size, and randomness is what it should be: numbers, not times.

    python bench/full_size.py d16|d30|digits [--record PATH] [--images 64]
    python bench/full_size.py run [--record PATH]        # 50 steps of configs/digits.yaml: does the reward rise?

Random weights. Prints, and notes in the record under `checks`:

    gap       log-probabilities of the rollout against teacher-forced ones: mean, deviation and largest difference
    replays   a captured rollout again with the same key (the same tokens?) and with another (other ones?); against
              the eager rollout (share of equal tokens)
    splits    share of tokens that are the same when the images are sampled in smaller micro-batches, with the largest
              difference of log-probabilities where they are
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from varfast import Policy
from varfast.config import load_config
from varfast.perf.devices import with_dtype
from varfast.policies.var.sampler import sample
from varfast.runs.load import random_policy
from varfast.train import train
from varfast.types import Rollout, Sampling

CONFIGS = Path(__file__).parent.parent / "configs"
TEMPERATURE = 0.7


def policy_of(name: str, dtype: str) -> Policy:
    overrides = ["policy.checkpoint=random", f"run.device={harness.DEVICE.type}", f"run.dtype={dtype}"]
    if name != "digits":
        overrides += [f"policy.preset={name}", "policy.vqvae_checkpoint=null", "reward={bright: {type: brightness}}"]
    config = load_config(CONFIGS / ("digits.yaml" if name == "digits" else "d30.yaml"), overrides)
    policy = random_policy(with_dtype(config, harness.DEVICE), harness.DEVICE)
    # As it starts, the last layer all but ignores its input: then log-probabilities could not disagree.
    with torch.no_grad():
        policy.var.head.weight.mul_(50.0)
        for parameter in policy.var.parameters():
            if parameter.ndim == 2 and parameter.shape[0] == 6 * parameter.shape[1]:
                parameter[: 2 * parameter.shape[1]].mul_(1e5)  # the gates
    return policy


def moments(difference: Tensor) -> dict[str, float]:
    absolute = difference.double().abs()
    return {"mean": float(absolute.mean()), "std": float(difference.double().std()), "max": float(absolute.max())}


def gap(policy: Policy, labels: Tensor) -> dict[str, Any]:
    rollout = policy.sample(labels, TEMPERATURE, seed=1)
    with torch.no_grad():
        parts = zip(labels.split(16), rollout.tokens_BL.split(16), strict=True)
        forced = torch.cat([policy.token_logp(some, tokens, TEMPERATURE) for some, tokens in parts])
    return moments(forced - rollout.logp_BL) | {"entropy": float(rollout.entropy_BL.mean())}


def replays(policy: Policy, labels: Tensor) -> dict[str, Any]:
    def draw(step: int) -> Rollout:
        return policy.sample(labels, TEMPERATURE, seed=1, step=step)

    first, *again = (draw(0) for _ in range(4))
    other = draw(1)
    key = torch.tensor([1, 0, 0], device=labels.device)
    eager, _, _ = sample(policy.var, policy.vqvae, labels, key, Sampling(TEMPERATURE))
    return {
        "captured": policy._sampler._graph is not None,
        "same key, same tokens": all(torch.equal(first.tokens_BL, x.tokens_BL) for x in again),
        "same key, same log-probabilities": all(torch.equal(first.logp_BL, x.logp_BL) for x in again),
        "other key, share of equal tokens": share_equal(first.tokens_BL, other.tokens_BL),
        "eager, share of equal tokens": share_equal(first.tokens_BL, eager),
        "two images of one label differ": not torch.equal(first.tokens_BL[0], first.tokens_BL[1]),
    }


def splits(policy: Policy, labels: Tensor) -> dict[str, Any]:
    whole = policy.sample(labels, TEMPERATURE, seed=2)
    found: dict[str, Any] = {}
    for size in (len(labels) // 2, len(labels) // 4):
        part = policy.sample(labels, TEMPERATURE, seed=2, micro_batch=size)
        # Of each image up to its first other token: what follows is another image.
        same = (part.tokens_BL == whole.tokens_BL).cumprod(dim=1).bool()
        found[f"micro-batch {size}"] = {
            "share of equal tokens": share_equal(whole.tokens_BL, part.tokens_BL),
            "images with no other token": float(same.all(dim=1).double().mean()),
            "largest difference of log-probabilities": float((part.logp_BL - whole.logp_BL)[same].abs().max()),
        }
    return found


def share_equal(a: Tensor, b: Tensor) -> float:
    return float((a == b).double().mean())


CHECKS: dict[str, Callable[[Policy, Tensor], dict[str, Any]]] = {"gap": gap, "replays": replays, "splits": splits}


def digits_run(steps: int = 50) -> dict[str, Any]:
    """Train the digits to be bright: reward, KL and gap every 10 steps, and what was before and after."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        overrides = [f"run.dir={run}", f"run.steps={steps}", f"run.device={harness.DEVICE.type}"]
        if train(load_config(CONFIGS / "digits.yaml", [*overrides, "log.tensorboard=false"])) != 0:
            return {"ended": "before its last step"}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        shown = ("step", "reward_mean", "kl", "ratio_gap_max", "images_per_s")
        every = [{name: line[name] for name in shown} for line in lines if line["step"] == 1 or line["step"] % 10 == 0]
        return {"steps": every, **json.loads((run / "summary.json").read_text())}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    record = harness.Record(arguments.record)
    labels = (torch.arange(arguments.images, device=harness.DEVICE) // 4) % 10
    if arguments.model == "run":
        found = digits_run()
        print(json.dumps(found, indent=1))
        record.note("checks", "digits, 50 steps of GRPO", found)
        return 0
    failed = 0
    for dtype in ("bfloat16", "float32") if arguments.model != "d30" else ("bfloat16",):
        policy = policy_of(arguments.model, dtype)
        for name, check in CHECKS.items():
            try:
                found: object = check(policy, labels)
            except Exception as error:  # noqa: BLE001 - one check that does not run must not hide the others
                traceback.print_exc()
                found, failed = f"did not run: {error}", failed + 1
            print(f"{arguments.model} {dtype} {name}: {json.dumps(found, indent=1)}", flush=True)
            record.note("checks", f"{arguments.model} {dtype} {name}", found)
        del policy
        torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
