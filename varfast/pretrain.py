"""Make a base model from images: first the VQ-VAE, then the transformer on its tokens.

    python -m varfast.pretrain configs/digits.yaml [a.b=c ...]

The result is kept in pretrain.cache_dir, under a hash of everything that it depends on. `varfast.train` does the same
by itself if its config says policy.checkpoint: pretrain and the cache does not hold the model.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("pretrain")

from varfast.command import read_config
from varfast.policies.device import pick_device
from varfast.pretraining.cache import pretrained
from varfast.runs.signals import listen


def main(arguments: list[str]) -> int:
    """python -m varfast.pretrain config.yaml [a.b=c ...]"""
    config = read_config(arguments)
    with listen():
        var_path, vqvae_path = pretrained(config, pick_device(config.run.device))
    print(f"transformer {var_path}\nVQ-VAE      {vqvae_path}")
    return 0
