"""The settings of `posttrain report` as data."""

from __future__ import annotations

from typing import Annotated

from posttrain.config.types import Filled, settings


@settings
class ReportConfig:
    """posttrain report RUN [RUN ...]: write report.html for a run, with curves, images before and after, settings; or
    compare several runs on one page. It opens without a network."""

    runs: Annotated[list[str], Filled("give a run directory")]
    """Run directories. Several are compared: those whose recipes differ only in the seed are one line with a band."""
    output: str | None = None
    """HTML file to write; null: report.html in the run directory, comparison.html beside the first of several."""
