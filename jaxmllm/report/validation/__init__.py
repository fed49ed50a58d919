"""A validation for eyes: on the console, as a page, as Markdown and in TensorBoard."""
