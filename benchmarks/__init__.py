"""What is measured and how: speed on a GPU, cost of compiled code and of the host path without one."""
