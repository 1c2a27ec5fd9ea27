"""Where there is no GPU, Triton's kernels are tested in its interpreter.

Triton asks at its first import, so this stands before every test module. Ahead-of-time compilation,
which the interpreter excludes, is tested in processes of its own.
"""

import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        import quick_interpreter

        quick_interpreter.install()
