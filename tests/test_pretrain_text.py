"""Base models that are conditioned on text: from scenes of digits, or a folder with captions."""

import json
import re

import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.data import captioned
from varfast.data.captions import DIGITS
from varfast.policies.families import family_of
from varfast.policies.janus.text import TextTokenizer
from varfast.pretraining import nexttoken
from varfast.pretraining.cache import base_paths, pretrained
from varfast.pretraining.training import pretrain

CPU = torch.device("cpu")
POLICY = {
    "family": "janus",
    "checkpoint": "pretrain",
    "max_prompt_tokens": 12,
    "transformer": {"depth": 1, "width": 32, "num_heads": 2, "mlp_width": 32, "vocab_size": 16, "text_vocab_size": 40,
                    "side": 6},
    "vq": {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1, "latent_width": 16},
}  # fmt: skip


@pytest.fixture
def make_text(make_config, monkeypatch):
    monkeypatch.setitem(captioned._SCENES_A_CAPTION, "captioned_digits", 1)

    def make(policy=None, **settings):
        settings = {"dataset": "captioned_digits", "vqvae_steps": 2, "var_steps": 3, "batch_size": 16} | settings
        return make_config(
            policy=POLICY | (policy or {}),
            prompts={"source": "digits"},
            **{f"pretrain__{key}": value for key, value in settings.items()},
        )

    return make


def test_a_base_of_captions_keeps_its_words_beside_its_weights(make_text):
    config = make_text()
    paths = pretrained(config, CPU)
    tokenizer = TextTokenizer.read(paths[0].with_name("tokenizer.json"))
    words = {word for caption in DIGITS.captions for word in caption.text.split()}
    assert tokenizer.vocab_size == 4 + len(words)
    (row,) = tokenizer.encode(["two red threes on dark paper"])
    assert len(set(row)) == len(row) == 8
    assert 3 not in row  # an unknown word
    report = json.loads(paths[0].with_name("report.json").read_text())
    assert set(report["files"]) == {"transformer.pth", "vq.pth", "tokenizer.json"}
    first = paths[0].stat().st_mtime_ns
    paths[0].with_name("tokenizer.json").write_text("{}")
    pretrained(config, CPU)
    assert paths[0].stat().st_mtime_ns != first  # a damaged tokenizer: the base is made again


def test_captions_are_dropped_as_labels_are(make_text):
    """With class_dropout, the token that stands for a text which says nothing is trained."""
    tables = []
    for share in (0.0, 0.5):
        config = make_text(class_dropout=share, weight_decay=0.0)
        start = family_of(config.policy).random_parts(config.policy, config.run.seed, CPU)["transformer"]
        model, _, _ = pretrain(config, CPU)
        rows = [m.language_model.model.embed_tokens.weight for m in (start, model)]
        tables.append(rows)
    pad, word = 1, 10
    assert torch.equal(tables[0][0][pad], tables[0][1][pad])
    assert not torch.equal(tables[1][0][pad], tables[1][1][pad])
    assert not torch.equal(tables[0][0][word], tables[0][1][word])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"transformer": POLICY["transformer"] | {"text_vocab_size": 20}},
            "have 34 words, .*; set .*text_vocab_size=38",
        ),
        ({"max_prompt_tokens": 6}, "max_prompt_tokens|6"),
        ({"transformer": POLICY["transformer"] | {"side": 8}}, "an image side of 16 is no multiple"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_training(make_text, monkeypatch, policy, message):
    monkeypatch.setattr(nexttoken, "train_tokenizer", lambda *_: pytest.fail("trained"))
    with pytest.raises(InputError, match=message):
        pretrain(make_text(policy), CPU)


def test_a_base_of_a_folder_of_ones_own(make_text, tmp_path, capsys):
    lines = []
    for index in range(20):
        colour = ("red", "blue")[index % 2]
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a {colour}, plain square"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    config = make_text(dataset=str(tmp_path))
    paths = pretrained(config, CPU)
    said = capsys.readouterr().out
    assert f"{tmp_path}: 20 images, 2 different captions" in said
    assert re.search(r"reconstructions.png, samples.png, tokenizer.json", said)
    assert TextTokenizer.read(paths[0].with_name("tokenizer.json")).vocab_size == 4 + len(
        ["a", "red", "blue", ",", "plain", "square"]
    )
    with Image.open(paths[0].with_name("samples.png")) as picture:
        assert picture.height == 2 * 52 - 4
    lines[0] = lines[0].replace("plain", "small")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert base_paths(config, CPU) != paths
