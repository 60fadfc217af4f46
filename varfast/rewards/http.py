"""Rewards from a server of the user's: images go there as PNG in JSON, numbers come back. See docs/rewards.md.

Axes: B image; H, W pixels.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import socket
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from varfast.printable import printable
from varfast.rewards.building import Building, Reward, RewardSection, on_images
from varfast.settings.paths import address_parts
from varfast.settings.problems import show
from varfast.settings.schema import Wanted
from varfast.settings.section import MANY
from varfast.types import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_LONGEST_WAIT_S = 30.0
_LARGEST = (2.0 - 2.0**-23) * 2.0**127  # of float32


def _check_url(url: str) -> str:
    try:
        parts = address_parts(url)
    except ValueError as error:
        raise ValueError(f"{show(url)} is no address that can be asked: {error}") from error
    if "@" in parts.netloc or "#" in url:
        raise ValueError(f"got {show(url)}, want an address without user and without #")
    return url


class HttpReward(RewardSection):
    """A server of yours: gets images and labels, answers one number an image. The format is in docs/rewards.md."""

    type: Literal["http"] = Field(description="the kind of reward")
    url: Annotated[str, AfterValidator(_check_url), Wanted("an address, such as http://127.0.0.1:8000/score")] = Field(
        description="http:// or https://; redirects are not followed"
    )
    timeout_s: float = Field(60.0, gt=0, le=86400, description="for one request, to the last byte of the answer")
    retries: int = Field(
        3, ge=0, le=10, description="further attempts after no connection, no time, 429 or 5xx; 1, 2, 4 ... s"
    )
    batch_size: int = Field(64, ge=1, le=1_000_000, description="images a request")
    max_response_bytes: int = Field(1_000_000, ge=1, le=MANY, description="a longer answer is refused")

    def build(self, building: Building) -> Reward:
        return on_images(building, Http(self, building.key))

    def reaches_outside(self) -> str:
        return f"asks {self.url}"


class _TryAgain(Exception):
    """What another attempt may mend: no connection, too slow, broken off, 429 and 5xx."""


class Http:
    """One number an image, from a server.

    Redirects and proxies are not followed. Attempts after a failed one are 1, 2, 4 ... up to 30 s apart; an answer that
    is too long is refused unread.

    Args:
        config: which server, and its limits.
        key: where the reward stands in the config, for errors.
    """

    def __init__(self, config: HttpReward, key: str) -> None:
        self._where = f"{key}.url={printable(config.url)}"
        parts = address_parts(config.url)
        self._host, self._port = parts.hostname, parts.port
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._timeout_s = config.timeout_s
        self._retries = config.retries
        self._batch_size = config.batch_size
        self._max_response_bytes = config.max_response_bytes

    def __call__(self, images: Tensor, labels_B: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], (B,) labels -> (B,).

        Raises: InputError if the server cannot be reached, is too slow, or answers anything but one finite number an
            image.
        """
        import torch

        pixels = images.clamp(0.0, 1.0).mul(255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        labels, rewards = labels_B.tolist(), []
        for first in range(0, len(pixels), self._batch_size):
            rows = slice(first, first + self._batch_size)
            body = json.dumps({"images": [_png(image) for image in pixels[rows]], "labels": labels[rows]}).encode()
            rewards += self._numbers(self._ask(body), len(pixels[rows]))
        return torch.tensor(rewards, device=images.device)

    def _ask(self, body: bytes) -> bytes:
        attempt = 0
        while True:
            try:
                return self._post(body)
            except _TryAgain as error:
                if attempt == self._retries:
                    tries = "once" if attempt == 0 else f"{attempt + 1} times"
                    raise InputError(f"{self._where}: {error} (tried {tries}); is the server up?") from error
            time.sleep(min(2.0**attempt, _LONGEST_WAIT_S))
            attempt += 1

    def _post(self, body: bytes) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        connection = self._connection(self._host or "", self._port, timeout=self._timeout_s)
        cut = None
        try:
            connection.connect()
            # The timeout of a socket counts anew with every byte; this one holds for the request as a whole.
            cut = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, [connection.sock])
            cut.daemon = True
            cut.start()
            connection.request("POST", self._target, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read(self._max_response_bytes + 1)
            if time.monotonic() >= deadline:
                raise TimeoutError
            if response.length and len(content) <= self._max_response_bytes:
                raise _TryAgain(f"the answer broke off after {len(content)} bytes")
        except (OSError, http.client.HTTPException, ValueError, ArithmeticError) as error:
            # http.client lets through what int() and read() say of the sizes of chunks.
            if time.monotonic() >= deadline or isinstance(error, TimeoutError):
                raise _TryAgain(
                    f"no answer within {self._timeout_s:g} s; raise timeout_s, or lower batch_size"
                ) from error
            raise _TryAgain(f"no answer: {printable(error) or type(error).__name__}") from error
        finally:
            if cut is not None:
                cut.cancel()
            connection.close()
        answered = f"{response.status} {printable(response.reason, 80)}: {_shown(content)}"
        if response.status == 429 or response.status >= 500:
            raise _TryAgain(f"the server answered {answered}")
        if 300 <= response.status < 400:
            raise InputError(
                f"{self._where}: the server redirects to '{printable(response.getheader('Location'))}'; redirects are "
                "not followed, give the final address"
            )
        if response.status != 200:
            raise InputError(f"{self._where}: the server answered {answered}; want 200")
        if len(content) > self._max_response_bytes:
            raise InputError(
                f"{self._where}: the answer has more than {self._max_response_bytes} bytes; it should hold one number "
                "an image, else raise max_response_bytes"
            )
        return content

    def _numbers(self, content: bytes, count: int) -> list[float]:
        want = f'want {{"rewards": [...]}} with {count} finite numbers, one an image'
        try:
            answer = json.loads(content)
            numbers = answer["rewards"]
            if isinstance(numbers, list) and all(type(n) in (int, float) for n in numbers):
                numbers = [float(n) for n in numbers]
            else:
                raise TypeError
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise InputError(f"{self._where}: the server answered {_shown(content)}; {want}") from error
        if len(numbers) != count:
            raise InputError(f"{self._where}: the server answered {len(numbers)} numbers; {want}")
        bad = [i for i, number in enumerate(numbers) if not abs(number) <= _LARGEST]  # NaN is not, either
        if bad:
            much = f", more than float32 holds ({_LARGEST:.3g})" if math.isfinite(numbers[bad[0]]) else ""
            raise InputError(f"{self._where}: the server answered {numbers[bad[0]]}{much} for image {bad[0]}; {want}")
        return numbers


def _png(pixels: np.ndarray[Any, Any]) -> str:
    """(H, W, 3) uint8 -> base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _shut(sock: socket.socket) -> None:
    """End whatever waits for the socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already


def _shown(content: bytes) -> str:
    return f"'{printable(content[:200])}'" + (" ..." if len(content) > 200 else "")
