"""What emitted modules call at run time."""
