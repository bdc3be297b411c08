"""Many graphs: what tells two calls apart, which graphs are kept, which calls are not worth another try."""
