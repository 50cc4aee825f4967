"""Reports of evaluations: result files, figures, galleries and HTML."""
