"""Requests to a server that scores images: what the rewards `http` and `vlm` have in common. No PyTorch.

A server that is not there, too slow, or busy is asked again, and the run ends with its state saved if that does not
help; docs/rewards.md says what counts as what.
"""

from __future__ import annotations

import email.utils
import http.client
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from varfast.printable import printable
from varfast.rewards.building import RewardSection
from varfast.settings.paths import address_parts
from varfast.settings.problems import show
from varfast.settings.schema import Wanted
from varfast.settings.section import MANY
from varfast.types import InputError

_LONGEST_WAIT_S = 30.0
_LONGEST_RETRY_AFTER_S = 300.0
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def _check_url(url: str) -> str:
    try:
        parts = address_parts(url)
    except ValueError as error:
        meant = f"; did you mean http://{url}?" if re.fullmatch(r"[\w.-]+:\d+(/\S*)?", url) else ""
        raise ValueError(f"{show(url)} is no address that can be asked: {error}{meant}") from error
    if "@" in parts.netloc or "#" in url:
        raise ValueError(f"got {show(url)}, want an address without user and without #")
    return url


def _check_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("want the name of an environment variable, such as JUDGE_API_KEY, not the key itself")
    return name


Url = Annotated[str, AfterValidator(_check_url), Wanted("an address, such as http://127.0.0.1:8000/score")]


class ServerSection(RewardSection):
    """How a server is asked."""

    url: Url = Field(description="http:// or https://; redirects are not followed")
    timeout_s: float = Field(60.0, gt=0, le=86400, description="for one request, to the last byte of the answer")
    retries: int = Field(
        3, ge=0, le=10, description="further attempts after no connection, no time, 408, 429 or 5xx; 1, 2, 4 ... s"
    )
    concurrency: int = Field(
        1, ge=1, le=1024, description="requests at a time, of each process; several may share one server"
    )
    max_response_bytes: int = Field(1_000_000, ge=1, le=MANY, description="a longer answer is refused")
    api_key_env: Annotated[
        str | None, AfterValidator(lambda name: name and _check_variable(name)), Wanted("the name of a variable")
    ] = Field(None, description="environment variable with the key that is sent as 'Authorization: Bearer'")

    def reaches_outside(self) -> str:
        key = f", with the key that {self.api_key_env} holds" if self.api_key_env else ""
        return f"asks {self.url}{key}"


class _TryAgain(Exception):
    """What another attempt may mend: no connection, too slow, broken off, 408, 429 and 5xx.

    Attributes:
        after_s: the server asks to be left alone for so long.
    """

    def __init__(self, text: str, after_s: float = 0.0) -> None:
        super().__init__(text)
        self.after_s = after_s


class _CutOff(Exception):
    """Another request has failed, which ends this one."""


