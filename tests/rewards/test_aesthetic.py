import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from varfast import InputError
from varfast.rewards.aesthetic import PUBLIC_HEAD, Aesthetic

DATA = Path(__file__).parent.parent / "data" / "aesthetic"
HEAD = str(DATA / PUBLIC_HEAD)


def test_aesthetic_gives_the_published_scores_in_their_order():
    arrays = np.load(DATA / "embeddings.npz")
    scores = Aesthetic(HEAD, "cpu", "head")(torch.from_numpy(arrays["embeddings"]), torch.zeros(10))
    np.testing.assert_allclose(scores.numpy(), arrays["scores"], rtol=0, atol=1e-5)
    assert scores.argsort().tolist() == list(range(10))


def test_aesthetic_refuses_a_damaged_public_head(tmp_path):
    copy = tmp_path / PUBLIC_HEAD
    content = bytearray(Path(HEAD).read_bytes())
    content[2_000_000] ^= 1
    copy.write_bytes(content)
    with pytest.raises(InputError, match=r"reward.a.head=.* has SHA-256 \w{64}, the public file has 21dd590f"):
        Aesthetic(str(copy), "cpu", "reward.a.head")


def test_aesthetic_takes_a_head_of_your_own_under_another_name(tmp_path):
    state = {n: t.zero_() for n, t in torch.load(HEAD, map_location="cpu", weights_only=True).items()}
    state["layers.7.bias"].fill_(3.0)
    torch.save(state, tmp_path / "mine.pth")
    scores = Aesthetic(str(tmp_path / "mine.pth"), "cpu", "head")(torch.randn(2, 768), torch.zeros(2))
    assert scores.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers.0.weight": torch.zeros(4, 4)}, "does not hold the layers 768-1024-128-64-16-1"),
        ([1, 2], "does not hold the layers"),
        (Path("x"), "holds more than tensors"),
    ],
)
def test_aesthetic_refuses_other_files(tmp_path, content, message):
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(InputError, match=message):
        Aesthetic(str(tmp_path / "head.pth"), "cpu", "reward.a.head")


def test_aesthetic_says_how_to_get_a_missing_head(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match="reward.a.head: checkpoint nowhere.pth does not exist"):
        Aesthetic("nowhere.pth", "cpu", "reward.a.head")
    address = f"https://localhost:1/{PUBLIC_HEAD.replace('+', '%2B')}"
    cached = tmp_path / "hub" / "checkpoints" / PUBLIC_HEAD
    with pytest.raises(InputError) as caught:
        Aesthetic(address, "cpu", "reward.a.head")
    for text in (address, str(cached), "set reward.a.head to its path"):
        assert text in str(caught.value)
    shutil.copy(HEAD, cached)  # put there by hand, or by an earlier run
    Aesthetic(address, "cpu", "reward.a.head")


def test_the_default_head_has_the_name_that_is_checked():
    from varfast.rewards.aesthetic import AestheticReward
    from varfast.rewards.files import file_name

    assert file_name(AestheticReward(type="aesthetic").head) == PUBLIC_HEAD
