"""A machine that runs PTX on the CPU, for tests: what the compiler made of a kernel is executed without a GPU and
checked as it goes.

Every lane of every block is one element of numpy arrays, so one instruction is one array operation. The machine is
stricter than a GPU: it stops at accesses outside the tensors, at misaligned ones, at data races within a block (two
warps touch the same shared byte between barriers, one of them writing), at reads of bytes that ``cp.async`` or
``wgmma`` still own, at missing proxy fences, and where two blocks write the same byte of global memory. Formats: PTX
ISA 9, sections 9.7 (instructions) and 9.7.13 to 9.7.15 (matrix fragments).
"""
