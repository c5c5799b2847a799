"""`dots1 inspect` of a calibration: which experts its text used, and what a cache would hit."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.cli._output import notice, print_json, print_table

if TYPE_CHECKING:
    from dots1_local.calibrate.routing_summary import RoutingSummary

__all__ = ["inspect_routing"]

_SHARES = (0.25, 0.5, 0.75)  # of the experts, that the table by layers shows


def inspect_routing(folder: Path, svg: Path | None, *, json: bool) -> None:
    """Print the routing in a calibration folder, and draw its hit rates to `svg`.

    Raises:
        Dots1Error: the folder has no routing file, or a damaged one; the picture cannot be written.
    """
    from dots1_local.calibrate.routing import load_routing
    from dots1_local.calibrate.routing_summary import routing_picture, summarise
    from dots1_local.files.partial_file import check_parent, disk_errors, write_whole

    if svg is not None:
        check_parent(svg)
    found = summarise(load_routing(folder))
    if json:
        print_json({"path": str(folder), "kind": "calibration", **found.to_json()})
    else:
        _show(folder, found)
    if svg is not None:
        with disk_errors(svg, kept=False):
            write_whole(svg, routing_picture(found).encode())
        notice(f"drew {svg}")


def _show(folder: Path, found: "RoutingSummary") -> None:
    routing = found.routing
    traced = routing.trace.shape[1]
    print(
        f"{folder}: calibration, {routing.used} of {routing.experts} experts per token in "
        f"{len(routing.layers)} layers, {routing.tokens:,} tokens, {traced:,} of them traced\n"
    )
    places = [found.size_of(share) for share in _SHARES]
    sizes = [int(found.sizes[place]) for place in places]
    header = ["layer", f"top {found.top}", "effective"]
    header += [f"{name} {size}" for name in ("LRU", "hot") for size in sizes]
    rows = [[str(layer), *row] for layer, row in zip(routing.layers, _rows(found), strict=True)]
    lru, static = found.lru.mean(0), found.static.mean(0)
    means = [f"{found.top_share.mean():.1%}", f"{found.effective.mean():.1f}"]
    means += [f"{rates[place]:.1%}" for rates in (lru, static) for place in places]
    print_table(header, rows, numbers_from=0, total=["all", *means])
    print()
    rows = [
        [str(size), f"{size / routing.experts:.0%}", f"{hit:.1%}", f"{hot:.1%}"]
        for size, hit, hot in zip(found.sizes.tolist(), lru, static, strict=True)
    ]
    print_table(("experts a layer", "share", "LRU hits", "hot set hits"), rows, numbers_from=0)


def _rows(found: "RoutingSummary") -> Iterator[list[str]]:
    places = [found.size_of(share) for share in _SHARES]
    for most, effective, lru, static in zip(
        found.top_share, found.effective, found.lru, found.static, strict=True
    ):
        rates = [rates[place] for rates in (lru, static) for place in places]
        yield [f"{most:.1%}", f"{effective:.1f}", *(f"{rate:.1%}" for rate in rates)]
