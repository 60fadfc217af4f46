"""What the trainer needs of a model: sample, token_logp, decode, encode.

Axes: B image, L token over all scales; H, W pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from varfast import kernels
from varfast.distributed import World, replicate, shard
from varfast.perf.cpu import keep_freed_memory
from varfast.perf.graphs import CudaGraph, GraphPool
from varfast.perf.stages import stage
from varfast.policies.config import DECODE_GRAPH_IMAGES
from varfast.policies.var.config import LoRAConfig, VARConfig, VQVAEConfig
from varfast.policies.var.decoder import FastDecoder
from varfast.policies.var.lora import add_lora, lora_layers, without_lora
from varfast.policies.var.sampler import Sampler, SamplingSettings, sample
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR, Checkpointing
from varfast.policies.var.weights import load_var, load_vqvae
from varfast.settings.section import check_divides, check_labels
from varfast.types import InputError, NotFinitePolicy, Prompts, Rollout

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device of a config's run.device; on a GPU, float32 convolutions become exact from here on, and on a CPU freed
    memory is kept.

    Raises: InputError for a GPU that is not there.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"run.device={name}: this machine has {torch.cuda.device_count()} GPUs; use cpu or auto")
        # cuDNN's default rounds to 10 bits (TF32), at some batch sizes and not at others: the transformer's input would
        # differ between rollout and update. So would upsampling, which is a product; there exact is the default.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    elif device.type == "cpu":
        keep_freed_memory()
    return device


class Policy:
    """A transformer that is trained and the frozen VQ-VAE that turns its tokens into images.

    Attributes:
        var, vqvae: the models, on one device.
        device: where they are.
        graph_pool: memory of the graphs of rollout and update, which never run at the same time. The decoder's has its
            own: it runs beside the rollout.
        cuda_graph: whether equal rollouts and decodes on a GPU are captured and replayed, if the policy is fast.
        strict: see __init__.
    """

    def __init__(
        self,
        var: VAR,
        vqvae: VQVAE,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        fast: bool = True,
        strict: bool = False,
    ) -> None:
        """
        Args:
            dtype: of activations, "float32" or "bfloat16"; the weights stay float32.
            fast: False samples eagerly and decodes in float32 with the plain decoder: what fast is tested against.
            strict: tokens do not depend on the batch split, and `sample` gives the log-probabilities of `token_logp`
                bit for bit, in any dtype. varfast.policies.strict.check says whether that holds here.
        Raises: InputError for models that do not belong together, another dtype, or strict where its kernels cannot
            run.
        """
        for name in ("vocab_size", "code_width", "patch_nums"):
            of_var, of_vqvae = getattr(var.config, name), getattr(vqvae.config, name)
            if of_var != of_vqvae:
                raise InputError(f"{name} is {of_var} in the transformer and {of_vqvae} in the VQ-VAE; they belong to "
                                 "different models")  # fmt: skip
        if dtype not in _DTYPES:
            raise InputError(f"dtype={dtype!r}: want one of {', '.join(_DTYPES)}")
        self.device = torch.device(device)
        self.var = var.to(self.device)
        self.var.compute_dtype = _DTYPES[dtype]
        self.vqvae = vqvae.to(self.device).requires_grad_(False)
        self._fast, self.strict = fast, strict
        if strict:
            self._make_strict()
        self.cuda_graph = True
        self.graph_pool = GraphPool()
        self._sampler = Sampler(self.var, self.vqvae, fast, self.graph_pool)
        self._decoder: FastDecoder | None = None
        self._decode_graph: tuple[int, CudaGraph] | None = None  # and the number of images that it decodes
        self._last_decoded = 0
        self._beside: torch.cuda.Stream | None = None
        # Images of which the largest map has 2^30 numbers, 102 at 256 px: cuDNN counts in 32 bits.
        self._decodable = max(1, 2**30 // (vqvae.config.base_channels * vqvae.config.image_size**2))
        self._replica: DistributedDataParallel | None = None
        self._gathered: VAR | None = None

    @property
    def sampled_var(self) -> VAR:
        """The transformer that `sample` reads: the trained one, or, sharded, the copy that all of it is gathered in."""
        return self._sampler.var

    @property
    def num_classes(self) -> int:
        return self.var.config.num_classes

    def _make_strict(self) -> None:
        product = kernels.selection.choose("invariant_linear", self.device)
        if product.impl == "reference":
            raise InputError(f"run.strict=true cannot run on {self.device}: {product.why}; use run.strict=false")
        self.var.make_strict()
        self.vqvae.quantize.make_strict()

    def add_lora(self, config: LoRAConfig, seed: int) -> None:
        """Train an adapter beside frozen weights from now on. Once, before `frozen_copy` and `distribute`.

        Raises: InputError if peft is not installed.
        """
        add_lora(self.var, config, seed)
        if self.strict:
            self._make_strict()  # its own matrices too
        # What the old one captured knows of no adapter.
        self._sampler = Sampler(self.var, self.vqvae, self._fast, self.graph_pool)

    def frozen_copy(self) -> Policy:
        """The same policy with weights that no update reaches: the reference of the KL term. Shares the VQ-VAE.

        Its large matrices are stored in the compute dtype: the same numbers in every product. With an adapter it is the
        model without it, on the same frozen weights, and takes no memory.
        """
        twin = copy.copy(self)
        twin.var = without_lora(self.var) if lora_layers(self.var) else self.var.frozen_copy()
        twin._sampler = Sampler(twin.var, self.vqvae, self._fast, self.graph_pool)
        twin._replica = twin._gathered = None
        return twin

    def distribute(
        self, world: World, parallel: Literal["auto", "ddp", "fsdp"], reference: Policy | None = None
    ) -> None:
        """Train with the other processes, all of which hold the same weights now. Once, before an optimizer is made.

        ddp, auto: all processes keep all weights and average gradients. fsdp: they spread the weights in training, and
        each samples from a copy in the compute dtype, which `gather` brings up to date.

        reference: the frozen copy of this policy that the KL term compares it with, if there is one. It then computes
        as the sharded policy does: while their weights are the same, the KL and its gradient are exactly 0.
        """
        if world.size == 1:
            return
        if parallel == "fsdp":
            self._gathered = self.var.frozen_copy()
            self._sampler = Sampler(self._gathered, self.vqvae, self._fast, self.graph_pool)
            copies = [self._gathered] if reference is None else [self._gathered, reference.var]
            for var in (self.var, *copies):  # all of them, for one arithmetic: see BranchLinear
                var.drop_copies()
            shard(self.var, self.var.large_modules(), world, self.device, self.var.compute_dtype)
        else:
            self._replica = replicate(self.var)

    def gather(self) -> None:
        """Bring the copy that is sampled from up to date with sharded weights: of all processes, when weights moved."""
        if self._gathered is not None:
            self._gathered.refresh(self.var)

    def backward(self, reduce: bool) -> AbstractContextManager[object]:
        """Around forward and backward of a micro-batch. reduce: the last one of an optimizer step.

        Replicas average their gradients in that one alone. Sharded ones do in each: whole gradients would cost what
        sharding saves.
        """
        return nullcontext() if reduce or self._replica is None else self._replica.no_sync()

    def sample(
        self,
        labels_B: Tensor | Sequence[int],
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
            labels_B: (B,) labels in [0, num_classes).
            temperature: > 0; of the multinomial draw.
            seed: one seed gives the same tokens whatever the split into micro-batches. A batch split into calls gives
                the same tokens when each call gets the index of its first image as `first_sample`.
            cfg, top_k, top_p: classifier-free guidance (t = cfg * k / (K - 1) at scale k) and filters, for inference;
                the rollout is then not on-policy and GRPO refuses it.
            step: a second key beside the seed, for a trainer's steps.
            micro_batch: images at a time, must divide B; default all.
        Returns: Rollout; its log-probabilities and entropies are those of the distribution that was sampled.
        Raises: InputError for a label out of range or a micro_batch that does not divide B; NotFinitePolicy, an
            InputError, if there is a token whose logits are no distribution.
        """
        rollout, _ = self._sample(
            labels_B, temperature, seed, cfg, top_k, top_p, step, first_sample, micro_batch, decode=False
        )
        check_finite(rollout)
        return rollout

    def sample_images(
        self,
        labels_B: Tensor | Sequence[int],
        temperature: float = 1.0,
        *,
        seed: int,
        cfg: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        step: int = 0,
        first_sample: int = 0,
        micro_batch: int | None = None,
        keep_input: bool = False,
    ) -> tuple[Rollout, Tensor]:
        """`sample`, and `decode` of each micro-batch; on a GPU while the next one is sampled.

        Waits for nothing on the GPU, so it does not look whether all is finite: `check_finite` does.

        Args:
            keep_input: the rollout holds its var_input_BLC, for an update: 87 KB an image of the public models.
        Returns: Rollout, and (B, 3, H, W) float32 images in [0, 1].
        """
        rollout, images = self._sample(
            labels_B, temperature, seed, cfg, top_k, top_p, step, first_sample, micro_batch, True, keep_input
        )
        assert images is not None
        return rollout, images

    def _sample(
        self,
        labels_B: Tensor | Sequence[int],
        temperature: float,
        seed: int,
        cfg: float,
        top_k: int,
        top_p: float,
        step: int,
        first_sample: int,
        micro_batch: int | None,
        decode: bool,
        keep_input: bool = False,
    ) -> tuple[Rollout, Tensor | None]:
        if not temperature > 0:
            raise InputError(f"temperature={temperature}: must be > 0; for greedy choice use top_k=1")
        if cfg < 0 or top_k < 0 or not 0 <= top_p <= 1:
            raise InputError(f"cfg={cfg}, top_k={top_k}, top_p={top_p}: want cfg >= 0, top_k >= 0, 0 <= top_p <= 1")
        labels_B = self._labels(labels_B)
        check_divides("micro_batch", micro_batch, len(labels_B))
        settings = SamplingSettings(temperature, cfg, top_k, top_p)
        drawn, images = [], self._empty_images(len(labels_B)) if decode else None
        rest = images
        parts = self._sampler.parts(
            labels_B, settings, seed, step, first_sample, micro_batch, self.cuda_graph, keep=decode
        )
        if decode and self.device.type == "cuda" and self._beside is None:
            self._beside = torch.cuda.Stream(self.device)  # one for all steps: the allocator keeps memory by stream
        beside = self._beside if decode else None
        while True:
            with stage("rollout"):
                part = next(parts, None)
            if part is None:
                break
            drawn.append(part if keep_input else part._replace(var_input_BLC=None))
            if rest is None:
                continue
            assert part.f_hat is not None
            with nullcontext() if beside is None else _after_this_stream(beside):
                self._decode(part.f_hat, rest[: len(part.f_hat)])
            if beside is not None:
                part.f_hat.record_stream(beside)
            rest = rest[len(part.f_hat) :]
        tokens_BL, logp_BL, entropy_BL, _, inputs_BLC = zip(*drawn, strict=True)
        rollout = Rollout(
            Prompts(labels_B),
            torch.cat(tokens_BL),
            torch.cat(logp_BL),
            torch.cat(entropy_BL),
            temperature,
            settings.on_policy,
            torch.cat(inputs_BLC) if keep_input else None,
        )
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)  # images and their memory are this stream's
        return rollout, images

    def token_logp(
        self,
        labels_B: Tensor | Sequence[int],
        tokens_BL: Tensor,
        temperature: float = 1.0,
        *,
        var_input_BLC: Tensor | None = None,
        checkpointing: Checkpointing = "none",
    ) -> Tensor:
        """Teacher-forced log-probabilities of given tokens under the tempered policy; differentiable in the weights.

        Args:
            labels_B: (B,) labels in [0, num_classes).
            tokens_BL: (B, L) int64.
            temperature: > 0; that of the rollout.
            var_input_BLC: what `teacher_input` made of the tokens, where it is needed more than once.
            checkpointing: what the backward pass computes again instead of keeping it: "none", "attention" or "full".
        Returns: (B, L) float32.
        """
        labels_B = self._labels(labels_B)
        tokens_BL = self._tokens(tokens_BL)
        if var_input_BLC is None:
            var_input_BLC = self.teacher_input(tokens_BL)
        bias_V = None
        if self._replica is None and self._gathered is None:
            logits_BLV, bias_V = self.var(labels_B, var_input_BLC, checkpointing=checkpointing, bias_apart=True)
        else:  # DDP and FSDP keep a parameter's gradient to what happens inside forward: the bias is added there
            logits_BLV = (self._replica or self.var)(labels_B, var_input_BLC, checkpointing=checkpointing)
        logp_BL, _ = kernels.selective_log_softmax(
            logits_BLV, tokens_BL, temperature, consume_logits=True, bias_V=bias_V
        )
        return logp_BL

    @torch.no_grad()
    def teacher_input(self, tokens_BL: Tensor) -> Tensor:
        """What the transformer sees in place of each token but the first scale's, (B, L - first, code width)."""
        return self.vqvae.var_input(self._tokens(tokens_BL))

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor, micro_batch: int | None = None) -> Tensor:
        """(B, L) tokens -> (B, 3, H, W) float32 images in [0, 1], `micro_batch` at a time (default all).

        Raises: NotFinitePolicy, an InputError, if the decoder gives numbers that are not finite.
        """
        tokens_BL = self._tokens(tokens_BL)
        images = self._empty_images(len(tokens_BL))
        self._decode(self.vqvae.f_hat(tokens_BL), images, micro_batch)
        check_finite(None, images)
        return images

    @torch.no_grad()
    def check_usable(self, labels: Sequence[int], temperature: float, seed: int) -> None:
        """Before its weights are saved: all of them are finite, and an image of each label can be sampled.

        One image at a time: beside a captured rollout there may be room for no more.

        Raises: NotFinitePolicy if not. Of sharded weights each process looks at its own.
        """
        tensors = {n: (p.to_local() if isinstance(p, DTensor) else p).detach() for n, p in self.var.named_parameters()}
        # A sum that is not finite has a part that is not, or overflows: only then they are counted.
        if not bool(torch.stack([t.sum(dtype=torch.float32) for t in tensors.values()]).isfinite().all()):
            wrong = [n for n, t in tensors.items() if not bool(t.isfinite().all())]
            if wrong:
                raise NotFinitePolicy(
                    f"{len(wrong)} of {len(tensors)} weights hold NaN or infinite numbers, the first is {wrong[0]}"
                )
        self.sampled_var.low_precision_copies()
        key = torch.tensor([seed, 0, 0], device=self.device)
        # Not by the sampler, which captures what it meets twice in a row: a rollout comes before and after.
        drawn = [
            sample(self.sampled_var, self.vqvae, label_B, key, SamplingSettings(temperature))
            for label_B in torch.tensor(labels, device=self.device).split(1)
        ]
        tokens_BL, logp_BL, entropy_BL = (torch.cat(parts) for parts in list(zip(*drawn, strict=True))[:3])
        check_finite(Rollout(Prompts(torch.tensor(labels)), tokens_BL, logp_BL, entropy_BL, temperature, True))

    def _empty_images(self, batch: int) -> Tensor:
        size = self.vqvae.config.image_size
        return torch.empty(batch, 3, size, size, device=self.device)

    @torch.no_grad()
    def _decode(self, f_hat: Tensor, images: Tensor, micro_batch: int | None = None) -> None:
        """Write the images of the sums of quantized scales."""
        size = min(micro_batch or self._decodable, self._decodable)
        if self._captures:
            size = min(size, DECODE_GRAPH_IMAGES)
        half = torch.full((1,), 0.5, device=self.device)
        with stage("decode"):
            for part, out in zip(f_hat.split(size), images.split(size), strict=True):
                # x / 2 + 1 / 2, in float32, as the copy into place: two passes over the pixels instead of six. Folded
                # into the last convolution it would cost a bit: bfloat16 has 128 steps from 0.5 to 1.
                torch.add(half, self._decode_part(part), alpha=0.5, out=out)
                # Infinity becomes NaN, for check_finite: clamped it would be white. A pass of 0.3 ms for 512 images of
                # 256 pixels at 3 TB/s.
                out.nan_to_num_(nan=math.nan, posinf=math.nan, neginf=math.nan).clamp_(0.0, 1.0)

    @property
    def _captures(self) -> bool:
        return self._fast and self.cuda_graph and self.device.type == "cuda"

    def _decode_part(self, f_hat: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], not clamped. On a GPU a batch size met twice in a row is captured and replayed."""
        if not self._fast:
            return self.vqvae.decode_f_hat(f_hat)
        if self._decoder is None:
            self._decoder = FastDecoder(self.vqvae, self.var.compute_dtype)
        batch, captured, last = len(f_hat), self._decode_graph[0] if self._decode_graph else 0, self._last_decoded
        self._last_decoded = batch
        if not self._captures or batch not in (captured, last):
            return self._decoder(f_hat)
        if self._decode_graph is None or batch != captured:
            self._decode_graph = None  # its memory goes first
            decoder = self._decoder
            self._decode_graph = batch, CudaGraph(lambda f_hat: (decoder(f_hat),), f_hat)
        (images,) = self._decode_graph[1](f_hat)
        return images

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float images in [0, 1] -> (B, L) int64 tokens.

        Raises: ValueError for images of another size; InputError, which is one, for whole numbers and for numbers
            outside [0, 1].
        """
        if not images.is_floating_point():
            raise InputError(f"images are {images.dtype}, want floats in [0, 1]; of bytes: images / 255")
        low, high = (float(bound) for bound in torch.aminmax(images)) if images.numel() else (0.0, 1.0)
        if not (low >= 0.0 and high <= 1.0):  # of NaN neither holds
            raise InputError(f"images hold numbers from {low:.4g} to {high:.4g}, want [0, 1]: {_to_unit(low, high)}")
        return self.vqvae.encode(images.to(self.device, torch.float32).mul(2.0).sub(1.0))

    def _labels(self, labels_B: Tensor | Sequence[int]) -> Tensor:
        if not hasattr(labels_B, "__iter__"):
            raise InputError(f"labels_B={labels_B}: want one label an image, as [{labels_B}] or [{labels_B}] * 8")
        if isinstance(labels_B, Tensor) and (labels_B.is_floating_point() or labels_B.dtype == torch.bool):
            raise InputError(f"labels_B is {labels_B.dtype}, want whole numbers, as labels_B.long()")
        # Labels that come as a tensor on the device are checked where a user made them, not here: no synchronisation.
        if isinstance(labels_B, Tensor) and labels_B.device.type != "cpu":
            return labels_B
        if not isinstance(labels_B, Tensor):
            labels_B = list(labels_B)
            wrong = [label for label in labels_B if isinstance(label, bool) or not hasattr(label, "__index__")]
            if wrong:
                raise InputError(f"labels_B holds {wrong[0]!r}, want whole numbers")
        labels = torch.as_tensor(labels_B, dtype=torch.int64)
        if labels.ndim != 1:
            raise InputError(f"labels_B is {tuple(labels.shape)}, want (B,): one label an image")
        check_labels("labels_B", labels.tolist(), self.num_classes)
        return labels.to(self.device)

    def _tokens(self, tokens_BL: Tensor) -> Tensor:
        if tokens_BL.ndim != 2 or tokens_BL.shape[1] != self.var.config.num_tokens:
            raise InputError(f"tokens_BL is {tuple(tokens_BL.shape)}, want (B, {self.var.config.num_tokens})")
        return tokens_BL.to(self.device)


