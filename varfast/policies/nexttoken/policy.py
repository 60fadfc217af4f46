"""A causal transformer and a VQ tokenizer as a policy: what is the same for the families that draw token by token.

Axes: B image, L token of an image; H, W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from varfast import kernels
from varfast.kernels.attention_tiles import HEAD_DIM
from varfast.perf.cost import Checkpointing
from varfast.perf.graphs import CudaLoop
from varfast.policies.decoder import FastDecoder
from varfast.policies.driver import Driver
from varfast.policies.nexttoken.sampler import Decoding, sample
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import check_fits
from varfast.policies.nexttoken.transformer import CausalTransformer
from varfast.policies.sampler import Captured, Sampled
from varfast.types import InputError, Prompts, Rollout, Sampling


class NextTokenPolicy(Driver):
    """A transformer that is trained and the frozen tokenizer that turns its tokens into images.

    Attributes:
        transformer, tokenizer: the models, on one device.
    """

    def __init__(
        self,
        parts: dict[str, nn.Module],
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        fast: bool = True,
        strict: bool = False,
    ) -> None:
        """
        Args: as of Driver; the transformer first, then the tokenizer.
        Raises: InputError for models that do not belong together, another dtype, or strict where its kernels cannot
            run.
        """
        transformer, tokenizer = parts.values()
        assert isinstance(transformer, CausalTransformer)
        assert isinstance(tokenizer, Tokenizer)
        config = transformer.config
        self.tokens_shape = (config.num_tokens,)
        self.image_size = config.side * tokenizer.config.downsampling
        check_fits(tokenizer.config, self.image_size, config.vocab_size, config.num_tokens)
        self._decoder: FastDecoder | None = None
        self._prompts_version = transformer.prompts_version
        # Images of which the largest map has 2^30 numbers: cuDNN counts in 32 bits.
        decodable = max(1, 2**30 // (tokenizer.config.base_channels * self.image_size**2))
        super().__init__(parts, device, dtype, fast, strict, decodable)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Labels, or prompts of the table: see CausalTransformer.num_prompts."""
        return self.transformer.num_prompts

    @property
    def transformer(self) -> CausalTransformer:
        transformer = self.trainable
        assert isinstance(transformer, CausalTransformer)
        return transformer

    @property
    def tokenizer(self) -> Tokenizer:
        _, tokenizer = self.parts.values()
        assert isinstance(tokenizer, Tokenizer)
        return tokenizer

    def _make_strict(self) -> None:
        product = kernels.selection.choose("invariant_linear", self.device)
        if product.impl == "reference":
            raise InputError(f"run.strict=true cannot run on {self.device}: {product.why}; use run.strict=false")
        head_dim = self.transformer.config.head_dim
        if self.device.type == "cuda" and head_dim != HEAD_DIM:
            raise InputError(
                f"run.strict=true on a GPU takes heads of {HEAD_DIM} channels, this model has {head_dim}; use "
                "run.strict=false, or a CPU"
            )
        self.transformer.make_strict()

    def _sample(self, *arguments: Any, **options: Any) -> Rollout:
        if self._prompts_version != self.transformer.prompts_version:  # a captured graph reads the table before
            self._prompts_version = self.transformer.prompts_version
            self._sample_from(self.sampled)
        return super()._sample(*arguments, **options)

    def _sample_batch(self, prompts: Prompts, key: Tensor, how: Sampling, keep: bool) -> Sampled:
        assert isinstance(self.sampled, CausalTransformer)
        return self._result(sample(self.sampled, self._rows(prompts, how), key, how, self._strength_N(how)), keep)

    @torch.no_grad()
    def _capture_batch(self, prompts: Prompts, key: Tensor, how: Sampling, keep: bool) -> Captured:
        """One token as a CUDA graph, replayed for each."""
        model, strength_N = self.sampled, self._strength_N(how)
        assert isinstance(model, CausalTransformer)
        return CudaLoop(
            lambda ids_B, key: Decoding(model, self._rows(Prompts(ids_B), how), key, how, strength_N),
            Decoding.step,
            lambda decoding: tuple(t for t in self._result(decoding, keep) if t is not None),
            model.config.num_tokens,
            prompts.ids_B,
            key,
            pool=self.graph_pool,
        )

    def _unconditional(self, prompts: Prompts) -> Prompts:
        ids_B = self.transformer.unguided(prompts.ids_B)
        assert ids_B is not None
        return Prompts(ids_B)

    def _strength_N(self, how: Sampling) -> Tensor | None:
        """Of guidance, of each token; None where no token is guided."""
        strength_N = self._strength_L(how.cfg)
        return strength_N if len(strength_N) else None

    def _rows(self, prompts: Prompts, how: Sampling) -> Tensor:
        """Ids of the rows that are computed: with guidance also those of the images without a prompt."""
        if self._strength_N(how) is None:
            return prompts.ids_B
        return torch.cat([prompts.ids_B, self._unconditional(prompts).ids_B])

    def _result(self, decoding: Decoding, keep: bool) -> Sampled:
        tokens_BL = decoding.tokens_BN
        kept = (self._latent(tokens_BL), tokens_BL) if keep else (None, None)
        return Sampled(tokens_BL, decoding.logp_BN, decoding.entropy_BN, *kept)

    def _logits(
        self, model: nn.Module, prompts: Prompts, teacher_input: Tensor, checkpointing: Checkpointing, bias_apart: bool
    ) -> tuple[Tensor, Tensor | None]:
        found = model(prompts.ids_B, teacher_input, checkpointing=checkpointing, bias_apart=bias_apart)
        return found if bias_apart else (found, None)

    def _latent(self, tokens_BL: Tensor) -> Tensor:
        return self.tokenizer.latent(tokens_BL)

    def _decode_latent(self, latent: Tensor) -> Tensor:
        if not self.fast:
            return self.tokenizer.decode_latent(latent)
        if self._decoder is None:  # it holds copies of the weights
            self._decoder = FastDecoder(self.tokenizer, self.transformer.compute_dtype)
        return self._decoder(latent)

    def _encode(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)
