"""VAR and its VQ-VAE as a policy.

Axes: B image, L token over all scales, C code width; H, W pixels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from varfast import kernels
from varfast.perf.cost import Checkpointing
from varfast.policies.config import FamilyName, LoRAConfig
from varfast.policies.decoder import FastDecoder
from varfast.policies.driver import Driver
from varfast.policies.sampler import Sampled
from varfast.policies.var.cost import VARCost
from varfast.policies.var.sampler import guidance, sample
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR
from varfast.types import InputError, Prompts, Sampling


class VARPolicy(Driver):
    """A transformer that is trained and the frozen VQ-VAE that turns its tokens into images.

    Attributes:
        var, vqvae: the models, on one device.
    """

    family: ClassVar[FamilyName] = "var"

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
        Args: as of Driver.
        Raises: InputError for models that do not belong together, another dtype, or strict where its kernels cannot
            run.
        """
        for name in ("vocab_size", "code_width", "patch_nums"):
            of_var, of_vqvae = getattr(var.config, name), getattr(vqvae.config, name)
            if of_var != of_vqvae:
                raise InputError(f"{name} is {of_var} in the transformer and {of_vqvae} in the VQ-VAE; they belong to "
                                 "different models")  # fmt: skip
        self.num_classes = var.config.num_classes
        self.tokens_shape = (var.config.num_tokens,)
        self.image_size = vqvae.config.image_size
        self._decoder: FastDecoder | None = None
        # Images of which the largest map has 2^30 numbers, 102 at 256 px: cuDNN counts in 32 bits.
        decodable = max(1, 2**30 // (vqvae.config.base_channels * vqvae.config.image_size**2))
        super().__init__({"var": var, "vqvae": vqvae}, device, dtype, fast, strict, decodable)

    @property
    def published_sampling(self) -> Sampling:
        return Sampling(cfg=1.5, top_k=900, top_p=0.96)

    @property
    def var(self) -> VAR:
        var = self.parts["var"]
        assert isinstance(var, VAR)
        return var

    @property
    def vqvae(self) -> VQVAE:
        vqvae = self.parts["vqvae"]
        assert isinstance(vqvae, VQVAE)
        return vqvae

    def cost(self, dtype: str, lora: LoRAConfig | None = None) -> VARCost:
        return VARCost(self.var.config, self.vqvae.config, dtype, lora)

    def _make_strict(self) -> None:
        product = kernels.selection.choose("invariant_linear", self.device)
        if product.impl == "reference":
            raise InputError(f"run.strict=true cannot run on {self.device}: {product.why}; use run.strict=false")
        self.var.make_strict()
        self.vqvae.quantize.make_strict()

    def _sample_batch(self, prompts: Prompts, key: Tensor, how: Sampling, keep: bool) -> Sampled:
        assert isinstance(self.sampled, VAR)
        return sample(self.sampled, self.vqvae, prompts.ids_B, key, how, keep)

    def _strengths(self, cfg: float) -> list[float]:
        """t = cfg * k / (K - 1) at scale k.

        The unconditional half is the last row of the class embedding. Class dropout trains it (the public models: 0.1);
        of a model that was trained without, it is noise, and nothing here can tell.
        """
        sides, strengths = self.var.config.patch_nums, guidance(self.var.config, cfg)
        return [t for side, t in zip(sides, strengths, strict=True) for _ in range(side * side)]

    def _logits(
        self, model: nn.Module, prompts: Prompts, teacher_input: Tensor, checkpointing: Checkpointing, bias_apart: bool
    ) -> tuple[Tensor, Tensor | None]:
        found = model(prompts.ids_B, teacher_input, checkpointing=checkpointing, bias_apart=bias_apart)
        return found if bias_apart else (found, None)

    def _teacher_input(self, tokens_BL: Tensor) -> Tensor:
        """What the transformer sees in place of each token but the first scale's, (B, L - first, C)."""
        return self.vqvae.var_input(tokens_BL)

    def _latent(self, tokens_BL: Tensor) -> Tensor:
        """The sum of the quantized scales, (B, C, HW, HW)."""
        return self.vqvae.f_hat(tokens_BL)

    def _decode_latent(self, latent: Tensor) -> Tensor:
        if not self.fast:
            return self.vqvae.decode_f_hat(latent)
        if self._decoder is None:  # it holds copies of the weights
            self._decoder = FastDecoder(self.vqvae, self.var.compute_dtype)
        return self._decoder(latent)

    def _encode(self, images: Tensor) -> Tensor:
        return self.vqvae.encode(images)
