from .op import max_pool2d_with_offsets, max_unpool2d_with_offsets, partial_attention_gate

__all__ = ["max_pool2d_with_offsets", "max_unpool2d_with_offsets", "partial_attention_gate"]
