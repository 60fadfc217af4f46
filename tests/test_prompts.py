"""Tables of prompts: where they come from, what is trained on, and what a run keeps."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from varfast import InputError
from varfast.config import load_config
from varfast.data.config import PromptsConfig
from varfast.data.labels import draw_labels
from varfast.data.prompts import Prompt, PromptSet, read_prompts, run_prompts, save_prompts, saved_prompts
from varfast.rewards import WeightedSum
from varfast.rewards.brightness import BrightnessReward

CONFIGS = Path(__file__).parents[1] / "configs"


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_read_prompts_takes_a_line_a_prompt_and_each_text_once(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red cube\n\n  two blue balls \na red cube\nein Würfel\n", encoding="utf-8")
    found = read_prompts(PromptsConfig(source=str(path)), seed=0)
    assert found.texts == ["a red cube", "two blue balls", "ein Würfel"]
    assert found.ids("train") == [0, 1, 2]
    assert found.domains == ["train"]


def test_read_prompts_keeps_tag_domain_and_metadata_of_json_lines(tmp_path):
    rows = [
        {"tag": "counting", "include": [{"class": "cube", "count": 2}], "prompt": "two cubes"},
        {"prompt": "a red cube", "tag": "colors", "domain": "held_out"},
    ]
    found = read_prompts(PromptsConfig(source=written(tmp_path / "p.jsonl", rows)), seed=0)
    assert found.prompts == (
        Prompt("two cubes", "counting", {"include": [{"class": "cube", "count": 2}]}),
        Prompt("a red cube", "colors", {}, "held_out"),
    )


def test_read_prompts_reads_other_columns(tmp_path):
    path = written(tmp_path / "p.jsonl", [{"caption": "a", "kind": "x"}, {"caption": "b", "kind": None}])
    found = read_prompts(PromptsConfig(source=path, column="caption", tag_column="kind"), seed=0)
    assert [(prompt.text, prompt.tag) for prompt in found.prompts] == [("a", "x"), ("b", "")]


def many(tmp_path, count=100):
    return written(
        tmp_path / "p.jsonl", [{"prompt": f"p{i}", "tag": "even" if i % 2 == 0 else "odd"} for i in range(count)]
    )


def test_read_prompts_holds_out_the_same_ones_whatever_the_share(tmp_path):
    path = many(tmp_path)

    def held_out(**settings):
        found = read_prompts(PromptsConfig(source=path, **settings), seed=3)
        train = {found.texts[i] for i in found.ids("train")}
        return train, {found.texts[i] for i in found.ids("held_out")}

    train, kept = held_out(held_out=20)
    assert (len(train), len(kept)) == (80, 20)
    assert not train & kept
    few, kept_of_few = held_out(held_out=0.2, share=0.25)
    assert len(few) == 20
    assert few < train
    assert kept_of_few == kept
    assert held_out(held_out=20) == (train, kept)
    other = read_prompts(PromptsConfig(source=path, held_out=20), seed=4)
    assert {other.texts[i] for i in other.ids("held_out")} != kept


def test_read_prompts_trains_on_tags(tmp_path):
    found = read_prompts(PromptsConfig(source=many(tmp_path), tags=["odd"]), seed=0)
    assert {prompt.tag for prompt in found.prompts} == {"odd"}
    with pytest.raises(InputError, match="no prompt .* has the tag 'size'; it has even, odd"):
        read_prompts(PromptsConfig(source=many(tmp_path), tags=["size"]), seed=0)


def test_read_prompts_appends_what_is_out_of_domain(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("p1\nanother\n")
    found = read_prompts(PromptsConfig(source=many(tmp_path, 3), out_of_domain=str(other)), seed=0)
    assert found.texts == ["p0", "p1", "p2", "another"]
    assert found.ids("out_of_domain") == [3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "{", "line 1 is not JSON"),
        ("p.jsonl", "[1]", "line 1 is no JSON object"),
        ("p.jsonl", '{"text": "a"}', "row 1 has no 'prompt', only text; prompts.column"),
        ("p.jsonl", '{"prompt": 3}', "prompt 1 is 3; want text"),
        ("p.jsonl", '{"prompt": " "}', "want text"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "is not JSON"),
        ("p.jsonl", '{"prompt": "a", "domain": "test"}', "domain=test: want one of train"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", "a" * 20001, "20001 letters"),
    ],
)
def test_read_prompts_says_what_is_wrong(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(PromptsConfig(source=str(path)), seed=0)


def test_read_prompts_wants_something_to_train_on(tmp_path):
    with pytest.raises(InputError, match="held_out=3 leaves none"):
        read_prompts(PromptsConfig(source=many(tmp_path, 3), held_out=3), seed=0)
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(PromptsConfig(source=str(tmp_path / "none.txt")), seed=0)


def test_read_prompts_asks_the_package_datasets_for_sets_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"Prompt": "a cat", "Category": "animals", "Note": 1}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    config = PromptsConfig(source="hf://datasets/a/b", column="Prompt", tag_column="Category", split="test")
    assert read_prompts(config, 0).prompts == (Prompt("a cat", "animals", {"Note": 1}),)
    assert asked == [("a/b", "test")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        read_prompts(config, 0)


@pytest.mark.parametrize("source", ["hf://a/b", "hf://datasets/a", "hf://datasets/a/b/c.jsonl"])
def test_prompts_config_knows_addresses_of_sets(source):
    with pytest.raises(ValueError, match="hf://datasets/owner/name"):
        PromptsConfig(source=source)


def test_run_prompts_go_on_from_the_folder_alone(tmp_path):
    config = PromptsConfig(source=many(tmp_path, 6), held_out=2)
    folder = tmp_path / "run"
    folder.mkdir()
    begun = run_prompts(config, 0, folder, going_on=False, of_folder=False)
    save_prompts(begun, folder)
    assert saved_prompts(folder) == begun
    (tmp_path / "p.jsonl").write_text('{"prompt": "something else"}\n')
    assert run_prompts(config, 0, folder, going_on=True, of_folder=False) == begun
    assert run_prompts(config, 0, folder, going_on=False, of_folder=True) == begun
    assert run_prompts(
        config.model_copy(update={"held_out": 0.0}), 0, folder, going_on=False, of_folder=False
    ).texts == ["something else"]
    (folder / "prompts.jsonl").unlink()
    with pytest.raises(InputError, match="was named, and not its config"):
        run_prompts(config, 0, folder, going_on=True, of_folder=True)


def test_draw_labels_without_replacement_draws_each_once_a_turn():
    pool = [2, 3, 5, 7, 11]
    drawn = torch.cat([draw_labels(pool, 3, 1, step, replacement=False) for step in range(10)]).tolist()
    turns = [drawn[first : first + 5] for first in range(0, 30, 5)]
    assert all(sorted(turn) == pool for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    whole = draw_labels(pool, 12, 1, 0, replacement=False).tolist()  # a step of more than the pool
    assert sorted(whole[:5]) == sorted(whole[5:10]) == pool
    assert whole[:3] == drawn[:3]
    # A step that begins within a turn goes on in it, whatever the steps before it were.
    assert draw_labels(pool, 3, 1, 7, replacement=False).tolist() == drawn[21:24]


def test_rewards_get_texts_tags_and_metadata():
    rewards = WeightedSum({"bright": BrightnessReward(type="brightness")}, prompts=PromptSet.of(["a", "b"]))
    batch = rewards._batch(torch.tensor([1, 0, 1]), step=4)
    assert batch.prompts == ["b", "a", "b"]
    assert batch.names is None
    assert (batch.tags, batch.metadata) == (["", "", ""], [{}, {}, {}])
    rows = PromptSet((Prompt("two cubes", "counting", {"count": 2}),))
    batch = WeightedSum({"bright": BrightnessReward(type="brightness")}, prompts=rows)._batch(torch.tensor([0]), None)
    assert (batch.tags, batch.metadata) == (["counting"], [{"count": 2}])


def test_config_refuses_prompts_for_a_family_of_labels():
    with pytest.raises(InputError, match="conditioned on labels; leave prompts out"):
        load_config(CONFIGS / "digits.yaml", ["prompts.source=p.txt"])
