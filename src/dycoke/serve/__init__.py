"""An OpenAI-compatible server for one model, and the page that shows what it looks at.

``dycoke serve`` and ``dycoke view``. Needs ``dycoke[serve]``.
"""
