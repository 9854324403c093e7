"""Serve a model over HTTP, as OpenAI's API and vLLM's server do.

examples:
  jaxserve serve tiny
  jaxserve serve ./Qwen2.5-0.5B-Instruct --served-model-name qwen --port 8080
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def add(a, b):"}'
"""

import argparse

from jaxserve.cli.flags import add_dataclass_flags, given
from jaxserve.cli.options import add_engine_flags, engine_options, join_processes
from jaxserve.config import api_keys_of_environment
from jaxserve.errors import ConfigError
from jaxserve.model_source import find_folder
from jaxserve.server.config import GROUPS, ServerConfig

USAGE = "jaxserve serve MODEL [options]"
DEFAULTS = {"max_num_seqs": 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="bundled name, folder, or hub id")
    add_dataclass_flags(parser, ServerConfig, "server options", groups=GROUPS)
    add_engine_flags(parser, DEFAULTS)


def run(args: argparse.Namespace) -> int:
    server_options = given(args, ServerConfig)
    if not server_options.keys() & {"api_key", "api_key_file"}:
        server_options["api_key"] = api_keys_of_environment()
    config, options = ServerConfig(**server_options), engine_options(args, DEFAULTS)
    if config.log_format == "json":
        options.setdefault("progress", False)  # what is no line of JSON has no place among them
    join_processes(args)
    find_folder(args.model, options.get("load_format", "auto"))  # a mistake in the name is told before jax is loaded
    try:
        from jaxserve.server.run import run_server
    except ImportError as error:
        raise ConfigError(
            f"the server needs a package that is not installed ({error.name})",
            remedy="Install it with: pip install 'jaxserve[server]'",
        ) from None

    def load():
        from jaxserve.async_engine import AsyncEngine

        return AsyncEngine(args.model, max_requests=config.max_requests, **options)

    run_server(config, tuple(config.served_model_name) or (args.model,), load)
    return 0
