"""What a step holds, and the plans that fit it into a device."""

from dataclasses import replace

import pytest

from varfast.perf.devices import DEVICES
from varfast.perf.limits import stage_counts
from varfast.perf.memory import RolloutPlan, UpdatePlan, held_states, memory
from varfast.perf.plan import plan_memory, rollout_micro_batch, update_plan
from varfast.perf.work import Work
from varfast.policies.config import DECODE_GRAPH_IMAGES


def unlimited(work):
    """Memory where there is no limit: what the config names, else everything at once."""
    return memory(work, plan_memory(work, None))


def test_memory_of_the_states(make_work):
    parameters, matrices = 2_010_020_356, 30 * 18 * 1920**2
    head = 1920 * 4096
    held = held_states(make_work("d30"))
    assert (held.weights, held.gradients, held.moments) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert (held.compute_copy, held.reference) == (2 * (matrices + head), 4 * parameters - 2 * (matrices + head))
    assert held.tokenizer == 4 * 108_948_355
    whole = unlimited(make_work("d30", rollout={"cuda_graph": False}))
    assert whole.states == held
    assert whole.peak == held.total + whole.rollout  # 512 images at once
    wide = held_states(make_work("d30", "float32"))
    assert (wide.compute_copy, wide.reference) == (0, 4 * parameters)
    assert held_states(make_work("d30", grpo={"kl_beta": 0.0})).reference == 0


def test_memory_of_a_next_token_rollout_is_its_cache_and_one_step(make_work):
    policy = {"family": "llamagen", "preset": "L", "checkpoint": "random"}
    work = make_work(policy=policy, rollout={"micro_batch": 64, "cuda_graph": True})
    held = unlimited(work)
    assert held.kv_cache == 64 * 256 * 24 * 2 * 1024 * 2  # 256 places of 24 blocks
    assert held.captured == held.kv_cache + held.rollout_activations + 64 * 256 * 8
    assert held.rollout_activations < 64 * 200_000  # logits of one token, and what all of them leave
    guided = unlimited(make_work(policy=policy, rollout={"micro_batch": 64, "cfg": 1.5}))
    assert (guided.kv_cache, guided.decode) == (2 * held.kv_cache, held.decode)


