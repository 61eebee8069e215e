"""Training steps of whole models under a memory budget: what is kept, what runs again, and when."""
