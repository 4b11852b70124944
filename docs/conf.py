"""Sphinx: ``make docs``."""

from sb3_dppo import __version__

project, author = "sb3-dppo", "the authors of sb3-dppo"
copyright = "2026, the authors of sb3-dppo"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"sb3-dppo {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
pygments_dark_style = "monokai"
smartquotes = False  # K' stays K'.
myst_heading_anchors = 4
# Files of the repository, which are no pages.
myst_url_schemes = ["http", "https", "mailto"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autoclass_content = "class"
