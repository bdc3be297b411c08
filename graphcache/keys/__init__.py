"""What makes two calls the same: the state that a graph depends on, and the guards that compare it."""
