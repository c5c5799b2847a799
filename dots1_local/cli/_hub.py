"""Checkpoints on the hub, on the command line: which one, and what it takes of the disk."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dots1_local.cli._output import human_bytes, notice

if TYPE_CHECKING:
    from dots1_local.convert import Conversion
    from dots1_local.files.checkpoint import Checkpoint

__all__ = ["LowDisk", "Revision", "hub_json", "open_source", "print_shards"]

_PANEL = "A checkpoint on the hub"

Revision = Annotated[
    str | None,
    typer.Option(
        metavar="REVISION",
        help="Branch, tag or commit.",
        show_default="main",
        rich_help_panel=_PANEL,
    ),
]
LowDisk = Annotated[
    bool,
    typer.Option(
        "--low-disk",
        help="Fetch, convert and drop shard by shard: the disk needs room for the file and a few "
        "shards.",
        rich_help_panel=_PANEL,
    ),
]


def open_source(checkpoint: str, revision: str | None, low_disk: bool) -> "Checkpoint":
    """The folder, or the model on the hub."""
    from dots1_local.hub import HubCheckpoint, open_checkpoint

    try:
        source = open_checkpoint(checkpoint, revision)
    except KeyboardInterrupt:
        notice("stopped")
        raise typer.Exit(130) from None
    if low_disk and not isinstance(source, HubCheckpoint):
        raise typer.BadParameter("a folder is on the disk already", param_hint="--low-disk")
    return source


def print_shards(conversion: "Conversion", file_bytes: int) -> None:
    """What is to be fetched, and how much of it lies on disk at once; nothing of a folder."""
    found = hub_json(conversion)
    if not found:
        return
    hub = found["hub"]
    print(
        f"\n{hub['id']} at commit {hub['commit'][:12]}: {human_bytes(hub['bytes'])} in "
        f"{hub['shards']} shards, {human_bytes(hub['cached_bytes'])} of it in the cache"
    )
    low, least = hub["low_disk"], hub["low_disk_least"]
    print(
        f"with --low-disk at most {low['shards']} shards, {human_bytes(low['bytes'])}, lie on disk "
        f"at once: {human_bytes(low['bytes'] + file_bytes)} with the file"
    )
    if least != low:
        print(f"where that does not fit, {least['shards']} shards, {human_bytes(least['bytes'])}")


def hub_json(conversion: "Conversion") -> dict[str, Any]:
    """The same for scripts; bytes on disk are of shards alone."""
    from dots1_local.convert.from_hub import order_of
    from dots1_local.hub import HubCheckpoint
    from dots1_local.hub.shards import ShardCache

    source = conversion.checkpoint
    if not isinstance(source, HubCheckpoint) or not source.shard_files:
        return {}
    whole = sum(file.size for file in source.shard_files)
    order = order_of(source, conversion.tensors)
    peaks = {"low_disk": order.peak(1), "low_disk_least": order.peak(0)}
    return {
        "hub": {
            "id": source.repo.name,
            "commit": source.repo.commit,
            "shards": len(source.shards),
            "bytes": whole,
            "cached_bytes": whole - sum(file.size for file in ShardCache(source).missing()),
            **{key: {"shards": p.shards, "bytes": p.nbytes} for key, p in peaks.items()},
        }
    }
