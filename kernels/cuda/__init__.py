"""The kernels for CuPy arrays, in array-module functions; NumPy arrays run through them as well."""
