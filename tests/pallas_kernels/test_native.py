from pathlib import Path

import pytest

from jaxserve.pallas_kernels import native

LIBRARY = native.Library(Path(__file__), ("Symbol",))  # not C++: nothing here may get as far as loading it


def test_without_a_compiler_the_reason_says_so(tmp_path):
    with pytest.raises(OSError, match="no C\\+\\+ compiler"):
        native.compile_library(None, LIBRARY.source, tmp_path)


def test_a_compiler_that_fails_says_why(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(OSError, match="no such header"):
        native.compile_library(str(broken), LIBRARY.source, tmp_path / "native")
    assert not list((tmp_path / "native").iterdir())


def test_kernels_are_refused_until_enabled():
    native.enable(None)  # a model made by another test in this process has enabled them
    assert native.refusal(LIBRARY) == "not enabled"


def test_a_machine_that_cannot_is_asked_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(native, "_verdicts", {})
    monkeypatch.setattr(native, "_register", lambda library, folder: asked.append(folder) or "the compiler fails")
    native.enable(tmp_path)
    verdicts = [native.refusal(LIBRARY) for _ in range(3)]
    native.enable(None)
    assert verdicts == ["the compiler fails"] * 3
    assert asked == [tmp_path]
