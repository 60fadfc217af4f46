"""Real weights are not in the tests: tiny random models, against open_clip's own functions on the same weights."""

import copy

import open_clip
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.data.prompts import PromptSet
from varfast.rewards import WeightedSum
from varfast.rewards.backbone import Backbone, backbone_spec
from varfast.rewards.classifier import ClassifierReward
from varfast.rewards.clip import ClipReward

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def clip(weights, **settings):
    settings = {"model": "tiny", "pretrained": weights, "prompt": "a painting"} | settings
    return ClipReward(type="clip", **{k: v for k, v in settings.items() if v is not None})


def cosine(model_name, weights, images, texts):
    """By the library: its PIL transform, its tokenizer, encode_image and encode_text. (B, N)"""
    model, _, transform = open_clip.create_model_and_transforms(model_name, pretrained=weights)
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        of_images = model.eval().encode_image(torch.stack([transform(Image.fromarray(p)) for p in pixels]))
        of_texts = model.encode_text(open_clip.get_tokenizer(model_name)(texts))
    return torch.cosine_similarity(of_images[:, None], of_texts[None], dim=2)


@pytest.mark.parametrize("model", ["tiny", "tiny-quickgelu"])
@pytest.mark.parametrize("batch_size", [64, 4, 1])
def test_clip_equals_the_library(tiny_clip, images, model, batch_size):
    scored = WeightedSum({"c": clip(tiny_clip, model=model, batch_size=batch_size)})(images, LABELS)
    expected = cosine(model, tiny_clip, images, ["a painting"])[:, 0]
    torch.testing.assert_close(scored.total_B, expected, rtol=0, atol=2e-6)


def test_clip_compares_each_image_with_the_text_of_its_label(tiny_clip, images, tmp_path):
    names = ["house finch", "goldfish", "tabby cat"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "windows.txt").write_bytes(("\ufeff" + "\r\n".join(names) + "\r\n").encode())
    table = cosine("tiny", tiny_clip, images, [f"a photo of a {name}" for name in names])
    for given in (names, str(tmp_path / "names.txt"), str(tmp_path / "windows.txt"), None):
        config = clip(tiny_clip, prompt=None, label_prompt="a photo of a {name}", names=given, batch_size=2)
        called = names if given is None else ["a", "b", "c"]
        scored = WeightedSum({"c": config}, num_classes=3, names=called)(images, LABELS)
        torch.testing.assert_close(scored.total_B, table[torch.arange(6), LABELS], rtol=0, atol=2e-6)


def test_quickgelu_follows_the_tag_and_else_the_name(tiny_clip, images):
    by_tag = backbone_spec("ViT-L-14", "openai", "float32", "reward.c")
    assert by_tag.quick_gelu
    assert by_tag == backbone_spec("ViT-L-14-quickgelu", "openai", "float32", "reward.c")
    assert not backbone_spec("ViT-L-14", "laion2b_s32b_b82k", "float32", "reward.c").quick_gelu
    quick, plain = (cosine(name, tiny_clip, images, ["a painting"]) for name in ("tiny-quickgelu", "tiny"))
    assert (quick - plain).abs().max() > 1e-5  # so that test_clip_equals_the_library can tell them apart


