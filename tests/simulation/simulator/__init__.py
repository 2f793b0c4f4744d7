"""A whole cell in one process: real servers, real clients, model kernels, one seed."""
