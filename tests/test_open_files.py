"""The limit of open files is raised, and never lowered."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from jaxserve.open_files import raise_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
raise_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(("soft", "hard"), [(100, 500), (500, 500)])
def test_a_process_gets_what_it_may_have(soft, hard):
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= hard
    command = [sys.executable, "-c", PROGRAM, str(soft), str(hard)]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) == hard
