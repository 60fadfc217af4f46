"""Markdown of a card, and its metadata as YAML in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from varfast.policies.config import FamilyConfig


@dataclass(frozen=True)
class Result:
    """A number of an evaluation, as the hub's model-index lists it.

    Attributes:
        metric: such as fid.
        name: of the metric, for people.
        of: what it was measured on, for people.
        kind: the same as one word, such as samples.
    """

    metric: str
    name: str
    value: float
    of: str
    kind: str = "samples"


def front_matter(
    section: FamilyConfig,
    name: str,
    tags: Sequence[str] = (),
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    results: Sequence[Result] = (),
) -> str:
    """The metadata of a card, with its lines of `---`. A licence is left out: the publisher knows it.

    Args:
        name: of the model.
        tags: beside those that the family gives.
        base_model, datasets: repositories of the hub, as owner/name.
    """
    from huggingface_hub import EvalResult, ModelCardData

    task = "text-to-image" if section.conditioned_on == "text" else "unconditional-image-generation"
    conditioned = [] if section.conditioned_on == "text" else ["class-conditional"]
    rows = [EvalResult(task, r.kind, r.of, r.metric, r.value, metric_name=r.name) for r in results]
    data = ModelCardData(
        library_name="varfast",
        pipeline_tag=task,
        tags=["autoregressive", section.family, *conditioned, *tags],
        base_model=base_model,
        datasets=list(datasets) or None,
        model_name=name if rows else None,
        eval_results=rows or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; floats have 4 digits, None is empty, and no cell breaks the table."""

    def line(cells: Sequence[Any]) -> str:
        texts = [f"{c:.4g}" if isinstance(c, float) else "" if c is None else str(c)[:200] for c in cells]
        return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
