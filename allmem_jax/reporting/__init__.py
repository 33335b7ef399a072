"""What measurements look like: sections of plain data, and a page that shows them.

sections   sentences, tables and plots as plain data, and the commands that make them again
kept       results that are found again under what they depend on
page       report.json, index.html (page.html, filled in) and plots in a folder
"""

__all__ = ["kept", "page", "sections"]
