"""A run while it goes on: its processes, its folder, what it says and saves, and what ends it.

`varfast.train` is the algorithm; everything around it is here.

Axes: B image, b image of this process, L token.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from signal import Signals

import torch
from torch import Tensor

from varfast.config import Config
from varfast.data.labels import caption
from varfast.distributed import World, decided_by_first, gathered
from varfast.files import save_tensors, save_text
from varfast.losses.grpo import kl_to_reference
from varfast.losses.pairs import pairs_of
from varfast.perf.limits import StageLimits
from varfast.perf.out_of_memory import Part, memory_advice
from varfast.perf.profile import memory_metrics, profiled
from varfast.perf.spent import Budget, Spent, step_flop, whole_step
from varfast.perf.stages import StageClock, stage
from varfast.perf.work import Work
from varfast.policies.checks import check_finite
from varfast.randomness import GRID_STEP, Key
from varfast.runs.alarm import Alarm
from varfast.runs.appearance import Looks
from varfast.runs.before_after import BeforeAfter, means, table
from varfast.runs.checkpoint import Checkpoints
from varfast.runs.divergence import diagnosis, found_diverged
from varfast.runs.evaluating import Evaluations
from varfast.runs.failures import failure_of_all
from varfast.runs.load import base_state
from varfast.runs.log import RunLog
from varfast.runs.pairs import keep_pairs
from varfast.runs.pictures import prompt_title, shown_prompts
from varfast.runs.sentences import of_beginning, of_end
from varfast.runs.setup import Setup
from varfast.runs.time_left import TimeLeft, multiples_left
from varfast.state import State
from varfast.types import InputError, NotFinitePolicy, NotFiniteReward, Prompts, Rewards, Rollout


class Run:
    """What goes on around the steps of a run. A context manager.

    Args:
        setup: device, processes, folder, plan of memory.
        state: what is trained.
        before_after: the table of before and after, its "before" measured.
        profile: write a trace and the memory use of one steady step into the run folder.

    Attributes:
        shard: the images of a step that this process samples and scores.
    """

    def __init__(self, setup: Setup, state: State, before_after: BeforeAfter, profile: bool) -> None:
        self.setup, self.state = setup, state
        self.shard = setup.shard
        self._before_after, self._profile = before_after, profile
        self._evaluations = Evaluations(setup, state, before_after)
        self._before = means(before_after.values.get("before", {})) if setup.world.is_main else {}
        self._stopped = 0  # number of the signal that ended it
        self._metrics: dict[str, float] = {}  # of the last step
        # Of the policy itself, whose prompts are known by now, and with them how many places each image has.
        self._cost = state.policy.cost(setup.config.run.dtype, setup.config.policy.lora)
        work = Work.whole(setup.config, self._cost, setup.work.reads_reference)
        self._budget = Budget.of(setup.config.run, whole_step(work))
        self._alarm, self._idle = Alarm(setup.config.rollout.labels_per_step), False
        self._looks = Looks(setup.config, state.rewards, setup.prompts, setup.names)
        self._drift_images = 0  # that the reference has read in this step, apart from the update
        self._begin_s = 0.0
        self._left = TimeLeft()
        self._at_end = ExitStack()

    @property
    def config(self) -> Config:
        return self.setup.config

    @property
    def total_steps(self) -> int:
        """Of the whole run, as far as is known now: run.steps, or as many as its budget buys."""
        return self._budget.total_steps(self.state.step, self.state.spent)

    @property
    def _ended_by(self) -> str | None:
        """The setting that ends the run here; None: it goes on."""
        idle = "run.stop_when_idle=true" if self._idle and self.config.run.stop_when_idle else None
        return self._budget.ended_by(self.state.step, self.state.spent) or idle

    def __enter__(self) -> Run:
        config, folder, world = self.config, self.setup.folder, self.setup.world
        is_main = world.is_main
        enter = self._at_end.enter_context
        self._spare = enter(_spare_descriptors())
        log = (
            RunLog(folder.path, self.state.step, self.total_steps, config.log.tensorboard, config) if is_main else None
        )
        self._log: RunLog | None = enter(log) if log else None
        here, say = self.setup.environment, self._say
        begun_from = None if self.setup.found is None else self.setup.found.step
        self._checkpoints = enter(Checkpoints(folder.checkpoints, config, here, say, begun_from))
        self._clock = enter(StageClock(self.setup.device))
        enter(self.setup.signals.in_steps())
        self._limits = (
            StageLimits(
                self.setup.work, self.setup.plan, self.setup.device, config.sampled_images or config.learned_images
            )
            if is_main
            else None
        )
        self._say_how_it_begins()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._log and (error or self._stopped):
            why = Signals(self._stopped).name if error is None else _what_it_says(error)
            self._log.ended(self.state.step, why, isinstance(error, NotFinitePolicy))
        self._at_end.__exit__(kind, error, trace)  # type: ignore[arg-type]

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def steps(self) -> Iterator[int]:
        """Numbers of the steps that are left, from 0, until the last one, the end of a budget or a signal."""
        first = self.state.step
        self._begin_evaluations()
        while self._ended_by is None and not self._stopped:
            step = self.state.step
            self.setup.lock.check()
            steady = self._profile and self._log is not None and step == min(first + 2, self.total_steps - 1)
            with profiled(self.setup.folder.path / "profile", self.setup.device) if steady else nullcontext():
                self._clock.read()
                self._begin_s = time.perf_counter()
                yield step

    def advised(self, part: Part) -> AbstractContextManager[None]:
        """Say which setting to change where the device's memory does not suffice for a part of the step."""
        return memory_advice(part, self.setup.work, self.setup.plan)

    def score(self, images: Tensor, rollout: Rollout, key: Key) -> tuple[Rollout, Rewards] | BaseException:
        """What all processes have sampled in this step, and its rewards; or what kept a process from measuring them.

        images, rollout: of this process.
        """
        world, rewards = self.setup.world, self.state.rewards
        measured = _measured(rewards.measure, images, rollout, key, world, self.advised("reward"))
        if isinstance(measured, BaseException):
            return measured
        count = self.config.rollout.images
        measured = {name: world.gather(value, count) for name, value in measured.items()}
        try:
            scores = rewards.score(measured)
        except NotFiniteReward as error:  # of a sum: the same in all processes
            return error
        return self._gathered(rollout), replace(scores, numbers=rewards.learn(measured))

    def _gathered(self, rollout: Rollout) -> Rollout:
        """What all processes have sampled."""
        world, images = self.setup.world, self.config.rollout.images
        # The transformer's input of 512 images of the public models is 44 MB: 0.2 ms between GPUs of one machine, 2 ms
        # at 25 GB/s. Computing it again takes each of two processes 3 ms, and may differ in the last bit.
        read = rollout.teacher_input
        return replace(
            rollout,
            prompts=Prompts(world.gather(rollout.prompts.ids_B, images)),
            tokens_BL=world.gather(rollout.tokens_BL, images),
            logp_BL=world.gather(rollout.logp_BL, images),
            entropy_BL=world.gather(rollout.entropy_BL, images),
            teacher_input=None if read is None else world.gather(read, images),
        )

    def drift(self, rollout: Rollout) -> dict[str, float]:
        """The KL to the base where the loss has none and it is due: of the policy that sampled this step's images.

        rollout: this process's shard of them.
        """
        reference, every, done = self.state.reference, self.config.measure_kl_every, self.state.step + 1
        if reference is None or every is None or (done % every and done != self.total_steps):
            return {}
        self._drift_images = self.config.rollout.images
        kl_b = kl_to_reference(reference, rollout, self.setup.plan.update.micro_batch).double()
        total, images = self.setup.world.sum(torch.stack([kl_b.sum(), torch.ones_like(kl_b).sum()])).tolist()
        return {"kl": total / images}

    def skip(self, error: BaseException) -> None:
        """End a step whose rollout could not be scored, and go on; raise what ends the run, its state saved.

        Raises: NotFinitePolicy with a diagnosis; whatever the reward raised; NotFiniteReward after
            run.max_bad_rollouts of them in a row.
        """
        state = self.state
        if isinstance(error, NotFinitePolicy):
            raise diagnosis(error, self.config, self.setup.folder.path, state.step, self._metrics, self._checkpoints)
        if isinstance(error, NotFiniteReward) and state.skipped_rollouts + 1 < self.config.run.max_bad_rollouts:
            self._say(f"step {state.step + 1} is left out: {error}")
            self._end_step({}, None)
            return
        raise self._saved_before(error)

    def _saved_before(self, error: BaseException) -> BaseException:
        """An error that ends the run, once its state is saved; with a note that says so."""
        state = self.state
        self._spare.close()  # a reward may have failed as it used up all the files that can be open
        try:
            self._save(state.learned_steps, None)
            self._checkpoints.wait()
            note = (
                f"nothing is lost: {self.setup.folder.path} holds step {state.learned_steps}; the same command goes on "
                "from there"
            )
        except InputError as unsaved:
            note = f"and step {state.learned_steps} was not saved: {unsaved}"
        error.add_note(f"  {note}")
        return error

    def record(
        self, rollout: Rollout, images: Tensor, rewards: Rewards, numbers: dict[str, Tensor], metrics: dict[str, float]
    ) -> None:
        """End a step that was learned from: metrics.jsonl, grids, and a checkpoint where one is due.

        Args:
            rollout, rewards: of all processes.
            images: of this process, in [0, 1].
            numbers: of the batch that was made of them.
            metrics: of the update.
        """
        found = _metrics(rollout, rewards, numbers) | metrics
        labels_b = rollout.labels_B[self.shard]
        if self._log and self.config.dpo is not None and self.config.dpo.save_pairs:
            pairs = pairs_of(rewards, self.config.rollout.group_size, self.config.dpo)
            self._log.pairs(lambda: keep_pairs(self.setup, self.state.step + 1, pairs, rollout, rewards))
        self._end_step(found, lambda log, done: log.samples(done, images, labels_b, rewards.rows(self.shard)))

    def record_saved(self, numbers: dict[str, Tensor], metrics: dict[str, float]) -> None:
        """End a step that learned from saved pairs: as `record`, without samples.

        numbers: of the batch. metrics: of the update.
        """
        found = {name: number.item() for name, number in numbers.items()}
        self._end_step(found | metrics, lambda log, done: None)

    def _end_step(self, metrics: dict[str, float], show: Callable[[RunLog, int], None] | None) -> None:
        """show: writes pictures of this step; None: its rollout was skipped."""
        config, state, world = self.config, self.state, self.setup.world
        stages_ms, step_s = self._clock.read(), time.perf_counter() - self._begin_s
        memory = memory_metrics(self.setup.device)
        state.end_step(show is not None, self._spent(metrics, step_s))
        self._metrics = {"skipped_rollouts": float(show is None)} | metrics | state.spent.metrics
        if show is not None and (since := state.reference_step()) is not None:
            self._metrics["reference_step"] = float(since)
        if idle := self._alarm.look(self._metrics):  # the metrics, and so this, are the same in all processes
            self._idle = True
            self._say(f"this run does not learn. {idle.reason}")
        # One process is told to stop: all of them do.
        self._stopped = int(world.largest(self.setup.signals.received or 0))
        done, last = state.step, self._ended_by is not None
        shown = last or done % config.log.grid_every == 0
        saved = bool(last or self._stopped or self._checkpoints.due(done))
        # What cannot be sampled is neither shown nor saved, so that the last good checkpoint stays.
        due = self._evaluations.due(done, last)
        if shown or saved or due:
            self.refuse_diverged(self._metrics, self._checkpoints)
        evaluated = self._evaluated(trained=True) if due else {}
        self._left.step(step_s)
        if self._log and self._limits:
            with self._left.aside("grid") if shown else nullcontext():
                looks = self._save_grid(self._log) if shown else {}
            looks = {f"drift/{name}": value for name, value in looks.items()}
            of_step = self._limits.metrics(stages_ms, step_s) | memory
            whole = self._metrics | of_step | looks | evaluated
            self._log.step(done, whole, self.total_steps, self._left.step_s, self._left_s())
            if shown and show is not None:
                show(self._log, done)
        if saved:
            with self._left.aside("checkpoint"):
                self._save(done if last else state.learned_steps, self._metrics.get("reward_mean"))
        if last and not (due and not evaluated):  # else the last evaluation was given up for the signal
            self._stopped = 0
        if self._stopped:
            self._checkpoints.wait()
            self._say_stopped()

    def _left_s(self) -> float:
        """Seconds until the run is over, its evaluations, grids, checkpoints and its table among them."""
        config, done, total = self.config, self.state.step, self.total_steps
        every = {"grid": config.log.grid_every, "checkpoint": config.log.checkpoint_every}
        counts = {kind: multiples_left(done, total, number) for kind, number in every.items()}
        evaluations = multiples_left(done, total, config.eval.every) if config.eval.every else 1  # the table of after
        return self._left.seconds(total - done, counts) + evaluations * self._before_after.seconds

    def _say_stopped(self) -> None:
        step, folder = self.state.learned_steps, self.setup.folder.path
        self._say(f"stopped; {folder} holds step {step} of {self._of_steps}. The same command goes on.")

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation during training

    def _evaluated(self, trained: bool) -> dict[str, float]:
        """Metrics of an evaluation after the steps that are done; none if a signal or a reward's NaN ended it."""
        step = self.state.step
        try:
            found = self._evaluations.measure(trained, lambda: self.setup.signals.received is not None)
        except NotFiniteReward as error:
            self._say(f"the evaluation after step {step} is left out: {error}")
            return {}
        except NotFinitePolicy as error:
            raise diagnosis(
                error, self.config, self.setup.folder.path, step, self._metrics, self._checkpoints
            ) from error
        except Exception as error:  # noqa: BLE001 - whatever a reward raises, the state is saved first
            raise self._saved_before(error)  # noqa: B904 - the same error
        if found is None:
            self._stopped = int(self.setup.world.largest(self.setup.signals.received or 0))
            return {}
        self._say(found[1])
        return found[0]

    def _begin_evaluations(self) -> None:
        """The point of the base; and of a run that goes on the evaluation that a signal ended, or that is new."""
        evaluations, step, log = self._evaluations, self.state.step, self._log
        if not evaluations.on:
            return
        if log and not evaluations.of_base.items() <= log.metrics_of(0).items():
            log.amend(0, evaluations.of_base)
        due = step > 0 and evaluations.due(step, self._ended_by is not None)
        if due and decided_by_first(lambda: log is not None and "eval/reward" not in log.metrics_of(step)):
            found = self._evaluated(trained=False)
            if log and found:
                log.amend(step, found)
            if self._stopped:
                self._say_stopped()

    def _spent(self, metrics: dict[str, float], step_s: float) -> Spent:
        """By the step that ends. metrics: of its update; empty where its rollout was skipped."""
        config, cost = self.config, self._cost
        updated, referenced = (int(metrics.get(f"{name}_images", 0)) for name in ("update", "reference"))
        flop = step_flop(config, cost, updated, referenced + self._drift_images)
        self._drift_images = 0
        if config.run.budget_hours is not None:  # all processes end at the same step
            step_s = decided_by_first(lambda: step_s)
        return Spent(config.sampled_images, flop, step_s / 3600)

    def refuse_diverged(self, metrics: dict[str, float], checkpoints: Checkpoints | None = None) -> None:
        """Raises: NotFinitePolicy, with a diagnosis, if the policy's weights, logits or images are not finite."""
        if found := found_diverged(self.state.policy, self.setup.labels, self.config, self.setup.world):
            raise diagnosis(found, self.config, self.setup.folder.path, self.state.step, metrics, checkpoints)

    # -----------------------------------------------------------------------------------------------------------------
    # Beginning and end

    def finish(self) -> int:
        """After the last step: weights and the table of before and after. After a signal: nothing.

        Returns: the exit code: 0, or 128 + the number of the signal that ended the run.
        """
        if self._stopped:
            return 128 + self._stopped
        self._at_end.close()  # waits for the last checkpoint
        state, folder, world = self.state, self.setup.folder, self.setup.world
        state.deliver()
        weights = gathered(state.policy.trainable.state_dict(), world)
        if world.is_main:
            if (lora := self.config.policy.lora) is not None:
                weights = state.policy.merged_state(base_state(self.config, folder, self.setup.device))
                folder.save_adapter(*state.policy.adapter(lora, self.config.policy.checkpoint))
            save_tensors(folder.weights(self.config), weights)
        batch, trained = self.setup.evaluation_batch, bool(self._metrics)
        after = self._before_after.after(state.policy, state.rewards, state.step, batch, trained)
        assert after is not None
        if world.is_main:
            summary = {"before": self._before, "after": means(after), "step": state.step}
            summary |= {"spent": asdict(state.spent), "ended_by": self._ended_by}
            save_text(folder.path / "summary.json", json.dumps(summary, indent=2) + "\n")
            print(f"\n{table(self._before_after.values)}\n" if after else "")
            print(of_end(folder.path, folder.weights(self.config), self._how_it_ended()))
        world.wait()
        return 0

    def _say(self, text: str) -> None:
        if self._log:
            self._log.say(text)

    @property
    def _of_steps(self) -> str:
        about = "about " if self._ended_by is None and self.total_steps < self.config.run.steps else ""
        return f"{about}{self.total_steps}"

    def _how_it_ended(self) -> str:
        ended = f"{self.state.step} steps"
        return f"{ended}, ended by {self._ended_by}: {self.state.spent}" if self._budget.most or self._idle else ended

    def _say_how_it_begins(self) -> None:
        config, start, folder = self.config, self.state.step, self.setup.folder.path
        for sentence in self._budget.bought():
            self._say(sentence)
        if start:
            self._say(of_beginning(folder, start, self._of_steps, config, self._ended_by))
        elif self._log:
            self._log.environment(self.setup.environment)
            self._log.of_base(self._save_grid(self._log))
        if not config.holds_reference:
            self._say("the KL to the base is not measured: grpo.kl_beta=0 holds no base; grpo.kl_every=10 measures it")

    def _save(self, step: int, reward_mean: float | None) -> None:
        state = self.state
        spent = state.spent if step == state.step else state.learned_spent
        of_weights = state.policy.trainable, state.adamw.optimizer
        self._checkpoints.save(step, *of_weights, self._before, reward_mean, state.further(), spent)

    def _save_grid(self, log: RunLog) -> dict[str, float]:
        """Returns: what its pictures look like."""
        config, policy = self.config, self.state.policy
        columns, rows = config.log.grid_samples, self.setup.labels[: config.log.grid_labels]
        titles = shown = [caption(label, self.setup.names) for label in rows]
        if self.setup.prompts is not None:
            rows, shown = shown_prompts(self.setup.prompts, config.log.grid_labels, config.run.seed)
            titles = list(map(prompt_title, shown))
        rollout = policy.sample(
            [label for label in rows for _ in range(columns)],
            config.rollout.temperature,
            seed=config.run.seed,
            cfg=config.rollout.cfg,
            step=GRID_STEP,
        )
        images = policy.decode(rollout.tokens_BL)
        log.grid(self.state.step, images, columns, titles, shown)
        return self._looks(images, rollout.labels_B, columns)


