"""A model behind HTTP, and the page that shows what it looks at. Needs `dycoke[serve]`."""
