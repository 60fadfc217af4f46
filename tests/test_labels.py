import json

import pytest
import torch
from scipy import stats

from varfast import InputError
from varfast.data.labels import (
    Label,
    caption,
    draw_labels,
    imagenet,
    label_names,
    label_numbers,
    label_pool,
    label_table,
    labels_json,
    read_labels,
    run_names,
)
from varfast.policies.config import RolloutConfig


def test_label_pool_all_list_and_share():
    assert label_pool(RolloutConfig(), 5, seed=0) == [0, 1, 2, 3, 4]
    assert label_pool(RolloutConfig(labels=[3, 1, 3]), 5, seed=0) == [1, 3]
    half = label_pool(RolloutConfig(label_share=0.5), 1000, seed=0)
    assert len(half) == len(set(half)) == 500
    assert half == label_pool(RolloutConfig(label_share=0.5), 1000, seed=0)
    assert half != label_pool(RolloutConfig(label_share=0.5), 1000, seed=1)


def test_draw_labels_uniform_and_keyed_by_step():
    pool = [2, 5, 7]
    drawn = torch.stack([draw_labels(pool, 32, seed=0, step=step) for step in range(200)])
    counts = [int((drawn == label).sum()) for label in pool]
    assert sum(counts) == drawn.numel()
    assert stats.chisquare(counts).pvalue > 1e-3
    assert torch.equal(drawn[7], draw_labels(pool, 32, seed=0, step=7))
    assert not torch.equal(drawn[7], drawn[8])


def test_imagenets_names_are_those_of_torchvisions_weights():
    from torchvision.models import ResNet50_Weights

    assert list(imagenet().values()) == ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    assert list(imagenet()) == sorted(imagenet())
    assert imagenet()["n02099601"] == "golden retriever"


def test_labels_are_found_by_number_name_and_wordnet_id():
    names = list(imagenet().values())
    given = [3, "golden retriever", "Golden_Retriever", " tabby ", "n02099601", "black-and-tan coonhound"]
    assert label_numbers("labels", given, 1000, names) == [3, 207, 207, 281, 207, 165]
    assert label_pool(RolloutConfig(labels=["tench", 3]), 1000, 0, names) == [0, 3]


def test_a_name_that_is_exact_counts_before_one_in_another_case():
    assert label_numbers("labels", ["a", "A"], 2, ["A", "a"]) == [1, 0]
    with pytest.raises(InputError, match="labels holds 'cat', which labels 0, 1 are called; give a number"):
        label_numbers("labels", ["cat"], 2, ["Cat", "CAT"])


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        (["golden retreiver"], list(imagenet().values()), "did you mean 'golden retriever'"),
        (["retriever"], list(imagenet().values()), "'golden retriever'"),
        (["x"], ["cat", "dog"], "'x', which no label is called; known: 'cat', 'dog'"),
        (["1"], ["cat", "dog"], "for label 1 leave the quotes out"),
        (["cat"], None, "the labels of this model have no names; give numbers"),
        ([2], ["cat", "dog"], "labels holds 2; the model has labels 0..1"),
        ([], ["cat", "dog"], "labels is empty"),
    ],
)
def test_labels_that_nobody_has_are_refused(given, names, message):
    with pytest.raises(InputError) as error:
        label_numbers("labels", given, len(names or [0]), names)
    assert message in str(error.value)


LABELS = [Label(0, "cat", "cat", 3), Label(1, "n02099601", "golden retriever", 12)]


def test_names_come_from_labels_json_and_else_from_imagenet(tmp_path):
    assert label_names(tmp_path, 2) is None
    assert label_names(tmp_path / "var.pth", 1000)[207] == "golden retriever"
    (tmp_path / "labels.json").write_text(labels_json(LABELS))
    assert read_labels(tmp_path) == LABELS
    assert label_names(tmp_path, 2) == label_names(tmp_path / "var.pth", 2) == ["cat", "golden retriever"]
    assert label_names(tmp_path, 3) is None  # of another model
    assert [caption(label, ["cat", "1"]) for label in range(3)] == ["0 cat", "1", "2"]
    assert caption(4, None) == "4"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"labels": 3}',
        b'{"labels": [3]}',
        b'{"labels": [{"label": 1, "folder": "a", "name": "a", "images": 1}]}',
        b'{"labels": [{"label": 0, "folder": "\\ud800", "name": "a", "images": 1}]}',
        b'{"labels": [{"label": 0, "folder": "a", "name": null, "images": 1e999}]}',
        b"[" * 100_000,
    ],
)
def test_labels_json_that_cannot_be_read_leaves_labels_without_names(tmp_path, content):
    (tmp_path / "labels.json").write_bytes(content)
    assert read_labels(tmp_path) is None


def test_names_of_labels_json_cannot_move_the_cursor(tmp_path):
    row = {"label": 0, "folder": "a\x1b[2J", "name": "\u202e", "images": 1}
    (tmp_path / "labels.json").write_text(json.dumps({"labels": [row]}))
    assert read_labels(tmp_path) == [Label(0, r"a\x1b[2J", r"\u202e", 1)]


def test_label_table_shows_every_label_of_few_and_the_ends_of_many():
    assert label_table(LABELS).splitlines() == [
        "label  folder                        images",
        "    0  cat                                3",
        "    1  n02099601 (golden retriever)      12",
    ]
    many = label_table([Label(i, f"c{i}", f"c{i}", 1) for i in range(1000)]).splitlines()
    assert len(many) == 37
    assert many[31] == "... 965 more"
    assert [line.split()[0] for line in (many[30], many[32], many[36])] == ["29", "995", "999"]


def names_of(config, folder, made):
    return run_names(config.policy, config.pretrain.dataset, folder, made)


def test_names_of_a_run_are_those_of_its_folders_until_its_base_is_made(make_config, tmp_path):
    for name in ("10", "9", "n"):
        (tmp_path / "set" / name).mkdir(parents=True)
    config = make_config(policy__checkpoint="pretrain", pretrain__dataset=str(tmp_path / "set"))
    assert names_of(config, tmp_path, made=False) == ["9", "10", "n"]
    # A base of an earlier time was made with folders in another order, and a run that goes on needs no data set.
    assert names_of(config, tmp_path, made=True) is None
    assert names_of(make_config(), tmp_path, made=True) is None
    digits = make_config(
        policy__checkpoint="pretrain", policy__var={"depth": 1, "patch_nums": [1, 2], "num_classes": 10}
    )
    assert names_of(digits, tmp_path, made=True)[7] == "7"
