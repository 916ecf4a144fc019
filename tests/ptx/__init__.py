"""An interpreter for PTX on the CPU: compiled kernels are executed and checked without a GPU.

Every lane of every block is an element of numpy arrays, so an instruction is one array operation. The interpreter is
stricter than a GPU. It raises an error for accesses outside the tensors, misaligned accesses, data races within a block
(two warps access the same shared byte between barriers, and one writes), reads of bytes that ``cp.async`` or ``wgmma``
still use, missing proxy fences, and two blocks that write the same byte of global memory. Formats: PTX ISA 9, sections
9.7 (instructions) and 9.7.13 to 9.7.15 (matrix fragments).
"""
