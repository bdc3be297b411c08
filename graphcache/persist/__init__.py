"""What outlives the process, in files: which calls to prepare."""
