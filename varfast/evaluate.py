"""Measure a model, and what fine-tuning changed: scores, accuracy, FID and its kin, pictures side by side.

    python -m varfast.evaluate checkpoint=runs/digits fid_reference=digits
    python -m varfast.evaluate checkpoint=runs/aesthetic classifier=resnet50 fid_reference=imagenet/val save=png
    python -m varfast.evaluate runs/loofid samples_per_label=50 cfg=0,1.5 fid_reference=VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc-per-node 8 -m varfast.evaluate checkpoint=...
    python -m varfast.evaluate runs/janus prompts=evaluation_metadata.jsonl export=geneval
    python -m varfast.evaluate runs/janus results=results.jsonl

Every image is a function of (seed, label, number of the sample): the same whatever else is sampled, and with the same
random numbers for both models. Of a model of texts, how many prompts there are and the row among them stand for the
label. Images are measured in chunks, each a file of the out folder; processes share the chunks, and a chunk that is
there is not sampled again.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("evaluate")

import json

from varfast.distributed import launched
from varfast.evaluation.arguments import out_folder
from varfast.evaluation.benchmarks import next_steps
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.measure import evaluate
from varfast.evaluation.table import about, table
from varfast.settings.loading import parse_arguments


def main(arguments: list[str]) -> int:
    """python -m varfast.evaluate checkpoint=... [reference=...] [key=value ...]"""
    process, config = launched(), parse_arguments(arguments, EvaluateConfig)
    rows = evaluate(config, process)
    if process.rank == 0:
        out = out_folder(config)
        result = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        print(f"\n{table(rows)}\n\n{about(result)}\n{out}: evaluation.json, pictures.png")
        if "exported" in result and config.results is None:
            print(next_steps(out, result))
    return 0