def check_finite(rollout: Rollout | None, images: Tensor | None = None) -> None:
    """Whether tokens were drawn from distributions and images consist of numbers. Waits for the device, once.

    The sampler gives NaN as the log-probability of a token whose logits hold NaN or infinity (kernels.sample_tokens).

    Raises: NotFinitePolicy, an InputError, if not.
    """
    flags = [] if rollout is None else [rollout.logp_BL.isnan().any()]
    if images is not None and len(images):
        flags.append(images.amax().isnan())  # NaN is its own maximum
    if not flags or not bool(torch.stack(flags).any()):
        return
    if rollout is not None and bool((wrong_BL := rollout.logp_BL.isnan()).any()):
        wrong_B = wrong_BL.any(dim=1)
        token = int(wrong_BL[wrong_B].int().argmax(dim=1).min())
        raise NotFinitePolicy(
            f"the transformer's logits hold NaN or infinite numbers in {int(wrong_B.sum())} of {len(wrong_B)} images, "
            f"from token {token} on, at temperature {rollout.temperature:g}: it has diverged, or its numbers are too "
            "large for this dtype or temperature"
        )
    assert images is not None
    wrong = int(images.isnan().flatten(1).any(dim=1).sum())
    raise NotFinitePolicy(
        f"the VQ-VAE's decoder gives NaN or infinite numbers in {wrong} of {len(images)} images: its weights are "
        "damaged, or too large for this dtype"
    )