def _measured(
    measure: Callable[..., dict[str, Tensor]],
    images: Tensor,
    rollout: Rollout,
    key: Key,
    world: World,
    advised: AbstractContextManager[None],
) -> dict[str, Tensor] | BaseException:
    found: dict[str, Tensor] | BaseException
    try:
        check_finite(rollout, images)  # here, where the reward waits for the images anyway
        with stage("reward"), advised:
            found = measure(images, rollout.labels_B, key.step, key.first_sample)
    except BaseException as error:  # noqa: BLE001 - whatever a reward raises, KeyboardInterrupt too, is raised once all
        found = error  # processes know, and the state is saved
    failure = failure_of_all(found if isinstance(found, BaseException) else None, world, "the reward")
    return found if failure is None else failure


def _metrics(rollout: Rollout, rewards: Rewards, numbers: dict[str, Tensor]) -> dict[str, float]:
    """The numbers of a step before its update, by the names of metrics.jsonl. Counts are integers there."""
    measured = {
        "reward_mean": rewards.total_B.mean(),
        "reward_std": rewards.total_B.std(correction=0),
        **{f"reward/{name}": score_B.mean() for name, score_B in rewards.components.items()},
        **{name: number.float() for name, number in rewards.numbers.items()},
        **{name: number.float() for name, number in numbers.items()},
        "entropy": rollout.entropy_BL.mean(),
    }
    values = torch.stack(list(measured.values())).tolist()  # one copy from the device
    counts = [name for name, number in numbers.items() if not number.is_floating_point()]
    found = dict(zip(measured, values, strict=True))
    return found | {name: int(found[name]) for name in counts}


@contextmanager
def _spare_descriptors() -> Iterator[ExitStack]:
    """Open files to close before a failing reward's state is saved: it may have failed as it used up all there are."""
    with ExitStack() as spare:
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 64:  # else the run needs them itself
            with suppress(OSError):
                for _ in range(16):
                    spare.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield spare


def _what_it_says(error: BaseException) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:  # noqa: BLE001 - an error of a reward's own class may fail to say what it is
        return type(error).__name__
