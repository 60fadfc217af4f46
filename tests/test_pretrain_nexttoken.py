"""Base models of the next-token families: a VQ tokenizer and a causal transformer, from the digits or a folder."""

import math

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from varfast import InputError
from varfast.data.datasets import digits
from varfast.policies.families import family_of
from varfast.policies.llamagen.transformer import LlamaGen
from varfast.pretraining import nexttoken, var
from varfast.pretraining.cache import base_paths, pretrained
from varfast.pretraining.training import pretrain

CPU = torch.device("cpu")
VOCAB = 32
TRANSFORMER = {"depth": 1, "width": 32, "num_heads": 2, "vocab_size": VOCAB, "num_classes": 10, "side": 4}
TOKENIZER = {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1, "latent_width": 16,
             "code_width": 8}  # fmt: skip
POLICIES = {
    "llamagen": {"family": "llamagen", "checkpoint": "pretrain", "gpt": TRANSFORMER, "vq": TOKENIZER},
    "taming": {"family": "taming", "checkpoint": "pretrain", "transformer": TRANSFORMER, "vqgan": TOKENIZER},
}


@pytest.fixture
def make_small(make_config):
    def make(family="llamagen", transformer=None, **settings):
        name = "gpt" if family == "llamagen" else "transformer"
        policy = POLICIES[family] | {name: TRANSFORMER | (transformer or {})}
        pretrain = {"vqvae_steps": 3, "var_steps": 3, "batch_size": 32, "vqvae_lr": 2e-3, "var_lr": 2e-3} | settings
        return make_config(policy=policy, **{f"pretrain__{key}": value for key, value in pretrain.items()})

    return make


def tokenizer_of_digits(config):
    return nexttoken.train_tokenizer(config, TensorDataset(*digits(8)), CPU)


def test_pretrain_learns(make_small):
    _, tokenizer, report = pretrain(make_small(vqvae_steps=110, var_steps=40), CPU)
    assert report.reconstruction_mse < 0.7 * report.pixel_variance
    assert report.token_loss < 0.9 * math.log(VOCAB)
    assert 0.5 < report.codebook_usage <= 1
    assert not any(p.requires_grad for p in tokenizer.parameters())


@pytest.mark.parametrize("family", POLICIES)
def test_codes_that_nothing_uses_are_moved_to_where_the_images_are(make_small, family):
    config = make_small(family, vqvae_steps=34)  # unused codes are moved after 25 of them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "normal_", lambda codes, **_: codes.data.fill_(1.0))  # one code serves all latents
        tokenizer, tokenized = tokenizer_of_digits(config)
    assert tokenized.usage > 1.5 / VOCAB
    assert len(tokenizer.quantize.embedding.weight.unique(dim=0)) > VOCAB // 2


@pytest.mark.parametrize(("share", "moves"), [(0.0, False), (0.5, True)])
def test_labels_are_dropped_where_the_family_can_do_without(make_small, share, moves):
    config = make_small(class_dropout=share)
    start = family_of(config.policy).random_parts(config.policy, config.run.seed, CPU)["gpt"]
    gpt, _, _ = pretrain(config, CPU)
    tables = [model.cls_embedding.embedding_table.weight for model in (start, gpt)]
    assert torch.equal(tables[0][10], tables[1][10]) != moves
    assert not torch.equal(tables[0][3], tables[1][3])


