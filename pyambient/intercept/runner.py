"""The one engine behind every backend: apply steps in stages, undo, compare, verify."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from pyambient.errors import PyambientError

from .interface import Plan, Pod, Replacing, Stage, Step
from .rtnetlink import session

ALL_STAGES = frozenset(Stage)


class StepFailed(PyambientError):
    """A step could not be applied or undone; `steps` is what the record has to hold now."""

    def __init__(self, what: str, then: str, steps: Iterable[Step]) -> None:
        super().__init__(what, then)
        self.steps = tuple(steps)


def apply_stages(
    pod: Pod, steps: Iterable[Step], stages: Collection[Stage] = ALL_STAGES
) -> tuple[Step, ...]:
    """Apply the steps of these stages, in the order of the stages; the steps to be recorded.

    When one fails, those before it are undone in reverse and StepFailed is raised; its `steps`
    are the ones that could not even be undone, usually none.
    """
    applied: list[Step] = []
    with session(pod.netns):
        for step in _in_order(steps, stages):
            try:
                applied.append(step.apply(pod))
            except BaseException as error:
                left = _undo(pod, applied)
                if isinstance(error, Exception):
                    raise _not_applied(pod, step, error, left) from error
                raise
    return tuple(applied)


def undo_stages(pod: Pod, recorded: Iterable[Step], stages: Collection[Stage] = ALL_STAGES) -> None:
    """Undo the recorded steps of these stages in reverse; never stop at the first failure.

    StepFailed then names every step that failed, in one line.
    """
    steps = tuple(recorded)
    failures = _undo(pod, _in_order(steps, stages))
    if failures:
        failed = [step for step, _ in failures]
        raise StepFailed(
            f"{pod.netns.name}: not undone: {_list(failures)}",
            "undo it by hand, or unenroll once more",
            [step for step in steps if step.stage not in stages or step in failed],
        )


def refresh(pod: Pod, recorded: Iterable[Step], plan: Plan) -> tuple[Step, ...]:
    """Turn what is recorded into the plan: undo what has left it, apply what is added to it.

    What takes another step's place goes there at one moment, last. Returns the steps to be
    recorded, in the plan's order; StepFailed carries them, too.
    """
    before = tuple(recorded)
    left = [step for step in before if step not in plan.steps]
    replaced = {old: new for old in left for new in plan.steps if _takes_over(new, old)}
    present = [step for step in before if step in plan.steps or step in replaced]
    added = [s for s in plan.steps if s not in before and s not in replaced.values()]
    try:
        undo_stages(pod, [step for step in left if step not in replaced])
        present += apply_stages(pod, added)
        for old, new in replaced.items():
            applied = apply_stages(pod, (new,))
            present = [*(step for step in present if step not in (old, new)), *applied]
    except StepFailed as error:
        error.steps = (*present, *error.steps)
        raise
    known = {step: step for step in present}
    return tuple(known[step] for step in plan.steps)


def _takes_over(step: Step, earlier: Step) -> bool:
    return isinstance(step, Replacing) and step.takes_over(earlier)


def verify(pod: Pod, steps: Iterable[Step]) -> list[str]:
    """One line for each step that is not in place any more: what it is, and what is missing."""
    return [f"{name_of(step)}: {why}" for step, why in lost(pod, steps)]


def lost(pod: Pod, steps: Iterable[Step]) -> list[tuple[Step, str]]:
    """The steps that are not in place any more, each with what is missing."""
    with session(pod.netns):
        return [(step, why) for step in steps if (why := _missing(pod, step))]


def _in_order(steps: Iterable[Step], stages: Collection[Stage]) -> list[Step]:
    return sorted((step for step in steps if step.stage in stages), key=lambda s: s.stage)


def _undo(pod: Pod, applied: Sequence[Step]) -> list[tuple[Step, Exception]]:
    failures: list[tuple[Step, Exception]] = []
    with session(pod.netns):
        for step in reversed(applied):
            try:
                step.undo(pod)
            except Exception as error:  # noqa: BLE001 - every other step still has to be undone
                failures.append((step, error))
    return failures


def _missing(pod: Pod, step: Step) -> str | None:
    try:
        return step.missing(pod)
    except (PyambientError, OSError) as error:
        return _reason(error)


def _not_applied(
    pod: Pod, step: Step, error: Exception, left: list[tuple[Step, Exception]]
) -> StepFailed:
    what = f"{pod.netns.name}: '{name_of(step)}' failed: {_reason(error)}"
    if left:
        what += f"; not undone: {_list(left)}"
    then = error.then if isinstance(error, PyambientError) else ""
    failure = StepFailed(what, then or "'pyambient check' tells what works here", dict(left))
    if isinstance(error, PyambientError):
        failure.exit_code = error.exit_code
    return failure


def _list(failures: Iterable[tuple[Step, Exception]]) -> str:
    return ", ".join(f"'{name_of(step)}' ({_reason(error)})" for step, error in failures)


def name_of(step: Step) -> str:
    """The step in a line."""
    return step.describe().partition("\n")[0]


def _reason(error: Exception) -> str:
    if isinstance(error, PyambientError):
        return error.what
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
