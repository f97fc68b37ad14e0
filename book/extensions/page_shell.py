"""A Sphinx extension for this book: leave out the scripts of Thebe.

Thebe makes the cells of a page executable by a server, which this book does not have. Its scripts
are nevertheless added to every page, some of them twice, so that browsers report an error.
"""

from typing import Any


def leave_out_thebe(app: Any, page: str, template: str, context: dict, doctree: Any) -> None:
    """Remove the scripts of Thebe from the files that a page asks for."""
    scripts = context.get("script_files", [])
    context["script_files"] = [script for script in scripts if not _is_of_thebe(script)]


def _is_of_thebe(script: Any) -> bool:
    source = f"{getattr(script, 'filename', script)} {getattr(script, 'attributes', {})}"
    return "thebe" in source.lower()


def setup(app: Any) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    # After the extensions that add scripts to a page.
    app.connect("html-page-context", leave_out_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
