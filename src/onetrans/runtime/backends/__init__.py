"""Backends: one file per engine behind the contract in `base.py`; `registry.py` opens the one a bundle was made for."""
