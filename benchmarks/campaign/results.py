"""The campaign's results: a line of JSON for each trial, and the table of their counts."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.campaign.trial import Part

__all__ = ["Result", "read", "table", "write"]


@dataclass(frozen=True)
class Result:
    """One trial of so many cases. `failure` is empty where everything held."""

    part: str
    name: str
    seed: str
    failure: str
    seconds: float
    cases: int = 1


def read(file: Path) -> Iterator[Result]:
    """Yield the results of earlier runs, without a line that was cut off."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            yield Result(**json.loads(line))


def write(file: Path, result: Result) -> None:
    """Append a result; the line before it may have been cut off."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" + json.dumps(asdict(result)))


def table(parts: Mapping[str, Part], results: Iterable[Result]) -> Iterator[str]:
    """Yield the lines of a Markdown table: a row for each name, and one for each part."""
    of: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        of.setdefault((result.part, result.name), []).append(result)
    yield "| part | what | tried | failed | longest, s | what must hold |"
    yield "|---|---|---|---|---|---|"
    for name, part in parts.items():
        rows = {key[1]: tried for key, tried in of.items() if key[0] == name}
        for what, tried in rows.items():
            yield _row("", what, tried, "")
        if rows:
            everything = [result for tried in rows.values() for result in tried]
            yield _row(name, "all", everything, part.must_hold)


def _row(part: str, what: str, results: list[Result], must_hold: str) -> str:
    failed = sum(1 for result in results if result.failure)
    longest = max(result.seconds for result in results)
    tried = sum(result.cases for result in results)
    return f"| {part} | {what} | {tried:,} | {failed} | {longest:.1f} | {must_hold} |"
