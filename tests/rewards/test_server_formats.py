"""Servers as the public ones are, in this test's words: what they read of a request, and what they answer.

github.com/yifan123/reward-server (app_geneval.py, app_deqa.py, reward_server/), the client of UnifiedReward in
yifan123/flow_grpo (flow_grpo/rewards.py), and the services that verl-omni's docs/start/http_scorer.md refers to.
"""

import contextlib
import io
import os
import pickle
import struct
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.data.prompts import Prompt, PromptSet
from varfast.rewards import WeightedSum
from varfast.rewards.http import HttpReward
from varfast.rewards.plain_pickle import NotPlain, _Dtype, _scalar, plain_loads

from .servers import respond, serving

PROMPTS = PromptSet(
    (
        Prompt("a photo of a brown giraffe", "color_attr", {"include": [{"class": "giraffe", "count": 1}]}),
        Prompt("a photo of two dogs", "counting", {"include": [{"class": "dog", "count": 2}], "exclude": []}),
    )
)
ROWS = torch.tensor([1, 0, 0, 1, 1, 0])


@pytest.fixture
def server():
    with serving(pickle.loads) as made:
        yield made


def http(url, server_format, prompts=PROMPTS, **settings):
    return WeightedSum({"mine": HttpReward(type="http", url=url, format=server_format, **settings)}, prompts=prompts)


def reds(body):
    """Mean red of each JPEG of a request."""
    pictures = [Image.open(io.BytesIO(content), formats=["jpeg"]) for content in body["images"]]
    assert {picture.mode for picture in pictures} == {"RGB"}
    return [float(np.asarray(picture)[..., 0].mean()) / 255 for picture in pictures]


def answering(make):
    """A server that answers what `make` returns for a request, as a pickle; 500 and a traceback for what it raises."""

    def answer(server, handler, body):
        respond(200, pickle.dumps(make(body)))(server, handler, body)

    return answer


def geneval(body):
    meta, strict_only = body["meta_datas"], body["only_strict"]
    assert all({"tag", "prompt", "include"} <= row.keys() for row in meta)
    found = reds(body)
    tags = ("single_object", "counting", "color_attr")
    groups = {tag: [r if row["tag"] == tag else -10.0 for r, row in zip(found, meta, strict=True)] for tag in tags}
    loose = [0.0 if strict_only else 1.0 for _ in found]
    return {"scores": found, "rewards": loose, "strict_rewards": [float(r > 0.5) for r in found],
            "group_rewards": groups, "group_strict_rewards": groups}  # fmt: skip


def test_flow_grpos_geneval(server, images):
    server.answers.append(answering(geneval))
    scored = http(server.url, "flow_grpo", batch_size=4)(images, ROWS).total_B
    torch.testing.assert_close(scored, images[:, 0].mean(dim=(1, 2)), rtol=0, atol=0.02)
    strict = http(server.url, "flow_grpo", field="strict_rewards")(images, ROWS).total_B
    assert strict.tolist() == (images[:, 0].mean(dim=(1, 2)) > 0.5).float().tolist()
    assert http(server.url, "flow_grpo", field="rewards")(images, ROWS).total_B.tolist() == [1.0] * 6
    assert [len(body["images"]) for body in server.asked] == [4, 2, 6, 6]
    assert server.asked[0]["meta_datas"][:2] == [
        {"tag": "counting", "prompt": "a photo of two dogs", "include": [{"class": "dog", "count": 2}], "exclude": []},
        {"tag": "color_attr", "prompt": "a photo of a brown giraffe", "include": [{"class": "giraffe", "count": 1}]},
    ]
    assert [body["only_strict"] for body in server.asked] == [True, True, True, False]


def test_flow_grpos_deqa_and_unified_reward(server, images):
    server.answers += [
        answering(lambda body: {"outputs": reds(body)}),
        answering(lambda body: {"outputs": [float(len(prompt)) for prompt in body["prompts"]]}),
    ]
    deqa = http(server.url, "flow_grpo")(images, ROWS).total_B
    torch.testing.assert_close(deqa, images[:, 0].mean(dim=(1, 2)), rtol=0, atol=0.02)
    lengths = [float(len(PROMPTS.texts[row])) for row in ROWS.tolist()]
    assert http(server.url, "flow_grpo")(images, ROWS).total_B.tolist() == lengths


