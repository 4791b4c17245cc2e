"""A long mixed run from many threads: each picture checked, memory watched."""
