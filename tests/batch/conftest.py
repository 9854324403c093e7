"""run-batch, whole: what is planned is seen by what it submits."""

from tests.cli.conftest import batch, checkpoint, cli, fake_llm

__all__ = ["batch", "checkpoint", "cli", "fake_llm"]
