"""What is the same for all families of policies: checks, micro-batches, streams, CUDA graphs, shards, adapters.

A family derives from Driver, hands its models to it, and fills in how a micro-batch is sampled, how logits are computed
from given tokens, and how tokens become pixels and back.

Axes: B image, L token, V vocabulary; H, W pixels.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from varfast import kernels
from varfast.distributed import World, local, replicate, shard_weights
from varfast.perf.cost import Checkpointing, Cost
from varfast.perf.graphs import CudaGraph, GraphPool
from varfast.perf.stages import stage
from varfast.policies import checks, lora
from varfast.policies.checks import Given, as_prompts, as_tokens, check_finite, check_images, check_weights
from varfast.policies.config import LoRAConfig
from varfast.policies.guidance import guided_logits
from varfast.policies.pixels import Pixels, after_this_stream
from varfast.policies.precision import MixedPrecision
from varfast.policies.pretrained import Pretrained
from varfast.policies.protocol import Policy
from varfast.policies.sampler import Captured, Sampled, Sampler
from varfast.policies.shown import Shown
from varfast.randomness import Key
from varfast.settings.section import check_divides
from varfast.types import InputError, Prompts, Rollout, Sampling, TokenLogp


class Driver(Pretrained, Shown, ABC):
    """A policy of any family: see protocol.Policy, which it implements.

    Attributes:
        parts: its models by name, the trained one, a MixedPrecision, first.
        device: where they are.
        num_classes, tokens_shape, image_size, rounding, strict: see protocol.Policy.
        fast: see __init__.
        graph_pool: memory for the graphs of rollout and update, which never run at the same time. The decoder's graph
            has its own: it runs beside the rollout.
        cuda_graph: whether equal rollouts and decodes on a GPU are captured and replayed, if the policy is fast.
    """

    num_classes: int
    tokens_shape: tuple[int, ...]
    image_size: int
    rounding: Literal["nearest", "truncate"] = "nearest"

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        fast: bool = True,
        strict: bool = False,
        decodable: int = 2**30,
    ) -> None:
        """
        Args:
            parts: the trained model first; they are moved to the device, and the others frozen.
            dtype: of activations, "float32" or "bfloat16"; the weights stay float32.
            fast: False samples eagerly and decodes with the reference decoder, in float32: what fast is tested against.
            strict: tokens do not depend on the batch split, and `sample` gives the log-probabilities of `token_logp`
                bit for bit, in any dtype. varfast.policies.strict.check says whether that holds here.
            decodable: images that the decoder takes at a time.
        Raises: InputError for another dtype, or strict where its kernels cannot run.
        """
        self.device = torch.device(device)
        (name, model), *frozen = parts.items()
        self.parts = {name: model.to(self.device)}
        self.parts |= {name: module.to(self.device).requires_grad_(False) for name, module in frozen}
        self.trainable.compute_dtype = checks.compute_dtype(dtype)
        self.fast, self.strict, self.cuda_graph = fast, strict, True
        if strict:
            self._make_strict()
        self.graph_pool = GraphPool()
        self._strength_tensors: dict[float, Tensor] = {}
        self._pixels = Pixels(decodable)
        self._replica: DistributedDataParallel | None = None
        self._gathered: MixedPrecision | None = None
        self._sample_from(self.trainable)

    # What a family fills in.

    @property
    def published_sampling(self) -> Sampling:
        """How the family's own code samples for its published FID; by default the policy itself, at temperature 1."""
        return Sampling()

    @abstractmethod
    def _sample_batch(self, prompts: Prompts, key: Tensor, how: Sampling, keep: bool) -> Sampled:
        """Sample one image a prompt from `self.sampled`, without looking at a value on the host.

        Args:
            prompts: on the device.
            key: (3,) int64 on the device: seed, step, index of the first image; see kernels.sample_tokens.
            how: temperature, guidance and filters.
            keep: return the latent and the teacher_input too.
        """

    @abstractmethod
    def _logits(
        self, model: nn.Module, prompts: Prompts, teacher_input: Tensor, checkpointing: Checkpointing, bias_apart: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Teacher-forced logits (B, L, V), by a call of `model`, which is the trained one or a wrapper around it.

        bias_apart: the bias of the head (V,) may come apart, for the op that reads the logits. Else it is in them.
        """

    @abstractmethod
    def _decode_latent(self, latent: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], not clamped."""

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """Tokens of images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def cost(self, dtype: str, lora: LoRAConfig | None = None) -> Cost:
        """See protocol.Policy."""

    def _latent(self, tokens_BL: Tensor) -> Tensor:
        """What the decoder reads: (B, ...). By default the tokens."""
        return tokens_BL

    def _teacher_input(self, tokens_BL: Tensor) -> Tensor:
        """What the model reads in place of the tokens when it is teacher-forced: (B, ...). By default the tokens."""
        return tokens_BL

    def _strengths(self, cfg: float) -> Sequence[float]:
        """Of each of an image's L tokens the strength t of guidance: logits = (1 + t) conditional - t unconditional.

        Empty: this cfg guides nothing. A family that has this has a prompt that stands for none: `_unconditional`.
        """
        raise InputError(
            f"cfg={cfg:g}: {type(self).__name__} knows no label that stands for none, so it cannot be guided; use cfg=0"
        )

    def _unconditional(self, prompts: Prompts) -> Prompts:
        """As many prompts that stand for none: by default the label num_classes."""
        return Prompts(torch.full_like(prompts.ids_B, self.num_classes))

    @torch.no_grad()
    def _capture_batch(self, prompts: Prompts, key: Tensor, how: Sampling, keep: bool) -> Captured:
        """`_sample_batch` as a CUDA graph, for as many prompts; it has run with them. A family may capture a part."""

        def function(ids_B: Tensor, key: Tensor) -> tuple[Tensor, ...]:
            return tuple(t for t in self._sample_batch(Prompts(ids_B), key, how, keep) if t is not None)

        return CudaGraph(function, prompts.ids_B, key, pool=self.graph_pool)

    def _make_strict(self) -> None:
        """Take ops whose rows do not depend on one another. Of a family that has none, strict mode is refused."""
        raise InputError(f"run.strict=true: {type(self).__name__} has no strict mode; use run.strict=false")

    # What it is.

    @property
    def trainable(self) -> MixedPrecision:
        """The model that is trained; of a frozen copy, the model of the copy."""
        model = next(iter(self.parts.values()))
        assert isinstance(model, MixedPrecision)
        return model

    def _sample_from(self, model: MixedPrecision) -> None:
        """Sample from `model` from now on. A graph that was captured reads the weights of the model before."""
        self.sampled = model
        self._sampler = Sampler(self.fast)

    def add_lora(self, config: LoRAConfig, seed: int) -> None:
        """Train an adapter beside frozen weights from now on. Once, before `frozen_copy` and `distribute`.

        Raises: InputError if peft is not installed.
        """
        lora.add_lora(self.trainable, config, seed)
        if self.strict:
            self._make_strict()  # the adapter's matrices too
        self._sample_from(self.trainable)

    def merged_state(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter merged into the weights of the base, which are float32: with the published names, on the CPU."""
        return lora.merged_state(self.trainable, base)

    def adapter(self, config: LoRAConfig, base: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Content of adapter_config.json and of adapter_model.safetensors, as peft writes them; base: its address."""
        return lora.peft_adapter(self.trainable, config, base)

    def frozen_copy(self, moves: bool = False) -> Self:
        """The same policy with weights that no update reaches: a loss's reference. moves: `refresh` will be called.

        It shares all models but the trained one. The copy's large matrices are stored in the compute dtype: the same
        numbers in every product. With an adapter it is the model without it, on the same frozen weights, and takes no
        memory; one that moves has an adapter of its own on them.
        """
        frozen = copy.copy(self)
        model = self.trainable
        model = lora.frozen_copy(model, moves) if lora.lora_layers(model) else model.frozen_copy()
        frozen.parts = self.parts | {next(iter(self.parts)): model}
        frozen._replica = frozen._gathered = None
        frozen._sample_from(model)
        return frozen

    def refresh(self, original: Policy) -> None:
        """Copy the weights of `original` into this frozen copy of it; of all processes, if they are sharded."""
        self.trainable.refresh(original.trainable)

    def low_precision_copies(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Weights, and the copies in the compute dtype that are read in their place, up to date."""
        return self.trainable.low_precision_copies()

    def weights_changed(self, copies_written: bool = False) -> None:
        """Bring the low-precision copies up to date, unless whoever changed the weights has written them too."""
        if copies_written:
            self.trainable.mark_copies_fresh()
        else:
            self.trainable.refresh_copies()

    # Several processes.

    def distribute(
        self, world: World, parallel: Literal["auto", "ddp", "fsdp"], reference: Policy | None = None
    ) -> None:
        """Train with the other processes, all of which hold the same weights now. Once, before an optimizer is made.

        ddp, auto: all processes keep all weights and average gradients. fsdp: each keeps a shard of the weights in
        training, and samples from a whole copy in the compute dtype, which `gather` brings up to date.

        reference: the frozen copy of this policy that the KL term compares it with, if there is one. It then computes
        as the sharded policy does: while their weights are the same, the KL and its gradient are exactly 0.
        """
        if world.size == 1:
            return
        model = self.trainable
        if parallel != "fsdp":
            self._replica = replicate(model)
            return
        self._gathered = model.frozen_copy()
        self._sample_from(self._gathered)
        references = [] if reference is None else [reference.trainable]
        for each in (model, self._gathered, *references):  # all of them, for one arithmetic: see BranchLinear
            assert isinstance(each, MixedPrecision)
            each.drop_copies()
        shard_weights(model, model.large_modules(), world, self.device, model.compute_dtype)

    def gather(self) -> None:
        """Bring the copy that is sampled from up to date with sharded weights: of all processes."""
        if self._gathered is not None:
            self._gathered.refresh(self.trainable)

    def backward(self, reduce: bool) -> AbstractContextManager[object]:
        """Around forward and backward of a micro-batch. reduce: the last one of an optimizer step.

        Replicas average their gradients in that one alone. Sharded ones do in each: whole gradients would cost what
        sharding saves.
        """
        return nullcontext() if reduce or self._replica is None else self._replica.no_sync()

    # Sampling.

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
        """Sample one image a label.

        Args:
            labels_B: (B,) labels in [0, num_classes), Prompts, or texts, as the family is conditioned.
            temperature: > 0; of the multinomial draw.
            seed: one seed gives the same tokens whatever the split into micro-batches. A batch split into calls gives
                the same tokens when each call gets the index of its first image as `first_sample`.
            cfg: classifier-free guidance (for VAR t = cfg * k / (K - 1) at scale k), which is part of the policy: an
                update of the rollout is one of the guided distribution. 0: none.
            top_k, top_p: filters, for inference; the rollout is then not on-policy and no update takes it.
            step: a second key beside the seed, for a trainer's steps.
            micro_batch: images at a time, must divide B; default all.
        Returns: Rollout; its log-probabilities and entropies are those of the distribution that was sampled.
        Raises: InputError for a label out of range, a micro_batch that does not divide B, or cfg > 0 with a family that
            cannot be guided; NotFinitePolicy, an InputError, if there is a token whose logits are no distribution.
        """
        how, key = Sampling(temperature, cfg, top_k, top_p), Key(seed, step, first_sample)
        prompts = as_prompts(labels_B, self)
        rollout = self._sample(prompts, how, key, micro_batch)
        check_finite(rollout)
        return rollout

    def sample_images(
        self,
        labels_B: Given,
        how: Sampling,
        key: Key,
        micro_batch: int | None = None,
        keep_input: bool = False,
    ) -> tuple[Rollout, Tensor]:
        """Sample, and decode each micro-batch; on a GPU while the next one is sampled. It waits for nothing there, so
        it does not look whether all is finite: `check_finite` does.

        Args:
            labels_B: (B,) labels in [0, num_classes), Prompts, or texts, as the family is conditioned.
            micro_batch: images at a time, must divide B; default all.
            keep_input: the rollout has its teacher_input, for an update: 87 KB an image of the public VAR models.
        Returns: Rollout, and (B, 3, H, W) float32 images in [0, 1].
        """
        prompts = as_prompts(labels_B, self)
        images = self._empty_images(len(prompts))
        return self._sample(prompts, how, key, micro_batch, images, keep_input), images

    def _sample(
        self,
        prompts: Prompts,
        how: Sampling,
        key: Key,
        micro_batch: int | None = None,
        images: Tensor | None = None,
        keep_input: bool = False,
    ) -> Rollout:
        """Sample; with `images`, (B, 3, H, W), write the decoded pixels there."""
        check_divides("micro_batch", micro_batch, len(prompts), "images")
        if how.cfg > 0.0:
            self._strengths(how.cfg)  # refused by a family that cannot be guided
        self.sampled.low_precision_copies()  # up to date: a replayed graph does not look
        capture = self._capture_batch if self.cuda_graph else None
        keep = images is not None
        parts = self._sampler.parts(self._sample_batch, prompts, how, key, micro_batch, capture, keep)
        beside = None if images is None else self._pixels.stream(self.device)
        sampled, first = [], 0
        while True:
            with stage("rollout"):
                part = next(parts, None)
            if part is None:
                break
            sampled.append(part if keep_input else part._replace(teacher_input=None))
            if images is None:
                continue
            assert part.latent is not None
            with nullcontext() if beside is None else after_this_stream(beside):
                self._write_pixels(part.latent, images[first : first + len(part.tokens_BL)])
            if beside is not None:
                part.latent.record_stream(beside)
            first += len(part.tokens_BL)
        tokens_BL, logp_BL, entropy_BL, _, inputs = zip(*sampled, strict=True)
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)  # images and their memory are this stream's
        return Rollout(
            prompts,
            torch.cat(tokens_BL),
            torch.cat(logp_BL),
            torch.cat(entropy_BL),
            how.temperature,
            how.on_policy,
            torch.cat(inputs) if keep_input else None,
            how.cfg,
        )

    # Given tokens.

    def token_logp(
        self,
        labels_B: Given,
        tokens_BL: Tensor,
        temperature: float = 1.0,
        *,
        cfg: float = 0.0,
        checkpointing: Checkpointing = "none",
    ) -> Tensor:
        """Teacher-forced log-probabilities of given tokens under the tempered policy; differentiable in the weights.

        Args:
            labels_B: (B,) labels in [0, num_classes), Prompts, or texts, as the family is conditioned.
            tokens_BL: (B, L) int64.
            temperature: > 0; that of the rollout.
            cfg: guidance; that of the rollout. With it the pass has 2 B rows.
            checkpointing: what the backward pass computes again instead of keeping it: "none", "attention" or "full".
        Returns: (B, L) float32.
        """
        given = (as_prompts(labels_B, self), self._tokens(tokens_BL))
        return self._token_logp(*given, Sampling(temperature, cfg), None, checkpointing).logp_BL

    def teacher_forced(
        self, rollout: Rollout, *, checkpointing: Checkpointing = "none", entropy: bool = False
    ) -> TokenLogp:
        """Log-probabilities of a rollout's tokens at its temperature and guidance; differentiable in the weights.

        Args:
            rollout: on the device; its prompts, tokens, temperature, cfg and, where it has one, teacher_input are read.
            checkpointing: as of token_logp.
            entropy: whether the result has entropies too.
        """
        given = (rollout.prompts, self._tokens(rollout.tokens_BL), rollout.how, rollout.teacher_input)
        found = self._token_logp(*given, checkpointing)
        return found if entropy else TokenLogp(found.logp_BL)

    def _token_logp(
        self,
        prompts: Prompts,
        tokens_BL: Tensor,
        how: Sampling,
        teacher_input: Tensor | None,
        checkpointing: Checkpointing,
    ) -> TokenLogp:
        if teacher_input is None:
            teacher_input = self.teacher_input(tokens_BL)
        strength_L = self._strength_L(how.cfg)
        if len(strength_L):
            # One pass of 2 B rows. Two passes would need a third: the gradient of each half needs the logits of both.
            prompts = Prompts(torch.cat([prompts.ids_B, self._unconditional(prompts).ids_B]))
            teacher_input = teacher_input.repeat(2, *(1,) * (teacher_input.ndim - 1))
        # DDP and FSDP keep a parameter's gradient to what happens inside forward: there the bias is added at once.
        bias_apart = self._replica is None and self._gathered is None
        model = self._replica or self.trainable
        logits_BLV, bias_V = self._logits(model, prompts, teacher_input, checkpointing, bias_apart)
        if len(strength_L):  # a bias is that of both halves, and so of what they make: (1 + t) b - t b
            logits_BLV = guided_logits(logits_BLV, strength_L)
        return TokenLogp(
            *kernels.selective_log_softmax(logits_BLV, tokens_BL, how.temperature, consume_logits=True, bias_V=bias_V)
        )

    def _strength_L(self, cfg: float) -> Tensor:
        """`_strengths` on the device, made once: a copy from the host could not be captured."""
        if cfg not in self._strength_tensors:
            strengths = self._strengths(cfg) if cfg > 0.0 else ()
            self._strength_tensors[cfg] = torch.tensor(strengths, device=self.device)
        return self._strength_tensors[cfg]

    @torch.no_grad()
    def teacher_input(self, tokens_BL: Tensor) -> Tensor:
        """What the model reads in place of the tokens when it is teacher-forced: (B, ...)."""
        return self._teacher_input(self._tokens(tokens_BL))

    @torch.no_grad()
    def check_usable(self, labels: Sequence[int], temperature: float, seed: int, cfg: float = 0.0) -> None:
        """Before its weights are saved: all of them are finite, and an image of each label can be sampled.

        One image at a time: beside a captured rollout there may be room for no more.

        Raises: NotFinitePolicy if not. Of sharded weights each process looks at its own.
        """
        check_weights({name: local(parameter) for name, parameter in self.trainable.named_parameters()})
        self.sampled.low_precision_copies()
        how, key = Sampling(temperature, cfg), torch.tensor([seed, 0, 0], device=self.device)
        # Not by the sampler, which captures what it meets twice in a row: a rollout comes before and after.
        prompts = Prompts(torch.tensor(labels, device=self.device))
        each = [self._sample_batch(prompts.rows(slice(i, i + 1)), key, how, False) for i in range(len(prompts))]
        tokens_BL, logp_BL, entropy_BL = (torch.cat(parts) for parts in list(zip(*each, strict=True))[:3])
        check_finite(Rollout(prompts, tokens_BL, logp_BL, entropy_BL, temperature, True, cfg=cfg))

    # Pixels.

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor, micro_batch: int | None = None) -> Tensor:
        """(B, L) tokens -> (B, 3, H, W) float32 images in [0, 1], `micro_batch` at a time (default all).

        Raises: NotFinitePolicy, an InputError, if the decoder gives numbers that are not finite.
        """
        tokens_BL = self._tokens(tokens_BL)
        images = self._empty_images(len(tokens_BL))
        self._write_pixels(self._latent(tokens_BL), images, micro_batch)
        check_finite(None, images)
        return images

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float images in [0, 1] -> (B, L) int64 tokens.

        Raises: ValueError for images of another size; InputError, which is one, for whole numbers and for numbers
            outside [0, 1].
        """
        check_images(images)
        return self._encode(images.to(self.device, torch.float32).mul(2.0).sub(1.0))

    def _write_pixels(self, latent: Tensor, images: Tensor, micro_batch: int | None = None) -> None:
        capture = self.fast and self.cuda_graph and self.device.type == "cuda"
        self._pixels.write(self._decode_latent, latent, images, micro_batch, capture)

    def _empty_images(self, batch: int) -> Tensor:
        return torch.empty(batch, 3, self.image_size, self.image_size, device=self.device)

    def _tokens(self, tokens_BL: Tensor) -> Tensor:
        return as_tokens(tokens_BL, self.tokens_shape, self.device)
