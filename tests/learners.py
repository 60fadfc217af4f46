"""A learner as the tests want one."""

from varfast.distributed import ALONE
from varfast.learner import Learner
from varfast.losses.config import GRPOConfig
from varfast.losses.grpo import GRPO
from varfast.optim.config import UpdateConfig
from varfast.perf.memory import UpdatePlan
from varfast.rewards import BrightnessReward, WeightedSum
from varfast.state import State

VOCAB = 32  # of make_policy


def make_learner(policy, reference=None, kl_beta=0.2, world=ALONE, grpo=None, **update):
    """GRPO, with a reference if kl_beta > 0: a frozen copy unless one is given; of a run of 10 steps with seed 0.

    grpo: further settings of the loss; the vocabulary is that of make_policy.
    """
    if kl_beta and reference is None:
        reference = policy.frozen_copy()
    config, of_loss = UpdateConfig(**update), GRPOConfig(kl_beta=kl_beta, **(grpo or {}))
    state = State(policy, reference, WeightedSum({"luma": BrightnessReward(type="brightness")}), config, of_loss)
    # What the config names, by default a minibatch at a time, nothing recomputed and nothing captured.
    checkpointing = "none" if config.checkpointing == "auto" else config.checkpointing
    plan = UpdatePlan(config.micro_batch or config.minibatch, checkpointing, config.cuda_graph is True)
    return Learner(state, GRPO(of_loss, VOCAB), config, plan, 10, 0, world)
