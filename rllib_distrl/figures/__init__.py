"""The look of all figures, and the plot of pass@k that all pages share."""
