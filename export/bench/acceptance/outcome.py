"""What an acceptance run comes to: its summary and its exit code, from its lines alone. Standard library only."""

from __future__ import annotations

from export.bench.acceptance.journal import Line, Record

EXIT_HELD, EXIT_SHORT, EXIT_CUT = 0, 3, 4


def exit_code(record: Record) -> int:
    """0 if all that was asked for held; 3 if something fell short, or could not be tried at all; 4 if time alone ran out."""
    outcomes = [record.outcome(stage) for stage in record.asked["stages"]]
    if any(line is not None and line.held is False for line in outcomes):
        return EXIT_SHORT
    return EXIT_CUT if any(line is None or line.cut for line in outcomes) else EXIT_HELD


def summary(record: Record) -> str:
    """What held, what fell short and with which figure, and what was not looked at."""
    asked = record.asked
    parts = [line for line in record.lines if line.part]
    head = f"provider {asked['provider']}: " + ", ".join(
        f"{sum(part.verdict == verdict for part in parts)} {words}"
        for verdict, words in (
            ("held", "parts held"),
            ("FELL SHORT", "fell short"),
            ("cut off", "were cut off"),
            ("not looked at", "were not looked at"),
        )
    )
    stages = [_stage(record, number) for number in asked["stages"]]
    return "\n".join(
        [head, *stages, *_listing("what fell short", record, "FELL SHORT"), *_listing("not looked at", record, "not looked at")]
    )


def _stage(record: Record, number: int) -> str:
    line = record.outcome(number)
    if line is None:
        return f"  {number} was not got to"
    return f"  {number} {line.name:<14}{line.verdict:<15}{line.seconds:7.1f} s  {line.reason}".rstrip()


def _listing(title: str, record: Record, verdict: str) -> list[str]:
    found = [_told(line) for line in record.lines if line.part and line.verdict == verdict]
    return [f"{title}:", *found] if found else []


def _told(line: Line) -> str:
    return f"  {line.stage} {line.name}, {line.part}: {line.reason}"
