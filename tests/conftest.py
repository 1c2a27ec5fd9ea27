"""Where there is no GPU, Triton's kernels are tested in its interpreter.

Triton asks at its first import, so this stands before every test module. Ahead-of-time compilation,
which the interpreter excludes, is tested in processes of its own.
"""

import os
from importlib.util import find_spec

import torch

if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("quick", max_examples=100, deadline=None)
    settings.register_profile("thorough", max_examples=1000, deadline=None)
    settings.load_profile("quick")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        import quick_interpreter

        quick_interpreter.install()
