"""The public ops, one file each: checks, schema, fake. The work is done by a backend.

`specdiff_kernels` exports the functions. Here each op's name is its module.
"""