def test_flow_grpos_servers_of_a_run_on_labels(server, images):
    server.answers.append(answering(lambda body: {"outputs": reds(body)}))
    config = HttpReward(type="http", url=server.url, format="flow_grpo")
    WeightedSum({"mine": config}, names=["cube", "cat"])(images, ROWS)
    assert server.asked[0]["prompts"] == ["cat", "cube", "cube", "cat", "cat", "cube"]


def test_verl_omnis_server(server, images, monkeypatch):
    """HPSv2's service answers scalars of NumPy."""
    monkeypatch.setattr("varfast.rewards.client._pause", lambda seconds, stop: None)
    server.answers += [
        respond(503, pickle.dumps({"error": "loading"})),
        answering(lambda body: {"scores": [np.float32(r) for r in reds(body)]}),
        answering(lambda body: {"scores": [len(prompt) / 100 for prompt in body["prompts"]]}),
    ]
    scored = http(server.url, "verl_omni", retries=1)(images, ROWS).total_B
    torch.testing.assert_close(scored, images[:, 0].mean(dim=(1, 2)), rtol=0, atol=0.02)
    http(server.url, "verl_omni")(images, ROWS)
    assert all(body.keys() == {"images", "prompts", "metadata"} and body["metadata"] == {} for body in server.asked)
    assert server.headers[0]["Content-Type"] == "application/octet-stream"


def test_requests_are_pickles_that_old_pythons_read(images):
    read = []
    with serving(lambda content: read.append(content) or pickle.loads(content)) as server:
        server.answers.append(answering(lambda body: {"scores": [0.5] * 6}))
        http(server.url, "flow_grpo")(images, ROWS)
        http(server.url, "verl_omni")(images, ROWS)
    assert [content[:2] for content in read] == [b"\x80\x04"] * 2
    assert [plain_loads(content)["prompts"] for content in read] == [[PROMPTS.texts[row] for row in ROWS]] * 2


def test_the_own_format_carries_prompts_where_the_run_has_them(images):
    with serving() as server:
        server.answers.append(respond(200, {"rewards": [0.5] * 6}))
        http(server.url, "json")(images, ROWS)
        http(server.url, "json", prompts=None)(images, ROWS)
    first, second = server.asked
    assert first["prompts"][:2] == ["a photo of two dogs", "a photo of a brown giraffe"]
    assert first["tags"][:2] == ["counting", "color_attr"]
    assert first["metadata"][0] == {"include": [{"class": "dog", "count": 2}], "exclude": []}
    assert second.keys() == {"images", "labels"}


def test_a_server_is_asked_several_batches_at_a_time(server, images):
    met = threading.Barrier(3)

    def answer(server, handler, body):
        met.wait(timeout=20.0)
        answering(lambda body: {"scores": reds(body)})(server, handler, body)

    server.answers.append(answer)
    scored = http(server.url, "verl_omni", batch_size=2, concurrency=3)(images, ROWS).total_B
    torch.testing.assert_close(scored, images[:, 0].mean(dim=(1, 2)), rtol=0, atol=0.02)
    assert server.busiest == 3


# ---------------------------------------------------------------------------------------------------------------------
# What is not taken


class Runs:
    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"error": "CUDA \x1b[2J out of memory"}), r"answered '.*CUDA \\x1b\[2J out"),
        (pickle.dumps([0.5] * 6), r"answered '\[0.5, .*'; want {\"scores\": \[...\]} with 6 finite numbers"),
        (pickle.dumps({"outputs": [0.5] * 6}), "answered '{'outputs'"),
        (pickle.dumps({"scores": 0.5}), "answered"),
        (pickle.dumps({"scores": ["0.5"] * 6}), "answered"),
        (pickle.dumps({"scores": [True] * 6}), "answered"),
        (pickle.dumps({"scores": [0.5] * 5}), "answered 5 numbers"),
        (pickle.dumps({"scores": [0.5, float("nan")] * 3}), "answered nan for image 1"),
        (pickle.dumps({"scores": [10**400] * 6}), "answered"),
        (pickle.dumps({"scores": np.zeros(6)}), "is not read: it names numpy.*, and only plain data is read"),
        (b"Traceback (most recent call last)", "is not read: no pickle that can be read"),
        (b"", "is not read: no pickle that can be read"),
        (pickle.dumps({"scores": [0.5] * 6})[:-3], "is not read: no pickle"),
    ],
)
def test_answers_of_another_form_end_the_run_at_once(server, images, content, message):
    server.answers.append(respond(200, content))
    with pytest.raises(InputError, match=f"reward.mine.url={server.url}: the server.*{message}"):
        http(server.url, "verl_omni")(images, ROWS)
    assert len(server.asked) == 1


