"""A judge: a vision-language model behind an OpenAI-compatible server is asked about each image. See docs/rewards.md.

Axes: B image; H, W pixels.
"""

from __future__ import annotations

import base64
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from varfast.printable import printable
from varfast.rewards.answers import Unreadable, number, yes_no, yes_probability
from varfast.rewards.building import Building, PerImage, Reward, Scored
from varfast.rewards.client import Client, ServerSection, Url
from varfast.rewards.formats import encoded
from varfast.rewards.http import to_pixels
from varfast.rewards.judge_templates import TEMPLATES, JudgeTemplate
from varfast.settings.problems import show
from varfast.settings.reading import is_finite
from varfast.settings.schema import Wanted
from varfast.types import InputError, NotFiniteReward, RewardBatch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# {prompt}, {tag}, or a key of the prompt's metadata. Other braces, as of JSON, are text.
_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_MAX_TOKENS = {"yes_no": 8, "number": 1024}
_WRITTEN = ("model", "messages", "temperature", "max_tokens", "seed", "logprobs", "top_logprobs")


def _check_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{show(pattern)} is no regular expression: {error}") from error
    if groups != 1:
        raise ValueError(f"{show(pattern)} has {groups} groups; want one, around the number")
    return pattern


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Patterns = Annotated[
    list[Annotated[str, AfterValidator(_check_pattern)]],
    BeforeValidator(_listed),
    Wanted("a regular expression with one group, or a list of them"),
]
_Questions = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_listed),
    Wanted("a text such as 'Does this image show {prompt}? Answer yes or no.', or a list of them"),
]


