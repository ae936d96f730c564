"""Sphinx configuration of the companion. `valuecot.companion.pages` copies this folder, adds the pages, and builds; nothing here runs a notebook."""

import re
import shutil
from pathlib import Path

from pygments.formatters import HtmlFormatter
from pygments.token import Comment, Keyword, Name, String, Text
from sphinx.highlighting import PygmentsBridge

from valuecot.companion.safe import guard

project, author, copyright = "valuecot", "the valuecot authors", "the valuecot authors"
extensions = ["myst_nb", "sphinxcontrib.bibtex", "sphinx_design", "sphinx_copybutton"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
suppress_warnings = ["mystnb.unknown_mime_type", "myst.mathjax"]

nb_execution_mode = "off"  # papermill has executed them
nb_ipywidgets_js = {}  # its default asks two CDNs
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_disable_syntax = ["html_block", "html_inline"]  # text that looks like HTML is text
myst_heading_anchors = 3
bibtex_bibfiles = ["refs.bib"]
bibtex_default_style = "unsrt"
add_module_names = False  # the reference says under which module a name stands
toc_object_entries = False  # as headings of a page, hundreds of names would hide its modules

html_theme = "sphinx_book_theme"
html_title = "valuecot companion"
html_static_path = ["_static"]
html_css_files = ["print.css"]
html_js_files = [(name, {"defer": "defer"}) for name in ("figures.js", "browser.js", "access.js")]
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is; the theme complains where it is not said
html_show_search_summary = False  # it fetches the pages, which a browser refuses on file://
mathjax_path = "mathjax/tex-mml-chtml.js"  # copied beside the pages: no CDN
mathjax3_config = {"tex": {"packages": {"[-]": ["require", "autoload"]}}}  # the macros that they load can link to scripts and fetch pictures
html_theme_options = {
    "announcement": "",  # the build says here what a small profile cannot prove
    "logo": {"text": "valuecot companion"},
    "show_toc_level": 2,
    "navbar_persistent": [],  # the sidebar has the search already
    "home_page_in_toc": True,
    "collapse_navbar": True,  # a page lists its own branch; all of them on every page would be most of the site
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_source_button": False,
    "use_repository_button": False,
}
html_copy_source = False
html_use_index = html_domain_indices = False  # the reference lists every name under its module, and the search finds it
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False


class Sparing(HtmlFormatter):
    "Code in which keywords, strings, comments and what is defined are marked, and nothing else: a page is half as long."

    def format_unencoded(self, tokens, outfile):
        marked = Comment, Keyword, String, Name.Function, Name.Class, Name.Decorator
        kept = ((next((family for family in marked if kind in family and kind not in String.Interpol), Text), text) for kind, text in tokens)
        super().format_unencoded(kept, outfile)


PygmentsBridge.html_formatter = Sparing


AS_WRITTEN = re.compile(r"(<(pre|textarea|script|style)\b.*?</\2>)", re.DOTALL)
ICONS = re.compile(r"<(?:script|link)\b[^>]*fontawesome\.js[^>]*>(?:</script>)?")  # the icons once more, as 1.5 MB of script: the style sheet draws them from its font


def shortened(page: str) -> str:
    "A page without the theme's empty lines and indents."
    parts = AS_WRITTEN.split(ICONS.sub("", page))  # text, what stays, its tag, text, ...
    return "".join(re.sub(r"[ \t]*\n\s*", "\n", part) if i % 3 == 0 else part for i, part in enumerate(parts) if i % 3 < 2)


def slim(app, error):
    "Leave out what nobody reads; the theme's source maps, 3.5 MB, serve only who debugs the theme."
    static = Path(app.outdir, "_static")
    for file in (f for name in ("*.map", "*.po", "*.mo", "fontawesome.js") for f in static.rglob(name)):
        file.unlink()
    shutil.rmtree(static / "locales", ignore_errors=True)  # folders of 90 languages, empty now
    for file in Path(app.outdir).rglob("*.html"):
        file.write_text(shortened(file.read_text(encoding="utf-8")), encoding="utf-8")


def setup(app):
    "What a page may not do is taken out before pictures and downloads are collected."
    app.connect("doctree-read", guard, priority=100)
    app.connect("build-finished", slim)
