"""The kernels for NumPy arrays: Numba and BLAS, in channels-last memory."""
