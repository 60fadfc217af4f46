"""The arguments of `report`. No PyTorch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from varfast.settings.section import LocalPath, Section, ends_with


class ReportConfig(Section):
    """Arguments of `python -m varfast.report`."""

    runs: list[LocalPath] = Field(min_length=1, description="run folders, each an argument of its own")
    out: Annotated[LocalPath, ends_with(".html", ".htm")] = Field("report.html", description="the page to write")
    over: Literal["auto", "step", "images", "flop", "hours"] = Field(
        "auto",
        description="what curves are drawn over at first: steps, or images, FLOP of the policy or hours spent by then; "
        "the page can change it. auto: FLOP for several runs that all count them, else steps",
    )
