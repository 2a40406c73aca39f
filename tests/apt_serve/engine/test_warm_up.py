"""What a GPU compiles before it serves, seen without one."""

import os
import subprocess
import sys
from pathlib import Path

import apt_kernels

ROOT = Path(__file__).parents[3]


def test_no_step_launches_a_kernel_that_warming_up_did_not_compile():
    path = os.pathsep.join([str(ROOT), str(Path(apt_kernels.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("launched_kernels.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=150, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
