"""Fine-tune a VAR with GRPO.

    python -m varfast.train configs/digits.yaml [--profile] [a.b=c ...]

On a run folder that holds an unfinished run, the same command goes on where it was.

Axes: B image; B = P labels x G samples, group-major.
Source: arXiv:2505.23331.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict

import torch

from varfast import kernels
from varfast.checkpoint import Checkpoints, RunFolder, save_tensors, save_text
from varfast.command import run_command, split_arguments
from varfast.config import Config, load_config
from varfast.evaluate import evaluate
from varfast.grpo import combined_advantages, groups_without_signal
from varfast.labels import draw_labels, label_pool
from varfast.log import RunLog, StageLimits, environment, profiled, table
from varfast.models import VAR, VQVAE
from varfast.policy import Policy, load_policy, pick_device
from varfast.pretrain import pretrained
from varfast.randomness import GRID_STEP
from varfast.rewards import WeightedSum
from varfast.roofline import available_bytes, lower_memory, planned, with_dtype
from varfast.stages import StageClock, stage
from varfast.types import InputError, NotFiniteReward, Rewards, Rollout, ScoredRollout, StepStats
from varfast.update import Updater

_INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}


def train(config: Config, profile: bool = False) -> int:
    """Run, or go on with, the experiment that `config` describes.

    Args:
        profile: write a trace and the memory use of one steady step into the run folder.
    Returns: 0 when the run is complete, 130 or 143 when a signal ended it after a checkpoint.
    Raises: InputError for anything in the config, the files or the reward that cannot be used.
    """
    device = pick_device(config.run.device)
    config = with_dtype(config, device)
    try:
        kernels.configure(config.kernels.model_dump(), device)
    except ValueError as error:
        raise InputError(f"kernels: {error}") from error
    fitted = planned(config, available_bytes(device))
    folder = RunFolder(config.run.dir)
    found = folder.prepare(config)
    reward = WeightedSum(config.reward, device, config.policy.sizes.num_classes)
    policy = load_base(config, folder, resume=found is not None)
    reference = policy.frozen_copy() if config.grpo.kl_beta > 0.0 else None
    updater = Updater(policy, reference, config.grpo, fitted.update, config.run.steps, config.run.seed)
    labels = label_pool(config.rollout, policy.num_classes, config.run.seed)
    here = environment()
    if found is None:
        save_text(folder.path / "environment.json", json.dumps(here, indent=2) + "\n")
        start, before = 0, _evaluate(policy, reward, labels, fitted)
    else:
        found.load(policy.var, updater.optimizer)
        start, before = found.step, found.before
    bad_rollouts = 0  # in a row

    sampling, group_size, seed = fitted.rollout, config.rollout.group_size, config.run.seed
    limits = StageLimits(fitted, device)
    with (
        RunLog(folder.path, start, config.run.steps, config.log.tensorboard) as log,
        Checkpoints(folder.checkpoints, config, here, log.say) as checkpoints,
        StageClock(device) as clock,
        _catch_signals() as received,
    ):
        if start:
            log.say(f"going on after step {start} of {config.run.steps} in {folder.path}")
        else:
            _save_grid(log, 0, policy, labels, config)
        for step in range(start, config.run.steps):
            steady = step == min(start + 2, config.run.steps - 1)
            with profiled(folder.path / "profile", device) if profile and steady else nullcontext():
                clock.read()
                begin_s = time.perf_counter()
                # A step: draw labels, sample a group of images for each, ...
                labels_B = draw_labels(labels, sampling.labels_per_step, seed, step).repeat_interleave(group_size)
                with _advised("rollout", fitted):
                    rollout, images = policy.sample_images(
                        labels_B, sampling.temperature, seed=seed, step=step, micro_batch=sampling.micro_batch
                    )
                # ... score them against one another, ...
                try:
                    with stage("reward"), _advised("reward", fitted):
                        rewards, bad_rollouts = reward(images, rollout.labels_B), 0
                except Exception as error:
                    if isinstance(error, NotFiniteReward) and bad_rollouts + 1 < config.run.max_bad_rollouts:
                        rewards, bad_rollouts = None, bad_rollouts + 1
                        log.say(f"step {step + 1} is left out: {error}")
                    else:
                        held = step - bad_rollouts
                        checkpoints.save(held, policy.var, updater.optimizer, before)
                        checkpoints.wait()
                        error.add_note(
                            f"  nothing is lost: {folder.path} holds step {held}; the same command goes on from there"
                        )
                        raise
                if rewards is not None:
                    advantages_B = combined_advantages(
                        rewards, reward.weights, group_size, config.grpo.combine, config.grpo.advantage_eps
                    )
                    # ... and make the better ones more likely.
                    with _advised("update", fitted):
                        stats = updater.step(ScoredRollout(rollout, advantages_B), step)
                stages_ms = clock.read()
                step_s = time.perf_counter() - begin_s

            done, metrics = step + 1, {"skipped_rollouts": float(rewards is None)}
            if rewards is not None:
                metrics |= _metrics(rollout, rewards, advantages_B, group_size, stats)
            log.step(done, metrics | limits.metrics(stages_ms, step_s))
            if done % config.log.grid_every == 0 or done == config.run.steps:
                _save_grid(log, done, policy, labels, config)
            # A rollout that was left out changed nothing: when the run is taken up again, it is tried again.
            held = done if done == config.run.steps else done - bad_rollouts
            if checkpoints.due(done) or done == config.run.steps or received:
                checkpoints.save(held, policy.var, updater.optimizer, before, metrics.get("reward_mean"))
            if received and done < config.run.steps:
                checkpoints.wait()
                log.say(f"stopped; {folder.path} holds step {held} of {config.run.steps}. The same command goes on.")
                return _INTERRUPTED[received[0]]

    save_tensors(folder.weights, policy.var.state_dict())
    after = _evaluate(policy, reward, labels, fitted)
    save_text(folder.path / "summary.json", json.dumps({"before": before, "after": after}, indent=2) + "\n")
    print(f"\n{table(before, after)}\n" if after else "")
    print(f"run complete: {config.run.steps} steps. Weights {folder.weights}, curves and grids in {folder.path}")
    return 0


def load_base(config: Config, folder: RunFolder, resume: bool) -> Policy:
    """The model that a run starts from: random, pre-trained now or earlier, or from checkpoints.

    With `resume`, the very files that the run in the folder started from.
    """
    device = pick_device(config.run.device)
    if config.policy.checkpoint == "random":
        return random_policy(config, device)
    noted = folder.load_base() if resume else None
    if noted is not None:
        var, vqvae = noted
    elif config.policy.checkpoint == "pretrain":
        var, vqvae = (str(path) for path in pretrained(config, device))
    else:
        assert config.policy.vqvae_checkpoint is not None
        var, vqvae = config.policy.checkpoint, config.policy.vqvae_checkpoint
    policy = load_policy(
        var, vqvae, device, config.run.dtype, config.policy.sizes, config.policy.vqvae, config.run.fast
    )
    folder.save_base(var, vqvae)
    return policy


def load_run(folder: RunFolder, device: torch.device, dtype: str) -> Policy:
    """The policy of a run folder, as of its last checkpoint."""
    config = folder.load_config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"device": str(device), "dtype": dtype})})
    policy = load_base(config, folder, resume=True)
    folder.newest().load(policy.var)
    return policy


def random_policy(config: Config, device: torch.device) -> Policy:
    """Random weights of the configured sizes, fixed by the seed: for benchmarks and tests."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(config.run.seed)
        vqvae = VQVAE(config.policy.vqvae)
        var = VAR(config.policy.sizes).init_weights(config.run.seed)
    return Policy(var, vqvae, device, config.run.dtype, config.run.fast)


