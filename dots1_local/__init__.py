"""dots1-local: rednote's dots.llm1 on hardware people own."""

__version__ = "0.1.0"
