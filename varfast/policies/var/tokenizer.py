"""The multi-scale VQ-VAE: image <-> token maps of all scales.

Parameter names and shapes are those of the public checkpoint vae_ch160v4096z32.pth.

Axes: B image, L token over all scales, l token of one scale, V vocabulary, C code width, HW side of the last scale.
Encoder and decoder are those of varfast/policies/convolutional.py.

Source: Tian et al., arXiv:2404.02905, algorithms 1 and 2.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varfast import kernels
from varfast.policies.convolutional import VQGAN_NAMES, Decoder, Encoder, JointAttention, conv3x3
from varfast.policies.var.config import VQVAEConfig


class Phi(nn.Conv2d):
    """phi(x) = (1 - ratio) x + ratio conv3x3(x): refines a token map after it was upsampled.

    Attributes:
        strict: the bits of an image do not depend on the other images (varfast/policies/strict.py). cuDNN and oneDNN
            choose their algorithm by the size of the batch, so the convolution is a product of patches then.
    """

    strict = False

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        convolved = self._by_patches(x) if self.strict else super().forward(x)
        return x * (1.0 - self.ratio) + convolved * self.ratio

    def _by_patches(self, x: Tensor) -> Tensor:
        """The convolution as one product of 9 C numbers a pixel: 295 KB of patches an image at 16 x 16 and C = 32."""
        batch, channels, height, width = x.shape
        patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # (B, C, H, W, 3, 3)
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 9 * channels)
        out = kernels.invariant_linear(rows, self.weight.flatten(1), self.bias)
        return out.view(batch, height * width, -1).transpose(1, 2).reshape(batch, -1, height, width)


class SharedPhi(nn.Module):
    """Holds one Phi (under the public name qresi) or several (qresi_ls) for all scales."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        phis = [Phi(config.code_width, config.phi_ratio) for _ in range(config.num_phi)]
        if config.num_phi == 1:
            self.qresi = phis[0]
        else:
            self.qresi_ls = nn.ModuleList(phis)

    def of_index(self, index: int) -> nn.Module:
        return self.qresi_ls[index] if hasattr(self, "qresi_ls") else self.qresi


