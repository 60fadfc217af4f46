"""A tiny random CLIPModel of transformers in place of PickScore's: the real weights are not in the tests."""

import json

import open_clip
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.data.prompts import PromptSet
from varfast.rewards import WeightedSum, hpsv2, pickscore
from varfast.rewards.backbone import Backbone
from varfast.rewards.clip_names import to_open_clip
from varfast.rewards.hpsv2 import HPSv2Reward
from varfast.rewards.pickscore import PickScoreReward

transformers = pytest.importorskip("transformers")

LABELS = torch.tensor([0, 1, 2])
NAMES = ["house finch", "goldfish", "tabby cat"]
TINY = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def clip_config(embedding, vision, text):
    """Of transformers' CLIPModel, from open_clip's terms; sizes of a layer are width, heads, depth."""
    towers = [
        {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads, "hidden_act": "gelu",
         "num_hidden_layers": layers} for width, heads, layers in (vision[:3], text)
    ]  # fmt: skip
    return transformers.CLIPConfig(
        vision_config=towers[0] | {"image_size": vision[3], "patch_size": vision[4]},
        text_config=towers[1] | {"vocab_size": 49408, "eos_token_id": 49407},
        projection_dim=embedding,
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """transformers' model, with random weights that are not all near zero, and the file that it saves."""
    folder = tmp_path_factory.mktemp("pickscore")
    (folder / "tiny-pick.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-pick.json")
    torch.manual_seed(0)
    model = transformers.CLIPModel(clip_config(48, (64, 2, 2, 32, 16), (32, 2, 2))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    return model, str(folder / "model.safetensors")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(pickscore, "CLIP_MODEL", "tiny-pick")
    monkeypatch.setattr(hpsv2, "CLIP_MODEL", "tiny-pick")


@pytest.fixture
def noise():
    return torch.rand(3, 3, 40, 61, generator=torch.Generator().manual_seed(0))


def model_card(model, images, texts):
    """As the model card computes scores, with transformers' own preprocessing: (B, N)."""
    square = {"height": 32, "width": 32}
    # By Pillow, as in the versions of the model card; the default became torchvision's resize of tensors.
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    process = processor(size={"shortest_edge": 32}, crop_size=square)
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    inputs = process([Image.fromarray(p) for p in pixels], return_tensors="pt")
    tokens = open_clip.SimpleTokenizer()(texts)  # the same byte pairs; what follows the end of a text is not read
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=inputs["pixel_values"])
    return found.logits_per_image


def test_pickscore_equals_the_model_card(library, tiny, noise):
    model, path = library
    one = PickScoreReward(type="pickscore", pretrained=path, prompt="a photo", batch_size=2)
    scored = WeightedSum({"p": one})(noise, LABELS)
    want = model_card(model, noise, ["a photo"])
    assert want.abs().min() > 0.1
    torch.testing.assert_close(scored.total_B, want[:, 0], rtol=0, atol=2e-5)
    each = PickScoreReward(type="pickscore", pretrained=path, label_prompt="a photo of a {name}", names=NAMES)
    scored = WeightedSum({"p": each}, num_classes=3)(noise, LABELS)
    want = model_card(model, noise, [f"a photo of a {name}" for name in NAMES]).diagonal()
    torch.testing.assert_close(scored.total_B, want, rtol=0, atol=2e-5)


def test_pickscore_scores_each_image_for_its_prompt(library, tiny, noise):
    model, path = library
    rows = torch.tensor([2, 0, 0])
    reward = PickScoreReward(type="pickscore", pretrained=path)
    scored = WeightedSum({"p": reward}, prompts=PromptSet.of(NAMES))(noise, rows)
    want = model_card(model, noise, NAMES)[torch.arange(3), rows]
    torch.testing.assert_close(scored.total_B, want, rtol=0, atol=2e-5)


def test_published_sizes_have_open_clips_names():
    with torch.device("meta"):
        theirs = transformers.CLIPModel(clip_config(1024, (1280, 16, 32, 224, 14), (1024, 16, 24)))
        ours = open_clip.model.CLIP(**open_clip.get_model_config(pickscore.CLIP_MODEL))
    published = theirs.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)}  # an old file has it
    found = {name: tensor.shape for name, tensor in to_open_clip(published).items()}
    assert found == {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert pickscore.pickscore_spec("x", "float32").resize_mode is None
    assert sum(t.numel() for t in theirs.parameters()) == pytest.approx(986e6, rel=1e-3)


def test_hpsv2_and_pickscore_run_apart_and_two_pickscores_together(library, tiny, noise, monkeypatch, tmp_path):
    _, path = library
    state = transformers.CLIPModel.from_pretrained(path.rpartition("/")[0]).state_dict()
    torch.save({"state_dict": to_open_clip(state)}, tmp_path / "HPS.pt")
    seen = []

    def embed_images(self, batch, embed=Backbone.embed_images):
        seen.append(self)
        return embed(self, batch)

    monkeypatch.setattr(Backbone, "embed_images", embed_images)
    rewards = {
        "hps": HPSv2Reward(type="hpsv2", pretrained=str(tmp_path / "HPS.pt"), prompt="a photo"),
        "pick": PickScoreReward(type="pickscore", pretrained=path, prompt="a photo"),
        "other": PickScoreReward(type="pickscore", pretrained=path, prompt="a painting"),
    }
    WeightedSum(rewards)(noise, LABELS)
    assert len(seen) == len(set(seen)) == 2


def test_weights_of_another_model_are_refused(library, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(library[1])
    for lacking in ("vision_model.post_layernorm.bias", "text_model.encoder.layers.1.self_attn.k_proj.weight"):
        save_file({name: t for name, t in state.items() if name != lacking}, tmp_path / "part.safetensors")
        reward = PickScoreReward(type="pickscore", pretrained=str(tmp_path / "part.safetensors"), prompt="a")
        with pytest.raises(InputError, match="reward.p: .*part.safetensors does not hold the weights of tiny-pick"):
            WeightedSum({"p": reward})
