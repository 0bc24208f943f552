"""Compiled code for CPUs: the library, its structs, and single operations.

It is built at installation if there is a C++ compiler; without it the modules of
`minllama.model.llama` compute the same, only slower. `minllama.engine.cpu` calls it for whole
forward passes.
"""