@lru_cache(maxsize=256)
def _upsampling(side: int, last: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(side^2, last^2): the matrix that upsamples the pixels of a map, bicubic; computed in float64 and rounded once.

    On an H100 PyTorch's kernel takes 1.8 to 4.0 ms for 256 maps of 32 channels, the product 0.01 to 0.02 ms, with the
    same error (that saves 361 ms of a step of 512 images; docs/measured.md). A product's gradient has a fixed order.
    The cache is filled by a first call, which comes before any CUDA graph is captured.
    """
    pixels = torch.eye(side * side, dtype=torch.float64).view(-1, 1, side, side)
    upsampled = F.interpolate(pixels, size=(last, last), mode="bicubic")
    return upsampled.flatten(1).to(device, dtype)


class Quantizer(nn.Module):
    """Residual quantization over scales, with one codebook.

    f_hat, the sum of the quantized scales, is (B, C, HW, HW) float32 throughout.

    Attributes:
        strict: as of Phi.
    """

    strict = False

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.code_width)
        scales = len(config.patch_nums)
        self.quant_resi: SharedPhi | nn.ModuleList
        if config.num_phi == 0:
            self.quant_resi = nn.ModuleList(Phi(config.code_width, config.phi_ratio) for _ in range(scales))
        else:
            self.quant_resi = SharedPhi(config)
        # Usage statistics of the public training. Not read, but part of the public state_dict.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(scales, config.vocab_size))

    def make_strict(self) -> None:
        """From now on the f_hat of an image does not depend on the other images."""
        for module in self.modules():
            if isinstance(module, Phi | Quantizer):
                module.strict = True

    def _phi(self, scale: int) -> nn.Module:
        count = self.config.num_phi or len(self.config.patch_nums)
        margin = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = torch.linspace(margin, 1 - margin, count, dtype=torch.float64)
        at = scale / max(1, len(self.config.patch_nums) - 1)
        index = int((ticks - at).abs().argmin())
        return self.quant_resi[index] if isinstance(self.quant_resi, nn.ModuleList) else self.quant_resi.of_index(index)

    def nearest(self, x_NC: Tensor) -> Tensor:
        """(N,) index of the code nearest to each row."""
        codes_VC = self.embedding.weight.detach()
        distance = x_NC.square().sum(dim=1, keepdim=True) + codes_VC.square().sum(dim=1)
        return torch.addmm(distance, x_NC, codes_VC.T, alpha=-2.0).argmin(dim=1)

    def contribution(self, tokens_Bl: Tensor, scale: int) -> Tensor:
        """What the tokens of a scale add to f_hat: their codes, upsampled to the last side, through phi."""
        side, last = self.config.patch_nums[scale], self.config.patch_nums[-1]
        h_BCl = self.embedding(tokens_Bl).transpose(1, 2)
        if side != last:
            upsampling = _upsampling(side, last, h_BCl.device, h_BCl.dtype)
            h_BCl = kernels.invariant_linear(h_BCl, upsampling.T) if self.strict else h_BCl @ upsampling
        return self._phi(scale)(h_BCl.reshape(len(tokens_Bl), -1, last, last))

    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        """(B, l, C) input of `scale` from the scales before it."""
        side = self.config.patch_nums[scale]
        return F.interpolate(f_hat, size=(side, side), mode="area").flatten(2).transpose(1, 2)

    def split(self, tokens_BL: Tensor) -> tuple[Tensor, ...]:
        """(B, L) -> (B, l) of each scale."""
        return tokens_BL.split([side * side for side in self.config.patch_nums], dim=1)

    def empty_f_hat(self, batch: int) -> Tensor:
        last = self.config.patch_nums[-1]
        return self.embedding.weight.new_zeros(batch, self.config.code_width, last, last)

    def encode(self, f: Tensor) -> Tensor:
        """(B, C, HW, HW) latents -> (B, L) tokens: each scale quantizes what the earlier ones left."""
        rest, tokens = f, []
        for scale, side in enumerate(self.config.patch_nums):
            tokens_Bl = self._quantize(rest, side)
            rest = rest - self.contribution(tokens_Bl, scale)
            tokens.append(tokens_Bl)
        return torch.cat(tokens, dim=1)

    def _quantize(self, rest: Tensor, side: int) -> Tensor:
        if side != self.config.patch_nums[-1]:
            rest = F.interpolate(rest, size=(side, side), mode="area")
        return self.nearest(rest.permute(0, 2, 3, 1).reshape(-1, rest.shape[1])).view(rest.shape[0], -1)

    def forward(self, f: Tensor, with_codes: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize in training: straight-through f_hat, the VQ loss, and the (B, L) tokens.

        with_codes=False: f itself in place of f_hat, which the codes follow.
        """
        f_fixed = f.detach()
        f_hat, loss, tokens = torch.zeros_like(f_fixed), f.new_zeros(()), []
        for scale, side in enumerate(self.config.patch_nums):
            tokens_Bl = self._quantize(f_fixed - f_hat.detach(), side)
            f_hat = f_hat + self.contribution(tokens_Bl, scale)
            loss = loss + F.mse_loss(f_hat, f_fixed)
            if with_codes:
                loss = loss + self.config.commitment * F.mse_loss(f, f_hat.detach())
            tokens.append(tokens_Bl)
        # Straight-through: the value of f_hat with the gradient of f.
        straight = f + (f_hat - f).detach() if with_codes else f
        return straight, loss / len(self.config.patch_nums), torch.cat(tokens, dim=1)


class VQVAE(nn.Module):
    """Multi-scale VQ-VAE. Images are (B, 3, image_size, image_size) in [-1, 1]; other squares are refused."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, config.code_width, VQGAN_NAMES, JointAttention)
        self.decoder = Decoder(config, config.code_width, VQGAN_NAMES, JointAttention)
        self.quantize = Quantizer(config)
        self.quant_conv = conv3x3(config.code_width, config.code_width)
        self.post_quant_conv = conv3x3(config.code_width, config.code_width)

    def latents(self, images: Tensor) -> Tensor:
        """(B, C, HW, HW) before quantization. Raises: ValueError for images of another shape."""
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images are {tuple(images.shape)}, want (B, 3, {size}, {size}); resize and crop them first"
            )
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, L) tokens of all scales."""
        return self.quantize.encode(self.latents(images))

    def f_hat(self, tokens_BL: Tensor) -> Tensor:
        """(B, L) tokens -> the sum of all quantized scales."""
        f_hat = self.quantize.empty_f_hat(tokens_BL.shape[0])
        for scale, tokens_Bl in enumerate(self.quantize.split(tokens_BL)):
            f_hat = f_hat + self.quantize.contribution(tokens_Bl, scale)
        return f_hat

    def decode_f_hat(self, f_hat: Tensor) -> Tensor:
        """Sum of quantized scales -> (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(f_hat))

    def decode(self, tokens_BL: Tensor) -> Tensor:
        """(B, L) tokens -> (B, 3, H, W) in [-1, 1]."""
        return self.decode_f_hat(self.f_hat(tokens_BL)).clamp(-1.0, 1.0)

    def var_input(self, tokens_BL: Tensor) -> Tensor:
        """Teacher-forcing input: what the transformer reads when it samples each scale but the first.

        Returns: (B, L - first, C) float32.
        """
        tokens = self.quantize.split(tokens_BL)
        f_hat = self.quantize.empty_f_hat(tokens_BL.shape[0])
        inputs = [f_hat.new_zeros(tokens_BL.shape[0], 0, f_hat.shape[1])]
        for scale, tokens_Bl in enumerate(tokens[:-1]):
            f_hat = f_hat + self.quantize.contribution(tokens_Bl, scale)
            inputs.append(self.quantize.next_input(f_hat, scale + 1))
        return torch.cat(inputs, dim=1)

    def forward(self, images: Tensor, with_codes: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Training: reconstruction (not clamped), VQ loss, (B, L) tokens. with_codes: see Quantizer.forward."""
        f_hat, loss, tokens_BL = self.quantize(self.latents(images), with_codes)
        return self.decode_f_hat(f_hat), loss, tokens_BL
