"""A tiny random model in place of ImageReward's: the real weights are not in the tests.

varfast computes with timm's image tower and transformers' BlipTextModel. Here the same weights go into transformers'
BlipVisionModel and into BERT's equations in float64; the public code itself was compared at its published size
(docs/rewards.md).
"""

import re
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from varfast import InputError
from varfast.data.prompts import PromptSet
from varfast.rewards import WeightedSum
from varfast.rewards.blip import Blip, BlipNetwork, BlipSizes
from varfast.rewards.cost import reward_networks
from varfast.rewards.imagereward import ImageRewardReward

transformers = pytest.importorskip("transformers")

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "photo",
    "of",
    "house",
    "finch",
    "gold",
    "##fish",
    "cat",
    ",",
]
NAMES = ["House Finch", "goldfish", "cat, a zebra"]
LABELS = torch.tensor([0, 1, 2])
SIZES = BlipSizes(32, 8, 128, 2, 256, 64, 2, 192, len(WORDS) + 2, 40)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights and words, as they are published."""
    folder = tmp_path_factory.mktemp("imagereward")
    torch.manual_seed(0)
    state = {name: 0.2 * torch.randn(t.shape) + (t.ndim == 1) for name, t in BlipNetwork(SIZES).state_dict().items()}
    more = {"blip.vision_proj.weight": torch.randn(256, 128), "blip.vision_proj.bias": torch.randn(256),
            "blip.text_proj.weight": torch.randn(256, 128), "blip.text_proj.bias": torch.randn(256),
            "blip.text_encoder.embeddings.position_ids": torch.arange(40).expand(1, -1)}  # fmt: skip
    torch.save(state | more, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return {"pretrained": str(folder / "ImageReward.pt"), "vocabulary": str(folder / "vocab.txt")}


@pytest.fixture
def noise():
    return torch.rand(3, 3, 40, 61, generator=torch.Generator().manual_seed(0))


def reward(files, **settings):
    return ImageRewardReward(type="imagereward", **files | settings)


IN_VIT = (  # BLIP's names, which are timm's, and transformers'
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."), (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"), (r"^norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."), (r"blocks\.(\d+)\.", r"encoder.layers.\1."),
)  # fmt: skip


def image_states(state, images):
    """(B, P, W) by torchvision's preprocessing of pictures and transformers' ViT of BLIP."""
    vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        hidden_act="gelu", layer_norm_eps=1e-6,
    ))  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for pattern, new in IN_VIT:
                name = re.sub(pattern, new, name)
            renamed[name] = tensor
    vision.load_state_dict(renamed)
    normalise = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    transform = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), normalise])
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        return vision.eval()(torch.stack([transform(Image.fromarray(p)) for p in pixels])).last_hidden_state


def bert(state, tokens_T, image_PW):
    """(D,) float64: the state of the first token, by the equations of BERT with cross-attention."""
    w = {n.removeprefix("blip.text_encoder."): t.double() for n, t in state.items() if n.startswith("blip.text")}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def attended(name, x, to):
        q, k, v = (linear(f"{name}.self.{part}", y) for part, y in (("query", x), ("key", to), ("value", to)))
        mixed = torch.softmax(q @ k.T / 8.0, dim=-1) @ v  # one head of 64
        return norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", mixed) + x)

    places = w["embeddings.position_embeddings.weight"][: len(tokens_T)]
    x = norm("embeddings.LayerNorm", w["embeddings.word_embeddings.weight"][tokens_T] + places)
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        x = attended(f"{layer}.attention", x, x)
        x = attended(f"{layer}.crossattention", x, image_PW.double())
        inner = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", inner) + x)
    return x[0]


def rated_by_others(files, images, tokens):
    """(B, N) of images and texts."""
    state = torch.load(files["pretrained"], weights_only=True)
    states = image_states(state, images)
    ratings = torch.zeros(len(images), len(tokens), dtype=torch.float64)
    for row, image in enumerate(states):
        for column, text in enumerate(tokens):
            x = bert(state, text, image)
            for layer in (0, 2, 4, 6, 7):
                x = state[f"mlp.layers.{layer}.weight"].double() @ x + state[f"mlp.layers.{layer}.bias"].double()
            ratings[row, column] = (x[0] - 0.16717362830052426) / 1.0333394966054072
    return ratings


def test_imagereward_equals_other_libraries(files, noise):
    # [CLS] ... [SEP]; "goldfish" is two words, "zebra" none
    tokens = [[2, 5, 6, 7, 5, 8, 9, 3], [2, 5, 6, 7, 5, 10, 11, 3], [2, 5, 6, 7, 5, 12, 13, 5, 1, 3]]
    want = rated_by_others(files, noise, tokens)
    assert want.std(dim=0).min() > 0.1  # images count
    assert (want - want[:, [1, 2, 0]]).abs().min() > 1e-3  # and texts
    each = reward(files, label_prompt="A photo of a {name}", names=NAMES, batch_size=2)
    scored = WeightedSum({"i": each}, num_classes=3)(noise, LABELS).total_B
    tolerance = 1e-4  # float32 through layers of random weights; texts differ by 1e-3 and more
    torch.testing.assert_close(scored.double(), want.diagonal(), rtol=0, atol=tolerance)
    swapped = WeightedSum({"i": each})(noise, LABELS.flip(0)).total_B
    torch.testing.assert_close(swapped.double(), want.flip(1).diagonal(), rtol=0, atol=tolerance)
    one = WeightedSum({"i": reward(files, prompt="a photo of a goldfish")})(noise, LABELS).total_B
    torch.testing.assert_close(one.double(), want[:, 1], rtol=0, atol=tolerance)


def test_imagereward_rates_each_image_for_its_prompt_and_cuts_off_long_ones(files, noise):
    """As ImageReward's tokenizer: 33 tokens of the text, between [CLS] and [SEP]."""
    texts = ["a house finch", "a photo of a cat, " + "gold " * 40]
    tokens = [[2, 5, 8, 9, 3], [2, 5, 6, 7, 5, 12, 13, *[10] * 27, 3]]
    assert len(tokens[1]) == 35
    rows = torch.tensor([1, 0, 1])
    want = rated_by_others(files, noise, tokens)[torch.arange(3), rows]
    each = WeightedSum({"i": reward(files, batch_size=1)}, prompts=PromptSet.of(texts))
    with pytest.warns(UserWarning, match=r"reward.i: prompts of more than 35 tokens are cut off, .* 48 with start"):
        scored = each(noise, rows).total_B
    apart = torch.cat([each(noise[i : i + 1], rows[i : i + 1]).total_B for i in range(3)])  # and warns no more
    torch.testing.assert_close(scored.double(), want, rtol=0, atol=1e-4)
    assert torch.equal(apart, scored)


