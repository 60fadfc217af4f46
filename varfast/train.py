"""Fine-tune a VAR with GRPO.

    python -m varfast.train configs/digits.yaml [--profile] [a.b=c ...]

On a run folder that holds an unfinished run, the same command goes on where it was.

Axes: B image; B = P labels x G samples, group-major.
Source: arXiv:2505.23331.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("train")

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import safetensors.torch
import torch

from varfast import kernels
from varfast.advantages import combined_advantages, groups_without_signal
from varfast.command import read_train
from varfast.config import Config
from varfast.data.labels import LABELS_FILE, caption, draw_labels, label_pool, labels_json, read_labels, run_names
from varfast.distributed import World, gathered, joined, local_device, processes_here
from varfast.files import save_tensors, save_text, write_atomically
from varfast.learner import Updater
from varfast.losses.grpo import kl_to_reference
from varfast.perf.stages import StageClock, stage
from varfast.policies import strict
from varfast.policies.var.config import VARConfig
from varfast.policies.var.lora import import_peft, merged_state, peft_adapter, without_lora
from varfast.policies.var.policy import Policy, check_finite, load_policy, pick_device
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR
from varfast.policies.var.weights import load_var, load_vqvae, resolve
from varfast.pretrain import pretrained
from varfast.printable import printable
from varfast.randomness import GRID_STEP, deterministic
from varfast.rewards import WeightedSum
from varfast.roofline import (
    available_bytes,
    check_states,
    lower_memory,
    memory,
    planned,
    reserved_and_allocated,
    scattered_memory,
    share,
    usual_bytes,
    with_dtype,
)
from varfast.runs.base import PARTS, Base, Source
from varfast.runs.before_after import BeforeAfter, means, table
from varfast.runs.checkpoint import Checkpoints
from varfast.runs.divergence import diagnosis, refuse_diverged
from varfast.runs.environment import environment
from varfast.runs.folder import RunFolder
from varfast.runs.log import RunLog, import_wandb
from varfast.runs.profile import StageLimits, memory_metrics, profiled
from varfast.runs.signals import StopSignals, listen
from varfast.types import (
    InputError,
    NotFinitePolicy,
    NotFiniteReward,
    Prompts,
    Rewards,
    Rollout,
    ScoredRollout,
    StepStats,
)


def train(config: Config, profile: bool = False, beside: Path | None = None, of_folder: bool = False) -> int:
    """Run, or go on with, the experiment that `config` describes.

    Args:
        profile: write a trace and the memory use of one steady step into the run folder.
        beside: the folder of the config file: a reward of the user's is looked for there too.
        of_folder: the config is a run folder's own, which somebody may have handed on: what the run starts from is
            taken from the folder, and not from where the config says (docs/security.md).
    Returns: 0 when the run is complete, 128 + its number when a signal (SIGINT, SIGTERM, SIGHUP, SIGUSR1) ended it
        after a checkpoint.
    Raises: InputError for anything in the config, the files or the reward that cannot be used; Stopped (a
        KeyboardInterrupt) for a signal before the first step or after the last one.
    """
    device = pick_device(local_device(config.run.device))
    with (
        listen() as signals,
        deterministic(config.run.deterministic),
        joined(device, config.run.timeout_s) as world,
        ExitStack() as at_end,
    ):
        return _train(config, device, world, signals, at_end, profile, beside, of_folder)


def _train(
    config: Config,
    device: torch.device,
    world: World,
    signals: StopSignals,
    at_end: ExitStack,
    profile: bool,
    beside: Path | None,
    of_folder: bool,
) -> int:
    if world.size > config.rollout.images:
        raise InputError(f"{world.size} processes for {config.rollout.images} images a step; start fewer")
    config = with_dtype(config, device)
    try:
        kernels.configure(config.kernels.model_dump(), device)
    except ValueError as error:
        raise InputError(f"kernels: {error}") from error
    if config.log.wandb:
        import_wandb()  # what cannot start is said before models are loaded
    if config.policy.lora:
        import_peft()
    mine = world.share(config.rollout.images)  # the images of a step that this process samples and scores
    fitted = _fitted(config, device, world, mine.stop - mine.start)
    folder = RunFolder(config.run.dir)
    lock = at_end.enter_context(folder.held())
    found = folder.prepare(config)
    names = run_names(config.policy, config.pretrain, folder.path, made=folder.base.exists())
    labels = label_pool(config.rollout, config.policy.sizes.num_classes, config.run.seed, names)
    with world.leader_first():  # it pre-trains and downloads
        reward = WeightedSum(
            config.reward, device, config.policy.sizes.num_classes, names=names, seed=config.run.seed, beside=beside
        )
        on_device = config.model_copy(update={"run": config.run.model_copy(update={"device": str(device)})})
        if world.is_main:
            _prepare_base(on_device, folder, found is not None, device, of_folder)
        policy = load_base(on_device, folder, whole=False)
    if config.policy.lora:
        policy.add_lora(config.policy.lora, config.run.seed)
    if config.run.strict:
        strict.check(policy, config.rollout.temperature, config.run.seed)
    policy.cuda_graph = fitted.rollout.cuda_graph is not False
    reference = policy.frozen_copy() if config.holds_reference else None
    policy.distribute(world, config.run.parallel, reference)
    fits = {name: getattr(fitted.update, name) for name in ("micro_batch", "checkpointing", "cuda_graph")}
    update = config.update.model_copy(update=fits)
    of_loss = reference if config.grpo.kl_beta > 0.0 else None
    updater = Updater(policy, of_loss, config.grpo, update, config.run.steps, config.run.seed, world)
    further = updater.further_state()
    start, before, bad_rollouts = 0, {}, 0  # bad ones in a row
    here = environment() | {"processes": world.size}
    samples = BeforeAfter(folder.path, config, labels)
    if found is None:
        refuse_diverged(policy, labels, config, world, folder.path, 0, {})
    if world.is_main:  # the policy is still the base, of a run that goes on too
        before = means(samples.before(policy, reward, fitted.rollout.micro_batch))
    if found is not None:
        found.load(policy.var, updater.optimizer, further)
        policy.gather()
        start = found.step
        refuse_diverged(policy, labels, config, world, folder.path, start, {})

    every = config.grpo.reference_every
    sampling, group_size, seed = fitted.rollout, config.rollout.group_size, config.run.seed
    limits = StageLimits(fitted, device, config.rollout.images) if world.is_main else None
    spare = at_end.enter_context(_spare_descriptors())
    with (
        _log(world, folder, start, config) as log,
        Checkpoints(folder.checkpoints, config, here, log.say if log else lambda text: None) as checkpoints,
        StageClock(device) as clock,
        signals.in_steps(),
    ):
        if log and start > config.run.steps:
            log.say(f"{folder.path} holds step {start}, more than run.steps={config.run.steps}: no step is left to do")
        elif log and start:
            log.say(f"going on after step {start} of {config.run.steps} in {folder.path}")
        elif log:
            log.environment(here)
            _save_grid(log, 0, policy, labels, config, names)
        metrics: dict[str, float] = {}
        if log and not config.holds_reference:
            log.say("the KL to the base is not measured: grpo.kl_beta=0 holds no base; grpo.kl_every=10 measures it")
        for step in range(start, config.run.steps):
            steady = profile and world.is_main and step == min(start + 2, config.run.steps - 1)
            lock.check()
            with profiled(folder.path / "profile", device) if steady else nullcontext():
                clock.read()
                begin_s = time.perf_counter()
                # A step: draw labels, sample a group of images for each, ...
                labels_B = draw_labels(labels, config.rollout.labels_per_step, seed, step)
                labels_b = labels_B.repeat_interleave(group_size)[mine]
                with _advised("rollout", fitted):
                    drawn, images = policy.sample_images(
                        labels_b,
                        sampling.temperature,
                        seed=seed,
                        step=step,
                        first_sample=mine.start,
                        micro_batch=sampling.micro_batch,
                        keep_input=True,
                    )
                # ... score them against one another, ...
                scores = _score(reward, images, drawn, world, fitted, step, mine.start)
                if isinstance(scores, Rewards):
                    # A refresh that a left-out rollout kept from its step is made up for here.
                    if reference and every and step // every > (step - bad_rollouts - 1) // every:
                        reference.var.refresh(policy.var)
                    bad_rollouts = 0
                    rollout, rewards = _gather(world, drawn, scores, config.rollout.images)
                    advantages_B = combined_advantages(
                        rewards, reward.weights, group_size, config.grpo.combine, config.grpo.advantage_eps
                    )
                    # ... and make the better ones more likely.
                    # Guards that a reward's library kept may switch gradients off when Python frees them.
                    with _advised("update", fitted), torch.enable_grad():
                        drift = _drift(reference, drawn, world, fitted, step + 1)
                        stats = updater.step(ScoredRollout(rollout, advantages_B), step)
                elif isinstance(scores, NotFinitePolicy):
                    raise diagnosis(scores, config, folder.path, step, metrics, checkpoints)
                elif isinstance(scores, NotFiniteReward) and bad_rollouts + 1 < config.run.max_bad_rollouts:
                    bad_rollouts += 1
                    if log:
                        log.say(f"step {step + 1} is left out: {scores}")
                else:
                    held = step - bad_rollouts
                    spare.close()
                    try:
                        checkpoints.save(held, policy.var, updater.optimizer, before, None, further)
                        checkpoints.wait()
                        note = f"nothing is lost: {folder.path} holds step {held}; the same command goes on from there"
                    except InputError as unsaved:
                        note = f"and step {held} was not saved: {unsaved}"
                    scores.add_note(f"  {note}")
                    raise scores
                stages_ms = clock.read()
                step_s = time.perf_counter() - begin_s
                held_bytes = memory_metrics(device)

            done, metrics = step + 1, {"skipped_rollouts": float(bad_rollouts > 0)}
            if not bad_rollouts:
                metrics |= _metrics(rollout, rewards, advantages_B, group_size, stats) | drift
                metrics |= {"reference_step": float(step // every * every)} if every else {}
            stopped = int(world.largest(signals.received or 0))  # one process is told to stop: all of them do
            last = done == config.run.steps
            shown, saved = last or done % config.log.grid_every == 0, bool(last or stopped or checkpoints.due(done))
            # What cannot be sampled is neither shown nor saved, so that the last good checkpoint stays.
            if shown or saved:
                refuse_diverged(policy, labels, config, world, folder.path, done, metrics, checkpoints)
            if log and limits:
                log.step(done, metrics | limits.metrics(stages_ms, step_s) | held_bytes)
                if shown:
                    _save_grid(log, done, policy, labels, config, names)
                    if isinstance(scores, Rewards):
                        log.samples(done, images, drawn.labels_B, scores)
            # A rollout that was left out changed nothing: when the run is taken up again, it is tried again.
            held = done if last else done - bad_rollouts
            if saved:
                checkpoints.save(held, policy.var, updater.optimizer, before, metrics.get("reward_mean"), further)
            if stopped and not last:
                checkpoints.wait()
                if log:
                    log.say(
                        f"stopped; {folder.path} holds step {held} of {config.run.steps}. The same command goes on."
                    )
                return 128 + stopped

    updater.deliver()  # the average of the weights, where the config asks for one
    weights = gathered(policy.var.state_dict(), world)
    if world.is_main:
        if config.policy.lora:
            weights = merged_state(policy.var, _base_weights(config, folder, device))
            _save_adapter(folder, policy, config)
        save_tensors(folder.weights, weights)
        reached = max(start, config.run.steps)
        after = samples.after(policy, reward, reached, fitted.rollout.micro_batch, trained=reached > start)
        save_text(folder.path / "summary.json", json.dumps({"before": before, "after": means(after)}, indent=2) + "\n")
        print(f"\n{table(samples.values)}\n" if after else "")
        print(f"run complete: {reached} steps. Weights {folder.weights}, curves and grids in {folder.path}")
    world.wait()
    return 0


def _spare_descriptors() -> ExitStack:
    """Open files to close before a failing reward's state is saved: it may have failed as it used up all there are."""
    spare = ExitStack()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 64:  # else the run needs them itself
        with suppress(OSError):
            for _ in range(16):
                spare.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    return spare


