"""The report of trials without labels: every way of pruning is a stage of its own."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from chanprune_ext.quantities import accuracy_error
from chanprune_ext.report import RunReport, Stage, environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanprune_ext.report import Reference

    from .trials import TrialResult

__all__ = ["trial_report"]


def trial_report(
    title: str,
    command: str,
    baseline: float,
    n: int,
    results: Sequence[TrialResult],
    references: tuple[Reference, ...] = (),
) -> RunReport:
    """A report with the original and the mean of every trial.

    Args:
        title: Heading of the page.
        command: The command line that made it.
        baseline: Accuracy of the original, a fraction.
        n: Test images.
        results: Of :func:`chanprune_ext.trials.run_trials`, at least one.
        references: Published results to show beside it.
    """
    first = results[0]
    original = Stage(
        name="original",
        accuracy=baseline,
        standard_error=accuracy_error(baseline, n),
        samples=n,
        params=round(first.params / first.params_share),
        macs=round(first.macs / first.macs_share),
        note="as it was trained",
    )
    stages = [
        Stage(
            name=result.name,
            accuracy=result.top1,
            standard_error=accuracy_error(result.top1, n),
            samples=n,
            params=result.params,
            macs=result.macs,
            note=f"{_draws(result)}; agrees with the original on {result.agreement:.1%}",
        )
        for result in results
    ]
    return RunReport(
        title=f"{title}, without labels",
        command=command,
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        stages=(original, *stages),
        versions=environment(),
        notes=(
            (
                "Only unlabelled training images are used, and no gradient step but where the name "
                "of a row says so."
            ),
            "Errors are standard errors of an accuracy on so many images, for all rows alike.",
        ),
        references=references,
    )


def _draws(result: TrialResult) -> str:
    if len(result.draws) == 1:
        return "one draw of calibration images"
    points = 100 * result.spread
    return (
        f"mean of {len(result.draws)} draws of calibration images, their standard deviation "
        f"{points:.1f} points"
    )