def test_taming_has_no_label_to_drop(make_small):
    models = [pretrain(make_small("taming", class_dropout=share), CPU)[0] for share in (0.0, 0.9)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_fixed_images_are_encoded_once_and_others_at_every_step(make_small, monkeypatch):
    """With the same tokens either way, and so the same transformer."""

    class Folder(Dataset):  # not a TensorDataset
        def __init__(self):
            self.images, self.labels = digits(8)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index], self.labels[index]

    config, encoded = make_small(), []
    tokenizer, _ = tokenizer_of_digits(config)
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda images: (encoded.append(len(images)), encode(images))[1])
    models = []
    for images in (TensorDataset(*digits(8)), Folder()):
        encoded.clear()
        torch.manual_seed(0)
        models.append(nexttoken.train_transformer(config, images, tokenizer, CPU)[0])
        assert sum(encoded) == (1797 if isinstance(images, TensorDataset) else 3 * 32)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_pretrain_on_a_folder_of_images(make_small, tmp_path, capsys):
    for label, name in enumerate(("a", "b", "c")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (12, 12), (80 * label, 60 * index, 128)).save(tmp_path / "set" / name / f"{index}.png")
    settings = {"dataset": str(tmp_path / "set"), "batch_size": 6}
    with pytest.raises(InputError, match=r"has 3 class folders \(a, b, c\), policy.gpt.num_classes=10"):
        pretrain(make_small(**settings), CPU)
    config = make_small(transformer={"num_classes": 3}, **settings)
    paths = pretrained(config, CPU)
    assert [path.name for path in paths] == ["gpt.pth", "vq.pth"]
    assert f"take fewer codes than policy.gpt.vocab_size={VOCAB}" in capsys.readouterr().out
    for name, size in (("reconstructions.png", 2 * 52 - 4), ("samples.png", 3 * 52 - 4)):
        with Image.open(paths[0].with_name(name)) as picture:
            assert picture.height == size


def test_the_cache_gives_the_models_that_were_trained(make_small):
    """Which also says that the same config makes the same models."""
    config = make_small("taming", token_noise=0.5)
    trained = pretrain(config, CPU)[:2]
    build = family_of(config.policy)
    for part, path, model in zip(config.policy.parts, pretrained(config, CPU), trained, strict=True):
        loaded = build.load_part(part, str(path), config.policy)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert base_paths(make_small("llamagen"), CPU)[0].parent != base_paths(config, CPU)[0].parent


def test_token_noise_replaces_what_the_transformer_reads_and_not_what_it_predicts(make_small, monkeypatch):
    config = make_small(token_noise=0.4, var_steps=1)
    tokenizer, _ = tokenizer_of_digits(config)
    read, wanted = [], []
    forward, cross_entropy = LlamaGen.forward, nexttoken.F.cross_entropy
    monkeypatch.setattr(
        LlamaGen, "forward", lambda self, ids, tokens: (read.append(tokens), forward(self, ids, tokens))[1]
    )
    monkeypatch.setattr(nexttoken.F, "cross_entropy", lambda a, b: (wanted.append(b), cross_entropy(a, b))[1])
    nexttoken.train_transformer(config, TensorDataset(*digits(8)), tokenizer, CPU)
    assert int(read[0].max()) < VOCAB
    share = float((read[0].flatten() != wanted[0]).float().mean())
    assert share == pytest.approx(0.4 * (1 - 1 / VOCAB), abs=0.08)
    known = {tuple(row.tolist()) for row in tokenizer.encode(digits(8)[0] * 2 - 1)}
    assert all(tuple(row.tolist()) in known for row in wanted[0].view(-1, 16))


def test_var_refuses_token_noise(make_config):
    with pytest.raises(InputError, match=r"pretrain.token_noise=0.1: policy.family=var reads no tokens; use 0"):
        var.train_transformer(make_config(pretrain__token_noise=0.1), None, None, CPU)


def test_drop_path_is_refused(make_small):
    with pytest.raises(InputError, match=r"pretrain.drop_path=0.1: policy.family=llamagen has no DropPath; use 0"):
        pretrain(make_small(drop_path=0.1), CPU)


@pytest.mark.parametrize(("which", "key"), [("train_tokenizer", "vqvae_lr"), ("train_transformer", "var_lr")])
def test_a_model_that_diverges_does_not_come_into_the_cache(make_small, monkeypatch, which, key):
    train_it = getattr(nexttoken, which)

    def diverged(*args):
        model, measured = train_it(*args)
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        return model, measured

    monkeypatch.setattr(nexttoken, which, diverged)
    config = make_small()
    with pytest.raises(InputError, match=f"of the .* diverged: 1 of .*lower pretrain.{key} .now 0.002"):
        pretrained(config, CPU)
    assert not any(path.exists() for path in base_paths(config, CPU))