def _fitted(config: Config, device: torch.device, world: World, images: int) -> Config:
    """The config of what this process does of a step, with micro-batches and checkpointing that fit every process."""
    free_bytes = usual_bytes(device) if config.run.deterministic else available_bytes(device)
    free_bytes //= processes_here() if device.type == "cpu" else 1
    if world.size > 1:
        config = share(config, images, -(-config.update.minibatch // world.size))
    shards = world.size if config.run.parallel == "fsdp" else 1
    free_bytes = -int(world.largest(-free_bytes))
    check_states(config, device, shards)
    if config.update.cuda_graph is None and device.type == "cuda" and world.size == 1:
        captured = config.update.model_copy(update={"cuda_graph": True})
        found = planned(config.model_copy(update={"update": captured}), free_bytes, shards)
        if memory(found, shards).fits(free_bytes):
            return found
    return planned(config, free_bytes, shards)


def _log(world: World, folder: RunFolder, start: int, config: Config) -> AbstractContextManager[RunLog | None]:
    if not world.is_main:
        return nullcontext()
    return RunLog(folder.path, start, max(start, config.run.steps), config.log.tensorboard, config)


def _score(
    reward: WeightedSum,
    images: torch.Tensor,
    drawn: Rollout,
    world: World,
    config: Config,
    step: int,
    first_sample: int,
) -> Rewards | BaseException:
    """The rewards of this process's images, or what kept this process, or another one, from them."""
    found: Rewards | BaseException
    try:
        check_finite(drawn, images)  # here, where the reward waits for the images anyway
        with stage("reward"), _advised("reward", config):
            found = reward(images, drawn.labels_B, step, first_sample)
    except BaseException as error:  # noqa: BLE001 - whatever a reward raises, KeyboardInterrupt too, is raised once all
        found = error  # processes know, and the state is saved
    rank = 3 if isinstance(found, NotFinitePolicy) else 1 if isinstance(found, NotFiniteReward) else 2
    worst = world.largest(0 if isinstance(found, Rewards) else rank)
    if worst == 3 and not isinstance(found, NotFinitePolicy):
        return NotFinitePolicy("the logits or images of another process, which says which, are not finite")
    if not isinstance(found, Rewards) or worst == 0:
        return found
    elsewhere = "the reward failed in another process, which says why"
    return NotFiniteReward(elsewhere) if worst == 1 else InputError(elsewhere)


def _drift(reference: Policy | None, rollout: Rollout, world: World, config: Config, step: int) -> dict[str, float]:
    """The KL to the base where the loss has none and it is due: of the policy that drew this step's images.

    rollout: this process' share of them.
    """
    every = config.measure_kl_every
    if reference is None or every is None or (step % every and step != config.run.steps):
        return {}
    kl_b = kl_to_reference(reference, rollout, config.update.micro_batch).double()
    total, images = world.sum(torch.stack([kl_b.sum(), torch.ones_like(kl_b).sum()])).tolist()
    return {"kl": total / images}


def _gather(world: World, rollout: Rollout, rewards: Rewards, images: int) -> tuple[Rollout, Rewards]:
    """What all processes have drawn and scored of a step's images."""
    # The transformer's input of 512 images of the public models is 44 MB: 0.2 ms between GPUs of one machine, 2 ms at
    # 25 GB/s. Computed again it takes each of two processes 3 ms, and may differ from the rollout's in the last bit.
    teacher_input = rollout.teacher_input
    of_all = replace(
        rollout,
        prompts=Prompts(world.gather(rollout.prompts.ids_B, images)),
        tokens_BL=world.gather(rollout.tokens_BL, images),
        logp_BL=world.gather(rollout.logp_BL, images),
        entropy_BL=world.gather(rollout.entropy_BL, images),
        teacher_input=None if teacher_input is None else world.gather(teacher_input, images),
    )
    components = {name: world.gather(score_B, images) for name, score_B in rewards.components.items()}
    return of_all, Rewards(world.gather(rewards.total_B, images), components)


def _prepare_base(config: Config, folder: RunFolder, resume: bool, device: torch.device, of_folder: bool) -> None:
    """Have what the run starts from in place and noted: pre-train, fetch or copy it. Of the process that leads.

    With `resume`, the very files that the run in the folder started from; what is lost of them is made or fetched
    again, if it can be had bit for bit. With `of_folder`, nothing is read or fetched that the config names.
    """
    address = config.policy.checkpoint
    if address == "random":
        return
    base = Base(folder)
    outside = of_folder and not (address == "pretrain" and config.pretrain.dataset == "digits")
    untrusted = (
        f"{folder.path} was named, and not its config: if you trust that, and what it starts from "
        f"(policy.checkpoint={printable(address)}), pass it as a file: {folder.config} run.dir={folder.path}"
    )
    if outside and not base.noted:
        raise InputError(f"what the run starts from is not in its folder. {untrusted}")
    if not resume and not outside:
        var, vqvae = _sources(config, device)
        _keep_labels(folder, var.origin)
        base.keep(var, vqvae)
        return
    if not base.noted:
        print(f"{folder.base} is gone; the base is what policy.checkpoint names now, unchecked")
        base.keep(*_sources(config, device))
        return
    only_here = address == "pretrain" or Path(address).expanduser().is_dir()
    try:
        if base.hashed:
            base.heal("var", only_here)
            base.heal("vqvae", only_here)
        else:  # begun before hashes were noted
            base.keep(*(Source(path, only_here, path) for path in (base.find("var"), base.find("vqvae"))))
    except InputError as lost:
        if outside:
            lost.add_note(f"  {untrusted}")
            raise
        again = f"from policy.checkpoint={address}"
        print(f"{lost}\n  it is had again {again}")
        try:
            sources = _sources(config, device)
        except InputError as error:
            lost.add_note(f"  it cannot be had again {again}: {error}")
            raise lost from error
        for part, source in zip(PARTS, sources, strict=True):
            if other := base.differs(part, source):
                lost.add_note(f"  it cannot be had again {again}: {other}")
                raise
        base.keep(*sources)


def _sources(config: Config, device: torch.device) -> tuple[Source, Source]:
    """What policy.checkpoint names: transformer and VQ-VAE, pre-trained now or earlier, files, or of another run."""
    address, vqvae_address = config.policy.checkpoint, config.policy.vqvae_checkpoint
    if address == "pretrain":
        var, vqvae = pretrained(config, device)
        return Source(var, True, var), Source(vqvae, True, vqvae)
    path = Path(address).expanduser()
    if not path.is_dir():
        var = resolve(address)
        if vqvae_address is None:
            raise InputError(f"policy.checkpoint={address} is no run folder, so policy.vqvae_checkpoint is needed too")
        vqvae = resolve(vqvae_address)
        return Source(var, False, var), Source(vqvae, False, vqvae)
    other = RunFolder(path)
    state, _ = delivered_state(other, other.load_config().policy.sizes, torch.float32)
    vqvae_content = vqvae_of(other) if vqvae_address is None else resolve(vqvae_address)
    return Source(state, True, path), Source(vqvae_content, vqvae_address is None, path)


def vqvae_of(folder: RunFolder) -> Path | dict[str, torch.Tensor]:
    """The VQ-VAE of a run: its file, or of random weights, which have none, the tensors. Raises: as Base.find."""
    run = folder.load_config()
    if run.policy.checkpoint == "random":
        return random_policy(run, pick_device(run.run.device)).vqvae.state_dict()
    return Base(folder).find("vqvae")


def load_base(config: Config, folder: RunFolder, whole: bool = True) -> Policy:
    """The model that a run started from: random, or the files that its folder notes. Nothing is made or fetched.

    whole: compare the files' SHA-256; False where that has just been done.
    Raises: InputError if the files are not there as they were.
    """
    device = pick_device(config.run.device)
    if config.policy.checkpoint == "random":
        return random_policy(config, device)
    base = Base(folder)
    return load_policy(
        str(base.find("var", whole)),
        str(base.find("vqvae", whole)),
        device,
        config.run.dtype,
        config.policy.sizes,
        config.policy.vqvae,
        config.run.fast,
        config.run.strict,
    )


def _keep_labels(folder: RunFolder, origin: Path) -> None:
    """What the labels of the base are called, from beside it into the run's folder."""
    found = read_labels(origin if origin.is_dir() else origin.parent)
    if found is not None:
        save_text(folder.path / LABELS_FILE, labels_json(found))


def load_run(folder: RunFolder, device: torch.device, dtype: str) -> Policy:
    """What a run folder's run delivers, as of its last checkpoint: with update.ema_decay, the averaged policy."""
    config = folder.load_config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"device": str(device), "dtype": dtype})})
    if config.policy.lora:
        policy = load_base(config, folder)
        policy.add_lora(config.policy.lora, config.run.seed)
    elif config.policy.checkpoint == "random":
        policy = random_policy(config, device)
    else:  # the checkpoint holds the whole transformer: the base's is not needed
        vqvae = load_vqvae(str(Base(folder).find("vqvae")), config.policy.sizes.patch_nums, config.policy.vqvae)
        policy = Policy(VAR(config.policy.sizes), vqvae, device, dtype, config.run.fast, config.run.strict)
    folder.newest().load_result(policy.var)
    return policy