class Client:
    """Asks one server, from as many threads at a time as the config allows.

    Redirects and proxies are not followed. Attempts after a failed one are 1, 2, 4 ... up to 30 s apart, or as far as
    the answer's Retry-After says, up to 300 s; an answer that is too long is refused unread.

    Args:
        config: which server, and its limits.
        key: where the reward stands in the config, for errors.
        path: what follows the config's address.
        content_type: of the requests.
    Raises: InputError if the variable of the API key is not set, or holds no key.
    """

    def __init__(self, config: ServerSection, key: str, path: str = "", content_type: str = "application/json") -> None:
        self._where = f"{key}.url={printable(config.url)}"
        parts = address_parts(config.url)
        self._host, self._port = parts.hostname, parts.port
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        folder = parts.path.removesuffix("/") + path if path else parts.path
        self._target = (folder or "/") + (f"?{parts.query}" if parts.query else "")
        self._config = config
        self._secret = "" if config.api_key_env is None else _secret(config.api_key_env, f"{key}.api_key_env")
        self._headers = {"Content-Type": content_type}
        if self._secret:
            self._headers["Authorization"] = f"Bearer {self._secret}"
        self._stop = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def each(self, ask: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """`ask(item)` of every item, some of them at a time, in their order.

        Raises: what `ask` raises for one of them; the requests that are under way then are cut off.
        """
        self._stop.clear()
        if self._config.concurrency == 1 or len(items) < 2:
            return [ask(item) for item in items]
        with ThreadPoolExecutor(min(self._config.concurrency, len(items)), "varfast-request") as pool:
            futures = [pool.submit(ask, item) for item in items]
            try:
                done, left = wait(futures, return_when=FIRST_EXCEPTION)
                failed = left or any(future.exception() for future in done)
            except BaseException:
                failed = True  # Ctrl-C
                raise
            finally:
                if failed:
                    self._cut_off()
                    pool.shutdown(wait=True, cancel_futures=True)
        errors = [future.exception() for future in futures if not future.cancelled()]
        for error in errors:
            if error is not None and not isinstance(error, _CutOff):
                raise error
        return [future.result() for future in futures]

    def ask(self, body: bytes) -> bytes:
        """The content of the answer, of status 200.

        Raises: InputError if the server cannot be reached, is too slow, or answers anything else.
        """
        attempt, retries = 0, self._config.retries
        while True:
            try:
                return self._post(body)
            except _TryAgain as error:
                if attempt == retries:
                    tries = "once" if attempt == 0 else f"{attempt + 1} times"
                    raise self.problem(f"{error} (tried {tries}); is the server up?") from error
                pause_s = max(min(2.0**attempt, _LONGEST_WAIT_S), error.after_s)
            _pause(pause_s, self._stop)
            attempt += 1

    def problem(self, text: str) -> InputError:
        """An error that names the server."""
        return InputError(f"{self._where}: {text}")

    def shown(self, content: bytes | str, most: int = 200) -> str:
        """The beginning of an answer, for an error: printable, and without the API key, which a server may repeat."""
        text = self._hidden(content.decode("utf-8", "replace") if isinstance(content, bytes) else content)
        return f"'{printable(text[:most])}'" + (" ..." if len(text) > most else "")

    def _hidden(self, text: str) -> str:
        return text.replace(self._secret, "***") if self._secret else text

    def _cut_off(self) -> None:
        self._stop.set()
        with self._lock:
            for sock in self._open:
                _shut(sock)

    def _post(self, body: bytes) -> bytes:
        timeout_s, most = self._config.timeout_s, self._config.max_response_bytes
        deadline = time.monotonic() + timeout_s
        connection = self._connection(self._host or "", self._port, timeout=timeout_s)
        cut = None
        try:
            connection.connect()
            # The timeout of a socket counts anew with every byte; this one holds for the request as a whole.
            cut = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, [connection.sock])
            cut.daemon = True
            cut.start()
            with self._lock:
                self._open.add(connection.sock)
            if self._stop.is_set():
                raise _CutOff
            connection.request("POST", self._target, body, self._headers)
            response = connection.getresponse()
            content = response.read(most + 1)
            if time.monotonic() >= deadline:
                raise TimeoutError
            if response.length and len(content) <= most:
                raise _TryAgain(f"the answer broke off after {len(content)} bytes")
        except (OSError, http.client.HTTPException, ValueError, ArithmeticError) as error:
            # http.client lets through what int() and read() say of the sizes of chunks.
            if self._stop.is_set():
                raise _CutOff from error
            if time.monotonic() >= deadline or isinstance(error, TimeoutError):
                raise _TryAgain(
                    f"no answer within {timeout_s:g} s; raise timeout_s, or ask for less at a time"
                ) from error
            raise _TryAgain(f"no answer: {printable(error) or type(error).__name__}") from error
        finally:
            if cut is not None:
                cut.cancel()
            with self._lock:
                self._open.discard(connection.sock)
            connection.close()
        return self._checked(response, content)

    def _checked(self, response: http.client.HTTPResponse, content: bytes) -> bytes:
        """The content of an answer of status 200. Raises: _TryAgain, or InputError, for any other."""
        answered = f"{response.status} {printable(self._hidden(response.reason), 80)}: {self.shown(content)}"
        if response.status in (408, 429) or response.status >= 500:
            raise _TryAgain(f"the server answered {answered}", _retry_after_s(response.getheader("Retry-After")))
        if 300 <= response.status < 400:
            location = printable(self._hidden(str(response.getheader("Location"))))
            raise self.problem(
                f"the server redirects to '{location}'; redirects are not followed, give the final address"
            )
        if response.status != 200:
            raise self.problem(f"the server answered {answered}; want 200")
        if len(content) > self._config.max_response_bytes:
            raise self.problem(
                f"the answer has more than {self._config.max_response_bytes} bytes, which is more than scores need; "
                "else raise max_response_bytes"
            )
        return content


def _secret(variable: str, key: str) -> str:
    """The API key that a variable holds. The text of errors does not show it."""
    secret = os.environ.get(variable, "").strip()
    if not secret:
        raise InputError(f"{key}={variable}: this environment variable is not set; put the server's key into it")
    if not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise InputError(
            f"{key}={variable}: what this environment variable holds is no key: it has spaces, line breaks or letters "
            "beyond ASCII"
        )
    return secret


def _retry_after_s(value: str | None) -> float:
    """Of a header Retry-After, a number of seconds or a date; 0 for anything else."""
    if value is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        seconds = float(value)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, IndexError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_S)


def _pause(seconds: float, stop: threading.Event) -> None:
    """Raises: _CutOff if another request fails meanwhile."""
    if stop.wait(seconds):
        raise _CutOff


def _shut(sock: socket.socket) -> None:
    """End whatever waits for the socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already