def test_bfloat16_is_within_a_hundredth(tiny_clip, images):
    exact, rounded = (
        WeightedSum({"c": clip(tiny_clip, dtype=dtype)})(images, LABELS).total_B for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 1e-2


def test_memory_of_the_text_tower_is_freed(tiny_clip):
    backbone = Backbone(backbone_spec("tiny", tiny_clip, "float32", "c"), torch.device("cpu"), 4, "c")
    before = sum(p.numel() for p in backbone._model.parameters())
    backbone.texts_are_read()
    vision = sum(p.numel() for p in backbone._model.visual.parameters())
    assert sum(p.numel() for p in backbone._model.parameters()) < vision + 77 * 32 + 32 * 768 + 100 < before


def test_a_prompt_is_not_cut_off_silently(tiny_clip):
    count = len(open_clip.SimpleTokenizer().encode("very fine " * 40)) + 2
    with pytest.raises(
        InputError, match=rf"reward.c: 'very fine .*' has {count} tokens .* {count - 77} more than the 77"
    ):
        WeightedSum({"c": clip(tiny_clip, prompt="very fine " * 40)})
    longest = "fine " * 75
    assert len(open_clip.SimpleTokenizer().encode(longest)) + 2 == 77
    WeightedSum({"c": clip(tiny_clip, prompt=longest)})


# ---------------------------------------------------------------------------------------------------------------------
# Runs on prompts

TEXTS = ["a red cube", "two cats", 'ein Bär, "laughing"']


def on_prompts(weights, texts=TEXTS, **settings):
    return WeightedSum({"c": clip(weights, prompt=None, **settings)}, prompts=PromptSet.of(texts))


@pytest.fixture
def encoded(monkeypatch):
    """The number of texts of each call of encode_text."""
    counts = []

    def encode_text(self, tokens, *args, encode=open_clip.CLIP.encode_text, **kwargs):
        counts.append(len(tokens))
        return encode(self, tokens, *args, **kwargs)

    monkeypatch.setattr(open_clip.CLIP, "encode_text", encode_text)
    return counts


def test_clip_compares_each_image_with_its_prompt(tiny_clip, images):
    table = cosine("tiny", tiny_clip, images, TEXTS)
    scored = on_prompts(tiny_clip)(images, LABELS).total_B
    torch.testing.assert_close(scored, table[torch.arange(6), LABELS], rtol=0, atol=2e-6)
    table = cosine("tiny", tiny_clip, images, [f"a photo of {text}" for text in TEXTS])
    scored = on_prompts(tiny_clip, label_prompt="a photo of {name}")(images, LABELS).total_B
    torch.testing.assert_close(scored, table[torch.arange(6), LABELS], rtol=0, atol=2e-6)
    fixed = WeightedSum({"c": clip(tiny_clip)}, prompts=PromptSet.of(TEXTS))(images, LABELS).total_B
    torch.testing.assert_close(fixed, cosine("tiny", tiny_clip, images, ["a painting"])[:, 0], rtol=0, atol=2e-6)


def test_clip_reads_a_prompt_when_it_comes_and_once(tiny_clip, images, encoded, monkeypatch):
    """The largest sets have a hundred thousand rows."""
    reward = on_prompts(tiny_clip, [f"number {i}" for i in range(100_000)])
    assert encoded == []
    reward(images, LABELS)
    assert encoded == [1, 1, 1]  # two images a prompt
    reward(images, LABELS + torch.tensor([0, 0, 0, 99_990, 0, 0]))
    assert len(encoded) == 4
    monkeypatch.setattr("varfast.rewards.backbone._KEPT_TEXTS", 2)
    reward(images[:2], torch.tensor([7, 8]))  # which leave no room for others
    assert len(encoded) == 6
    reward(images[:2], torch.tensor([8, 7]))
    assert len(encoded) == 6
    reward(images[:1], LABELS[:1])
    assert len(encoded) == 7


def test_clip_a_prompts_score_depends_neither_on_the_others_nor_on_what_was_read_before(tiny_clip, images):
    together, alone = on_prompts(tiny_clip, batch_size=1), on_prompts(tiny_clip, batch_size=1)
    whole = together(images, LABELS).total_B
    assert torch.equal(together(images, LABELS).total_B, whole)
    assert torch.equal(torch.cat([alone(images[i : i + 1], LABELS[i : i + 1]).total_B for i in range(6)]), whole)


def test_clip_cuts_off_long_prompts_as_open_clip_and_says_so_once(tiny_clip, images):
    texts = ["fine " * 76, "very fine " * 40, "a cat"]
    reward = on_prompts(tiny_clip, texts)
    with pytest.warns(UserWarning, match=r"reward.c: prompts of more than 77 tokens .* has 78 with start and end"):
        reward(images[1:2], LABELS[:1])
    scored = reward(images, LABELS).total_B  # and warns no more
    table = cosine("tiny", tiny_clip, images, texts)  # its tokenizer cuts off
    torch.testing.assert_close(scored, table[torch.arange(6), LABELS], rtol=0, atol=2e-6)


def test_rewards_on_one_clip_keep_its_text_tower_for_the_one_that_reads_prompts(tiny_clip, images):
    fixed, each = clip(tiny_clip), clip(tiny_clip, prompt=None)
    scored = WeightedSum({"fixed": fixed, "each": each}, prompts=PromptSet.of(TEXTS))(images, LABELS)
    table = cosine("tiny", tiny_clip, images, ["a painting", *TEXTS])
    torch.testing.assert_close(scored.components["fixed"], table[:, 0], rtol=0, atol=2e-6)
    torch.testing.assert_close(scored.components["each"], table[torch.arange(6), LABELS + 1], rtol=0, atol=2e-6)


def test_what_a_run_compares_images_with_fits_the_run(tiny_clip):
    with pytest.raises(InputError, match=r"reward.c: give prompt or label_prompt, one of the two"):
        WeightedSum({"c": clip(tiny_clip, prompt=None)}, num_classes=3, names=["a", "b", "c"])
    with pytest.raises(InputError, match=r"reward.c.names are of labels, and the run is on prompts"):
        on_prompts(tiny_clip, label_prompt="a {name}", names=["a", "b", "c"])
    digits = ClassifierReward(type="classifier", model="digits")
    with pytest.raises(InputError, match=r"reward.d: a classifier compares images with labels, and the run is on pro"):
        WeightedSum({"d": digits}, num_classes=10, prompts=PromptSet.of(TEXTS))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

LABEL_PROMPT = {"prompt": None, "label_prompt": "a {name}"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LABEL_PROMPT | {"names": ["a", "b"]}, "reward.c.names: got 2 names, the model has 3 labels"),
        (LABEL_PROMPT | {"names": ["a", " ", "c"]}, "reward.c.names: the name of label 1 is blank"),
        (
            LABEL_PROMPT,
            "reward.c.label_prompt: what the labels of this model are called is not known; give reward.c.names",
        ),
        (LABEL_PROMPT | {"names": "nowhere.txt"}, "reward.c.names=nowhere.txt cannot be read: .*one name a line"),
        ({"model": "tinny"}, "reward.c.model=tinny: open_clip has no such model; did you mean tiny"),
        ({"model": "ViT-L-14", "pretrained": "opnai"}, "reward.c.pretrained=opnai is neither .* its tags: openai, "),
        ({"model": "ViT-B-32"}, "does not hold the weights of ViT-B-32, or is damaged"),
    ],
)
def test_clip_says_what_is_wrong(tiny_clip, settings, message, monkeypatch):
    if settings.get("model") == "ViT-B-32":  # another size, without 600 MB of it
        open_clip.add_model_config(_wider(tiny_clip))
        settings, message = {"model": "wider"}, message.replace("ViT-B-32", "wider")
    with pytest.raises(InputError, match=message):
        WeightedSum({"c": clip(tiny_clip, **settings)}, num_classes=3)


