"""Try each part of the campaign, and print a table of what was tried and what failed.

    python -m benchmarks.campaign --work build/campaign
    python -m benchmarks.campaign kills --only chat --count 20 --seed 7
    python -m benchmarks.campaign kills --again kills/chat/7/13

A trial draws all that it does from the seed PART/NAME/SEED/NUMBER, which is printed where it fails;
its folder then stays. Results go to results.jsonl in the working folder: a campaign that was
stopped goes on after them. The exit status is 1 if a trial of this run failed.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.campaign import faults, http, kills, memory, mutants, results, workers
from benchmarks.campaign.results import Result
from benchmarks.campaign.trial import Broken, Part, Trial

PARTS: dict[str, Part] = {
    "kills": kills.PART,
    "mutants": mutants.PART,
    "http": http.PART,
    "faults": faults.PART,
    "memory": memory.PART,
    "workers": workers.PART,
}


@dataclass(frozen=True)
class _Task:
    part: str
    name: str
    trial: Trial
    seed: str


def main() -> None:
    """Run what the command line names."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "results.jsonl"
    tasks = [_again(options.again)] if options.again else list(_tasks(options, file))
    failed = False
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(lambda task: _try(task, options.work), tasks):
            if result.failure:
                print(f"{result.seed}: {result.failure}", file=sys.stderr)
                failed = True
            if not options.again:
                results.write(file, result)
    print("\n".join(results.table(PARTS, results.read(file))))
    sys.exit(failed)


def _tasks(options: argparse.Namespace, file: Path) -> Iterator[_Task]:
    done = {result.seed for result in results.read(file)}
    for part in options.parts or PARTS:
        for name, (trial, count) in PARTS[part].trials.items():
            if options.only and name not in options.only:
                continue
            for number in range(options.count or count):
                seed = f"{part}/{name}/{options.seed}/{number}"
                if seed not in done:
                    yield _Task(part, name, trial, seed)


def _again(seed: str) -> _Task:
    part, name = seed.split("/")[:2]
    return _Task(part, name, PARTS[part].trials[name][0], seed)


def _try(task: _Task, work: Path) -> Result:
    folder = work / task.seed
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    failure, cases = "", None
    try:
        cases = task.trial(Random(task.seed), folder)
    except Broken as broken:
        failure = str(broken)
    except Exception as error:  # a trial that can't be made counts as one that failed
        failure = f"{type(error).__name__}: {error}"
    if not failure:
        shutil.rmtree(folder)
    seconds = time.perf_counter() - start
    return Result(task.part, task.name, task.seed, failure, seconds, cases or 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a row of the table; repeats"
    )
    parser.add_argument("--count", type=int, help="trials of each name, in place of its own count")
    parser.add_argument("--seed", default="0", help="what all random numbers are drawn from")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--work", type=Path, default=Path("build/campaign"))
    parser.add_argument("--again", metavar="PART/NAME/SEED/NUMBER", help="one trial, by its seed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
