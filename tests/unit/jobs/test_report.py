"""The account of a run."""

import subprocess
import sys

import pytest

LARGE = 600 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="other systems do not tell it of a process alone"
)
def test_the_memory_of_the_process_that_started_this_one_does_not_count():
    held = b"x" * LARGE
    code = "from swifti2v.jobs.report import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < len(held)
