"""Image sources: a module for each, and the catalog that names them."""
