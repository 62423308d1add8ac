"""Triton kernels: tiles of S = X Yᵀ are reduced or turned into pair weights where they are computed."""

if __name__ == "kernels":
    raise ImportError("import flashpair.kernels; this folder is not a package of its own")
