import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.models import ResNet50_Weights

from varfast.rewards.backbone import clip_preprocessing
from varfast.rewards.preprocess import Preprocessing, resize_levels

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(height, width, seed=0):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def smooth(height, width):
    y, x = torch.linspace(0, 6, height)[:, None], torch.linspace(0, 6, width)[None]
    wave = torch.stack([torch.sin(y * a + x + c) for c, a in ((0, 1), (1, 2), (2, 0.5))])
    return (wave[None] * 0.5 + 0.5).repeat(2, 1, 1, 1)


def as_pil(image):
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("make", [noise, smooth])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("sizes", [(256, 256, 224, 224), (8, 8, 224, 224), (512, 512, 224, 224), (97, 256, 40, 224)])
def test_resize_levels_equals_pillow_at_every_level(make, interpolation, sizes):
    height, width, to_height, to_width = sizes
    images = make(height, width)
    resized = resize_levels(images.mul(255).round(), to_height, to_width, interpolation)
    for image, ours in zip(images, resized, strict=True):
        theirs = as_pil(image).resize((to_width, to_height), getattr(Image.Resampling, interpolation.upper()))
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(theirs))


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(256, 256), (8, 8), (70, 131), (126, 100), (224, 224)])
def test_preprocessing_equals_that_of_open_clip(resize_mode, size):
    config = {"size": 56, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": resize_mode}
    theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)
    images = noise(*size)
    expected = torch.stack([theirs(as_pil(image)) for image in images])
    torch.testing.assert_close(clip_preprocessing(config)(images), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(256, 256), (8, 8), (301, 237)])
def test_preprocessing_equals_that_of_torchvision(size):
    theirs = ResNet50_Weights.IMAGENET1K_V2.transforms()
    ours = Preprocessing(232, 224, "shortest", "bilinear", tuple(theirs.mean), tuple(theirs.std))
    images = noise(*size)
    expected = torch.stack([theirs(as_pil(image)) for image in images])
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=2e-6)


def test_preprocessing_rounds_to_8_bit_levels_first():
    shades = torch.tensor([0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, -0.2, 1.2]).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    plain = Preprocessing(4, 4, "shortest", "bicubic", (0.0,) * 3, (1.0,) * 3)
    assert (plain(shades)[:, 0, 0, 0] * 255).round(decimals=3).tolist() == [0, 1, 0, 255]


@pytest.mark.gpu
def test_resize_levels_is_the_same_on_a_gpu():
    levels = noise(256, 256).mul(255).round()
    for interpolation in ("bicubic", "bilinear"):
        on_gpu = resize_levels(levels.cuda(), 224, 224, interpolation)
        assert torch.equal(on_gpu.cpu(), resize_levels(levels, 224, 224, interpolation))
