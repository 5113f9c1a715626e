"""The main job for one target or several: one text, one calibration, one set of reference logits, one output folder."""

from collections.abc import Callable, Sequence

from anyquant.core.errors import AnyQuantError, UsageError
from anyquant.core.progress import Progress
from anyquant.pipeline.comparison import Comparison, render_comparison
from anyquant.pipeline.make import Maker
from anyquant.pipeline.report import Report
from anyquant.pipeline.request import Request
from anyquant.pipeline.shared import Shared
from anyquant.store.publish import Stage


def make_one(request: Request, progress: Progress, clock: Callable[[], float]) -> Report:
    """One artifact and its report in the output folder. Raises as `Maker` does."""
    with Shared() as shared:
        maker = Maker(request, progress, clock, shared)
        planned = maker.plan()
        with Stage(request.out, request.overwrite, needed=planned.layout.nbytes) as stage:
            report = maker.make(planned, stage)
        shared.forget()
    return report


def make_several(requests: Sequence[Request], progress: Progress, clock: Callable[[], float]) -> Comparison:
    """An artifact and its report in a folder for each target, and one report that compares them.

    The requests differ in nothing but their target. All refusals come before any work; the output appears when the last
    artifact is there. Raises as `Maker` does, and UsageError for a target that is named twice.
    """
    names = [request.target.name for request in requests]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--for names {twice[0]} twice; name it once")
    first = requests[0]
    with Shared(several=True) as shared:
        makers = [Maker(request, progress, clock, shared) for request in requests]
        plans = [maker.plan() for maker in makers]
        reports = {}
        with Stage(first.out, first.overwrite, needed=sum(plan.layout.nbytes for plan in plans)) as stage:
            for number, (name, maker, planned) in enumerate(zip(names, makers, plans, strict=True), start=1):
                progress.say(f"target {number} of {len(makers)}: {name}")
                with Stage(stage.folder / name, needed=planned.layout.nbytes) as own:
                    reports[name] = maker.make(planned, own)
            comparison = Comparison(reports, tuple(_cross_checked(reports, makers)))
            for path, text in render_comparison(comparison).items():
                stage.write_file(path, text.encode())
            stage.publish()
        shared.forget()
    return comparison


def _cross_checked(reports: dict[str, Report], makers: Sequence[Maker]) -> list[str]:
    """What artifacts of one format have in common: the same tensors, byte for byte, where they have the same plan."""
    said = []
    for index, maker in enumerate(makers):
        mine = reports[maker.request.target.name]
        for other in makers[:index]:
            theirs = reports[other.request.target.name]
            if other.rules.name != maker.rules.name or theirs.recipe != mine.recipe:
                continue
            if _tensors(mine) != _tensors(theirs):
                raise AnyQuantError(f"{mine.target} and {theirs.target} have one plan and not the same tensors")
            said.append(f"{mine.target} has the same tensors as {theirs.target}, byte for byte.")
            break
    return said


def _tensors(report: Report) -> dict[str, str]:
    return {path: digest for path, digest in report.hashes.items() if not path.endswith(".json")}
