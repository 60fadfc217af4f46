"""What one step must compute, move and hold: counted from a config alone, without a GPU, a model or the network.

    python -m varfast.roofline configs/d30.yaml [device=H200] [a.b=c ...]

prints, for a device, the least time of every stage, the memory with the micro-batches that fit, and what many GPUs
would lose to communication. Nothing here is measured, save the ceilings of `device=here`, the H100 and the H200.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("roofline")

import torch

from varfast.command import read_roofline
from varfast.perf.devices import compute_dtype, find_ceilings, here
from varfast.perf.tables import report
from varfast.perf.work import Work
from varfast.policies.families import family_of


def main(arguments: list[str]) -> int:
    """python -m varfast.roofline config.yaml [device=H200] [a.b=c ...]"""
    path, config = read_roofline(arguments)
    dtype = compute_dtype(config.run.dtype, here() if config.device == "here" else torch.device("cuda"))
    ceilings, source = find_ceilings(config.device, dtype)
    work = Work.whole(config, family_of(config.policy).cost_of(config.policy, dtype))
    print(report(work, ceilings, f"{path} on {config.device} ({source})"))
    return 0
