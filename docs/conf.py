"""Configuration of Sphinx: `python -m sphinx -W -n -b html docs build/docs`."""

import numpy.typing

# Before the package is imported: shows ndarray[float32], not ndarray[tuple[Any, ...], dtype[float32]].
numpy.typing.NDArray = numpy.ndarray

import moma_rt  # noqa: E402

project = "moma-rt"
copyright = "the moma-rt authors, Apache License 2.0"
version = release = moma_rt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# GitHub's anchors, so that a link works there and here.
myst_heading_anchors = 3
# Docstrings mark code with single backticks.
default_role = "literal"
smartquotes = False

# Users call no constructor of the documented classes.
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__init__,__new__"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_use_ivar = True
# Types that no page here describes.
nitpick_ignore_regex = [("py:.*", r"(numpy|PIL|pathlib|collections|moma_rt\.[a-z]+)\..*")]

html_theme = "furo"
html_title = f"moma-rt {version}"