def _to_unit(low: float, high: float) -> str:
    if low >= 0.0 and 1.0 < high <= 255.0:
        return "images / 255, if they are levels"
    if low >= -1.0 and high <= 1.0:
        return "(images + 1) / 2, if they are in [-1, 1]"
    return "clamp(0, 1) what sharpening or resizing left outside"


@contextmanager
def _after_this_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Inside, work goes to `stream`, after all that the current one was given."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def _there(device: torch.device | str) -> torch.device:
    """Raises: InputError for no device, and for one that this machine has not."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device={device!r}: want cpu, cuda or cuda:1") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={found}: this machine has {torch.cuda.device_count()} GPUs; use cpu")
    return found


def load_policy(
    var: str,
    vqvae: str,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    var_config: VARConfig | None = None,
    vqvae_config: VQVAEConfig | None = None,
    fast: bool = True,
    strict: bool = False,
) -> Policy:
    """A policy from checkpoints, whose sizes are read from the files.

    Args:
        var, vqvae: paths or hf://owner/repo/file; the public ones are hf://FoundationVision/var/var_d16.pth and
            hf://FoundationVision/var/vae_ch160v4096z32.pth.
        device: "cpu", "cuda", "cuda:1".
        dtype: of activations, "float32" or "bfloat16".
        var_config, vqvae_config: sizes the files must have.
        fast: False samples eagerly and decodes plainly: what the fast path is compared with.
        strict: the same bits in sampling and in teacher forcing, whatever the batch: see Policy.
    Raises: InputError if a file cannot be read or does not fit, or for a device that is not there.
    """
    device = _there(device)
    transformer = load_var(var, var_config)
    tokenizer = load_vqvae(vqvae, transformer.config.patch_nums, vqvae_config)
    return Policy(transformer, tokenizer, device, dtype, fast, strict)
