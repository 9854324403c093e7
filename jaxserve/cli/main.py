"""The `jaxserve` command: finds the sub-command, hands over, and turns failures into one sentence and an exit code.

Sub-commands are modules with `USAGE`, `add_arguments(parser)` and `run(args) -> int`, or with `COMMANDS` of their own; each
is imported only when it is asked for, and imports jax only after its arguments are known to be right, so that `--help` and
mistakes are quick.
"""

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from jaxserve.cli.flags import parse
from jaxserve.config import nearest
from jaxserve.errors import JaxserveError

COMMANDS = {
    "generate": ("jaxserve.cli.generate", "complete prompts, streaming the text"),
    "chat": ("jaxserve.cli.chat", "talk with a model in the terminal"),
    "serve": ("jaxserve.cli.serve", "serve a model over HTTP: OpenAI's API, vLLM's options"),
    "run-batch": ("jaxserve.cli.run_batch", "answer a file of requests in the OpenAI batch format; resumable"),
    "bench": ("jaxserve.cli.bench", "measure throughput or latency, here or of a server"),
    "simulate": (
        "jaxserve.cli.simulate",
        "replay a workload on chips that are not here, to choose policy, chip and layout",
    ),
    "plan": ("jaxserve.cli.plan", "tell whether a model fits some devices, and how it would be spread over them"),
    "models": ("jaxserve.cli.models", "list what can be served, or describe one checkpoint"),
}
ABOUT = "Serve language models with JAX."
EXAMPLE = 'example:\n  jaxserve generate tiny "def add(a, b):"'
# So many new objects until garbage is looked for. What is loaded stays, and with Python's own 700 a sixth of the time to
# load it went into looking at it.
NEW_OBJECTS = 50_000
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells expect
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script and of `python -m jaxserve`. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    gc.set_threshold(NEW_OBJECTS)
    try:
        code = dispatch(arguments)
        sys.stdout.flush()
        return code
    except JaxserveError as error:
        print(f"jaxserve: {error}", file=sys.stderr)
        return EXIT_USAGE
    except BrokenPipeError:
        # Whoever read us has gone (`| head`). Without this, the interpreter complains once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        print(f"jaxserve: {os_error_sentence(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("\njaxserve: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def dispatch(arguments: list[str]) -> int:
    """Run the sub-command that `arguments` name."""
    if arguments and arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"jaxserve {version('jaxserve')}")
        return 0
    return choose("jaxserve", COMMANDS, f"{ABOUT}\n\n{EXAMPLE}", arguments)


def choose(prog: str, commands: Mapping[str, tuple[str, str]], about: str, arguments: list[str]) -> int:
    """Run the one of `commands` that is named first, or tell which there are."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview(prog, commands, about))
        return 0 if arguments else EXIT_USAGE
    name = arguments[0]
    if name not in commands:
        hint = nearest(name, commands)
        known = f"did you mean {hint!r}?" if hint else f"there are {', '.join(commands)}"
        print(f"{prog}: no sub-command {name!r}; {known}", file=sys.stderr)
        return EXIT_USAGE
    module = importlib.import_module(commands[name][0])
    if hasattr(module, "COMMANDS"):
        return choose(f"{prog} {name}", module.COMMANDS, module.__doc__ or "", arguments[1:])
    parser = argparse.ArgumentParser(
        prog=f"{prog} {name}",
        usage=module.USAGE,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return module.run(parse(parser, arguments[1:]))


def overview(prog: str, commands: Mapping[str, tuple[str, str]], about: str) -> str:
    """The text of `--help` where there are sub-commands; `about` is a paragraph, then more."""
    first, _, more = about.strip().partition("\n\n")
    rows = "\n".join(f"  {name:<12}{summary}" for name, (_, summary) in commands.items())
    return (
        f"usage: {prog} COMMAND [options]\n\n{first}\n\ncommands:\n{rows}\n\n"
        f"Each command explains itself: {prog} COMMAND --help\n\n{more}"
    ).rstrip()


def os_error_sentence(error: OSError) -> str:
    """'no such file: x', instead of '[Errno 2] ...'."""
    reason = (error.strerror or str(error)).lower()
    return f"{reason}: {error.filename}" if error.filename else reason
