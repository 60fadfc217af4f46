"""A tiny random model in place of ViT-H-14: the real weights are not in the tests."""

import open_clip
import torch
from PIL import Image

from varfast.rewards import WeightedSum, hpsv2
from varfast.rewards.hpsv2 import HPSv2Reward


def test_hpsv2_is_the_cosine_of_padded_images_with_the_text(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(hpsv2, "CLIP_MODEL", "tiny")
    state = torch.load(tiny_clip, weights_only=True)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "HPS.pt")  # as it is published
    images = torch.rand(3, 3, 40, 61, generator=torch.Generator().manual_seed(0))
    config = HPSv2Reward(type="hpsv2", pretrained=str(tmp_path / "HPS.pt"), prompt="a photo", batch_size=2)
    scored = WeightedSum({"h": config})(images, torch.zeros(3, dtype=torch.int64))

    model = open_clip.create_model("tiny", pretrained=tiny_clip).eval()
    transform = open_clip.image_transform(32, is_train=False, resize_mode="longest")
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        of_images = model.encode_image(torch.stack([transform(Image.fromarray(p)) for p in pixels]), normalize=True)
        of_text = model.encode_text(open_clip.get_tokenizer("tiny")(["a photo"]), normalize=True)
    torch.testing.assert_close(scored.total_B, (of_images @ of_text.T)[:, 0], rtol=0, atol=2e-6)


def test_the_model_of_hpsv2_has_gelu_and_77_tokens():
    config = open_clip.get_model_config(hpsv2.CLIP_MODEL)
    assert not config.get("quick_gelu")
    assert config["text_cfg"]["context_length"] == 77
    assert hpsv2.hpsv2_spec("x", "float32").resize_mode == "longest"
