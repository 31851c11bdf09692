"""Everything about a GPU outside the kernels: the device, generated code, traffic, the roofline, timing, tuning."""
