"""OLN (Object Localization Network) for Detectron2."""

__version__ = "0.1.0"