def delivered_state(
    folder: RunFolder, sizes: VARConfig, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], int | None]:
    """Names, shapes and order of the public checkpoints, buffers included; what is no integer in `dtype`.

    Returns: what the run delivers as of the last checkpoint (with update.ema_decay, the average), or var.pth where that
        alone is left, and the steps that made it (None for var.pth).
    Raises: InputError if the folder holds no weights, or others than its config says.
    """
    step, config = None, folder.load_config()
    if folder.weights.exists() and not folder.checkpoints.exists():
        found: dict[str, torch.Tensor] = load_var(str(folder.weights), sizes).state_dict()
    elif config.policy.lora:
        # Random weights are those of the device that they were drawn on.
        device = pick_device(config.run.device if config.policy.checkpoint == "random" else "cpu")
        var, step = load_run(folder, device, "float32").var, folder.newest().step
        found = merged_state(var, without_lora(var).state_dict())
    else:
        checkpoint, var = folder.newest(), VAR(sizes)
        checkpoint.load_result(var)
        found, step = var.state_dict(), checkpoint.step
    with torch.device("meta"):
        wanted = VAR(sizes).state_dict()
    return {n: found[n].to(dtype if t.is_floating_point() else t.dtype).contiguous() for n, t in wanted.items()}, step


def _base_weights(config: Config, folder: RunFolder, device: torch.device) -> dict[str, torch.Tensor]:
    """What the run started from, in float32: in memory the frozen weights may be rounded to 16 bits."""
    if config.policy.checkpoint == "random":
        return random_policy(config, device).var.state_dict()
    return load_var(str(Base(folder).find("var", whole=False)), config.policy.sizes).state_dict()


