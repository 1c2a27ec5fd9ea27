"""Pages, plots and tables of evaluation results."""
