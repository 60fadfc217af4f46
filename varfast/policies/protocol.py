"""What training, evaluation and sampling need of a model, whatever its family.

`varfast.policies.driver.Driver` implements nearly all of it: a family adds its models and a few methods. Nothing above
varfast/policies/ reaches further into a family than this.

Axes: B image, L token; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from varfast.perf.cost import Checkpointing, Cost
from varfast.policies.checks import Given
from varfast.types import Rollout, Sampling, TokenLogp

if TYPE_CHECKING:
    from varfast.distributed import World
    from varfast.perf.graphs import GraphPool
    from varfast.policies.config import LoRAConfig
    from varfast.randomness import Key


class Policy(Protocol):
    """A model that is trained and the frozen models around it, on one device.

    Attributes:
        cuda_graph: whether equal rollouts and decodes on a GPU are captured and replayed, if the policy is fast.
    """

    cuda_graph: bool

    # What it is.

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Its models by name, the trained one first. A run folder keeps their weights under these names."""
        ...

    @property
    def trainable(self) -> nn.Module:
        """The model that is trained: its parameters that require a gradient are the optimizer's. Of a frozen copy, the
        model of the copy. state_dict() has the names of the published checkpoints, beside those of an adapter.
        """
        ...

    @property
    def sampled(self) -> nn.Module:
        """The model that `sample` reads: the trained one, or, sharded, the copy that `gather` brings up to date."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def strict(self) -> bool:
        """Sampling and teacher forcing have the same bits, whatever the batch: varfast/policies/strict.py."""
        ...

    @property
    def num_classes(self) -> int:
        """Ids of prompts are in [0, num_classes): labels, or rows of the table of texts."""
        ...

    @property
    def tokens_shape(self) -> tuple[int, ...]:
        """Shape of an image's tokens, without the batch."""
        ...

    @property
    def image_size(self) -> int:
        """H and W, in pixels."""
        ...

    @property
    def published_sampling(self) -> Sampling:
        """How the family's own code samples for its published FID."""
        ...

    @property
    def rounding(self) -> Literal["nearest", "truncate"]:
        """How pixels become 8 bits in an evaluation."""
        ...

    @property
    def graph_pool(self) -> GraphPool:
        """Memory for the graphs of rollout and update, which never run at the same time."""
        ...

    def cost(self, dtype: str, lora: LoRAConfig | None = None) -> Cost:
        """What one image costs, from which a step is planned. lora: an adapter that is still to be added."""
        ...

    # Images.

    def set_prompts(self, texts: Sequence[str]) -> None:
        """Of a family that is conditioned on text: id i is row i of these from now on. See policies/text.py."""
        ...

    def sample(
        self,
        labels_B: Given,
        temperature: float = 1.0,
        *,
        seed: int,
        cfg: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        step: int = 0,
        first_sample: int = 0,
        micro_batch: int | None = None,
    ) -> Rollout:
        """Sample one image a prompt: a label, or where the family is conditioned on text its id or text. Waits for the
        device.

        Raises: NotFinitePolicy for logits that are not finite; InputError for cfg > 0 with a family that has no prompt
            which stands for none.
        """
        ...

    def sample_images(
        self,
        labels_B: Given,
        how: Sampling,
        key: Key,
        micro_batch: int | None = None,
        keep_input: bool = False,
    ) -> tuple[Rollout, Tensor]:
        """Sample and decode, without waiting for the device and without a look at whether numbers are finite
        (`varfast.policies.checks.check_finite`).

        Args:
            micro_batch: images at a time; divides B.
            keep_input: the rollout has its `teacher_input`, for an update.
        Returns: rollout, and (B, 3, H, W) float32 images in [0, 1].
        """
        ...

    def decode(self, tokens_BL: Tensor, micro_batch: int | None = None) -> Tensor:
        """Tokens -> (B, 3, H, W) float32 images in [0, 1]."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float images in [0, 1] -> tokens."""
        ...

    # Training.

    def teacher_forced(
        self, rollout: Rollout, *, checkpointing: Checkpointing = "none", entropy: bool = False
    ) -> TokenLogp:
        """Log-probabilities of a rollout's tokens at its temperature and guidance; differentiable in the weights.

        Args:
            rollout: its prompts, tokens, temperature, cfg and, where it has one, teacher_input are read.
            checkpointing: what the backward pass computes again instead of keeping it.
            entropy: whether the result has entropies too.
        """
        ...

    def teacher_input(self, tokens_BL: Tensor) -> Tensor:
        """What the model reads in place of the tokens when it is teacher-forced: (B, ...), without gradient."""
        ...

    def check_usable(self, labels: Sequence[int], temperature: float, seed: int, cfg: float = 0.0) -> None:
        """Look at all weights and sample an image of each label. Raises: NotFinitePolicy if something is not finite."""
        ...

    def frozen_copy(self, moves: bool = False) -> Policy:
        """The same policy with weights that no update reaches: a reference. Shares all models but the trained one.

        moves: its weights will be replaced, by `refresh` or in place. With an adapter it then has a copy of it, and
            else is the model without it.
        """
        ...

    def refresh(self, original: Policy) -> None:
        """Copy the weights of `original` into this frozen copy of it; of all processes, if they are sharded."""
        ...

    def low_precision_copies(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Trained weights that are read in another dtype than they are stored in, and the copies that are read, brought
        up to date. An optimizer may write both (and then calls `weights_changed(copies_written=True)`).
        """
        ...

    def weights_changed(self, copies_written: bool = False) -> None:
        """Bring the low-precision copies up to date after an optimizer step.

        copies_written: whoever changed the weights has written the copies too.
        """
        ...

    def add_lora(self, config: LoRAConfig, seed: int) -> None:
        """Train an adapter beside frozen weights from now on. Once, before `frozen_copy` and `distribute`."""
        ...

    def merged_state(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        """state_dict with the adapter merged into the weights of the base, which are float32, on the CPU."""
        ...

    def adapter(self, config: LoRAConfig, base: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Content of adapter_config.json and of adapter_model.safetensors, as peft writes them; base: its address."""
        ...

    # Several processes.

    def distribute(
        self, world: World, parallel: Literal["auto", "ddp", "fsdp"], reference: Policy | None = None
    ) -> None:
        """Train with the other processes, all of which hold the same weights now. Once, before an optimizer is made."""
        ...

    def gather(self) -> None:
        """Bring `sampled` up to date with sharded weights: of all processes, whenever weights have changed."""
        ...

    def backward(self, reduce: bool) -> AbstractContextManager[object]:
        """Around forward and backward of a micro-batch. reduce: it is the last one before an optimizer step."""
        ...