def _save_adapter(folder: RunFolder, policy: Policy, config: Config) -> None:
    """The adapter alone, as peft reads it."""
    assert config.policy.lora is not None
    settings, tensors = peft_adapter(policy.var, config.policy.lora, config.policy.checkpoint)
    save_text(folder.adapter / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomically(folder.adapter / "adapter_model.safetensors", lambda file: file.write(content))


def random_policy(config: Config, device: torch.device) -> Policy:
    """Random weights of the configured sizes, fixed by the seed: for benchmarks and tests."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(config.run.seed)
        vqvae = VQVAE(config.policy.vqvae)
        var = VAR(config.policy.sizes).init_weights(config.run.seed)
    return Policy(var, vqvae, device, config.run.dtype, config.run.fast, config.run.strict)


def _save_grid(
    log: RunLog, step: int, policy: Policy, labels: list[int], config: Config, names: list[str] | None
) -> None:
    columns, rows = config.log.grid_samples, labels[: config.log.grid_labels]
    labels_B = torch.tensor(rows).repeat_interleave(columns)
    rollout = policy.sample(labels_B, config.rollout.temperature, seed=config.run.seed, step=GRID_STEP)
    log.grid(step, policy.decode(rollout.tokens_BL), columns, [caption(label, names) for label in rows])


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
    of_update = {name: value for name, value in asdict(stats).items() if value is not None}  # kl, where not measured
    without_signal = groups_without_signal(advantages_B, group_size)
    return {**dict(zip(measured, values, strict=True)), "groups_without_signal": without_signal, **of_update}


@contextmanager
def _advised(part: str, config: Config) -> Iterator[None]:
    """Say which setting to change where the device's memory does not suffice for a part of the step."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        reserved, allocated = reserved_and_allocated()
        held = memory(config)
        of_graphs = max(held.captured, held.captured_update) + held.captured_decode  # reserved, and not free
        advice = scattered_memory(reserved - of_graphs, allocated) or lower_memory(config, part)
        raise InputError(f"out of memory in the {part}: {reason}\n  {advice}") from error


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
