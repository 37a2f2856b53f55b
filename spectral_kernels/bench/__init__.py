"""Measuring: cases, rivals and the one timer, shared by `spectral-kernels bench`, benchmarks/ and `make gpu`."""
