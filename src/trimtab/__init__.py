"""trimtab: fine-tune a large frozen model with a small trained part."""

__version__ = "0.1.0"
