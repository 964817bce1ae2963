"""An OpenAI-compatible server for one model: ``dycoke serve``. Needs ``dycoke[serve]``."""