def _wider(weights):
    import json
    from pathlib import Path

    config = json.loads((Path(weights).parent / "tiny.json").read_text())
    config = copy.deepcopy(config) | {"embed_dim": 16}
    path = Path(weights).parent / "wider.json"
    path.write_text(json.dumps(config))
    return path


def test_weights_that_cannot_be_fetched_are_named(monkeypatch):
    def offline(tag):
        raise FileNotFoundError("Failed to download file (open_clip_pytorch_model.bin)")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(InputError) as caught:
        WeightedSum({"c": clip("openai", model="ViT-L-14")})
    for text in ("reward.c.pretrained=openai", "hf://timm/vit_large_patch14_clip_224.openai", "Failed to download",
                 "set reward.c.pretrained to the path"):  # fmt: skip
        assert text in str(caught.value)


def test_a_file_that_would_run_code_is_not_loaded(tiny_clip, tmp_path):
    from pathlib import Path

    torch.save({"state_dict": Path("x")}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"reward.c: .*evil.pt holds more than tensors: pathlib.*could run code"):
        WeightedSum({"c": clip(str(tmp_path / "evil.pt"))})


@pytest.mark.parametrize(
    ("model", "needed"),
    [
        ("ViT-B-16-SigLIP", r"a tokenizer .timm/ViT-B-16-SigLIP. from the hub"),
        ("roberta-ViT-B-32", r"a tokenizer .roberta-base. and a description of the text tower .roberta-base. from"),
    ],
)
def test_a_model_that_reads_more_of_the_hub_than_its_weights_says_what(tmp_path, monkeypatch, model, needed):
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    torch.save({"logit_scale": torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=f"reward.c: {model} reads {needed}") as caught:
        WeightedSum({"c": clip(str(tmp_path / "weights.pt"), model=model)})
    assert "beside its weights, which cannot be had" in str(caught.value)
    assert f"hf download {'timm/' if 'SigLIP' in model else ''}" in str(caught.value)
    assert "copy the hub's cache (HF_HOME)" in str(caught.value)


def test_a_file_that_is_no_weights_is_named(tiny_clip, tmp_path):
    (tmp_path / "x.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=r"reward.c: checkpoint .*x.pt is a git-lfs pointer"):
        WeightedSum({"c": clip(str(tmp_path / "x.pt"))})
    state = torch.load(tiny_clip, weights_only=True)
    state["visual.proj"] = torch.full_like(state["visual.proj"], float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(InputError, match=r"reward.c: .*nan.pt holds numbers that are not finite, first in visual.proj"):
        WeightedSum({"c": clip(str(tmp_path / "nan.pt"))})
