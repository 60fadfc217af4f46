"""Against a real server in a thread."""

import base64
import io
import re
import socket
import threading
import time
from http.server import HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.rewards import WeightedSum
from varfast.rewards.http import HttpReward

from .servers import respond, serving

LABELS = torch.tensor([3, 1, 4, 1, 5, 9])
DOCS = Path(__file__).parent.parent.parent / "docs" / "rewards.md"


@pytest.fixture
def server():
    with serving() as made:
        made.url += "/score?v=1"
        yield made


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the reward would have waited between attempts."""
    waited = []
    monkeypatch.setattr("varfast.rewards.client._pause", lambda seconds, stop: waited.append(seconds))
    return waited


def redness(server, handler, body):
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in body["images"]]
    respond(200, {"rewards": [float(image[..., 0].mean()) for image in images]})(server, handler, body)


def http(url, **settings):
    return WeightedSum({"mine": HttpReward(type="http", url=url, **settings)})


def test_http_sends_the_images_as_png_with_their_labels_in_batches(server, images):
    server.answers.append(redness)
    scored = http(server.url, batch_size=4)(images, LABELS)
    levels = images.mul(255).round()
    torch.testing.assert_close(scored.components["mine"], levels[:, 0].mean(dim=(1, 2)))
    assert [request["labels"] for request in server.asked] == [[3, 1, 4, 1], [5, 9]]
    sent = [Image.open(io.BytesIO(base64.b64decode(png))) for request in server.asked for png in request["images"]]
    assert {(image.format, image.mode) for image in sent} == {("PNG", "RGB")}
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in sent]), levels.permute(0, 2, 3, 1).numpy())


def test_the_server_of_the_docs_works(images):
    (source,) = re.findall(r"```python\n(import base64.*?)```", DOCS.read_text(), re.S)
    *definitions, start = source.strip().splitlines()
    assert start.startswith('HTTPServer(("localhost", 8000), Redness)')
    names = {}
    exec("\n".join(definitions), names)
    names["Redness"].log_message = lambda *args: None
    with HTTPServer(("127.0.0.1", 0), names["Redness"]) as served:
        threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        scored = http(f"http://127.0.0.1:{served.server_port}")(images, LABELS)
        served.shutdown()
    torch.testing.assert_close(scored.total_B, images[:, 0].mul(255).round().mean(dim=(1, 2)) / 255)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (respond(200, b"<html>"), r"the server answered '<html>'; want .* 6 finite numbers"),
        (respond(200, b"\xff\xfe"), "the server answered"),
        (respond(200, [1.0] * 6), "the server answered"),
        (respond(200, {"reward": [1.0] * 6}), "the server answered"),
        (respond(200, {"rewards": ["1"] * 6}), "the server answered"),
        (respond(200, {"rewards": [True] * 6}), "the server answered"),
        (respond(200, b'{"rewards": [' + b"[" * 100_000), "the server answered"),
        (respond(200, b'{"rewards": [1' + b"0" * 400 + b", 1, 1, 1, 1, 1]}"), "the server answered"),
        (respond(200, {"rewards": [1.0] * 5}), r"the server answered 5 numbers; want .* with 6"),
        (respond(200, {"rewards": [1.0, float("nan")] * 3}), "the server answered nan for image 1"),
        (respond(200, {"rewards": [1.0, 1.0, float("inf")] * 2}), "the server answered inf for image 2"),
        (respond(200, {"rewards": [1.0, 1e39] * 3}), r"answered 1e\+39, more than float32 holds .* for image 1"),
        (respond(200, b"\x1b]0;owned\x07"), r"the server answered '\\x1b\]0;owned\\x07'; want"),
        (respond(302, b"", Location="\x1b[2J" + "x" * 60_000), r"redirects to '\\x1b\[2Jx+\.\.\. \(60004 char"),
        (respond(200, b"[" + b" " * 2_000_000 + b"]"), "more than 1000000 bytes"),
        (respond(404, b"no such page"), "the server answered 404 Not Found: 'no such page'; want 200"),
        (respond(302, b"", Location="file:///etc/passwd"), "redirects to 'file:///etc/passwd'; redirects are not"),
    ],
)  # fmt: skip
def test_http_refuses_nonsense_at_once(server, waits, images, answer, message):
    server.answers.append(answer)
    with pytest.raises(InputError, match=rf"reward.mine.url={re.escape(server.url)}: .*{message}"):
        http(server.url)(images, LABELS)
    assert len(server.asked) == 1
    assert waits == []


def break_off(server, handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"rewards"')


def test_http_tries_again_where_that_may_help(server, waits, images):
    server.answers += [respond(503, b"starting"), break_off, respond(429, b"slowly"), redness]
    http(server.url)(images, LABELS)
    assert len(server.asked) == 4
    assert waits == [1.0, 2.0, 4.0]


def test_http_gives_up_after_its_retries(server, waits, images):
    server.answers.append(respond(500, b"division by zero"))
    with pytest.raises(InputError, match=r"500 .*'division by zero' \(tried 3 times\); is the server up"):
        http(server.url, retries=2)(images, LABELS)
    assert len(server.asked) == 3


def test_http_without_a_server(waits, images):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"{url}: no answer: .*refused.* \(tried 2 times\)"):
            http(url, retries=1)(images, LABELS)
    assert waits == [1.0]


@pytest.mark.parametrize("what", ["status line", "body"])
def test_http_bounds_the_time_of_a_request_as_a_whole(server, images, what):
    """A byte now and then renews the timeout of a socket."""
    written, hung_up = [], threading.Event()

    def drip(server, handler, body):
        if what == "body":
            handler.send_response(200)
            handler.send_header("Content-Length", "100")
            handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b"H")
                written.append(1)
                time.sleep(0.05)
        except OSError:
            hung_up.set()

    server.answers.append(drip)
    with pytest.raises(InputError, match=r"no answer within 0.2 s; raise timeout_s"):
        http(server.url, timeout_s=0.2, retries=0)(images, LABELS)
    assert hung_up.wait(timeout=10)
    assert len(written) < 100


def test_http_bounds_the_time_of_a_silent_server(server, images):
    server.answers.append(lambda *_: time.sleep(0.5))
    with pytest.raises(InputError, match=r"no answer within 0.1 s; raise timeout_s"):
        http(server.url, timeout_s=0.1, retries=0)(images, LABELS)


def test_http_addresses():
    for url in ("ftp://host/x", "file:///etc/passwd", "http://", "http://user:secret@host/", "localhost:8000"):
        with pytest.raises(ValueError, match="url"):
            HttpReward(type="http", url=url)
    with pytest.raises(ValueError, match=r"'http://host:99999/' is no address"):
        http("http://host:99999/")
    with pytest.raises(ValueError, match="is no address"):
        http("http://host/ä")


def raw(answer):
    """Bytes in place of an answer in HTTP."""

    def send(server, handler, body):
        handler.wfile.write(answer)
        handler.close_connection = True
        handler.wfile.flush()
        handler.connection.close()

    return send


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + b"-5\r\nx",
        CHUNKED + b"f" * 60 + b"\r\nx",
        CHUNKED + b"1_0\r\nx",
        CHUNKED + b"zz\r\nx",
        CHUNKED + b"\xff\r\n",
        CHUNKED,
        b"HTTP/1.1 99999999999999999999 OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 500 " + b"\x1b[2J" * 12_000 + b"\r\n\r\n",
        b"HTTP/1.1 500 " + b"r" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
        b"HTTP/1.1 503 OK\r\nContent-Length: -5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n",
        b"\x1b[31mgarbage\x07\r\n",
        b"\x00\xff\xfe\r\n\r\n",
        b"",
    ],
    ids=lambda answer: repr(answer[-60:-4]),
)
def test_http_answers_that_are_no_http_are_one_short_line(server, waits, images, answer):
    server.answers.append(raw(answer))
    with pytest.raises(InputError, match=r"^reward.mine.url=") as caught:
        http(server.url, retries=1, timeout_s=5)(images, LABELS)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 700


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://[::1/score", "Invalid IPv6 URL"),
        ("http://[zz]/", "is no address that can be asked"),
        ("http://a..b/", "the host's name, or a part of it, is empty or too long"),
        ("http://" + "a" * 64 + ".com/", "is empty or too long"),
        ("http://" + "a." * 150 + "com/", "is empty or too long"),
        ("http://x\x00y/", r"it holds '\\x00'"),
        ("http://x/\x1b[2J", r"'http://x/\\x1b\[2J' is no address that can be asked: it holds '\\x1b'"),
        ("http://x:port/", "is no address that can be asked"),
        ("http://x:-1/", "is no address that can be asked"),
        ("http://x:0/", "there is no port 0"),
        ("http://:80/", "want http://host/ or https://host/"),
    ],
)
def test_http_addresses_that_cannot_be_asked_are_refused_before_training(url, message):
    with pytest.raises(ValueError, match=message):
        http(url)
