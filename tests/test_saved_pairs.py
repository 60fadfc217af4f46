"""A set of pairs on disk: which prompts its pairs are of in another run's table, and in which order they are read."""

import json

import pytest
import torch

from varfast.data.pairs import SavedPairs, TokensOf, begin_set, save_step
from varfast.types import InputError, Rewards

OF = TokensOf("janus", (3,), 9)
TEXTS = ["a cat", "a red dog", "two birds"]


def write(folder, steps=2, texts=TEXTS):
    """`steps` steps of a pair for each text, each of tokens of its own."""
    begin_set(folder, OF)
    for step in range(1, steps + 1):
        tokens = torch.arange(6 * 3).view(6, 3) % 9 * (step % 2)
        rewards = torch.arange(6.0) - step
        rows = torch.tensor([[1, 0], [3, 2], [5, 4]])[: len(texts)]
        save_step(folder, step, rows, tokens, [{"prompt": text} for text in texts], Rewards(rewards, {"one": rewards}))
    return folder


def read(folder, texts=TEXTS, seed=0, drawn=range(9)):
    return SavedPairs(str(folder), OF, texts, drawn, seed)


def test_prompts_are_found_by_their_text_in_another_table(tmp_path):
    write(tmp_path / "pairs")
    found = read(tmp_path, ["two birds", "a cow", "a cat", "a red dog", "a cat"])
    assert found.ids_M.tolist() == [2, 3, 0, 2, 3, 0]
    with pytest.raises(InputError, match=r"step_000001.jsonl: line 2: the prompt 'a red dog' is not among this run's"):
        read(tmp_path, ["a cat", "two birds"])
    with pytest.raises(InputError, match=r"line 2: the prompt 'a red dog' is kept for evaluation in this run; choose"):
        read(tmp_path, drawn=[0, 2])
    with pytest.raises(InputError, match=r"line 1: label is None, and this run trains on the 2 labels 0 to 2 that rol"):
        read(tmp_path, None, drawn=[0, 2])


def test_a_step_has_the_tokens_and_rewards_of_its_pairs_and_a_pass_has_each_once(tmp_path):
    pairs = read(write(tmp_path / "pairs"))
    assert len(pairs) == 6
    rows = [pairs.step(step, 4) for step in range(3)]  # two passes
    ids = torch.cat([row.ids_N for row in rows]).tolist()
    tokens = torch.cat([row.tokens_N2L for row in rows])
    rewards = torch.cat([row.rewards_N2 for row in rows])
    seen = []
    for prompt, (best, worst), (high, low) in zip(ids, tokens.tolist(), rewards.tolist(), strict=True):
        step = 1 if any(best) else 2  # as `write` made them
        assert (high, low) == (2 * prompt + 1 - step, 2 * prompt - step)
        for image, row in ((best, 2 * prompt + 1), (worst, 2 * prompt)):
            assert image == [(3 * row + i) % 9 * (step % 2) for i in range(3)]
        seen.append((prompt, step))
    assert len(set(seen[:6])) == len(set(seen[6:])) == 6
    assert seen[:6] != seen[6:]  # another order
    again = [read(tmp_path).step(step, 4).ids_N.tolist() for step in (2, 1)]
    assert again == [rows[2].ids_N.tolist(), rows[1].ids_N.tolist()]  # of seed and step alone
    assert read(tmp_path, seed=1).step(0, 6).rewards_N2.tolist() != read(tmp_path).step(0, 6).rewards_N2.tolist()


def test_a_step_that_was_cut_short_does_not_count(tmp_path):
    write(tmp_path / "pairs", 3)
    whole = read(tmp_path)
    (tmp_path / "pairs" / "step_000003.safetensors").unlink()  # killed before it was written
    assert (len(whole), len(read(tmp_path))) == (9, 6)
    assert whole.digest != read(tmp_path).digest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no pair as varfast writes it"),
        ('{"prompt": "a cat"}', "is no pair as varfast writes it"),
        ('{"prompt": "a cat", "reward": [1]}', r"reward is \[1.0\], want two numbers"),
        ('{"prompt": "a cat", "reward": [1, NaN]}', "reward is|is no pair"),
        ('{"prompt": ["a cat"], "reward": [1, 0]}', "is not among this run's prompts"),
        ("[1, 2]", "is no pair as varfast writes it"),
    ],
)
def test_a_line_that_is_no_pair_is_refused(tmp_path, line, message):
    write(tmp_path / "pairs", 1)
    (tmp_path / "pairs" / "step_000001.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_damaged_tokens_are_refused(tmp_path):
    folder = write(tmp_path / "pairs", 1)
    rewards = Rewards(torch.zeros(2), {})
    for tokens, message in (
        (torch.full((2, 3), 9), r"step_000001.safetensors holds tokens outside of 0..8"),
        (torch.zeros(2, 4), r"holds tokens torch.int32 \[1, 2, 4\] at place 0, want int32 \[1, 2, 3\]"),
    ):
        save_step(folder, 1, torch.tensor([[1, 0]]), tokens, [{"prompt": "a cat"}], rewards)
        with pytest.raises(InputError, match=message):
            read(tmp_path).step(0, 1)
    (folder / "set.json").write_text(json.dumps({"format": 2, "family": "janus", "shape": [3], "vocab_size": 9}))
    with pytest.raises(InputError, match=r"is of another kind of tokens \(format 2\) than this policy \(format 1, fam"):
        read(tmp_path)
    for name in folder.iterdir():
        name.unlink()
    begin_set(folder, OF)
    with pytest.raises(InputError, match="holds no pairs; its run has not saved a step yet"):
        read(tmp_path)
