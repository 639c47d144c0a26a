"""The report of a run as people read it: words that terminal and page share, and the page."""
