from .op import upsample_argmax

__all__ = ["upsample_argmax"]
