"""Reporting: pages, plots and tables made of results."""
