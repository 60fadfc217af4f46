import json

import pytest
import torch

TINY = {
    "embed_dim": 768,  # what the aesthetic head reads
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """Names of tiny architectures in open_clip, and a file of random weights that fits both."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "tiny-quickgelu.json").write_text(json.dumps(TINY | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    torch.save(model.state_dict(), folder / "tiny.pt")
    return str(folder / "tiny.pt")


@pytest.fixture
def images():
    """Six images of 24 x 24: noise, and smooth ones."""
    noise = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, 24)
    smooth = torch.stack([(ramp[:, None] * a + ramp[None, :] * b).expand(3, 24, 24) for a, b in
                          ((1, 0), (0.3, 0.7), (0.1, 0.2))])  # fmt: skip
    return torch.cat([noise, smooth])
