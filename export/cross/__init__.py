"""Compile AOTInductor packages for a GPU that this machine does not have.

PyTorch and Triton run unchanged in a child process, on stubs of the driver and the CUDA runtime that report the device
and run nothing (`driver.c`, `runtime.c`). Kernels cannot be measured, so they are chosen by rule (`rules.py`).
"""
