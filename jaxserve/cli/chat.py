"""Talk with a model in the terminal. Answers stream; arrow keys bring back earlier lines.

Ctrl-C stops an answer, Ctrl-D leaves. A line that ends in a backslash goes on in the next one.

examples:
  jaxserve chat tiny
  jaxserve chat ./Qwen2.5-0.5B-Instruct --system "Answer in one sentence." --temperature 0
"""

import argparse
import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, Any

from jaxserve.cli.options import add_engine_flags, add_sampling_flags, engine_options, join_processes, sampling_params
from jaxserve.errors import JaxserveError
from jaxserve.model_source import find_folder
from jaxserve.request import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

USAGE = "jaxserve chat MODEL [options]"
DEFAULTS = {"max_tokens": 512, "temperature": 0.7}
HELP = """\
/reset          forget the conversation
/system TEXT    set the system message (no TEXT: remove it) and forget the conversation
/help           this list
/quit           leave; Ctrl-D does the same"""

Messages = list[dict[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="bundled name, folder, or hub id")
    parser.add_argument("--system", metavar="TEXT", default="", help="system message at the start")
    add_sampling_flags(parser, DEFAULTS, skip=("n", "logprobs", "prompt_logprobs"))
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args, DEFAULTS)
    options: dict[str, Any] = {"max_num_seqs": 1} | engine_options(args)
    join_processes(args)
    find_folder(args.model, options.get("load_format", "auto"))  # a mistake in the name is told before jax is loaded
    with contextlib.suppress(ImportError):  # Python may be built without it; then lines have no history
        importlib.import_module("readline")  # input() uses it once it is loaded

    from jaxserve.llm import LLM

    llm = LLM(args.model, **options)
    llm.chat_prompt([{"role": "user", "content": "hello"}])  # no chat template: told now, not after the first line
    print(f"{args.model} is ready. /help lists the commands, Ctrl-D leaves.", file=sys.stderr)
    talk(llm, params, args.system)
    return 0


def talk(llm: "LLM", params: SamplingParams, system: str) -> None:
    """The loop: read a line, obey or answer it."""
    messages = fresh(system)
    while True:
        try:
            line = read_line()
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)", file=sys.stderr)
            continue
        except EOFError:
            print()
            return
        command, _, rest = line.partition(" ")
        if not line:
            continue
        elif command in ("/quit", "/exit"):
            return
        elif command == "/reset":
            messages = [message for message in messages if message["role"] == "system"]
        elif command == "/system":
            messages = fresh(rest.strip())
        elif command == "/help":
            print(HELP)
        elif command.startswith("/") and command[1:].isalpha():
            print(f"no command {command}; /help lists them", file=sys.stderr)
        else:
            answer(llm, params, messages, line)


def fresh(system: str) -> Messages:
    """A conversation with nothing but its system message, if there is one."""
    return [{"role": "system", "content": system}] if system else []


def read_line() -> str:
    """One line of the user; a backslash at the end asks for another."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines).strip()


def answer(llm: "LLM", params: SamplingParams, messages: Messages, line: str) -> None:
    """Stream the answer to a line and add both to the conversation; a line that cannot be answered leaves no trace."""
    asked = [*messages, {"role": "user", "content": line}]
    pieces: list[str] = []
    try:
        for event in llm.stream_events(llm.chat_prompt(asked), params):
            pieces.append(event.text)
            print(event.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except JaxserveError as error:
        print(f"{error} (/reset forgets the conversation)", file=sys.stderr)
        return
    print()
    messages[:] = [*asked, {"role": "assistant", "content": "".join(pieces)}]