@pytest.mark.parametrize("server_format", ["flow_grpo", "verl_omni"])
@pytest.mark.parametrize("status", [200, 500])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(server, images, tmp_path, server_format, status):
    evil = {"scores": [0.5] * 6, "outputs": Runs(os.mkdir, str(tmp_path / "PWNED"))}
    server.answers.append(respond(status, pickle.dumps(evil)))
    with pytest.raises(InputError, match=r"names posix.mkdir, and only plain data|answered 500"):
        http(server.url, server_format, retries=0)(images, ROWS)
    assert not (tmp_path / "PWNED").exists()
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "PWNED").exists()  # it would have


def scalar(dtype, content):
    """The opcodes of numpy.core.multiarray.scalar(dtype, content)."""
    return b"\x80\x04cnumpy.core.multiarray\nscalar\n" + dtype + b"C" + bytes([len(content)]) + content + b"\x86R."


FLOAT = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R"


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
        b"\x80\x04cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.",  # writes into what it names
        b"\x80\x04cnumpy.core.multiarray\nscalar\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
        b"\x80\x04cnumpy\ndtype\n)\x81.",
        b"\x80\x04cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.",
        b"\x80\x04cnumpy\ndtype\nK\x01\x85R.",
        scalar(FLOAT, b"\x00" * 7),
        scalar(b"N", b"\x00" * 8),
        b"\x80\x04\x82\x01.",  # an extension of copyreg
        b"\x80\x04X\x01\x00\x00\x00aQ.",  # a persistent id
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"a.",
        b"\x80\x05\x97.",
        b"I" + b"9" * 5000 + b"\n.",
        b"\x80\xff.",
        b"0.",
    ],
    ids=range(18),
)
def test_plain_loads_refuses_whatever_is_not_plain(content):
    with pytest.raises(NotPlain):
        plain_loads(content)


def test_plain_loads_leaves_what_a_pickle_names_as_it_is():
    """These set an attribute of it, as a pickle may."""
    before = dict(vars(_scalar)), dict(vars(_Dtype))
    for name in (b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n"):
        for state in (b"}X\x05\x00\x00\x00_makeNs", b"N}X\x05\x00\x00\x00_makeNs\x86"):
            with contextlib.suppress(NotPlain):
                plain_loads(b"\x80\x04" + name + state + b"b.")
    assert (dict(vars(_scalar)), dict(vars(_Dtype))) == before
    assert plain_loads(scalar(FLOAT, struct.pack("<d", 0.25))) == 0.25
    with pytest.raises(NotPlain, match="it holds NumPy's type 'O8', which is no number"):
        plain_loads(pickle.dumps(np.dtype("O")))


def test_plain_loads_reads_plain_data():
    data = {"a": [1, -(2**70), 1.5, True, None, "ü", b"\x00"], ("b",): {1, 2}, 3: [[], {}, ()]}
    numbers = [kind(3) for kind in (np.float16, np.float32, np.float64, np.int8, np.uint8, np.int64, np.uint64)]
    for protocol in (4, 5):
        assert plain_loads(pickle.dumps(data, protocol)) == data
        found = plain_loads(pickle.dumps([*numbers, np.bool_(True)], protocol))
        assert found == [3.0, 3.0, 3.0, 3, 3, 3, 3, True]
        assert not any(isinstance(number, np.generic) for number in found)
    assert plain_loads(scalar(FLOAT, struct.pack("<d", 0.25))) == 0.25
    assert plain_loads(b"\x80\x04]r\xff\xff\xff\x7f.") == []  # a memo of two billion: the unpickler in C takes 16 GB
