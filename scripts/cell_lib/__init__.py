"""Runs real cells (one server, some mounts) for the tests, the demo and the bench, and gets rid of them again.

`processes` finds and ends what was started, `mounts` what is mounted, `cell` is the cell itself, `guard` cleans up
when nobody else can, `mmap_program` compiles and understands the mmap reader and writer.
"""
