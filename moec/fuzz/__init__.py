"""Fuzzing: random graphs, modules and files, and the questions that are asked of them."""
