"""Tests of emitted Triton kernels on the CPU, through Triton's interpreter.

Triton chooses between interpreter and compiler when it is imported, for the whole process. So this
folder has a process of its own (`make test` starts it), and is left out of every other run.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
