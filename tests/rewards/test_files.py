import os

import pytest
import torch

from varfast import InputError
from varfast.rewards.building import Building
from varfast.rewards.clip import Text
from varfast.rewards.files import fetch


def texts(names):
    building = Building("reward.c", torch.device("cpu"), num_classes=2)
    # Not validated: the paths that a config refuses come by other ways too.
    return Text.model_construct(prompt=None, label_prompt="a {name}", names=str(names)).texts(building)


def test_names_come_from_a_regular_file_with_or_without_a_byte_order_mark(tmp_path):
    (tmp_path / "bom.txt").write_bytes("\ufeffant\r\nbee\n".encode())
    assert texts(tmp_path / "bom.txt") == ["a ant", "a bee"]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge.txt").touch()
    os.truncate(tmp_path / "huge.txt", 2**34)
    for path, reason in (
        ("/dev/zero", "it is no regular file"),
        (tmp_path / "pipe", "it is no regular file"),
        (tmp_path, "it is no regular file"),
        (tmp_path / "huge.txt", "it has more than 10000000 bytes"),
        ("nul\0", "null byte"),
        ("~nosuchuser/x", "home directory"),
    ):
        with pytest.raises(InputError, match=rf"(?s)reward.c.names=.* cannot be read: .*{reason}"):
            texts(path)


def test_a_cache_of_weights_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="reward.a.head=https://host/x.pth cannot be fetched.* Not a directory"):
        fetch("https://host/x.pth", "reward.a.head")
