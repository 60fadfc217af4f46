"""The arguments of `report`. No PyTorch."""

from __future__ import annotations

from pydantic import Field

from varfast.settings.section import LocalPath, Section


class ReportConfig(Section):
    """Arguments of `python -m varfast.report`."""

    runs: list[LocalPath] = Field(min_length=1, description="run folders, each an argument of its own")
    out: LocalPath = Field("report.html", description="the page to write")
