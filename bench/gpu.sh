#!/usr/bin/env bash
# All that needs a GPU, with one command, on a machine without a network too; each in under 9 minutes:
#
#   bench/gpu.sh kernels [out-dir]   build, tests, compute-sanitizer, every kernel against its peers
#   bench/gpu.sh d16 [out-dir]       stages and step of d16 at full size, agreement, the digits run, decoder, a trace
#   bench/gpu.sh d30 [out-dir]       the same of d30, without digits, decoder and trace
#   bench/gpu.sh tune [out-dir]      block shapes, warps and stages of every kernel
#
# Without an out-dir records go to bench/records and logs to runs/gpu. Parts, limits and order: bench/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu.py "$@"
