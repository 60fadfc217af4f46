"""The VQ tokenizers of next-token models, image <-> one grid of codes: LlamaGen's VQ-16 and VQ-8, taming's VQGAN f16.

Parameter names and shapes are those of the public checkpoints vq_ds16_c2i.pt, vq_ds8_c2i.pt, and of first_stage_model
in cin_transformer.

Axes: B image, N token in raster order, V vocabulary, C code width; H, W pixels; h, w tokens of a side.
Source: Sun et al., arXiv:2406.06525 (LlamaGen); Esser et al., arXiv:2012.09841 (VQGAN).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varfast.policies.convolutional import LLAMAGEN_NAMES, VQGAN_NAMES, Decoder, Encoder, SeparateAttention
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig, VQGANConfig

# LlamaGen's training keeps the last so many codes in a buffer of its checkpoints.
_USAGE_LOG = 65536
# Vectors that are compared with all codes at a time: 0.5 GB of distances for 16384 codes.
_ROWS = 8192


class Codebook(nn.Module):
    """Nearest code and look-up, with L2-normalised rows where the config says so."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.code_width)
        if not isinstance(config, VQGANConfig):
            # Usage statistics of the public training. Not read, but part of the public state_dict.
            self.register_buffer("codebook_used", torch.zeros(_USAGE_LOG))

    def codes(self) -> Tensor:
        """(V, C), as they are compared and decoded; differentiable."""
        return self.normalised(self.embedding.weight)

    def normalised(self, rows_NC: Tensor) -> Tensor:
        """Rows on the unit sphere, where this tokenizer compares them there."""
        return F.normalize(rows_NC, dim=-1) if self.config.l2_norm else rows_NC

    def nearest(self, rows_NC: Tensor) -> Tensor:
        """(N,) index of the code at the smallest Euclidean distance from each row, both normalised where codes are."""
        rows_NC, codes_VC = self.normalised(rows_NC.detach()), self.codes().detach()
        squares_V, found = codes_VC.square().sum(dim=1), []
        for part_NC in rows_NC.split(_ROWS):
            distance_NV = part_NC.square().sum(dim=1, keepdim=True) + squares_V
            found.append(torch.addmm(distance_NV, part_NC, codes_VC.T, alpha=-2.0).argmin(dim=1))
        return torch.cat(found)


class Tokenizer(nn.Module):
    """Encoder, codebook and decoder. Images are (B, 3, H, W) in [-1, 1]; H and W are multiples of the downsampling."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        names = VQGAN_NAMES if isinstance(config, VQGANConfig) else LLAMAGEN_NAMES
        self.encoder = Encoder(config, config.latent_width, names, SeparateAttention)
        self.decoder = Decoder(config, config.latent_width, names, SeparateAttention)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.latent_width, config.code_width, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_width, kernel_size=1)

    def latents(self, images: Tensor) -> Tensor:
        """(B, C, h, w) before quantization. Raises: ValueError for images of another shape."""
        pixels = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or any(not side or side % pixels for side in images.shape[2:]):
            raise ValueError(
                f"images are {tuple(images.shape)}, want (B, 3, H, W) with H and W multiples of {pixels}; resize and "
                "crop them first"
            )
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N) int64 tokens."""
        return self.quantize.nearest(self._rows(self.latents(images))).view(len(images), -1)

    def latent(self, tokens_BN: Tensor) -> Tensor:
        """(B, N) tokens of square images -> (B, C, h, w) float32: their codes, which the decoder reads."""
        side = math.isqrt(tokens_BN.shape[1])
        return F.embedding(tokens_BN, self.quantize.codes()).transpose(1, 2).unflatten(2, (side, side))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) codes -> (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(latent))

    def forward(self, images: Tensor, with_codes: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Training: reconstruction (not clamped), VQ loss with the commitment term, (B, N) tokens.

        The gradient of the reconstruction passes straight through the look-up to the latents. with_codes=False decodes
        the latents themselves, which the codes follow.
        """
        z = self.latents(images)
        rows_NC = self._rows(z)
        tokens_N = self.quantize.nearest(rows_NC)
        codes_NC = F.embedding(tokens_N, self.quantize.codes())
        rows_NC = self.quantize.normalised(rows_NC)
        loss = F.mse_loss(codes_NC, rows_NC.detach())
        straight_NC = rows_NC
        if with_codes:
            loss = loss + self.config.commitment * F.mse_loss(rows_NC, codes_NC.detach())
            straight_NC = rows_NC + (codes_NC - rows_NC).detach()
        latent = straight_NC.unflatten(0, (len(z), *z.shape[2:])).permute(0, 3, 1, 2)
        return self.decode_latent(latent), loss, tokens_N.view(len(z), -1)

    @staticmethod
    def _rows(z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B h w, C)."""
        return z.permute(0, 2, 3, 1).flatten(0, 2)
