"""Compiling packages of inductor for a GPU that this machine does not have.

PyTorch and Triton run as they are, in a process of their own, on a driver that says what the device is and runs nothing
(`driver.c`, `runtime.c`). So nothing is measured: kernels are chosen by rule (`rules.py`).
"""
