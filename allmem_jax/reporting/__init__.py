"""What measurements look like: sections of plain data, and a page that shows them.

sections   sentences, tables and plots as plain data
page       report.json, index.html and plots in a folder
"""

__all__ = ["page", "sections"]
