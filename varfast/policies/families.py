"""The families of models: what is made by the family that a config names.

To add a family, write a folder beside this file: config.py with its section of the config, derived from
policies.config.FamilyConfig, and build.py with the functions below, which make a Policy (protocol.py) of it; most of
that is in driver.Driver. Then name its section in PolicyConfig (varfast/config.py), and its build.py in `family_named`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from varfast.perf.cost import Cost
from varfast.policies.config import FamilyConfig
from varfast.policies.driver import Driver
from varfast.policies.precision import MixedPrecision
from varfast.policies.text import TextTokenizer
from varfast.weights.state import State


class Family(Protocol):
    """The functions of a family's build.py. `config` is its own section of the config."""

    @property
    def section(self) -> type[FamilyConfig]:
        """Its section of the config."""
        ...

    def empty_model(self, config: Any) -> MixedPrecision:
        """The model that is trained, with weights that are still to be loaded."""
        ...

    def load_part(self, part: str, address: str, config: Any) -> nn.Module:
        """A part with the weights at `address`, a path or hf://owner/repo/file, on the CPU.

        Raises: InputError if the file cannot be read, or does not have the sizes of the config.
        """
        ...

    def random_parts(self, config: Any, seed: int, device: torch.device) -> dict[str, nn.Module]:
        """All parts with random weights of the configured sizes, a function of the seed: for benchmarks and tests."""
        ...

    def assemble(
        self, parts: Mapping[str, nn.Module], device: torch.device, dtype: str, fast: bool = True, strict: bool = False
    ) -> Driver:
        """The policy of all parts, by name. Raises: InputError for parts that do not belong together."""
        ...

    def from_files(
        self, trained: str, frozen: str | None, device: torch.device, dtype: str, fast: bool = True,
        strict: bool = False,
    ) -> Driver:  # fmt: skip
        """The policy of files, whose sizes are read from them.

        Raises: InputError if a file cannot be read or does not fit, or if `frozen` is needed and not given.
        """
        ...

    def cost_of(self, config: Any, dtype: str) -> Cost:
        """What one image costs. dtype: "float32" or "bfloat16", of activations."""
        ...

    def model_card(self, config: Any, trained: str, frozen: str) -> tuple[str, str, str]:
        """For a model card: what the model is, its sizes, and how the family's public code loads it, as Markdown.

        trained, frozen: names of the files.
        """
        ...


class TextFamily(Family, Protocol):
    """Of a family that is conditioned on text also this."""

    def text_tokenizer(self, path: Path | None, config: Any) -> TextTokenizer:
        """The text tokenizer in a file, or for random weights, which have none, one that reads any text.

        Raises: InputError if it cannot be read, or does not fit.
        """
        ...


class WholeFamily(Family, Protocol):
    """Of a family whose checkpoints have all parts (FamilyConfig.as_transformers) also this."""

    def whole_state(self, trained: State, frozen: State) -> State:
        """All parts under the names of the public checkpoints."""
        ...


def whole_state(config: FamilyConfig, trained: State, frozen: State) -> State:
    """See WholeFamily. config: of such a family."""
    assert config.as_transformers
    return cast(WholeFamily, family_of(config)).whole_state(trained, frozen)


def family_of(config: FamilyConfig) -> Family:
    """The functions of the family that a section `policy` belongs to."""
    return family_named(config.family)


def text_tokenizer(config: FamilyConfig, path: Path | None) -> TextTokenizer:
    """See TextFamily. config: of a family that is conditioned on text."""
    assert config.conditioned_on == "text"
    return cast(TextFamily, family_of(config)).text_tokenizer(path, config)


def section_named(name: str) -> type[FamilyConfig]:
    """The section `policy` of a family by its name in a config."""
    return family_named(name).section


def family_named(name: str) -> Family:
    """The functions of a family by its name in a config. Its models are imported with it, and no other family's."""
    if name == "llamagen":
        from varfast.policies.llamagen import build as llamagen

        return llamagen
    if name == "janus":
        from varfast.policies.janus import build as janus

        return janus
    if name == "taming":
        from varfast.policies.taming import build as taming

        return taming
    from varfast.policies.var import build as var

    assert name == "var", name
    return var