class VlmReward(ServerSection):
    """A vision-language model behind an OpenAI-compatible server judges each image. See docs/rewards.md."""

    type: Literal["vlm"] = Field(description="the kind of reward")
    url: Url = Field(
        description="what stands before /chat/completions, as http://127.0.0.1:8000/v1; redirects are not followed"
    )
    model: str = Field(min_length=1, description="name of the model, as the server has it")
    question: _Questions = Field(
        [],
        description="what is asked of each image: one text, or several, whose scores are averaged; {prompt}, {tag} and "
        "{key}, of the prompt's metadata, stand for what the image is to show",
    )
    template: Literal["unified_reward", "unified_reward_2"] | None = Field(
        None,
        description="in place of answer, range and pattern: those of UnifiedReward, or of its version 2, and a "
        "question in words of ours, unless `question` has those that the model was trained with",
    )
    system: str | None = Field(None, min_length=1, description="system prompt; default: none")
    answer: Literal["yes_no", "number"] = Field(
        "yes_no",
        description="yes_no: the probability of yes, or 1 and 0 where the server gives no log-probabilities; number: "
        "what the answer says",
    )
    range: tuple[float, float] | None = Field(
        None, strict=False, description="of answer: number: the least and the greatest that there may be, as [1, 5]"
    )
    scale: bool = Field(False, description="map the range to 0 to 1")
    pattern: _Patterns = Field(
        [],
        description="regular expression that finds the number, its one group; of several the numbers are averaged. "
        "Default: the answer is the number alone",
    )
    json_key: str | None = Field(
        None, min_length=1, description="in place of pattern: the answer is a JSON object with this key"
    )
    top_logprobs: int = Field(
        20, ge=0, le=20, description="alternatives asked for with answer: yes_no; 0: read the text, for servers that "
        "refuse to be asked"
    )  # fmt: skip
    temperature: float | None = Field(0.0, ge=0, le=2, description="null: left to the server")
    max_tokens: int | None = Field(
        None, ge=1, le=100_000, description="of an answer; default: 8 of yes_no, 1024 of number"
    )
    seed: int | None = Field(
        0, ge=0, le=2**31 - 100, description="of the server's sampling, one more at each further attempt; null: none"
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="further keys of a request, as {chat_template_kwargs: {enable_thinking: false}}",
    )
    image: Literal["png", "jpeg"] = Field("png", description="how images are sent; jpeg with quality 95")
    max_side: int | None = Field(
        None, ge=16, le=65536, description="pixels; larger images are shrunk to it. Default: as they are"
    )
    concurrency: int = Field(
        16, ge=1, le=1024, description="requests at a time, of each process; several may share one server"
    )
    unreadable: float | None = Field(
        None,
        ge=-1e6,
        le=1e6,
        description="score of an image whose answer is not of the form asked for, in all attempts. Default: none, and "
        "the rollout is left out",
    )

    @field_validator("extra")
    @classmethod
    def _free(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if not is_finite(extra):
            raise ValueError(f"got {show(extra)}; want finite numbers, below 2**63")
        if taken := [key for key in extra if key in _WRITTEN]:
            raise ValueError(f"{taken[0]} is a key of the reward itself, or of no use to it")
        return extra

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        number = {"range": self.range, "pattern": self.pattern, "json_key": self.json_key}
        given = [key for key, value in number.items() if value]
        if self.template is not None:
            if given:
                raise ValueError(f"template={self.template} has its own {given[0]}; leave one of them out")
            return self
        if not self.question:
            raise ValueError("give question or template, such as question: 'Does this image show {prompt}? Answer yes "
                             "or no.'")  # fmt: skip
        if self.answer == "yes_no":
            if given := [*given, *(["scale"] if self.scale else [])]:
                raise ValueError(f"{given[0]} is of answer: number; a probability of yes has none")
        elif self.range is None:
            raise ValueError("answer: number wants the range of its numbers, such as range: [1, 5]")
        elif not self.range[0] < self.range[1]:
            raise ValueError(f"range: got {list(self.range)}; want the least number and then the greatest")
        if self.pattern and self.json_key is not None:
            raise ValueError("give pattern or json_key, one of the two")
        return self

    def build(self, building: Building) -> Reward:
        return PerImage(building, Vlm(self, building))

    @property
    def form(self) -> JudgeTemplate | None:
        """Where the numbers of answers are; None: they are yes or no. The question does not count."""
        if self.template is not None:
            return TEMPLATES[self.template]
        return None if self.range is None else JudgeTemplate("", self.range, tuple(self.pattern))

    @property
    def questions(self) -> list[str]:
        """What is asked of each image."""
        return self.question if self.question or self.template is None else [TEMPLATES[self.template].question]


@dataclass(frozen=True)
class _Task:
    """An image to be judged: its number among those of the call, its pixels, and what stands for {...}."""

    image: int
    pixels: np.ndarray[Any, Any]
    values: Mapping[str, Any]


class Vlm:
    """One number an image, from a judge.

    Args:
        config: which judge, and what it is asked.
        building: where the reward stands in the config, for errors, and the run's prompts.
    Raises: InputError if the API key is not there, or a prompt has not what a question says.
    """

    def __init__(self, config: VlmReward, building: Building) -> None:
        self._config, self._key, self._name = config, building.key, building.name
        self._client = Client(config, building.key, path="/chat/completions")
        self._places = sorted({name for text in config.questions for name in _PLACE.findall(text)})
        self._said: dict[str, object] = {}
        if building.prompts is not None and set(self._places) - {"prompt", "tag"}:
            for row in building.prompts.prompts:
                self._check({**row.metadata, "tag": row.tag, "prompt": row.text})

    def __call__(self, scored: Scored) -> Tensor:
        """(B,) of images (B, 3, H, W) in [0, 1].

        Raises: InputError if the server cannot be reached, is too slow, or answers what no such server does;
            NotFiniteReward for an answer that is not of the form asked for, if `unreadable` says no number.
        """
        import torch

        pixels, values = to_pixels(scored.images), _values(scored.batch)
        for row in values:
            self._check(row)
        tasks = [_Task(i, pixels[i], values[i]) for i in range(len(pixels))]
        return torch.tensor(self._client.each(self._judge, tasks), device=scored.images.device)

    def _check(self, values: Mapping[str, Any]) -> None:
        if lacking := [name for name in self._places if name not in values]:
            raise InputError(
                f"{self._key}.question asks for {{{lacking[0]}}}, which the prompt {show(values.get('prompt'))} has "
                f"not; it has {', '.join(map(printable, sorted(values)))}"
            )

    def _judge(self, task: _Task) -> float:
        config = self._config
        file = encoded(task.pixels, config.image, 95, config.max_side)
        url = f"data:image/{config.image};base64,{base64.b64encode(file).decode('ascii')}"
        scores = [self._score(task.image, url, filled(text, task.values)) for text in config.questions]
        return math.fsum(scores) / len(scores)

    def _score(self, image: int, url: str, question: str) -> float:
        """Of one question. What cannot be read is asked again at once: the server itself is well."""
        for attempt in range(self._config.retries + 1):
            content = self._client.ask(json.dumps(self._request(url, question, attempt)).encode())
            text, tokens, cause = self._choice(content)
            try:
                return self._read(text, tokens)
            except Unreadable as error:
                unreadable = f"{self._client.shown(text)}{cause}; {error}"
        if self._config.unreadable is None:
            raise NotFiniteReward(
                f"{self._client.problem(f'the answer for image {image} is {unreadable}')} (asked "
                f"{self._config.retries + 1} times); mend {self._key}.question, or set {self._key}.unreadable to the "
                "score of such an image"
            )
        self._say_once(f"an answer is {unreadable}; such images score {self._config.unreadable:g}")
        return self._config.unreadable

    def _request(self, url: str, question: str, attempt: int) -> dict[str, Any]:
        config = self._config
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        kind: Literal["yes_no", "number"] = "yes_no" if config.form is None else "number"
        request: dict[str, Any] = {
            "model": config.model,
            "messages": [*system, {"role": "user", "content": content}],
        }
        if "max_completion_tokens" not in config.extra:  # a newer name, which some servers want
            request["max_tokens"] = config.max_tokens or _MAX_TOKENS[kind]
        if config.temperature is not None:
            request["temperature"] = config.temperature
        if config.seed is not None:
            request["seed"] = config.seed + attempt
        if kind == "yes_no" and config.top_logprobs:
            request |= {"logprobs": True, "top_logprobs": config.top_logprobs}
        return request | config.extra

    def _choice(self, content: bytes) -> tuple[str, Any, str]:
        """Text of a chat completion, its tokens' log-probabilities, and why it is as it is, if that is known.

        Raises: InputError if it is no chat completion.
        """
        try:
            choice = json.loads(content)["choices"][0]
            text, logprobs, reason = choice["message"]["content"], choice.get("logprobs"), choice.get("finish_reason")
            if not (text is None or isinstance(text, str)):
                raise TypeError
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise self._client.problem(
                f"the server answered {self._client.shown(content)}; want a chat completion, with "
                "choices[0].message.content"
            ) from error
        tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
        cause = ", which max_tokens cut off" if reason == "length" else ""
        return text or "", tokens, cause

    def _read(self, text: str, tokens: Any) -> float:
        """The score that an answer gives. Raises: Unreadable."""
        config, form = self._config, self._config.form
        if form is None:
            probability = yes_probability(tokens) if config.top_logprobs else None
            if probability is not None:
                return probability
            if config.top_logprobs:
                self._say_once("the server gives no log-probabilities; an answer counts 1 or 0 by its text")
            return yes_no(text)
        least, greatest = form.range
        found = number(text, form.patterns, config.json_key, least, greatest)
        return (found - least) / (greatest - least) if config.scale else found

    def _say_once(self, text: str) -> None:
        mark = object()
        if self._said.setdefault(text.partition(" ")[0], mark) is mark:  # of several threads the first
            warnings.warn(f"reward {printable(self._name)}: {text}", stacklevel=2)


def _values(batch: RewardBatch) -> list[dict[str, Any]]:
    """What stands for {...} in questions, of each image."""
    if not batch.metadata:  # labels
        return [{"prompt": prompt} for prompt in batch.prompts]
    rows = zip(batch.metadata, batch.tags, batch.prompts, strict=True)
    return [{**metadata, "tag": tag, "prompt": prompt} for metadata, tag, prompt in rows]


def filled(text: str, values: Mapping[str, Any]) -> str:
    """A question with each {name} replaced by its value: text as it is, anything else as JSON."""

    def value(place: re.Match[str]) -> str:
        found = values[place[1]]
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _PLACE.sub(value, text)
