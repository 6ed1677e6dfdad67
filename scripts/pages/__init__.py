"""The documentation's pages of results, a module a page."""
