# SPDX-License-Identifier: Apache-2.0
"""`ivg-fast serve`: an HTTP server in OpenAI's form."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path
from typing import Any

from ivg_fast.async_engine import AsyncEngine
from ivg_fast.cli.options import add_fields, add_models, check_models, fields_of
from ivg_fast.cli.search import add_search, search_of
from ivg_fast.engine import Engine
from ivg_fast.errors import IVGError
from ivg_fast.params import EngineConfig
from ivg_fast.server.config import ServerConfig

_LOG = logging.getLogger("ivg_fast")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MAX_TOKENS = 128
_MAX_QUEUED = 64
_MAX_PROMPT_TOKENS = 8192

_DESCRIPTION = f"""Serve a steered model over HTTP: OpenAI's /v1/completions and
/v1/chat/completions, streaming and not, /v1/models, /health and /metrics.

The search options are what a request does not say itself; every field of SearchParams may stand in
its body (beam_width, guidance_weight, ...). Without these options a response has at most
{_MAX_TOKENS} tokens, a prompt at most {_MAX_PROMPT_TOKENS}, and {_MAX_QUEUED} requests may wait; the next one gets status 429.
"""  # noqa: E501
_EPILOG = """examples:
  the base model, for this machine alone:
    ivg-fast serve --base MODEL
  integrated value guidance for every client of OpenAI's, with a key:
    ivg-fast serve --base MODEL --tuned T --untuned U --value V --method ivg --temperature 0.7 \\
      --host 0.0.0.0 --api-key-file key.txt
  a request that says how it is steered:
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d \\
      '{"model": "MODEL", "prompt": "I saw this film", "max_tokens": 50, "beam_width": 4,
        "num_candidates": 4, "chunk_length": 5, "guidance": "implicit", "scorer": "explicit"}'

SIGTERM or ctrl-C lets the accepted requests finish, for --drain-timeout-s at most; another ctrl-C
ends them.
"""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, in OpenAI's form",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_models(parser)
    server = parser.add_argument_group("server (see ServerConfig)")
    add_fields(server, ServerConfig)
    key = server.add_mutually_exclusive_group()
    key.add_argument("--api-key-file", type=Path, help="a file with the key that clients must send")
    key.add_argument(
        "--api-key-env", metavar="NAME", help="the environment variable that holds the key"
    )
    add_search(parser, "search (see SearchParams), for what a request does not say itself")
    add_fields(parser.add_argument_group("engine (see EngineConfig)"), EngineConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> bool:
    """Serves until it is told to end."""
    missing = [n for n in ("fastapi", "uvicorn", "prometheus_client") if not _is_there(n)]
    if missing:
        raise IVGError(f"serve needs {', '.join(missing)}: pip install 'ivg_fast[server]'")
    from ivg_fast.server.app import create_app
    from ivg_fast.server.serve import listen, read_key, serve

    config = ServerConfig(**fields_of(arguments, ServerConfig))
    key = read_key(arguments.api_key_file, arguments.api_key_env)
    asked = search_of(arguments, max_tokens=min(_MAX_TOKENS, config.max_response_tokens))
    options = fields_of(arguments, EngineConfig)
    options.setdefault("max_queued_requests", _MAX_QUEUED)
    options.setdefault("max_prompt_tokens", _MAX_PROMPT_TOKENS)
    params = asked.params
    kinds = [("guidance", params.guidance), ("scorer", params.scorer)]
    check_models(asked.models, kinds, arguments.model_kwargs)
    if key is None and config.host not in _LOOPBACK:
        _LOG.warning("no API key: everybody who reaches %s can use this server", config.host)
    listener = listen(config)  # before minutes are spent on models
    engine = Engine.from_pretrained(
        **asked.models,
        device=arguments.device,
        dtype=arguments.dtype,
        model_kwargs=arguments.model_kwargs,
        templates=asked.templates or None,
        config=EngineConfig(**options),
    )
    engine.warmup()
    name = Path(asked.models["base"]).name
    # It stops with the application, or the process.
    served = AsyncEngine(engine, niceness=config.niceness)
    app = create_app(served, name, defaults=params, config=config, api_key=key)
    serve(app, config, listener)
    return True


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
