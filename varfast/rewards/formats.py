"""What servers of scores are sent, and what they answer: varfast's own JSON, flow_grpo's and verl-omni's pickles.

Sources: github.com/yifan123/flow_grpo (flow_grpo/rewards.py, the three remote scores) and yifan123/reward-server;
github.com/verl-project/verl-omni (docs/start/http_scorer.md, verl_omni/utils/reward_score/http_scorer_client.py).

Axes: H, W pixels.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from varfast.rewards.plain_pickle import plain_loads

if TYPE_CHECKING:
    import numpy as np

    Pixels = np.ndarray[Any, Any]

# Readable by every Python since 3.4; the servers' own clients send their Python's default, this one up to 3.13.
_PROTOCOL = 4


@dataclass(frozen=True)
class Asked:
    """Images of one request.

    Attributes:
        images: (H, W, 3) uint8 each.
        labels: of the images; for a run on prompts the numbers of these.
        prompts, tags, metadata: of the images; docs/rewards.md.
        of_prompts: whether the run is on prompts.
        field: which numbers of the answer are the rewards; None: the format's own.
    """

    images: list[Pixels]
    labels: list[int]
    prompts: list[str]
    tags: list[str]
    metadata: list[dict[str, Any]]
    of_prompts: bool
    field: str | None = None


@dataclass(frozen=True)
class ServerFormat:
    """A protocol.

    Attributes:
        content_type: of a request.
        request: its content.
        answer: the object of an answer's content. Raises: ValueError, or RecursionError, if there is none.
        fields: where the numbers may be in that object, a dict; the first that it has counts.
    """

    content_type: str
    request: Callable[[Asked], bytes]
    answer: Callable[[bytes], Any]
    fields: tuple[str, ...]


def encoded(pixels: Pixels, kind: Literal["png", "jpeg"], quality: int = 75, max_side: int | None = None) -> bytes:
    """An image file of (H, W, 3) uint8.

    Args:
        quality: of a JPEG, 1 to 95; Pillow's default, which the public clients have.
        max_side: a larger image is shrunk to this many pixels in height and width at most.
    """
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    if max_side is not None and max(image.size) > max_side:
        factor = max_side / max(image.size)
        width, height = (max(1, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if kind == "png":
        image.save(file, format="PNG", compress_level=1)
    else:
        image.save(file, format="JPEG", quality=quality)
    return file.getvalue()


def _own(asked: Asked) -> bytes:
    images = [base64.b64encode(encoded(image, "png")).decode("ascii") for image in asked.images]
    sent: dict[str, Any] = {"images": images, "labels": asked.labels}
    if asked.of_prompts:
        sent |= {"prompts": asked.prompts, "tags": asked.tags, "metadata": asked.metadata}
    return json.dumps(sent).encode()


def _flow_grpo(asked: Asked) -> bytes:
    """One request for the three servers: DeQA reads the images, UnifiedReward's the prompts too, GenEval's the rest."""
    meta = [
        {**metadata, "tag": tag, "prompt": prompt}
        for metadata, tag, prompt in zip(asked.metadata, asked.tags, asked.prompts, strict=True)
    ]
    # GenEval's server computes `rewards` only if it is not told that strict_rewards and scores are enough.
    sent = {"images": [encoded(image, "jpeg") for image in asked.images], "prompts": asked.prompts,
            "meta_datas": meta, "only_strict": asked.field != "rewards"}  # fmt: skip
    return pickle.dumps(sent, _PROTOCOL)


def _verl_omni(asked: Asked) -> bytes:
    # Its metadata are reserved: the public client sends {}.
    sent = {"images": [encoded(image, "jpeg") for image in asked.images], "prompts": asked.prompts, "metadata": {}}
    return pickle.dumps(sent, _PROTOCOL)


FORMATS = {
    "json": ServerFormat("application/json", _own, json.loads, ("rewards",)),
    "flow_grpo": ServerFormat("application/octet-stream", _flow_grpo, plain_loads, ("outputs", "scores")),
    "verl_omni": ServerFormat("application/octet-stream", _verl_omni, plain_loads, ("scores",)),
}
