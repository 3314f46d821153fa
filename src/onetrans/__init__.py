"""OneTrans Export: a trained OneTrans goes in, a verified, servable bundle comes out."""

__version__ = "0.1.0"