def test_an_average_of_the_weights_is_counted(make_work):
    parameters = 2_010_020_356
    plain, averaged = make_work("d30"), make_work("d30", update={"ema_decay": 0.999})
    sharded = replace(averaged, shards=8)
    held, more = held_states(plain), held_states(averaged)
    assert (held.average, more.average, held_states(sharded).average) == (0, 4 * parameters, parameters // 2)
    assert more.total - held.total == 4 * parameters


def test_an_average_as_reference_and_a_loss_of_ones_own_are_counted(make_work):
    plain, averaged = make_work("d30"), make_work("d30", grpo={"reference_ema": 0.999})
    held, more = held_states(plain), held_states(averaged)
    assert more.reference - held.reference == 4 * 2_010_020_356
    assert held_states(replace(averaged, shards=8)).reference - held.reference == 2_010_020_356 // 2
    counts = lambda work: stage_counts(work, plan_memory(work, None))["reference"]  # noqa: E731
    free = make_work("d30", grpo={"kl_beta": 0.0})
    own = Work.whole(free.config, free.cost, reads_reference=True)
    assert held_states(own).reference == held.reference
    assert counts(own) == counts(plain)


def test_memory_of_8_bit_moments_is_that_of_the_optimizer(make_work):
    work = make_work("d30", update={"optimizer": "adamw8bit"})
    weights = work.cost.weights
    assert held_states(work).moments == weights.moment_bytes("adamw8bit") < weights.moment_bytes("adamw")


def test_memory_of_the_states_with_an_adapter(make_work):
    policy = {"preset": "d16", "checkpoint": "random", "lora": {"rank": 16}}
    work = make_work(policy=policy)
    held, trained = held_states(work), 4 * work.cost.weights.trained
    assert held.weights == work.cost.weights.held_bytes
    assert (held.gradients, held.moments, held.compute_copy) == (trained, 2 * trained, trained // 2)
    assert held.reference == 0
    assert held_states(make_work(policy=policy, dtype="float32")).compute_copy == 0
    for key, average in (("reference_every", 0), ("reference_ema", trained)):  # of its own, as the policy has one
        moves = held_states(make_work(policy=policy, dpo={key: 0.5 if average else 5}))
        assert moves.reference == trained + held.compute_copy + average


def test_the_update_of_pairs_is_planned_in_whole_pairs(make_work):
    """64 images of pairs of 512 that are sampled; 24 GB, in which 11 images of d30 would fit."""
    work = make_work("d30", dpo={}, update={"minibatch": 12}, rollout={"labels_per_step": 30})
    assert (work.images, work.learned, work.optimizer_steps) == (480, 60, 5)
    sizes = {plan_memory(work, held_states(work).total + gib * 2**30).update.micro_batch for gib in range(1, 40)}
    assert sizes <= {2, 4, 6, 12}
    assert len(sizes) > 2
    share = work.share(240, 2)
    assert (share.images, share.learned, share.minibatch) == (240, 30, 6)
    assert work.share(160, 4).minibatch == 4  # of 6 pairs two in the first process


def test_memory_scales_with_the_micro_batches(make_work):
    small = unlimited(make_work(rollout={"micro_batch": 64}, update={"micro_batch": 8}))
    whole = unlimited(make_work())
    assert (whole.kv_cache, whole.decode) == (8 * small.kv_cache, 8 * small.decode)
    assert whole.update == 4 * small.update
    full = make_work(update={"checkpointing": "full"})
    assert unlimited(full).update == 32 * full.cost.update_activation_bytes("full") < whole.update


def test_rollout_micro_batch_is_the_largest_divisor_that_fits(make_work):
    work = make_work("d30")
    for size in (1, 2, 64, 512):
        held = unlimited(make_work("d30", rollout={"micro_batch": size}))
        assert rollout_micro_batch(work, held.rollout / 0.9 + 10) == size
        assert rollout_micro_batch(work, held.rollout / 0.9 - 10) == max(1, size // 2)
    assert rollout_micro_batch(work, -1e9) == 1
    assert rollout_micro_batch(make_work(rollout={"micro_batch": 4}), 1e15) == 4


def test_guidance_takes_a_second_row_of_the_model_an_image(make_work):
    sizes = {"rollout": {"micro_batch": 64, "cuda_graph": True}, "update": {"micro_batch": 8}}
    plain, guided = make_work("d30", **sizes), make_work("d30", **sizes | {"rollout": sizes["rollout"] | {"cfg": 1.5}})
    ours, theirs = unlimited(guided), unlimited(plain)
    for name in ("kv_cache", "rollout_activations", "update"):
        assert getattr(ours, name) == 2 * getattr(theirs, name), name
    for name in ("states", "images", "decode", "captured_decode"):
        assert getattr(ours, name) == getattr(theirs, name), name
    inputs = 64 * plain.cost.input_bytes  # the second row's is never made in a rollout
    assert ours.captured - inputs == 2 * (theirs.captured - inputs)
    free, guided = make_work("d30"), make_work("d30", rollout={"cfg": 1.5})
    for size in (2, 64, 512):
        held = unlimited(make_work("d30", rollout={"micro_batch": size, "cfg": 1.5}))
        assert rollout_micro_batch(guided, held.rollout / 0.9 + 10) == size
        assert rollout_micro_batch(guided, held.rollout / 0.9 - 10) == size // 2
    # 4 images are 8 rows: as many as are worth more than recomputing.
    assert update_plan(free, room_for(free, 8.01, "none")) == (8, "none")
    assert update_plan(guided, room_for(free, 8.01, "none")) == (4, "none")
    assert update_plan(guided, room_for(free, 7.99, "none")) == (4, "attention")


def room_for(work, images, mode):
    """Bytes free in which so many images just fit."""
    return images * work.cost.update_activation_bytes(mode) / 0.9


def test_update_plan_recomputes_below_8_images(make_work):
    work = make_work("d30")
    assert update_plan(work, 1e15) == (32, "none")
    assert update_plan(work, room_for(work, 31, "none")) == (16, "none")
    assert update_plan(work, room_for(work, 8.01, "none")) == (8, "none")
    assert update_plan(work, room_for(work, 7.99, "none")) == (8, "attention")
    assert update_plan(work, room_for(work, 7.99, "attention")) == (32, "full")
    assert update_plan(work, room_for(work, 2.5, "full")) == (2, "full")
    assert update_plan(work, -1.0) == (1, "full")
    odd = make_work("d30", rollout={"labels_per_step": 31}, update={"minibatch": 31})
    assert update_plan(odd, room_for(work, 30, "none")) == (31, "attention")  # not image by image
    few = make_work("d30", update={"minibatch": 4})
    assert update_plan(few, room_for(work, 4.01, "none")) == (4, "none")
    assert update_plan(few, room_for(work, 3.99, "none")) == (4, "attention")


def test_update_plan_keeps_to_what_the_config_names(make_work):
    room_for_4 = room_for(make_work("d30"), 4.01, "none")
    assert update_plan(make_work("d30", update={"micro_batch": 4}), room_for_4) == (4, "none")
    assert update_plan(make_work("d30", update={"micro_batch": 16}), room_for_4) == (16, "full")
    assert update_plan(make_work("d30", update={"checkpointing": "none"}), room_for_4) == (4, "none")
    assert update_plan(make_work("d30", update={"checkpointing": "full"}), 1e15) == (32, "full")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["d16", "d30"])
def test_plan_fits_where_the_states_leave_room(make_work, preset, device):
    size, work = DEVICES[device].memory_bytes, make_work(preset)
    held = memory(work, plan_memory(work, size))
    least = make_work(preset, rollout={"micro_batch": 1}, update={"micro_batch": 1, "checkpointing": "full"})
    assert held.fits(size) == unlimited(least).fits(size)
    assert not unlimited(work).fits(unlimited(work).peak)


def test_plan_captures_the_rollout_where_the_update_keeps_its_room(make_work):
    work, size = make_work("d30"), 74 * 2**30
    free = size - held_states(work).total
    tight = plan_memory(work, size)
    assert tight.rollout == RolloutPlan(128, cuda_graph=False)
    assert rollout_micro_batch(work, free) == 128
    assert memory(work, tight).captured == 0
    assert (tight.update.micro_batch, tight.update.checkpointing) == update_plan(work, free)
    asked = make_work("d30", rollout={"cuda_graph": True, "micro_batch": 64})
    plan = plan_memory(asked, size)
    assert plan.rollout == RolloutPlan(64, cuda_graph=True)
    held = memory(asked, plan)
    assert held.captured == held.kv_cache + held.rollout_activations + 64 * asked.cost.input_bytes
    assert held.captured_decode == DECODE_GRAPH_IMAGES * asked.cost.decode_activation_bytes
    assert held.fits(size)
    whole = plan_memory(make_work("d16"), 141 * 10**9)
    assert (whole.rollout, whole.update.micro_batch) == (RolloutPlan(512, cuda_graph=True), 32)
    refused = plan_memory(make_work("d16", rollout={"cuda_graph": False}), None)
    assert refused.rollout.cuda_graph is False


def test_graphs_of_rollout_and_update_share_their_memory(make_work):
    """The pool is as large as the larger graph needs, in both stages; the other stage's graph adds nothing."""
    sizes = {"rollout": {"micro_batch": 64, "cuda_graph": True}}
    both = unlimited(make_work("d30", **sizes, update={"micro_batch": 16, "cuda_graph": True}))
    one = unlimited(make_work("d30", **sizes, update={"micro_batch": 16}))
    assert (one.captured_update, both.captured_update) == (0, both.update)
    assert both.update > both.captured > 0
    held = both.states.total
    assert one.peak == held + max(one.rollout, one.update + one.captured + one.captured_decode)
    grown = both.captured_update - both.captured
    while_sampling = both.images + both.kv_cache + both.rollout_activations + both.decode + grown
    assert both.peak == held + max(while_sampling, both.update + both.captured_decode)


def test_plan_gives_a_captured_update_its_room(make_work):
    size = 79 * 2**30  # what an H100 has
    work, plain = make_work("d30", update={"cuda_graph": True}), make_work("d30")
    plan = plan_memory(work, size)
    assert memory(work, plan).fits(size)
    assert plan.update == UpdatePlan(16, "none", cuda_graph=True)
    tight = 73 * 2**30
    small = plan_memory(work, tight)
    assert memory(work, small).fits(tight)
    assert small.rollout.micro_batch < plan_memory(plain, tight).rollout.micro_batch
    assert plan_memory(plain, size).update.cuda_graph is False
    assert plan_memory(plain, size, may_capture_update=True) == plan
