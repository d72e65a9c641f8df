"""Memory that is freed stays with the process, so that the next meta-step need not ask for it anew."""

import ctypes
import subprocess
import sys

import pytest

COUNT_PAGE_FAULTS = """
import resource, sys, torch
from applications.imaml.config import Config
from applications.imaml.device import use

if sys.argv[1] == "use":
    use(Config(device="cpu", threads=1))

def work():
    tensors = [torch.ones(4 * 2**20) for _ in range(4)]

for _ in range(4):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    done = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the switch is one of glibc"
)
def test_no_page_is_faulted_in_twice():
    # 640 MiB are allocated in all, in pages of 4 KiB or, where the system joins them, of 2 MiB. The first rounds still
    # find where everything fits.
    assert page_faults("use") < page_faults("leave") / 10
