"""The first line of a campaign's journal, once its golden run is known."""

from __future__ import annotations

from datetime import UTC, datetime
from math import isfinite

from flipproof.campaigns._golden_interval import golden_interval
from flipproof.campaigns.answers import encode_golden
from flipproof.campaigns.fingerprint import fingerprint_of
from flipproof.campaigns.plan import AuditPlan, FaultPoint, Header, Job, Plan, Reading, StoredSite
from flipproof.campaigns.trial import TrialRunner, versions
from flipproof.errors import DataError
from flipproof.faults.base import FaultModel
from flipproof.running.decision import Decision


def header_of(runner: TrialRunner, faults: FaultModel, where: object, plan: Plan, together: int = 1) -> Header:
    """What is assessed, and what it does without faults.

    Args:
        runner: of the campaign's trials, with the golden outputs.
        faults: the whole sweep.
        where: what can be hit.
        plan: how much is to be done.
        together: trials a forward, at most.

    Raises:
        DataError: if a metric of the golden run is not finite.
    """
    faulty, space, judge = runner.faulty, runner.space, runner.judge
    outputs, targets = faulty.golden, faulty.batches.targets
    golden = {metric.name: metric.measure(outputs, targets, judge, outputs) for metric in runner.metrics}
    for name, value in golden.items():
        if not isfinite(value):
            raise DataError(f"the metric {name} is {value} on the golden run; a drop from that would mean nothing")
    return Header(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=fingerprint_of(runner, faults, where),
        golden=golden,
        golden_answers=encode_golden(judge.correct(outputs, targets, outputs)),
        golden_intervals={
            metric.name: golden_interval(metric, outputs, targets, judge, plan.confidence) for metric in runner.metrics
        },
        metrics={metric.name: metric.scale for metric in runner.metrics},
        decision=Reading(judge.outputs, judge.threshold, judge.assumed) if isinstance(judge, Decision) else None,
        task=Job(judge.task, judge.sample, judge.describe()),
        points=tuple(FaultPoint(repr(p), p.coordinates(), runner.repeats(p), p.stream) for p in runner.points),
        stored=tuple(StoredSite(s.name, s.kind, s.values, repr(s.format), s.bits) for s in space.sites),
        left_out=dict(space.left_out),
        left_out_bits=space.left_out_bits,
        coverage=space.coverage,
        audit=_audit_plan(runner),
        plan=plan,
        versions=versions(),
        together=together,
    )


def _audit_plan(runner: TrialRunner) -> AuditPlan:
    audit = runner.audit
    if audit is None:
        return AuditPlan()
    on = "the model itself" if audit.pristine is None else "a fresh copy"
    return AuditPlan(audit.share, on, audit.reason)
