#!/usr/bin/env bash
# All that needs a GPU, by names, on a machine without a network too:
#
#   bench/gpu.sh quick [out-dir]        in under 5 minutes: build, the tests that matter most, kernels without the peers
#                                       that compile, steps of d16 and d30, tables, a trace
#   bench/gpu.sh tests|sanitizers       every GPU test; memcheck and racecheck of every kernel
#   bench/gpu.sh peers|decoder          every kernel, the decoder, against all peers
#   bench/gpu.sh tokens                next-token rollouts of LlamaGen, share of the bandwidth, against other loops
#   bench/gpu.sh d16|d30                steps, then every stage against its peers
#   bench/gpu.sh memory                 20 steady steps of d30: fails if memory grows
#   bench/gpu.sh agreement              rollout against update at full size, batch splits, the digits run
#   bench/gpu.sh tune                   block shapes, warps and stages of every kernel
#
# All but quick take under 9 minutes each. Without an out-dir records go to bench/records and logs to runs/gpu. Parts,
# limits and order: bench/gpu.py. A record is written as it grows: a call that is cut leaves what it measured.
#
# A bare machine (Python 3.12, no network) needs as wheels, beside torch 2.11 for CUDA 13 and its triton 3.6 with their
# dependencies: setuptools, wheel, ninja, numpy, pydantic, pyyaml, pillow, safetensors, huggingface_hub, tensorboard, tqdm,
# nvtx, psutil, scikit-learn (digits), pytest, pytest-benchmark, scipy, hypothesis; optional: pytest-xdist (tests in
# parallel; without it they take too long for quick), pytest-timeout, liger-kernel (a peer), bitsandbytes, torchvision.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu.py "$@"
