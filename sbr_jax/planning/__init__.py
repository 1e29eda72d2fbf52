"""What a job needs on a slice of TPUs, compiled ahead of time without one."""
