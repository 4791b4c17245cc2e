"""Soak test: a long run of mixed requests from many threads, which checks each picture and the memory."""