def _evaluate(policy: Policy, reward: WeightedSum, labels: list[int], config: Config) -> dict[str, float]:
    sampling = config.rollout
    return evaluate(policy, reward, labels, config.eval, sampling.temperature, config.run.seed, sampling.micro_batch)


def _save_grid(log: RunLog, step: int, policy: Policy, labels: list[int], config: Config) -> None:
    columns = config.log.grid_samples
    labels_B = torch.tensor(labels[: config.log.grid_labels]).repeat_interleave(columns)
    rollout = policy.sample(labels_B, config.rollout.temperature, seed=config.run.seed, step=GRID_STEP)
    log.grid(step, policy.decode(rollout.tokens_BL), columns)


def _metrics(
    rollout: Rollout, rewards: Rewards, advantages_B: torch.Tensor, group_size: int, stats: StepStats
) -> dict[str, float]:
    """The numbers of a step, by the names of metrics.jsonl."""
    measured = {
        "reward_mean": rewards.total_B.mean(),
        "reward_std": rewards.total_B.std(correction=0),
        **{f"reward/{name}": score_B.mean() for name, score_B in rewards.components.items()},
        "advantage_mean": advantages_B.mean(),
        "advantage_std": advantages_B.std(correction=0),
        "entropy": rollout.entropy_BL.mean(),
    }
    values = torch.stack(list(measured.values())).tolist()  # one copy from the device
    without_signal = groups_without_signal(advantages_B, group_size)
    return {**dict(zip(measured, values, strict=True)), "groups_without_signal": without_signal, **asdict(stats)}


@contextmanager
def _advised(part: str, config: Config) -> Iterator[None]:
    """Say which setting to change where the device's memory does not suffice for a part of the step."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"out of memory in the {part}: {reason}\n  {lower_memory(config, part)}") from error


@contextmanager
def _catch_signals() -> Iterator[list[signal.Signals]]:
    """Collect the first SIGINT or SIGTERM, so that the step at hand can end; a second one acts at once."""
    received: list[signal.Signals] = []

    def note(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        print("\nstopping after this step; once more to stop at once (back to the last checkpoint)", flush=True)
        for name in _INTERRUPTED:
            signal.signal(name, previous[name])

    previous = {name: signal.signal(name, note) for name in _INTERRUPTED}
    try:
        yield received
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def main(arguments: list[str]) -> int:
    """python -m varfast.train config.yaml [--profile] [a.b=c ...]"""
    rest = [a for a in arguments if a != "--profile"]
    config = load_config(*split_arguments(rest, "python -m varfast.train config.yaml [--profile] [a.b=c ...]"))
    return train(config, profile="--profile" in arguments)


if __name__ == "__main__":
    run_command(main)
