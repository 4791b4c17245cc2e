"""A bundle: the folder of exported networks that a runtime loads, described by its manifest."""