def test_bfloat16_is_near(files, noise):
    exact, rounded = (
        WeightedSum({"i": reward(files, prompt="a cat", dtype=dtype)})(noise, LABELS).total_B
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.02 * exact.abs().max()


def test_texts_on_one_model_share_the_pass_over_images(files, noise, monkeypatch):
    seen = []

    def embed_images(self, batch, embed=Blip.embed_images):
        seen.append(len(batch))
        return embed(self, batch)

    monkeypatch.setattr(Blip, "embed_images", embed_images)
    both = {"cat": reward(files, prompt="a cat"), "fish": reward(files, prompt="a goldfish", batch_size=2)}
    scored = WeightedSum(both)(noise, LABELS)
    assert seen == [3]
    alone = WeightedSum({"fish": both["fish"]})(noise, LABELS)
    torch.testing.assert_close(scored.components["fish"], alone.total_B)
    assert not torch.equal(scored.components["fish"], scored.components["cat"])


def test_published_names_and_sizes():
    with torch.device("meta"):
        network = BlipNetwork(BlipSizes())
    assert network.blip.visual_encoder.blocks[5].norm2.eps == 1e-6
    assert network.blip.text_encoder.encoder.layer[5].output.LayerNorm.eps == 1e-12
    assert network.blip.visual_encoder.blocks[5].attn.num_heads == 16
    assert network.blip.text_encoder.encoder.layer[5].attention.self.num_attention_heads == 12
    state = network.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    image, text = "blip.visual_encoder", "blip.text_encoder"
    for name, shape in {  # of med_config.json, vit.py, med.py and ImageReward.py
        f"{image}.pos_embed": (1, 197, 1024),
        f"{image}.patch_embed.proj.weight": (1024, 3, 16, 16),
        f"{image}.blocks.23.attn.qkv.bias": (3072,),
        f"{image}.blocks.23.mlp.fc2.weight": (1024, 4096),
        f"{image}.norm.bias": (1024,),
        f"{text}.embeddings.word_embeddings.weight": (30524, 768),
        f"{text}.embeddings.position_embeddings.weight": (512, 768),
        f"{text}.embeddings.LayerNorm.weight": (768,),
        f"{text}.encoder.layer.11.attention.self.key.weight": (768, 768),
        f"{text}.encoder.layer.11.attention.output.LayerNorm.bias": (768,),
        f"{text}.encoder.layer.11.crossattention.self.value.weight": (768, 1024),
        f"{text}.encoder.layer.11.crossattention.output.dense.weight": (768, 768),
        f"{text}.encoder.layer.11.intermediate.dense.weight": (3072, 768),
        f"{text}.encoder.layer.11.output.LayerNorm.weight": (768,),
        "mlp.layers.0.weight": (1024, 768),
        "mlp.layers.7.weight": (1, 16),
    }.items():
        assert shapes[name] == shape
    a_layer_of_the_image, a_layer_of_the_text = 12, 26
    assert len(shapes) == 6 + 24 * a_layer_of_the_image + 4 + 12 * a_layer_of_the_text + 10


def test_cost_is_what_pytorch_counts():
    two = {
        "a": ImageRewardReward(type="imagereward", prompt="a"),
        "b": ImageRewardReward(type="imagereward", prompt="b"),
    }
    (both,), (one,) = reward_networks(two), reward_networks({"a": two["a"]})
    with torch.device("meta"):
        network = BlipNetwork(BlipSizes()).eval()
        with FlopCounterMode(display=False) as tower:
            states = network.blip.visual_encoder(torch.zeros(1, 3, 224, 224))
        with FlopCounterMode(display=False) as reading:
            network.blip.text_encoder(torch.zeros(1, 10, dtype=torch.int64), encoder_hidden_states=states)
    assert one.per_image.flop == pytest.approx(tower.get_total_flops() + reading.get_total_flops(), rel=0.01)
    assert both.per_image.flop - one.per_image.flop == pytest.approx(reading.get_total_flops(), rel=0.01)
    assert both.parameters == one.parameters == sum(p.numel() for p in network.parameters())


def test_what_does_not_fit_is_refused(files, tmp_path):
    state = torch.load(files["pretrained"], weights_only=True)
    file = tmp_path / "x.pt"

    def refused(message, changed=state, **settings):
        torch.save(changed, file)
        with pytest.raises(InputError, match=message):
            WeightedSum({"i": reward(files, **{"prompt": "a", "pretrained": str(file)} | settings)})

    lacking = {name: tensor for name, tensor in state.items() if name != "mlp.layers.7.bias"}
    refused("reward.i: checkpoint .*x.pt does not hold ImageReward's weights: .*mlp.layers.7.bias", lacking)
    refused("x.pt does not hold ImageReward's weights: .*unheard_of", state | {"blip.unheard_of": torch.ones(1)})
    refused(
        "x.pt is not ImageReward's weights: it has no blip.visual_encoder.cls_token", {"visual.proj": torch.ones(1)}
    )
    wide = {"blip.visual_encoder.cls_token": torch.ones(1, 1, 100)}
    refused("blip.visual_encoder is 100 wide, which is no multiple of 64", state | wide)
    refused(
        "numbers that are not finite, first in mlp.layers.7.bias",
        state | {"mlp.layers.7.bias": torch.tensor([torch.inf])},
    )
    refused("reward.i: 'a a .*' has 36 tokens with start and end, 1 more than the 35", prompt=" ".join("a" * 34))
    (tmp_path / "few.txt").write_text("\n".join(WORDS[:-1]))
    refused("reward.i.vocabulary=.* has 13 words, the model was trained with 14 and 2 of its own",
            vocabulary=str(tmp_path / "few.txt"))  # fmt: skip
    (tmp_path / "none.txt").write_text("a\nb\n")
    refused("is no vocabulary of BERT: it has no", vocabulary=str(tmp_path / "none.txt"))
    refused("reward.i.vocabulary.*nowhere.txt", vocabulary="nowhere.txt")
    WeightedSum({"i": reward(files, prompt=" ".join("a" * 33))})


def test_a_missing_library_is_named(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"reward.i: ImageReward needs transformers and timm; pip install 'varfast"):
        WeightedSum({"i": reward(files, prompt="a")})
