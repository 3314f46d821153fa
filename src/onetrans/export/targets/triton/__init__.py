"""The Triton kernels as a target: a graph of ops that AOTInductor and CUDA graphs take, its state in slabs."""
