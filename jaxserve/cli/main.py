"""The `jaxserve` command. Sub-commands are imported when they are asked for, so that `--help` is quick."""


def main() -> int:
    """Entry point of the console script and of `python -m jaxserve`."""
    raise SystemExit("jaxserve: the command line is not written yet")
