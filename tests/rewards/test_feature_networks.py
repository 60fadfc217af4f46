"""Networks of features with random weights, against the libraries that they come from."""

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torchvision.models import Inception_V3_Weights, inception_v3
from torchvision.transforms.functional import normalize, resize

from varfast import InputError
from varfast.data.datasets import digits
from varfast.features.config import FeaturesSection
from varfast.features.networks import to_levels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def levels():
    return to_levels(digits(32)[0][:4])


def pictures(levels):
    return [Image.fromarray(p) for p in levels.permute(0, 2, 3, 1).numpy()]


def load(**settings):
    return FeaturesSection(**settings).load(CPU, "reward.fid")


@pytest.fixture(scope="module")
def torchvision_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    model = inception_v3(weights=None, init_weights=False, transform_input=True)
    torch.save(model.state_dict(), path)
    return path


def test_inception_torchvision_is_torchvisions(levels, torchvision_weights):
    network = load(features="inception_torchvision", pretrained=str(torchvision_weights))
    model = inception_v3(weights=None, init_weights=False, transform_input=True)
    model.load_state_dict(torch.load(torchvision_weights))
    pooled = []
    model.avgpool.register_forward_hook(lambda *args: pooled.append(args[-1].flatten(1)))
    preset = Inception_V3_Weights.IMAGENET1K_V1.transforms()
    images = normalize(resize(levels / 255.0, [299, 299], antialias=True), preset.mean, preset.std)
    with torch.no_grad():
        want_logits = model.eval()(images)
    torch.testing.assert_close(network.features(levels), pooled[0], rtol=1e-5, atol=1e-6)
    features, logits = network(levels)
    np.testing.assert_allclose(logits, want_logits, rtol=1e-4, atol=1e-6)
    assert features.shape == (4, network.width)
    assert network.name.startswith("inception_torchvision random.pth ")


def test_clip_is_open_clips_embedding_of_norm_1(levels, tiny_clip):
    network = load(features="clip", model="tiny", pretrained=tiny_clip)
    model, _, transform = open_clip.create_model_and_transforms("tiny", pretrained=tiny_clip)
    with torch.no_grad():
        want = model.eval().encode_image(torch.stack([transform(p) for p in pictures(levels)]))
    torch.testing.assert_close(network.features(levels), torch.nn.functional.normalize(want, dim=1), rtol=0, atol=2e-6)
    assert network.width == 768
    assert network(levels)[1] is None


def test_dino_is_timms_class_token_at_224_pixels(levels, tmp_path):
    model_name = "vit_small_patch14_dinov2.lvd142m"
    torch.manual_seed(0)
    model = timm.create_model(model_name, pretrained=False, num_classes=0)  # of 518 pixels, as published
    path = tmp_path / "dino.safetensors"
    from safetensors.torch import save_file

    save_file(model.state_dict(), path)
    network = load(features="dino", model=model_name, pretrained=str(path))
    small = timm.create_model(
        model_name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=0, img_size=224
    ).eval()
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config({"input_size": (3, 224, 224)}, model=small), is_training=False
    )
    with torch.no_grad():
        tokens = small.forward_features(torch.stack([transform(p) for p in pictures(levels)]))
    torch.testing.assert_close(network.features(levels), tokens[:, 0], rtol=1e-4, atol=1e-5)
    assert (network.width, network(levels)[1]) == (384, None)
    assert network.name.startswith(f"dino {model_name} dino.safetensors ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "digits", "pretrained": "a.pth"}, "digits has no weights"),
        ({"features": "inception", "model": "resnet50"}, "has one model only"),
        ({"features": "clip", "model": "ViT-B-32"}, "name its weights"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FeaturesSection(**settings)


def test_weights_that_cannot_be_used_are_refused(torchvision_weights, tmp_path, tiny_clip):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "inception_v3_google-0cc3c7bd.pth").write_bytes(b"damaged")
    other = str(tmp_path / "other.pth")
    for settings, message in (
        ({"features": "inception_torchvision", "pretrained": other}, "does not hold torchvision's Inception-v3"),
        ({"features": "inception_torchvision", "pretrained": f"{tmp_path}/inception_v3_google-0cc3c7bd.pth"},
         "the public file has 0cc3c7bd"),
        ({"features": "inception", "pretrained": str(torchvision_weights)},
         "does not hold torch-fidelity's Inception-v3"),
        ({"features": "dino", "model": "vit_tiny_patch16_224", "pretrained": other}, "not hold the weights of timm"),
        ({"features": "dino", "model": "dinno"}, "reward.fid.model=dinno: timm has no such model"),
        ({"features": "clip", "model": "ViT-B-33", "pretrained": tiny_clip}, "open_clip has no such model"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load(**settings)
