"""What outlives a process: packages of engines and models, and what tells one environment from another."""
