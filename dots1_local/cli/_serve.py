"""`dots1 serve`: serve a model over OpenAI's API."""

import os
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.cli import _options as shared
from dots1_local.cli._open import open_engine, report_abort
from dots1_local.cli._options import flag, option, verb
from dots1_local.cli._output import notice, plural
from dots1_local.cli._prompt_cache import check_sizes, open_cache
from dots1_local.errors import UsageError
from dots1_local.sizes import human_bytes

if TYPE_CHECKING:
    from dots1_local.chat.draft import Draft
    from dots1_local.engine.engine import Engine

__all__ = ["ServeOptions", "serve"]

_GRACE = 10  # seconds that answers get to finish when the server ends


@dataclass(frozen=True, eq=False, repr=False)
class ServeOptions:
    model: shared.Model
    host: str = option(
        "Listen at this address; 0.0.0.0 is every address of this machine.",
        value="127.0.0.1",
        envvar="DOTS1_HOST",
    )
    port: int = option("Listen at this port; 0 picks a free one.", value=8000, min=0, max=65535)
    name: str = option(
        "Let clients call the model by this name.", "--served-model-name", value="dots1"
    )
    api_key: str | None = option(
        "Ask clients for this key. Prefer the environment variable, because every user of "
        "this machine can read the options of a process.",
        envvar="DOTS1_API_KEY",
    )
    parallel: int | None = option("Write this many answers at once.", min=1, max=255, default="1")
    queue: int = option("Let this many more requests wait, and refuse others.", value=64, min=0)
    prompt_cache_ram: str | None = option(
        "Keep up to SIZE of earlier prompts' KV caches in RAM, for conversations that come back; "
        "0 keeps none.",
        metavar="SIZE",
        default="a quarter of the free RAM, at most 8 GiB",
    )
    prompt_cache: Path | None = option(
        "Keep earlier prompts' KV caches in this folder too. They outlast the server, and several "
        "servers may share it.",
        metavar="DIR",
    )
    prompt_cache_size: str | None = option(
        "Keep up to SIZE in that folder.",
        metavar="SIZE",
        default="half of the disk's free space, at most 64 GiB",
    )
    score_batch: int = option(
        "Compute log-probabilities of this many prompt tokens at once, for requests with echo and "
        "logprobs. Each takes 0.6 MB of RAM, and of the GPU that holds the output layer.",
        value=64,
        min=1,
        max=4096,
    )
    cors: list[str] | None = option(
        "Let web pages of this origin call the server, '*' for all; repeatable."
    )
    no_page: bool = flag("Do not show the chat page at /.", "--no-page")
    chat_template: shared.ChatTemplate = None
    draft: shared.DraftTokens = None
    context: shared.Context = None
    plan: shared.Plan = None
    worker: shared.Workers = None
    threads: shared.Threads = None


@verb
def serve(options: ServeOptions) -> None:
    """Serve a model over OpenAI's API; Ctrl-C ends the server.

    dots1 serve dots1-DQ4.gguf --parallel 4 -c 16k

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json"
    -d '{"model": "dots1", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    _check(options)
    draft = shared.parse_draft(options.draft)
    from dots1_local.engine.abort import on_abort
    from dots1_local.serve.run import ApiServer, bind, is_loopback, url_of

    name, key = options.name, options.api_key
    with closing(bind(options.host, options.port)) as listener:
        url = url_of(listener)
        page = "" if options.no_page else f"; chat page at {url.removesuffix('v1')}"
        if not (key or is_loopback(listener)):
            notice(f"warning: anyone who reaches {url} may use the model; set an --api-key")
        with (
            report_abort(),
            ApiServer(
                listener, name, api_key=key, origins=options.cors or (), page=not options.no_page
            ) as server,
            on_abort(server.abort),
            _open_engine(options, draft) as engine,
        ):
            try:
                cache = open_cache(
                    engine,
                    options.prompt_cache_ram,
                    options.prompt_cache,
                    options.prompt_cache_size,
                )
                if options.prompt_cache:
                    used = human_bytes(cache.disk_used)
                    notice(f"{options.prompt_cache} holds {used} of earlier prompts")
                server.open(engine, options.queue, draft, cache)
                notice(
                    f"listening on {url} as {name}, context of {engine.n_ctx:,} tokens, "
                    f"{plural(engine.params.n_sequences, 'answer')} at once{page}"
                )
                server.wait()
                if server.busy:
                    notice(f"answers have {_GRACE} seconds to end; Ctrl-C ends them at once")
                if not server.close(_GRACE):
                    notice("the engine does not end its last step; ended without it")
                    os._exit(0)
            except KeyboardInterrupt:  # the second one: the engine may be in a long ubatch
                server.abort("the server is shutting down")
                os._exit(130)


def _check(options: ServeOptions) -> None:
    """Refuse a name or key that clients cannot send, before anything is loaded."""
    if not all(map(find_spec, ("prometheus_client", "starlette", "uvicorn"))):
        raise UsageError("dots1 serve needs a web server: pip install 'dots1-local[serve]'")
    if not options.name.strip() or not options.name.isprintable():
        raise UsageError("--served-model-name must have a visible name for clients to use")
    check_sizes(options.prompt_cache_ram, options.prompt_cache, options.prompt_cache_size)
    key = options.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise UsageError(
            "--api-key must be printable ASCII characters without a space at either end"
        )


def _open_engine(options: ServeOptions, draft: "Draft") -> "Engine":
    from dots1_local.chat.draft import longest_draft

    with shared.exit_on_interrupt():
        return open_engine(
            options.model,
            options.context,
            options.plan,
            options.worker or (),
            template=options.chat_template,
            shared_cache=True,
            threads=options.threads,
            n_sequences=options.parallel,
            n_draft=longest_draft(draft),
            n_scored=options.score_batch,
        )
