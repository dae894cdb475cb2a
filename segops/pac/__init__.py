from .op import pyramid_atrous_conv2d

__all__ = ["pyramid_atrous_conv2d"]
