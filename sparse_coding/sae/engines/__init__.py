"""What steps stacks fast: compiled kernels for the CPU and for GPUs."""
