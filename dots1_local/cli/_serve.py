"""`dots1 serve`: answer OpenAI's API over HTTP."""

import os
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dots1_local.cli._output import Threads, notice
from dots1_local.cli._planned import Context, Plan, Workers, one_sentence, open_engine
from dots1_local.errors import UsageError

if TYPE_CHECKING:
    from dots1_local.engine.engine import Engine

__all__ = ["serve"]

_PATIENCE = 10  # seconds that answers may go on for when the server is to end


def serve(
    model: Annotated[Path, typer.Argument(help="A dots1 GGUF file.", metavar="FILE.gguf")],
    host: Annotated[
        str, typer.Option("--host", help="Listen at this address; 0.0.0.0 is all there are.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Listen at this port; 0 is a free one.")
    ] = 8000,
    name: Annotated[
        str, typer.Option("--served-model-name", help="What clients call the model.")
    ] = "dots1",
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="DOTS1_API_KEY",
            help="Ask clients for this key. Every user sees it in the list of processes: better "
            "set the variable.",
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option("--parallel", min=1, max=256, help="So many answers at once; 1 if unset."),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", min=0, help="Let so many more wait; others are turned away.")
    ] = 64,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            "--cors", help="Let web pages of this origin in, '*' for all; may be repeated."
        ),
    ] = None,
    context: Context = None,
    plan: Plan = None,
    worker: Workers = None,
    threads: Threads = None,
) -> None:
    """Serve a model over OpenAI's API; Ctrl-C ends it.

    dots1 serve dots1-DQ4.gguf --parallel 4 -c 16k

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json"
    -d '{"model": "dots1", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    _check(name, api_key)
    from dots1_local.serve.run import ApiServer, bind, is_loopback, url_of

    with closing(bind(host, port)) as listener:
        url = url_of(listener)
        if not (api_key or is_loopback(listener)):
            notice(f"warning: whoever reaches {url} may use the model; set an --api-key")
        with (
            one_sentence(),
            ApiServer(listener, name, api_key=api_key, origins=cors or ()) as server,
            _engine(model, context, threads, plan, worker or (), parallel) as engine,
        ):
            try:
                server.open(engine, queue)
                at_once = engine.settings.n_sequences
                notice(
                    f"listening on {url} as {name}, context of {engine.n_ctx:,} tokens, "
                    f"{at_once} {'answer' if at_once == 1 else 'answers'} at once"
                )
                server.wait()
                if server.busy:
                    notice(f"answers have {_PATIENCE} seconds to end; Ctrl-C ends them at once")
                server.close(_PATIENCE)
            except KeyboardInterrupt:  # the second one: the engine may be in a long ubatch
                os._exit(130)


def _check(name: str, api_key: str | None) -> None:
    """Refuse before anything is loaded.

    Raises:
        UsageError: the web server is not installed, or a name or key that nobody could send.
    """
    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise UsageError("dots1 serve needs a web server: pip install 'dots1-local[serve]'")
    if not name.strip() or not name.isprintable():
        raise UsageError("--served-model-name is empty; give what clients are to call the model")
    if api_key is not None and not (
        api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""
    ):
        raise UsageError(
            "--api-key is empty, or has characters that no HTTP header may have, or space around it"
        )


def _engine(
    model: Path,
    context: str | None,
    threads: int | None,
    plan: Path | None,
    workers: Sequence[str],
    parallel: int | None,
) -> "Engine":
    options = {"shared_cache": True, "threads": threads, "n_sequences": parallel}
    try:
        return open_engine(model, context, plan, workers, **options)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
