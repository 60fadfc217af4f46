"""From a config to what a run is made of: device, processes, folder, plan of memory, and the state it begins with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from varfast import kernels
from varfast.config import Config
from varfast.data.labels import label_pool, run_names
from varfast.data.pairs import set_folder
from varfast.data.prompts import PromptSet, run_prompts, save_prompts
from varfast.distributed import World, alike, decided_by_first, joined, local_device, processes_here
from varfast.perf.devices import available_bytes, usual_bytes, with_dtype
from varfast.perf.memory import MemoryPlan
from varfast.perf.out_of_memory import check_states
from varfast.perf.plan import plan_memory
from varfast.perf.spent import spent_before, whole_step
from varfast.perf.work import Work
from varfast.policies import strict
from varfast.policies.device import pick_device
from varfast.policies.families import family_of
from varfast.policies.lora import import_peft
from varfast.policies.protocol import Policy
from varfast.randomness import deterministic
from varfast.rewards import WeightedSum
from varfast.runs.base_samples import begin_rewards
from varfast.runs.before_after import BeforeAfter
from varfast.runs.checkpoint import Checkpoint
from varfast.runs.divergence import diagnosis, found_diverged
from varfast.runs.environment import environment
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_base
from varfast.runs.lock import FolderLock
from varfast.runs.log import step_seconds
from varfast.runs.signals import StopSignals, listen
from varfast.runs.start import prepare_base
from varfast.runs.trackers import import_trackers
from varfast.state import State
from varfast.types import InputError


@dataclass(frozen=True)
class Setup:
    """What a run has, before and beside its state.

    Attributes:
        config: with run.dtype resolved.
        device, world, signals, folder, lock: the folder is locked while the run goes on.
        found: the checkpoint to go on from; None: the run is new.
        work, plan: what this process does of a step, and how it fits into memory.
        shard: the images of a step that this process samples and scores.
        labels: those that the run draws from; of texts their rows in `prompts`. names: of all labels, if they have any.
        prompts: the table of texts, of a family that is conditioned on text; None: it is conditioned on labels.
        environment: versions and hardware.
    """

    config: Config
    device: torch.device
    world: World
    signals: StopSignals
    folder: RunFolder
    lock: FolderLock
    found: Checkpoint | None
    work: Work
    plan: MemoryPlan
    shard: slice
    labels: list[int]
    names: list[str] | None
    prompts: PromptSet | None
    environment: dict[str, Any]

    @property
    def evaluation_batch(self) -> int | None:
        """Images of this process at a time in an evaluation; None: the default.

        On a GPU as many as in a step, for which the rollout's CUDA graphs were captured.
        """
        of_step = self.shard.stop - self.shard.start if self.device.type == "cuda" else None
        return self.plan.rollout.micro_batch or of_step


@contextmanager
def set_up(
    config: Config, reads_reference: bool | None = None, policy: Policy | None = None, of_folder: bool = False
) -> Iterator[Setup]:
    """Join the other processes and lock the run folder; leaving undoes both.

    Args:
        reads_reference: whether the loss reads the log-probabilities of a reference; None: as the config's does.
        policy: what is trained, in place of what the config names.
        of_folder: nothing is read that the config names outside of the folder.
    Raises: InputError for anything in the config or in the folder that cannot be used.
    """
    with ExitStack() as until_the_end:
        with alike():
            found = _set_up(until_the_end, config, reads_reference, policy, of_folder)
        yield found


def _set_up(
    until_the_end: ExitStack,
    config: Config,
    reads_reference: bool | None,
    policy: Policy | None,
    of_folder: bool,
) -> Setup:
    """See set_up. until_the_end: takes what is held so long."""
    enter = until_the_end.enter_context
    device = pick_device(local_device(config.run.device))
    signals = enter(listen())
    enter(deterministic(config.run.deterministic))
    world = enter(joined(device, config.run.timeout_s))
    if world.size > config.rollout.images:
        raise InputError(f"{world.size} processes for {config.rollout.images} images a step; start fewer")
    config = with_dtype(config, device)
    try:
        kernels.configure(config.kernels.model_dump(), device)
    except ValueError as error:
        raise InputError(f"kernels: {error}") from error
    # What cannot start is said before models are loaded.
    import_trackers(config.log)
    if config.policy.lora:
        import_peft()
    if config.loss.saved_pairs is not None:
        set_folder(config.loss.saved_pairs)
    shard = world.shard(config.rollout.images)
    if policy is None:
        cost = family_of(config.policy).cost_of(config.policy, config.run.dtype)
    else:
        cost = policy.cost(config.run.dtype, config.policy.lora)
    work = Work.whole(config, cost, reads_reference).share(shard.stop - shard.start, world.size)
    plan = fitting_plan(work, device, world)
    folder = RunFolder(config.run.dir)
    lock = enter(folder.held())
    found = folder.prepare(config)
    labels, names, prompts = _conditions(config, folder, found is not None, of_folder)
    here = environment() | {"processes": world.size}
    return Setup(config, device, world, signals, folder, lock, found, work, plan, shard, labels, names, prompts, here)


def _conditions(
    config: Config, folder: RunFolder, going_on: bool, of_folder: bool
) -> tuple[list[int], list[str] | None, PromptSet | None]:
    """Ids that the run draws from, names of all labels, and the table of texts: see Setup."""
    if config.prompts is not None:
        prompts = run_prompts(config.prompts, config.run.seed, folder.path, going_on, of_folder)
        return prompts.ids("train"), None, prompts
    names = run_names(config.policy, config.pretrain.dataset, folder.path, made=folder.base.exists())
    return label_pool(config.rollout, config.policy.num_classes, config.run.seed, names), names, None


def fitting_plan(work: Work, device: torch.device, world: World) -> MemoryPlan:
    """Micro-batches, checkpointing and CUDA graphs that fit the memory of every process.

    Raises: InputError if what a run holds all the time does not fit.
    """
    free_bytes = usual_bytes(device) if work.config.run.deterministic else available_bytes(device)
    free_bytes //= processes_here() if device.type == "cpu" else 1
    free_bytes = -int(world.largest(-free_bytes))
    check_states(work, device)
    return plan_memory(work, free_bytes, may_capture_update=device.type == "cuda" and world.size == 1)


def begin(
    setup: Setup, beside: Path | None, of_folder: bool, policy: Policy | None = None
) -> tuple[State, BeforeAfter]:
    """The state that the run begins with, or goes on with; and the table of before and after, its "before" measured.

    Args:
        beside: folder of the config file, where a reward of the user's is looked for too.
        of_folder: take what the run starts from out of its folder, not from where the config says.
        policy: what is trained, in place of what the config names.
    Raises: InputError for what cannot be loaded.
    """
    config, world, folder = setup.config, setup.world, setup.folder
    with world.leader_first():  # it pre-trains and downloads
        rewards = WeightedSum(
            config.reward,
            setup.device,
            None if setup.prompts else config.policy.num_classes,
            names=setup.names,
            seed=config.run.seed,
            beside=beside,
            image_size=config.policy.image_size,
            prompts=setup.prompts,
        )
        if world.is_main and setup.prompts:
            save_prompts(setup.prompts, folder.path)
        if policy is None:
            if world.is_main:
                prepare_base(config, folder, setup.found is not None, setup.device, of_folder)
            policy = load_base(config, folder, setup.device, whole=False)
        if setup.prompts:
            policy.set_prompts(setup.prompts.texts)
    if config.policy.lora:
        policy.add_lora(config.policy.lora, config.run.seed)
    if config.run.strict:
        strict.check(policy, config.rollout.temperature, config.run.seed, config.rollout.cfg)
    policy.cuda_graph = setup.plan.rollout.cuda_graph
    moves = config.loss.reference_moves is not None
    reference = policy.frozen_copy(moves) if setup.work.holds_reference else None
    policy.distribute(world, config.run.parallel, reference)
    state = State(policy, reference, rewards, config.update, config.loss)
    before_after = BeforeAfter(folder.path, config, setup.labels, setup.prompts, world)
    if setup.found is None:
        _refuse_diverged(setup, policy, 0)
        begin_rewards(rewards, policy, config, setup.labels, world, setup.plan.rollout.micro_batch)
    # The policy is still the base, of a run that goes on too.
    before_after.before(policy, rewards, setup.evaluation_batch)
    if setup.found is not None:
        state.load(setup.found)
        if setup.found.spent is None:
            _count_spent(setup, state)
        _refuse_diverged(setup, policy, state.step)
    return state, before_after


def _count_spent(setup: Setup, state: State) -> None:
    """Of a run whose checkpoint does not say what it has spent, since an earlier version wrote it."""
    config, path = setup.config, setup.folder.path
    cost = state.policy.cost(config.run.dtype, config.policy.lora)
    work = Work.whole(config, cost, setup.work.reads_reference)
    found = decided_by_first(lambda: spent_before(state.step, whole_step(work), step_seconds(path, state.step)))
    state.spent = state.learned_spent = found
    if setup.world.is_main and state.step:
        print(f"{path} does not say what it has spent; taken for {found} (FLOP as if every image had a gradient)")


def _refuse_diverged(setup: Setup, policy: Policy, step: int) -> None:
    if found := found_diverged(policy, setup.labels, setup.config, setup.world):
        raise diagnosis(found, setup.config, setup.folder.path, step, {})
