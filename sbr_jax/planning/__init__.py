"""Plans a job's needs on a TPU slice by compiling ahead of time, without TPUs."""
