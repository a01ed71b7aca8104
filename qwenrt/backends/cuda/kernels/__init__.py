"""Kernels in Triton, each beside the function that calls it as its definition is called. Imported only where Triton is
known to work: importing one imports Triton."""
