"""Triton kernels, each under the name and signature of its plain reference in `functional`."""
