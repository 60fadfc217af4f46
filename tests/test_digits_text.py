"""The study of DPO and GRPO on digits from text, end to end at a reduced size: docs/experiments.md has all of it."""

import json
from pathlib import Path

import pytest

import varfast.evaluate
import varfast.report
from varfast.config import load_config
from varfast.data import captioned
from varfast.train import train

CONFIGS = Path(__file__).parent.parent / "configs"
IMAGES = 5 * 32
SMALL = [
    "run.device=cpu", "run.dtype=float32", "run.steps=50", f"run.budget_images={IMAGES}", "log.tensorboard=false",
    "policy.transformer.depth=1", "policy.transformer.width=64", "policy.transformer.mlp_width=64",
    "policy.transformer.vocab_size=32", "pretrain.vqvae_steps=50", "pretrain.var_steps=60", "pretrain.batch_size=16",
    "pretrain.vqvae_lr=4e-3", "pretrain.var_lr=5e-3", "prompts.tags=[colour]", "prompts.held_out=10",
    "rollout.labels_per_step=4", "rollout.group_size=8", "update.minibatch=8", "update.lr=2e-3",
    "update.lr_schedule=constant", "update.warmup_share=0",
    "reward={cheap: {type: colour_match}, right: {type: composition, weight: 0}}",
    "eval.samples_per_label=1", "eval.max_labels=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits_cache):
    """Folders of a GRPO and a DPO run of equal images, from one base."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(captioned._SCENES_A_CAPTION, "captioned_digits", 2)
        for loss, name in (("grpo", "digits_text"), ("dpo", "digits_text_dpo")):
            folders[loss] = tmp_path_factory.mktemp(loss)
            own = {"grpo": ["grpo.kl_beta=0.01"], "dpo": ["dpo.beta=0.5", "update.minibatch=4"]}[loss]
            overrides = [f"run.dir={folders[loss]}", f"pretrain.cache_dir={digits_cache}", *SMALL, *own]
            assert train(load_config(CONFIGS / f"{name}.yaml", overrides)) == 0
    return folders


@pytest.mark.slow
def test_both_losses_spend_the_same_images_from_the_same_base(runs):
    summaries = {loss: json.loads((folder / "summary.json").read_text()) for loss, folder in runs.items()}
    assert summaries["grpo"]["before"] == summaries["dpo"]["before"]
    spent = {}
    for loss, folder in runs.items():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["spent_images"] for line in lines] == [32 * step for step in range(1, 6)]
        spent[loss] = lines[-1]["spent_flop"]
        assert (folder / "tokenizer.json").exists()
    assert spent["dpo"] < spent["grpo"]  # it learns from a quarter of the images
    for summary in summaries.values():
        assert summary["after"]["reward/cheap"] > summary["before"]["reward/cheap"] + 0.03


@pytest.mark.slow
def test_an_evaluation_tells_in_domain_from_out_of_domain(runs, tmp_path):
    for folder in runs.values():
        arguments = [f"checkpoint={folder}", "samples_per_prompt=1", "max_prompts=10", "cfg=0", "device=cpu"]
        assert varfast.evaluate.main(arguments) == 0
        measured = json.loads((folder / "evaluation" / "evaluation.json").read_text())
        rows = {(row["name"], row["labels"]) for row in measured["rows"]}
        assert {("score/cheap", domain) for domain in ("train", "held_out", "out_of_domain")} <= rows
    prompts = [json.loads(line) for line in (runs["dpo"] / "prompts.jsonl").read_text().splitlines()]
    trained = {row["prompt"] for row in prompts if row["domain"] == "train"}
    assert len(trained) == 60 - 10
    assert not trained & {row["prompt"] for row in prompts if row["domain"] != "train"}
    folders = [str(folder) for folder in runs.values()]
    assert varfast.report.main([*folders, f"out={tmp_path}/report.html"]) == 0
    report = (tmp_path / "report.html").read_text()
    assert all(folder.name in report for folder in runs.values())
    assert "out of domain" in report or "out_of_domain" in report
