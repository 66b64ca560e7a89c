"""How Sphinx makes pages of the package's docstrings: `make docs`."""

import rnnfast

project = "rnnfast"
release = rnnfast.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "description": "Fused recurrent layers for PyTorch"}
html_show_copyright = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures of layers are long, and the docstrings say shapes and dtypes
python_maximum_signature_line_length = 100
napoleon_use_rtype = False
