"""Fine-tune a visual autoregressive model with GRPO, or with DPO.

    python -m varfast.train configs/digits.yaml [--profile] [a.b=c ...]

On a run folder that holds an unfinished run, the same command goes on where it was.

Axes: B image, b image of this process, L token; B = P prompts x G samples, group-major.
Sources: arXiv:2505.23331 (GRPO), arXiv:2505.17017 (DPO).
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("train")

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from varfast.command import read_train
from varfast.config import Config
from varfast.data.labels import draw_labels
from varfast.learner import Learner
from varfast.losses import Loss
from varfast.losses.dpo import DPO
from varfast.losses.grpo import GRPO
from varfast.policies.protocol import Policy
from varfast.randomness import Key
from varfast.runs.pairs import LearnedPairs
from varfast.runs.run import Run
from varfast.runs.setup import begin, set_up
from varfast.types import Prompts, Sampling


def train(
    config: Config,
    profile: bool = False,
    beside: Path | None = None,
    of_folder: bool = False,
    loss: Loss | None = None,
    policy: Policy | None = None,
) -> int:
    """Run, or go on with, the experiment that `config` describes.

    Args:
        profile: write a trace and the memory use of one steady step into the run folder.
        beside: the folder of the config file: a reward of the user's is looked for there too.
        of_folder: the config is a run folder's own, which somebody may have handed on: what the run starts from is
            taken from the folder, and not from where the config says (docs/security.md).
        loss: what is minimised; None: what the config sets, GRPO or DPO.
        policy: what is trained; None: what policy.checkpoint names. To go on with a run, give it an equal one again.
    Returns: 0 when the run is complete, 128 + its number when a signal (SIGINT, SIGTERM, SIGHUP, SIGUSR1) ended it
        after a checkpoint.
    Raises: InputError for anything in the config, the files or the reward that cannot be used; Stopped (a
        KeyboardInterrupt) for a signal before the first step or after the last one.
    """
    minimised = loss or _chosen(config)
    # Device, processes, folder, plan of memory.
    with set_up(config, minimised.needs_reference, policy, of_folder) as setup:
        config, plan, world = setup.config, setup.plan, setup.world
        # Policy, reference, optimizer, rewards.
        state, before_after = begin(setup, beside, of_folder, policy)
        sampler, group_size = state.sampler, config.rollout.group_size
        how = Sampling(config.rollout.temperature, config.rollout.cfg)
        learner = Learner(state, minimised, config.update, plan.update, config.run.steps, config.run.seed, world)
        with Run(setup, state, before_after, profile) as run:
            if config.loss.saved_pairs is not None:
                return _learn(run, learner, LearnedPairs(setup, state.policy, of_folder))
            for step in run.steps():
                state.begin_step()
                # Roll out: sample a group of images for each label that is drawn.
                key = Key(config.run.seed, step, run.shard.start)
                labels_P = draw_labels(
                    setup.labels, config.rollout.labels_per_step, config.run.seed, step, config.rollout.replacement
                )
                prompts_b = Prompts(labels_P).repeat(group_size).rows(run.shard)
                with run.advised("rollout"):
                    rollout_b, images = sampler.sample_images(
                        prompts_b, how, key, plan.rollout.micro_batch, keep_input=True
                    )
                # Score the images, and compare those of a group with one another.
                scored = run.score(images, rollout_b, key)
                if isinstance(scored, BaseException):
                    run.skip(scored)  # raises, unless the next step may go better
                    continue
                rollout, rewards = scored
                batch = minimised.batch(rollout, rewards, state.rewards, group_size)
                # Learn: make the better ones more likely.
                # Guards that a reward's library kept may switch gradients off when Python frees them.
                with run.advised("update"), torch.enable_grad():
                    drift = run.drift(rollout_b)
                    metrics = learner.step(batch, step, run.total_steps)
                run.record(rollout, images, rewards, batch.numbers, metrics | drift)
            return run.finish()


def _learn(run: Run, learner: Learner, pairs: LearnedPairs) -> int:
    """Steps of DPO on saved pairs, without rollout and reward."""
    for step in run.steps():
        run.state.begin_step()
        batch = pairs.batch(step)
        with run.advised("update"), torch.enable_grad():
            metrics = learner.step(batch, step, run.total_steps)
        run.record_saved(batch.numbers, metrics)
    return run.finish()


def _chosen(config: Config) -> Loss:
    if config.dpo is not None:
        return DPO(config.dpo)
    return GRPO(config.grpo, config.policy.vocab_size, config.policy.scale_sides)


def main(arguments: list[str]) -> int:
    """python -m varfast.train config.yaml [--profile] [--sweep a.b=c,d ...] [a.b=c ...]"""
    runs = read_train(arguments)
    for number, config in enumerate(runs.configs):
        if runs.parent is not None:
            print(f"\nsweep {number + 1} of {len(runs.configs)}: {config.run.dir}")
        code = train(config, runs.profile, runs.beside, runs.of_folder)
        if code:
            return code
    if runs.parent is not None:
        print(f"\nside by side: python -m varfast.report {runs.parent}/*")
    return 0


class _Module(ModuleType):
    """`varfast.train` is this module and a function too: a call of it is varfast.from_python.train."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        from varfast.from_python import train as from_python

        return from_python(*args, **keywords)

    def __reduce__(self) -> Any:  # by its name, as cloudpickle takes other modules: submitit and Ray pass functions on
        return importlib.import_module, (__name__,)

    @property
    def __signature__(self) -> Any:  # what a notebook shows of it
        from varfast.from_python import train as from_python

        return inspect.signature(from_python)


sys.modules[__name__].__class__ = _Module
