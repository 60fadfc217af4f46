"""Mean and covariance of the features of real images, for the reward loo_fid and for FID.

python -m varfast.statistics images=imagenet/train features=inception_torchvision out=imagenet.npz
python -m varfast.statistics images=digits features=digits out=digits.npz
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("statistics")

from pathlib import Path

from varfast.features.config import StatisticsConfig
from varfast.features.reference import computed_statistics
from varfast.features.statistics import save_statistics
from varfast.policies.device import pick_device
from varfast.settings.loading import parse_arguments
from varfast.types import InputError


def main(arguments: list[str]) -> int:
    """python -m varfast.statistics images=... out=... [features=...] [key=value ...]"""
    config = parse_arguments(arguments, StatisticsConfig)
    out = Path(config.out).expanduser()
    if out.exists() and not config.overwrite:
        raise InputError(f"{out} exists; choose another out, or overwrite=true")
    network = config.load(pick_device(config.device), "statistics")
    found = computed_statistics(config.images, network, config.image_size, "images", config.batch_size)
    save_statistics(out, found, network.name)
    print(f"{config.out}: mean and covariance of {network.width} {network.name} features of {found.count} images")
    assert found.count is not None
    if found.count <= network.width:
        print(
            f"too few for covariance=full of the reward loo_fid, which needs more than {network.width} images. Its "
            "diagonal takes it; FID of so few images is mostly their number"
        )
    return 0
