"""Where there is no GPU, Triton's kernels are tested in its interpreter.

Triton asks at its first import, so this stands before every test module. Ahead-of-time compilation,
which the interpreter excludes, is tested in processes of its own.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
