"""The kernels: one file each, with the reference that defines it beside it.

Import them as ``memopt.kernels``. The folder is called ``kernels`` only in the source tree.
"""

if __name__ != "memopt.kernels":
    raise ImportError(f"import memopt.kernels, not {__name__}: it would be loaded a second time")
