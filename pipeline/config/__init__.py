"""The config: the schema, a module for each section, and its loader."""
