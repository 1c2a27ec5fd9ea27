"""A PTX interpreter: it runs on a CPU what Triton's compiler makes of a kernel for a GPU.

    parse       PTX to instructions; what it does not know is an error
    memory      global and shared memory, and what is known of every two bytes
    processor   lanes, registers, and the order of execution
    arithmetic  instructions on registers
    transfers   loads, stores, asynchronous copies
    machine     compute capability 8.0 to 8.9 and 12.0
    hopper      9.0: products of warpgroups
    blackwell   10.0: tensor memory
    launches    stands in for a `triton.jit` function on CPU tensors
    compiled    swaps the kernels of derta_kernels for that
    plugin      does so in pytest

In a process without TRITON_INTERPRET:

    with compiled.kernels(90, contract=True) as runs:
        interval_attention(..., impl="triton")
    runs[-1].hazards, runs[-1].unwritten, runs[-1].coverage

In pytest, `DERTA_PTX=90 pytest tests/kernels/test_head_loss.py -k triton` runs the kernels' tests
on compiled code, and a test with a hazard fails.
"""
